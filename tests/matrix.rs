//! Every offline command on every kind of disk, judged by other programs and a reader of our own.
//!
//! The kinds are in `matrix/kinds.rs`, the commands below. In each cell what every snapshot shows
//! is held against what it showed before, byte by byte; qemu-img and ploop must find nothing to
//! say. At its end the program prints the table; a cell that is missing is a failure.

#[path = "matrix/case.rs"]
mod case;
#[path = "matrix/changing.rs"]
mod changing;
#[path = "matrix/disk.rs"]
mod disk;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "matrix/kills.rs"]
mod kills;
#[path = "matrix/kinds.rs"]
mod kinds;
#[path = "matrix/making.rs"]
mod making;
#[path = "matrix/peers.rs"]
mod peers;
#[path = "matrix/reading.rs"]
mod reading;
mod support;
#[path = "matrix/table.rs"]
mod table;
#[path = "matrix/turns.rs"]
mod turns;
#[path = "matrix/verbs.rs"]
mod verbs;

use case::{Case, Verdict};
use kinds::Kind;
use libtest_mimic::Trial;
use support::harness;
use support::probe::Need;
use table::Cell;

/// A command on a disk of a kind.
type Test = fn(&Case) -> Verdict;

/// All that the program does with a disk that nobody has open, and ploop's verbs between ours.
const COMMANDS: [(&str, Test); 42] = [
    ("as made", as_made),
    ("info", reading::info),
    ("map", reading::map),
    ("compare", reading::compare),
    ("measure", reading::measure),
    ("checksum", reading::checksum),
    ("check", reading::check),
    ("repair --dry-run", reading::repair_dry_run),
    ("snapshot list", reading::list),
    ("snapshot tree", reading::tree),
    ("(dry runs)", reading::dry_runs),
    ("(refusals)", reading::refusals),
    ("create", making::create),
    ("convert raw", making::convert_raw),
    ("convert hds", making::convert_hds),
    ("convert hdd", making::convert_hdd),
    ("convert qcow2", making::convert_qcow2),
    ("convert --snapshot", making::convert_snapshot),
    ("copy", making::copy),
    ("copy --new-guids", making::copy_new_guids),
    ("snapshot create", changing::snapshot_create),
    ("snapshot rename", changing::snapshot_rename),
    ("snapshot switch", changing::snapshot_switch),
    ("snapshot switch --keep", changing::snapshot_switch_keep),
    ("snapshot delete", changing::snapshot_delete),
    ("merge", changing::merge),
    ("merge --into-new", changing::merge_into_new),
    ("merge --all", changing::merge_all),
    ("merge --all --into-new", changing::merge_all_into_new),
    ("resize", changing::resize_grow),
    ("resize --shrink", changing::resize_shrink),
    ("compact", changing::compact),
    ("compact --zeroes", changing::compact_zeroes),
    ("compact --defrag", changing::compact_defrag),
    ("compact --fill-holes", changing::compact_fill_holes),
    ("repair", changing::repair),
    ("ploop snapshot", turns::snapshot),
    ("ploop snapshot-delete", turns::snapshot_delete),
    ("ploop snapshot-merge", turns::snapshot_merge),
    ("ploop snapshot-switch", turns::snapshot_switch),
    ("ploop grow", turns::grow),
    ("(ploop and we in turn)", turns::in_turn),
];

/// The judges have nothing to say of a disk on which nothing was done.
fn as_made(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    case.expect(&copy.disk, &case.contents)?;
    Ok(None)
}

fn row(number: usize, kind: Kind) -> support::Outcome {
    let case = Case::new(kind)?;
    let mut failed = Vec::new();
    let one = std::env::var("PLOOPFS_COMMAND").ok();
    for (name, test) in COMMANDS {
        if one.as_deref().is_some_and(|one| one != name) {
            continue;
        }
        let started = std::time::Instant::now();
        let cell = match test(&case) {
            Ok(None) => Cell::Ok,
            Ok(Some(why)) => Cell::Not(why),
            Err(error) => {
                failed.push(format!("== {name}: {error:#}"));
                Cell::Failed(error.to_string())
            }
        };
        if std::env::var_os("PLOOPFS_TIMES").is_some() {
            eprintln!("{:>6} ms  {kind}  {name}", started.elapsed().as_millis());
        }
        table::put(number, name, cell);
    }
    anyhow::ensure!(failed.is_empty(), "\n{}", failed.join("\n"));
    Ok(())
}

fn main() {
    const NEEDS: &[Need] = &[Need::Qemu, Need::Ploop, Need::Root];
    let kinds = kinds::all();
    let names: Vec<String> = kinds.iter().map(ToString::to_string).collect();
    let mut trials: Vec<Trial> = Vec::new();
    for (number, kind) in kinds.into_iter().enumerate() {
        let name = kind.to_string();
        trials.push(harness::trial(&name, NEEDS, move || row(number, kind)));
    }
    trials.extend(kills::trials());
    let commands: Vec<&'static str> = COMMANDS.iter().map(|(name, _)| *name).collect();
    let tried = commands.clone();
    let told = move || verbs::all_are_tried_and_told(&tried);
    trials.push(harness::trial("all_verbs_are_tried_and_told", NEEDS, told));
    harness::main_then(trials, || {
        let (text, wrong) = table::render(&names, &commands);
        println!("{text}");
        wrong
    })
}
