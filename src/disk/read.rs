//! Reading: pin, plan, read, unpin.
//!
//! 1. Pin the epoch. Before the look-up: a mapping found afterwards stays usable until the unpin.
//! 2. Plan as many segments as fit on the stack.
//! 3. Carry them out: zeros, or one read of a level's file each.
//! 4. Go on behind them until all is there; unpin.
//!
//! On this path nothing is allocated, no lock is taken, and a request that needs a page of the map
//! which is not in memory says so instead of loading it, unless the caller may wait. A large one on
//! the thread on which it arrived says so of bytes as well: a copy from memory is a matter of
//! microseconds, and the medium may take long. What there is of it by then is right, and stays; the
//! rest is looked up again elsewhere, under a pin of its own.

use super::part::Part;
use super::stats::Counters;
use crate::error::Result;
use crate::plan::{Segments, Source, Stop, plan_read};
use crate::units::{DiskOffset, FileOffset, Level, len_u64, len_usize};

/// What a read may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Whatever it takes.
    Yes,
    /// Not for pages of the map: it stops there.
    No,
    /// Nor for bytes that are not in memory, where the host can tell.
    Now,
}

impl Part {
    /// Fills `buf` from `at`; the caller has clipped it to the part. Tells how many of its first
    /// bytes are there: all, unless something would have to be waited for that may not be.
    pub fn read(
        &self,
        at: DiskOffset,
        buf: &mut [u8],
        load: Load,
        counters: &Counters,
    ) -> Result<usize> {
        let _pin = self.epochs.pin();
        let view = self.view();
        let geometry = self.chain.geometry();
        let mut segments = Segments::inline();
        // The page that was loaded last stays in memory while it is held.
        let mut held = None;
        let mut at = at;
        let mut done = 0;
        while done < buf.len() {
            let rest = &mut buf[done..];
            segments.clear();
            let len = len_u64(rest.len());
            let covered = match plan_read(&view, geometry, at, len, &mut segments) {
                Ok(covered) => covered,
                Err(Stop::Missing(_)) if load != Load::Yes => return Ok(done),
                Err(stop) => {
                    held = Some(self.after_stop(stop, counters)?);
                    continue;
                }
            };
            drop(held.take());
            let now = len_usize(covered).unwrap_or(0);
            let came = self.carry_out(&segments, &mut rest[..now], load)?;
            done += came;
            if came < now {
                return Ok(done);
            }
            at = DiskOffset::new(at.get() + covered);
        }
        Ok(done)
    }

    /// Where all of a read is, if that is one place and known; the caller has pinned the epoch.
    pub fn one_run(&self, at: DiskOffset, len: u64) -> Option<(Level, FileOffset)> {
        let mut segments = Segments::inline();
        let covered = plan_read(&self.view(), self.chain.geometry(), at, len, &mut segments);
        match segments.as_slice() {
            [only] if covered == Ok(len) => match only.what {
                Source::Data { level, at } => Some((level, at)),
                Source::Zeros => None,
            },
            _ => None,
        }
    }

    /// Reads the segments, and tells how many bytes came.
    fn carry_out(&self, segments: &Segments<Source>, buf: &mut [u8], load: Load) -> Result<usize> {
        let mut done = 0;
        for segment in segments.as_slice() {
            let len = len_usize(segment.len).unwrap_or(0);
            let piece = &mut buf[done..done + len];
            let came = match segment.what {
                Source::Zeros => {
                    piece.fill(0);
                    len
                }
                Source::Data { level, at } => {
                    let image = self.chain.level(level);
                    let storage = image.storage();
                    let came = if load == Load::Now {
                        storage.read_now(at, piece)
                    } else {
                        storage.read_at(at, piece).map(|()| len)
                    };
                    came.map_err(|e| e.at_level(level).in_file(image.path()))?
                }
            };
            done += came;
            if came < len {
                break;
            }
        }
        Ok(done)
    }
}
