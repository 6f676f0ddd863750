//! The operator's door: operations on whole disks that are not mounted.
//!
//! Imports: `disk` and lower.
//! Never: serves a request, or prints.
//!
//! [`progress`] is how a long operation tells how far it is, and learns that it is to stop.
//! A [`source`] is a disk of any kind, to be read: [`map`] tells where its bytes are, [`compare`]
//! whether another one has the same, [`checksum`] sums them up, [`measure`] says what they need.
//! [`info`] tells what a disk is made of, [`check`] what is wrong with it, [`repair`] mends it,
//! [`create`] makes a new one, and [`resize`] gives one another size.

pub mod bundle;
pub mod check;
pub mod checksum;
pub mod compare;
pub mod create;
pub mod info;
pub mod map;
pub mod measure;
pub mod merge;
pub mod progress;
mod relocate;
pub mod repair;
pub mod resize;
pub mod snapshot;
pub mod source;
