//! A GPT with one partition and a new file system in it, made without root.
//!
//! The file system's own program makes it on a flat file with holes, as long as the partition,
//! which loses its name before the program starts: whatever happens, nothing is left of it. The
//! program finds it by its descriptor, below `/proc`. The table is made in memory. Then both are
//! copied into the disk, as far as they are not zeros.
//!
//! ext4 is told to zero its inode tables now: that leaves holes in the flat file, while a kernel
//! that does it after the first mount would write all of them, and the image would grow.

use super::content::{Content, Piece};
use crate::admin::program::{self, Program};
use crate::admin::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::mem::MemStorage;
use crate::storage::{Directory, SharedStorage};
use crate::sys::process::find_program;
use crate::units::{DiskOffset, FileOffset, SECTOR, len_u64, len_usize};
use gpt::mbr::ProtectiveMBR;
use gpt::{GptConfig, disk, partition_types};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Where the partition starts: on the border of any usual cluster, stripe or erase block.
const PARTITION_START: u64 = 1 << 20;
/// The end of the disk that the second copy of the table takes.
const TAIL: u64 = 33 * SECTOR;
/// The partition ends on a border of this, which blocks of file systems divide.
const END_BORDER: u64 = 4096;

/// Which file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsKind {
    /// The program that makes it.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::Ext4 => "mkfs.ext4",
            Self::Xfs => "mkfs.xfs",
        }
    }

    const fn package(self) -> &'static str {
        match self {
            Self::Ext4 => "e2fsprogs",
            Self::Xfs => "xfsprogs",
        }
    }

    /// The most bytes of a label.
    const fn label_max(self) -> usize {
        match self {
            Self::Ext4 => 16,
            Self::Xfs => 12,
        }
    }

    /// What stands before the label and the file.
    const fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
            Self::Xfs => &["-q", "-f"],
        }
    }
}

/// A file system to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Which.
    pub kind: FsKind,
    /// Its label.
    pub label: Option<String>,
}

/// Makes what a disk of this size holds: the table and the file system. `name` is for the flat
/// file, for the moment that it has one.
pub(super) fn content(
    parent: &dyn Directory,
    name: &str,
    size: u64,
    wanted: &FileSystem,
    progress: &Progress,
) -> Result<Content> {
    let program = wanted.kind.program();
    let Some(path) = find_program(program) else {
        let fix = format!("install {}, or leave --mkfs away", wanted.kind.package());
        return Err(Error::why(ErrorKind::Host, format!("there is no {program}")).fix(fix));
    };
    let label = wanted.label.as_deref().unwrap_or_default();
    if label.len() > wanted.kind.label_max() {
        let most = wanted.kind.label_max();
        let why = format!("a label of more than {most} bytes: {label:?}");
        return Err(Error::why(ErrorKind::Usage, why));
    }
    let Some(len) = partition_len(size) else {
        let why = format!("a disk of {size} bytes has no room for a partition");
        return Err(Error::why(ErrorKind::Usage, why));
    };
    let (head, tail) = table(size, len)?;
    progress.step("making the file system", 0);
    let flat = parent.create_new(name)?;
    match parent.remove(name) {
        // Who makes a disk of the same name has cleared it away.
        Err(e) if e.kind() == ErrorKind::Missing => {}
        other => other?,
    }
    flat.set_len(FileOffset::new(len))?;
    let mut command = Command::new(path);
    command.args(wanted.kind.arguments());
    if !label.is_empty() {
        command.args(["-L", label]);
    }
    run(&mut command, program, &flat, progress)?;
    let piece = |start, storage| Piece {
        start: DiskOffset::new(start),
        storage,
    };
    Ok(Content {
        pieces: vec![
            piece(0, head),
            piece(PARTITION_START, flat),
            piece(size - TAIL, tail),
        ],
    })
}

fn partition_len(size: u64) -> Option<u64> {
    let end = size.checked_sub(TAIL)? / END_BORDER * END_BORDER;
    end.checked_sub(PARTITION_START).filter(|len| *len > 0)
}

fn run(command: &mut Command, name: &str, flat: &SharedStorage, progress: &Progress) -> Result<()> {
    let Some(fd) = flat.as_host_fd() else {
        return Err(Error::errno(libc::EOPNOTSUPP));
    };
    command
        .arg(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            fd.as_raw_fd()
        ))
        .stdout(Stdio::null());
    let program = Program {
        name,
        fix: "install the file system's programs (Debian: e2fsprogs, xfsprogs)",
    };
    program::run(command, &program, |_| progress.check())
}

/// The first and the last bytes of a disk with one partition.
fn table(size: u64, len: u64) -> Result<(SharedStorage, SharedStorage)> {
    let failed = |e: gpt::GptError| Error::new(ErrorKind::Unsupported).because(e);
    let mut device = Ends::new(size);
    let guard = u32::try_from(size / SECTOR - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(guard)
        .overwrite_lba0(&mut device)
        .map_err(|e| Error::new(ErrorKind::Unsupported).because(io::Error::other(e)))?;
    let config = GptConfig::new()
        .writable(true)
        .logical_block_size(disk::LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(device, None).map_err(failed)?;
    let (first, count) = (PARTITION_START / SECTOR, len / SECTOR);
    table
        .add_partition_at("", 1, first, count, partition_types::LINUX_FS, 0)
        .map_err(failed)?;
    let device = table.write().map_err(failed)?;
    Ok((
        Arc::new(MemStorage::new(device.head)),
        Arc::new(MemStorage::new(device.tail)),
    ))
}

/// A disk that is zeros but for its first MiB and its last sectors.
#[derive(Debug)]
struct Ends {
    head: Vec<u8>,
    tail: Vec<u8>,
    size: u64,
    at: u64,
}

impl Ends {
    /// The size is at least that of a partition and both ends.
    fn new(size: u64) -> Self {
        let zeros = |len: u64| vec![0; len_usize(len).unwrap_or(0)];
        Self {
            head: zeros(PARTITION_START),
            tail: zeros(TAIL),
            size,
            at: 0,
        }
    }

    /// The bytes from the position on, as far as they are kept in one piece.
    fn here(&mut self) -> Option<&mut [u8]> {
        let tail = self.size - TAIL;
        let (piece, start) = if self.at >= tail {
            (&mut self.tail, tail)
        } else {
            (&mut self.head, 0)
        };
        piece.get_mut(len_usize(self.at - start)?..)
    }

    fn pass(&mut self, len: usize) -> usize {
        self.at += len_u64(len);
        len
    }
}

impl Read for Ends {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(bytes) = self.here() else {
            // Only the ends are ever looked at.
            return Err(io::Error::other("between the ends of the disk"));
        };
        let len = bytes.len().min(buf.len());
        buf[..len].copy_from_slice(&bytes[..len]);
        Ok(self.pass(len))
    }
}

impl Write for Ends {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some(bytes) = self.here() else {
            return Err(io::Error::other("between the ends of the disk"));
        };
        let len = bytes.len().min(buf.len());
        bytes[..len].copy_from_slice(&buf[..len]);
        Ok(self.pass(len))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Ends {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        self.at = target.ok_or_else(outside)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_reads_back() {
        for size in [3 << 20, (1 << 30) + 32_768, 20_u64 << 40] {
            let len = partition_len(size).unwrap();
            let (head, tail) = table(size, len).unwrap();
            let mut device = Ends::new(size);
            head.read_at(FileOffset::ZERO, &mut device.head).unwrap();
            tail.read_at(FileOffset::ZERO, &mut device.tail).unwrap();
            assert_eq!(device.head[510..512], [0x55, 0xaa]);
            let found = GptConfig::new().only_valid_headers(true);
            let found = found.open_from_device(device).unwrap();
            let [(1, only)] = found.partitions().iter().collect::<Vec<_>>()[..] else {
                panic!("{:?}", found.partitions());
            };
            assert_eq!(only.first_lba, 2048);
            assert_eq!((only.last_lba + 1) * SECTOR, PARTITION_START + len);
            assert!(only.last_lba <= size / SECTOR - 34);
        }
        for small in [0, TAIL, 1 << 20, (1 << 20) + TAIL] {
            assert_eq!(partition_len(small), None);
        }
    }
}
