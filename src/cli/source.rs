//! What the commands share that only read: which disk, of which kind, and what is told about it.
//!
//! Imports: `admin`.
//! Never: opens anything for writing.

use super::output::{Report, note};
use crate::admin::source::{self, Asked, Format, Source};
use crate::chain::bundle::Selection;
use crate::error::Shown;
use clap::{Args, ValueEnum, ValueHint};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Kinds of disks, as they are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The disk's bytes as they are
    Raw,
    /// A ploop or Parallels image
    #[value(alias = "parallels", alias = "ploop", alias = "hdd")]
    Hds,
    /// QEMU
    Qcow2,
    /// VMware
    Vmdk,
    /// Microsoft, newer
    Vhdx,
    /// Microsoft, older
    #[value(alias = "vhd")]
    Vpc,
    /// VirtualBox
    Vdi,
    /// QEMU's enhanced disk
    Qed,
}

impl From<Kind> for Format {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Raw => Self::Raw,
            Kind::Hds => Self::Ours,
            Kind::Qcow2 => Self::Qcow2,
            Kind::Vmdk => Self::Vmdk,
            Kind::Vhdx => Self::Vhdx,
            Kind::Vpc => Self::Vpc,
            Kind::Vdi => Self::Vdi,
            Kind::Qed => Self::Qed,
        }
    }
}

/// Which disk.
#[derive(Args, Clone, Debug, Default)]
pub struct ReadArgs {
    /// The disk as of a snapshot: GUID, name or `latest`
    #[arg(long, value_name = "ID", help_heading = "Which disk")]
    pub snapshot: Option<String>,
    /// A delta below IMAGE, base first (repeatable)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Which disk")]
    pub lower: Vec<PathBuf>,
    /// What it is: raw, hds, qcow2, vmdk, vhdx, vpc, vdi or qed
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Which disk")]
    #[arg(hide_possible_values = true)]
    pub format: Option<Kind>,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Which disk")]
    pub allow_outside: Vec<PathBuf>,
}

impl ReadArgs {
    /// What is to be opened to look at its map, which is done in a moment: as for `info`, without
    /// locks and without waiting for any.
    #[must_use]
    pub fn asked_for_map(&self) -> Asked {
        let mut asked = self.asked();
        asked.selection.no_lock = true;
        asked
    }

    /// What is to be opened.
    #[must_use]
    pub fn asked(&self) -> Asked {
        // With deltas over it, a raw file is the base of a chain of ours.
        let is_base = !self.lower.is_empty() && self.format == Some(Kind::Raw);
        Asked {
            format: self.format.filter(|_| !is_base).map(Format::from),
            selection: Selection {
                snapshot: self.snapshot.clone(),
                lower: self.lower.clone(),
                raw: is_base,
                allow_outside: self.allow_outside.clone(),
                ..Selection::default()
            },
            at_rest: false,
        }
    }
}

/// Opens a disk and tells on stderr what the user should know about it.
pub fn open(
    path: &Path,
    asked: &Asked,
    what: &str,
    quiet: bool,
) -> Result<Arc<dyn Source>, Box<Report>> {
    let opened = source::open(path, asked).map_err(|e| Report::refused(what, &e))?;
    if !quiet {
        for told in &opened.notes {
            note(&Shown(told).to_string());
        }
    }
    Ok(opened.source)
}

/// One JSON document.
pub fn document<T: serde::Serialize>(value: &T, what: &str) -> Result<String, Box<Report>> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Report::new(what, &std::io::Error::from(e).into()))?;
    Ok(text + "\n")
}

/// The same report, with the status that says "trouble" where 1 says "they differ".
#[must_use]
pub fn trouble(mut report: Box<Report>) -> Box<Report> {
    if report.status == super::exit::FAILED {
        report.status = super::exit::TROUBLE;
    }
    report
}
