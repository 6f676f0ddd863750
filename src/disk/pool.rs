//! The threads that serve what a session thread does not: large requests, and all that must
//! allocate, copy, load or wait.
//!
//! Jobs are only ever spawned. A `scope` or `join` would let a worker steal a job that wants what
//! the worker holds, and hang.
//!
//! Jobs run in the order in which they were handed in. A worker of rayon's prefers what it has
//! spawned itself, and the newest of that: a long request that lets others go first would come
//! straight back, and with enough of them nobody else would ever be served. So the jobs wait in a
//! list of their own, and what rayon is given says only that the oldest of them is to be run.

use super::table::Job;
use crate::error::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;

/// Jobs that the list has room for from the start: more than a kernel keeps in flight.
const QUEUE_ROOM: usize = 256;

/// Something that runs jobs.
pub trait Spawn: Send + Sync + Debug {
    /// Queues a job; never runs it on the calling thread, which may hold what the job needs.
    fn spawn(&self, job: Box<dyn Job>);
}

/// A rayon pool of the program's own.
struct RayonPool {
    pool: rayon::ThreadPool,
    waiting: Arc<Mutex<VecDeque<Box<dyn Job>>>>,
}

impl Debug for RayonPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RayonPool({:?})", self.pool)
    }
}

impl Spawn for RayonPool {
    fn spawn(&self, job: Box<dyn Job>) {
        self.waiting.lock().push_back(job);
        let waiting = Arc::clone(&self.waiting);
        self.pool.spawn(move || {
            let oldest = waiting.lock().pop_front();
            if let Some(job) = oldest {
                job.run();
            }
        });
    }
}

/// Starts a pool of `threads` threads.
pub fn start(threads: usize) -> Result<Arc<dyn Spawn>> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.max(1))
        .thread_name(|number| format!("pool-{number}"))
        // Jobs catch their own panics and latch the disk; rayon's default would abort the daemon.
        .panic_handler(|_| log::error!("a job panicked outside of its guard"))
        .build()
        .map_err(|e| Error::why(ErrorKind::Host, "cannot start threads").because(e))?;
    Ok(Arc::new(RayonPool {
        pool,
        waiting: Arc::new(Mutex::new(VecDeque::with_capacity(QUEUE_ROOM))),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    /// Comes back until somebody else has run, or for ten seconds.
    struct Yielding {
        pool: Arc<dyn Spawn>,
        other: Arc<AtomicBool>,
        until: Instant,
        ended: std::sync::mpsc::Sender<bool>,
    }

    impl Job for Yielding {
        fn run(self: Box<Self>) {
            let seen = self.other.load(Ordering::SeqCst);
            if seen || Instant::now() > self.until {
                self.ended.send(seen).unwrap();
            } else {
                Arc::clone(&self.pool).spawn(self);
            }
        }
    }

    struct Other(Arc<AtomicBool>);

    impl Job for Other {
        fn run(self: Box<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_job_that_yields_lets_others_run() {
        let pool = start(1).unwrap();
        let other = Arc::new(AtomicBool::new(false));
        let (ended, answer) = std::sync::mpsc::channel();
        pool.spawn(Box::new(Yielding {
            pool: Arc::clone(&pool),
            other: Arc::clone(&other),
            until: Instant::now() + Duration::from_secs(10),
            ended,
        }));
        pool.spawn(Box::new(Other(other)));
        assert!(
            answer.recv().unwrap(),
            "the only thread kept coming back to one job"
        );
    }
}
