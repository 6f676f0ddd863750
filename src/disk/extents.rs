//! The disk as a sequence of extents: which file's bytes answer for which range.
//!
//! Holes are found as [`super::seek`] finds them, so that a fresh disk of any size is one step.
//! What is mapped comes from the same plans that reads are made of.

use super::Disk;
use super::part::Part;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Segments, Source, Stop, plan_read};
use crate::units::{DiskOffset, FileOffset, Level};
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes that are planned at a time.
const PLANNED: u64 = 64 << 20;

/// A range of the disk of which one thing can be said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it is, never empty.
    pub range: Range<DiskOffset>,
    /// The part of the disk, counted from 0.
    pub part: usize,
    /// What answers for it.
    pub what: Content,
}

/// What answers for an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// No level: zeros.
    Hole,
    /// The bytes of a level's file.
    Data {
        /// The level.
        level: Level,
        /// Where they begin in its file.
        at: FileOffset,
    },
    /// The entry that should say it is invalid: it cannot be read.
    Bad,
}

/// The extents of a disk from a position on; neighbours in one file are one extent, unless that is
/// longer than is planned at a time.
#[derive(Debug)]
pub struct Extents<'a> {
    disk: &'a Disk,
    at: u64,
    most: u64,
    planned: VecDeque<Extent>,
}

impl Disk {
    /// The extents from `at` to the end of the disk.
    #[must_use]
    pub fn extents(&self, at: DiskOffset) -> Extents<'_> {
        self.extents_by(at, PLANNED)
    }

    /// The same, with so many bytes planned at a time: for those who need the first extent only,
    /// and only its beginning.
    #[must_use]
    pub fn extents_by(&self, at: DiskOffset, most: u64) -> Extents<'_> {
        Extents {
            disk: self,
            at: at.get(),
            most: most.clamp(1, PLANNED),
            planned: VecDeque::new(),
        }
    }

    /// Levels of a part's chain, or 0 where there is no such part.
    #[must_use]
    pub fn depth(&self, part: usize) -> usize {
        self.parts()
            .get(part)
            .map_or(0, |part| part.chain.levels().len())
    }

    /// True for a level of a part that is a plain file.
    #[must_use]
    pub fn is_plain_level(&self, part: usize, level: Level) -> bool {
        let parts = self.parts();
        let image = parts
            .get(part)
            .and_then(|part| part.chain.levels().get(level.index()));
        image.is_some_and(|image| image.layout().is_none())
    }

    /// Plans what is at a position. Gives at least one extent that starts there.
    fn plan_extents(&self, at: u64, most: u64, planned: &mut VecDeque<Extent>) -> Result<()> {
        let parts = self.parts();
        let (index, within) = Self::locate(&parts, DiskOffset::new(at));
        let part = parts.get(index).ok_or(Error::new(ErrorKind::OutOfRange))?;
        let from = within.get();
        let hole_end = self.hole_end(part, from)?;
        let mut push = |start: u64, end: u64, what| {
            let range = DiskOffset::new(part.start + start)..DiskOffset::new(part.start + end);
            planned.push_back(Extent {
                range,
                part: index,
                what,
            });
        };
        if hole_end > from {
            push(from, hole_end, Content::Hole);
            return Ok(());
        }
        let mut segments = Segments::inline();
        let mut len = most.min(part.disk_len() - from);
        let cluster_size = part.chain.geometry().cluster;
        loop {
            segments.clear();
            match plan_read(
                &part.view(),
                part.chain.geometry(),
                within,
                len,
                &mut segments,
            ) {
                Ok(_) => break,
                Err(Stop::Bad(cluster)) => {
                    let bad = cluster_size.disk_start(cluster).get();
                    if bad <= from {
                        let end = (bad + cluster_size.bytes()).min(part.disk_len());
                        push(from, end, Content::Bad);
                        return Ok(());
                    }
                    len = bad - from;
                }
                // Held by nobody: at worst it is loaded once more.
                Err(stop) => drop(part.after_stop(stop, &self.counters)?),
            }
        }
        for segment in segments.as_slice() {
            let start = from + segment.start;
            let what = match segment.what {
                Source::Zeros => Content::Hole,
                Source::Data { level, at } => Content::Data { level, at },
            };
            push(start, start + segment.len, what);
        }
        Ok(())
    }

    /// Up to where nothing is mapped; `from` itself where something is.
    fn hole_end(&self, part: &Part, from: u64) -> Result<u64> {
        let mut at = from;
        while at < part.disk_len() {
            let extent = self.extent(part, at, false)?;
            if extent.is_data {
                break;
            }
            at = extent.end.min(part.disk_len());
        }
        Ok(at)
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.planned.is_empty() {
            if self.at >= self.disk.size_bytes() {
                return None;
            }
            if let Err(e) = self
                .disk
                .plan_extents(self.at, self.most, &mut self.planned)
            {
                self.at = u64::MAX;
                return Some(Err(e));
            }
        }
        let next = self.planned.pop_front()?;
        self.at = next.range.end.get();
        Some(Ok(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
    use crate::disk::{DiskOptions, open};
    use crate::format::header::{MAGIC_V2, RawHeader};
    use crate::storage::mem::MemStorage;
    use crate::units::SectorCount;
    use std::path::PathBuf;
    use std::sync::Arc;

    const CLUSTER: usize = 4096;

    /// A disk of eight clusters of 4 KiB.
    fn image(entries: [u32; 8]) -> Vec<u8> {
        let raw = RawHeader {
            magic: MAGIC_V2,
            disk_type: 2,
            heads: 0,
            cylinders: 0,
            cluster_sectors: 8,
            entry_count: 8,
            size_in_sectors: 64,
            in_use: 0,
            first_block: 8,
            flags: 0,
            extension: 0,
        };
        let mut bytes = vec![0; 9 * CLUSTER];
        bytes[..64].copy_from_slice(&raw.encode());
        for (slot, entry) in entries.iter().enumerate() {
            bytes[64 + 4 * slot..][..4].copy_from_slice(&entry.to_le_bytes());
        }
        bytes
    }

    fn disk(levels: &[[u32; 8]]) -> Arc<Disk> {
        let file = |entries: &[u32; 8]| OpenedFile {
            path: PathBuf::from("x.hds"),
            storage: Arc::new(MemStorage::new(image(*entries))),
            plain: Plain::No,
            guid: None,
        };
        let part = OpenedPart {
            start: SectorCount::ZERO,
            end: None,
            blocksize: None,
            files: levels.iter().map(file).collect(),
        };
        let images = OpenedImages::from_parts(PathBuf::from("x"), vec![part]);
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        open(Arc::new(images), &options).unwrap().0
    }

    fn told(disk: &Disk, from: u64) -> Vec<(u64, u64, Content)> {
        let in_clusters = |at: DiskOffset| at.get() / len_of_cluster();
        disk.extents(DiskOffset::new(from))
            .map(|extent| {
                let Extent { range, what, .. } = extent.unwrap();
                (in_clusters(range.start), in_clusters(range.end), what)
            })
            .collect()
    }

    fn len_of_cluster() -> u64 {
        crate::units::len_u64(CLUSTER)
    }

    fn data(level: u16, cluster: u64) -> Content {
        Content::Data {
            level: Level::new(level),
            at: FileOffset::new(cluster * len_of_cluster()),
        }
    }

    #[test]
    fn levels_cover_each_other_and_neighbours_are_one() {
        let disk = disk(&[[1, 2, 3, 0, 0, 4, 0, 0], [0, 1, 0, 0, 0, 0, 0, 2]]);
        let expected = [
            (0, 1, data(0, 1)),
            (1, 2, data(1, 1)),
            (2, 3, data(0, 3)),
            (3, 5, Content::Hole),
            (5, 6, data(0, 4)),
            (6, 7, Content::Hole),
            (7, 8, data(1, 2)),
        ];
        assert_eq!(told(&disk, 0), expected);
        assert_eq!(told(&disk, 4 * len_of_cluster())[0], (4, 5, Content::Hole));
        assert_eq!(disk.depth(0), 2);
    }

    #[test]
    fn a_bad_entry_spoils_its_own_cluster_only() {
        let disk = disk(&[[1, 99, 2, 3, 0, 0, 0, 99]]);
        let expected = [
            (0, 1, data(0, 1)),
            (1, 2, Content::Bad),
            (2, 4, data(0, 2)),
            (4, 7, Content::Hole),
            (7, 8, Content::Bad),
        ];
        assert_eq!(told(&disk, 0), expected);
    }
}
