//! Power cuts, kills and failing hosts, in a world that a seed fixes: what fsync returned for stays,
//! a sector shows its old or its new content, never another's.
//!
//! A failing seed says how it is repeated: `PLOOPFS_SEED=N cargo test --test sim NAME`. With
//! `PLOOPFS_SEEDS=N` each kind of disk gets so many seeds, from `PLOOPFS_SEED` on.

#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "sim/mod.rs"]
mod sim;

use ploopfs::disk::Resources;
use sim::kinds;
use sim::replay::{Cuts, replay};
use sim::storage::Manners;
use sim::workload::{Plan, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Seeds of each kind of disk when nothing else is asked for.
const SEEDS: u64 = 30;

fn seeds(usual: u64) -> std::ops::Range<u64> {
    let count = number("PLOOPFS_SEEDS");
    match number("PLOOPFS_SEED") {
        Some(seed) => seed..seed + count.unwrap_or(1),
        None => 1..1 + count.unwrap_or(usual),
    }
}

#[test]
fn nothing_is_lost() {
    let resources = Resources::new(1).expect("threads and memory");
    for kind in kinds::all() {
        let (mut states, mut operations) = (0, 0);
        for seed in seeds(SEEDS) {
            let story = format!("PLOOPFS_SEED={seed} cargo test --test sim nothing_is_lost");
            let plan = Plan {
                seed,
                manners: Manners {
                    poor_host: seed % 2 == 0,
                    ..Manners::default()
                },
                lives: 4,
                requests: 40,
            };
            let outcome = run(kind, plan, &resources, &story);
            let again = run(kind, plan, &resources, &story);
            let log = outcome.world.log();
            assert!(
                outcome.trace == again.trace && log == again.world.log(),
                "{}: two runs of one seed differ; {story}",
                kind.name
            );
            let cuts = Cuts {
                states: 2,
                from: 0,
                every: 1,
            };
            let found = replay(kind, &log, cuts, seed, &resources);
            let complaints: Vec<_> = outcome.complaints.iter().chain(&found.complaints).collect();
            assert!(
                complaints.is_empty(),
                "{}: {complaints:#?}; {story}",
                kind.name
            );
            states += found.states;
            operations += outcome.world.total();
        }
        println!(
            "{}: {operations} operations, {states} states, none wrong",
            kind.name
        );
    }
}
