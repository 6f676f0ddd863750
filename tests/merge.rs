//! Images merged into the one below them: power cuts at every operation, wishes to stop, refusals,
//! and what is left of it all.
//!
//! However a merge ends, the images over one another show what they did; the lowest by itself is
//! marked, or shows what it did, or all of it; and the merge repeated completes it.

#[path = "merge/commands.rs"]
mod commands;
#[path = "merge/cuts.rs"]
mod cuts;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "merge/names.rs"]
mod names;
#[allow(dead_code)]
#[path = "resize/net.rs"]
mod net;
#[path = "sim/mod.rs"]
mod sim;
#[path = "resize/stopping.rs"]
mod stopping;
mod support;

use libtest_mimic::Trial;
use support::harness::{self, simulated as run};

/// What needs no host at all.
fn hostless() -> Vec<Trial> {
    vec![
        run(
            "every_byte_is_where_it_was",
            cuts::every_byte_is_where_it_was,
        ),
        run("the_power_may_fail", cuts::the_power_may_fail),
        run(
            "nothing_behind_the_end_is_lost_unasked",
            cuts::nothing_behind_the_end_is_lost_unasked,
        ),
        run(
            "what_was_begun_by_force_needs_none",
            cuts::what_was_begun_by_force_needs_none,
        ),
        run("the_user_may_stop_it", cuts::the_user_may_stop_it),
        run(
            "new_files_are_whole_or_absent",
            cuts::new_files_are_whole_or_absent,
        ),
    ]
}

fn main() {
    let mut trials = hostless();
    trials.extend(commands::trials());
    trials.extend(names::trials());
    harness::main(trials)
}
