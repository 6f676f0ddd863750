//! Other sizes: power cuts at every operation, refusals, other programs.
//!
//! A command is cut after each operation, with any of what was not durable kept or lost. What is
//! left must show the disk as it was or as it will be, must have nothing wrong but its mark and
//! wasted space, and the command repeated must end with the very bytes of an undisturbed one.

#[path = "resize/bundles.rs"]
mod bundles;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "resize/interop.rs"]
mod interop;
#[allow(dead_code)]
#[path = "resize/net.rs"]
mod net;
#[path = "resize/refusals.rs"]
mod refusals;
#[path = "sim/mod.rs"]
mod sim;
#[path = "resize/sizes.rs"]
mod sizes;
#[path = "resize/stopping.rs"]
mod stopping;
mod support;

use libtest_mimic::Trial;
use support::harness::{self, simulated as run};

/// What needs no host at all.
fn hostless() -> Vec<Trial> {
    vec![
        run(
            "stopping_leaves_a_closed_disk",
            sizes::stopping_leaves_a_closed_disk,
        ),
        run("what_stays_is_as_before", sizes::what_stays_is_as_before),
        run("the_power_may_fail", sizes::the_power_may_fail),
        run("the_host_may_fail", sizes::the_host_may_fail),
        run(
            "half_cut_and_mounted_it_is_closed_clean",
            sizes::half_cut_and_mounted_it_is_closed_clean,
        ),
        run("garbage_does_not_come_up", sizes::garbage_does_not_come_up),
        run(
            "growing_and_shrinking_back",
            sizes::growing_and_shrinking_back,
        ),
        run(
            "image_and_descriptor_agree",
            bundles::image_and_descriptor_agree,
        ),
    ]
}

fn main() {
    let mut trials = hostless();
    trials.extend(interop::trials());
    trials.extend(refusals::trials());
    harness::main(trials)
}
