//! What a disk holds where its end is now, or will be.

use super::Request;
use crate::admin::check;
use crate::admin::relocate::first_data;
use crate::delta::image::Image;
use crate::delta::walk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Header;
use crate::format::layout::Layout;
use crate::storage::Storage;
use crate::units::{DiskCluster, SECTOR, SectorCount};
use std::ops::Range;

/// The first byte of a range of the disk for which one image holds anything but zeros. Without a
/// header the image is plain. What cannot be read because its entry is wrong counts as data.
pub fn data_in(
    storage: &dyn Storage,
    header: Option<&Header>,
    disk: Range<u64>,
) -> Result<Option<u64>> {
    let Some(header) = header else {
        let end = disk.end.min(storage.len()?.get());
        return first_data(storage, disk.start..end);
    };
    let layout = header.layout();
    let (size, file_len) = (layout.cluster().bytes(), storage.len()?);
    let disk = disk.start..disk.end.min(header.size_bytes());
    let mut found = None;
    walk::words(storage, layout.table_end(), |at, bytes| {
        check::entries(at, bytes, layout, |cluster, word| {
            let Some(cluster) = cluster.filter(|_| word != 0 && found.is_none()) else {
                return Ok(());
            };
            let cluster_start = cluster.saturating_mul(size);
            let start = cluster_start.max(disk.start);
            let end = cluster_start.saturating_add(size).min(disk.end);
            if start >= end {
                return Ok(());
            }
            if layout.check_entry(word, file_len).is_err() {
                found = Some(start);
                return Ok(());
            }
            let place = layout.entry_start(word).get();
            let range = place + (start - cluster_start)..place + (end - cluster_start);
            let byte = first_data(storage, range)?;
            found = byte.map(|byte| cluster_start + (byte - place));
            Ok(())
        })
    })?;
    Ok(found)
}

/// Refuses what would lose or bring up data without having been asked to. Returns the first byte of
/// the disk that is cut off and holds data, where that is wanted.
pub(super) fn decide(
    storage: &dyn Storage,
    header: &Header,
    lower: &[Image],
    after: SectorCount,
    request: &Request,
) -> Result<Option<u64>> {
    let (old, new) = (header.size_bytes(), after.get().saturating_mul(SECTOR));
    if new > old {
        return expose(storage, header, lower, old..new).map(|()| None);
    }
    if new < old && !request.shrink {
        return Err(smaller(old, new));
    }
    let mut found = data_in(storage, Some(header), new..old)?;
    for image in lower {
        let below = data_in(&**image.storage(), image.header(), new..old)
            .map_err(|e| e.in_file(image.path()))?;
        found = found.into_iter().chain(below).min();
    }
    match found {
        Some(byte) if !request.force_discard => Err(in_the_way(byte)),
        found => Ok(found),
    }
}

/// The error for a size that is not asked for by its name.
pub(super) fn smaller(old: u64, new: u64) -> Error {
    let why = format!("{new} bytes are less than the {old} that the disk has");
    Error::why(ErrorKind::Usage, why).fix("to make it smaller: --shrink")
}

/// The error for data in what is to be cut off.
pub(super) fn in_the_way(byte: u64) -> Error {
    let why = format!("the part that would be cut off holds data, the first of it at byte {byte}");
    Error::why(ErrorKind::Usage, why).fix(
        "shrink its file systems and partitions first, and discard what they leave (`blkdiscard`); \
         to lose the data: --force-discard",
    )
}

/// The error for data in what is to be cut off that a snapshot shows.
pub(super) fn needed_by(snapshot: &str, byte: u64) -> Error {
    let why = format!(
        "the snapshot {snapshot} shows data in the part that would be cut off, at byte {byte}"
    );
    Error::why(ErrorKind::Usage, why)
        .fix("delete such snapshots first, or convert the disk to a new one and shrink that")
}

/// Refuses to make room where a level below has data that the end of the disk has hidden.
fn expose(storage: &dyn Storage, header: &Header, lower: &[Image], disk: Range<u64>) -> Result<()> {
    let size = header.layout().cluster().bytes();
    let mut start = disk.start;
    if start % size != 0 {
        let offset = Layout::entry_offset(DiskCluster::new(start / size));
        let mut entry = [0; 4];
        storage.read_at(offset, &mut entry)?;
        if entry != [0; 4] {
            start = start.next_multiple_of(size);
        }
    }
    for image in lower {
        let found = data_in(&**image.storage(), image.header(), start..disk.end)
            .map_err(|e| e.in_file(image.path()))?;
        if let Some(byte) = found {
            let why = format!(
                "a level below has data behind the end of the disk, at byte {byte}, and it would \
                 come up again"
            );
            return Err(Error::why(ErrorKind::Unsupported, why)
                .in_file(image.path())
                .fix("convert the disk to a new one of that size"));
        }
    }
    Ok(())
}
