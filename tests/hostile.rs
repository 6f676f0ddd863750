//! Hostile input: what whoever makes an image or a bundle may try, and the answer to each.
//!
//! The rows are those of the format's table of malformed input: headers 1 to 27, tables 30 to 40,
//! descriptors and chains 50 to 78. Each is a test; a last one sees to it that none is missing. The
//! other tests are about names that lead elsewhere, about memory and time, and about hosts with
//! several users.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

#[path = "hostile/answer.rs"]
mod answer;
#[path = "hostile/bounds.rs"]
mod bounds;
#[path = "hostile/chains.rs"]
mod chains;
#[path = "hostile/descriptors.rs"]
mod descriptors;
#[path = "hostile/headers.rs"]
mod headers;
#[path = "hostile/heap.rs"]
mod heap;
#[path = "hostile/paths.rs"]
mod paths;
#[path = "hostile/shared.rs"]
mod shared;
#[path = "hostile/tables.rs"]
mod tables;

use answer::Row;
use anyhow::ensure;
use libtest_mimic::Trial;
use std::collections::BTreeSet;
use support::harness::{self, trial};

/// All numbers of the table of malformed input.
const ROWS: [std::ops::RangeInclusive<u8>; 3] = [1..=27, 30..=40, 50..=78];

#[global_allocator]
static HEAP: support::heap::Heap<heap::Counting> = heap::HEAP;

fn rows() -> Vec<Row> {
    let rooms = [headers::ROWS, tables::ROWS, descriptors::ROWS, chains::ROWS];
    rooms.concat()
}

fn every_row_has_a_test() -> support::Outcome {
    let have: BTreeSet<u8> = rows().iter().map(|row| row.number).collect();
    let want: BTreeSet<u8> = ROWS.into_iter().flatten().collect();
    ensure!(
        have == want,
        "missing: {:?}, unknown: {:?}",
        want.difference(&have).collect::<Vec<_>>(),
        have.difference(&want).collect::<Vec<_>>()
    );
    // A corruption of a known name must be one that some row knows what to do with.
    let odd = forge::corrupt::ALL.iter().find(|c| !want.contains(&c.row));
    ensure!(odd.is_none(), "{:?} has no row", odd.map(|c| c.name));
    Ok(())
}

fn main() {
    let mut trials: Vec<Trial> = rows()
        .iter()
        .map(|row| {
            let name = format!("row_{:02}_{}", row.number, row.name);
            trial(&name, &[], row.test)
        })
        .collect();
    trials.push(trial("every_row_has_a_test", &[], every_row_has_a_test));
    trials.extend(paths::trials());
    trials.extend(bounds::trials());
    trials.extend(shared::trials());
    harness::main(trials)
}
