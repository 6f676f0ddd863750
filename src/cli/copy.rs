//! `ploopfs copy`.
//!
//! Imports: `admin`, `error`.
//! Never: writes over anything that is there.

use super::output::{Report, print};
use super::progress::Shown;
use super::size::show_size;
use crate::admin;
use crate::chain::bundle;
use crate::error::{Error, ErrorKind, Result};
use clap::{Args, ValueHint};
use std::path::PathBuf;

/// Version of the JSON document.
const SCHEMA_VERSION: u32 = 1;

/// `ploopfs copy`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs copy disk.hdd clone.hdd
  ploopfs copy --new-guids disk.hdd clone.hdd
  ploopfs copy --to /backup disk.hdd             /backup/disk.hdd")]
pub struct CopyArgs {
    /// Copy to this directory, under the same name
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, conflicts_with = "target")]
    #[arg(required_unless_present = "target")]
    pub to: Option<PathBuf>,
    /// Give the snapshots and the disk other GUIDs
    #[arg(long)]
    pub new_guids: bool,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// A .hdd bundle, its DiskDescriptor.xml, or an image file
    #[arg(value_name = "SRC", value_hint = ValueHint::AnyPath)]
    pub source: PathBuf,
    /// The new name
    #[arg(value_name = "DST", value_hint = ValueHint::AnyPath)]
    pub target: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &CopyArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot copy {}", args.source.display());
    let target = target(args).map_err(|e| Report::refused(&what, &e))?;
    let shown = Shown::start(args.quiet || json);
    let copied = admin::copy::copy(&args.source, &target, args.new_guids, shown.progress());
    drop(shown);
    let copied = copied.map_err(|e| {
        let mut report = Report::refused(&what, &e);
        let left = "nothing was left behind, and the source is as it was";
        report.data.get_or_insert(left.into());
        report
    })?;
    let name = target.display().to_string();
    if json {
        let document = serde_json::json!({
            "schema_version": SCHEMA_VERSION,
            "image": name,
            "source": args.source.display().to_string(),
            "images": copied.images,
            "file_bytes": copied.bytes,
        });
        print(&format!("{document:#}\n"));
    } else if !args.quiet {
        let (name, size) = (crate::error::Shown(&name), show_size(copied.bytes));
        print(&format!("{name}: {} images, {size}\n", copied.images));
    }
    Ok(())
}

fn target(args: &CopyArgs) -> Result<PathBuf> {
    if let Some(target) = &args.target {
        return Ok(target.clone());
    }
    let subject = bundle::subject(&args.source)?;
    // By way of the real path: a bundle may be named as ".".
    let full = std::fs::canonicalize(&subject).map_err(|e| Error::from(e).in_file(&subject))?;
    match (full.file_name(), &args.to) {
        (Some(name), Some(directory)) => Ok(directory.join(name)),
        _ => Err(Error::why(ErrorKind::Usage, "name the copy")),
    }
}
