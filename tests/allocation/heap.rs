//! A heap that counts, and that fails everything over 4 KiB once it is armed.
//!
//! Imports: `support` (heap).
//! Never: allocates on its own, except to tell where a refusal came from when asked for that.

use crate::support::heap::{Heap, Watcher};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The most that an armed heap gives at a time.
pub(crate) const MOST: usize = 4096;

/// With this variable in the environment every refusal is told with a backtrace.
pub(crate) const TELL: &str = "PLOOPFS_TELL_REFUSALS";

/// The heap of this program.
pub(crate) const HEAP: Heap<Counting> = Heap(Counting);

/// Counts, and refuses once it is armed.
#[derive(Debug)]
pub(crate) struct Counting;

static ARMED: AtomicBool = AtomicBool::new(false);
static TELLING: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNT_HERE: Cell<u64> = const { Cell::new(0) };
    /// This thread is telling of a refusal and gets what it asks for.
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

/// Allocations so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// By the calling thread.
    pub(crate) here: u64,
    /// By all threads of the process.
    pub(crate) all: u64,
}

impl Counts {
    /// Until now.
    pub(crate) fn now() -> Self {
        Self {
            here: COUNT_HERE.get(),
            all: COUNT.load(Ordering::SeqCst),
        }
    }

    /// Since an earlier count.
    pub(crate) fn since(before: Self) -> Self {
        let now = Self::now();
        Self {
            here: now.here - before.here,
            all: now.all - before.all,
        }
    }
}

/// From now on every allocation over [`MOST`] fails, on all threads.
pub(crate) fn arm() {
    TELLING.store(std::env::var_os(TELL).is_some(), Ordering::SeqCst);
    ARMED.store(true, Ordering::SeqCst);
}

/// Allocations that were refused.
pub(crate) fn refused() -> u64 {
    REFUSED.load(Ordering::SeqCst)
}

impl Watcher for Counting {
    fn gives(&self, size: usize, _zeroed: bool) -> bool {
        COUNT.fetch_add(1, Ordering::SeqCst);
        COUNT_HERE.set(COUNT_HERE.get() + 1);
        if size <= MOST || !ARMED.load(Ordering::Relaxed) || EXEMPT.get() {
            return true;
        }
        REFUSED.fetch_add(1, Ordering::SeqCst);
        if TELLING.load(Ordering::Relaxed) {
            EXEMPT.set(true);
            eprintln!("refused {size} bytes:\n{}", Backtrace::force_capture());
            EXEMPT.set(false);
        }
        false
    }
}
