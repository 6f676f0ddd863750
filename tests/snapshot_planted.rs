//! The power cuts of `tests/snapshot` catch what they are there for: each bug of
//! `ploopfs::planted` that concerns bundles is planted, and they must complain. Needs the feature
//! `planted`.

// The tests themselves belong to the other program.
#![allow(dead_code, unused_imports)]

#[path = "snapshot/cuts.rs"]
mod cuts;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "sim/mod.rs"]
mod sim;
#[path = "snapshot/steps.rs"]
mod steps;
#[path = "snapshot/world.rs"]
mod world;

use ploopfs::planted::{Bug, plant};
use std::panic::{catch_unwind, set_hook};

/// Rounds of cuts before a bug counts as unnoticed.
const ROUNDS: u64 = 6;

fn main() {
    set_hook(Box::new(|_| {}));
    let mut unnoticed = Vec::new();
    for bug in Bug::OF_BUNDLES {
        plant(Some(*bug));
        let complaint = (1..=ROUNDS).find_map(|seed| {
            let mut dice = seed;
            let look = move || match bug {
                // Only a failure leaves in the cache what will never be durable.
                Bug::MergeBelievesCache => cuts::repeat_after_failures(&mut dice),
                _ => cuts::cut_everywhere(2, &mut dice),
            };
            let why = catch_unwind(look).err()?;
            let why = why.downcast::<String>().map(|why| *why);
            Some((seed, why.unwrap_or_default()))
        });
        plant(None);
        match complaint {
            Some((seed, why)) => println!("{bug:?}: seed {seed}: {why}"),
            None => {
                println!("{bug:?}: UNNOTICED");
                unnoticed.push(*bug);
            }
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed: {unnoticed:?}");
    let cuts = cuts::cut_everywhere(1, &mut 1);
    let repeated = cuts::repeat_after_failures(&mut 1);
    println!("without any: {cuts} cuts, {repeated} failures");
}
