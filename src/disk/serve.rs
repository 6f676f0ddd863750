//! Where a request is served: on the thread it arrived on, in the pool, or parked until it can be.
//!
//! `Disk::stay` decides, for all ways in which bytes come and go. What may stay is tried there,
//! and goes to the pool if a page of the map is missing or a cluster needs a place. So does what is
//! left of a large read where its bytes are not in the host's memory; the host tells that of reads.
//! Of writes it does not: ext4, tmpfs and others take none to the page cache that may not wait, and
//! one that may seldom does.

mod jobs;
mod moves;

use super::buffers::BUFFER_MAX;
use super::part::{Part, Progress};
use super::read::Load;
use super::stats::bump;
use super::table::Wait;
use super::{Disk, DoneReply, ReadInto, ReadReply};
use crate::error::{Error, Result};
use crate::format::layout::Layout;
use crate::plan::RequestOrder;
use crate::storage::Way;
use crate::sync;
use crate::units::{DiskCluster, DiskOffset, len_u64, len_usize};
use jobs::{ChangeJob, Once, Op};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A change as one step of it sees it.
#[derive(Clone, Copy, Debug)]
enum Change<'a> {
    Write(&'a [u8]),
    Zero(u64),
}

/// What is asked of the thread on which a request arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// A request that stays on its thread.
#[derive(Debug)]
pub(super) struct Stay<'a> {
    /// Counts the large ones.
    counted: Option<&'a AtomicUsize>,
    /// What it may wait for there: a large one keeps the thread from many small ones.
    load: Load,
}

impl Stay<'_> {
    /// For what comes by: it goes on where it has to wait.
    fn passing() -> Self {
        Self {
            counted: None,
            load: Load::Now,
        }
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.counted {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Disk {
    /// Serves a read of `len` bytes, clipped at the disk's end. `buf` belongs to the calling thread
    /// and is at least `len` long; the request moves to the pool with another one if it is large,
    /// or if a page of the map must be loaded.
    pub fn read<R: ReadReply>(
        self: &Arc<Self>,
        at: DiskOffset,
        len: usize,
        buf: &mut [u8],
        reply: R,
    ) {
        let left = len_usize(self.size.saturating_sub(at.get())).unwrap_or(usize::MAX);
        let len = len.min(left).min(buf.len());
        bump(&self.counters.reads, 1);
        bump(&self.counters.read_bytes, len_u64(len));
        let mut done = 0;
        if let Some(stay) = self.stay(len, Kind::Read) {
            match self.guarded(|| self.read_pieces(at, &mut buf[..len], stay.load)) {
                Ok(came) if came == len => {
                    bump(&self.counters.inline_requests, 1);
                    return reply.done(Ok(&buf[..len]));
                }
                Ok(came) => done = came,
                Err(error) => return reply.done(Err(error)),
            }
        }
        match self.resources.buffers.take(len) {
            Some(mut buffer) => {
                buffer[..done].copy_from_slice(&buf[..done]);
                let disk = Arc::clone(self);
                self.spawn(move || {
                    let result = disk.guarded(|| disk.read_rest(at, &mut buffer, done));
                    reply.done(result.map(|()| &buffer[..]));
                });
            }
            None => {
                bump(&self.counters.alone_requests, 1);
                let result = self.guarded(|| self.read_rest(at, &mut buf[..len], done));
                reply.done(result.map(|()| &buf[..len]));
            }
        }
    }

    /// Serves a read of `len` bytes, clipped at the disk's end, into memory that comes with it.
    /// Where it is served is decided as for [`Disk::read`]; but its memory goes to the pool with
    /// it, so it needs no buffer there, and is never served alone. Where each read waits for the
    /// medium, the transport is to do that itself if it can, and all but holes go to the pool else.
    pub fn read_into<R: ReadInto>(self: &Arc<Self>, at: DiskOffset, len: usize, mut target: R) {
        let left = len_usize(self.size.saturating_sub(at.get())).unwrap_or(usize::MAX);
        let len = len.min(left).min(target.memory().len());
        bump(&self.counters.reads, 1);
        bump(&self.counters.read_bytes, len_u64(len));
        if let Some(moving) = self.move_directly(at, &target.memory()[..len], Way::Read) {
            match target.start(moving) {
                Ok(()) => return bump(&self.counters.ring_io_requests, 1),
                Err((back, _)) => target = back,
            }
        }
        let mut done = 0;
        let stay = if self.direct {
            Some(Stay::passing())
        } else {
            self.stay(len, Kind::Read)
        };
        if let Some(stay) = stay {
            let buf = &mut target.memory()[..len];
            match self.guarded(|| self.read_pieces(at, buf, stay.load)) {
                Ok(came) if came == len => {
                    bump(&self.counters.inline_requests, 1);
                    return target.done(Ok(len));
                }
                Ok(came) => done = came,
                Err(error) => return target.done(Err(error)),
            }
        }
        self.read_in_pool(at, len, done, target);
    }

    /// Has the pool read what comes behind the bytes that are there.
    pub(super) fn read_in_pool<R: ReadInto>(
        self: &Arc<Self>,
        at: DiskOffset,
        len: usize,
        done: usize,
        mut target: R,
    ) {
        let disk = Arc::clone(self);
        self.spawn(move || {
            let buf = &mut target.memory()[..len];
            let result = disk.guarded(|| disk.read_rest(at, buf, done));
            target.done(result.map(|()| len));
        });
    }

    /// Serves a write of the bytes that come with its reply.
    pub fn write_brought<R: DoneReply>(self: &Arc<Self>, at: DiskOffset, mut reply: R) {
        let len = reply.brought().len();
        if let Err(error) = self.check_change(at, len_u64(len)) {
            return reply.done(Err(error));
        }
        if let Some(moving) = self.move_directly(at, reply.brought(), Way::Write) {
            match reply.start(moving) {
                Ok(()) => return bump(&self.counters.ring_io_requests, 1),
                Err((back, _)) => reply = back,
            }
        }
        if let Some(_stay) = self.stay(len, Kind::Write).filter(|_| !self.direct) {
            match self.guarded(|| self.write_pieces_in_place(at, reply.brought())) {
                Ok(true) => {
                    bump(&self.counters.inline_requests, 1);
                    self.count_change(Change::Write(reply.brought()));
                    return reply.done(Ok(()));
                }
                Ok(false) => {}
                Err(error) => return reply.done(Err(error)),
            }
        }
        self.spawn_change(at, Op::Brought, reply);
    }

    /// Serves a write. `data` is copied if the request moves to the pool.
    pub fn write<R: DoneReply>(self: &Arc<Self>, at: DiskOffset, data: &[u8], reply: R) {
        if let Err(error) = self.check_change(at, len_u64(data.len())) {
            return reply.done(Err(error));
        }
        if let Some(_stay) = self.stay(data.len(), Kind::Write) {
            match self.guarded(|| self.write_pieces_in_place(at, data)) {
                Ok(true) => {
                    bump(&self.counters.inline_requests, 1);
                    self.count_change(Change::Write(data));
                    return reply.done(Ok(()));
                }
                Ok(false) => {}
                Err(error) => return reply.done(Err(error)),
            }
        }
        match self.resources.buffers.take(data.len()) {
            Some(mut buffer) => {
                buffer.copy_from_slice(data);
                self.spawn_change(at, Op::Write(buffer), reply);
            }
            None => self.write_alone(at, data, reply),
        }
    }

    /// Whether a request of this length is tried on the thread on which it arrived. The answer is
    /// held until that thread is free again.
    pub(super) fn stay(&self, len: usize, kind: Kind) -> Option<Stay<'_>> {
        if RequestOrder::of(len) < self.inline_order {
            return Some(Stay {
                counted: None,
                load: Load::No,
            });
        }
        let large = &*self.resources.large;
        let max = large.max(kind);
        let stay = Stay {
            counted: Some(&large.count),
            load: Load::Now,
        };
        (large.count.fetch_add(1, Ordering::Relaxed) < max).then_some(stay)
    }

    /// Makes a range read as zeros: punched holes and zeroed ranges alike.
    pub fn zero<R: DoneReply>(self: &Arc<Self>, at: DiskOffset, len: u64, reply: R) {
        match self.check_change(at, len) {
            Ok(()) => self.spawn_change(at, Op::Zero(len), reply),
            Err(error) => reply.done(Err(error)),
        }
    }

    /// Makes all that was answered before durable; answers from the flusher's thread.
    pub fn flush<R: DoneReply>(self: &Arc<Self>, reply: R) {
        if self.read_only {
            return reply.done(Ok(()));
        }
        self.flusher
            .join_round(Box::new(move |result| reply.done(result)));
    }

    /// Runs something that may take long on a thread of the pool. Once the disk is closed the job
    /// is dropped instead.
    pub fn spawn(self: &Arc<Self>, job: impl FnOnce() + Send + 'static) {
        if !self.job_begins() {
            return;
        }
        self.resources.pool.spawn(Box::new(Once {
            disk: Arc::clone(self),
            job,
        }));
    }

    /// Fills `buf` from `at`; waits for whatever it takes. For callers that are no session thread.
    pub fn read_at(&self, at: DiskOffset, buf: &mut [u8]) -> Result<()> {
        let end = at.checked_add(len_u64(buf.len()));
        if end.is_none_or(|end| end.get() > self.size) {
            return Err(Error::new(crate::error::ErrorKind::OutOfRange));
        }
        self.read_rest(at, buf, 0)
    }

    /// Writes `data` at `at`; waits for whatever it takes.
    pub fn write_at(&self, at: DiskOffset, data: &[u8]) -> Result<()> {
        self.change_blocking(at, Change::Write(data))
    }

    /// Makes a range read as zeros; waits for whatever it takes.
    pub fn zero_at(&self, at: DiskOffset, len: u64) -> Result<()> {
        self.change_blocking(at, Change::Zero(len))
    }

    /// Reads what comes behind the bytes that are there; waits for whatever it takes.
    fn read_rest(&self, at: DiskOffset, buf: &mut [u8], done: usize) -> Result<()> {
        let at = DiskOffset::new(at.get() + len_u64(done));
        self.read_pieces(at, &mut buf[done..], Load::Yes).map(drop)
    }

    /// Reads pieces that lie in one part each. Tells how many bytes are there: all, unless there is
    /// something to wait for that may not be waited for.
    fn read_pieces(&self, at: DiskOffset, buf: &mut [u8], load: Load) -> Result<usize> {
        let parts = self.parts();
        let mut done = 0;
        while done < buf.len() {
            let position = DiskOffset::new(at.get() + len_u64(done));
            let (index, within) = Self::locate(&parts, position);
            let part = &parts[index];
            let left = len_usize(part.disk_len() - within.get()).unwrap_or(usize::MAX);
            let piece = left.min(buf.len() - done);
            let target = &mut buf[done..done + piece];
            let came = part.read(within, target, load, &self.counters)?;
            done += came;
            if came < piece {
                break;
            }
        }
        Ok(done)
    }

    fn write_pieces_in_place(&self, at: DiskOffset, data: &[u8]) -> Result<bool> {
        let parts = self.parts();
        let mut done = 0;
        while done < data.len() {
            let position = DiskOffset::new(at.get() + len_u64(done));
            let (index, within) = Self::locate(&parts, position);
            let part = &parts[index];
            if !part.marked.is_open() {
                return Ok(false);
            }
            let left = len_usize(part.disk_len() - within.get()).unwrap_or(usize::MAX);
            let piece = left.min(data.len() - done);
            match part.write_in_place(within, &data[done..done + piece]) {
                Ok(true) => done += piece,
                Ok(false) => return Ok(false),
                // The pool knows how to wait for space.
                Err(error) if error.is_no_space() => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// One step of a change, within one part. Returns the part's number with how far it came.
    fn change_step(&self, at: DiskOffset, change: Change<'_>) -> Result<(usize, Progress)> {
        self.health.check()?;
        let parts = self.parts();
        let (index, within) = Self::locate(&parts, at);
        let part: &Part = &parts[index];
        match self.ensure_marked(index) {
            Err(error) if error.is_no_space() => return Ok((index, Progress::Wait(Wait::Space))),
            marked => marked?,
        }
        let left = part.disk_len() - within.get();
        let progress = match change {
            Change::Write(data) => {
                let len = len_usize(left).unwrap_or(usize::MAX).min(data.len());
                part.write_step(within, &data[..len], &self.counters)?
            }
            Change::Zero(len) => part.zero_step(within, len.min(left), &self.counters)?,
        };
        Ok((index, progress))
    }

    fn count_change(&self, change: Change<'_>) {
        match change {
            Change::Write(data) => {
                bump(&self.counters.writes, 1);
                bump(&self.counters.written_bytes, len_u64(data.len()));
            }
            Change::Zero(_) => bump(&self.counters.zeros, 1),
        }
    }

    fn change_blocking(&self, at: DiskOffset, change: Change<'_>) -> Result<()> {
        let len = change.len();
        self.check_change(at, len)?;
        let since = sync::now();
        let mut done = 0;
        while done < len {
            let at = DiskOffset::new(at.get() + done);
            match self.change_step(at, change.after(done))? {
                (_, Progress::Done(more)) => done += more,
                (index, Progress::Wait(wait)) => self.wait_here(index, wait, since)?,
            }
        }
        self.count_change(change);
        Ok(())
    }

    /// Waits on this thread, which holds nothing.
    fn wait_here(&self, index: usize, wait: Wait, since: Instant) -> Result<()> {
        match wait {
            Wait::Pending(cluster) => {
                let parts = self.parts();
                let part = &parts[index];
                let mut table = part.table.lock();
                while is_pending(part, cluster) {
                    part.changed
                        .wait_for(&mut table, Duration::from_millis(100));
                }
            }
            Wait::Flush => {
                self.flush_now()?;
                // A reader of a freed cluster may still be at it.
                sync::sleep(Duration::from_millis(1));
            }
            Wait::Space => {
                let error = Error::errno(libc::ENOSPC);
                self.note_no_space(&error);
                self.flush_now()?;
                if self.enospc.is_over(since) {
                    return Err(error);
                }
                sync::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// Serves a write to its end on the thread it arrived on, because no buffer is left to take it
    /// elsewhere. It may wait for another request's copy or for a flush, both of which run on
    /// threads of their own, but never for space: then it needs a buffer, or fails.
    fn write_alone<R: DoneReply>(self: &Arc<Self>, at: DiskOffset, data: &[u8], reply: R) {
        bump(&self.counters.alone_requests, 1);
        let since = sync::now();
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            let position = DiskOffset::new(at.get() + len_u64(done));
            let step = self.guarded(|| self.change_step(position, Change::Write(rest)));
            let waited = match step {
                Ok((_, Progress::Done(more))) => {
                    done += len_usize(more).unwrap_or(0);
                    Ok(())
                }
                Ok((_, Progress::Wait(Wait::Space))) => {
                    match self.resources.buffers.take(rest.len()) {
                        Some(mut buffer) => {
                            buffer.copy_from_slice(rest);
                            return self.spawn_change(position, Op::Write(buffer), reply);
                        }
                        None => Err(Error::errno(libc::ENOSPC)),
                    }
                }
                Ok((index, Progress::Wait(wait))) => self.wait_here(index, wait, since),
                Err(error) => Err(error),
            };
            if let Err(error) = waited {
                return reply.done(Err(error));
            }
        }
        self.count_change(Change::Write(data));
        reply.done(Ok(()));
    }

    fn spawn_change<R: DoneReply>(self: &Arc<Self>, at: DiskOffset, op: Op, reply: R) {
        if !self.job_begins() {
            return reply.done(self.expect_open());
        }
        let disk = Arc::clone(self);
        let job = ChangeJob::new(disk, op, at, reply);
        self.resources.pool.spawn(Box::new(job));
    }

    /// Runs a step; a panic in it latches the disk and is an error like any other.
    fn guarded<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|_| {
            self.health.latch("a request panicked");
            Err(self.health.error())
        })
    }

    /// Counts a job of the pool, which keeps the disk from being closed; false if it is closed.
    fn job_begins(&self) -> bool {
        let begins = self.enters();
        bump(&self.counters.pooled_requests, u64::from(begins));
        begins
    }

    /// Counts what keeps the disk from being closed; false if it is closed.
    pub(super) fn enters(&self) -> bool {
        let mut in_flight = self.in_flight.lock();
        let is_open = !self.closed.load(Ordering::Acquire);
        *in_flight += usize::from(is_open);
        is_open
    }

    pub(super) fn job_finished(&self) {
        let mut in_flight = self.in_flight.lock();
        *in_flight -= 1;
        if *in_flight == 0 {
            self.idle.notify_all();
        }
    }
}

fn is_pending(part: &Part, cluster: DiskCluster) -> bool {
    let (index, slot) = Layout::page_of(cluster);
    part.map
        .get(index)
        .as_ref()
        .is_some_and(|page| page.word(slot).is_pending())
}

impl<'a> Change<'a> {
    fn len(self) -> u64 {
        match self {
            Self::Write(data) => len_u64(data.len()),
            Self::Zero(len) => len,
        }
    }

    fn after(self, done: u64) -> Self {
        match self {
            Self::Write(data) => Self::Write(&data[len_usize(done).unwrap_or(data.len())..]),
            Self::Zero(len) => Self::Zero(len - done),
        }
    }
}

const _: () = assert!(
    BUFFER_MAX >= 1 << 20,
    "a request of the kernel fits one buffer"
);

#[cfg(test)]
mod tests;
