//! ploopfs: ploop and Parallels disk images as flat files, read and write, in user space.
//!
//! # The house
//!
//! Rooms stand on floors; a room imports only from floors below its own, and never a sibling.
//! `tests/tidy` holds the code to it.
//!
//! ```text
//!  7  cli                     words in, words out, exit codes
//!  6  fuse        admin       the kernel's door  |  the operator's door
//!  5  disk                    the flat disk: read, write, flush, discard
//!  4  chain                   deltas stacked by level; who maps this cluster?
//!  3  delta                   one image file: header, free clusters, in-use mark
//!  2  plan        journal     pure decisions     |  the way back from a repair
//!  1  format      storage     bytes <-> values   |  the only door to host files
//!  0  units  error  sys  atomics  sync  planted   numbers; errors; the host's calls; waiting
//! ```
//!
//! # Words
//!
//! The *disk* is what users see, flat; a *file* is an image on the host. Both are cut into
//! *clusters*. A file's block allocation table (*BAT*) has one *entry* for each disk cluster; 0
//! says that this file does not map it. Files stacked over each other are *deltas*: each has a
//! *level*, the base 0, and the *top* is the only one that is ever written. Together they are a
//! *chain*. What no level maps is a *hole*. A *bundle* is the directory of one disk, with its
//! *descriptor*.
//!
//! # Follow a 4 KiB read
//!
//! 1. The kernel sends READ; a session thread of [`fuse`] finds the node and calls
//!    [`disk::Disk::read`] with a buffer that is the thread's own.
//! 2. The request's *order* (log2 of its 4 KiB pages) is below the threshold, so it stays on this
//!    thread. It pins the *epoch* ([`disk::epoch`]): what it finds in the map from now on stays
//!    usable until it unpins.
//! 3. [`plan::plan_read`] cuts the request at cluster borders and asks the map ([`chain::map`])
//!    where each piece is: one atomic word per cluster says which level has it, and where.
//! 4. Each piece becomes a segment, neighbours are merged, and [`disk::read`] fills the buffer:
//!    zeros for holes, one `pread` of a level's file for data.
//! 5. The reply goes out from the same buffer. No lock, no heap, one read of a file.
//!
//! # Follow a write to a hole
//!
//! 1. [`disk::Disk::write`] tries it in place and finds a cluster without a place: it copies the
//!    payload to a buffer of the reserve ([`disk::buffers`]) and hands the request to the pool.
//! 2. There, [`disk::write`](mod@disk::write) reserves file clusters under the `table` lock, all
//!    or none; if the file is too short it grows first.
//! 3. It fills what the write does not cover from the lower level, writes the payload, and only
//!    then publishes the new words in the map. The reply goes out.
//! 4. Until the next flush the entry is in memory only. [`disk::flush`] makes it durable: first the
//!    data, then the table, each with a sync, in an order that no power cut can turn against the
//!    disk.
//!
//! # Where to look
//!
//! * What do these bytes of an image mean? [`mod@format`], and the manual page `ploopfs-image(5)`.
//! * What may be written when? [`disk::flush`], [`disk::write`](mod@disk::write), [`disk::zero`],
//!   [`delta::in_use`].
//! * When may a freed cluster be used again? [`delta::alloc`], [`disk::epoch`].
//! * How are the files of a bundle found, opened and locked? [`chain::bundle`], [`storage::host`],
//!   [`storage::lock`].
//! * How are threads and clocks kept out of the way of tests? [`sync`]; which bugs do they plant?
//!   [`planted`].
//! * How is a bundle changed, and what may a power cut leave of that? [`admin::bundle`],
//!   [`admin::merge`], [`admin::snapshot`].
//! * How is a disk changed while nobody has it open? [`admin`]; its steps are numbered where they
//!   are made: [`admin::repair`], [`admin::resize`], [`admin::merge`], [`admin::bundle`].
//! * How do the file systems on a disk give back what they do not use? [`fuse::volumes`],
//!   [`fuse::trim`](mod@fuse::trim).
//! * What happens at open? [`disk::open`](mod@disk::open).
//! * How is a disk of any kind read, ours or another program's? [`admin::source`].
//! * How does a mount start and end? [`fuse::daemon`], [`fuse::signals`], [`cli`].
//! * What does the mount show? [`fuse`].

pub mod admin;
pub mod atomics;
pub mod chain;
pub mod cli;
pub mod delta;
pub mod disk;
pub mod error;
pub mod format;
pub mod fuse;
pub mod journal;
pub mod plan;
pub mod planted;
pub mod storage;
pub mod sync;
pub mod sys;
pub mod units;
