//! A heap that refuses large pieces where a run's ration says so.
//!
//! Of what is asked for only some is counted and refused: pieces over 4 KiB, and those over 1 KiB
//! that are neither zeroed (the buffers of small requests are) nor just a page. On all others the
//! disk may count. A test program that wants this makes [`HEAP`] its global allocator; in others a
//! ration has no effect.

// Programs that mount have it among their helpers as well.
#[allow(clippy::duplicate_mod)]
#[path = "../support/heap.rs"]
mod watched;

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// What any host gives.
const MOST: usize = 1024;

/// Larger pieces the disk never counts on.
const PAGE: usize = 4096;

/// The heap of a program.
pub(crate) type Heap = watched::Heap<Rationed>;

/// One.
pub(crate) const HEAP: Heap = watched::Heap(Rationed);

/// Which large pieces are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Scarcity {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// One, counted from 0.
    Nth(u64),
    /// That one and all after it.
    From(u64),
}

/// What the threads of one run get of memory.
#[derive(Debug)]
pub(crate) struct Ration {
    scarcity: Scarcity,
    asked: AtomicU64,
    refused: AtomicU64,
}

thread_local! {
    static RATION: Cell<Option<&'static Ration>> = const { Cell::new(None) };
}

/// Runs something on this thread with the memory of a ration, or with plenty of it.
pub(crate) fn with<T>(ration: Option<&'static Ration>, what: impl FnOnce() -> T) -> T {
    struct Back(Option<&'static Ration>);
    impl Drop for Back {
        fn drop(&mut self) {
            RATION.set(self.0);
        }
    }
    let _back = Back(RATION.replace(ration));
    what()
}

impl Ration {
    /// A ration for one run. It is never freed, as threads may ask it until they have ended.
    pub(crate) fn new(scarcity: Scarcity) -> &'static Self {
        Box::leak(Box::new(Self {
            scarcity,
            asked: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }))
    }

    /// Large pieces that were asked for.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    /// Large pieces that were refused.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::SeqCst)
    }

    fn gives_next(&self) -> bool {
        let number = self.asked.fetch_add(1, Ordering::SeqCst);
        let refuses = match self.scarcity {
            Scarcity::None => false,
            Scarcity::All => true,
            Scarcity::Nth(nth) => number == nth,
            Scarcity::From(nth) => number >= nth,
        };
        self.refused.fetch_add(u64::from(refuses), Ordering::SeqCst);
        !refuses
    }
}

/// Asks the ration of the calling thread.
#[derive(Debug)]
pub(crate) struct Rationed;

impl watched::Watcher for Rationed {
    fn gives(&self, size: usize, zeroed: bool) -> bool {
        let may_fail = size > PAGE || size > MOST && size < PAGE && !zeroed;
        !may_fail || RATION.get().is_none_or(Ration::gives_next)
    }
}
