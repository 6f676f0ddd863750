//! The operator's door: operations on whole disks that are not mounted.
//!
//! Imports: `disk` and lower.
//! Never: serves a request, or prints.
//!
//! [`progress`] is how a long operation tells how far it is, and learns that it is to stop.
//! [`info`] tells what a disk is made of, [`check`] what is wrong with it, [`repair`] mends it,
//! [`create`] makes a new one, [`convert`] one from a [`source`] of any kind, and [`resize`] gives
//! one another size.

pub mod bundle;
pub mod check;
pub mod convert;
pub mod create;
pub mod info;
pub mod merge;
mod program;
pub mod progress;
mod relocate;
pub mod repair;
pub mod resize;
pub mod snapshot;
pub mod source;
