//! What lies on a disk and on its partitions, and whether whoever had it last let go of it.
//!
//! Imports: `disk`, `error`.
//! Never: writes; takes a member of a RAID array, or one of several devices, for a file system that
//! can be mounted by itself; believes a number that it reads there without a bound.
//!
//! A file system that was not unmounted may belong to somebody who sleeps: a machine that was
//! suspended goes on with what it has in memory, and whatever was changed meanwhile is lost, or
//! worse. So what is marked as mounted counts as in use, and while a swap area holds a suspended
//! machine everything on the disk does. What cannot be told counts as in use too.

use super::partitions::{Bytes, Partition};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::io;

#[path = "volumes/state.rs"]
mod state;

/// A disk without partitions, or a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The partition's number.
    pub partition: Option<u32>,
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is, as `xfs` or `LVM`; empty where that is not known.
    pub kind: String,
    /// Whether its file system can be changed.
    pub fit: Fit,
}

/// Whether a file system can be mounted and changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fit {
    /// It was unmounted.
    Closed,
    /// Somebody may still have it, for this reason.
    InUse(String),
    /// It is no file system, or none that can be mounted by itself.
    Never(String),
}

/// What a signature is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// A file system.
    FileSystem,
    /// A part of something larger, or locked up.
    Member,
    /// Memory of a running system.
    Swap,
    /// Memory of a suspended system.
    Suspended,
}

/// A signature: where, what bytes, and the name of what it is.
pub(super) type Signature = (u64, &'static [u8], &'static str, Class);

/// Signatures; members come first, because they may look like a file system as well.
pub(super) const SIGNATURES: [Signature; 25] = [
    (0, b"LUKS\xba\xbe", "LUKS", Class::Member),
    (3, b"-FVE-FS-", "BitLocker", Class::Member),
    (0, b"LABELONE", "LVM", Class::Member),
    (0x200, b"LABELONE", "LVM", Class::Member),
    (0x400, b"LABELONE", "LVM", Class::Member),
    (0x600, b"LABELONE", "LVM", Class::Member),
    (0, b"\xfc\x4e\x2b\xa9", "RAID", Class::Member),
    (0x1000, b"\xfc\x4e\x2b\xa9", "RAID", Class::Member),
    (0xff6, b"SWAPSPACE2", "swap", Class::Swap),
    (0xfff6, b"SWAPSPACE2", "swap", Class::Swap),
    (0xff6, b"S1SUSPEND", "swap", Class::Suspended),
    (0xfff6, b"S1SUSPEND", "swap", Class::Suspended),
    (0x438, &[0x53, 0xef], "ext", Class::FileSystem),
    (0, b"XFSB", "xfs", Class::FileSystem),
    (0x1_0040, b"_BHRfS_M", "btrfs", Class::FileSystem),
    (3, b"NTFS    ", "ntfs", Class::FileSystem),
    (3, b"EXFAT   ", "exfat", Class::FileSystem),
    (0x36, b"FAT", "fat", Class::FileSystem),
    (0x52, b"FAT32", "fat", Class::FileSystem),
    (0x8001, b"CD001", "iso9660", Class::FileSystem),
    (0x400, b"H+", "hfsplus", Class::FileSystem),
    (0x400, b"HX", "hfsplus", Class::FileSystem),
    (0, b"hsqs", "squashfs", Class::FileSystem),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs", Class::FileSystem),
    (0x20, b"NXSB", "apfs", Class::FileSystem),
];

/// The first signature that `read` finds.
pub(super) fn recognise(
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> Option<(&'static str, Class)> {
    let found = SIGNATURES.iter().find(|(at, bytes, ..)| {
        let mut buf = [0_u8; 16];
        let buf = &mut buf[..bytes.len()];
        read(*at, buf).is_ok() && &*buf == *bytes
    });
    found.map(|(_, _, name, class)| (*name, *class))
}

/// A piece of the disk, as a device of its own.
struct Window<'a> {
    source: &'a dyn Bytes,
    start: u64,
    len: u64,
}

impl Bytes for Window<'_> {
    fn size(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(crate::units::len_u64(buf.len()));
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.source.read(self.start + at, buf)
    }
}

/// What lies on a disk with these partitions, in their order.
pub fn examine(disk: &Disk, partitions: &[Partition]) -> Result<Vec<Volume>> {
    let places: Vec<_> = partitions
        .iter()
        .map(|one| (one.number, one.start, one.len))
        .collect();
    look(disk, &places)
        .map_err(|e| Error::why(ErrorKind::Io(libc::EIO), "reading the disk").because(e))
}

fn look(source: &dyn Bytes, places: &[(u32, u64, u64)]) -> io::Result<Vec<Volume>> {
    let mut whole = volume(source, None, 0, source.size())?;
    let mut all = Vec::new();
    for (number, start, len) in places {
        let mut one = volume(source, Some(*number), *start, *len)?;
        let overlaps = |(other, from, length): &(u32, u64, u64)| {
            other != number && *from < start + len && *start < from + length
        };
        if places.iter().any(overlaps) {
            one.fit = Fit::Never("another partition overlaps it".into());
        } else if !whole.kind.is_empty() && one.fit == Fit::Closed {
            let kind = &whole.kind;
            one.fit = Fit::InUse(format!("the whole disk looks like {kind}, too"));
        }
        all.push(one);
    }
    if all.is_empty() {
        if whole.kind.is_empty() {
            whole.fit = Fit::Never("neither partitions nor a file system were found".into());
        }
        all.push(whole);
    }
    let suspended = all.iter().find(|one| one.kind == state::SUSPENDED);
    if let Some(name) = suspended.map(|one| format!("a machine is suspended in {}", one.name())) {
        for one in all.iter_mut().filter(|one| one.fit == Fit::Closed) {
            one.fit = Fit::InUse(name.clone());
        }
    }
    Ok(all)
}

fn volume(source: &dyn Bytes, partition: Option<u32>, start: u64, len: u64) -> io::Result<Volume> {
    let window = Window { source, start, len };
    let (kind, fit) = match state::of(&window) {
        // Too short for what it looks like.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => ("", state::unknown()),
        found => found?,
    };
    Ok(Volume {
        partition,
        start,
        len,
        kind: kind.to_owned(),
        fit,
    })
}

impl Volume {
    /// As people call it.
    #[must_use]
    pub fn name(&self) -> String {
        match self.partition {
            Some(number) => format!("partition {number}"),
            None => "the disk".to_owned(),
        }
    }
}

#[cfg(test)]
#[path = "volumes/tests.rs"]
mod tests;
