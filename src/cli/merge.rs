//! `ploopfs merge`.
//!
//! Imports: `admin`, `error`.
//! Never: takes a snapshot away without a yes.

use super::args::MergeArgs;
use super::output::{Report, note};
use super::progress::Shown;
use super::repair::confirm;
use super::snapshot::{half_way, merged_document, merged_text, tell, warn};
use crate::admin::snapshot::session::{MergeWish, Session};

/// Runs the command.
pub fn run(args: &MergeArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot merge images of {}", args.image.display());
    let session = Session::open(&args.image, &args.allow_outside);
    let session = session.map_err(|e| Report::refused(&what, &e))?;
    let wish = MergeWish {
        snapshot: args.snapshot.clone(),
        all: args.all,
        into_new: args.into_new.clone(),
        drop_bitmaps: args.drop_bitmaps,
    };
    let plan = session.plan_merge(&wish);
    let plan = plan.map_err(|e| Report::refused(&what, &e))?;
    let (text, document) = (merged_text(&plan), merged_document(&plan));
    if args.dry_run {
        tell(&text, "none", document, json, args.quiet);
        return Ok(());
    }
    if !args.yes {
        for line in text.lines() {
            note(line);
        }
        confirm("Merge now?", &what)?;
    }
    let shown = Shown::start(args.quiet || json);
    let done = session.merge(&wish, shown.progress());
    drop(shown);
    let (_, warnings) = done.map_err(|e| half_way(&what, &e))?;
    warn(&warnings);
    tell(&text, "merged", document, json, args.quiet);
    Ok(())
}
