//! The net catches what it is there for: each bug of `ploopfs::planted` is planted, and the
//! simulation must complain. Needs the feature `planted`.

#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "sim/mod.rs"]
mod sim;

use ploopfs::disk::Resources;
use ploopfs::planted::{Bug, plant};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use sim::kinds;
use sim::replay::{Cuts, replay};
use sim::storage::{Fault, Kind, Manners};
use sim::workload::{Plan, run};

/// Seeds that are tried before a bug counts as unnoticed.
const SEEDS: u64 = 400;

/// What the simulation finds with this seed; the first of it.
fn complaint(
    kind: &kinds::DiskKind,
    seed: u64,
    fault: Option<Fault>,
    resources: &Resources,
) -> Option<String> {
    let plan = Plan {
        seed,
        manners: Manners {
            fault,
            ..Manners::default()
        },
        lives: 3,
        requests: 40,
    };
    let outcome = run(kind, plan, resources, "with a planted bug");
    if let Some(why) = outcome.complaints.into_iter().next() {
        return Some(why);
    }
    let cuts = Cuts {
        states: 2,
        from: 0,
        every: 1,
    };
    let found = replay(kind, &outcome.world.log(), cuts, seed, resources);
    found.complaints.into_iter().next()
}

/// Where a bug can show: an image that was not closed is synced to set its mark again, a plain one
/// has none.
fn kinds_for(bug: Bug) -> Vec<&'static kinds::DiskKind> {
    let all = kinds::all().iter();
    match bug {
        Bug::NoSyncAtOpen => all.filter(|kind| kind.name == "plain").collect(),
        Bug::StalePageInserted | Bug::DirtyEvicted => all
            .filter(|kind| kind.name == "table of two pages")
            .collect(),
        _ => all.collect(),
    }
}

/// The bugs that show only where something fails.
fn fault(bug: Bug, seed: u64) -> Option<Fault> {
    let kind = match bug {
        Bug::SyncErrorSwallowed | Bug::FailedSyncRetried => Kind::Sync,
        Bug::AbortKeepsZero => Kind::Write,
        _ => return None,
    };
    Some(Fault {
        kind,
        nth: seed % 40,
        errno: if kind == Kind::Write {
            libc::ENOSPC
        } else {
            libc::EIO
        },
        for_ever: false,
    })
}

#[test]
fn each_planted_bug_is_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut unnoticed = Vec::new();
    let only = std::env::var("PLOOPFS_BUG").ok();
    for bug in Bug::ALL {
        if only
            .as_ref()
            .is_some_and(|only| *only != format!("{bug:?}"))
        {
            continue;
        }
        let started = std::time::Instant::now();
        plant(Some(*bug));
        let kinds = kinds_for(*bug);
        let machine = || Resources::new(1).expect("threads and memory");
        let seeds = (1..=SEEDS).into_par_iter();
        let tries = seeds.map_init(machine, |resources, seed| {
            let kind = &kinds[(seed % kinds.len() as u64) as usize];
            let why = complaint(kind, seed, fault(*bug, seed), resources)?;
            Some((seed, kind.name, why))
        });
        let found = tries.flatten().find_any(|_| true);
        plant(None);
        let time = started.elapsed().as_secs_f64();
        match found {
            Some((seed, name, why)) => println!("{bug:?}: {time:.1} s, seed {seed}, {name}: {why}"),
            None => {
                println!("{bug:?}: {time:.1} s, UNNOTICED");
                unnoticed.push(*bug);
            }
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}
