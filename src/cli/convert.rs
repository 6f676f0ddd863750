//! `ploopfs convert`.
//!
//! Imports: `admin`, `error`.
//! Never: writes over anything that is there, or mixes words with the bytes on standard output.

use super::args::{ConvertArgs, Format as RawFormat, Target};
use super::create::{product, version};
use super::options::Settings;
use super::output::{Report, note, print};
use super::progress::Shown;
use super::size::show_size;
use crate::admin::convert::{self, Output, Wanted};
use crate::admin::progress::Progress;
use crate::admin::source::{self, Asked, Format, Opened};
use crate::error::{Error, ErrorKind, Result};
use std::io::{self, IsTerminal};
use std::path::Path;

/// Version of the JSON document.
const SCHEMA_VERSION: u32 = 1;
/// The status of a program whose reader has gone, as shells tell it.
const READER_GONE: i32 = 141;

/// Runs the command.
pub fn run(args: &ConvertArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot convert {}", args.source.display());
    let to_stdout = args.target == Path::new("-");
    let shown = Shown::start(args.quiet || json);
    let done = if to_stdout {
        to_stream(args, shown.progress())
    } else {
        to_file(args, shown.progress())
    };
    drop(shown);
    let done = done.map_err(|e| {
        if to_stdout && e.kind() == ErrorKind::Io(libc::EPIPE) {
            std::process::exit(READER_GONE);
        }
        let mut report = Report::refused(&what, &e);
        let left = "nothing was left behind, and the source is as it was";
        report.data.get_or_insert(left.into());
        report
    })?;
    if !args.quiet {
        done.notes.iter().for_each(|told| note(told));
    }
    if to_stdout {
        return Ok(());
    }
    let target = args.target.display().to_string();
    if json {
        let document = serde_json::json!({
            "schema_version": SCHEMA_VERSION,
            "image": target,
            "format": word(done.output),
            "source": args.source.display().to_string(),
            "source_format": done.source_format,
            "size_bytes": done.size,
        });
        print(&format!("{document:#}\n"));
    } else if !args.quiet {
        let (name, size) = (crate::error::Shown(&target), show_size(done.size));
        let format = word(done.output);
        print(&format!(
            "{name}: {size}, {format}, from {}\n",
            done.source_format
        ));
    }
    Ok(())
}

/// What was done.
struct Done {
    output: Output,
    size: u64,
    source_format: &'static str,
    notes: Vec<String>,
}

fn word(output: Output) -> &'static str {
    match output {
        Output::Raw => "raw",
        Output::Image => "hds",
        Output::Bundle => "hdd",
        Output::Qcow2 => "qcow2",
    }
}

fn open(args: &ConvertArgs) -> Result<Opened> {
    let mut settings = Settings::default();
    args.select.apply(&mut settings);
    let mut asked = Asked {
        format: None,
        selection: settings.selection,
    };
    if args.select.format == Some(RawFormat::Raw) && args.select.lower.is_empty() {
        asked.format = Some(Format::Raw);
        asked.selection.raw = false;
    }
    source::open(&args.source, &asked)
}

fn to_file(args: &ConvertArgs, progress: &Progress) -> Result<Done> {
    let output = match args.to {
        Some(Target::Raw) => Output::Raw,
        Some(Target::Hds) => Output::Image,
        Some(Target::Hdd) => Output::Bundle,
        Some(Target::Qcow2) => Output::Qcow2,
        None => Output::of_name(&args.target).ok_or_else(|| {
            let why = "the name of the new disk does not tell what it is to be";
            Error::why(ErrorKind::Usage, why).fix("say it: -O raw, hds, hdd or qcow2")
        })?,
    };
    let wanted = Wanted {
        output,
        version: args.image_version.map(version),
        cluster: args.cluster_size,
        product: product(args.product),
    };
    let opened = open(args)?;
    let made = convert::convert(&*opened.source, &args.target, &wanted, progress)?;
    let mut notes = opened.notes;
    notes.extend(made.notes);
    Ok(Done {
        output,
        size: made.size,
        source_format: opened.source.format(),
        notes,
    })
}

fn to_stream(args: &ConvertArgs, progress: &Progress) -> Result<Done> {
    let usage = |why: &str| Error::why(ErrorKind::Usage, why);
    let for_images = args.image_version.is_some()
        || args.cluster_size.is_some()
        || args.product.is_some()
        || args.to.is_some_and(|to| to != Target::Raw);
    if for_images {
        return Err(usage("standard output takes raw bytes only"));
    }
    if io::stdout().is_terminal() {
        let refused = usage("a disk's bytes are nothing for a terminal");
        return Err(refused.fix("lead them elsewhere: ploopfs convert SRC - | ..."));
    }
    let opened = open(args)?;
    convert::stream(&*opened.source, &mut io::stdout(), progress)?;
    Ok(Done {
        output: Output::Raw,
        size: opened.source.size(),
        source_format: opened.source.format(),
        notes: opened.notes,
    })
}
