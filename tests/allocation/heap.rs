//! An allocator that counts, and that fails everything over 4 KiB once it is armed.
//!
//! Imports: std.
//! Never: allocates on its own, except to tell where a refusal came from when asked for that.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The most that an armed heap gives at a time.
pub(crate) const MOST: usize = 4096;

/// With this variable in the environment every refusal is told with a backtrace.
pub(crate) const TELL: &str = "PLOOPFS_TELL_REFUSALS";

/// The heap of this program.
pub(crate) struct Heap;

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

/// Counts an allocation; true when it must fail.
fn refuses(size: usize) -> bool {
    COUNT.fetch_add(1, Ordering::SeqCst);
    COUNT_HERE.set(COUNT_HERE.get() + 1);
    if size <= MOST || !ARMED.load(Ordering::Relaxed) || EXEMPT.get() {
        return false;
    }
    REFUSED.fetch_add(1, Ordering::SeqCst);
    if TELLING.load(Ordering::Relaxed) {
        EXEMPT.set(true);
        eprintln!("refused {size} bytes:\n{}", Backtrace::force_capture());
        EXEMPT.set(false);
    }
    true
}

// SAFETY: every call goes to the system's allocator unchanged, or fails by a null pointer, which
// the contract of each method allows.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if refuses(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller keeps the contract of this method, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if refuses(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if refuses(size) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above; all memory that this heap gives is the system's.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
