//! The list of segments of a plan: a few on the stack, more on the heap where there is memory.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use smallvec::SmallVec;

/// Segments that fit without the heap. Three clusters is what a request of 1 MiB touches at most
/// with clusters of 512 KiB; small clusters make more pieces, but those of a file that was written
/// in order merge.
const INLINE: usize = 8;

/// One step of a plan for a range of the request's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<T> {
    /// First byte, counted from the start of the plan.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What to do.
    pub what: T,
}

/// What two neighbouring segments become when they can be one.
pub trait Merge: Copy {
    /// `Some` with the value of the joined segment when `next` continues `self`, which is `len`
    /// bytes long.
    fn merge(self, len: u64, next: Self) -> Option<Self>;
}

/// The segments of a plan, in request order, without gaps, neighbours merged.
#[derive(Clone, Debug)]
pub struct Segments<T> {
    list: SmallVec<[Segment<T>; INLINE]>,
    room: usize,
}

impl<T: Merge> Segments<T> {
    /// Room for the segments that fit on the stack. Never allocates.
    #[must_use]
    #[inline]
    pub fn inline() -> Self {
        Self {
            list: SmallVec::new(),
            room: INLINE,
        }
    }

    /// Room for `wanted` segments if memory allows, else for those that fit on the stack: the plan
    /// then only takes more turns.
    #[must_use]
    pub fn with_room(wanted: usize) -> Self {
        let mut segments = Self::inline();
        if wanted > INLINE && segments.list.try_reserve_exact(wanted).is_ok() {
            segments.room = wanted;
        }
        segments
    }

    /// True when this many segments fit, merged or not.
    #[must_use]
    pub fn has_room(&self, count: usize) -> bool {
        self.list.len().saturating_add(count) <= self.room
    }

    /// Forgets the segments and keeps the room.
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// Appends, merging with the last segment where both make one. `false` when there is no room,
    /// and then nothing changed.
    #[inline]
    pub fn push(&mut self, segment: Segment<T>) -> bool {
        if let Some(last) = self.list.last_mut() {
            if let Some(joined) = last.what.merge(last.len, segment.what) {
                last.what = joined;
                last.len = last.len.saturating_add(segment.len);
                return true;
            }
        }
        if self.list.len() >= self.room {
            return false;
        }
        self.list.push(segment);
        true
    }

    /// The segments.
    #[must_use]
    pub fn as_slice(&self) -> &[Segment<T>] {
        &self.list
    }

    /// True when the heap is not used.
    #[must_use]
    pub fn is_inline(&self) -> bool {
        !self.list.spilled()
    }
}
