//! `ploopfs convert`.
//!
//! Imports: `admin`, `error`.
//! Never: writes over anything that is there, or mixes words with the bytes on standard output.

use super::create::{For, product, version};
use super::output::{Report, note, print};
use super::progress::Shown;
use super::size::{parse_size, show_size};
use super::source::ReadArgs;
use crate::admin::convert::{self, Output, Wanted};
use crate::admin::progress::Progress;
use crate::admin::source::{self, Asked, Opened};
use crate::error::{Error, ErrorKind, Result};
use clap::{Args, ValueEnum, ValueHint};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

/// Version of the JSON document.
const SCHEMA_VERSION: u32 = 1;
/// The status of a program whose reader has gone, as shells tell it.
const READER_GONE: i32 = 141;

/// What a disk can be converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// The disk's bytes as they are, with holes.
    Raw,
    /// A single image.
    Hds,
    /// A bundle.
    Hdd,
    /// QEMU's format.
    Qcow2,
}

/// `ploopfs convert`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs convert disk.hdd disk.img                 a flat file with holes
  ploopfs convert disk.qcow2 disk.hdd
  ploopfs convert --snapshot latest disk.hdd old.hds
  ploopfs convert root.hds - | zstd > disk.img.zst")]
pub struct ConvertArgs {
    /// What to make: raw, hds, hdd or qcow2 [default: by the name of DST]
    #[arg(
        short = 'O',
        long = "to",
        value_enum,
        value_name = "FORMAT",
        hide_possible_values = true
    )]
    pub to: Option<Target>,
    /// Version of the new image, 1 or 2 [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=2))]
    pub image_version: Option<u8>,
    /// Bytes of a new cluster, a power of two from 32K to 64M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub cluster_size: Option<u64>,
    /// Write what this product opens: parallels-desktop or virtuozzo
    #[arg(
        long = "for",
        value_enum,
        value_name = "PRODUCT",
        hide_possible_values = true
    )]
    pub product: Option<For>,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Which disk.
    #[command(flatten)]
    pub read: ReadArgs,
    /// A disk: ours, raw, or of another program
    #[arg(value_name = "SRC", value_hint = ValueHint::AnyPath)]
    pub source: PathBuf,
    /// The new disk; - for raw bytes to standard output
    #[arg(value_name = "DST", value_hint = ValueHint::AnyPath)]
    pub target: PathBuf,
}

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
    // What the new disk is like is told also to those who want to hear nothing else.
    for told in &done.notes {
        note(&crate::error::Shown(told).to_string());
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
    // What is read at different moments makes a disk that never was.
    let asked = Asked {
        at_rest: true,
        ..args.read.asked()
    };
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
    let made = convert::convert(
        &*opened.source,
        &args.source,
        &args.target,
        &wanted,
        progress,
    )?;
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
