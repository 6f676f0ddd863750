//! A file whose user asks to stop once so many changes have been made to it.

use ploopfs::admin::progress::Progress;
use ploopfs::error::Result;
use ploopfs::storage::{FileId, Keep, SharedStorage, Storage};
use ploopfs::units::FileOffset;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The file, and the progress that is told.
#[derive(Debug)]
pub(crate) struct Stopping {
    inner: SharedStorage,
    left: AtomicU64,
    pub(crate) progress: Arc<Progress>,
}

impl Stopping {
    pub(crate) fn new(inner: SharedStorage, changes: u64) -> Self {
        let this = Self {
            inner,
            left: AtomicU64::new(changes.saturating_add(1)),
            progress: Arc::default(),
        };
        this.count();
        this
    }

    fn count(&self) {
        let less = |left: u64| left.checked_sub(1);
        let all = (Ordering::Relaxed, Ordering::Relaxed);
        if self.left.fetch_update(all.0, all.1, less) == Ok(1) {
            self.progress.cancel();
        }
    }
}

impl Storage for Stopping {
    fn len(&self) -> Result<FileOffset> {
        self.inner.len()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        self.count();
        self.inner.write_at(at, buf)
    }

    fn sync_data(&self) -> Result<()> {
        self.count();
        self.inner.sync_data()
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.count();
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        self.count();
        self.inner.allocate(range)
    }

    fn zero(&self, range: Range<FileOffset>, keep: Keep) -> Result<()> {
        self.count();
        self.inner.zero(range, keep)
    }

    fn copy_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        self.count();
        self.inner.copy_from(at, source, from)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        self.inner.next_data(from)
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }

    fn drop_cache(&self) -> Result<()> {
        self.inner.drop_cache()
    }

    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }
}
