//! What runs in the pool for one request, turn by turn.

use super::{Change, is_pending};
use crate::disk::buffers::Buffer;
use crate::disk::part::Progress;
use crate::disk::stats::bump;
use crate::disk::table::{Job, Wait};
use crate::disk::{Disk, DoneReply, SPACE_WAITERS_MAX};
use crate::error::{Error, Result};
use crate::sync;
use crate::units::DiskOffset;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Steps of a long request after which other jobs get their turn.
const STEPS_PER_TURN: usize = 64;

/// A closure as a job.
pub(super) struct Once<F> {
    pub(super) disk: Arc<Disk>,
    pub(super) job: F,
}

impl<F: FnOnce() + Send> Job for Once<F> {
    fn run(self: Box<Self>) {
        let Self { disk, job } = *self;
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            disk.health.latch("a request panicked");
        }
        disk.job_finished();
    }
}

/// What a change in the pool owns.
pub(super) enum Op {
    Write(Buffer),
    /// Its reply has the bytes.
    Brought,
    Zero(u64),
}

/// A change in the pool, or parked.
pub(super) struct ChangeJob<R: DoneReply> {
    disk: Arc<Disk>,
    op: Op,
    at: DiskOffset,
    done: u64,
    reply: R,
    /// Since when it has been waiting for space; it is counted among those who do.
    space_since: Option<Instant>,
}

/// How a turn of a job ended.
enum Turn {
    Finished(Result<()>),
    Wait(usize, Wait),
    /// There is more, but others come first.
    Yield,
}

impl<R: DoneReply> ChangeJob<R> {
    /// Nothing of it is done yet.
    pub(super) fn new(disk: Arc<Disk>, op: Op, at: DiskOffset, reply: R) -> Self {
        Self {
            disk,
            op,
            at,
            done: 0,
            reply,
            space_since: None,
        }
    }
}

impl<R: DoneReply> Job for ChangeJob<R> {
    fn run(mut self: Box<Self>) {
        match self.turn() {
            Turn::Finished(result) => (*self).finish(result),
            Turn::Yield => Arc::clone(&self.disk).resources.pool.spawn(self),
            Turn::Wait(index, Wait::Space) => self.wait_for_space(index),
            Turn::Wait(index, wait) => self.park(index, wait),
        }
    }
}

impl<R: DoneReply> ChangeJob<R> {
    fn change(&self) -> Change<'_> {
        match &self.op {
            Op::Write(buffer) => Change::Write(buffer),
            Op::Brought => Change::Write(self.reply.brought()),
            Op::Zero(len) => Change::Zero(*len),
        }
    }

    fn turn(&mut self) -> Turn {
        let len = self.change().len();
        for _ in 0..STEPS_PER_TURN {
            if self.done >= len {
                return Turn::Finished(Ok(()));
            }
            let at = DiskOffset::new(self.at.get() + self.done);
            let change = self.change().after(self.done);
            match self.disk.guarded(|| self.disk.change_step(at, change)) {
                Ok((_, Progress::Done(more))) => {
                    self.done += more;
                    self.stop_waiting_for_space();
                }
                Ok((index, Progress::Wait(wait))) => return Turn::Wait(index, wait),
                Err(error) => return Turn::Finished(Err(error)),
            }
        }
        Turn::Yield
    }

    fn finish(mut self, result: Result<()>) {
        self.stop_waiting_for_space();
        if result.is_ok() {
            self.disk.count_change(self.change());
        }
        let Self {
            disk, op, reply, ..
        } = self;
        drop(op);
        reply.done(result);
        disk.job_finished();
    }

    fn stop_waiting_for_space(&mut self) {
        if self.space_since.take().is_some() {
            self.disk.space_waiters.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Parks for space as long as the policy says, if not too many do so already.
    fn wait_for_space(mut self: Box<Self>, index: usize) {
        let error = Error::errno(libc::ENOSPC);
        let disk = Arc::clone(&self.disk);
        disk.note_no_space(&error);
        if self.space_since.is_none() {
            if disk.space_waiters.fetch_add(1, Ordering::Relaxed) >= SPACE_WAITERS_MAX {
                disk.space_waiters.fetch_sub(1, Ordering::Relaxed);
                return (*self).finish(Err(error));
            }
            self.space_since = Some(sync::now());
        }
        let is_over = self
            .space_since
            .is_some_and(|since| disk.enospc.is_over(since));
        if is_over || disk.closing.load(Ordering::Acquire) {
            return (*self).finish(Err(error));
        }
        self.park(index, Wait::Space);
    }

    /// Parks, unless what is waited for has happened by now. What was parked is seen by whoever
    /// ends the wait, because both hold the `table` lock.
    fn park(self: Box<Self>, index: usize, wait: Wait) {
        let disk = Arc::clone(&self.disk);
        bump(&disk.counters.parked, 1);
        let parts = disk.parts();
        let part = &parts[index];
        let mut table = part.table.lock();
        if let Wait::Pending(cluster) = wait {
            if !is_pending(part, cluster) {
                drop(table);
                return disk.resources.pool.spawn(self);
            }
            table.parked.add(wait, self);
            return;
        }
        table.parked.add(wait, self);
        drop(table);
        disk.flusher.request();
    }
}
