//! Reads the format extension of an image.

use crate::error::{Error, Result};
use crate::format::extension::{self, Extension, ExtensionError};
use crate::format::header::Header;
use crate::storage::Storage;
use crate::units::{FileOffset, SectorCount, len_usize};
use thiserror::Error as ThisError;

/// Extensions in larger clusters than any writer makes are not read.
const CLUSTER_MAX: u64 = 64 << 20;

/// Why an extension is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ThisError)]
pub enum Disbelief {
    /// It does not hold together.
    #[error(transparent)]
    Unsound(#[from] ExtensionError),
    /// A cluster of it holds data of the disk.
    #[error("the cluster at sector {0} holds data of the disk")]
    Shared(u64),
    /// Its cluster is larger than any that is read for this.
    #[error("a cluster of {0} bytes is more than is read for this")]
    Size(u64),
}

/// Reads and checks the extension that the header names, if it names one that counts. `is_data`
/// tells whether a place in the file holds data of the disk.
pub fn read(
    storage: &dyn Storage,
    header: &Header,
    is_data: impl Fn(FileOffset) -> bool,
) -> Result<std::result::Result<Option<Extension>, Disbelief>> {
    let file_len = storage.len()?;
    let at = match extension::locate(header, file_len) {
        Ok(Some(at)) => at,
        Ok(None) => return Ok(Ok(None)),
        Err(error) => return Ok(Err(error.into())),
    };
    let size = header.layout().cluster().bytes();
    if size > CLUSTER_MAX {
        return Ok(Err(Disbelief::Size(size)));
    }
    let len = len_usize(size).ok_or_else(|| Error::errno(libc::ENOMEM))?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(len)
        .map_err(|_| Error::errno(libc::ENOMEM))?;
    bytes.resize(len, 0);
    storage.read_at(at, &mut bytes)?;
    let extension = match extension::parse(&bytes, header, file_len) {
        Ok(extension) => extension,
        Err(error) => return Ok(Err(error.into())),
    };
    let start = |sector: &&SectorCount| FileOffset::new(sector.bytes().unwrap_or(u64::MAX));
    let shared = extension.clusters.iter().find(|at| is_data(start(at)));
    Ok(match shared {
        Some(sector) => Err(Disbelief::Shared(sector.get())),
        None => Ok(Some(extension)),
    })
}
