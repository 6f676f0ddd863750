//! Answers in slots.
//!
//! Imports: `disk`, `error`, `units`, `fuse::{answer, device, dispatch, errno, wire}`, `sys`.
//! Never: touches a slot's memory after it has been given away.
//!
//! An answer that is made on a ring's thread waits for the end of that thread's turn; one that is
//! made elsewhere, in the pool or by the flusher, goes to the thread that the slot is at home with.
//!
//! A request that the disk would have the transport carry out is taken on a ring's thread only, and
//! waits there for the end of its serving: then the thread takes the slot out of it, gives that to
//! its ring, and keeps the rest ([`UnderWay`]) until the slot comes back.

use super::Shared;
use crate::disk::moving::{Moving, Way};
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
use std::thread::LocalKey;

thread_local! {
    /// Answers made on a ring's thread, which it gives to the kernel together.
    static MADE: RefCell<Option<Vec<Slot>>> = const { RefCell::new(None) };
    /// What is to be carried out by a ring, on its thread.
    static STARTED: RefCell<Option<Vec<UnderWay>>> = const { RefCell::new(None) };
}

/// Makes this a thread whose answers wait for [`take_made`], and whose ring carries out what is
/// taken by [`take_started`]; never more of them than this.
pub(super) fn keep_on_this_thread(max: usize) {
    MADE.set(Some(Vec::with_capacity(max)));
    STARTED.set(Some(Vec::with_capacity(max)));
}

/// Hands out what was started on this thread.
pub(super) fn take_started(give: impl FnMut(UnderWay) -> io::Result<()>) -> io::Result<()> {
    take_all(&STARTED, give)
}

/// Hands out the answers that were made on this thread.
pub(super) fn take_made(give: impl FnMut(Slot) -> io::Result<()>) -> io::Result<()> {
    take_all(&MADE, give)
}

type Kept<T> = LocalKey<RefCell<Option<Vec<T>>>>;

fn take_all<T>(
    kept: &'static Kept<T>,
    mut give: impl FnMut(T) -> io::Result<()>,
) -> io::Result<()> {
    kept.with_borrow_mut(|kept| {
        let mut all = kept.iter_mut().flat_map(|kept| kept.drain(..));
        all.try_for_each(&mut give)
    })
}

/// Keeps something for the end of the turn if this is a ring's thread; else it comes back.
fn keep_here<T>(kept: &'static Kept<T>, item: T) -> Option<T> {
    let mut item = Some(item);
    let keep = |kept: &RefCell<Option<Vec<T>>>| {
        let mut kept = kept.try_borrow_mut().ok();
        if let Some(kept) = kept.as_mut().and_then(|kept| kept.as_mut()) {
            kept.extend(item.take());
        }
    };
    let _ = kept.try_with(keep);
    item
}

/// A request that a ring carries out.
pub(super) struct UnderWay {
    answer: RingAnswer,
    /// Bytes owed.
    len: usize,
    pub(super) moving: Moving,
}

impl UnderWay {
    /// Takes the slot for the ring. Without it there is no answer, until the slot comes back.
    pub(super) fn take_slot(&mut self) -> Option<Slot> {
        self.answer.slot.take()
    }

    /// The ring has given the slot back: so many bytes have moved, or it is an errno below 0.
    pub(super) fn end(self, slot: Slot, result: i32) {
        let Self {
            mut answer,
            len,
            moving,
        } = self;
        answer.slot = Some(slot);
        let moved = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        match moving.way() {
            Way::Read => moving.came(moved, RingRead { answer, len }),
            Way::Write => moving.written(moved, RingWrite { answer, len }),
        }
    }

    /// Keeps it for the thread's ring, if there is one; else its parts come back.
    fn keep(
        answer: RingAnswer,
        len: usize,
        moving: Moving,
    ) -> std::result::Result<(), (RingAnswer, Moving)> {
        let started = Self {
            answer,
            len,
            moving,
        };
        match keep_here(&STARTED, started) {
            None => Ok(()),
            Some(Self { answer, moving, .. }) => Err((answer, moving)),
        }
    }
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
        if let Some(slot) = keep_here(&MADE, slot) {
            self.shared.send_home(slot);
        }
    }
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

    fn start(self, moving: Moving) -> std::result::Result<(), (Self, Moving)> {
        let Self { answer, len } = self;
        let back = |(answer, moving)| (Self { answer, len }, moving);
        UnderWay::keep(answer, len, moving).map_err(back)
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

    fn start(self, moving: Moving) -> std::result::Result<(), (Self, Moving)> {
        let Self { answer, len } = self;
        let back = |(answer, moving)| (Self { answer, len }, moving);
        UnderWay::keep(answer, len, moving).map_err(back)
    }
}
