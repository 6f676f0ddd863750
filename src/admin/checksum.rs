//! A manifest of a disk: the crc32c of every cluster that is not all zeros.
//!
//! It depends on the disk's bytes alone, not on how they are stored, so it proves a copy in any
//! format, and it finds bit rot and names the ranges that have changed. [`manifest`] writes and
//! reads it; here it is made from a disk, and held against one.
//!
//! A disk that is longer than its manifest by zeros is equal, as is one that is shorter by zeros:
//! converting a disk rounds its size up.

pub mod manifest;

use crate::admin::progress::Progress;
use crate::admin::source::work::{Buffers, DataCursor, in_order, is_zero, read_padded};
use crate::admin::source::{Source, What};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{DiskOffset, FileOffset, len_u64, len_usize};
use manifest::{Manifest, Sum};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// Cluster size of a manifest where the disk has none of its own.
pub const CLUSTER_DEFAULT: u64 = 1 << 20;
/// The smallest and the largest that there may be.
pub const CLUSTER_MIN: u64 = 512;
/// Larger clusters would tell less and need more memory.
pub const CLUSTER_MAX: u64 = 64 << 20;
/// Ranges that differ and are told; more are counted.
pub const TOLD_MAX: usize = 10_000;
/// Those of which each is told with its file.
const PLACED_MAX: usize = 1000;

/// Sums up a disk. `each` gets the sums in disk order.
pub fn sum_up(
    source: &dyn Source,
    cluster: u64,
    progress: &Progress,
    mut each: impl FnMut(Sum) -> Result<()> + Send,
) -> Result<()> {
    source.prepare(progress)?;
    let size = source.size();
    progress.step("summing up", size);
    let mut cursor = DataCursor::new(source);
    let mut next = 0;
    let clusters = std::iter::from_fn(|| {
        let found = next_cluster(&mut cursor, next, cluster).transpose();
        if let Some(Ok(found)) = &found {
            next = found + 1;
        }
        found
    });
    let before = AtomicU64::new(0);
    in_order(
        clusters,
        progress,
        |number, buffers| {
            let buffer = buffers.one(len_in(*number, cluster, size))?;
            read_padded(source, number * cluster, buffer)?;
            note_progress(progress, &before, (number + 1) * cluster);
            Ok((!is_zero(buffer)).then(|| crc32c::crc32c(buffer)))
        },
        |cluster, crc| {
            if let Some(crc) = crc {
                each(Sum { cluster, crc })?;
            }
            Ok(true)
        },
    )
}

/// What a manifest says and a disk does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Nothing differs.
    pub equal: bool,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Bytes of the disk that the manifest was made of.
    pub manifest_size_bytes: u64,
    /// Ranges in which they differ.
    pub different_ranges: u64,
    /// Bytes of those, in whole clusters of the manifest.
    pub different_bytes: u64,
    /// The first [`TOLD_MAX`] of those ranges.
    pub differences: Vec<Difference>,
}

/// A range of the disk that is not as the manifest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The file that has the first of them, and where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Where it is in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Why its first cluster could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Holds a disk against a manifest, to the end, whatever is found. What cannot be read differs.
pub fn verify(source: &dyn Source, manifest: &Manifest, progress: &Progress) -> Result<Verified> {
    source.prepare(progress)?;
    let longest = source.size().max(manifest.size);
    progress.step("verifying", longest);
    let cluster = manifest.cluster;
    let mut cursor = DataCursor::new(source);
    let mut sums = manifest.sums.iter().copied().peekable();
    let mut next = 0;
    // Where neither has anything, nothing can differ.
    let clusters = std::iter::from_fn(|| {
        let listed = sums.peek().map(|sum| sum.cluster);
        let found = match next_cluster(&mut cursor, next, cluster) {
            Ok(stored) => [stored, listed].into_iter().flatten().min(),
            Err(e) => return Some(Err(e)),
        }?;
        next = found + 1;
        let crc = sums.next_if(|sum| sum.cluster == found).map(|sum| sum.crc);
        Some(Ok((found, crc)))
    });
    let before = AtomicU64::new(0);
    let mut found = Found::default();
    in_order(
        clusters,
        progress,
        |(number, crc), buffers| {
            let same = is_as_listed(source, manifest, *number, *crc, buffers);
            note_progress(progress, &before, (number + 1) * cluster);
            Ok(match same {
                Ok(true) => None,
                Ok(false) => Some(None),
                // A wish to stop is no difference.
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                Err(e) => Some(Some(e.to_string())),
            })
        },
        |(number, _), differs| {
            if let Some(error) = differs {
                let start = number * cluster;
                let length = longest.min((number + 1) * cluster) - start;
                found.push(start, length, error);
            }
            Ok(true)
        },
    )?;
    for difference in found.told.iter_mut().take(PLACED_MAX) {
        if let Some((file, at)) = place_of(source, difference.start) {
            difference.file = Some(file.display().to_string());
            difference.offset = Some(at.get());
        }
    }
    Ok(Verified {
        equal: found.ranges == 0,
        size_bytes: source.size(),
        manifest_size_bytes: manifest.size,
        different_ranges: found.ranges,
        different_bytes: found.bytes,
        differences: found.told,
    })
}

/// The bytes that the manifest covers have the sum, and those behind them are zeros.
fn is_as_listed(
    source: &dyn Source,
    manifest: &Manifest,
    number: u64,
    crc: Option<u32>,
    buffers: &mut Buffers,
) -> Result<bool> {
    let Manifest { size, cluster, .. } = *manifest;
    let all = len_in(number, cluster, source.size().max(size));
    let covered = len_in(number, cluster, size);
    let buffer = buffers.one(all)?;
    read_padded(source, number * cluster, buffer)?;
    let (listed, behind) = buffer.split_at(covered.min(all));
    Ok(is_zero(behind)
        && match crc {
            Some(crc) => crc32c::crc32c(listed) == crc,
            None => is_zero(listed),
        })
}

/// Differences as they are found, in disk order.
#[derive(Default)]
struct Found {
    told: Vec<Difference>,
    ranges: u64,
    bytes: u64,
    /// Where the last one ends, and whether it could not be read.
    last: Option<(u64, bool)>,
}

impl Found {
    fn push(&mut self, start: u64, length: u64, error: Option<String>) {
        let is_unread = error.is_some();
        let continues = self.last == Some((start, is_unread));
        self.last = Some((start + length, is_unread));
        self.bytes += length;
        if !continues {
            self.ranges += 1;
            if self.told.len() < TOLD_MAX {
                self.told.push(Difference {
                    start,
                    length,
                    file: None,
                    offset: None,
                    error,
                });
            }
        } else if self.ranges == len_u64(self.told.len()) {
            if let Some(last) = self.told.last_mut() {
                last.length += length;
            }
        }
    }
}

fn place_of(source: &dyn Source, at: u64) -> Option<(&PathBuf, FileOffset)> {
    if at >= source.size() {
        return None;
    }
    let extent = source.extents(DiskOffset::new(at)).next()?.ok()?;
    let (file, at) = extent.place.filter(|_| extent.what == What::Data)?;
    Some((source.files().get(file)?, at))
}

/// The next cluster from a number on that has data.
fn next_cluster(cursor: &mut DataCursor<'_>, from: u64, cluster: u64) -> Result<Option<u64>> {
    let Some(at) = from.checked_mul(cluster) else {
        return Ok(None);
    };
    Ok(cursor.at(at)?.map(|range| range.start / cluster))
}

/// Bytes of a cluster on a disk of a size.
fn len_in(number: u64, cluster: u64, size: u64) -> usize {
    let start = number.saturating_mul(cluster);
    len_usize(size.saturating_sub(start).min(cluster)).unwrap_or(0)
}

/// Holes count as done when what is behind them is.
fn note_progress(progress: &Progress, before: &AtomicU64, end: u64) {
    let seen = before.fetch_max(end, Ordering::Relaxed);
    progress.add(end.saturating_sub(seen));
}

/// A cluster size that a manifest may have.
pub fn check_cluster(cluster: u64) -> Result<u64> {
    if (CLUSTER_MIN..=CLUSTER_MAX).contains(&cluster) && cluster % CLUSTER_MIN == 0 {
        return Ok(cluster);
    }
    let why = format!(
        "clusters of {cluster} bytes: it takes whole sectors, from {CLUSTER_MIN} bytes to \
         {CLUSTER_MAX}"
    );
    Err(Error::why(ErrorKind::Usage, why))
}

/// The cluster size of a disk's manifest where nobody has said another.
#[must_use]
pub fn usual_cluster(source: &dyn Source) -> u64 {
    let own = source.cluster_bytes().unwrap_or(CLUSTER_DEFAULT);
    check_cluster(own).unwrap_or(CLUSTER_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted_however_many_there_are() {
        let mut found = Found::default();
        let most = len_u64(TOLD_MAX) * 4;
        for number in 0..most {
            // Each is two clusters long, and every other one cannot be read.
            let error = |at| (number % 2 == 0).then(|| format!("offset {at}"));
            found.push(number * 30, 10, error(0));
            found.push(number * 30 + 10, 10, error(10));
        }
        assert_eq!((found.ranges, found.bytes), (most, most * 20));
        assert_eq!(found.told.len(), TOLD_MAX);
        assert!(found.told.iter().all(|told| told.length == 20));
        assert_eq!(found.told[0].error.as_deref(), Some("offset 0"));
        // What could be read is no part of what could not.
        let mut found = Found::default();
        found.push(0, 10, Some(String::new()));
        found.push(10, 10, None);
        assert_eq!((found.ranges, found.bytes), (2, 20));
    }
}
