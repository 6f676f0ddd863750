//! What a new disk holds at first, and how it gets into the disk's file.

use crate::admin::progress::Progress;
use crate::delta::create::NewImage;
use crate::error::Result;
use crate::storage::SharedStorage;
use crate::units::{ClusterSize, DiskCluster, DiskOffset, FileOffset, len_u64, len_usize};
use std::collections::BTreeSet;
use std::ops::Range;

/// Holes of a plain file are whole ones of these.
const GRAIN: usize = 64 << 10;

/// The file of a disk that is being made.
#[derive(Debug)]
pub enum NewFile {
    /// The disk byte for byte, as long as the disk; all of it is zeros.
    Plain(SharedStorage),
    /// An image.
    Image(NewImage),
}

impl NewFile {
    /// The file itself.
    #[must_use]
    pub fn storage(&self) -> &SharedStorage {
        match self {
            Self::Plain(file) => file,
            Self::Image(image) => image.storage(),
        }
    }

    /// Where a cluster of the disk is, or is to be, in the file.
    pub fn place(&self, size: ClusterSize, cluster: DiskCluster) -> Result<FileOffset> {
        match self {
            Self::Plain(_) => Ok(FileOffset::new(size.disk_start(cluster).get())),
            Self::Image(image) => image.place(cluster),
        }
    }

    /// Writes a whole cluster of the disk, which is all zeros until then.
    pub fn put(&self, size: ClusterSize, cluster: DiskCluster, bytes: &[u8]) -> Result<()> {
        let at = self.place(size, cluster)?;
        match self {
            Self::Plain(file) => write_data(file, at, bytes),
            Self::Image(image) => image.storage().write_at(at, bytes),
        }
    }
}

/// Writes a range that is a hole, and leaves holes in it where there are only zeros.
fn write_data(file: &SharedStorage, at: FileOffset, bytes: &[u8]) -> Result<()> {
    let is_zero = |start: usize| {
        let end = bytes.len().min(start + GRAIN);
        is_zero(&bytes[start..end])
    };
    let mut start = 0;
    while start < bytes.len() {
        let mut end = start + GRAIN;
        if !is_zero(start) {
            while end < bytes.len() && !is_zero(end) {
                end += GRAIN;
            }
            end = end.min(bytes.len());
            file.write_at(at.saturating_add(len_u64(start)), &bytes[start..end])?;
        }
        start = end;
    }
    Ok(())
}

/// True where all bytes are 0.
pub(in crate::admin) fn is_zero(bytes: &[u8]) -> bool {
    // Whole words are compared where the memory allows it.
    let (start, rest) = bytes.split_at(bytes.len() % 16);
    start.iter().all(|byte| *byte == 0)
        && rest.chunks_exact(16).all(|word| {
            word.first_chunk::<16>()
                .is_some_and(|w| u128::from_le_bytes(*w) == 0)
        })
}

/// A file whose bytes are those of the disk from a position on.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) start: DiskOffset,
    pub(super) storage: SharedStorage,
}

impl Piece {
    fn range(&self) -> Result<Range<u64>> {
        let start = self.start.get();
        Ok(start..start.saturating_add(self.storage.len()?.get()))
    }
}

/// Pieces of a disk that do not overlap; all else is zeros.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) pieces: Vec<Piece>,
}

impl Content {
    /// Copies every cluster that is not all zeros.
    pub(super) fn copy_to(
        &self,
        file: &NewFile,
        size: ClusterSize,
        progress: &Progress,
    ) -> Result<()> {
        let clusters = self.clusters(size)?;
        let count = u64::try_from(clusters.len()).unwrap_or(u64::MAX);
        progress.step("copying", count.saturating_mul(size.bytes()));
        let mut bytes = vec![0; len_usize(size.bytes()).unwrap_or(0)];
        for cluster in clusters {
            progress.check()?;
            self.read(size.disk_start(cluster).get(), &mut bytes)?;
            if !is_zero(&bytes) {
                file.put(size, cluster, &bytes)?;
            }
            progress.add(size.bytes());
        }
        Ok(())
    }

    /// The clusters of which the host has any bytes.
    fn clusters(&self, size: ClusterSize) -> Result<BTreeSet<DiskCluster>> {
        let mut clusters = BTreeSet::new();
        for piece in &self.pieces {
            let mut at = FileOffset::ZERO;
            while let Some(data) = piece.storage.next_data(at)? {
                let start = piece.start.get();
                let first = size.split(DiskOffset::new(start + data.start.get())).0;
                let last = size.split(DiskOffset::new(start + data.end.get() - 1)).0;
                clusters.extend((first.get()..=last.get()).map(DiskCluster::new));
                at = data.end;
            }
        }
        Ok(clusters)
    }

    /// Fills `bytes` with the disk from `at` on.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        let end = at.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        for piece in &self.pieces {
            let range = piece.range()?;
            let (from, to) = (range.start.max(at), range.end.min(end));
            if from < to {
                let within = |at_disk: u64| len_usize(at_disk - at).unwrap_or(0);
                let target = &mut bytes[within(from)..within(to)];
                let place = FileOffset::new(from - range.start);
                piece.storage.read_at(place, target)?;
            }
        }
        Ok(())
    }
}
