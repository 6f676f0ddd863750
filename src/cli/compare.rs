//! `ploopfs compare`.
//!
//! Imports: `admin`, `fuse`, `units`.
//! Never: ends with 1 but for disks that differ; trouble is 2, as for cmp(1).

use super::output::{Report, print_verdict};
use super::progress::Shown as Progress;
use super::size::show_size;
use super::source::{self, Kind, ReadArgs, trouble};
use crate::admin::compare::{Compared, compare};
use crate::admin::source::Source;
use crate::error::Shown;
use crate::fuse::partitions;
use crate::units::SECTOR;
use clap::{Args, ValueHint};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The disks differ.
const DIFFER: u8 = 1;

/// `ploopfs compare`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Exit status: 0 equal, 1 they differ, 2 could not compare

Examples:
  ploopfs compare disk.hdd copy.qcow2
  ploopfs compare --snapshot latest disk.hdd disk.hdd")]
pub struct CompareArgs {
    /// Which disk.
    #[command(flatten)]
    pub select: ReadArgs,
    /// The second disk as of a snapshot
    #[arg(long, value_name = "ID", help_heading = "Which disk")]
    pub other_snapshot: Option<String>,
    /// What the second disk is
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Which disk")]
    #[arg(hide_possible_values = true)]
    pub other_format: Option<Kind>,
    /// Disks of different sizes differ, even where the longer one ends in zeros
    #[arg(long)]
    pub strict: bool,
    /// Say nothing; the exit status tells
    #[arg(short, long)]
    pub quiet: bool,
    /// A disk of any kind
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// Another one
    #[arg(value_hint = ValueHint::AnyPath)]
    pub other: PathBuf,
}

#[derive(Serialize)]
struct Document {
    schema_version: u32,
    #[serde(flatten)]
    compared: Compared,
    sector: Option<u64>,
    partition: Option<u32>,
}

/// Runs the command; the exit status tells whether they are equal.
pub fn run(args: &CompareArgs, json: bool) -> Result<u8, Box<Report>> {
    compare_both(args, json).map_err(trouble)
}

fn compare_both(args: &CompareArgs, json: bool) -> Result<u8, Box<Report>> {
    let (a, b) = (args.image.display(), args.other.display());
    let what = format!("cannot compare {a} and {b}");
    let second = ReadArgs {
        snapshot: args.other_snapshot.clone(),
        format: args.other_format,
        lower: Vec::new(),
        allow_outside: args.select.allow_outside.clone(),
    };
    let open = |path: &Path, select: &ReadArgs| {
        let what = format!("cannot compare with {}", path.display());
        source::open(path, &select.asked(), &what, args.quiet)
    };
    let shown = Progress::start(args.quiet);
    let (a, b) = (
        open(&args.image, &args.select)?,
        open(&args.other, &second)?,
    );
    let compared = compare(a.as_ref(), b.as_ref(), args.strict, shown.progress());
    drop(shown);
    let compared = compared.map_err(|e| Report::refused(&what, &e))?;
    let status = if compared.equal { 0 } else { DIFFER };
    let at = compared.first_difference;
    let partition = at.and_then(|at| partition_of(&[a.as_ref(), b.as_ref()], at));
    if json {
        let document = Document {
            schema_version: 1,
            compared,
            sector: at.map(|at| at / SECTOR),
            partition: partition.map(|(number, _)| number),
        };
        print_verdict(&source::document(&document, &what)?, status);
    } else if !args.quiet {
        print_verdict(&text(args, &compared, partition), status);
    }
    Ok(status)
}

/// The partition that has a byte, and where in it, by the table of the first disk that we can ask.
fn partition_of(sources: &[&dyn Source], at: u64) -> Option<(u32, u64)> {
    let disk = sources.iter().find_map(|source| source.disk())?;
    let found = partitions::list(disk).ok()?;
    let holds = |part: &&partitions::Partition| (part.start..part.start + part.len).contains(&at);
    let part = found.iter().find(holds)?;
    Some((part.number, at - part.start))
}

fn text(args: &CompareArgs, compared: &Compared, partition: Option<(u32, u64)>) -> String {
    let [a, b] = compared.size_bytes;
    let mut text = String::new();
    if a != b {
        let name = |path: &Path| Shown(&path.to_string_lossy()).to_string();
        let (longer, by) = if a > b {
            (name(&args.image), a - b)
        } else {
            (name(&args.other), b - a)
        };
        text.push_str(&format!(
            "sizes differ: {a} and {b} bytes; {longer} is longer by {}\n",
            show_size(by)
        ));
    }
    match compared.first_difference {
        None if compared.equal && a != b => {
            text.push_str("the disks are equal, and what one has more is zeros\n");
        }
        None if compared.equal => text.push_str("the disks are equal\n"),
        None => text.push_str("the disks differ in size\n"),
        Some(at) => {
            text.push_str(&format!(
                "the disks differ, first at byte {at} (sector {})",
                at / SECTOR
            ));
            if let Some((number, within)) = partition {
                text.push_str(&format!(", byte {within} of partition {number}"));
            }
            text.push('\n');
        }
    }
    text
}
