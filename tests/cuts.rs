//! Every offline verb on every kind of disk: power cuts, failures and wishes to stop, at each of
//! its operations. A table of them is printed at the end, and no place in it may be empty.
//!
//! What makes a new disk leaves its source alone, byte for byte, and makes the whole or nothing;
//! what changes a disk leaves every snapshot's content alone, and can be repeated to the same end.
//! What is not simulated: `convert` to qcow2, which another program writes from a flat file that is
//! made as a raw one is, and `compact --trim`, which the kernel does through a mount.

#[path = "cuts/change.rs"]
mod change;
#[path = "cuts/course.rs"]
mod course;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "cuts/make.rs"]
mod make;
#[path = "resize/net.rs"]
#[allow(dead_code)]
mod net;
#[path = "sim/mod.rs"]
mod sim;
#[path = "snapshot/world.rs"]
#[allow(dead_code)]
mod world;

use crate::sim::storage::Manners;
use course::{Course, Tally};
use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::{Arc, Mutex};

/// A line of the table.
type Line = (&'static str, String, Tally);

fn trial(course: Course, table: &Arc<Mutex<Vec<Line>>>) -> Trial {
    let table = Arc::clone(table);
    let name = format!("{}_{}", course.verb, course.kind).replace([' ', ',', '-'], "_");
    Trial::test(name, move || {
        let tally = course.run().map_err(Failed::from)?;
        let mut table = table.lock().expect("nobody fails with it");
        table.push((course.verb, course.kind.clone(), tally));
        Ok(())
    })
}

/// Were a sync forgotten, the cuts would find it: each verb depends on those of files, and what
/// makes or exchanges files on those of directories.
fn lies() -> Result<(), Failed> {
    let mut unnoticed = Vec::new();
    for course in make::courses().into_iter().chain(change::courses()) {
        let is_moving = ["compact", "resize", "repair"].contains(&course.verb);
        let of_files = Manners {
            lying_syncs: true,
            ..course.manners
        };
        let of_names = Manners {
            lying_names: true,
            ..course.manners
        };
        let asked = [
            (of_files, course.is_safe_by_syncs()),
            (of_names, !is_moving),
        ];
        for (manners, _) in asked.into_iter().filter(|(_, is_asked)| *is_asked) {
            if !course.notices(manners) {
                unnoticed.push(format!("{}, {}: {manners:?}", course.verb, course.kind));
            }
        }
    }
    match unnoticed.is_empty() {
        true => Ok(()),
        false => Err(Failed::from(unnoticed.join("\n"))),
    }
}

fn main() {
    let arguments = Arguments::from_args();
    // What does not hold is said by the trial that finds it.
    std::panic::set_hook(Box::new(|_| {}));
    let table = Arc::new(Mutex::new(Vec::new()));
    let courses = make::courses().into_iter().chain(change::courses());
    let mut trials: Vec<Trial> = courses.map(|course| trial(course, &table)).collect();
    trials.push(Trial::test("converted_disks_are_right", || {
        let compared = make::raw_files_are_right().map_err(Failed::from)?;
        assert_eq!(compared, 4);
        Ok(())
    }));
    trials.push(Trial::test("hosts_that_lie_are_noticed", lies));
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut table = table.lock().expect("all have ended").clone();
    table.sort();
    println!(
        "{:<12} {:<28} {:>6} {:>8} {:>6}",
        "verb", "disk", "cuts", "failures", "stops"
    );
    for (verb, kind, tally) in &table {
        let Tally {
            cuts,
            failures,
            stops,
        } = tally;
        println!("{verb:<12} {kind:<28} {cuts:>6} {failures:>8} {stops:>6}");
        assert!(
            *cuts > 0 && *failures > 0,
            "{verb}, {kind}: nothing was tried"
        );
    }
    let sum: u64 = table.iter().map(|(_, _, tally)| tally.cuts).sum();
    println!("{sum} cuts in all");
    conclusion.exit_if_failed();
}
