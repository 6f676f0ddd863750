//! The program end to end: real mounts, loop devices and file systems, judged by other programs.
//!
//! Each test is named after the promise that it keeps. Tests that the host cannot run are ignored
//! with their reason; with `CI=true` they fail.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

#[path = "mount/answers.rs"]
mod answers;
#[path = "mount/damage.rs"]
mod damage;
#[path = "mount/dead.rs"]
mod dead;
#[path = "mount/disks.rs"]
mod disks;
#[path = "mount/files.rs"]
mod files;
#[path = "mount/life.rs"]
mod life;
#[path = "mount/load.rs"]
mod load;
#[path = "mount/locks.rs"]
mod locks;
#[path = "mount/memory.rs"]
mod memory;
#[path = "mount/process.rs"]
mod process;
#[path = "mount/tree.rs"]
mod tree;

use support::harness;

fn main() {
    let mut trials = Vec::new();
    trials.extend(disks::trials());
    trials.extend(files::trials());
    trials.extend(locks::trials());
    trials.extend(life::trials());
    trials.extend(damage::trials());
    trials.extend(dead::trials());
    trials.extend(memory::trials());
    trials.extend(process::trials());
    trials.extend(answers::trials());
    trials.extend(tree::trials());
    trials.extend(load::trials());
    harness::main(trials)
}
