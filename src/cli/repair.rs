//! `ploopfs repair`.
//!
//! Imports: `admin`, `error`.
//! Never: changes an image before saying what will be lost, and without a yes.

use super::args::RepairArgs;
use super::output::{Report, note, print};
use super::progress::Shown as Progress;
use super::{check, exit};
use crate::admin::repair::disk::{self, DiskRepair, Session};
use crate::error::{Error, ErrorKind, Shown};
use crate::plan::repair::Policy;
use std::fmt::Write;
use std::io::{self, BufRead, IsTerminal};

/// Runs the command; the exit status tells the state of the disk.
pub fn run(args: &RepairArgs, json: bool) -> Result<u8, Box<Report>> {
    let what = format!("cannot repair {}", args.image.display());
    let refused = |e: &Error| {
        let mut report = Report::refused(&what, e);
        if matches!(
            e.kind(),
            ErrorKind::Corrupt | ErrorKind::Truncated | ErrorKind::Unsupported
        ) {
            report.status = exit::CORRUPT;
        }
        report
    };
    // Before a question it goes, so that signals do what they do then.
    let progress = Progress::start(args.quiet || json);
    let session = disk::open(&args.image, &args.allow_outside, !args.dry_run);
    let mut session = session.map_err(|e| {
        let mut report = Report::refused(&what, &e);
        // As a check has it: the disk is there, and is not what it should be.
        let is_found = matches!(
            e.kind(),
            ErrorKind::Truncated | ErrorKind::Descriptor | ErrorKind::Unsupported
        );
        if is_found {
            report.status = exit::CORRUPT;
        }
        report
    })?;
    if let Some(file) = &args.undo {
        drop(progress);
        return undo(&session, file, args, json);
    }
    let policy = Policy {
        leaks_only: args.leaks_only,
    };
    session.show_on(progress.progress());
    let plan = session.plan(&policy);
    drop(progress);
    let plan = plan.map_err(|e| refused(&e))?;
    let has_steps = plan.files.iter().any(|file| !file.steps.is_empty());
    if args.dry_run {
        show(&plan, json, args.quiet, &what)?;
        // As a check has it: the disk is still what it was.
        let is_unfinished = plan.files.iter().any(|file| file.unfinished.is_some());
        return Ok(if is_unfinished {
            exit::CORRUPT
        } else {
            exit::state(plan.state)
        });
    }
    if has_steps && !args.yes {
        note_plan(&plan);
        confirm("Repair now?", &what)?;
    }
    // Even without steps: a repair that was interrupted at its very end has a name to change.
    let progress = Progress::start(args.quiet || json);
    session.show_on(progress.progress());
    let done = session.repair(&policy);
    drop(progress);
    let done = done.map_err(|e| Report::new(&what, &e))?;
    show(&done, json, args.quiet, &what)?;
    // Space that is wasted by what is not touched here is no failure.
    Ok(match exit::state(done.state) {
        exit::CORRUPT => exit::CORRUPT,
        _ => 0,
    })
}

fn undo(
    session: &Session,
    file: &std::path::Path,
    args: &RepairArgs,
    json: bool,
) -> Result<u8, Box<Report>> {
    let what = format!("cannot undo the repair of {}", args.image.display());
    if !args.yes {
        note("the image will be as it was before the repair, with all that was wrong with it;");
        note("what was written to the disk since then may be lost");
        confirm_or("Undo the repair?", &what, "to do it: --yes")?;
    }
    let clean = session.undo(file).map_err(|e| Report::refused(&what, &e))?;
    if json {
        let state = if clean { "clean" } else { "not-clean" };
        let document = serde_json::json!({ "schema_version": 1, "undone": true, "state": state });
        print(&format!("{document}\n"));
    } else if !args.quiet {
        print("the image is as it was before the repair\n");
    }
    Ok(0)
}

fn show(plan: &DiskRepair, json: bool, quiet: bool, what: &str) -> Result<(), Box<Report>> {
    if json {
        let text = serde_json::to_string_pretty(plan)
            .map_err(|e| Report::new(what, &io::Error::from(e).into()))?;
        print(&(text + "\n"));
    } else if !quiet {
        print(&text(plan));
    }
    Ok(())
}

/// The plan goes to stderr where a question follows: stdout is for the result.
fn note_plan(plan: &DiskRepair) {
    let _ = io::Write::write_all(&mut io::stderr(), text(plan).as_bytes());
}

fn text(plan: &DiskRepair) -> String {
    let mut out = String::new();
    for file in &plan.files {
        let path = Shown(&file.path).to_string();
        let _ = match file.undo {
            _ if file.frozen => {
                writeln!(out, "{path}: {}; a frozen image is not touched", file.state)
            }
            Some(_) => writeln!(out, "{path}: repaired, {} now; it was:", file.state),
            None => writeln!(out, "{path}: {}", file.state),
        };
        for said in &file.findings {
            check::finding(said, &mut out);
        }
        if file.drops_bitmaps {
            let _ = writeln!(
                out,
                "  dirty bitmaps are dropped: the next backup must be a full one"
            );
        }
        // What has been done needs no list of steps.
        let steps = file.phrases.iter().filter(|_| file.undo.is_none());
        for phrase in steps {
            let _ = writeln!(out, "  step: {phrase}");
        }
        if let Some(saved) = &file.unfinished {
            let saved = Shown(saved);
            let _ = writeln!(out, "  step: end what was interrupted, by means of {saved}");
        }
        if file.copied_bytes > 0 && file.undo.is_none() {
            let bytes = file.copied_bytes;
            let _ = writeln!(
                out,
                "  up to {bytes} bytes are copied, and take room on the host"
            );
        }
        if let Some(undo) = &file.undo {
            let _ = writeln!(
                out,
                "  to undo: ploopfs repair --undo {} {}",
                Shown(undo),
                Shown(&plan.image)
            );
        }
    }
    for finding in &plan.findings {
        let _ = writeln!(out, "{}: {}", finding.severity, Shown(&finding.message));
    }
    out
}

/// Asks at a terminal; elsewhere only `--yes` is a yes.
pub(super) fn confirm(question: &str, what: &str) -> Result<(), Box<Report>> {
    confirm_or(question, what, "to do it: --yes; to look only: --dry-run")
}

/// The same, with what can be done where nobody says yes.
fn confirm_or(question: &str, what: &str, fix: &str) -> Result<(), Box<Report>> {
    let refuse = |why: &str| {
        let error = Error::why(ErrorKind::Usage, why);
        Err(Report::refused(what, &error.fix(fix)))
    };
    if !io::stdin().is_terminal() {
        return refuse("this changes the image, and nobody can be asked here");
    }
    let _ = io::Write::write_all(&mut io::stderr(), format!("{question} [y/N] ").as_bytes());
    let mut answer = String::new();
    let _ = io::stdin().lock().read_line(&mut answer);
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        refuse("not confirmed")
    }
}
