//! The disk as one flat file without bytes of its own: it shares the blocks of the disk's files.
//!
//! What each byte is comes from [`Disk::extents`], and so from the same plans as reads: every
//! cluster from the level that maps it, holes as holes, zeros past the end of a smaller level. What
//! cannot be read cannot be shown by a file either: a disk with an invalid entry has no flat one.
//!
//! The host shares whole blocks only. What is left at the end of a disk or of a level is less than
//! two of them, and copied. Files whose clusters do not lie as their blocks do are refused: to copy
//! all of them would take the time and the space that nobody expects here.
//!
//! Nothing of the disk's files is written. The host writes back what it has cached of them.

use super::Disk;
use super::extents::{Content, Extent};
use super::part::Part;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::units::{DiskOffset, FileOffset, Level};

/// Bytes that are shared in one call, so that it can be seen how far it is.
const RUN_MAX: u64 = 1 << 30;

/// What helps against everything that stands in the way here.
pub const FIX: &str = "leave --linearize out: an ordinary mount shows the disk all the same";

/// Neighbours on the disk that are neighbours in a level's file.
#[derive(Clone, Copy, Debug)]
struct Run {
    part: usize,
    level: Level,
    /// Where they are on the disk.
    disk: u64,
    /// Where they are in the file.
    file: u64,
    len: u64,
}

impl Run {
    fn of(extent: &Extent, level: Level, at: FileOffset) -> Self {
        let (start, end) = (extent.range.start.get(), extent.range.end.get());
        Self {
            part: extent.part,
            level,
            disk: start,
            file: at.get(),
            len: end.saturating_sub(start),
        }
    }

    /// Takes what follows, if it is one run with this one.
    fn take(&mut self, next: &Self) -> bool {
        let len = self.len.saturating_add(next.len);
        let follows = (self.part, self.level) == (next.part, next.level)
            && self.disk.checked_add(self.len) == Some(next.disk)
            && self.file.checked_add(self.len) == Some(next.file)
            && len <= RUN_MAX;
        if follows {
            self.len = len;
        }
        follows
    }
}

/// Where the whole blocks of a range of the disk begin and end.
fn whole_blocks(start: u64, end: u64, block: u64) -> (u64, u64) {
    let first = start
        .checked_next_multiple_of(block)
        .unwrap_or(end)
        .min(end);
    let last = end - end % block;
    (first, last.max(first))
}

fn refused(why: String) -> Error {
    Error::why(ErrorKind::Unsupported, why).fix(FIX)
}

/// The error for a file whose blocks the host does not share.
fn unshared(error: Error) -> Error {
    let why = match error.kind() {
        ErrorKind::Io(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS) => {
            "its file system cannot share blocks between files, as XFS, btrfs and bcachefs can"
        }
        ErrorKind::Io(libc::EXDEV) => "it lies on another file system than the top image",
        ErrorKind::Io(libc::EINVAL) => "its file system does not share these blocks",
        _ => return error,
    };
    refused(why.to_owned())
}

impl Disk {
    /// Makes an empty file the disk as it is now. `told` hears how much of the disk is done, and
    /// stops it by an error. The disk must be read-only: nothing that is written later is seen.
    pub fn linearize(
        &self,
        flat: &FileStorage,
        told: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let block = flat.block_bytes()?;
        flat.set_len(FileOffset::new(self.size))?;
        let mut run: Option<Run> = None;
        for extent in self.extents(DiskOffset::ZERO) {
            let extent = extent?;
            let next = match extent.what {
                Content::Hole => continue,
                Content::Data { level, at } => Run::of(&extent, level, at),
                Content::Bad => return Err(self.unreadable(&extent)),
            };
            if run.as_mut().is_some_and(|run| run.take(&next)) {
                continue;
            }
            if let Some(run) = run.replace(next) {
                told(run.disk)?;
                self.share(flat, &run, block)?;
            }
        }
        if let Some(run) = run {
            self.share(flat, &run, block)?;
        }
        // Sharing the blocks at the end may have made it longer.
        flat.set_len(FileOffset::new(self.size))?;
        told(self.size)
    }

    fn unreadable(&self, extent: &Extent) -> Error {
        let parts = self.parts();
        let start = extent.range.start.get();
        let bad = parts.get(extent.part).map(|part| {
            let cluster = part.chain.geometry().cluster;
            part.bad_entry(cluster.split(DiskOffset::new(start - part.start)).0)
        });
        bad.unwrap_or_else(|| Error::new(ErrorKind::Corrupt))
            .fix("leave --linearize out: an ordinary mount shows all other clusters")
    }

    fn share(&self, flat: &FileStorage, run: &Run, block: u64) -> Result<()> {
        let parts = self.parts();
        let part = parts
            .get(run.part)
            .ok_or(Error::new(ErrorKind::OutOfRange))?;
        let image = part.chain.level(run.level);
        let here = |e: Error| e.in_file(image.path()).at_level(run.level);
        expect_alike(part, run, block).map_err(here)?;
        let source = image.storage();
        let fd = source
            .as_host_fd()
            .ok_or_else(|| here(refused("it is no file of the host".into())))?;
        let (start, end) = (run.disk, run.disk.saturating_add(run.len));
        let (first, last) = whole_blocks(start, end, block);
        let in_file = |at: u64| FileOffset::new(run.file.saturating_add(at - start));
        if first < last {
            let from = in_file(first)..in_file(last);
            flat.share_or_say(FileOffset::new(first), fd, from)
                .map_err(|e| here(unshared(e)))?;
        }
        for (from, to) in [(start, first), (last, end)] {
            if from >= to {
                continue;
            }
            let len = usize::try_from(to - from).map_err(|_| Error::errno(libc::EFBIG))?;
            let mut bytes = vec![0; len];
            source.read_at(in_file(from), &mut bytes).map_err(here)?;
            flat.write_at(FileOffset::new(from), &bytes)?;
        }
        Ok(())
    }
}

/// Fails where what lies in a file does not begin and end as its blocks do.
fn expect_alike(part: &Part, run: &Run, block: u64) -> Result<()> {
    let image = part.chain.level(run.level);
    let cluster = part.chain.geometry().cluster.bytes();
    if image.layout().is_some() && cluster % block != 0 {
        return Err(refused(format!(
            "its clusters of {cluster} bytes are no multiple of its file system's blocks of \
             {block} bytes"
        )));
    }
    let off = run.file.wrapping_sub(run.disk) % block;
    if off != 0 {
        return Err(refused(format!(
            "its clusters lie {off} bytes off its file system's blocks of {block} bytes"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_are_shared() {
        for (start, end, expected) in [
            (0, 8192, (0, 8192)),
            (0, 8193, (0, 8192)),
            (1, 8192, (4096, 8192)),
            (1, 4095, (4095, 4095)),
            (4097, 8190, (8190, 8190)),
            (4096, 4608, (4096, 4096)),
        ] {
            assert_eq!(whole_blocks(start, end, 4096), expected, "{start}..{end}");
        }
    }

    #[test]
    fn neighbours_are_one_run_up_to_a_limit() {
        let run = |disk, file, len| Run {
            part: 0,
            level: Level::new(0),
            disk,
            file,
            len,
        };
        let mut first = run(0, 4096, 4096);
        assert!(first.take(&run(4096, 8192, 4096)));
        assert_eq!(first.len, 8192);
        for other in [
            run(8192, 4096, 4096),
            run(12288, 12288, 4096),
            run(8192, 12288, RUN_MAX),
            Run {
                level: Level::new(1),
                ..run(8192, 12288, 4096)
            },
        ] {
            assert!(!first.take(&other), "{other:?}");
        }
    }
}
