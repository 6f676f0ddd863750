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
mod strangers;
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
    fn extents(&self, at: DiskOffset) -> Extents<'_>;

    /// The files that extents name.
    fn files(&self) -> &[PathBuf];

    /// Does what has to be done once before the first [`Source::read_at`], and may take as long as
    /// reading the whole disk.
    fn prepare(&self, _progress: &Progress) -> Result<()> {
        Ok(())
    }

    /// Fills `buf` from `at`; all of it lies on the disk.
    fn read_at(&self, at: DiskOffset, buf: &mut [u8]) -> Result<()>;

    /// The ranges from `from` on that may have something else than zeros, in order, none longer
    /// than is good for one piece of work. What cannot be read is among them, so that reading it
    /// fails. To go on is cheap; to begin may cost as much as many steps.
    fn data(&self, from: DiskOffset) -> Ranges<'_> {
        Box::new(Data::of(self.extents(from)))
    }

    /// Where the bytes at a position are in one file of the host, and how far from there, as far as
    /// `most` bytes, so that the host can share its blocks. `None` where they are not.
    fn host_place(&self, _at: DiskOffset, _most: u64) -> Result<Option<HostPlace>> {
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

/// Extents of a disk, in order and without gaps.
pub type Extents<'a> = Box<dyn Iterator<Item = Result<Extent>> + Send + 'a>;
/// Ranges of a disk, in order.
pub type Ranges<'a> = Box<dyn Iterator<Item = Result<Range<DiskOffset>>> + Send + 'a>;

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

/// The data that extents tell of, neighbours merged, in pieces of [`DATA_MAX`] at most.
struct Data<I> {
    extents: I,
    held: Range<u64>,
}

impl<I> Data<I> {
    fn of(extents: I) -> Self {
        let held = 0..0;
        Self { extents, held }
    }

    /// The first piece of what is held.
    fn take(&mut self) -> Range<DiskOffset> {
        let end = self.held.start.saturating_add(DATA_MAX).min(self.held.end);
        let piece = DiskOffset::new(self.held.start)..DiskOffset::new(end);
        self.held.start = end;
        piece
    }
}

impl<I: Iterator<Item = Result<Extent>>> Iterator for Data<I> {
    type Item = Result<Range<DiskOffset>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.held.end - self.held.start < DATA_MAX {
            let extent = match self.extents.next() {
                Some(Ok(extent)) => extent,
                Some(Err(e)) => {
                    self.held = 0..0;
                    return Some(Err(e));
                }
                None if self.held.is_empty() => return None,
                None => break,
            };
            let range = extent.range.start.get()..extent.range.end.get();
            if matches!(extent.what, What::Data | What::Bad) {
                let start = if self.held.is_empty() {
                    range.start
                } else {
                    self.held.start
                };
                self.held = start..range.end;
            } else if !self.held.is_empty() {
                break;
            }
        }
        Some(Ok(self.take()))
    }
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
        other => Arc::new(foreign::ForeignDisk::open(path, other, asked, &mut notes)?),
    };
    Ok(Opened { source, notes })
}

#[cfg(test)]
mod tests;
