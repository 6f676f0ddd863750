//! Bugs on purpose, which must show behind the kernel as well, by each way. Only where the feature
//! `planted` is; then nothing else is tested.
//!
//! Imports: the parent, the simulation; `ploopfs`.
//! Never: has two bugs at a time in the process.

use libtest_mimic::Trial;

#[cfg(not(feature = "planted"))]
pub(crate) fn trials() -> Vec<Trial> {
    Vec::new()
}

#[cfg(feature = "planted")]
pub(crate) fn trials() -> Vec<Trial> {
    use crate::support::harness::trial;
    let all = crate::RINGS;
    vec![trial("each_planted_bug_is_found", all, found::all)]
}

#[cfg(feature = "planted")]
mod found {
    use crate::sim::kinds;
    use crate::sim::storage::Manners;
    use crate::support::Outcome;
    use crate::{DOORS, Door, found};
    use anyhow::{Context, Error, Result, ensure};
    use ploopfs::error::ErrorKind;
    use ploopfs::fuse::session::Transport;
    use ploopfs::planted::{Bug, plant};

    /// Rounds before a bug counts as unnoticed.
    const ROUNDS: u64 = 12;

    /// One that loses or mixes data each way that there is: before, in and after a flush, in what
    /// is freed, and in what is copied up; and the door's own.
    const BUGS: [Bug; 7] = [
        Bug::NoDataSync,
        Bug::OneBarrierForCopies,
        Bug::NoQuarantine,
        Bug::NoFill,
        Bug::DiscardUncovers,
        Bug::MarkNotSynced,
        Bug::FsyncAnsweredEarly,
    ];

    fn complaint(door: Door) -> Result<Option<String>> {
        for seed in 1..=ROUNDS {
            let kinds = kinds::of_mounts();
            let kind = &kinds[(seed % kinds.len() as u64) as usize];
            let mut found = found(door, kind, seed, Manners::default())?;
            if let Some(why) = found.complaints.pop() {
                return Ok(Some(why));
            }
        }
        Ok(None)
    }

    /// One of what a bug does is that a disk cannot be opened any more, as its tables are wrong.
    /// Whatever else goes wrong says nothing about the bug.
    fn is_damage(why: &Error) -> bool {
        let error = why.downcast_ref::<ploopfs::error::Error>();
        error.is_some_and(|error| {
            matches!(
                error.kind(),
                ErrorKind::Corrupt | ErrorKind::InUse | ErrorKind::Truncated
            )
        })
    }

    pub(super) fn all() -> Outcome {
        let mut unnoticed = Vec::new();
        let doors = [Transport::Fuser, Transport::Uring];
        for door in DOORS
            .into_iter()
            .filter(|door| doors.contains(&door.transport))
        {
            for bug in BUGS {
                plant(Some(bug));
                let why = complaint(door);
                plant(None);
                match why {
                    Ok(None) => unnoticed.push((door.name, bug)),
                    Ok(Some(why)) => eprintln!("{bug:?}: {why}"),
                    Err(why) if is_damage(&why) => {
                        eprintln!("{bug:?}, {}: {why:#}", door.name);
                    }
                    Err(why) => {
                        return Err(why).with_context(|| format!("{bug:?}, {}", door.name));
                    }
                }
            }
        }
        ensure!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
        Ok(())
    }
}
