//! Answers as the kernel's FUSE protocol writes them.
//!
//! Imports: `fuse::{answer, rules}`.
//! Never: decides what is answered.

use crate::fuse::answer::{Attr, Entry, Line, Opened, Position, Volume, Xattr};
use crate::fuse::rules::Statfs;
use fuser::{Errno, FileAttr, FileType};
use std::time::{SystemTime, UNIX_EPOCH};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the head of an answer.
pub(crate) const OUT_HEAD_LEN: usize = size_of::<RawOutHead>();

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawOutHead {
    len: u32,
    error: i32,
    unique: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawAttr {
    ino: u64,
    size: u64,
    blocks: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atime_ns: u32,
    mtime_ns: u32,
    ctime_ns: u32,
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawEntryOut {
    nodeid: u64,
    generation: u64,
    entry_valid: u64,
    attr_valid: u64,
    entry_valid_ns: u32,
    attr_valid_ns: u32,
    attr: RawAttr,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawAttrOut {
    attr_valid: u64,
    attr_valid_ns: u32,
    dummy: u32,
    attr: RawAttr,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawOpenOut {
    fh: u64,
    open_flags: u32,
    backing_id: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawStatfsOut {
    blocks: u64,
    bfree: u64,
    bavail: u64,
    files: u64,
    ffree: u64,
    bsize: u32,
    namelen: u32,
    frsize: u32,
    padding: u32,
    spare: [u32; 6],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawDirent {
    ino: u64,
    off: u64,
    namelen: u32,
    kind: u32,
}

/// The head of an answer with so many bytes after it, or with an error.
pub(crate) fn out_head(unique: u64, error: Option<Errno>, body_len: usize) -> [u8; OUT_HEAD_LEN] {
    let len = u32::try_from(OUT_HEAD_LEN.saturating_add(body_len)).unwrap_or(u32::MAX);
    let raw = RawOutHead {
        len,
        error: error.map_or(0, |errno| errno.code().saturating_neg()),
        unique,
    };
    let mut out = [0; OUT_HEAD_LEN];
    out.copy_from_slice(raw.as_bytes());
    out
}

/// An answer that can be written down.
pub(crate) trait Encode {
    /// Calls `with` with its bytes.
    fn encode(&self, with: impl FnOnce(&[u8]));
}

impl Encode for () {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        with(&[]);
    }
}

impl Encode for &[u8] {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        with(self);
    }
}

impl Encode for Entry {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        let (secs, nanos) = (self.valid.as_secs(), self.valid.subsec_nanos());
        let out = RawEntryOut {
            nodeid: self.attr.ino.0,
            generation: 0,
            entry_valid: secs,
            attr_valid: secs,
            entry_valid_ns: nanos,
            attr_valid_ns: nanos,
            attr: raw_attr(&self.attr),
        };
        with(out.as_bytes());
    }
}

impl Encode for Attr {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        let out = RawAttrOut {
            attr_valid: self.valid.as_secs(),
            attr_valid_ns: self.valid.subsec_nanos(),
            dummy: 0,
            attr: raw_attr(&self.attr),
        };
        with(out.as_bytes());
    }
}

impl Encode for Opened {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        let out = RawOpenOut {
            fh: self.fh,
            open_flags: self.flags.bits(),
            backing_id: 0,
        };
        with(out.as_bytes());
    }
}

impl Encode for Position {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        with(self.0.as_bytes());
    }
}

impl Encode for Volume {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        let all = &self.0;
        let out = RawStatfsOut {
            blocks: all.blocks,
            bfree: all.free,
            bavail: all.free,
            files: 0,
            ffree: 0,
            bsize: all.bsize,
            namelen: 255,
            frsize: Statfs::UNIT,
            padding: 0,
            spare: [0; 6],
        };
        with(out.as_bytes());
    }
}

impl Encode for Xattr<'_> {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        match self {
            Self::Len(len) => with([*len, 0].as_bytes()),
            Self::Value(value) => with(value),
        }
    }
}

/// The answer to WRITE: how many bytes were taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written(pub(crate) u32);

impl Encode for Written {
    fn encode(&self, with: impl FnOnce(&[u8])) {
        with([self.0, 0].as_bytes());
    }
}

fn mode_of(kind: FileType) -> u32 {
    match kind {
        FileType::Directory => libc::S_IFDIR,
        FileType::Symlink => libc::S_IFLNK,
        _ => libc::S_IFREG,
    }
}

/// A moment in whole seconds since 1970 and nanoseconds; the kernel reads the former as signed.
fn moment(time: SystemTime) -> (u64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (since.as_secs(), since.subsec_nanos()),
        Err(_) => (0, 0),
    }
}

fn raw_attr(attr: &FileAttr) -> RawAttr {
    let (atime, mtime, ctime) = (moment(attr.atime), moment(attr.mtime), moment(attr.ctime));
    RawAttr {
        ino: attr.ino.0,
        size: attr.size,
        blocks: attr.blocks,
        atime: atime.0,
        mtime: mtime.0,
        ctime: ctime.0,
        atime_ns: atime.1,
        mtime_ns: mtime.1,
        ctime_ns: ctime.1,
        mode: mode_of(attr.kind) | u32::from(attr.perm),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.blksize,
        flags: 0,
    }
}

/// Adds a line to an answer to READDIR if it is not longer than `max` then.
pub(crate) fn add_line(listing: &mut Vec<u8>, line: Line<'_>, max: usize) -> bool {
    let Ok(namelen) = u32::try_from(line.name.len()) else {
        return false;
    };
    let head = RawDirent {
        ino: line.ino,
        off: line.next,
        namelen,
        // What readdir(3) says is the file's mode without its lower bits.
        kind: mode_of(line.kind) >> 12,
    };
    let len = (size_of::<RawDirent>() + line.name.len()).next_multiple_of(8);
    let end = listing.len() + len;
    if end > max || listing.try_reserve(len).is_err() {
        return false;
    }
    listing.extend_from_slice(head.as_bytes());
    listing.extend_from_slice(line.name.as_bytes());
    listing.resize(end, 0);
    true
}
