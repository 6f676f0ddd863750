//! What the host does to an image beside ploopfs: full file systems, shared blocks, other
//! programs' locks and checks. Without a mount of our own.

#[allow(dead_code)]
#[path = "hazards/caller.rs"]
mod caller;
#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

#[path = "host/locks.rs"]
mod locks;
#[path = "host/repaired.rs"]
mod repaired;
#[path = "host/shared.rs"]
mod shared;
#[path = "host/space.rs"]
mod space;

use std::process::ExitCode;
use support::harness;

fn main() -> ExitCode {
    if let Some(status) = space::child() {
        return status;
    }
    let mut trials = space::trials();
    trials.extend(shared::trials());
    trials.extend(locks::trials());
    trials.extend(repaired::trials());
    harness::main(trials)
}
