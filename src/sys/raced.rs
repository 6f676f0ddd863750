//! For models: something that two threads may not use at the same time.

use loom::cell::UnsafeCell;

/// Stands for bytes that are used without any lock, in a file for instance. Loom ends a model in
/// which a change of it is not ordered against each other use.
#[derive(Debug, Default)]
pub struct Raced(UnsafeCell<()>);

// SAFETY: there are no bytes in it that could be torn; loom itself keeps account of the accesses,
// on the one thread of the system that runs all threads of a model.
#[allow(unsafe_code)]
unsafe impl Sync for Raced {}

impl Raced {
    /// Reads it.
    pub fn read(&self) {
        self.0.with(|_| ());
    }

    /// Changes it.
    pub fn change(&self) {
        self.0.with_mut(|_| ());
    }
}
