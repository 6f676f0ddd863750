//! What kind of disk a path is, by its first bytes.

use crate::chain::bundle::{self, Selection};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Version;
use crate::sys::open as sys;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

/// Kinds of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A ploop or Parallels disk: bundle, chain or single image.
    Ours,
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// Microsoft's newer one.
    Vhdx,
    /// Microsoft's older one, Virtual PC's.
    Vpc,
    /// VirtualBox's.
    Vdi,
    /// QEMU's enhanced disk.
    Qed,
}

impl Format {
    /// The word that QEMU and the command line use.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ours => "hds",
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vpc => "vpc",
            Self::Vdi => "vdi",
            Self::Qed => "qed",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Where a format has its magic.
const MAGICS: [(Format, u64, &[u8]); 7] = [
    (Format::Qcow2, 0, b"QFI\xfb"),
    (Format::Vmdk, 0, b"KDMV"),
    (Format::Vmdk, 0, b"# Disk DescriptorFile"),
    (Format::Vhdx, 0, b"vhdxfile"),
    (Format::Vpc, 0, b"conectix"),
    (Format::Vdi, 0x40, b"\x7f\x10\xda\xbe"),
    (Format::Qed, 0, b"QED\0"),
];

/// Tells what a path is.
///
/// What is on a block device was written by whoever used it as a disk, who could have written the
/// magic of a format that names other files of the host, so without a word of the user it is raw.
pub(super) fn recognise(path: &Path, selection: &Selection) -> Result<Format> {
    if selection.raw || !selection.lower.is_empty() {
        return Ok(Format::Ours);
    }
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(bundle::nothing(path));
        }
        Err(e) => return Err(Error::from(e).in_file(path)),
    };
    let has_extension = |wanted: &str| {
        let extension = path.extension().and_then(OsStr::to_str);
        extension.is_some_and(|found| found.eq_ignore_ascii_case(wanted))
    };
    if meta.is_dir() || has_extension("xml") {
        return Ok(Format::Ours);
    }
    if meta.file_type().is_block_device() {
        return Ok(Format::Raw);
    }
    // What is no file at all is refused by the one who opens it.
    if !meta.is_file() {
        return Ok(Format::Raw);
    }
    let file = sys::any(path, false).map_err(|e| Error::from(e).in_file(path))?;
    let start = head(&file, 0, 128).map_err(|e| e.in_file(path))?;
    if Version::of(&start).is_some() {
        return Ok(Format::Ours);
    }
    let is_here = |(_, at, magic): &&(Format, u64, &[u8])| {
        let at = usize::try_from(*at).unwrap_or(usize::MAX);
        start.get(at..).is_some_and(|rest| rest.starts_with(magic))
    };
    if let Some((format, ..)) = MAGICS.iter().find(is_here) {
        if !["img", "raw", "dd"].into_iter().any(has_extension) {
            return Ok(*format);
        }
        // Who uses a raw disk writes what they like to it, also the name of a file of the host.
        let why = format!("by its name it is a raw disk, by its first bytes {format}");
        return Err(Error::why(ErrorKind::NotAnImage, why)
            .in_file(path)
            .fix(format!("say which: --format raw, or --format {format}")));
    }
    // A fixed VHD is a raw disk with this behind it; in any other file these are a disk's bytes.
    if has_extension("vhd") || has_extension("vpc") {
        let footer = head(&file, meta.len().saturating_sub(512), 8).map_err(|e| e.in_file(path))?;
        if footer == b"conectix" {
            return Ok(Format::Vpc);
        }
    }
    if has_extension("hds") || has_extension("hdd") || is_named_by_ploop(path) {
        let why = "by its name it is a ploop or Parallels image, but it lacks the magic of one";
        return Err(Error::why(ErrorKind::NotAnImage, why)
            .in_file(path)
            .fix("if it is a plain (raw) disk, say --format raw"));
    }
    Ok(Format::Raw)
}

/// `root.hds.{guid}`.
fn is_named_by_ploop(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str);
    name.is_some_and(|name| name.contains(".hds.{"))
}

fn head(file: &File, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        let position = at.saturating_add(crate::units::len_u64(filled));
        match file.read_at(&mut bytes[filled..], position)? {
            0 => break,
            n => filled += n,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
