//! One image file's truth: its header, its table, which of its clusters are free, its in-use mark.
//!
//! Imports: `plan` and lower.
//! Never: knows of other deltas.
//!
//! [`image::Image`] is an open file whose header holds together. [`survey`] walks its whole table
//! once, as every read-write open does, and tells what is wrong and which clusters are used, by
//! what [`classify`] says of each entry that [`walk`] reads. [`extension`] reads the format
//! extension. [`alloc::Allocator`] hands out free clusters and keeps freed ones apart until they
//! may be used again. [`in_use::InUseMark`] owns the header's bytes while the image is written to.
//! [`create`] writes a new image.

pub mod alloc;
pub mod bits;
pub mod classify;
pub mod create;
pub mod extension;
pub mod image;
pub mod in_use;
pub mod survey;
pub mod walk;
