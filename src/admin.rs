//! The operator's door: operations on whole disks that are not mounted.
//!
//! Imports: `chain` and lower.
//! Never: serves a request, or prints.
//!
//! [`progress`] is how a long operation tells how far it is, and learns that it is to stop.
//! [`info`] tells what a disk is made of, [`check`] what is wrong with it, and [`repair`] mends it.
//! [`resize`] gives a disk another size.

pub mod check;
pub mod info;
pub mod progress;
mod relocate;
pub mod repair;
pub mod resize;
