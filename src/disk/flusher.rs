//! The thread that runs flush rounds: for callers, for the timer, and for requests that wait.
//!
//! A caller joins the round that begins after it came: the list of callers is taken before the
//! round seals anything, so whoever comes later gets the next one.

use super::Disk;
use super::stats::bump;
use super::table::Wait;
use crate::error::{Error, ErrorKind, Result};
use crate::planted::{Bug, planted};
use crate::sync::{self, Condvar, Mutex, Thread};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often requests that wait for space try again, and freed clusters are looked at.
const TICK: Duration = Duration::from_secs(1);

type Done = Box<dyn FnOnce(Result<()>) + Send>;

struct Caller {
    done: Done,
    next: Option<Box<Caller>>,
}

#[derive(Default)]
struct State {
    callers: Option<Box<Caller>>,
    requested: bool,
    stop: bool,
}

/// The door to the flusher's thread.
pub struct Flusher {
    state: Mutex<State>,
    wake: Condvar,
    thread: Mutex<Option<Thread>>,
}

impl std::fmt::Debug for Flusher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Flusher")
    }
}

impl Flusher {
    /// A door behind which no thread runs yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let (state, wake) = (Mutex::default(), Condvar::new());
        Arc::new(Self {
            state,
            wake,
            thread: Mutex::new(None),
        })
    }

    /// Starts the thread, which runs a round after each `interval` in which something was written.
    pub fn start(self: &Arc<Self>, disk: &Arc<Disk>, interval: Option<Duration>) -> Result<()> {
        let (flusher, disk) = (Arc::clone(self), Arc::downgrade(disk));
        let thread = sync::spawn("flusher", move || flusher.run(&disk, interval))
            .map_err(|e| Error::why(ErrorKind::Host, "cannot start a thread").because(e))?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// Has `done` called with the result of a round that begins after this call.
    pub fn join_round(&self, done: Done) {
        let mut state = self.state.lock();
        let next = state.callers.take();
        state.callers = Some(Box::new(Caller { done, next }));
        self.wake.notify_one();
    }

    /// Asks for a round that nobody waits for by name.
    pub fn request(&self) {
        self.state.lock().requested = true;
        self.wake.notify_one();
    }

    /// Ends the thread after it has answered everybody, and waits for that.
    pub fn stop(&self) {
        self.state.lock().stop = true;
        self.wake.notify_one();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            if !thread.join() {
                log::error!("the flusher panicked");
            }
        }
    }

    fn run(&self, disk: &Weak<Disk>, interval: Option<Duration>) {
        let mut next_timer = interval.map(|interval| sync::now() + interval);
        let mut next_tick = sync::now() + TICK;
        loop {
            let mut state = self.state.lock();
            if state.callers.is_none() && !state.requested && !state.stop {
                let until = next_timer.map_or(next_tick, |timer| timer.min(next_tick));
                self.wake.wait_until(&mut state, until);
            }
            let mut callers = state.callers.take();
            let requested = std::mem::take(&mut state.requested);
            let stop = state.stop && callers.is_none();
            drop(state);
            let Some(disk) = disk.upgrade() else { return };
            let timer = next_timer.is_some_and(|at| at <= sync::now());
            if timer {
                next_timer = interval.map(|interval| sync::now() + interval);
            }
            if callers.is_some() || requested || (timer && disk.has_unflushed()) {
                let guarded = || disk.run_round();
                let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(guarded));
                let mut result = caught.unwrap_or_else(|_| {
                    disk.health.latch("the flusher panicked");
                    Err(disk.health.error())
                });
                if planted(Bug::RunningRoundJoined) && callers.is_some() {
                    join_late(&mut callers, self.state.lock().callers.take());
                }
                while let Some(caller) = callers {
                    let answer = match &result {
                        Ok(()) => Ok(()),
                        Err(_) => std::mem::replace(&mut result, Err(disk.health.error())),
                    };
                    bump(&disk.counters.flushes, 1);
                    (caller.done)(answer);
                    callers = caller.next;
                }
                disk.after_round();
            }
            // Not after every round: who waits for space asks for one each time it has to wait
            // again, and would otherwise try as fast as the host can refuse.
            if stop || next_tick <= sync::now() {
                next_tick = sync::now() + TICK;
                disk.tick();
            }
            if stop {
                return;
            }
        }
    }
}

/// A planted bug: those who came during a round are told of its end too.
fn join_late(callers: &mut Option<Box<Caller>>, late: Option<Box<Caller>>) {
    let mut end = callers;
    while let Some(caller) = end {
        end = &mut caller.next;
    }
    *end = late;
}

impl Disk {
    /// True when something was written that may not be durable.
    fn has_unflushed(&self) -> bool {
        self.parts().iter().any(|part| {
            if part.data_dirty.is_noted() {
                return true;
            }
            let table = part.table.lock();
            !table.dirty.is_empty() || table.alloc.as_ref().is_some_and(|a| a.waiting() > 0)
        })
    }

    /// What is due from time to time: freed clusters whose last reader has gone, and another try
    /// for those who wait for space.
    fn tick(&self) {
        if let Some(mut guard) = self.flush.try_lock() {
            self.release_drained(&mut guard);
        }
        if self.space_waiters.load(Ordering::Relaxed) == 0 {
            self.space_is_short.store(false, Ordering::Relaxed);
            return;
        }
        for part in self.parts().iter() {
            let woken = part.table.lock().parked.take(|wait| wait == Wait::Space);
            part.wake(woken);
        }
    }
}
