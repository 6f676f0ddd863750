//! `ploopfs check`.
//!
//! Imports: `admin`, `error`.
//! Never: changes a byte; says that an image is clean that it could not read.

use super::args::CheckArgs;
use super::exit;
use super::output::{Report, print};
use super::progress::Shown as Progress;
use crate::admin::check::disk::{self, DiskCheck, FileCheck, Options};
use crate::admin::check::say::Said;
use crate::error::Shown;
use std::fmt::Write;

/// Ranges of one finding that are shown.
const SHOWN: usize = 8;

/// Runs the command; the exit status tells the state of the disk.
pub fn run(args: &CheckArgs, json: bool) -> Result<u8, Box<Report>> {
    let what = format!("cannot check {}", args.image.display());
    let options = Options {
        allow_outside: args.allow_outside.clone(),
        no_lock: args.no_lock,
    };
    let progress = Progress::start(args.quiet || json);
    let found = disk::check_with(&args.image, &options, progress.progress());
    drop(progress);
    let found = found.map_err(|e| Report::refused(&what, &e))?;
    if json {
        let text = serde_json::to_string_pretty(&found)
            .map_err(|e| Report::new(&what, &std::io::Error::from(e).into()))?;
        print(&(text + "\n"));
    } else if !args.quiet {
        print(&text(&found));
    }
    Ok(exit::state(found.state))
}

fn text(found: &DiskCheck) -> String {
    let mut out = String::new();
    for file in &found.files {
        describe(file, &mut out);
    }
    for finding in &found.findings {
        let _ = writeln!(out, "{}: {}", finding.severity, Shown(&finding.message));
    }
    let name = Shown(&found.image).to_string();
    let verdict = match found.state {
        "clean" => "clean",
        "leaks" => "space is wasted, the data is safe",
        _ => "CORRUPT; `ploopfs repair --dry-run` tells what can be done",
    };
    let _ = writeln!(out, "{name}: {verdict}");
    out
}

fn describe(file: &FileCheck, out: &mut String) {
    let path = Shown(&file.path).to_string();
    let _ = match file.mapped_clusters {
        Some(mapped) => writeln!(out, "{path}: {}, {mapped} clusters mapped", file.state),
        None => writeln!(out, "{path}: {} ({})", file.state, file.format),
    };
    for said in &file.findings {
        finding(said, out);
    }
}

/// Writes a finding and the ranges that it concerns, indented.
pub(super) fn finding(said: &Said, out: &mut String) {
    let _ = writeln!(out, "  {}: {}", said.severity, Shown(&said.message));
    for range in said.ranges.iter().take(SHOWN) {
        let last = range.start + range.len.saturating_sub(1);
        let fate = match said.fate {
            Some("lost") => ": the content is lost",
            Some("cut") => ": its end is lost",
            Some("suspect") => ": perhaps another's content",
            _ => "",
        };
        let _ = writeln!(out, "    disk bytes {} to {last}{fate}", range.start);
    }
    if said.ranges.len() > SHOWN {
        let more = said.ranges.len() - SHOWN;
        let _ = writeln!(out, "    ... and {more} more ranges; --json lists them");
    }
}
