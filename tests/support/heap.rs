//! The heap of a test program: the system's, behind a watcher that counts and may refuse.
//!
//! Imports: std.
//! Never: allocates on its own.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

/// Sees all that the program takes from its heap and gives back. Called within allocations, so it
/// must not allocate without being ready to be called again.
pub(crate) trait Watcher {
    /// So many bytes are asked for, zeroed or not; `false` refuses them.
    fn gives(&self, size: usize, zeroed: bool) -> bool;

    /// So many bytes come back.
    fn takes_back(&self, _size: usize) {}
}

/// A heap with its watcher.
#[derive(Debug)]
pub(crate) struct Heap<W>(pub(crate) W);

// SAFETY: every call goes to the system's allocator unchanged, or fails by a null pointer, which
// the contract of each method allows.
unsafe impl<W: Watcher> GlobalAlloc for Heap<W> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !self.0.gives(layout.size(), false) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller keeps the contract of this method, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !self.0.gives(layout.size(), true) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !self.0.gives(size, false) {
            return std::ptr::null_mut();
        }
        self.0.takes_back(layout.size());
        // SAFETY: as above; all memory that this heap gives is the system's.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        self.0.takes_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}
