//! `ploopfs compact`.
//!
//! Imports: `admin`, `error`.
//! Never: changes what the disk shows.

use super::args::CompactArgs;
use super::output::{Report, print};
use super::progress;
use super::size::show_size;
use crate::admin::compact::Request;
use crate::admin::compact::disk::{self, DiskCompact, FileCompact};
use crate::error::Shown;
use std::fmt::Write;

/// Runs the command.
pub fn run(args: &CompactArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot compact {}", args.image.display());
    let request = Request {
        zeroes: args.zeroes,
        defrag: args.defrag,
        fill_holes: args.fill_holes,
        drop_bitmaps: args.drop_bitmaps,
        ..Request::default()
    };
    let shown = progress::Shown::start(args.quiet);
    let refused = |e| Report::refused(&what, &e);
    let session = disk::open(&args.image, &args.allow_outside, !args.dry_run).map_err(refused)?;
    let done = if args.dry_run {
        session.plan(&request, shown.progress()).map_err(refused)?
    } else {
        session
            .try_to(&request, shown.progress())
            .map_err(refused)?;
        session.compact(&request, shown.progress()).map_err(|e| {
            let mut report = Report::new(&what, &e);
            let state = "the disk shows what it did before; repeat the command to complete it";
            report.data = Some(state.to_owned());
            report
        })?
    };
    drop(shown);
    if json {
        let text = serde_json::to_string_pretty(&done)
            .map_err(|e| Report::new(&what, &std::io::Error::from(e).into()))?;
        print(&(text + "\n"));
    } else if !args.quiet {
        print(&text(&done, args.dry_run));
    }
    Ok(())
}

fn text(done: &DiskCompact, is_plan: bool) -> String {
    let mut out = String::new();
    for file in &done.files {
        one(file, is_plan, &mut out);
    }
    out
}

fn one(file: &FileCompact, is_plan: bool, out: &mut String) {
    let path = Shown(&file.path).to_string();
    let (before, after) = (show_size(file.before_bytes), show_size(file.after_bytes));
    let on_host = show_size(file.before_allocated);
    let _ = match (file.plain, file.is_done, is_plan) {
        (true, ..) => writeln!(out, "{path}: {before}; a plain file is left as it is"),
        (_, true, _) => writeln!(out, "{path}: {before}; there is nothing to do"),
        (_, _, true) => writeln!(
            out,
            "{path}: would be {after}, is {before} ({on_host} on the host)"
        ),
        _ => {
            let now = show_size(file.after_allocated);
            writeln!(
                out,
                "{path}: is {after}, was {before} (on the host {now}, was {on_host})"
            )
        }
    };
    for (count, text) in [
        (file.freed_clusters, "clusters of zeros that are freed"),
        (
            file.punched_clusters,
            "clusters of zeros that hide what is below",
        ),
        (file.moved_clusters, "clusters that are moved"),
    ] {
        if count > 0 {
            let _ = writeln!(out, "  {text}: {count}");
        }
    }
    if file.drops_bitmaps {
        let _ = writeln!(
            out,
            "  dirty bitmaps are dropped: the next backup must be a full one"
        );
    }
}
