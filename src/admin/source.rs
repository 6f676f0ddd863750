//! A disk of any kind, to be read: ours with its chain, a raw file or block device, or a format of
//! another program.
//!
//! [`open`] recognises what a path is by its first bytes (`magic`) and gives a [`Source`]. All that
//! copies, compares or sums up disks works on sources, so each of them can do it with any kind.
//!
//! Nothing is ever written, not even an access time where the host lets us prevent it. A disk that
//! another program writes to is read all the same, and [`Opened::notes`] say so.
//!
//! No Rust library reads qcow2, VMDK or VHDX with the compiler that this program promises to be
//! built by, so those are read through `qemu-img` (`foreign`); it is never used for our own format.

mod foreign;
mod magic;
mod ours;
mod raw;
pub mod work;

pub use magic::Format;
pub use ours::OurDisk;
pub use raw::RawDisk;

use crate::admin::progress::Progress;
use crate::chain::bundle::Selection;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::SharedStorage;
use crate::units::{DiskOffset, FileOffset};
use std::fmt::Debug;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The longest range of data that is told at once.
const DATA_MAX: u64 = 1 << 30;

/// A disk that can be read, from any number of threads at a time.
pub trait Source: Send + Sync + Debug {
    /// The word for its format: `hdd`, `hds`, `raw`, `qcow2` ...
    fn format(&self) -> &'static str;

    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// The extents from `at` to the end of the disk, in order and without gaps. Neighbours need not
    /// be merged.
    fn extents(&self, at: DiskOffset) -> Box<dyn Iterator<Item = Result<Extent>> + '_>;

    /// The files that extents name.
    fn files(&self) -> &[PathBuf];

    /// Does what has to be done once before the first [`Source::read_at`], and may take as long as
    /// reading the whole disk.
    fn prepare(&self, _progress: &Progress) -> Result<()> {
        Ok(())
    }

    /// Fills `buf` from `at`; all of it lies on the disk.
    fn read_at(&self, at: DiskOffset, buf: &mut [u8]) -> Result<()>;

    /// The next range at or after `from` that may have something else than zeros, not longer than
    /// is good for one piece of work; `None` when only zeros follow. What cannot be read counts as
    /// data, so that reading it fails.
    fn next_data(&self, from: DiskOffset) -> Result<Option<Range<DiskOffset>>> {
        next_data_of(self.extents(from), from)
    }

    /// Where the bytes at a position are in one file of the host, and how far from there, so that
    /// the host can share its blocks. `None` where they are not.
    fn host_place(&self, _at: DiskOffset) -> Result<Option<HostPlace>> {
        Ok(None)
    }

    /// The size of its allocation units, where it has such.
    fn cluster_bytes(&self) -> Option<u64> {
        None
    }

    /// The disk, where it is one of ours.
    fn disk(&self) -> Option<&Disk> {
        None
    }

    /// True where the bytes are encrypted, by what stands elsewhere about them.
    fn is_encrypted(&self) -> bool {
        false
    }
}

/// Bytes of a disk that lie together in a file.
#[derive(Clone, Debug)]
pub struct HostPlace {
    /// The open file.
    pub storage: SharedStorage,
    /// Where they begin in it.
    pub at: FileOffset,
    /// How many there are, never 0.
    pub len: u64,
}

/// A range of a disk of which one thing can be said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it is, never empty.
    pub range: Range<DiskOffset>,
    /// What it is.
    pub what: What,
    /// How many levels above the one that answers for it do not: 0 for the top's own. For a hole
    /// the depth of the base.
    pub depth: usize,
    /// The number of the file that has it and the position there, where it lies in one as it is.
    pub place: Option<(usize, FileOffset)>,
}

/// What an extent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Nothing has ever been written there.
    Hole,
    /// It has a place, and reads as zeros.
    Zeros,
    /// It has a place and may have any content.
    Data,
    /// The image does not say where it is: it cannot be read.
    Bad,
}

/// The next data that extents tell of, neighbours merged.
fn next_data_of(
    extents: impl Iterator<Item = Result<Extent>>,
    from: DiskOffset,
) -> Result<Option<Range<DiskOffset>>> {
    let mut found: Option<Range<DiskOffset>> = None;
    for extent in extents {
        let extent = extent?;
        let is_data = matches!(extent.what, What::Data | What::Bad);
        match &mut found {
            None if is_data => found = Some(extent.range.start.max(from)..extent.range.end),
            None => continue,
            Some(range) if is_data => range.end = extent.range.end,
            Some(_) => break,
        }
        let is_long = |range: &Range<DiskOffset>| range.end.get() - range.start.get() >= DATA_MAX;
        if found.as_ref().is_some_and(is_long) {
            break;
        }
    }
    // One extent can be as long as the disk.
    Ok(found.map(|range| {
        let longest = DiskOffset::new(range.start.get().saturating_add(DATA_MAX));
        range.start..range.end.min(longest)
    }))
}

/// What is to be opened, and as what.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// What the user says it is; nothing for what its first bytes say.
    pub format: Option<Format>,
    /// Which disk, where it is one of ours.
    pub selection: Selection,
    /// Refuse a disk of ours that somebody is writing to, instead of telling so.
    pub at_rest: bool,
}

/// A disk that has been opened.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The disk.
    pub source: Arc<dyn Source>,
    /// Things to tell the user.
    pub notes: Vec<String>,
}

/// Opens a disk of any kind for reading.
pub fn open(path: &Path, asked: &Asked) -> Result<Opened> {
    let mut notes = Vec::new();
    let format = match asked.format {
        Some(format) => format,
        None => magic::recognise(path, &asked.selection)?,
    };
    let for_ours_only = [
        (asked.selection.snapshot.is_some(), "--snapshot"),
        (!asked.selection.lower.is_empty(), "--lower"),
    ];
    let source: Arc<dyn Source> = match format {
        Format::Ours => Arc::new(OurDisk::open(path, asked, &mut notes)?),
        _ if for_ours_only.iter().any(|(given, _)| *given) => {
            let given = for_ours_only.into_iter().find(|(given, _)| *given);
            let option = given.map_or("", |(_, option)| option);
            let why = format!("{option} is for ploop and Parallels disks, and this is {format}");
            return Err(Error::why(ErrorKind::Usage, why).in_file(path));
        }
        Format::Raw => Arc::new(RawDisk::open(path, &mut notes)?),
        other => Arc::new(foreign::ForeignDisk::open(path, other, &mut notes)?),
    };
    Ok(Opened { source, notes })
}

#[cfg(test)]
mod tests;
