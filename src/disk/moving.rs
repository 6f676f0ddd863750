//! Requests whose bytes the transport moves itself, between the file and the memory that it has.
//!
//! Where all goes past the host's page cache, a request that lies in one piece of one file needs
//! nothing but that the device does it. A transport which can ask the host for that without waiting
//! gets a [`Moving`] for it, and ends it when the host has answered. Until then it holds all that a
//! thread would hold while it reads or writes:
//!
//! 1. the epoch, pinned before the look-up: nobody else gets the file's clusters meanwhile;
//! 2. a loan of the file, which for a write keeps from its blocks who has less than a block;
//! 3. its place among the requests under way: the disk is not closed before.
//!
//! They are let go in that order's reverse but for the last, and for a write the note that there is
//! unsynced data comes before all of it, so that it is made while the bytes' place is still theirs
//! and before the reply: see `write`. Dropped unused, a `Moving` lets go of all in the same way.
//!
//! What the host did in part, or not for reasons that pass, is done once more from the beginning in
//! the pool, which may wait, and which knows what to do when space is short. Whatever came of it by
//! then is overwritten by the same bytes.

use super::Disk;
use super::part::Part;
use crate::error::{Error, Result};
use crate::storage::SharedStorage;
pub use crate::storage::Way;
use crate::units::{DiskOffset, FileOffset, Level};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Keeps an epoch of a part from draining.
#[derive(Debug)]
pub(super) struct Pinned {
    parts: Arc<Vec<Part>>,
    index: usize,
    epoch: u64,
}

impl Pinned {
    pub(super) fn new(parts: Arc<Vec<Part>>, index: usize) -> Self {
        let epoch = parts[index].epochs.pin().leave();
        Self {
            parts,
            index,
            epoch,
        }
    }

    pub(super) fn part(&self) -> &Part {
        &self.parts[self.index]
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.part().epochs.unpin(self.epoch);
    }
}

/// Bytes of one file that are lent.
#[derive(Debug)]
pub(super) struct Run {
    pinned: Pinned,
    level: Level,
    at: FileOffset,
    len: usize,
    way: Way,
}

impl Run {
    /// Borrows the range of the file for these bytes, if that can be had without waiting.
    pub(super) fn borrow(
        pinned: Pinned,
        (level, at): (Level, FileOffset),
        memory: &[u8],
        way: Way,
    ) -> Option<Self> {
        let storage = pinned.part().chain.level(level).storage();
        let is_lent = storage.lend(at, memory, way);
        // Made only then, as it gives the loan back when it goes.
        is_lent.then(|| Self {
            pinned,
            level,
            at,
            len: memory.len(),
            way,
        })
    }

    fn storage(&self) -> &SharedStorage {
        self.pinned.part().chain.level(self.level).storage()
    }

    /// What became of it, as a read or a write of the file says it; `None` where that is to be
    /// tried again.
    fn outcome(&self, result: io::Result<usize>) -> Option<Result<()>> {
        let error = match result {
            Ok(moved) => return (moved == self.len).then_some(Ok(())),
            Err(e) => e,
        };
        if let Some(libc::EAGAIN | libc::EINTR | libc::ECANCELED | libc::ENOMEM) =
            error.raw_os_error()
        {
            return None;
        }
        let path = self.pinned.part().chain.level(self.level).path();
        let error = Error::from(error).at_offset(self.at);
        match self.way {
            Way::Read => Some(Err(error.at_level(self.level).in_file(path))),
            Way::Write if error.is_no_space() => None,
            Way::Write => Some(Err(error.in_file(path))),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.way == Way::Write {
            // On failure too: part of it may be down.
            self.pinned.part().note_data();
        }
        self.storage().give_back(self.at, self.len, self.way);
    }
}

/// A request under way, which the disk is not closed without.
#[derive(Debug)]
pub(super) struct UnderWay(Arc<Disk>);

impl UnderWay {
    /// `None` once the disk is closed.
    pub(super) fn new(disk: &Arc<Disk>) -> Option<Self> {
        disk.enters().then(|| Self(Arc::clone(disk)))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.job_finished();
    }
}

/// A request for the transport to carry out.
#[derive(Debug)]
pub struct Moving {
    run: Run,
    at: DiskOffset,
    request: UnderWay,
}

impl Moving {
    pub(super) fn new(run: Run, at: DiskOffset, request: UnderWay) -> Self {
        Self { run, at, request }
    }

    /// Whether it reads or writes.
    #[must_use]
    pub fn way(&self) -> Way {
        self.run.way
    }

    /// The place in the file.
    #[must_use]
    pub fn at(&self) -> FileOffset {
        self.run.at
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.run.len
    }

    /// The file, open as long as this lives.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.run.storage().as_host_fd()
    }

    /// Ends a read, of which so many bytes have come, and answers it.
    pub fn came<R: super::ReadInto>(self, result: io::Result<usize>, target: R) {
        let Self { run, at, request } = self;
        let (outcome, len) = (run.outcome(result), run.len);
        drop(run);
        match outcome {
            Some(outcome) => target.done(outcome.map(|()| len)),
            None => request.0.read_in_pool(at, len, 0, target),
        }
        drop(request);
    }

    /// Ends a write, of which so many bytes were taken, and answers it.
    pub fn written<R: super::DoneReply>(self, result: io::Result<usize>, reply: R) {
        let Self { run, at, request } = self;
        let outcome = run.outcome(result);
        drop(run);
        match outcome {
            Some(outcome) => request.0.answer_write(outcome, reply),
            None => request.0.write_again(at, reply),
        }
        drop(request);
    }
}

#[cfg(test)]
mod tests;
