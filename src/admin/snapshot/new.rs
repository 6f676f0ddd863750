//! A new, empty image over another one.

use super::Opened;
use crate::delta::create::{self, Shape};
use crate::delta::image::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::header::Version;
use crate::storage::directory::take_after;
use crate::storage::mem::MemStorage;
use crate::storage::{Directory, SharedStorage, Storage};
use crate::units::{ClusterSize, SECTOR, SectorCount};
use std::path::Path;
use std::sync::Arc;

/// Cluster size where neither an image nor the descriptor gives one: 1 MiB.
const CLUSTER_SECTORS: u32 = 2048;

/// What it will be.
#[derive(Clone, Debug)]
pub(super) struct NewImage {
    /// Its name in the bundle's directory.
    pub name: String,
    shape: Shape,
}

/// The name of a new file beside one of these names: ploop's end in a GUID, Parallels Desktop's
/// have one before `.hds`. The GUID in a name is the file's own.
/// What is too long for a name loses the end of its start.
pub(super) fn name_beside(old: &str, file: Guid) -> String {
    const NAME_MAX: usize = 255;
    let with_guid = |text: &str| {
        let (start, guid) = text.rsplit_once('.')?;
        let is_guid = guid.starts_with('{') && Guid::parse(guid).is_some();
        is_guid.then(|| start.to_owned())
    };
    let (start, end) = match old.strip_suffix(".hds").and_then(with_guid) {
        Some(start) => (start, format!(".{file}.hds")),
        None => {
            let start = with_guid(old).unwrap_or_else(|| old.to_owned());
            (start, format!(".{file}"))
        }
    };
    let mut kept = start.len().min(NAME_MAX.saturating_sub(end.len()));
    while !start.is_char_boundary(kept) {
        kept -= 1;
    }
    format!("{}{end}", &start[..kept])
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
        let shape = Shape {
            version,
            cluster,
            size: SectorCount::new(disk_len / SECTOR),
        };
        let layout = shape.layout_of_any_cluster();
        layout.map_err(|e| e.in_file(Path::new(&name)))?;
        Ok(Self { name, shape })
    }

    /// The same in memory, for finding out what would become of it.
    pub(super) fn in_memory(&self) -> Result<Image> {
        let storage: SharedStorage = Arc::new(MemStorage::new(Vec::new()));
        create::NewImage::over_others(Arc::clone(&storage), &self.shape)?.finish()?;
        Image::expanding(Path::new(&self.name), storage)
    }

    /// Makes the file, durable but for its name, with the owner and the mode of the one below.
    pub(super) fn make(&self, directory: &dyn Directory, like: &dyn Storage) -> Result<()> {
        let fill = || -> Result<()> {
            let storage = directory.create_new(&self.name)?;
            take_after(&*storage, like)?;
            create::NewImage::over_others(storage, &self.shape)?.finish()
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
            (
                format!("x{}.hds", "\u{e9}".repeat(125)),
                format!("x{}.{new}", "\u{e9}".repeat(107)),
            ),
        ] {
            assert_eq!(name_beside(&old, file), expected);
            assert!(expected.len() <= 255);
        }
    }
}
