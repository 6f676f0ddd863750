//! What came out of each cell: commands by kinds.
//!
//! Imports: std.
//! Never: shows a cell that was not filled as anything else than missing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Mutex;

/// What a cell can be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cell {
    /// Done, and all judges agree.
    Ok,
    /// Makes no sense for this kind, and why.
    Not(&'static str),
    /// What went wrong.
    Failed(String),
}

/// Number of the kind, name of the command.
type Key = (usize, &'static str);

static CELLS: Mutex<BTreeMap<Key, Cell>> = Mutex::new(BTreeMap::new());

/// Fills a cell.
pub(crate) fn put(kind: usize, command: &'static str, cell: Cell) {
    let mut cells = CELLS
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    cells.insert((kind, command), cell);
}

/// The table as text, and what is missing or failed in it.
pub(crate) fn render(kinds: &[String], commands: &[&'static str]) -> (String, Vec<String>) {
    let cells = CELLS
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let ran: BTreeSet<usize> = cells.keys().map(|(kind, _)| *kind).collect();
    let (mut text, mut wrong) = (String::new(), Vec::new());
    if ran.is_empty() {
        return (text, wrong);
    }
    let mut reasons: Vec<&'static str> = Vec::new();
    for number in &ran {
        let _ = writeln!(text, "{:>4}  {}", number + 1, kinds[*number]);
    }
    let head = ran.iter().map(|number| format!("{:>4}", number + 1));
    let _ = writeln!(text, "\n{:<22}{}", "", head.collect::<String>());
    for command in commands {
        let mut row = String::new();
        for number in &ran {
            let shown = match cells.get(&(*number, *command)) {
                Some(Cell::Ok) => "ok".to_owned(),
                Some(Cell::Not(why)) => {
                    let known = reasons.iter().position(|reason| reason == why);
                    let at = known.unwrap_or_else(|| {
                        reasons.push(why);
                        reasons.len() - 1
                    });
                    format!("({})", char::from(b'a' + at as u8))
                }
                Some(Cell::Failed(_)) => "FAIL".to_owned(),
                None => {
                    wrong.push(format!("{command}, {}: missing", kinds[*number]));
                    "??".to_owned()
                }
            };
            let _ = write!(row, "{shown:>4}");
        }
        let _ = writeln!(text, "{command:<22}{row}");
        let is_whole = ran.len() == kinds.len();
        let is_done = ran
            .iter()
            .any(|n| cells.get(&(*n, *command)) == Some(&Cell::Ok));
        if is_whole && !is_done {
            wrong.push(format!("{command}: not tried on any kind"));
        }
    }
    text.push('\n');
    for (at, why) in reasons.iter().enumerate() {
        let _ = writeln!(
            text,
            " ({}) not applicable: {why}",
            char::from(b'a' + at as u8)
        );
    }
    (text, wrong)
}
