//! New disks: what other programs say of them, power cuts at every operation, refusals that leave
//! nothing.

#[path = "create/convert.rs"]
mod convert;
#[path = "create/copy.rs"]
mod copy;
#[path = "create/cuts.rs"]
mod cuts;
#[path = "create/ends.rs"]
mod ends;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "create/interop.rs"]
mod interop;
#[path = "sim/mod.rs"]
mod sim;
mod support;
#[path = "create/systems.rs"]
mod systems;

use support::harness;

fn main() {
    let mut trials = Vec::new();
    trials.extend(cuts::trials());
    trials.extend(interop::trials());
    trials.extend(systems::trials());
    trials.extend(ends::trials());
    trials.extend(convert::trials());
    trials.extend(copy::trials());
    harness::main(trials)
}
