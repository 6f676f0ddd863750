//! Keeps what is written but not on the medium yet within what memory allows.
//!
//! Writes go to the host's page cache, which a memory control group counts. Where the group is
//! small, pages that wait for the medium can fill it, and the host then kills the process: memory
//! pressure would have become an I/O error for everybody above. So in a small group each file's
//! writes take turns, and wait for the medium after every window of bytes. Elsewhere nothing
//! happens but a look at the limit after every few MiB, and not more than a hundred times a second:
//! it opens several files of the host, and from memory a few MiB move in less time than that takes.
//!
//! Pages that are being read cannot be given back either. One large read for each thread can be all
//! that a small group has, so there those take turns as well, and what has been read or written is
//! not left in the cache.
//!
//! The wait uses a description of the file of its own. Waiting reports a failed write-back once to
//! each description, and that report belongs to the sync of a flush, on the other one.

use crate::sys::file as sys;
use crate::sys::memory;
use parking_lot::{Mutex, MutexGuard};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes that move between two looks at the limit, at least.
const LOOK_AFTER: u64 = 4 << 20;
/// Time between two looks, at least.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
/// Groups with at least this much memory are left to the host.
const ROOMY: u64 = 1 << 30;
const WINDOW_MIN: u64 = 1 << 20;
/// Shorter reads never take turns.
const LARGE_READ: u64 = 64 << 10;
const UNLIMITED: u64 = u64::MAX;

/// Bytes that may be unwritten in one file.
static WINDOW: AtomicU64 = AtomicU64::new(UNLIMITED);
static SINCE_LOOK: AtomicU64 = AtomicU64::new(0);
static LOOKED: Mutex<Option<Instant>> = Mutex::new(None);
/// Held over a large read in a small group, whatever the file.
static READING: Mutex<()> = Mutex::new(());

/// The pace of one file.
#[derive(Debug, Default)]
pub(super) struct Pace {
    turn: Mutex<()>,
    unwritten: AtomicU64,
    cached: AtomicU64,
    /// Something could not be written back; from then on nothing is let go.
    failed: AtomicBool,
    waiter: OnceLock<Option<File>>,
}

fn window() -> u64 {
    WINDOW.load(Ordering::Relaxed)
}

fn look() {
    let window = match memory::cgroup_limit() {
        Some(limit) if limit < ROOMY => (limit / 8).max(WINDOW_MIN),
        _ => UNLIMITED,
    };
    if WINDOW.swap(window, Ordering::Relaxed) != window && window != UNLIMITED {
        log::info!(
            "memory is limited: at most {} KiB of a file wait to be written",
            window >> 10
        );
    }
}

/// Whether it is time for another look, which this one is then.
fn is_due(looked: &mut Option<Instant>, now: Instant) -> bool {
    let is_due = looked.is_none_or(|last| now.saturating_duration_since(last) >= LOOK_PAUSE);
    if is_due {
        *looked = Some(now);
    }
    is_due
}

/// Counts bytes that move, and looks at the limit now and then.
fn moved(bytes: u64) {
    let since = SINCE_LOOK.fetch_add(bytes, Ordering::Relaxed);
    if since.saturating_add(bytes) < LOOK_AFTER {
        return;
    }
    // Whoever has it looks for all.
    let Some(mut looked) = LOOKED.try_lock() else {
        return;
    };
    if is_due(&mut looked, Instant::now()) {
        SINCE_LOOK.store(0, Ordering::Relaxed);
        look();
    }
}

/// Whether large readers take turns.
pub(super) fn is_tight() -> bool {
    window() != UNLIMITED
}

/// Waits for this reader's turn, where readers of so much take turns.
pub(super) fn read_turn(bytes: u64) -> Option<MutexGuard<'static, ()>> {
    if bytes < LARGE_READ {
        return None;
    }
    moved(bytes);
    (window() != UNLIMITED).then(|| READING.lock())
}

impl Pace {
    /// Waits for this writer's turn, where writers take turns.
    pub(super) fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        (window() != UNLIMITED).then(|| self.turn.lock())
    }

    /// Notes bytes that were written, and waits for the medium where a window is full.
    pub(super) fn wrote(&self, file: &File, bytes: u64) {
        moved(bytes);
        let window = window();
        if window == UNLIMITED {
            return;
        }
        let unwritten = self
            .unwritten
            .fetch_add(bytes, Ordering::Relaxed)
            .saturating_add(bytes);
        if unwritten < window {
            return;
        }
        self.unwritten.store(0, Ordering::Relaxed);
        let waiter = self
            .waiter
            .get_or_init(|| File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok());
        if let Some(Err(e)) = waiter
            .as_ref()
            .map(|waiter| sys::write_back(waiter.as_fd()))
        {
            // The flush that covers these bytes meets the same failure, and acts on it. Until then
            // the cache is the only place that has them, and the host takes them for written.
            self.failed.store(true, Ordering::SeqCst);
            log::warn!("writing back early failed: {e}");
        }
        self.let_go(file);
    }

    /// Notes bytes that were read, and lets go of what is cached where a window is full.
    pub(super) fn read(&self, file: &File, bytes: u64) {
        let window = window();
        if window == UNLIMITED {
            return;
        }
        let cached = self.cached.fetch_add(bytes, Ordering::Relaxed);
        if cached.saturating_add(bytes) >= window {
            self.let_go(file);
        }
    }

    /// Frees the file's clean pages. Left to itself, a host with large pages in a small group may
    /// find none that it can free at the moment, and kill.
    fn let_go(&self, file: &File) {
        if self.failed.load(Ordering::SeqCst) {
            return;
        }
        self.cached.store(0, Ordering::Relaxed);
        if let Err(e) = sys::drop_cache(file.as_fd()) {
            log::debug!("the host keeps what it has cached: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_looked_at_from_time_to_time() {
        let start = Instant::now();
        let mut looked = None;
        assert!(is_due(&mut looked, start), "the first bytes want to know");
        assert!(!is_due(&mut looked, start));
        let soon = start + LOOK_PAUSE;
        assert!(!is_due(&mut looked, soon - Duration::from_nanos(1)));
        assert!(is_due(&mut looked, soon));
        assert_eq!(looked, Some(soon));
    }
}
