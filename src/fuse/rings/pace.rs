//! When the answers that a thread has made are given to the kernel.
//!
//! Imports: nothing of this crate.
//! Never: lets an answer wait behind a request that is known to take long.
//!
//! A call for each answer would be one call too many for most, so answers wait for each other while
//! requests are served from memory, which is a matter of microseconds. Whether the next request has
//! to wait for the host's disk is not known before; but one that had to is seldom alone. So from
//! then on each answer is given before the next request is served, until one is quick again.

use std::time::Duration;

/// A request that took this long was not served from memory.
const SLOW: Duration = Duration::from_micros(100);
/// So many answers wait for each other at most, so that who asked goes on meanwhile.
const HELD_MAX: usize = 8;

/// What a thread knows of its last requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    is_slow: bool,
    /// Requests served since answers were given.
    held: usize,
}

impl Pace {
    /// Whether what is ready is to be given before the next request is served.
    pub(super) fn gives_before(self, is_large: bool) -> bool {
        self.held > 0 && (is_large || self.is_slow || self.held >= HELD_MAX)
    }

    /// Takes note of a request. Whether what is ready is to be given now.
    pub(super) fn gives_after(&mut self, is_large: bool, took: Duration) -> bool {
        self.is_slow = took >= SLOW;
        self.held += 1;
        is_large || self.is_slow
    }

    /// Another answer was made, of a request that began before.
    pub(super) fn made(&mut self) {
        self.held += 1;
    }

    /// Everything was given.
    pub(super) fn given(&mut self) {
        self.held = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_micros(3);

    #[test]
    fn quick_answers_wait_for_each_other() {
        let mut pace = Pace::default();
        for _ in 0..HELD_MAX {
            assert!(!pace.gives_before(false));
            assert!(!pace.gives_after(false, QUICK));
        }
        assert!(pace.gives_before(false), "not for ever");
        pace.given();
        pace.made();
        assert!(
            pace.gives_before(true),
            "what was begun before is ready too"
        );
        pace.given();
        assert!(!pace.gives_before(false));
    }

    #[test]
    fn nothing_waits_for_what_takes_long() {
        let mut pace = Pace::default();
        assert!(!pace.gives_before(true), "there is nothing yet");
        assert!(!pace.gives_after(false, QUICK));
        assert!(pace.gives_before(true));
        assert!(pace.gives_after(true, QUICK));
        pace.given();
        assert!(pace.gives_after(false, SLOW));
        pace.given();
        // The next one may be as slow; what it finds waiting goes first.
        pace.held = 1;
        assert!(pace.gives_before(false));
        assert!(!pace.gives_after(false, QUICK));
        pace.held = 1;
        assert!(!pace.gives_before(false));
    }
}
