//! `ploopfs compact`.
//!
//! Imports: `admin`, `error`.
//! Never: changes what is in the files on the disk; changes an image without a yes.

use super::args::CompactArgs;
use super::output::{Report, note, print};
use super::progress;
use super::repair::confirm;
use super::size::show_size;
use super::trim::{self, Trimmed};
use crate::admin::compact::Request;
use crate::admin::compact::disk::{self, DiskCompact, FileCompact};
use crate::admin::progress::Progress;
use crate::error::{Error, Result, Shown};
use serde::Serialize;
use std::fmt::Write;
use std::io::{self, IsTerminal};

/// What was done to the disk, or would be.
#[derive(Serialize)]
struct Told {
    #[serde(flatten)]
    disk: DiskCompact,
    /// The file systems on it, where they were to be trimmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    file_systems: Option<Vec<Trimmed>>,
}

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
    if args.trim && !args.dry_run {
        trim::expect_means(args).map_err(|e| {
            let mut report = Report::refused(&what, &e);
            report.data = Some("nothing was changed".into());
            report
        })?;
    }
    if args.dry_run || !args.yes {
        // Nobody waits for what all data says where the answer will be no.
        let is_quick = !args.dry_run && !io::stdin().is_terminal();
        let told = plan(args, &request, is_quick).map_err(|e| Report::refused(&what, &e))?;
        let is_known = !is_quick || !(args.zeroes || args.fill_holes);
        if args.dry_run || (is_known && told.is_nothing()) {
            return show(&told, json, args.quiet, &what, args.dry_run);
        }
        for line in text(&told, true).lines() {
            note(line);
        }
        confirm("Compact now?", &what)?;
    }
    let told = carry_out(args, &request, &what)?;
    show(&told, json, args.quiet, &what, false)
}

/// What would be done; quickly, without reading data.
fn plan(args: &CompactArgs, request: &Request, is_quick: bool) -> Result<Told> {
    let shown = progress::Shown::start(args.quiet);
    let session = disk::open(&args.image, &args.allow_outside, false)?;
    let disk = match is_quick {
        true => session.try_to(request, shown.progress())?,
        false => session.plan(request, shown.progress())?,
    };
    let file_systems = args.trim.then(|| trim::look(args)).transpose()?;
    Ok(Told { disk, file_systems })
}

fn carry_out(args: &CompactArgs, request: &Request, what: &str) -> Result<Told, Box<Report>> {
    let refused = |e: Error| Report::refused(what, &e);
    let open = || disk::open(&args.image, &args.allow_outside, true);
    let (mut before, mut file_systems) = (None, None);
    if args.trim {
        let (quick, held) = {
            let session = open().map_err(refused)?;
            let quick = session.try_to(request, &Progress::default());
            (quick.map_err(refused)?, session.held().map_err(refused)?)
        };
        file_systems = Some(trim::run(args, &held, what)?);
        before = Some(quick);
    }
    let shown = progress::Shown::start(args.quiet);
    let session = open().map_err(refused)?;
    session.try_to(request, shown.progress()).map_err(refused)?;
    let mut disk = session.compact(request, shown.progress()).map_err(|e| {
        if !session.has_begun() && !args.trim {
            return Report::unbegun(what, &e);
        }
        let mut report = Report::new(what, &e);
        let state = "the disk shows what it did before; repeat the command to complete it";
        report.data = Some(state.to_owned());
        report
    })?;
    if let Some(before) = before {
        disk.began_as(&before);
    }
    Ok(Told { disk, file_systems })
}

fn show(
    told: &Told,
    json: bool,
    quiet: bool,
    what: &str,
    is_plan: bool,
) -> Result<(), Box<Report>> {
    if json {
        let text = serde_json::to_string_pretty(told)
            .map_err(|e| Report::new(what, &io::Error::from(e).into()))?;
        print(&(text + "\n"));
    } else if !quiet {
        print(&text(told, is_plan));
    }
    Ok(())
}

impl Told {
    fn is_nothing(&self) -> bool {
        let mut systems = self.file_systems.iter().flatten();
        self.disk.files.iter().all(|file| file.is_done) && systems.all(|one| one.skipped.is_some())
    }
}

fn text(told: &Told, is_plan: bool) -> String {
    let mut out = String::new();
    if let Some(all) = &told.file_systems {
        trim::text(all, &mut out);
    }
    for file in &told.disk.files {
        one(file, is_plan, &mut out);
    }
    out
}

fn one(file: &FileCompact, is_plan: bool, out: &mut String) {
    let path = Shown(&file.path).to_string();
    let (before, after) = (show_size(file.before_bytes), show_size(file.after_bytes));
    let on_host = show_size(file.before_allocated);
    let _ = match (file.plain, file.is_done, is_plan) {
        (true, true, _) => writeln!(out, "{path}: {before}; a plain file is left as it is"),
        (true, false, _) => {
            let now = show_size(file.after_allocated);
            writeln!(out, "{path}: {before} (on the host {now}, was {on_host})")
        }
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
