//! A heap that gives a thread nothing over 4 KiB while it is told so.
//!
//! A test program that wants this makes [`Heap`] its global allocator; in others the switch has no
//! effect.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most that is given where memory is scarce.
const MOST: usize = 4096;

/// The heap of the program.
pub(crate) struct Heap;

static REFUSED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static SCARCE: Cell<bool> = const { Cell::new(false) };
}

/// Runs something on this thread with scarce memory, or with plenty of it.
pub(crate) fn with<T>(scarce: bool, what: impl FnOnce() -> T) -> T {
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            SCARCE.set(self.0);
        }
    }
    let _back = Back(SCARCE.replace(scarce));
    what()
}

/// Allocations that were refused so far.
pub(crate) fn refused() -> u64 {
    REFUSED.load(Ordering::SeqCst)
}

fn refuses(size: usize) -> bool {
    let refuses = size > MOST && SCARCE.try_with(Cell::get).unwrap_or(false);
    if refuses {
        REFUSED.fetch_add(1, Ordering::SeqCst);
    }
    refuses
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
