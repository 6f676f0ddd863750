//! The program end to end: real mounts, loop devices and file systems, judged by other programs.
//!
//! Each test is named after the promise that it keeps. Tests that the host cannot run are ignored
//! with their reason; with `CI=true` they fail.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

#[path = "mount/answers.rs"]
mod answers;
#[path = "mount/broken.rs"]
mod broken;
#[path = "mount/damage.rs"]
mod damage;
#[path = "mount/dead.rs"]
mod dead;
#[path = "mount/direct.rs"]
mod direct;
#[path = "mount/disks.rs"]
mod disks;
#[path = "mount/files.rs"]
mod files;
#[path = "mount/killed.rs"]
mod killed;
#[path = "mount/life.rs"]
mod life;
#[path = "mount/linear.rs"]
mod linear;
#[path = "mount/load.rs"]
mod load;
#[path = "mount/locks.rs"]
mod locks;
#[path = "mount/memory.rs"]
mod memory;
#[path = "mount/process.rs"]
mod process;
#[path = "mount/rings.rs"]
mod rings;
#[path = "mount/tree.rs"]
mod tree;

use libtest_mimic::Trial;
use support::harness;

/// What must be true whichever way requests come.
fn either_way() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(disks::trials());
    trials.extend(files::trials());
    trials.extend(life::trials());
    trials.extend(damage::trials());
    trials.extend(answers::trials());
    trials.extend(tree::trials());
    trials.extend(load::trials());
    trials
}

fn main() {
    let mut trials = either_way();
    trials.extend(locks::trials());
    trials.extend(dead::trials());
    trials.extend(memory::trials());
    trials.extend(process::trials());
    trials.extend(linear::trials());
    trials.extend(killed::trials());
    trials.extend(harness::over("uring", killed::trials));
    trials.extend(rings::trials());
    trials.extend(broken::trials());
    trials.extend(direct::trials());
    for way in ["uring", "crowd", "dev", "lame", "partly", "refused", "late"] {
        trials.extend(harness::over(way, files::trials));
        trials.extend(harness::over(way, answers::trials));
    }
    // Everything, and long loads, by the ways that are not the usual one of most hosts.
    if support::rings::are_asked_for() {
        for way in ["uring", "crowd", "dev"] {
            trials.extend(harness::over(way, either_way));
        }
    }
    harness::main(trials)
}
