//! `ploopfs snapshot`.
//!
//! Imports: `admin`, `error`.
//! Never: drops what was written to a disk without a yes.

use super::args::{SnapshotArgs, SnapshotVerb};
use super::output::{Report, note, print};
use super::progress::Shown as Progress;
use super::repair::confirm;
use super::size::show_size;
use crate::admin::merge::Discard;
use crate::admin::snapshot::list::{self, Listed, Row};
use crate::admin::snapshot::session::Session;
use crate::admin::snapshot::{Deleted, Deletion, Losses, Merged};
use crate::error::{Error, Shown};
use crate::format::guid::Guid;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Version of the JSON documents of those that change something.
const SCHEMA_VERSION: u32 = 1;

/// Runs the command.
pub fn run(args: &SnapshotArgs, json: bool) -> Result<(), Box<Report>> {
    match &args.verb {
        SnapshotVerb::List(args) => show(&args.image, &args.allow_outside, json, table),
        SnapshotVerb::Tree(args) => show(&args.image, &args.allow_outside, json, tree),
        SnapshotVerb::Create(args) => {
            let what = format!("cannot make a snapshot of {}", args.image.display());
            let guid = match args.uuid.as_deref().map(|text| (text, Guid::parse(text))) {
                Some((text, None)) => {
                    return Err(Report::usage(&what, format!("{text:?} is no GUID")));
                }
                Some((_, guid)) => guid,
                None => None,
            };
            let session = open(&args.image, &args.allow_outside, &what)?;
            let made = session.create(guid, args.name.as_deref());
            let made = made.map_err(|e| Report::refused(&what, &e))?;
            warn(&made.warnings);
            let guid = made.guid.to_string();
            let document = json!({ "snapshot": guid, "files": made.files });
            tell(&format!("{guid}\n"), "created", document, json, args.quiet);
            Ok(())
        }
        SnapshotVerb::Rename(args) => {
            let what = format!("cannot rename {}", Shown(&args.snapshot));
            let session = open(&args.image, &args.allow_outside, &what)?;
            let guid = session.rename(&args.snapshot, &args.name);
            let guid = guid.map_err(|e| Report::refused(&what, &e))?.to_string();
            let text = format!("{guid} is named {:?}\n", args.name);
            let document = json!({ "snapshot": guid, "name": args.name });
            tell(&text, "renamed", document, json, args.quiet);
            Ok(())
        }
        SnapshotVerb::Switch(args) => switch(args, json),
        SnapshotVerb::Delete(args) => delete(args, json),
    }
}

fn open(image: &Path, outside: &[PathBuf], what: &str) -> Result<Session, Box<Report>> {
    Session::open(image, outside).map_err(|e| Report::refused(what, &e))
}

/// Shows a result; the document says what was done in `action`.
pub(super) fn tell(text: &str, action: &str, mut document: Value, json: bool, quiet: bool) {
    if json {
        document["schema_version"] = SCHEMA_VERSION.into();
        document["action"] = action.into();
        print(&format!("{document:#}\n"));
    } else if !quiet {
        print(text);
    }
}

fn show(
    image: &Path,
    outside: &[PathBuf],
    json: bool,
    render: fn(&Listed) -> String,
) -> Result<(), Box<Report>> {
    let what = format!("cannot list the snapshots of {}", image.display());
    let listed = list::list(image, outside).map_err(|e| Report::refused(&what, &e))?;
    if json {
        let text = serde_json::to_string_pretty(&listed)
            .map_err(|e| Report::new(&what, &std::io::Error::from(e).into()))?;
        print(&(text + "\n"));
        return Ok(());
    }
    warn(&listed.warnings);
    print(&render(&listed));
    Ok(())
}

pub(super) fn warn(warnings: &[String]) {
    for warning in warnings {
        note(&Shown(warning).to_string());
    }
}

fn size(row: &Row) -> String {
    row.allocated_bytes.map_or("missing".to_owned(), show_size)
}

/// What is said of a snapshot besides its name.
fn remark(row: &Row) -> String {
    let mut words = Vec::new();
    if row.is_top {
        words.push("top".to_owned());
    }
    if row.is_going {
        words.push("going".to_owned());
    }
    words.extend(row.name.as_ref().map(|name| format!("{name:?}")));
    Shown(&words.join(" ")).to_string()
}

fn table(listed: &Listed) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:38}  {:38}  {:>9}  NAME",
        "SNAPSHOT", "PARENT", "SIZE"
    );
    for row in &listed.snapshots {
        let parent = row.parent.as_deref().unwrap_or("-");
        let line = format!(
            "{:38}  {parent:38}  {:>9}  {}",
            row.guid,
            size(row),
            remark(row)
        );
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

fn tree(listed: &Listed) -> String {
    list::draw(listed, |row| {
        let line = format!("{}  {}  {}", row.guid, size(row), remark(row));
        line.trim_end().to_owned()
    })
}

fn switch(args: &super::args::SwitchArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot switch {}", args.image.display());
    let session = open(&args.image, &args.allow_outside, &what)?;
    let refused = |e: &Error| Report::refused(&what, e);
    let target = session.find(&args.snapshot).map_err(|e| refused(&e))?;
    let fate = if args.keep {
        "what was written since then becomes a snapshot"
    } else {
        "what was written since then is lost"
    };
    let planned = session.plan_switch(target, args.keep);
    let planned = planned.map_err(|e| refused(&e))?;
    let mut plan = format!("the disk becomes what it was in {target}; {fate}\n");
    let (more, then) = told_of(planned.then.as_ref());
    plan += &more;
    if args.dry_run {
        warn(&planned.warnings);
        let document = json!({ "snapshot": target.to_string(), "then": then });
        tell(&plan, "none", document, json, args.quiet);
        return Ok(());
    }
    if !args.yes && !args.keep {
        warn(&planned.warnings);
        plan.lines().for_each(note);
        confirm("Switch now?", &what)?;
    }
    let shown = Progress::start(args.quiet || json);
    let made = session.switch(&args.snapshot, args.keep, shown.progress());
    drop(shown);
    let (made, kept) = made.map_err(|e| refused(&e))?;
    warn(&made.warnings);
    let kept = kept.map(|guid| guid.to_string());
    let mut text = match &kept {
        Some(kept) => format!("the disk is that of {target}; what it was is {kept}\n"),
        None => format!("the disk is that of {target}\n"),
    };
    let (more, then) = told_of(made.then.as_ref());
    text += &more;
    let document = json!({ "snapshot": target.to_string(), "kept": kept, "then": then });
    tell(&text, "switched", document, json, args.quiet);
    Ok(())
}

/// What goes with a switch.
fn told_of(then: Option<&Deletion>) -> (String, Value) {
    then.map(|then| deletion(None, then)).unwrap_or_default()
}

fn delete(args: &super::args::DeleteArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot delete {}", Shown(&args.snapshot));
    let session = open(&args.image, &args.allow_outside, &what)?;
    let refused = |e: &Error| Report::refused(&what, e);
    let target = session.find(&args.snapshot).map_err(|e| refused(&e))?;
    let losses = Losses {
        drop_bitmaps: args.drop_bitmaps,
        force_discard: args.force_discard,
    };
    let plan = session.plan_delete(target, losses);
    let plan = plan.map_err(|e| refused(&e))?;
    let (text, document) = deletion(Some(target), &plan);
    if args.dry_run {
        tell(&text, "none", document, json, args.quiet);
        return Ok(());
    }
    if !args.yes {
        text.lines().for_each(note);
        confirm("Delete now?", &what)?;
    }
    let shown = Progress::start(args.quiet || json);
    let done = session.delete(target, losses, shown.progress());
    drop(shown);
    let (_, warnings) = done.map_err(|e| half_way(&what, &e))?;
    warn(&warnings);
    let word = match plan.what {
        Deleted::Marked { .. } => "marked",
        _ => "deleted",
    };
    tell(&text, word, document, json, args.quiet);
    Ok(())
}

/// A report of what has begun, since all that could be refused was tried before.
pub(super) fn half_way(what: &str, error: &Error) -> Box<Report> {
    let mut report = Report::new(what, error);
    report.data = Some("the disk and all other snapshots show what they did".into());
    report
}

/// What a deletion does, of a snapshot that was named or of one that goes with another change.
fn deletion(target: Option<Guid>, plan: &Deletion) -> (String, Value) {
    let (mut text, mut document) = match &plan.what {
        Deleted::Dropped { gone, files } => {
            let gone: Vec<String> = gone.iter().rev().map(Guid::to_string).collect();
            let lines = gone.iter();
            let lines = lines.map(|guid| format!("{guid} goes, with what only it shows\n"));
            let text = lines.collect::<String>() + &files_text(files);
            (text, json!({ "gone": gone, "files": files }))
        }
        Deleted::Merged(merged) => (merged_text(merged), merged_document(merged)),
        Deleted::Marked { children } => {
            let guid = target.map(|guid| guid.to_string()).unwrap_or_default();
            let text = format!(
                "{guid} has {children} children, which need it; it is marked, and goes when one \
                 is left\n"
            );
            (text, json!({ "children": children }))
        }
    };
    if let Some(then) = &plan.then {
        text += "then goes what was marked, and has waited for that:\n";
        text += &merged_text(then);
    }
    if let Some(target) = target {
        document["snapshot"] = target.to_string().into();
    }
    document["then"] = plan.then.as_ref().map(merged_document).into();
    (text, document)
}

fn files_text(files: &[String]) -> String {
    match files {
        [] => String::new(),
        files => format!("files that go: {}\n", Shown(&files.join(", "))),
    }
}

/// What a merge loses, in words.
pub(super) fn discards_text(discards: &[Discard]) -> String {
    let line = |discard: &Discard| {
        let file = discard.file.display().to_string();
        let (file, byte) = (Shown(&file), discard.byte);
        format!("the disk ends before data of {file}, which is lost from byte {byte} on\n")
    };
    discards.iter().map(line).collect()
}

pub(super) fn discards_document(discards: &[Discard]) -> Value {
    let one = |discard: &Discard| {
        let file = discard.file.display().to_string();
        json!({ "file": file, "from_byte": discard.byte })
    };
    discards.iter().map(one).collect()
}

pub(super) fn merged_document(merged: &Merged) -> Value {
    let gone: Vec<String> = merged.gone.iter().map(Guid::to_string).collect();
    json!({
        "gone": gone,
        "survivor": merged.survivor.to_string(),
        "clusters": merged.amount.clusters,
        "bytes": merged.amount.bytes,
        "files": merged.files,
        "made": merged.made,
        "discards": discards_document(&merged.discards),
    })
}

pub(super) fn merged_text(merged: &Merged) -> String {
    let mut out = String::new();
    for guid in &merged.gone {
        let _ = writeln!(out, "{guid} goes");
    }
    let (clusters, bytes) = (merged.amount.clusters, show_size(merged.amount.bytes));
    let survivor = merged.survivor;
    let _ = writeln!(
        out,
        "{survivor} stays; {clusters} clusters ({bytes}) move for that"
    );
    out + &files_text(&merged.files) + &discards_text(&merged.discards)
}
