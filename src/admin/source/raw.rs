//! A raw file or block device as a source.

use super::{Extent, Extents, HostPlace, Source, What};
use crate::chain::bundle;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::SharedStorage;
use crate::storage::file::FileStorage;
use crate::storage::lock::{self, Locked, Purpose};
use crate::sys::{file as sys_file, open as sys};
use crate::units::{DiskOffset, FileOffset, SECTOR, len_usize};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The bytes of a disk as they are.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    /// The same, where it is a file that the host can copy from.
    storage: Option<SharedStorage>,
    path: [PathBuf; 1],
    /// Bytes that are there; the disk is as long in whole sectors.
    len: u64,
}

impl RawDisk {
    /// Opens a file or a block device.
    pub fn open(path: &Path, notes: &mut Vec<String>) -> Result<Self> {
        let file = match sys::any(path, false) {
            Ok(file) => file,
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                return Err(bundle::nothing(path));
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                return Err(not_raw(path));
            }
            Err(e) => return Err(Error::from(e).in_file(path)),
        };
        let kind = file.metadata().map_err(|e| Error::from(e).in_file(path))?;
        if kind.is_file() {
            lock_against_writers(&file, path, notes)?;
        } else if !kind.file_type().is_block_device() {
            return Err(not_raw(path));
        }
        Self::of(file, path)
    }

    /// The bytes of an open file.
    pub(super) fn of(file: File, path: &Path) -> Result<Self> {
        let open = || -> Result<Self> {
            let mut end = &file;
            let len = end.seek(SeekFrom::End(0))?;
            let is_file = file.metadata()?.is_file();
            let storage: Option<SharedStorage> = if is_file {
                Some(Arc::new(FileStorage::new(file.try_clone()?)?))
            } else {
                None
            };
            Ok(Self {
                file,
                storage,
                path: [path.to_owned()],
                len,
            })
        };
        open().map_err(|e| e.in_file(path))
    }

    /// The next range that the host has blocks for; a device says nothing about that.
    fn next_host_data(&self, from: u64) -> Result<Option<std::ops::Range<u64>>> {
        if from >= self.len {
            return Ok(None);
        }
        if self.storage.is_none() {
            return Ok(Some(from..self.len));
        }
        sys_file::next_data(self.file.as_fd(), from)
            .map_err(|e| Error::from(e).in_file(&self.path[0]))
    }

    fn extent_at(&self, at: u64) -> Result<Extent> {
        let data = self.next_host_data(at)?;
        let (what, end) = match data {
            Some(data) if data.start <= at => (What::Data, data.end.max(at + 1)),
            Some(data) => (What::Zeros, data.start),
            None => (What::Zeros, self.size()),
        };
        let end = if end >= self.len { self.size() } else { end };
        Ok(Extent {
            range: DiskOffset::new(at)..DiskOffset::new(end),
            what,
            depth: 0,
            place: Some((0, FileOffset::new(at))),
        })
    }
}

fn not_raw(path: &Path) -> Error {
    let why = "a raw disk must be a plain file or a block device";
    Error::why(ErrorKind::Usage, why).in_file(path)
}

/// Keeps QEMU from writing to it meanwhile, or tells that somebody does.
fn lock_against_writers(file: &File, path: &Path, notes: &mut Vec<String>) -> Result<()> {
    match lock::image(file, path, Purpose::Read, Instant::now()) {
        Ok(Locked::Yes | Locked::Unsupported) => Ok(()),
        Err(e) if e.kind() == ErrorKind::Locked => {
            let why = e.why_text().unwrap_or_default();
            notes.push(format!(
                "{}: in use: {why}; what is read may be of different moments",
                path.display()
            ));
            Ok(())
        }
        Err(e) => Err(e),
    }
}

impl Source for RawDisk {
    fn format(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        self.len.next_multiple_of(SECTOR)
    }

    fn extents(&self, at: DiskOffset) -> Extents<'_> {
        let mut at = at.get();
        Box::new(std::iter::from_fn(move || {
            if at >= self.size() {
                return None;
            }
            let extent = self.extent_at(at);
            at = extent
                .as_ref()
                .map_or(u64::MAX, |extent| extent.range.end.get());
            Some(extent)
        }))
    }

    fn files(&self) -> &[PathBuf] {
        &self.path
    }

    fn read_at(&self, at: DiskOffset, buf: &mut [u8]) -> Result<()> {
        let left = len_usize(self.len.saturating_sub(at.get())).unwrap_or(usize::MAX);
        let (there, past) = buf.split_at_mut(left.min(buf.len()));
        past.fill(0);
        self.file.read_exact_at(there, at.get()).map_err(|e| {
            Error::from(e)
                .in_file(&self.path[0])
                .at_offset(FileOffset::new(at.get()))
        })
    }

    fn host_place(&self, at: DiskOffset, most: u64) -> Result<Option<HostPlace>> {
        let left = self.len.saturating_sub(at.get());
        Ok(self
            .storage
            .as_ref()
            .filter(|_| left > 0)
            .map(|storage| HostPlace {
                storage: Arc::clone(storage),
                at: FileOffset::new(at.get()),
                len: left.min(most),
            }))
    }
}
