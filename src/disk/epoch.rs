//! Who may still use a file cluster that has been freed.
//!
//! A request pins the current epoch before it looks anything up, and unpins after its last byte has
//! moved. Whoever frees clusters removes them from the map first and then ends the epoch; when
//! nobody of that epoch is left, nobody can hold a place that the map no longer gives out. Pins of
//! earlier epochs are gone by then: an epoch is ended only after the one before has drained.
//!
//! The order that all of this rests on is sequential consistency: count then look up on one side,
//! remove then end the epoch then read the count on the other.

use crate::atomics::{AtomicU64, Ordering};

/// The epoch that runs now, and how many requests each of the last two still has.
#[derive(Debug, Default)]
pub struct Epochs {
    current: AtomicU64,
    pins: [AtomicU64; 2],
}

/// Keeps its epoch from draining.
#[derive(Debug)]
pub struct Pin<'a> {
    count: &'a AtomicU64,
    epoch: u64,
}

impl Pin<'_> {
    /// Leaves the epoch pinned when this goes, until [`Epochs::unpin`] is told its number.
    #[must_use]
    pub fn leave(self) -> u64 {
        let epoch = self.epoch;
        std::mem::forget(self);
        epoch
    }
}

impl Epochs {
    fn count(&self, epoch: u64) -> &AtomicU64 {
        &self.pins[usize::from(epoch % 2 == 1)]
    }

    /// Pins the current epoch.
    #[must_use]
    #[inline]
    pub fn pin(&self) -> Pin<'_> {
        loop {
            let epoch = self.current.load(Ordering::SeqCst);
            let count = self.count(epoch);
            count.fetch_add(1, Ordering::SeqCst);
            let pin = Pin { count, epoch };
            // Had the epoch ended between the two, nobody might wait for this pin.
            if self.current.load(Ordering::SeqCst) == epoch {
                return pin;
            }
        }
    }

    /// Ends a pin that was left.
    pub fn unpin(&self, epoch: u64) {
        let count = self.count(epoch);
        drop(Pin { count, epoch });
    }

    /// The epoch that runs now.
    #[must_use]
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::SeqCst)
    }

    /// Ends the current epoch and returns its number. The epoch before it must have drained.
    pub fn end(&self) -> u64 {
        self.current.fetch_add(1, Ordering::SeqCst)
    }

    /// True when no request of an ended epoch is left.
    #[must_use]
    pub fn has_drained(&self, epoch: u64) -> bool {
        self.count(epoch).load(Ordering::SeqCst) == 0
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_drains_when_its_last_pin_goes() {
        let epochs = Epochs::default();
        let first = epochs.pin();
        let ended = epochs.end();
        let second = epochs.pin();
        assert!(!epochs.has_drained(ended));
        drop(first);
        assert!(
            epochs.has_drained(ended),
            "a pin of the next epoch must not count"
        );
        let ended = epochs.end();
        assert!(!epochs.has_drained(ended));
        drop(second);
        assert!(epochs.has_drained(ended));
        let left = epochs.pin().leave();
        let ended = epochs.end();
        assert!(!epochs.has_drained(ended), "a pin that was left stays");
        epochs.unpin(left);
        assert!(epochs.has_drained(ended));
    }
}
