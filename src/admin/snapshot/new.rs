//! A new, empty image over another one.

use super::Opened;
use crate::delta::image::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::header::{FLAG_EMPTY, RawHeader, TYPE, Version};
use crate::format::layout::Layout;
use crate::storage::directory::take_after;
use crate::storage::mem::MemStorage;
use crate::storage::{Directory, Storage};
use crate::units::{ClusterSize, FileOffset, SECTOR};
use std::path::Path;
use std::sync::Arc;

/// Cluster size where neither an image nor the descriptor gives one: 1 MiB.
const CLUSTER_SECTORS: u32 = 2048;
/// Bytes of an empty table that are written at a time.
const STRIDE: u64 = 1 << 20;

/// What it will be.
#[derive(Clone, Debug)]
pub(super) struct NewImage {
    /// Its name in the bundle's directory.
    pub name: String,
    raw: RawHeader,
    table_len: u64,
}

/// The name of a new file beside one of these names: ploop's end in a GUID, Parallels Desktop's
/// have one before `.hds`. The GUID in a name is the file's own.
pub(super) fn name_beside(old: &str, file: Guid) -> String {
    let with_guid = |text: &str| {
        let (start, guid) = text.rsplit_once('.')?;
        let is_guid = guid.starts_with('{') && Guid::parse(guid).is_some();
        is_guid.then(|| start.to_owned())
    };
    if let Some(start) = old.strip_suffix(".hds").and_then(with_guid) {
        return format!("{start}.{file}.hds");
    }
    match with_guid(old) {
        Some(start) => format!("{start}.{file}"),
        None => format!("{old}.{file}"),
    }
}

/// Names as Parallels Desktop gives them.
fn is_desktop(name: &str) -> bool {
    name_beside(name, Guid::TOP).ends_with(".hds")
}

impl NewImage {
    pub(super) fn over(
        below: &Opened,
        blocksize: Option<u32>,
        disk_len: u64,
        file: Guid,
    ) -> Result<Self> {
        let last = Path::new(&below.entry.file).file_name();
        let Some(last) = last.and_then(|name| name.to_str()) else {
            return Err(Error::new(ErrorKind::OutsideBundle).in_file(below.image.path()));
        };
        let header = below.image.header();
        let cluster = match header {
            Some(header) => header.layout().cluster(),
            None => blocksize
                .or(Some(CLUSTER_SECTORS))
                .and_then(ClusterSize::from_sectors)
                .ok_or_else(|| Error::errno(libc::EINVAL))?,
        };
        let version = match header {
            Some(header) => header.version(),
            // Parallels Desktop reads no other.
            None if is_desktop(last) => Version::V1,
            None => Version::V2,
        };
        Self::empty(name_beside(last, file), version, cluster, disk_len)
    }

    /// An image of a disk of so many bytes that maps nothing.
    pub(super) fn empty(
        name: String,
        version: Version,
        cluster: ClusterSize,
        disk_len: u64,
    ) -> Result<Self> {
        let impossible = || {
            let why = "the disk is larger than an image of this version can be";
            Error::why(ErrorKind::Unsupported, why).in_file(Path::new(&name))
        };
        let sectors = disk_len / SECTOR;
        if version == Version::V1 && u32::try_from(sectors).is_err() {
            return Err(impossible());
        }
        let entry_count = cluster.count_for(disk_len).get();
        let entry_count = u32::try_from(entry_count).map_err(|_| impossible())?;
        let size = u32::try_from(cluster.sectors().get()).map_err(|_| impossible())?;
        let layout = Layout::new(version, cluster, entry_count, 0);
        let table = cluster.count_for(layout.table_end().get()).get();
        let first_block = table.saturating_mul(cluster.sectors().get());
        let raw = RawHeader {
            magic: version.magic(),
            disk_type: TYPE,
            heads: 16,
            cylinders: u32::try_from(sectors / 512).unwrap_or(u32::MAX),
            cluster_sectors: size,
            entry_count,
            size_in_sectors: sectors,
            in_use: 0,
            first_block: u32::try_from(first_block).map_err(|_| impossible())?,
            flags: FLAG_EMPTY,
            extension: 0,
        };
        Ok(Self {
            name,
            raw,
            table_len: table.saturating_mul(cluster.bytes()),
        })
    }

    /// The same in memory, for finding out what would become of it.
    pub(super) fn in_memory(&self) -> Result<Image> {
        let len = usize::try_from(self.table_len).map_err(|_| Error::errno(libc::ENOMEM))?;
        let mut bytes = Vec::new();
        let full = |_| Error::errno(libc::ENOMEM);
        bytes.try_reserve_exact(len).map_err(full)?;
        bytes.extend_from_slice(&self.raw.encode());
        bytes.resize(len, 0);
        Image::expanding(Path::new(&self.name), Arc::new(MemStorage::new(bytes)))
    }

    /// Makes the file, durable but for its name, with the owner and the mode of the one below.
    /// The clusters of the table are written whole: ploop takes a hole among them for damage.
    pub(super) fn make(&self, directory: &dyn Directory, like: &dyn Storage) -> Result<()> {
        let storage = directory.create_new(&self.name)?;
        let fill = || -> Result<()> {
            take_after(&*storage, like)?;
            let mut at = 0;
            while at < self.table_len {
                let len = (self.table_len - at).min(STRIDE);
                let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
                if at == 0 {
                    let header = self.raw.encode();
                    bytes[..header.len()].copy_from_slice(&header);
                }
                storage.write_at(FileOffset::new(at), &bytes)?;
                at += len;
            }
            storage.sync_data()
        };
        fill().map_err(|e| e.in_file(Path::new(&self.name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_those_that_are_there() {
        let file = Guid::from_bytes([0x11; 16]);
        let new = "{11111111-1111-1111-1111-111111111111}";
        for (old, expected) in [
            ("root.hds".to_owned(), format!("root.hds.{new}")),
            (format!("root.hds.{}", Guid::TOP), format!("root.hds.{new}")),
            (
                format!("a.hdd.0.{}.hds", Guid::TOP),
                format!("a.hdd.0.{new}.hds"),
            ),
            ("x.{abc}.hds".to_owned(), format!("x.{{abc}}.hds.{new}")),
            ("plain".to_owned(), format!("plain.{new}")),
        ] {
            assert_eq!(name_beside(&old, file), expected);
        }
    }

    #[test]
    fn an_empty_image_is_what_other_programs_make() {
        let cluster = ClusterSize::from_sectors(64).expect("a cluster size");
        let image = NewImage::empty("x".to_owned(), Version::V2, cluster, 10 << 20);
        let image = image.expect("it can be");
        assert_eq!(image.table_len, 32768);
        let raw = image.raw;
        assert_eq!((raw.entry_count, raw.first_block), (320, 64));
        let huge = NewImage::empty("x".to_owned(), Version::V1, cluster, 1 << 42);
        assert!(huge.is_err());
    }
}
