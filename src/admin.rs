//! The operator's door: operations on whole disks that are not mounted.
//!
//! Imports: `disk` and lower.
//! Never: serves a request, or prints.
//!
//! [`progress`] is how a long operation tells how far it is, and learns that it is to stop.
//! [`info`] tells what a disk is made of, [`check`] what is wrong with it, [`repair`] mends it,
//! [`create`] makes a new one, [`copy`] one with the same files, [`resize`] gives one another
//! size, [`compact`] takes from one what it does not need. [`snapshot`] keeps states of it and goes
//! back to them, [`merge`] makes one image of two. A [`source`] is a disk of any kind, to be read:
//! [`map`] tells where its bytes are, [`compare`] whether another one has the same, [`checksum`]
//! sums them up, [`measure`] says what they need, and [`convert`] makes a new disk of them.

pub mod bundle;
pub mod check;
pub mod checksum;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod create;
pub mod info;
pub mod map;
pub mod measure;
pub mod merge;
mod program;
pub mod progress;
mod relocate;
pub mod repair;
pub mod resize;
pub mod snapshot;
pub mod source;
