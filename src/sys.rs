//! The host's system calls that the standard library lacks: the one room with `unsafe` in it.
//!
//! Imports: nothing of this crate.
//! Never: decides anything. Each function is one call, or one loop around it, with its arguments
//! and results in plain types; errors are `io::Error` with the raw errno.

pub mod directory;
pub mod file;
pub mod lock;
pub mod loopdev;
pub mod memory;
pub mod mount;
pub mod open;
pub mod process;
#[cfg(all(test, feature = "loom"))]
pub mod raced;
pub mod random;
pub mod trim;
pub mod uring;
