//! `ploopfs resize`.
//!
//! Imports: `admin`, `error`.
//! Never: makes a disk smaller without a yes.

use super::args::ResizeArgs;
use super::output::{Report, note, print};
use super::progress;
use super::repair::confirm;
use super::size::show_size;
use crate::admin::resize::disk::{self, DiskResize, Options};
use crate::error::{Error, Shown};
use std::fmt::Write;

/// Runs the command.
pub fn run(args: &ResizeArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot resize {}", args.image.display());
    let refused = |e: &Error| Report::refused(&what, e);
    let options = Options {
        change: args.size,
        shrink: args.shrink,
        force_discard: args.force_discard,
        drop_bitmaps: args.drop_bitmaps,
        raw: args.format.is_some(),
        allow_outside: args.allow_outside.clone(),
    };
    let shown = progress::Shown::start(args.quiet);
    let session = disk::open(&args.image, &options, !args.dry_run).map_err(|e| refused(&e))?;
    let plan = session.plan().map_err(|e| refused(&e))?;
    if args.dry_run {
        return show(&plan, json, args.quiet, &what, "would be");
    }
    // Before a question it goes, so that signals do what they do then.
    drop(shown);
    let is_smaller = plan.after_bytes < plan.before_bytes;
    let is_loss = is_smaller || plan.drops_bitmaps || plan.discards_from_byte.is_some();
    if is_loss && !args.yes {
        note(text(&plan, "will be").trim_end());
        confirm("Resize now?", &what)?;
    }
    let shown = progress::Shown::start(args.quiet);
    let done = session.resize(shown.progress()).map_err(|e| {
        if !session.has_begun() {
            return Report::unbegun(&what, &e);
        }
        let mut report = Report::new(&what, &e);
        if !plan.is_done {
            let state = "the disk opens, with its old or its new size; repeat the command to \
                         complete it";
            report.data = Some(state.to_owned());
        }
        report
    })?;
    drop(shown);
    show(&done, json, args.quiet, &what, "is")
}

fn show(
    told: &DiskResize,
    json: bool,
    quiet: bool,
    what: &str,
    verb: &str,
) -> Result<(), Box<Report>> {
    if json {
        let text = serde_json::to_string_pretty(told)
            .map_err(|e| Report::new(what, &std::io::Error::from(e).into()))?;
        print(&(text + "\n"));
    } else if !quiet {
        print(&text(told, verb));
    }
    Ok(())
}

fn text(told: &DiskResize, verb: &str) -> String {
    let image = Shown(&told.image).to_string();
    let (before, after) = (show_size(told.before_bytes), show_size(told.after_bytes));
    if told.is_done {
        return format!(
            "{image}: has {after} ({} bytes) already\n",
            told.after_bytes
        );
    }
    let bytes = told.after_bytes;
    let mut out = format!("{image}: {verb} {after} ({bytes} bytes), was {before}\n");
    if told.moved_clusters > 0 {
        let moved = show_size(told.moved_bytes);
        let _ = writeln!(
            out,
            "  clusters that are moved: {} ({moved})",
            told.moved_clusters
        );
    }
    if let Some(byte) = told.discards_from_byte {
        let _ = writeln!(
            out,
            "  data is cut off and lost, the first of it at byte {byte}"
        );
    }
    if told.drops_bitmaps {
        let _ = writeln!(
            out,
            "  dirty bitmaps are dropped: the next backup must be a full one"
        );
    }
    if told.was_in_use {
        let _ = writeln!(out, "  the image was not closed; its table is sound");
    }
    out
}
