//! Smaller files: power cuts at every operation, what is freed, other programs.

#[path = "compact/cases.rs"]
mod cases;
#[path = "compact/combos.rs"]
mod combos;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "compact/interop.rs"]
mod interop;
#[path = "resize/net.rs"]
mod net;
#[path = "sim/mod.rs"]
mod sim;
mod support;
#[path = "compact/trim.rs"]
mod trim;

use libtest_mimic::Trial;
use support::harness::{self, simulated as run};

/// What needs no host at all.
fn hostless() -> Vec<Trial> {
    vec![
        run(
            "stopping_leaves_a_closed_disk",
            cases::stopping_leaves_a_closed_disk,
        ),
        run("the_disk_stays_and_the_file_shrinks", cases::undisturbed),
        run("the_power_may_fail", cases::the_power_may_fail),
        run("the_host_may_fail", cases::the_host_may_fail),
        run("a_second_time_there_is_nothing_to_do", cases::twice),
    ]
}

fn main() {
    let mut trials = hostless();
    trials.extend(interop::trials());
    trials.extend(trim::trials());
    let announced = combos::announced_is_done;
    trials.push(harness::trial("what_is_announced_is_done", &[], announced));
    harness::main(trials)
}
