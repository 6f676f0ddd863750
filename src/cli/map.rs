//! `ploopfs map`.
//!
//! Imports: `admin`.
//! Never: holds the map in memory.

use super::output::{Report, print};
use super::source::{self, ReadArgs};
use crate::admin::map::{Line, map};
use crate::error::{Error, Shown};
use clap::{Args, ValueHint};
use std::fmt::Write;
use std::path::PathBuf;

/// Characters that are written at a time.
const PIECE: usize = 1 << 16;

/// `ploopfs map`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs map disk.hdd
  ploopfs map --json --snapshot latest disk.hdd | jq '[.[] | select(.data).length] | add'")]
pub struct MapArgs {
    /// Which disk.
    #[command(flatten)]
    pub select: ReadArgs,
    /// A disk of any kind
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// Runs the command.
pub fn run(args: &MapArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot map {}", args.image.display());
    let source = source::open(&args.image, &args.select.asked_for_map(), &what, false)?;
    let mut text = String::new();
    let mut count = 0_u64;
    if !json {
        let [at, len, place] = ["Offset", "Length", "Mapped to"];
        let _ = writeln!(text, "{at:<16}{len:<16}{place:<16}File");
    }
    let mapped = map(source.as_ref(), |line| {
        if json {
            push_json(&line, count, &mut text)?;
        } else {
            push_row(&line, &mut text);
        }
        count += 1;
        if text.len() >= PIECE {
            print(&text);
            text.clear();
        }
        Ok(())
    });
    if json {
        text.push_str(if count == 0 { "[]\n" } else { "]\n" });
    }
    print(&text);
    mapped.map_err(|e| Report::refused(&what, &e))
}

/// One extent a line, as QEMU writes them.
fn push_json(line: &Line, count: u64, text: &mut String) -> Result<(), Error> {
    let shown = serde_json::to_string(line).map_err(std::io::Error::from)?;
    // The line before has no line break yet.
    text.push_str(if count == 0 { "[" } else { ",\n" });
    text.push_str(&shown);
    Ok(())
}

/// What has a place, as QEMU shows it; and what should have one.
fn push_row(line: &Line, text: &mut String) {
    if !line.data {
        return;
    }
    let hex = |number: u64| match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    };
    let place = match line.offset {
        _ if line.bad => "unreadable".to_owned(),
        Some(at) => hex(at),
        None => "unknown".to_owned(),
    };
    let file = line.filename.as_deref().unwrap_or_default();
    let (start, length) = (hex(line.start), hex(line.length));
    let row = format!("{start:<16}{length:<16}{place:<16}{}", Shown(file));
    text.push_str(row.trim_end());
    text.push('\n');
}
