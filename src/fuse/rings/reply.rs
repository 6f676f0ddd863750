//! Answers in slots.
//!
//! Imports: `disk`, `error`, `units`, `fuse::{answer, device, dispatch, errno, wire}`, `sys`.
//! Never: touches a slot's memory after it has been given away.
//!
//! An answer that is made on a ring's thread waits for the end of that thread's turn; one that is
//! made elsewhere, in the pool or by the flusher, goes to the thread that the slot is at home with.

use super::Shared;
use crate::disk::{Disk, DoneReply, ReadInto};
use crate::error::Result;
use crate::fuse::answer::{Reading, Reply, Writing, owed};
use crate::fuse::device::Taken;
use crate::fuse::dispatch::{Answering, Request};
use crate::fuse::{errno, wire};
use crate::sys::uring::Slot;
use crate::units::DiskOffset;
use fuser::Errno;
use std::cell::RefCell;
use std::io;
use std::sync::Arc;

thread_local! {
    /// Answers made on a ring's thread, which it gives to the kernel together.
    static MADE: RefCell<Option<Vec<Slot>>> = const { RefCell::new(None) };
}

/// Makes this a thread whose answers wait for [`take_made`]; never more of them than this.
pub(super) fn keep_on_this_thread(max: usize) {
    MADE.set(Some(Vec::with_capacity(max)));
}

/// Hands out the answers that were made on this thread.
pub(super) fn take_made(mut give: impl FnMut(Slot) -> io::Result<()>) -> io::Result<()> {
    MADE.with_borrow_mut(|made| {
        let mut all = made.iter_mut().flat_map(|made| made.drain(..));
        all.try_for_each(&mut give)
    })
}

/// The answer to one request, and the slot with its bytes.
pub(super) struct RingAnswer {
    slot: Option<Slot>,
    unique: u64,
    shared: Arc<Shared>,
}

impl RingAnswer {
    pub(super) fn new(slot: Slot, unique: u64, shared: &Arc<Shared>) -> Self {
        Self {
            slot: Some(slot),
            unique,
            shared: Arc::clone(shared),
        }
    }

    fn payload(&self) -> &[u8] {
        self.slot.as_ref().map_or(&[], Slot::payload)
    }

    fn payload_mut(&mut self) -> &mut [u8] {
        self.slot.as_mut().map_or(&mut [], Slot::payload_mut)
    }

    /// Answers with so many bytes of the payload, or an error.
    fn finish(&mut self, answer: std::result::Result<usize, Errno>) {
        let Some(mut slot) = self.slot.take() else {
            return;
        };
        let (error, filled) = match answer {
            Ok(filled) => (None, filled),
            Err(errno) => (Some(errno), 0),
        };
        let head = wire::out_head(self.unique, error, filled);
        slot.answer(&head, u32::try_from(filled).unwrap_or(0));
        if let Some(slot) = keep_here(slot) {
            self.shared.send_home(slot);
        }
    }
}

/// Keeps an answer for the end of the turn if this is a ring's thread; else it comes back.
fn keep_here(slot: Slot) -> Option<Slot> {
    let mut slot = Some(slot);
    let keep = |made: &RefCell<Option<Vec<Slot>>>| {
        if let Some(made) = made
            .try_borrow_mut()
            .ok()
            .as_mut()
            .and_then(|made| made.as_mut())
        {
            made.extend(slot.take());
        }
    };
    let _ = MADE.try_with(keep);
    slot
}

impl Drop for RingAnswer {
    fn drop(&mut self) {
        self.finish(Err(Errno::EIO));
    }
}

impl Answering for RingAnswer {
    fn send_bytes(mut self, answer: std::result::Result<&[u8], Errno>) {
        let copied = answer.and_then(|bytes| {
            let place = self.payload_mut().get_mut(..bytes.len());
            place.ok_or(Errno::EIO)?.copy_from_slice(bytes);
            Ok(bytes.len())
        });
        self.finish(copied);
    }
}

impl Request for RingAnswer {
    type Answer = Self;

    fn answer(self) -> Self {
        self
    }

    fn reading(self) -> impl Reading {
        self
    }

    fn writing(self, len: usize) -> std::result::Result<impl Writing, Self> {
        let filled = self.slot.as_ref().map_or(0, Slot::filled);
        if len > filled {
            return Err(self);
        }
        Ok(RingWrite { answer: self, len })
    }
}

impl Reading for RingAnswer {
    fn give(self, answer: std::result::Result<&[u8], Errno>) {
        self.send_bytes(answer);
    }

    fn fill(self, disk: &Arc<Disk>, at: DiskOffset, len: usize) {
        disk.read_into(at, len, RingRead { answer: self, len });
    }
}

/// A READ into its slot's payload.
struct RingRead {
    answer: RingAnswer,
    /// Bytes owed.
    len: usize,
}

impl ReadInto for RingRead {
    fn memory(&mut self) -> &mut [u8] {
        self.answer.payload_mut()
    }

    fn done(mut self, result: Result<usize>) {
        let owed = result.and_then(|came| owed(came, self.len));
        let owed = owed.map_err(|e| errno::answer("read", &e));
        self.answer.finish(owed.map(|()| self.len));
    }
}

/// A WRITE of what is in its slot's payload.
struct RingWrite {
    answer: RingAnswer,
    len: usize,
}

impl Writing for RingWrite {
    fn len(&self) -> usize {
        self.len
    }

    fn refuse(self, errno: Errno) {
        self.answer.send_bytes(Err(errno));
    }

    fn hand_over(self, disk: &Arc<Disk>, at: DiskOffset) {
        disk.write_brought(at, self);
    }
}

impl DoneReply for RingWrite {
    fn done(self, result: Result<()>) {
        let Self { answer, len } = self;
        Taken {
            sender: answer,
            len,
        }
        .send(result.map_err(|e| errno::answer("write", &e)));
    }

    fn brought(&self) -> &[u8] {
        self.answer.payload().get(..self.len).unwrap_or_default()
    }
}
