//! Reading: pin, plan, read, unpin.
//!
//! 1. Pin the epoch. Before the look-up: a mapping found afterwards stays usable until the unpin.
//! 2. Plan as many segments as fit on the stack.
//! 3. Carry them out: zeros, or one read of a level's file each.
//! 4. Go on behind them until all is there; unpin.
//!
//! On this path nothing is allocated, no lock is taken, and a request that needs a page of the map
//! which is not in memory says so instead of loading it, unless the caller may wait.

use super::part::Part;
use super::stats::Counters;
use crate::error::Result;
use crate::plan::{Segments, Source, Stop, plan_read};
use crate::units::{DiskOffset, len_u64, len_usize};

/// Whether a read may load pages of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Load and go on.
    Yes,
    /// Give up instead.
    No,
}

impl Part {
    /// Fills `buf` from `at`; the caller has clipped it to the part. `false` when a page would have
    /// to be loaded and may not.
    pub fn read(
        &self,
        at: DiskOffset,
        buf: &mut [u8],
        load: Load,
        counters: &Counters,
    ) -> Result<bool> {
        let _pin = self.epochs.pin();
        let view = self.view();
        let geometry = self.chain.geometry();
        let mut segments = Segments::inline();
        // The page that was loaded last stays in memory while it is held.
        let mut held = None;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            segments.clear();
            let len = len_u64(rest.len());
            let covered = match plan_read(&view, geometry, at, len, &mut segments) {
                Ok(covered) => covered,
                Err(Stop::Missing(_)) if load == Load::No => return Ok(false),
                Err(stop) => {
                    held = Some(self.after_stop(stop, counters)?);
                    continue;
                }
            };
            drop(held.take());
            let (now, later) = rest.split_at_mut(len_usize(covered).unwrap_or(0));
            self.carry_out(&segments, now)?;
            rest = later;
            at = DiskOffset::new(at.get() + covered);
        }
        Ok(true)
    }

    fn carry_out(&self, segments: &Segments<Source>, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        for segment in segments.as_slice() {
            let (piece, later) = rest.split_at_mut(len_usize(segment.len).unwrap_or(0));
            match segment.what {
                Source::Zeros => piece.fill(0),
                Source::Data { level, at } => {
                    let image = self.chain.level(level);
                    image
                        .storage()
                        .read_at(at, piece)
                        .map_err(|e| e.at_level(level).in_file(image.path()))?;
                }
            }
            rest = later;
        }
        Ok(())
    }
}
