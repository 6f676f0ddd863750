//! `ploopfs checksum`.
//!
//! Imports: `admin`.
//! Never: ends with 1 but for a disk that is not as its manifest says; trouble is 2.

use super::output::{Report, print_verdict};
use super::progress::Shown as Progress;
use super::size::{parse_size, show_size};
use super::source::{self, ReadArgs, trouble};
use crate::admin::checksum::manifest::{Manifest, Writer};
use crate::admin::checksum::{TOLD_MAX, Verified, check_cluster, sum_up, usual_cluster, verify};
use crate::error::{Error, ErrorKind, Shown};
use crate::units::{SECTOR, len_u64};
use clap::{Args, ValueHint};
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// The disk is not as the manifest says.
const DIFFERS: u8 = 1;
/// The status of a program whose reader has gone, as shells tell it.
const READER_GONE: u8 = 141;
/// Characters that are written at a time.
const PIECE: usize = 1 << 16;
/// Ranges that are shown.
const SHOWN: usize = 32;

/// `ploopfs checksum`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Exit status: 0 done, or as the manifest says; 1 it differs; 2 could not tell

Examples:
  ploopfs checksum disk.hdd >disk.sums
  ploopfs checksum --verify disk.sums disk.hdd
  ploopfs checksum --verify disk.sums copy.qcow2")]
pub struct ChecksumArgs {
    /// Hold the disk against this manifest (- for standard input)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub verify: Option<PathBuf>,
    /// Bytes that have one sum (the disk's clusters)
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "verify")]
    pub cluster_size: Option<u64>,
    /// Say nothing of what was found, and show no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Which disk.
    #[command(flatten)]
    pub select: ReadArgs,
    /// A disk of any kind
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

#[derive(Serialize)]
struct Document {
    schema_version: u32,
    #[serde(flatten)]
    verified: Verified,
}

/// Runs the command; the exit status tells whether the disk is as a manifest says.
pub fn run(args: &ChecksumArgs, json: bool) -> Result<u8, Box<Report>> {
    let done = match &args.verify {
        Some(manifest) => hold_against(args, manifest, json),
        None => make(args, json),
    };
    done.map_err(trouble)
}

fn make(args: &ChecksumArgs, json: bool) -> Result<u8, Box<Report>> {
    let what = format!("cannot sum up {}", args.image.display());
    let refused = |e| Report::refused(&what, &e);
    let shown = Progress::start(args.quiet);
    let source = source::open(&args.image, &args.select.asked(), &what, args.quiet)?;
    let cluster = args
        .cluster_size
        .map_or_else(|| Ok(usual_cluster(source.as_ref())), check_cluster)
        .map_err(refused)?;
    let (mut writer, mut text) = Writer::new(source.size(), cluster, json);
    sum_up(source.as_ref(), cluster, shown.progress(), |sum| {
        writer.push(sum, &mut text);
        if text.len() >= PIECE {
            print_verdict(&text, READER_GONE);
            text.clear();
        }
        Ok(())
    })
    .map_err(refused)?;
    drop(shown);
    print_verdict(&(text + &writer.end()), READER_GONE);
    Ok(0)
}

fn read_manifest(path: &Path) -> Result<Manifest, Error> {
    if path == Path::new("-") {
        return Manifest::read(std::io::stdin().lock());
    }
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::why(ErrorKind::Usage, "there is no such manifest").in_file(path)
        }
        _ => Error::from(e).in_file(path),
    });
    Manifest::read(BufReader::new(file?)).map_err(|e| e.in_file(path))
}

fn hold_against(args: &ChecksumArgs, manifest: &Path, json: bool) -> Result<u8, Box<Report>> {
    let what = format!("cannot verify {}", args.image.display());
    let refused = |e| Report::refused(&what, &e);
    let manifest = read_manifest(manifest).map_err(refused)?;
    let shown = Progress::start(args.quiet);
    let source = source::open(&args.image, &args.select.asked(), &what, args.quiet)?;
    let verified = verify(source.as_ref(), &manifest, shown.progress()).map_err(refused)?;
    drop(shown);
    let status = if verified.equal { 0 } else { DIFFERS };
    if json {
        let document = Document {
            schema_version: 1,
            verified,
        };
        print_verdict(&source::document(&document, &what)?, status);
    } else if !args.quiet {
        print_verdict(&text(&verified), status);
    }
    Ok(status)
}

fn text(verified: &Verified) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(verified, &mut text);
    text
}

fn write_all(verified: &Verified, text: &mut String) -> std::fmt::Result {
    let (size, listed) = (verified.size_bytes, verified.manifest_size_bytes);
    if size != listed {
        writeln!(text, "the disk has {size} bytes, the manifest {listed}")?;
    }
    for found in verified.differences.iter().take(SHOWN) {
        let end = found.start + found.length;
        let sectors = found.start / SECTOR..end.div_ceil(SECTOR);
        write!(
            text,
            "differs: bytes {} to {} (sectors {} to {})",
            found.start,
            end - 1,
            sectors.start,
            sectors.end - 1
        )?;
        if let (Some(file), Some(at)) = (&found.file, found.offset) {
            write!(text, ", from byte {at} of {}", Shown(file))?;
        }
        match &found.error {
            Some(error) => writeln!(text, ": {}", Shown(error))?,
            None => writeln!(text)?,
        }
    }
    let shown = len_u64(verified.differences.len().min(SHOWN));
    match verified.different_ranges - shown {
        0 => {}
        more => writeln!(text, "... {more} more ranges; --json lists {TOLD_MAX}")?,
    }
    match verified.different_bytes {
        0 => writeln!(text, "the disk is as the manifest says"),
        bytes => writeln!(
            text,
            "the disk is not as the manifest says: {} in clusters of other content",
            show_size(bytes)
        ),
    }
}
