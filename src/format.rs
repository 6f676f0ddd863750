//! The image format on one page: bytes to validated values, and back.
//!
//! Imports: `units`, `error`.
//! Never: opens a file, takes a lock, or allocates in proportion to a number that it has just read.
//!
//! An image file is a 64-byte [`header`], then the block allocation table ([`bat`]) of one 32-bit
//! entry per disk cluster from byte 64 on, zeros up to the first block, then data clusters. Where
//! each of these lies is [`layout`]'s arithmetic. A closed image may carry a format [`extension`]
//! with dirty bitmaps. Several images make a disk: the bundle's [`descriptor`] names them, and
//! [`names`] reads what people called the snapshots.
//!
//! Every parser is a pure function from bytes with a small error enum of its own that tests can
//! compare. Integers are little-endian throughout. What a valid header has that other programs mind
//! is told by [`oddities`]; the legacy geometry that some look for is made by [`chs`].

pub mod bat;
pub mod chs;
pub mod descriptor;
pub mod extension;
pub mod guid;
pub mod header;
pub mod layout;
pub mod names;
pub mod oddities;
pub mod xml;
