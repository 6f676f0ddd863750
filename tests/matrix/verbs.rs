//! The commands are those that are tried here, and those of the table in README.
//!
//! Imports: `support`.
//! Never: knows a verb that no program has told it.

use crate::support::{Outcome, command};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;

/// Verbs that are about disks in use, or about no disk.
const OTHERS: [&str; 7] = [
    "mount",
    "umount",
    "attach",
    "detach",
    "list",
    "completions",
    "help",
];

/// The verbs that the program's help lists.
fn ours() -> Result<BTreeSet<String>> {
    let help = command::ok(&mut command::ploopfs(&["--help"]))?;
    let (_, rest) = help
        .split_once("Commands:\n")
        .context("a list of commands")?;
    let lines = rest.lines().take_while(|line| line.starts_with("  "));
    let verbs = lines.filter(|line| !line.starts_with("   "));
    let verbs = verbs.filter_map(|line| line.split_whitespace().next());
    let verbs = verbs.filter(|verb| !OTHERS.contains(verb));
    Ok(verbs.map(str::to_owned).collect())
}

/// What stands between backquotes, verb by verb, without what follows the verb.
fn verbs_in(cell: &str) -> BTreeSet<String> {
    let quoted = cell.split('`').skip(1).step_by(2);
    let parts = quoted.flat_map(|text| text.split(','));
    let first = |text: &str| text.split_whitespace().next().map(str::to_owned);
    parts.filter_map(first).collect()
}

/// The columns of the table.
fn table() -> Result<[BTreeSet<String>; 3]> {
    let path = format!("{}/README.md", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path)?;
    let (_, rest) = text
        .split_once("| ploopfs | ploop | qemu-img |\n")
        .context("a table")?;
    let mut columns = [const { BTreeSet::new() }; 3];
    for line in rest
        .lines()
        .skip(1)
        .take_while(|line| line.starts_with('|'))
    {
        let cells: Vec<&str> = line.split('|').skip(1).take(3).collect();
        ensure!(cells.len() == 3, "{line}");
        for (column, cell) in columns.iter_mut().zip(cells) {
            column.extend(verbs_in(cell));
        }
    }
    Ok(columns)
}

/// Each verb that is in no other way to be excused has a row here and there.
pub(crate) fn all_are_tried_and_told(tried: &[&'static str]) -> Outcome {
    let verbs = ours()?;
    ensure!(verbs.len() >= 14, "{verbs:?}");
    let tried: BTreeSet<String> = tried
        .iter()
        .filter_map(|name| name.split_whitespace().next().map(str::to_owned))
        .collect();
    let untried: Vec<_> = verbs.difference(&tried).collect();
    ensure!(untried.is_empty(), "not tried: {untried:?}");
    let [own, ploop, qemu] = table()?;
    // After the verb `snapshot` its own verbs may stand.
    let sub = ["list", "tree", "switch", "rename", "delete"].map(str::to_owned);
    let own: BTreeSet<_> = own.difference(&sub.into()).cloned().collect();
    ensure!(own == verbs, "README has {own:?}, the program {verbs:?}");
    let said = command::run(&mut command::new("ploop"))?;
    let said = said.text() + &said.stderr;
    let unknown: Vec<_> = ploop.iter().filter(|verb| !said.contains(*verb)).collect();
    ensure!(unknown.is_empty(), "ploop has no {unknown:?}");
    let said = command::ok(command::new("qemu-img").arg("--help"))?;
    let known = |verb: &&String| {
        said.lines()
            .any(|l| l.trim_start().starts_with(verb.as_str()))
    };
    let unknown: Vec<_> = qemu.iter().filter(|verb| !known(verb)).collect();
    ensure!(unknown.is_empty(), "qemu-img has no {unknown:?}");
    Ok(())
}
