//! The bytes of the kernel's FUSE protocol, for the doors that fuser does not keep.
//!
//! Imports: `fuse::{answer, requests, rules}`.
//! Never: decides what a request means; panics over a request that is too short.
//!
//! Numbers are in the host's order and structures laid out as C does, both without gaps: what the
//! kernel's `fuse.h` says of protocol 7.42. A request is a head, a fixed part that its opcode
//! decides on ([`fixed_len`]), and the rest: names, or the bytes of a WRITE. /dev/fuse gives the
//! three in one piece, a ring's entry each in a place of its own. Only verbs that a mount of ours
//! may see are taken apart; the rest is told what [`Refused`] says. Answers are written down in
//! [`answers`].

mod answers;

use super::requests::Refused;
use super::rules::Wanted;
pub(crate) use answers::{Encode, Written, add_line, out_head};
use fuser::{AccessFlags, InitFlags};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of [`RawHead`], with which every request begins.
pub(crate) const HEAD_LEN: usize = size_of::<RawHead>();
/// More than any name, or two, that the kernel sends.
pub(crate) const NAMES_MAX: usize = 8192;
/// What a WRITE has before its bytes.
pub(crate) const WRITE_HEAD_LEN: usize = HEAD_LEN + 40;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
/// The one whose rest is data.
pub(crate) const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
/// The first request of all.
pub(crate) const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const ACCESS: u32 = 34;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const IOCTL: u32 = 39;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;

/// The protocol that is spoken here. Nothing is used that older kernels than 7.31 lack.
const MAJOR: u32 = 7;
const MINOR: u32 = 42;
const MINOR_MIN: u32 = 31;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHead {
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    padding: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSetattr {
    valid: u32,
    padding: u32,
    fh: u64,
    size: u64,
    lock_owner: u64,
    atime: i64,
    mtime: i64,
    ctime: i64,
    atime_ns: u32,
    mtime_ns: u32,
    ctime_ns: u32,
    mode: u32,
    unused4: u32,
    uid: u32,
    gid: u32,
    unused5: u32,
}

/// Also WRITE.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawRead {
    fh: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawRelease {
    fh: u64,
    flags: u32,
    release_flags: u32,
    lock_owner: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawFallocate {
    fh: u64,
    offset: u64,
    length: u64,
    mode: i32,
    padding: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawLseek {
    fh: u64,
    offset: i64,
    whence: i32,
    padding: u32,
}

/// OPEN, ACCESS, GETXATTR, LISTXATTR: a number, and one that is not looked at.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawNumber {
    number: u32,
    other: u32,
}

/// FSYNC.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHandle {
    fh: u64,
    other: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawInit {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    flags2: u32,
    unused: [u32; 11],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawInitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    unused: [u32; 6],
}

/// Bits of `RawSetattr::valid`.
mod valid {
    pub(super) const MODE: u32 = 1 << 0;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const MTIME: u32 = 1 << 5;
    pub(super) const MTIME_NOW: u32 = 1 << 8;
}

/// Who asks for what about which node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) nodeid: u64,
    pub(crate) uid: u32,
}

impl Head {
    /// Reads the beginning of a request.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (raw, _) = RawHead::read_from_prefix(bytes).ok()?;
        Some(Self {
            opcode: raw.opcode,
            unique: raw.unique,
            nodeid: raw.nodeid,
            uid: raw.uid,
        })
    }

    /// Whether the kernel itself may send this, with no user behind it.
    pub(crate) fn is_of_the_kernel(&self) -> bool {
        matches!(
            self.opcode,
            READ | READDIR
                | FORGET
                | BATCH_FORGET
                | WRITE
                | FSYNC
                | FSYNCDIR
                | RELEASE
                | RELEASEDIR
        )
    }

    /// Whether nobody waits for an answer; one would be taken for another's. Who is interrupted
    /// gets the answer to what was interrupted, which may take its time.
    pub(crate) fn wants_no_answer(&self) -> bool {
        matches!(self.opcode, FORGET | BATCH_FORGET | INTERRUPT)
    }

    /// Whether names follow the fixed part.
    pub(crate) fn has_names(&self) -> bool {
        matches!(self.opcode, LOOKUP | GETXATTR)
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb<'a> {
    Lookup {
        name: &'a OsStr,
    },
    Getattr,
    Setattr {
        wanted: Wanted,
        mtime: Option<SystemTime>,
    },
    Readlink,
    Open {
        for_writing: bool,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
    },
    /// The bytes are for the door to find.
    Write {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Statfs,
    Release {
        fh: u64,
        for_writing: bool,
    },
    Fsync {
        fh: u64,
    },
    Getxattr {
        name: &'a OsStr,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    /// FLUSH, FSYNCDIR, RELEASEDIR: nothing is to be done.
    Nothing,
    Opendir,
    Readdir {
        offset: u64,
        size: u32,
    },
    Access {
        mask: AccessFlags,
    },
    Fallocate {
        fh: u64,
        offset: u64,
        length: u64,
        mode: i32,
    },
    Lseek {
        fh: u64,
        offset: i64,
        whence: i32,
    },
    /// Nobody waits for an answer.
    Forget,
    /// The kernel says goodbye.
    Destroy,
    Refused(Refused),
}

/// A request that is shorter than its opcode says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooShort;

/// The length of what follows the head at once, whatever follows that.
pub(crate) fn fixed_len(opcode: u32) -> usize {
    match opcode {
        SETATTR => size_of::<RawSetattr>(),
        READ | WRITE | READDIR => size_of::<RawRead>(),
        RELEASE | RELEASEDIR => size_of::<RawRelease>(),
        FALLOCATE => size_of::<RawFallocate>(),
        LSEEK => size_of::<RawLseek>(),
        OPEN | OPENDIR | ACCESS | GETXATTR | LISTXATTR => size_of::<RawNumber>(),
        FSYNC => size_of::<RawHandle>(),
        _ => 0,
    }
}

fn take<T: FromBytes>(fixed: &[u8]) -> Result<T, TooShort> {
    T::read_from_prefix(fixed)
        .map(|(raw, _)| raw)
        .map_err(|_| TooShort)
}

/// The bytes that a READ or a WRITE is about, found in head and fixed part at their distance of
/// `fixed_at`; 0 for others.
pub(crate) fn data_len(header: &[u8], fixed_at: usize) -> usize {
    let Some(Head {
        opcode: READ | WRITE,
        ..
    }) = Head::parse(header)
    else {
        return 0;
    };
    let fixed = take::<RawRead>(header.get(fixed_at..).unwrap_or_default());
    fixed.map_or(0, |fixed| usize::try_from(fixed.size).unwrap_or(usize::MAX))
}

/// A name up to its zero byte.
fn name(rest: &[u8]) -> Result<&OsStr, TooShort> {
    let end = rest.iter().position(|byte| *byte == 0).ok_or(TooShort)?;
    Ok(OsStr::from_bytes(&rest[..end]))
}

fn for_writing(flags: u32) -> bool {
    let mode = flags & libc::O_ACCMODE.unsigned_abs();
    mode == libc::O_WRONLY.unsigned_abs() || mode == libc::O_RDWR.unsigned_abs()
}

fn setattr(raw: &RawSetattr) -> Verb<'static> {
    let given = |bit: u32, value: u32| (raw.valid & bit != 0).then_some(value);
    let wanted = Wanted {
        mode: given(valid::MODE, raw.mode),
        uid: given(valid::UID, raw.uid),
        gid: given(valid::GID, raw.gid),
        size: (raw.valid & valid::SIZE != 0).then_some(raw.size),
    };
    let mtime = if raw.valid & valid::MTIME == 0 {
        None
    } else if raw.valid & valid::MTIME_NOW != 0 {
        Some(SystemTime::now())
    } else {
        Some(time(raw.mtime, raw.mtime_ns))
    };
    Verb::Setattr { wanted, mtime }
}

/// A moment that the kernel names; before 1970 too.
fn time(seconds: i64, nanos: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let moment = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    let part = Duration::from_nanos(nanos.into());
    let moment = moment.and_then(|moment| moment.checked_add(part));
    moment.unwrap_or(UNIX_EPOCH)
}

/// Takes a request apart: its fixed part, and the names after it.
pub(crate) fn decode<'a>(head: &Head, fixed: &[u8], names: &'a [u8]) -> Result<Verb<'a>, TooShort> {
    Ok(match head.opcode {
        LOOKUP => Verb::Lookup { name: name(names)? },
        FORGET | BATCH_FORGET => Verb::Forget,
        GETATTR => Verb::Getattr,
        SETATTR => setattr(&take(fixed)?),
        READLINK => Verb::Readlink,
        OPEN => Verb::Open {
            for_writing: for_writing(take::<RawNumber>(fixed)?.number),
        },
        READ => {
            let RawRead {
                fh, offset, size, ..
            } = take(fixed)?;
            Verb::Read { fh, offset, size }
        }
        WRITE => {
            let RawRead {
                fh, offset, size, ..
            } = take(fixed)?;
            Verb::Write { fh, offset, size }
        }
        STATFS => Verb::Statfs,
        RELEASE => {
            let RawRelease { fh, flags, .. } = take(fixed)?;
            let for_writing = for_writing(flags);
            Verb::Release { fh, for_writing }
        }
        FSYNC => Verb::Fsync {
            fh: take::<RawHandle>(fixed)?.fh,
        },
        GETXATTR => Verb::Getxattr {
            name: name(names)?,
            size: take::<RawNumber>(fixed)?.number,
        },
        LISTXATTR => Verb::Listxattr {
            size: take::<RawNumber>(fixed)?.number,
        },
        FLUSH | FSYNCDIR | RELEASEDIR => Verb::Nothing,
        OPENDIR => Verb::Opendir,
        READDIR => {
            let RawRead { offset, size, .. } = take(fixed)?;
            Verb::Readdir { offset, size }
        }
        ACCESS => {
            let mask = take::<RawNumber>(fixed)?.number;
            let mask = i32::try_from(mask).unwrap_or(i32::MAX);
            Verb::Access {
                mask: AccessFlags::from_bits_retain(mask),
            }
        }
        FALLOCATE => {
            let raw: RawFallocate = take(fixed)?;
            Verb::Fallocate {
                fh: raw.fh,
                offset: raw.offset,
                length: raw.length,
                mode: raw.mode,
            }
        }
        LSEEK => {
            let RawLseek {
                fh, offset, whence, ..
            } = take(fixed)?;
            Verb::Lseek { fh, offset, whence }
        }
        DESTROY => Verb::Destroy,
        other => Verb::Refused(refused(other)),
    })
}

/// How an opcode that has no verb is refused.
fn refused(opcode: u32) -> Refused {
    match opcode {
        SYMLINK | MKNOD | MKDIR | UNLINK | RMDIR | RENAME | RENAME2 | LINK | CREATE => {
            Refused::Tree
        }
        SETXATTR | REMOVEXATTR => Refused::Xattr,
        IOCTL => Refused::Ioctl,
        _ => Refused::Unknown,
    }
}

/// Bytes of a page of the host's memory.
fn page_bytes() -> u64 {
    let asked = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let bytes = asked
        .ok()
        .flatten()
        .and_then(|bytes| u64::try_from(bytes).ok());
    bytes.filter(|bytes| *bytes > 0).unwrap_or(4096)
}

/// What the kernel offers at INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    major: u32,
    minor: u32,
    max_readahead: u32,
    /// What it can do.
    pub(crate) flags: InitFlags,
}

impl Offer {
    /// Reads it from what follows the head.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, TooShort> {
        // Older kernels send less; a zero means that they can do nothing of it.
        let mut whole = [0; size_of::<RawInit>()];
        let len = bytes.len().min(whole.len());
        if len < 16 {
            return Err(TooShort);
        }
        whole[..len].copy_from_slice(&bytes[..len]);
        let raw: RawInit = take(&whole)?;
        let low = InitFlags::from_bits_retain(raw.flags.into());
        let high = InitFlags::from_bits_retain(u64::from(raw.flags2) << 32);
        let is_long = low.contains(InitFlags::FUSE_INIT_EXT);
        Ok(Self {
            major: raw.major,
            minor: raw.minor,
            max_readahead: raw.max_readahead,
            flags: if is_long { low | high } else { low },
        })
    }

    /// True when the kernel speaks a later protocol than this, and has to be told to speak ours.
    pub(crate) fn is_too_new(&self) -> bool {
        self.major > MAJOR
    }

    /// True when it is too old to be served.
    pub(crate) fn is_too_old(&self) -> bool {
        self.major < MAJOR || (self.major == MAJOR && self.minor < MINOR_MIN)
    }

    /// The answer to a kernel that is too new, after which it asks again.
    pub(crate) fn version_only() -> [u8; 8] {
        let mut out = [0; 8];
        out[..4].copy_from_slice(MAJOR.as_bytes());
        out[4..].copy_from_slice(MINOR.as_bytes());
        out
    }

    /// The answer: these of the things that it can do, and our limits.
    pub(crate) fn accept(
        &self,
        flags: InitFlags,
        max_write: u32,
        background: u16,
    ) -> impl AsRef<[u8]> + use<> {
        let bits = (self.flags & (flags | InitFlags::FUSE_INIT_EXT)).bits();
        let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0);
        let out = RawInitOut {
            major: MAJOR,
            minor: MINOR,
            max_readahead: self.max_readahead,
            flags: half(bits),
            max_background: background,
            congestion_threshold: background,
            max_write,
            time_gran: 1,
            max_pages: u16::try_from(u64::from(max_write).div_ceil(page_bytes())).unwrap_or(1),
            map_alignment: 0,
            flags2: half(bits >> 32),
            max_stack_depth: 0,
            unused: [0; 6],
        };
        let mut bytes = [0; size_of::<RawInitOut>()];
        bytes.copy_from_slice(out.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests;
