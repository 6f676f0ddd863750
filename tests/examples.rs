//! The examples of the manual pages, run as they stand.
//!
//! Each block of an EXAMPLES section is run line by line in a directory of its own, at a terminal
//! where every question is answered by yes. `/mnt`, `/vz` and the home directory are in that
//! directory, too, and the name of a loop device is that of the one that was attached. A table says
//! what must be there before; a block without a row, or a row without a block, is a failure.

#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "examples/page.rs"]
mod page;
#[path = "examples/rows.rs"]
mod rows;
#[path = "examples/stage.rs"]
mod stage;
mod support;

use libtest_mimic::Trial;
use support::harness;

fn main() {
    let mut trials = vec![
        Trial::test("pages_are_read", || {
            page::reading();
            Ok(())
        }),
        Trial::test("every_example_has_a_row", || {
            rows::complete().map_err(Into::into)
        }),
    ];
    trials.extend(rows::trials());
    harness::main(trials)
}
