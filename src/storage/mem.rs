//! A file in memory, for tests and for looking at bytes that are no file.
//!
//! Holes are not told from zeros: every byte below the length counts as allocated.

use super::{FileId, Keep, Storage};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FileOffset, len_u64, len_usize};
use parking_lot::RwLock;
use std::ops::Range;

/// A file in memory.
#[derive(Debug, Default)]
pub struct MemStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemStorage {
    /// A file with these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: RwLock::new(bytes),
        }
    }

    /// A copy of all bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }
}

fn indices(at: FileOffset, len: u64) -> Result<Range<usize>> {
    let start = len_usize(at.get());
    let end = at.get().checked_add(len).and_then(len_usize);
    match (start, end) {
        (Some(start), Some(end)) => Ok(start..end),
        _ => Err(Error::errno(libc::EFBIG)),
    }
}

fn range_indices(range: &Range<FileOffset>) -> Result<Range<usize>> {
    indices(
        range.start,
        range.end.get().saturating_sub(range.start.get()),
    )
}

impl Storage for MemStorage {
    fn len(&self) -> Result<FileOffset> {
        Ok(FileOffset::new(len_u64(self.bytes.read().len())))
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.read();
        let source = bytes
            .get(indices(at, len_u64(buf.len()))?)
            .ok_or_else(|| Error::new(ErrorKind::Truncated).at_offset(at))?;
        buf.copy_from_slice(source);
        Ok(())
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        let range = indices(at, len_u64(buf.len()))?;
        let mut bytes = self.bytes.write();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        bytes[range].copy_from_slice(buf);
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        let len = indices(FileOffset::ZERO, len.get())?.end;
        self.bytes.write().resize(len, 0);
        Ok(())
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        let end = range_indices(&range)?.end;
        let mut bytes = self.bytes.write();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }

    fn zero(&self, range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        let mut bytes = self.bytes.write();
        let range = range_indices(&range)?;
        let end = range.end.min(bytes.len());
        if range.start < end {
            bytes[range.start..end].fill(0);
        }
        Ok(())
    }

    fn copy_from(
        &self,
        _at: FileOffset,
        _source: &dyn Storage,
        _from: Range<FileOffset>,
    ) -> Result<bool> {
        Ok(false)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let len = self.len()?;
        Ok((from < len).then_some(from..len))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.len()?.get())
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
