//! Odd images on demand, and the dumbest reader that can be written: the tests' oracle.
//!
//! Imports: std, `md5`, `roxmltree`; nothing of ploopfs.
//! Never: shares a line with the code that it judges.
//!
//! [`content`] says what every sector of a forged disk holds, as a pure function, so that no test
//! stores expected bytes. [`image`] writes one image file, [`extension`] its dirty bitmap,
//! [`bundle`] a whole disk of parts and chains with its descriptor, [`corrupt`] breaks any of them
//! in named ways, and [`reader`] reads and strictly checks what others wrote.

// Each test that includes this uses a part of it.
#![allow(dead_code)]

pub(crate) mod bundle;
pub(crate) mod content;
pub(crate) mod corrupt;
pub(crate) mod extension;
pub(crate) mod image;
pub(crate) mod reader;
