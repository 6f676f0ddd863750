//! What is known of a part's file, and asked on the way of every write, without its locks.

use crate::atomics::{AtomicBool, Ordering};

/// Whether bytes reached the file since the last sync of it began.
///
/// It is set after the bytes are down and before the reply, and cleared before the sync: a flush
/// that clears it in between syncs those bytes, one that runs later sees it set. Set before the
/// bytes, or cleared after the sync, it would let a flush pass over what was answered.
#[derive(Debug, Default)]
pub struct Unsynced(AtomicBool);

impl Unsynced {
    /// Bytes are down.
    ///
    /// An exchange, not a plain store: whoever takes the note of a later writer then comes after
    /// the bytes of this one too. On x86 it is the same instruction.
    #[inline]
    pub fn note(&self) {
        self.0.swap(true, Ordering::SeqCst);
    }

    /// True when there is something to sync.
    #[must_use]
    pub fn is_noted(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// True when there is something to sync; the caller now does so.
    #[must_use]
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}

/// Whether the file may be changed: its in-use mark is durable.
///
/// Opened and closed under the `flush` lock; whoever sees it open also sees all that was done
/// before.
#[derive(Debug)]
pub struct Gate(AtomicBool);

impl Gate {
    /// A gate in this state.
    #[must_use]
    pub fn new(open: bool) -> Self {
        Self(AtomicBool::new(open))
    }

    /// True while the file may be changed.
    #[must_use]
    #[inline]
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The mark is durable.
    pub fn open(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// The mark is about to go, or has gone.
    pub fn close(&self) {
        self.0.store(false, Ordering::Release);
    }
}
