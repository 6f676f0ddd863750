//! Power cuts, kills and failing hosts, in a world that a seed fixes: what fsync returned for
//! stays, a sector shows its old or its new content, never another's.
//!
//! A failing seed says how it is repeated: `PLOOPFS_SEED=N cargo test --test sim NAME`. With
//! `PLOOPFS_SEEDS=N` each kind of disk gets so many seeds, from `PLOOPFS_SEED` on.

#[path = "sim/check.rs"]
mod check;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "sim/mod.rs"]
mod sim;

use ploopfs::disk::{self, DiskOptions, Resources};
use ploopfs::sync;
use ploopfs::units::DiskOffset;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use sim::faults::Fault;
use sim::heap::{Heap, Scarcity};
use sim::kinds::{self, DiskKind};
use sim::pool::SimPool;
use sim::replay::{Cuts, Found, replay};
use sim::scheduler;
use sim::storage::{Event, Kind, Manners, World};
use sim::workload::{Plan, run};
use std::io::Write;
use std::time::Duration;

#[global_allocator]
static HEAP: Heap = sim::heap::HEAP;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Says it even where the output of tests that pass is kept back.
fn tell(what: &str) {
    // What fails to be told fails no test.
    drop(writeln!(std::io::stderr(), "{what}"));
}

/// The environment says which seeds to run.
fn is_chosen() -> bool {
    number("PLOOPFS_SEED").is_some() || number("PLOOPFS_SEEDS").is_some()
}

/// Different states that the usual seeds must reach.
const STATES: u64 = 200_000;

/// Seeds of each kind of disk when nothing else is asked for.
const SEEDS: u64 = 90;

fn seeds(usual: u64) -> std::ops::Range<u64> {
    let count = number("PLOOPFS_SEEDS");
    match number("PLOOPFS_SEED") {
        Some(seed) => seed..seed + count.unwrap_or(1),
        None => 1..1 + count.unwrap_or(usual),
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    operations: u64,
    /// Pieces of memory that it did not get.
    refused: u64,
}

impl Work {
    fn and(self, other: Self) -> Self {
        Self {
            operations: self.operations + other.operations,
            refused: self.refused + other.refused,
        }
    }
}

/// One seed on one kind of disk: twice, and then with the power cut after every operation.
fn with_cuts(kind: &DiskKind, seed: u64, resources: &Resources) -> (Work, Found) {
    let story = format!("PLOOPFS_SEED={seed} cargo test --test sim nothing_is_lost");
    let plan = Plan {
        seed,
        manners: Manners {
            poor_host: seed % 2 == 0,
            memory: if seed % 3 == 0 {
                Scarcity::All
            } else {
                Scarcity::None
            },
            ..Manners::default()
        },
        lives: 4,
        requests: 40,
    };
    let outcome = run(kind, plan, resources, &story);
    let again = run(kind, plan, resources, &story);
    let log = outcome.world.log();
    let cuts = Cuts {
        states: 2,
        from: 0,
        every: 1,
    };
    let mut found = replay(kind, &log, cuts, seed, resources);
    found.complaints.extend(outcome.complaints);
    if outcome.trace != again.trace || log != again.world.log() {
        found
            .complaints
            .push("two runs of one seed differ".to_owned());
    }
    for complaint in &mut found.complaints {
        *complaint = format!("{}: {complaint}; {story}", kind.name);
    }
    let work = Work {
        operations: outcome.world.total(),
        refused: outcome.memory.refused(),
    };
    (work, found)
}

#[test]
fn nothing_is_lost() {
    let seeds: Vec<_> = seeds(SEEDS).collect();
    let mut states = 0;
    for kind in kinds::all() {
        let (work, found) = seeds
            .par_iter()
            .map_init(
                || Resources::new(1).expect("threads and memory"),
                |resources, seed| with_cuts(kind, *seed, resources),
            )
            .reduce(<(Work, Found)>::default, |(sum, mut all), (work, one)| {
                all.add(one);
                (sum.and(work), all)
            });
        assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
        tell(&format!(
            "{}: {} seeds, {} operations, {} states, none wrong",
            kind.name,
            seeds.len(),
            work.operations,
            found.states
        ));
        assert!(
            is_chosen() || work.refused > 0,
            "{}: memory for all",
            kind.name
        );
        states += found.states;
    }
    tell(&format!("{states} states after power cuts, none wrong"));
    assert!(is_chosen() || states >= STATES, "too few states: {states}");
}

/// Files whose syncs do nothing must be found out.
#[test]
fn a_host_that_lies_is_noticed() {
    let resources = Resources::new(1).expect("threads and memory");
    let kind = &kinds::all()[0];
    let caught = (1..20).any(|seed| {
        let plan = Plan {
            seed,
            manners: Manners {
                lying_syncs: true,
                ..Manners::default()
            },
            lives: 1,
            requests: 40,
        };
        let log = run(kind, plan, &resources, "lying").world.log();
        let cuts = Cuts {
            states: 2,
            from: 0,
            every: 1,
        };
        !replay(kind, &log, cuts, seed, &resources)
            .complaints
            .is_empty()
    });
    assert!(caught);
}

/// Workloads in which every operation fails once, and from then on.
const FAULTY: u64 = 3;

/// All faults that a workload with these numbers of operations can meet.
fn faults(counts: &[(Kind, u64)]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (kind, count) in counts {
        let errnos: &[i32] = match kind {
            Kind::Write | Kind::Sync | Kind::Allocate | Kind::SetLen | Kind::Zero | Kind::Copy => {
                &[libc::EIO, libc::ENOSPC]
            }
            _ => &[libc::EIO],
        };
        for nth in 0..*count {
            for errno in errnos {
                faults.extend([false, true].map(|for_ever| Fault {
                    kind: *kind,
                    nth,
                    errno: *errno,
                    for_ever,
                }));
            }
        }
    }
    faults
}

/// One workload with one fault: what is wrong with it, and the states it was judged by.
fn with_fault(kind: &DiskKind, mut plan: Plan, fault: Fault, resources: &Resources) -> Found {
    plan.manners.fault = Some(fault);
    let seed = plan.seed;
    let story = format!(
        "PLOOPFS_SEED={seed} cargo test --test sim whatever_fails, {}, {fault:?}",
        kind.name
    );
    let outcome = run(kind, plan, resources, &story);
    let log = outcome.world.log();
    let cuts = Cuts {
        states: 1,
        from: log.len() / 4,
        every: 12,
    };
    let mut found = replay(kind, &log, cuts, seed, resources);
    found.complaints.extend(outcome.complaints);
    for complaint in &mut found.complaints {
        complaint.push_str(&format!("; {story}"));
    }
    found
}

#[test]
fn whatever_fails_nothing_is_lost() {
    let kinds = kinds::all();
    let work: Vec<_> = kinds
        .iter()
        .flat_map(|kind| seeds(FAULTY).map(move |seed| (kind, seed)))
        .collect();
    let (mut runs, mut states) = (0, 0);
    for (kind, seed) in &work {
        let resources = Resources::new(1).expect("threads and memory");
        let plan = Plan {
            seed: *seed,
            manners: Manners {
                poor_host: seed % 3 == 0,
                ..Manners::default()
            },
            // Every second one begins with a life that may leave the image unclean.
            lives: 1 + seed % 2,
            requests: 16,
        };
        let counts = run(kind, plan, &resources, "without a fault")
            .world
            .counts();
        let faults = faults(&counts);
        let found = faults
            .par_iter()
            .map_init(
                || Resources::new(1).expect("threads and memory"),
                |resources, fault| with_fault(kind, plan, *fault, resources),
            )
            .reduce(Found::default, |mut all, one| {
                all.add(one);
                all
            });
        assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
        runs += faults.len();
        states += found.states;
    }
    tell(&format!(
        "{} workloads, {runs} with one fault each, {states} states, none wrong",
        work.len()
    ));
    assert!(
        is_chosen() || work.len() >= 20 && runs > 1000,
        "too few: {runs}"
    );
}

/// One workload where one piece of memory, or all from one on, is refused.
fn with_refusal(kind: &DiskKind, mut plan: Plan, memory: Scarcity, resources: &Resources) -> Found {
    plan.manners.memory = memory;
    let seed = plan.seed;
    let story = format!(
        "PLOOPFS_SEED={seed} cargo test --test sim without_some_memory, {}, {memory:?}",
        kind.name
    );
    let outcome = run(kind, plan, resources, &story);
    let log = outcome.world.log();
    let cuts = Cuts {
        states: 1,
        from: log.len() / 2,
        every: 25,
    };
    let mut found = replay(kind, &log, cuts, seed, resources);
    found.complaints.extend(outcome.complaints);
    if outcome.memory.refused() == 0 {
        found.complaints.push("no memory was refused".to_owned());
    }
    for complaint in &mut found.complaints {
        complaint.push_str(&format!("; {story}"));
    }
    found
}

/// Whichever piece of memory a served disk cannot have, it goes on without: not one request fails.
#[test]
fn without_some_memory_nothing_fails() {
    let (mut runs, mut of_kinds, mut states) = (0, 0, 0);
    let work = kinds::all().iter();
    for (kind, seed) in work.flat_map(|kind| seeds(2).map(move |seed| (kind, seed))) {
        let plan = Plan {
            seed,
            manners: Manners::default(),
            lives: 2,
            requests: 36,
        };
        let machine = || Resources::new(1).expect("threads and memory");
        let asked = run(kind, plan, &machine(), "with all memory")
            .memory
            .asked();
        let each = (0..asked).map(Scarcity::Nth);
        let all: Vec<_> = each
            .chain((0..asked).step_by(8).map(Scarcity::From))
            .collect();
        let found = all
            .par_iter()
            .map_init(machine, |resources, memory| {
                with_refusal(kind, plan, *memory, resources)
            })
            .reduce(Found::default, |mut all, one| {
                all.add(one);
                all
            });
        assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
        runs += all.len();
        of_kinds += u64::from(asked > 0);
        states += found.states;
    }
    tell(&format!(
        "{runs} workloads without some memory, {states} states, none wrong"
    ));
    assert!(
        is_chosen() || runs > 500 && of_kinds > 10,
        "too few: {runs}"
    );
}

/// The timer makes durable what was written in place, too: no entry changes by that.
#[test]
fn the_timer_syncs_what_was_written_in_place() {
    let kind = &kinds::all()[0];
    let world = World::new(kind.files(), Manners::default(), true);
    let resources = Resources::new(1).expect("threads and memory");
    scheduler::run(1, 8, None, "the timer", || {
        let pool = SimPool::start(1, None);
        let options = DiskOptions {
            flush_interval_ms: 50,
            ..DiskOptions::default()
        };
        let resources = resources.with_pool(pool.clone());
        let opened = disk::open_with(kind.open(&world), &options, resources);
        let (disk, _) = opened.expect("it opens");
        let at = DiskOffset::ZERO;
        disk.write_at(at, &[1; 4096]).expect("it is written");
        disk.flush_now().expect("it is durable");
        let before = world.log().len();
        disk.write_at(at, &[2; 4096]).expect("it is written");
        sync::sleep(Duration::from_millis(500));
        let since = world.log().split_off(before);
        let changed = |event: &Event| matches!(event, Event::Changed { .. });
        assert!(since.iter().any(changed), "{since:?}");
        assert!(since.ends_with(&[Event::Synced { file: 0 }]), "{since:?}");
        disk.close().expect("it closes");
        pool.stop();
    });
}

/// Syncs of the file in a flush after a small write to a cluster that the top does not map.
fn syncs_of_a_fresh_cluster(kind: &kinds::DiskKind) -> usize {
    let world = World::new(kind.files(), Manners::default(), true);
    let resources = Resources::new(1).expect("threads and memory");
    let mut syncs = 0;
    scheduler::run(1, 8, None, "fresh clusters", || {
        let pool = SimPool::start(1, None);
        let resources = resources.with_pool(pool.clone());
        let opened = disk::open_with(kind.open(&world), &DiskOptions::default(), resources);
        let (disk, _) = opened.expect("it opens");
        // The file grows by more than this cluster, for good once the flush is through.
        disk.write_at(DiskOffset::ZERO, &[1; 512])
            .expect("it is written");
        disk.flush_now().expect("it is durable");
        let before = world.log().len();
        disk.write_at(DiskOffset::new(5 * 4096 + 512), &[2; 512])
            .expect("it is written");
        disk.flush_now().expect("it is durable");
        let since = world.log().split_off(before);
        let synced = |event: &&Event| matches!(event, Event::Synced { .. });
        syncs = since.iter().filter(synced).count();
        disk.close().expect("it closes");
        pool.stop();
    });
    syncs
}

/// Zeros where a hole was need no barrier before the table; zeros over other content do.
#[test]
fn a_fresh_cluster_over_a_hole_takes_one_sync() {
    let kind = |name| kinds::all().iter().find(|kind| kind.name == name);
    let syncs = |name| syncs_of_a_fresh_cluster(kind(name).expect("it is one of them"));
    assert_eq!(syncs("v2"), 1);
    assert_eq!(syncs("over a plain base"), 2);
}
