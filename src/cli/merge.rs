//! `ploopfs merge`.
//!
//! Imports: `admin`, `chain`, `error`.
//! Never: takes a snapshot away, or changes an image, without a yes.

use super::args::MergeArgs;
use super::output::{Report, note};
use super::progress::Shown;
use super::repair::confirm;
use super::size::show_size;
use super::snapshot::{
    discards_document, discards_text, half_way, merged_document, merged_text, tell, warn,
};
use crate::admin::merge::loose;
use crate::admin::snapshot::Losses;
use crate::admin::snapshot::session::{MergeWish, Session};
use crate::chain::bundle;
use crate::error::{Error, ErrorKind, Shown as Quoted};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Runs the command.
pub fn run(args: &MergeArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot merge images of {}", args.image.display());
    let subject = bundle::subject(&args.image).map_err(|e| Report::refused(&what, &e))?;
    if subject.is_dir() {
        in_bundle(args, json, &what)
    } else {
        by_themselves(args, json, &what)
    }
}

fn text_of(path: &Path) -> Option<String> {
    path.to_str().map(str::to_owned)
}

/// What is asked of a bundle.
fn wish(args: &MergeArgs) -> Result<MergeWish, Error> {
    let usage = |why: &str| Err(Error::why(ErrorKind::Usage, why));
    if args.lower.len() > 1 {
        return usage("of a bundle, one snapshot at a time is merged");
    }
    if args.format.is_some() {
        return usage("--format is for single images; a descriptor says this itself");
    }
    let into_new = args.into_new.as_deref().map(text_of);
    if into_new == Some(None) {
        return usage("the new file needs a name in UTF-8, as descriptors are");
    }
    let snapshot = args.lower.first();
    Ok(MergeWish {
        snapshot: snapshot.map(|word| word.to_string_lossy().into_owned()),
        all: args.all,
        into_new: into_new.flatten(),
        losses: Losses {
            drop_bitmaps: args.drop_bitmaps,
            force_discard: args.force_discard,
        },
    })
}

/// Asks, unless `--yes` has been said.
fn ask(args: &MergeArgs, text: &str, what: &str) -> Result<(), Box<Report>> {
    if args.yes {
        return Ok(());
    }
    for line in text.lines() {
        note(line);
    }
    confirm("Merge now?", what)
}

fn in_bundle(args: &MergeArgs, json: bool, what: &str) -> Result<(), Box<Report>> {
    let refused = |e: &Error| Report::refused(what, e);
    let wish = wish(args).map_err(|e| refused(&e))?;
    let session = Session::open(&args.image, &args.allow_outside).map_err(|e| refused(&e))?;
    let plan = session.plan_merge(&wish).map_err(|e| refused(&e))?;
    let (text, document) = (merged_text(&plan), merged_document(&plan));
    if args.dry_run {
        tell(&text, "none", document, json, args.quiet);
        return Ok(());
    }
    ask(args, &text, what)?;
    let shown = Shown::start(args.quiet || json);
    let done = session.merge(&wish, shown.progress());
    drop(shown);
    let (_, warnings) = done.map_err(|e| half_way(what, &e))?;
    warn(&warnings);
    tell(&text, "merged", document, json, args.quiet);
    Ok(())
}

fn by_themselves(args: &MergeArgs, json: bool, what: &str) -> Result<(), Box<Report>> {
    let refused = |e: &Error| Report::refused(what, e);
    if args.all {
        let why = "--all is for bundles: of images by themselves, all that are named are merged";
        return Err(Report::usage(what, why));
    }
    let mut files = vec![args.image.clone()];
    files.extend(args.lower.iter().cloned());
    let wish = loose::Wish {
        files,
        is_plain: args.format.is_some(),
        into_new: args.into_new.clone(),
        drop_bitmaps: args.drop_bitmaps,
        force_discard: args.force_discard,
    };
    let session = loose::open(&wish, !args.dry_run).map_err(|e| refused(&e))?;
    let plan = session.plan().map_err(|e| refused(&e))?;
    for warning in &session.warnings {
        note(&Quoted(warning).to_string());
    }
    let in_place = args.into_new.is_none();
    let (text, document) = (loose_text(&plan, in_place), loose_document(&plan));
    if args.dry_run {
        tell(&text, "none", document, json, args.quiet);
        return Ok(());
    }
    if in_place {
        ask(args, &text, what)?;
    }
    let shown = Shown::start(args.quiet || json);
    let done = session.merge(shown.progress());
    drop(shown);
    done.map_err(|e| {
        let mut report = Report::new(what, &e);
        report.data = Some(if in_place {
            "the images over one another show what they did; to go on, repeat the command".into()
        } else {
            "nothing was left behind, and the images are as they were".into()
        });
        report
    })?;
    tell(&text, "merged", document, json, args.quiet);
    Ok(())
}

fn name(path: &Path) -> String {
    Quoted(&path.display().to_string()).to_string()
}

fn loose_text(plan: &loose::Merged, in_place: bool) -> String {
    let (into, from): (_, Vec<String>) = (
        name(&plan.into),
        plan.from.iter().map(|path| name(path)).collect(),
    );
    let from = from.join(", ");
    let (clusters, bytes) = (plan.amount.clusters, show_size(plan.amount.bytes));
    let mut out = format!("{into} takes what {from} hold: {clusters} clusters ({bytes})\n");
    if let Some(len) = plan.clipped {
        let (disk, largest) = (show_size(plan.disk_len), show_size(len));
        let _ = writeln!(
            out,
            "the disk has {disk}; of {largest}, the end is left out"
        );
    }
    out += &discards_text(&plan.discards);
    if in_place {
        let _ = writeln!(
            out,
            "{into} is the whole disk then; {from} stay and are not needed any more"
        );
    }
    out
}

fn loose_document(plan: &loose::Merged) -> Value {
    let text = |path: &PathBuf| path.display().to_string();
    json!({
        "into": text(&plan.into),
        "from": plan.from.iter().map(text).collect::<Vec<_>>(),
        "clusters": plan.amount.clusters,
        "bytes": plan.amount.bytes,
        "disk_size_bytes": plan.disk_len,
        "discards": discards_document(&plan.discards),
    })
}
