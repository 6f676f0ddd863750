//! What the thread of a queue does, turn by turn.
//!
//! Imports: `disk`, `fuse::{device, dispatch, wire}`, `sys`.
//! Never: keeps an answer to itself while it waits for the kernel, or for a request that is known
//! to take long.
//!
//! A turn begins with all that has come: what is large goes where neighbours can take it, and they
//! are called for what this thread cannot begin with at once ([`super::share`]). It serves what is
//! small first, in the order in which it came, then large requests, and looks after each of these
//! for what has come meanwhile, until nothing waits. Answers are given to the kernel with the call
//! that waits for the next requests, or before, as [`Pace`] says: one call a turn, where all is in
//! memory.
//!
//! Of a direct disk, most requests only begin here: the ring moves their bytes between the slot and
//! the image, with the call that gives answers too, and the thread serves others meanwhile. What
//! has moved ends when its event comes, and its answer is one of the next that are given. A thread
//! that ends waits for all of these: what they hold, the disk needs back before it is closed. The
//! host always answers, as late as the device lets it.
//!
//! What io_uring itself refuses for lack of memory is tried again; only then FUSE has looked at it.
//! When a thread cannot go on it lets go of the device and says so, and all others are told to end.

use super::layout::DEPTH;
use super::pace::Pace;
use super::reply::{self, RingAnswer, UnderWay};
use super::share::Share;
use super::{NEIGHBOURS, Shared, Told, WRITE_MAX};
use crate::disk::moving::Way;
use crate::fuse::device::Start;
use crate::fuse::dispatch::serve;
use crate::fuse::wire::{self, Head, NAMES_MAX};
use crate::sys::process;
use crate::sys::uring::{self, Event, FIXED_AT, HEADER_LEN, Ring, Slot, TROUBLES_MAX};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

/// Requests from this length on are for any thread.
const LARGE: usize = 64 << 10;

/// The thread of one queue, or one of them.
pub(super) struct Worker {
    pub(super) ring: Ring,
    /// Its place among the threads.
    pub(super) number: usize,
    /// The CPU to stay on.
    pub(super) cpu: Option<usize>,
    /// Those that the kernel is to be told of.
    pub(super) slots: Vec<Slot>,
    /// Queues that have fewer slots than they need once requests come through them.
    pub(super) shallow: Vec<u16>,
    pub(super) shared: Arc<Shared>,
    /// Names, while the slot that they came in makes ready for the answer.
    pub(super) scratch: Vec<u8>,
    /// Requests to be served here.
    pub(super) small: VecDeque<Slot>,
    /// Requests whose slots the ring has, by the slots' numbers; room for all that there can be.
    pub(super) moving: Vec<(usize, UnderWay)>,
    pub(super) pace: Pace,
    /// How often in a row io_uring lacked something for a command.
    pub(super) troubles: u32,
}

impl Worker {
    pub(super) fn run(mut self, begin: &Receiver<Start>, all: usize) {
        if let Err(e) = self.pin() {
            log::debug!("thread {} is not pinned: {e}", self.number);
        }
        // Pinned, it cannot go where nobody is in its way.
        if let Err(e) = process::go_first() {
            log::debug!("thread {} waits for its turn: {e}", self.number);
        }
        reply::keep_on_this_thread(all);
        let tell = self.shared.tell.clone();
        let is_proven = self.prove();
        let failed = is_proven.is_err();
        let _ = tell.send(is_proven.map_or_else(Told::Failed, |()| Told::Ready));
        let Ok(start) = begin.recv() else {
            return;
        };
        if failed {
            return;
        }
        // A queue without its thread would keep every request of its CPU for ever.
        let served = catch_unwind(AssertUnwindSafe(|| self.serve(&start)));
        let served = served.unwrap_or_else(|_| Err(io::Error::other("it panicked")));
        drop(start);
        // Requests that are still somewhere keep the ring, but not the mount.
        if let Err(e) = self.ring.let_go() {
            log::debug!("ring {} keeps the device: {e}", self.number);
        }
        if let Err(e) = served {
            log::error!("ring {} cannot go on: {e}", self.number);
            let _ = tell.send(Told::Failed(e));
        }
        self.wait_for_moving();
    }

    fn pin(&self) -> nix::Result<()> {
        let Some(cpu) = self.cpu else { return Ok(()) };
        let mut cpus = CpuSet::new();
        cpus.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)
    }

    /// Shows that commands and messages reach the ring.
    fn prove(&mut self) -> io::Result<()> {
        self.ring.echo()?;
        let mut echoes = 0;
        while echoes < 2 {
            self.ring.submit(1)?;
            while let Some(Event::Echo) = self.ring.next_event() {
                echoes += 1;
            }
        }
        Ok(())
    }

    fn serve(&mut self, start: &Start) -> io::Result<()> {
        for slot in mem::take(&mut self.slots) {
            self.ring.register(slot)?;
        }
        let mut is_over = false;
        while !is_over {
            self.pace.given();
            let has_nothing = self.share().rest(self.number % NEIGHBOURS);
            let submitted = self.ring.submit(usize::from(has_nothing));
            self.share().rise(self.number % NEIGHBOURS);
            submitted?;
            is_over = self.take_events(start)? | self.serve_all(start)?;
            self.give_made()?;
        }
        // After an unmount nobody waits for these; after a stop somebody may.
        let _ = self.ring.submit(0);
        Ok(())
    }

    /// Serves what is here, and what is left for all; true when it is over.
    fn serve_all(&mut self, start: &Start) -> io::Result<bool> {
        let mut is_over = false;
        self.call_others()?;
        while let Some(slot) = self.small.pop_front().or_else(|| self.share().take()) {
            let is_large = slot.mark();
            if self.pace.gives_before(is_large) {
                self.give_now()?;
            }
            let begun = Instant::now();
            self.serve_one(start, slot);
            self.move_started()?;
            if self.pace.gives_after(is_large, begun.elapsed()) {
                self.give_now()?;
            }
            if is_large {
                is_over |= self.take_events(start)?;
                self.call_others()?;
            }
        }
        Ok(is_over)
    }

    /// The large requests of this thread and its neighbours.
    fn share(&self) -> &Share<Slot> {
        &self.shared.shares[self.number / NEIGHBOURS]
    }

    /// Has others begin with the large requests that would have to wait for this thread.
    fn call_others(&mut self) -> io::Result<()> {
        let Self {
            ring,
            number,
            shared,
            small,
            ..
        } = self;
        let group = *number / NEIGHBOURS;
        let mut called = false;
        shared.shares[group].call(usize::from(small.is_empty()), |place| {
            called = true;
            ring.call(&shared.mailboxes[group * NEIGHBOURS + place])
        })?;
        if called { ring.submit(0) } else { Ok(()) }
    }

    fn give_now(&mut self) -> io::Result<()> {
        self.give_made()?;
        self.pace.given();
        self.ring.submit(0)
    }

    /// Takes all events that have come; true when it is over.
    fn take_events(&mut self, start: &Start) -> io::Result<bool> {
        let mut is_over = false;
        while let Some(event) = self.ring.next_event() {
            match event {
                Event::Request(mut slot) => {
                    self.troubles = 0;
                    slot.set_mark(wire::data_len(slot.header(), FIXED_AT) >= LARGE);
                    self.deepen(slot.queue());
                    if slot.mark() {
                        self.share().put(slot);
                    } else {
                        self.small.push_back(slot);
                    }
                }
                Event::Answer(slot) | Event::Bounced(slot) => self.ring.commit(slot)?,
                Event::Stop => is_over = true,
                Event::Echo => {}
                Event::Moved(slot, result) => {
                    self.moved(slot, result);
                    self.pace.made();
                }
                Event::Ended(slot, errno) => is_over |= self.ended(start, slot, errno)?,
            }
        }
        Ok(is_over)
    }

    /// What became of a command that brought no request; true when the mount has gone.
    fn ended(&mut self, start: &Start, slot: Slot, errno: i32) -> io::Result<bool> {
        match errno {
            libc::ENOTCONN | libc::ECONNABORTED | libc::ECANCELED => return Ok(true),
            _ if uring::is_passing(errno) && self.troubles < TROUBLES_MAX => {
                self.troubles += 1;
                uring::wait_a_moment();
                if slot.is_known() {
                    self.ring.commit(slot)?;
                } else {
                    self.ring.register(slot)?;
                }
            }
            _ if start.device.is_gone() => return Ok(true),
            _ if !slot.is_known() => {
                let _ = self.shared.tell.send(Told::Refused(errno));
            }
            _ => return Err(io::Error::from_raw_os_error(errno)),
        }
        Ok(false)
    }

    /// Gives a queue the slots that it lacks, now that requests come through it: its CPU was off
    /// when the mount was made, and is on.
    fn deepen(&mut self, queue: u16) {
        let Some(place) = self.shallow.iter().position(|shallow| *shallow == queue) else {
            return;
        };
        self.shallow.swap_remove(place);
        let payload = usize::try_from(WRITE_MAX).unwrap_or(1 << 20);
        let more = uring::slots(queue, self.number, DEPTH - 1, payload, 4096);
        let more = more.and_then(|more| {
            let mut more = more.into_iter();
            more.try_for_each(|slot| self.ring.register(slot))
        });
        match more {
            Ok(()) => log::info!("CPU {queue} is on now, and has a queue"),
            Err(e) => log::warn!("requests of CPU {queue} have to take turns: {e}"),
        }
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

    /// Makes ready for the kernel the commands for what was started on this thread.
    fn move_started(&mut self) -> io::Result<()> {
        let Self { ring, moving, .. } = self;
        reply::take_started(|mut request| {
            let Some(slot) = request.take_slot() else {
                return Ok(());
            };
            let number = slot.number();
            let run = &request.moving;
            let (at, len) = (run.at().get(), run.bytes());
            let file = run.file().ok_or(io::ErrorKind::NotFound)?;
            match run.way() {
                Way::Read => ring.read(slot, file, at, len)?,
                Way::Write => ring.write(slot, file, at, len)?,
            }
            moving.push((number, request));
            Ok(())
        })
    }

    /// The ring has done what it was told with a slot's bytes.
    fn moved(&mut self, slot: Slot, result: i32) {
        let number = slot.number();
        let mut all = self.moving.iter();
        if let Some(place) = all.position(|(one, _)| *one == number) {
            let (_, request) = self.moving.swap_remove(place);
            request.end(slot, result);
        }
    }

    /// Waits until the ring has no bytes to move any more. Nobody is served meanwhile, and answers
    /// go nowhere.
    fn wait_for_moving(&mut self) {
        while !self.moving.is_empty() {
            if self.ring.submit(1).is_err() {
                uring::wait_a_moment();
            }
            while let Some(event) = self.ring.next_event() {
                if let Event::Moved(slot, result) = event {
                    self.moved(slot, result);
                }
            }
        }
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
                Some(home) => ring.pass(home, slot),
                None => ring.commit(slot),
            }
        })
    }
}
