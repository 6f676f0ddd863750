//! How far a long operation has come, and whether it is to end early.
//!
//! One [`Progress`] belongs to one run of a command. The operation counts into it from any number
//! of threads; whoever shows it looks at it from another. It takes no part in the work: what counts
//! costs an atomic addition, and nothing here prints, waits or reads a clock.
//!
//! The user's wish to stop arrives as a flag that the operation asks for between two pieces, at
//! places where what it leaves behind opens: [`Progress::check`].

use crate::error::{Error, ErrorKind, Result};
use crate::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How far an operation has come.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    step: Mutex<Step>,
}

#[derive(Debug, Default)]
struct Step {
    number: u64,
    what: String,
}

/// What [`Progress`] says at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Grows by one with every step; 0 before the first.
    pub step: u64,
    /// What is being done, as `copying`.
    pub what: String,
    /// Bytes that are done of this step.
    pub done: u64,
    /// Bytes that the step has; 0 where it is not known.
    pub total: u64,
}

impl Progress {
    /// Begins the next step of the operation: `total` bytes of `what`, a word as `copying`; 0 for a
    /// number that is not known yet.
    pub fn step(&self, what: &str, total: u64) {
        let mut step = self.step.lock();
        step.number = step.number.saturating_add(1);
        what.clone_into(&mut step.what);
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// The step has this many bytes more than was said.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes more are done; holes that are passed over count like data.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Fails once the user has asked to stop. For the places between two pieces of work where what
    /// is left behind opens.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Interrupted));
        }
        Ok(())
    }

    /// Asks the operation to stop at the next place where it can.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// True once somebody has asked to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// How far it is now. The numbers may be of slightly different moments.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let step = self.step.lock();
        Seen {
            step: step.number,
            what: step.what.clone(),
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    #[test]
    fn threads_count_together_and_a_step_begins_at_nothing() {
        let progress = Progress::default();
        assert_eq!(progress.seen(), Seen::default());
        progress.step("reading", 1000);
        progress.expect(24);
        (0..1024).into_par_iter().for_each(|_| progress.add(1));
        let expected = Seen {
            step: 1,
            what: "reading".to_owned(),
            done: 1024,
            total: 1024,
        };
        assert_eq!(progress.seen(), expected);
        progress.step("copying", 7);
        let seen = progress.seen();
        assert_eq!((seen.step, seen.done, seen.total), (2, 0, 7));
    }

    #[test]
    fn a_wish_to_stop_stays() {
        let progress = Progress::default();
        assert!(progress.check().is_ok());
        progress.cancel();
        progress.step("next", 1);
        assert_eq!(progress.check().unwrap_err().kind(), ErrorKind::Interrupted);
    }
}
