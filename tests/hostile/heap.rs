//! What a thread has used: memory, by a heap that counts, and time.
//!
//! Imports: `support` (heap); std, `libc`.
//! Never: allocates on its own.
#![allow(unsafe_code)]

use crate::support::heap::{Heap, Watcher};
use std::cell::Cell;

/// The heap of this program.
pub(crate) const HEAP: Heap<Counting> = Heap(Counting);

/// Counts bytes by thread.
#[derive(Debug)]
pub(crate) struct Counting;

thread_local! {
    /// Bytes taken less bytes given back; another thread's may be among the latter.
    static TAKEN: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: usize, sign: i64) {
    // A thread that ends has no counters any more.
    let _ = TAKEN.try_with(|taken| {
        let now = taken.get() + sign * bytes as i64;
        taken.set(now);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
    });
}

/// Runs something and tells the most bytes that this thread had taken for it at a time.
pub(crate) fn peak_of<T>(what: impl FnOnce() -> T) -> (T, i64) {
    let before = TAKEN.get();
    PEAK.set(before);
    let result = what();
    (result, PEAK.get() - before)
}

/// Nanoseconds that this thread has been running.
pub(crate) fn cpu_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a value that lives until the call returns.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    assert_eq!(failed, 0, "every Linux has this clock");
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Watcher for Counting {
    fn gives(&self, size: usize, _zeroed: bool) -> bool {
        count(size, 1);
        true
    }

    fn takes_back(&self, size: usize) {
        count(size, -1);
    }
}
