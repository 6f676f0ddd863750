//! The net catches what it is there for: each bug of `ploopfs::planted` is planted, and the
//! simulation must complain, or the power cuts during repairs and undos. Needs the feature
//! `planted`.

#[allow(dead_code)]
#[path = "resize/bundles.rs"]
mod bundles;
#[allow(dead_code)]
#[path = "compact/cases.rs"]
mod cases;
#[path = "check/damage.rs"]
mod damage;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "check/mending.rs"]
mod mending;
#[allow(dead_code)]
#[path = "resize/net.rs"]
mod net;
#[path = "sim/mod.rs"]
mod sim;
#[allow(dead_code)]
#[path = "resize/sizes.rs"]
mod sizes;
#[path = "check/stage.rs"]
mod stage;
#[path = "resize/stopping.rs"]
mod stopping;

use ploopfs::disk::{self, DiskOptions, DoneReply, Resources};
use ploopfs::error::{ErrorKind, Result};
use ploopfs::planted::{Bug, plant};
use ploopfs::units::DiskOffset;
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use sim::faults::Fault;
use sim::kinds;
use sim::replay::{Cuts, replay};
use sim::storage::{Kind, Manners, World};
use sim::workload::{Plan, run};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// Seeds that are tried before a bug counts as unnoticed.
const SEEDS: u64 = 1500;

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
        // Zeros instead of what was there before show only where something was.
        Bug::LivePages | Bug::PunchBelieved | Bug::GrowthBelieved => {
            all.filter(|kind| kind.name.starts_with("over")).collect()
        }
        Bug::StalePageInserted | Bug::DirtyEvicted => all
            .filter(|kind| kind.name == "table of two pages")
            .collect(),
        _ => all.collect(),
    }
}

/// The bugs that show only where something fails.
fn fault(bug: Bug, seed: u64) -> Option<Fault> {
    let kind = match bug {
        Bug::SyncErrorSwallowed | Bug::FailedSyncRetried | Bug::CacheBelieved => Kind::Sync,
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

/// The bugs of repairs and undos. [`Bug::MarkNotSynced`] is one of both kinds.
const OF_REPAIRS: [Bug; 18] = [
    Bug::RepairOnUnsynced,
    Bug::RepairBelievesCache,
    Bug::UndoCacheBelieved,
    Bug::UndoFileNotSynced,
    Bug::UndoFileNameNotSynced,
    Bug::MarkNotSynced,
    Bug::ClearsNotSynced,
    Bug::CopiesNotSynced,
    Bug::RepointsNotSynced,
    Bug::CutsNotSynced,
    Bug::ClosedBeforeTold,
    Bug::LastNameNotSynced,
    Bug::UndoUnverified,
    Bug::UndoNameNotSynced,
    Bug::UndoBegunSilently,
    Bug::UndoNotMarked,
    Bug::UndoTurnsNotSynced,
    Bug::UndoEndsUnsynced,
];

/// All that is asked of repairs; the first complaint. That there is none without a bug is for
/// `tests/check` to show.
fn of_repairs() -> Result<(), String> {
    mending::written_since()?;
    mending::from_the_cache()?;
    mending::cut_undos(12)?;
    mending::from_a_cached_undo_file()?;
    mending::cut_repairs(8)?;
    mending::cut_twice(12)?;
    mending::failing_host(&[Kind::Sync]).map(|_| ())
}

fn is_chosen(bug: Bug) -> bool {
    let only = std::env::var("PLOOPFS_BUG").ok();
    only.is_none_or(|only| only == format!("{bug:?}"))
}

#[test]
fn each_planted_bug_of_a_repair_is_found() {
    let _one = ONE.lock();
    let mut unnoticed = Vec::new();
    let chosen = OF_REPAIRS.into_iter().filter(|bug| is_chosen(*bug));
    for bug in chosen {
        let started = std::time::Instant::now();
        plant(Some(bug));
        let found = of_repairs();
        plant(None);
        let time = started.elapsed().as_secs_f64();
        match found {
            Err(why) => println!("{bug:?}: {time:.1} s, {why}"),
            Ok(()) => {
                println!("{bug:?}: {time:.1} s, UNNOTICED");
                unnoticed.push(bug);
            }
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}

/// Bugs of `resize` and `compact`, which have a test of their own below.
const OF_SIZES: [Bug; 7] = [
    Bug::FreedNotSynced,
    Bug::MovedNotSynced,
    Bug::OldPlaceEarly,
    Bug::ResizedEarly,
    Bug::CutEarly,
    Bug::DescriptorEarly,
    Bug::UnmarkedEarly,
];

#[test]
fn each_bug_of_resize_and_compact_is_found() {
    let _one = ONE.lock();
    let mut unnoticed = Vec::new();
    let bugs = OF_SIZES.into_iter().chain([Bug::MarkNotSynced]);
    for bug in bugs.filter(|bug| is_chosen(*bug)) {
        plant(Some(bug));
        let all = sizes::cases().into_iter().chain(cases::cases());
        let of_images = all
            .into_iter()
            .find_map(|case| case.cuts(12, false).complaints.pop());
        let why = of_images.or_else(|| bundles::complaints(12).1.pop());
        plant(None);
        match why {
            Some(why) => println!("{bug:?}: {why}"),
            None => unnoticed.push(bug),
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
}

/// One bug at a time in the whole process.
static ONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

#[test]
fn each_planted_bug_is_found() {
    let _one = ONE.lock();
    std::panic::set_hook(Box::new(|_| {}));
    let mut unnoticed = Vec::new();
    for bug in Bug::ALL {
        let is_of_repairs = OF_REPAIRS.contains(bug) && *bug != Bug::MarkNotSynced;
        // No bug that could go unnoticed: see below.
        let elsewhere = is_of_repairs
            || Bug::OF_BUNDLES.contains(bug)
            || Bug::OF_DOORS.contains(bug)
            || OF_SIZES.contains(bug);
        if *bug == Bug::Panic || elsewhere || !is_chosen(*bug) {
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

/// Gives the result of a write to whoever waits for it.
struct Told(Sender<Result<()>>);

impl DoneReply for Told {
    fn done(self, result: Result<()>) {
        self.0.send(result).expect("somebody waits");
    }
}

/// A request that panics while its cluster is pending: the process goes on, nobody waits for ever,
/// what was durable can be read, and nothing more is promised.
#[test]
fn a_panic_in_a_job_latches_the_disk() {
    let _one = ONE.lock();
    let kind = &kinds::all()[0];
    let world = World::new(kind.files(), Manners::default(), false);
    let open = || disk::open(kind.open(&world), &DiskOptions::default());
    let (disk, _) = open().expect("it opens");
    let at = |cluster: u64| DiskOffset::new(cluster * 4096);
    disk.write_at(at(0), &[1; 4096]).expect("it is written");
    disk.flush_now().expect("it is durable");
    plant(Some(Bug::Panic));
    let (told, answers) = channel();
    for _ in 0..2 {
        disk.write(at(1), &[2; 512], Told(told.clone()));
    }
    let patience = Duration::from_secs(60);
    for _ in 0..2 {
        let answer = answers.recv_timeout(patience).expect("an answer");
        assert_eq!(answer.expect_err("it panicked").kind(), ErrorKind::Latched);
    }
    plant(None);
    let mut found = [0; 4096];
    disk.read_at(at(0), &mut found).expect("reads go on");
    assert_eq!(found, [1; 4096]);
    disk.write_at(at(2), &[3; 512]).expect_err("writes do not");
    disk.flush(Told(told));
    let flushed = answers.recv_timeout(patience).expect("an answer");
    flushed.expect_err("nothing more is durable");
    assert!(
        disk.stats()
            .latched
            .is_some_and(|why| why.contains("panicked"))
    );
    disk.close()
        .expect_err("it is not closed as if it were well");
    let (disk, _) = open().expect("it opens again");
    disk.read_at(at(0), &mut found).expect("it reads");
    assert_eq!(found, [1; 4096]);
    disk.close().expect("it closes");
}
