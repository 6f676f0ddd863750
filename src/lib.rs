//! ploopfs: ploop and Parallels disk images as flat files, read and write, in user space.
//!
//! The house has floors; a room imports only from floors below its own.
//!
//! ```text
//!  7  cli                     words in, words out, exit codes
//!  6  fuse        admin       the kernel's door  |  the operator's door
//!  5  disk                    the flat disk: read, write, flush, discard
//!  4  chain                   deltas stacked by level; who maps this cluster?
//!  3  delta                   one image file: header, free clusters, in-use mark
//!  2  plan                    pure decisions
//!  1  format      storage     bytes <-> values   |  the only door to host files
//!  0  units  error  sys       numbers with meaning; what went wrong; the host's calls
//! ```

pub mod admin;
pub mod chain;
pub mod cli;
pub mod delta;
pub mod disk;
pub mod error;
pub mod format;
pub mod fuse;
pub mod plan;
pub mod storage;
pub mod sys;
pub mod units;
