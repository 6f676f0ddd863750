//! The operator's door: operations on whole disks that are not mounted.
//!
//! Imports: `disk` and lower.
//! Never: serves a request, or prints.
//!
//! [`progress`] is how a long operation tells how far it is, and learns that it is to stop.
//! [`info`] tells what a disk is made of, [`check`] what is wrong with it, [`repair`] mends it,
//! [`create`] makes a new one, [`resize`] gives one another size, [`compact`] takes from one what
//! it does not need, and [`snapshot`] and [`merge`] change the tree of its images.

pub mod bundle;
pub mod check;
pub mod compact;
pub mod create;
pub mod info;
pub mod merge;
pub mod progress;
mod relocate;
pub mod repair;
pub mod resize;
pub mod snapshot;
pub mod source;
