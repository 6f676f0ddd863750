//! The in-use mark, and with it the header's bytes while the image is written to.
//!
//! Order, and what each reordering would break:
//!
//! 1. `set`: one write of the 64 bytes with the mark, extension offset 0 and no conversion flag;
//! 2. sync. Only then may anything else in the file change: a change that became durable before the
//!    mark would let a crashed image pass for a clean one, with a bitmap that lies.
//! 3. ... all changes, and the last flush ...
//! 4. `clear`: one write of the 64 bytes with mark 0 and the Empty flag set exactly when no cluster
//!    is mapped;
//! 5. sync. Were 4 to become durable before 3, a crash would leave a broken image marked clean.
//!
//! The table's page 0 shares the first 4 KiB with the header; its writes start at byte 64, so the
//! two never overwrite each other, and this is the only place that writes bytes 0 to 63.

use crate::error::Result;
use crate::format::header::{FLAG_CONVERTING, FLAG_EMPTY, IN_USE, RawHeader, Version};
use crate::planted::{Bug, planted};
use crate::storage::Storage;
use crate::units::FileOffset;

/// The owner of the header's bytes of one image that is open for writing.
#[derive(Debug)]
pub struct InUseMark {
    header: RawHeader,
    written: bool,
    set: bool,
}

impl InUseMark {
    /// Takes over a header as found in the file.
    #[must_use]
    pub fn new(header: RawHeader) -> Self {
        Self {
            header,
            written: false,
            set: false,
        }
    }

    /// True once the mark is durable.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.set
    }

    /// Makes the mark durable, if it is not yet (steps 1 and 2).
    pub fn set(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.set {
            return Ok(());
        }
        let as_found = self.header;
        self.header.in_use = IN_USE;
        self.header.extension = 0;
        // With the mark set, this flag would mean a half-converted table.
        self.header.flags = if self.header.flags == u32::MAX {
            0
        } else {
            self.header.flags & !FLAG_CONVERTING
        };
        if self.header.magic == Version::V1.magic() {
            self.header.size_in_sectors &= u64::from(u32::MAX);
        }
        // If this or the sync fails, the mark may be there all the same, and is to be cleared.
        self.written = true;
        storage.write_at(FileOffset::ZERO, &self.header.encode())?;
        if !planted(Bug::MarkNotSynced) {
            storage.sync_data()?;
        }
        if planted(Bug::StaleHeader) {
            storage.write_at(FileOffset::ZERO, &as_found.encode())?;
        }
        self.set = true;
        Ok(())
    }

    /// Makes a header of another size durable. The mark must be set, and stays.
    pub fn resize(&mut self, storage: &dyn Storage, resized: &RawHeader) -> Result<()> {
        debug_assert!(self.set, "nothing changes before the mark is durable");
        let as_marked = self.header;
        self.header = RawHeader {
            in_use: as_marked.in_use,
            flags: as_marked.flags,
            extension: as_marked.extension,
            ..*resized
        };
        storage.write_at(FileOffset::ZERO, &self.header.encode())?;
        storage.sync_data()
    }

    /// The header without the mark.
    #[must_use]
    pub fn closed(&self, empty: bool) -> RawHeader {
        let mut header = self.header;
        header.in_use = 0;
        header.flags = if empty {
            header.flags | FLAG_EMPTY
        } else {
            header.flags & !FLAG_EMPTY
        };
        header
    }

    /// Takes the mark away, durably (steps 4 and 5). Does nothing where it was never written.
    pub fn clear(&mut self, storage: &dyn Storage, empty: bool) -> Result<()> {
        if !self.written {
            return Ok(());
        }
        self.header = self.closed(empty);
        storage.write_at(FileOffset::ZERO, &self.header.encode())?;
        storage.sync_data()?;
        (self.written, self.set) = (false, false);
        Ok(())
    }
}
