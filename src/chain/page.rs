//! One page of the merged map: for each slot, one atomic word with entry, level and marks.
//!
//! A look-up loads one word, so number and level always belong together. Words change only under
//! the part's `table` lock; readers never take it.

use crate::atomics::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::error::{Error, Result};
use crate::format::layout::{BAT_PAGE_SLOTS, PageIndex};
use crate::planted::{Bug, planted};
use crate::units::Level;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

const LEVEL_SHIFT: u32 = 32;
const COVERS_LOWER: u64 = 1 << 48;
const BAD: u64 = 1 << 49;
const PENDING: u64 = 1 << 50;

/// What one slot says, packed into 64 bits: entry (32), level + 1 (16; 0 means a hole), marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    /// No level maps the cluster.
    pub const HOLE: Self = Self(0);

    /// A level maps the cluster with this entry.
    #[must_use]
    pub fn mapped(level: Level, entry: u32) -> Self {
        Self(((u64::from(level.get()) + 1) << LEVEL_SHIFT) | u64::from(entry))
    }

    /// The same with the mark that a lower level maps the cluster too.
    #[must_use]
    pub fn covering_lower(self) -> Self {
        Self(self.0 | COVERS_LOWER)
    }

    /// The same with the mark that the entry is invalid.
    #[must_use]
    pub fn bad(self) -> Self {
        Self(self.0 | BAD)
    }

    /// The same with the mark that a write is giving the cluster a place.
    #[must_use]
    pub fn pending(self) -> Self {
        Self(self.0 | PENDING)
    }

    /// The same without that mark.
    #[must_use]
    pub fn settled(self) -> Self {
        Self(self.0 & !PENDING)
    }

    /// The level that maps the cluster, `None` for a hole.
    #[must_use]
    #[inline]
    pub fn level(self) -> Option<Level> {
        let level = u16::try_from((self.0 >> LEVEL_SHIFT) & 0xffff).unwrap_or(0);
        level.checked_sub(1).map(Level::new)
    }

    /// The entry in the units of the level's file.
    #[must_use]
    #[inline]
    pub fn entry(self) -> u32 {
        u32::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(0)
    }

    /// See [`Word::covering_lower`].
    #[must_use]
    #[inline]
    pub fn covers_lower(self) -> bool {
        self.0 & COVERS_LOWER != 0
    }

    /// See [`Word::bad`].
    #[must_use]
    #[inline]
    pub fn is_bad(self) -> bool {
        self.0 & BAD != 0
    }

    /// See [`Word::pending`].
    #[must_use]
    #[inline]
    pub fn is_pending(self) -> bool {
        self.0 & PENDING != 0
    }
}

/// A model has room for a few words only.
const FRAME_SLOTS: usize = if cfg!(all(test, feature = "loom")) {
    2
} else {
    BAT_PAGE_SLOTS
};

/// The memory of one page's words.
type Frame = Box<[AtomicU64]>;

/// Page memory: from the heap while it has some, else from a reserve that was set aside when the
/// disk was opened, so that a look-up can always go on.
#[derive(Debug)]
pub struct Frames {
    reserve: Mutex<Vec<Frame>>,
}

impl Frames {
    /// Sets `count` frames aside.
    pub fn new(count: usize) -> Result<Self> {
        let out_of_memory = || Error::errno(libc::ENOMEM);
        let mut reserve = Vec::new();
        reserve
            .try_reserve_exact(count)
            .map_err(|_| out_of_memory())?;
        for _ in 0..count {
            reserve.push(from_heap().ok_or_else(out_of_memory)?);
        }
        Ok(Self {
            reserve: Mutex::new(reserve),
        })
    }

    /// A frame full of holes, or `None` while neither the heap nor the reserve has one.
    fn take(&self) -> Option<Frame> {
        if let Some(frame) = from_heap() {
            return Some(frame);
        }
        let frame = self.reserve.lock().pop()?;
        for word in &frame {
            word.store(0, Ordering::Relaxed);
        }
        Some(frame)
    }

    fn give_back(&self, frame: Frame) {
        let mut reserve = self.reserve.lock();
        if reserve.len() < reserve.capacity() {
            reserve.push(frame);
        }
    }
}

fn from_heap() -> Option<Frame> {
    let mut words = Vec::new();
    words.try_reserve_exact(FRAME_SLOTS).ok()?;
    words.resize_with(FRAME_SLOTS, AtomicU64::default);
    // Length and capacity are equal, so this does not allocate again.
    Some(words.into_boxed_slice())
}

/// One page of the merged map in memory.
#[derive(Debug)]
pub struct MapPage {
    index: PageIndex,
    words: Frame,
    frames: Arc<Frames>,
    /// Set by look-ups, taken away by the search for a page to evict.
    touched: AtomicBool,
    /// Reservations that will publish into this page; changed under the `table` lock.
    users: AtomicU32,
    /// True from the first unwritten change on; changed under the `table` lock.
    dirty: AtomicBool,
    /// Counts the changes; changed under the `table` lock.
    generation: AtomicU64,
    /// True when a change names bytes that must be durable first; changed under the `table` lock.
    needs_barrier: AtomicBool,
}

impl MapPage {
    /// A page of holes, or `None` while there is no memory for it at all.
    #[must_use]
    pub fn new(index: PageIndex, frames: &Arc<Frames>) -> Option<Self> {
        Some(Self {
            index,
            words: frames.take()?,
            frames: Arc::clone(frames),
            touched: AtomicBool::new(true),
            users: AtomicU32::new(0),
            dirty: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            needs_barrier: AtomicBool::new(false),
        })
    }

    /// Which page it is.
    #[must_use]
    pub fn index(&self) -> PageIndex {
        self.index
    }

    /// The word of a slot.
    ///
    /// Sequentially consistent on both sides: whoever pins an epoch and then sees a mapping here
    /// must be seen by whoever removes the mapping and then counts the pins.
    #[must_use]
    #[inline]
    pub fn word(&self, slot: usize) -> Word {
        Word(self.words[slot].load(Ordering::SeqCst))
    }

    /// Changes the word of a slot. Under the `table` lock only.
    pub fn set_word(&self, slot: usize, word: Word) {
        self.words[slot].store(word.0, Ordering::SeqCst);
    }

    /// Notes a look-up, for the choice of what to evict.
    #[inline]
    pub fn touch(&self) {
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Relaxed);
        }
    }

    /// True when the page was looked at since the last call.
    pub fn take_touch(&self) -> bool {
        self.touched.swap(false, Ordering::Relaxed)
    }

    /// Keeps the page in memory until [`MapPage::unpin`]. Under the `table` lock only.
    pub fn pin(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// Undoes one [`MapPage::pin`]. Under the `table` lock only.
    pub fn unpin(&self) {
        self.users.fetch_sub(1, Ordering::Relaxed);
    }

    /// True when the page must stay in memory.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0 || self.is_dirty()
    }

    /// True while the file does not hold what the page says.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Notes a change; `true` when the page was clean before. Under the `table` lock only.
    pub fn changed(&self) -> bool {
        self.generation.fetch_add(1, Ordering::Relaxed);
        !self.dirty.swap(true, Ordering::Relaxed)
    }

    /// Number of changes so far. Under the `table` lock only.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Notes that a change names bytes that must be durable before the page is written. Under the
    /// `table` lock only.
    pub fn ask_barrier(&self) {
        self.needs_barrier.store(true, Ordering::Relaxed);
    }

    /// True when the data must be synced before the page is written. Under the `table` lock only.
    #[must_use]
    pub fn needs_barrier(&self) -> bool {
        self.needs_barrier.load(Ordering::Relaxed)
    }

    /// The file holds what the page says. Under the `table` lock only.
    pub fn cleaned(&self) {
        self.dirty.store(false, Ordering::Relaxed);
        self.needs_barrier.store(false, Ordering::Relaxed);
    }

    /// Writes the entries of a range of slots as the top's file has them: 0 wherever another level
    /// wins.
    pub fn encode(&self, top: Level, slots: Range<usize>, bytes: &mut [u8]) {
        for (slot, bytes) in slots.zip(bytes.chunks_exact_mut(4)) {
            let word = self.word(slot);
            let merged = planted(Bug::MergedEntryWritten) && word.level().is_some();
            let entry = if word.level() == Some(top) || merged {
                word.entry()
            } else {
                0
            };
            bytes.copy_from_slice(&entry.to_le_bytes());
        }
    }
}

impl Drop for MapPage {
    fn drop(&mut self) {
        self.frames.give_back(std::mem::take(&mut self.words));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_entry_level_and_marks_apart() {
        for level in [0, 1, 252, 65534] {
            for entry in [0, 1, u32::MAX] {
                let word = Word::mapped(Level::new(level), entry);
                assert_eq!(
                    (word.level(), word.entry()),
                    (Some(Level::new(level)), entry)
                );
                let marked = word.covering_lower().bad().pending();
                assert_eq!((marked.level(), marked.entry()), (word.level(), entry));
                assert!(marked.covers_lower() && marked.is_bad() && marked.is_pending());
                assert!(!marked.settled().is_pending());
            }
        }
        assert_eq!(Word::HOLE.pending().level(), None);
    }

    #[test]
    fn entries_of_lower_levels_are_never_written_to_the_top() {
        let frames = Arc::new(Frames::new(1).unwrap());
        let page = MapPage::new(PageIndex(1), &frames).unwrap();
        page.set_word(0, Word::mapped(Level::new(2), 7).covering_lower());
        page.set_word(1, Word::mapped(Level::new(1), 8));
        let mut bytes = [0xff; 12];
        page.encode(Level::new(2), 0..3, &mut bytes);
        assert_eq!(bytes, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
