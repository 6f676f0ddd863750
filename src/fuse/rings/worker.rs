//! What the thread of a queue does, turn by turn.
//!
//! Imports: `fuse::{dispatch, wire}`, `sys`.
//! Never: keeps an answer to itself while it waits.
//!
//! A turn begins with all that has come. Large requests that are to be shared out go first, so that
//! their threads begin at once; then the others are served, and their answers given to the kernel
//! with the call that waits for the next requests: one call a turn. Only after a large request is
//! its answer given at once, as others would keep it waiting.

use super::reply::{self, RingAnswer};
use super::{Shared, Told};
use crate::fuse::PloopFs;
use crate::fuse::dispatch::{Guard, serve};
use crate::fuse::wire::{self, Head, NAMES_MAX};
use crate::sys::uring::{Event, FIXED_AT, HEADER_LEN, Message, Ring, Slot};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

/// Requests from this length on are shared out among the threads.
const LARGE: usize = 64 << 10;
/// Threads that share what comes together.
const SHARERS_MAX: usize = 4;

/// What a thread needs to begin.
pub(super) struct Start {
    pub(super) fs: Arc<PloopFs>,
    pub(super) guard: Guard,
}

/// The thread of one queue, or one of them.
pub(super) struct Worker {
    pub(super) ring: Ring,
    /// Its place among the threads.
    pub(super) number: usize,
    pub(super) cpu: usize,
    /// Those that the kernel is to be told of.
    pub(super) slots: Vec<Slot>,
    /// Bytes of each payload that are touched before the first request.
    pub(super) touched: usize,
    pub(super) shared: Arc<Shared>,
    /// Names, while the slot that they came in makes ready for the answer.
    pub(super) scratch: Vec<u8>,
    /// Requests from the kernel.
    pub(super) fresh: Vec<Slot>,
    /// Requests from other threads.
    pub(super) handed: Vec<Slot>,
    pub(super) tell: Sender<Told>,
}

impl Worker {
    pub(super) fn run(mut self, begin: &Receiver<Start>, all: usize) {
        // A CPU that is not there, or not for us, gets no requests; its queue must be there.
        let mut cpus = CpuSet::new();
        let pinned = cpus.set(self.cpu);
        let pinned = pinned.and_then(|()| sched_setaffinity(Pid::from_raw(0), &cpus));
        if let Err(e) = pinned {
            log::debug!("thread {} is not pinned: {e}", self.number);
        }
        let pages = self.touched / 4096;
        for slot in &mut self.slots {
            let touched = slot.payload_mut().chunks_mut(4096).take(pages);
            touched.for_each(|page| page[0] = 1);
        }
        reply::keep_on_this_thread(all);
        let Ok(start) = begin.recv() else {
            return;
        };
        // A queue without its thread would keep every request of its CPU for ever.
        let served = catch_unwind(AssertUnwindSafe(|| self.serve(&start)));
        let served = served.unwrap_or_else(|_| Err(io::Error::other("it panicked")));
        if let Err(e) = served {
            log::error!("ring {} cannot go on: {e}", self.number);
            let _ = self.tell.send(Told::Failed(e));
        }
    }

    fn serve(&mut self, start: &Start) -> io::Result<()> {
        for slot in std::mem::take(&mut self.slots) {
            self.ring.register(slot)?;
        }
        let mut is_over = false;
        while !is_over {
            self.ring.submit(1)?;
            is_over = self.take_events()?;
            self.share_out()?;
            let (mut fresh, mut handed) = (mem::take(&mut self.fresh), mem::take(&mut self.handed));
            for slot in fresh.drain(..).chain(handed.drain(..)) {
                let is_large = slot.mark();
                self.serve_one(start, slot);
                if is_large {
                    self.give_made()?;
                    self.ring.submit(0)?;
                }
            }
            // They keep their memory.
            (self.fresh, self.handed) = (fresh, handed);
            self.give_made()?;
        }
        // After an unmount nobody waits for these; after a stop somebody may.
        let _ = self.ring.submit(0);
        Ok(())
    }

    /// Takes all events that have come; true when it is over.
    fn take_events(&mut self) -> io::Result<bool> {
        let mut is_over = false;
        while let Some(event) = self.ring.next_event() {
            match event {
                Event::Request(mut slot) => {
                    slot.set_mark(wire::data_len(slot.header(), FIXED_AT) >= LARGE);
                    self.fresh.push(slot);
                }
                Event::Message(slot, Message::Serve) | Event::Bounced(slot, Message::Serve) => {
                    self.handed.push(slot);
                }
                Event::Message(slot, Message::Answer) | Event::Bounced(slot, Message::Answer) => {
                    self.ring.commit(slot)?;
                }
                Event::Stop => is_over = true,
                Event::Ended(slot, errno) => match errno {
                    libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED => is_over = true,
                    libc::EAGAIN | libc::EINTR if !slot.is_known() => self.ring.register(slot)?,
                    _ if !slot.is_known() => {
                        let _ = self.tell.send(Told::Refused(errno));
                    }
                    _ => return Err(io::Error::from_raw_os_error(errno)),
                },
            }
        }
        Ok(is_over)
    }

    /// Hands some of the large requests to other threads, before it serves any itself.
    fn share_out(&mut self) -> io::Result<()> {
        let all = self.shared.mailboxes.len();
        let sharers = all.min(SHARERS_MAX);
        let (mut larges, mut index, mut passed) = (0_usize, 0, false);
        while let Some(slot) = self.fresh.get(index) {
            let share = larges % sharers;
            larges += usize::from(slot.mark());
            if !slot.mark() || share == 0 {
                index += 1;
                continue;
            }
            let slot = self.fresh.swap_remove(index);
            let other = (self.number + share) % all;
            self.ring
                .pass(&self.shared.mailboxes[other], slot, Message::Serve)?;
            passed = true;
        }
        if passed {
            self.ring.submit(0)?;
        }
        Ok(())
    }

    fn serve_one(&mut self, start: &Start, slot: Slot) {
        let mut header = [0; HEADER_LEN];
        header.copy_from_slice(slot.header());
        let (head, fixed) = header.split_at(FIXED_AT);
        let Some(head) = Head::parse(head) else {
            return;
        };
        let names = if head.has_names() {
            let names = &mut self.scratch[..slot.filled().min(NAMES_MAX)];
            names.copy_from_slice(&slot.payload()[..names.len()]);
            names
        } else {
            &mut []
        };
        let request = RingAnswer::new(slot, head.unique, &self.shared);
        // The kernel's goodbye is not sent this way; the end comes from the device.
        serve(&start.fs, start.guard, (&head, fixed, names), request);
    }

    /// Makes ready for the kernel the answers that were made on this thread.
    fn give_made(&mut self) -> io::Result<()> {
        let Self {
            ring,
            number,
            shared,
            ..
        } = self;
        reply::take_made(|slot| {
            if slot.home() == *number || slot.mark() {
                return ring.commit(slot);
            }
            match shared.mailboxes.get(slot.home()) {
                Some(home) => ring.pass(home, slot, Message::Answer),
                None => ring.commit(slot),
            }
        })
    }
}
