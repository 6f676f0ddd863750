//! Deltas stacked by level: who maps this cluster?
//!
//! Imports: `delta` and lower.
//! Never: touches a request's buffer, or writes.
//!
//! [`bundle`] turns what the user named into open, locked files. [`open`] checks that the files of
//! one part fit together and makes a [`Chain`] of them. [`map`] answers where a disk cluster's
//! content is: the topmost level with an entry wins, and the answers of all levels are merged once
//! per page of the table, so that a look-up costs the same whatever the depth.

pub mod bundle;
pub mod map;
pub mod open;
pub mod page;

use crate::delta::image::{Image, Kind};
use crate::plan::Geometry;
use crate::units::{FileOffset, Level};

/// The deltas of one part of a disk, base first.
#[derive(Debug)]
pub struct Chain {
    levels: Vec<Image>,
    geometry: Geometry,
}

impl Chain {
    /// All levels, base first; never empty.
    #[must_use]
    pub fn levels(&self) -> &[Image] {
        &self.levels
    }

    /// The delta at a level, which the map has named.
    #[must_use]
    #[inline]
    pub fn level(&self, level: Level) -> &Image {
        &self.levels[level.index()]
    }

    /// The writable delta.
    #[must_use]
    #[inline]
    pub fn top(&self) -> &Image {
        self.level(self.geometry.top)
    }

    /// The numbers that plans need.
    #[must_use]
    #[inline]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// True when the top is a plain file: every cluster is mapped in place, there is no table.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.top().kind(), Kind::Plain)
    }

    /// First byte of the cluster that an entry of a level names; a plain level has it at the
    /// cluster's own place on the disk.
    #[must_use]
    #[inline]
    pub fn place_of(&self, level: Level, entry: u32, disk_start: u64) -> FileOffset {
        match self.level(level).layout() {
            Some(layout) => layout.entry_start(entry),
            None => FileOffset::new(disk_start),
        }
    }

    /// Bytes of the disk, from its start, that a level has content for.
    #[must_use]
    #[inline]
    pub fn readable_end(&self, level: Level) -> u64 {
        self.level(level).disk_len().min(self.geometry.disk_len)
    }

    /// Host bytes that all files of the chain occupy.
    pub fn allocated_bytes(&self) -> crate::error::Result<u64> {
        let mut sum = 0_u64;
        for image in &self.levels {
            let bytes = image
                .storage()
                .allocated_bytes()
                .map_err(|e| e.in_file(image.path()))?;
            sum = sum.saturating_add(bytes);
        }
        Ok(sum)
    }
}
