//! Everything on one thread: what the disk starts as a thread of its own runs when its end is
//! waited for, and waiting only lets the clock go on. A run is the same each time, and quick.
//!
//! With one client nobody else could end a wait, so one without an end is a bug, and found.

use parking_lot::Mutex;
use ploopfs::disk::pool::Spawn;
use ploopfs::disk::table::Job;
use ploopfs::sync::{self, Scheduler};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

type Body = Box<dyn FnOnce() + Send>;

struct Alone {
    start: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    now: Duration,
    /// Threads that have not begun, by the event of their end.
    bodies: HashMap<usize, Body>,
}

impl std::fmt::Debug for Alone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Alone")
    }
}

impl Scheduler for Alone {
    fn now(&self) -> Instant {
        self.start + self.state.lock().now
    }

    fn step(&self) {}

    fn blocked(&self) {
        panic!("a lock is held that nobody can let go of");
    }

    fn wait(&self, event: usize, until: Option<Instant>) {
        let body = self.state.lock().bodies.remove(&event);
        match (body, until) {
            (Some(body), _) => body(),
            (None, Some(until)) => {
                let mut state = self.state.lock();
                state.now = state.now.max(until.saturating_duration_since(self.start));
            }
            (None, None) => panic!("a wait that nobody can end"),
        }
    }

    fn tell_one(&self, _event: usize) {}

    fn tell(&self, _event: usize) {}

    fn spawn(&self, _name: &str, ended: usize, body: Body) -> io::Result<()> {
        self.state.lock().bodies.insert(ended, body);
        Ok(())
    }
}

/// Makes the calling thread the only one of what `body` does.
pub(crate) fn run<T>(body: impl FnOnce() -> T) -> T {
    static START: OnceLock<Instant> = OnceLock::new();
    sync::set_scheduler(Some(Arc::new(Alone {
        start: *START.get_or_init(Instant::now),
        state: Mutex::default(),
    })));
    let result = body();
    sync::set_scheduler(None);
    result
}

/// A pool that is never asked: those who wait for their answers need none.
#[derive(Debug)]
pub(crate) struct NoPool;

impl Spawn for NoPool {
    fn spawn(&self, _job: Box<dyn Job>) {
        panic!("a request of a caller that waits went to the pool");
    }
}
