//! Copies the content of a source: in parallel, in bounded memory, in the order of the disk.
//!
//! The disk is cut into cells: the clusters of a target image, or a MiB of a plain one. A batch of
//! cells is written while the next is read, each by all threads. Places in an image are given to
//! the cells of a batch in their order, so the target is as sequential as if one thread had made
//! it.
//!
//! A cell that lies in one piece in a file of the source is shared, if the host can do that: then
//! nothing is read, and zeros among the data stay data, at no cost. Whether it can is tried once,
//! before places depend on it: where it cannot, zeros get no place, which has to be known first.

use super::runs::{Runs, cells};
use crate::admin::create::NewFile;
use crate::admin::create::content::is_zero;
use crate::admin::progress::Progress;
use crate::admin::source::{HostPlace, Source};
use crate::error::{Error, Result};
use crate::units::{ClusterSize, DiskCluster, DiskOffset, FileOffset, len_u64, len_usize};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::io::Write;
use std::ops::Range;
use std::sync::OnceLock;

/// Bytes of a batch; two are in memory at a time.
const BATCH: u64 = 32 << 20;
/// Enough to keep a disk's queue filled; each waits most of the time.
const THREADS: usize = 8;
/// What blocks can be shared by: every file system's own divide it.
const SHARED_BORDER: u64 = 4096;
/// What one thread reads of a stream at a time.
const STREAM_PIECE: usize = 1 << 20;
/// Zeros to be streamed.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A cell of which it is known what is to be done.
enum Loaded {
    Zeros,
    Bytes(Vec<u8>),
    Shared(HostPlace),
}

struct Copy<'a> {
    source: &'a dyn Source,
    file: &'a NewFile,
    unit: ClusterSize,
    progress: &'a Progress,
    /// Whether the host can share blocks between the two, once that is known.
    shares: OnceLock<bool>,
}

fn threads() -> Result<ThreadPool> {
    let name = |number| format!("copy-{number}");
    let pool = ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .thread_name(name);
    pool.build()
        .map_err(|e| Error::errno(libc::EAGAIN).because(e))
}

/// Copies a source into the file of a new disk that is as long.
pub(super) fn copy(
    source: &dyn Source,
    file: &NewFile,
    unit: ClusterSize,
    progress: &Progress,
) -> Result<()> {
    progress.step("copying", source.size());
    let copy = Copy {
        source,
        file,
        unit,
        progress,
        shares: OnceLock::new(),
    };
    threads()?.install(|| copy.run())
}

impl Copy<'_> {
    fn run(&self) -> Result<()> {
        let mut cells = cells(self.source, self.unit);
        let most = len_usize(BATCH / self.unit.bytes()).unwrap_or(1).max(1);
        let mut take = || cells.by_ref().take(most).collect::<Result<Vec<u64>>>();
        let first = take()?;
        self.try_to_share(&first)?;
        let mut batch = self.read(&first)?;
        let mut done = 0;
        while let Some((last, _)) = batch.last() {
            self.progress.check()?;
            let end = self.range(*last).end;
            let numbers = take()?;
            self.try_to_share(&numbers)?;
            let (written, next) = rayon::join(|| self.write(&batch), || self.read(&numbers));
            written?;
            batch = next?;
            self.progress.add(end - done);
            done = end;
        }
        self.progress.add(self.source.size() - done);
        Ok(())
    }

    /// Finds out whether the host can share, unless that is known, with the first cell that could
    /// be: at the end of the file, where the next cluster comes, or where the cell itself is.
    fn try_to_share(&self, cells: &[u64]) -> Result<()> {
        if self.shares.get().is_some() {
            return Ok(());
        }
        for cell in cells {
            let Some(place) = self.shareable(*cell)? else {
                continue;
            };
            let at = match self.file {
                NewFile::Plain(_) => FileOffset::new(self.range(*cell).start),
                NewFile::Image(image) => image.end(),
            };
            let shared = self.share_at(at, &place)?;
            let _ = self.shares.set(shared);
            break;
        }
        Ok(())
    }

    /// Where a cell lies in one piece in a file of the source.
    fn shareable(&self, cell: u64) -> Result<Option<HostPlace>> {
        let range = self.range(cell);
        if range.end - range.start < self.unit.bytes() {
            return Ok(None);
        }
        let at = DiskOffset::new(range.start);
        let place = self.source.host_place(at, self.unit.bytes())?;
        Ok(place
            .filter(|place| place.len >= self.unit.bytes() && place.at.get() % SHARED_BORDER == 0))
    }

    fn share_at(&self, at: FileOffset, place: &HostPlace) -> Result<bool> {
        let from = place.at..place.at.saturating_add(self.unit.bytes());
        self.file.storage().share_from(at, &*place.storage, from)
    }

    /// The bytes of the disk in a cell.
    fn range(&self, cell: u64) -> Range<u64> {
        let start = cell.saturating_mul(self.unit.bytes());
        let end = start.saturating_add(self.unit.bytes());
        start..end.min(self.source.size())
    }

    fn read(&self, cells: &[u64]) -> Result<Vec<(u64, Loaded)>> {
        let load = |cell: &u64| Ok((*cell, self.load(*cell)?));
        cells.par_iter().map(load).collect()
    }

    fn load(&self, cell: u64) -> Result<Loaded> {
        if self.shares.get() == Some(&true) {
            if let Some(place) = self.shareable(cell)? {
                return Ok(Loaded::Shared(place));
            }
        }
        self.bytes(cell)
    }

    /// The content of a cell; for an image the whole cluster, zeros after the end of the disk.
    fn bytes(&self, cell: u64) -> Result<Loaded> {
        let range = self.range(cell);
        let there = range.end - range.start;
        let len = match self.file {
            NewFile::Plain(_) => there,
            NewFile::Image(_) => self.unit.bytes(),
        };
        let mut bytes = vec![0; len_usize(len).unwrap_or(0)];
        let wanted = &mut bytes[..len_usize(there).unwrap_or(0)];
        self.source.read_at(DiskOffset::new(range.start), wanted)?;
        Ok(if is_zero(&bytes) {
            Loaded::Zeros
        } else {
            Loaded::Bytes(bytes)
        })
    }

    fn write(&self, batch: &[(u64, Loaded)]) -> Result<()> {
        for (cell, loaded) in batch {
            if !matches!(loaded, Loaded::Zeros) {
                self.file.place(self.unit, DiskCluster::new(*cell))?;
            }
        }
        batch
            .par_iter()
            .try_for_each(|(cell, loaded)| match loaded {
                Loaded::Zeros => Ok(()),
                Loaded::Bytes(bytes) => self.put(*cell, bytes),
                Loaded::Shared(place) => self.share(*cell, place),
            })
    }

    fn put(&self, cell: u64, bytes: &[u8]) -> Result<()> {
        self.file.put(self.unit, DiskCluster::new(cell), bytes)
    }

    fn share(&self, cell: u64, place: &HostPlace) -> Result<()> {
        let at = self.file.place(self.unit, DiskCluster::new(cell))?;
        if self.share_at(at, place)? {
            return Ok(());
        }
        // Its file is on another file system than that of the first one.
        match self.bytes(cell)? {
            Loaded::Bytes(bytes) => self.put(cell, &bytes),
            Loaded::Zeros | Loaded::Shared(_) => Ok(()),
        }
    }
}

/// Writes all bytes of a source to a stream.
pub fn stream(
    source: &dyn Source,
    out: &mut (dyn Write + Send),
    progress: &Progress,
) -> Result<()> {
    source.prepare(progress)?;
    progress.step("copying", source.size());
    threads()?.install(|| stream_all(source, out, progress))
}

fn stream_all(
    source: &dyn Source,
    out: &mut (dyn Write + Send),
    progress: &Progress,
) -> Result<()> {
    let read = |range: &Range<u64>| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len_usize(range.end - range.start).unwrap_or(0)];
        let pieces = bytes.par_chunks_mut(STREAM_PIECE).enumerate();
        pieces.try_for_each(|(number, piece)| {
            let at = range.start + len_u64(number * STREAM_PIECE);
            source.read_at(DiskOffset::new(at), piece)
        })?;
        Ok(bytes)
    };
    let mut runs = Runs::new(source, BATCH);
    let mut ready: Option<(Range<u64>, Vec<u8>)> = None;
    let mut at = 0;
    loop {
        progress.check()?;
        let next = runs.next().transpose()?;
        let (written, bytes) = rayon::join(
            || match &ready {
                Some((range, bytes)) => {
                    write_zeros(out, range.start - at, progress)?;
                    out.write_all(bytes).map_err(Error::from)
                }
                None => Ok(()),
            },
            || next.as_ref().map(read).transpose(),
        );
        written?;
        if let Some((range, _)) = &ready {
            progress.add(range.end - at);
            at = range.end;
        }
        match next.zip(bytes?) {
            Some(pair) => ready = Some(pair),
            None => break,
        }
    }
    write_zeros(out, source.size() - at, progress)?;
    progress.add(source.size() - at);
    Ok(out.flush()?)
}

fn write_zeros(out: &mut dyn Write, len: u64, progress: &Progress) -> Result<()> {
    let mut left = len;
    while left > 0 {
        progress.check()?;
        let step = left.min(len_u64(ZEROS.len()));
        out.write_all(&ZEROS[..len_usize(step).unwrap_or(0)])?;
        left -= step;
    }
    Ok(())
}
