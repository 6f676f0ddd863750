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
use std::fmt::Debug;
use std::sync::Arc;

/// Jobs in the order in which they came. Made of boxes, so that it never asks for a large piece of
/// memory: what comes in is a stack, which is turned over whenever the other end has run out.
#[derive(Default)]
struct Queue {
    oldest_first: Option<Box<Queued>>,
    newest_first: Option<Box<Queued>>,
}

struct Queued {
    job: Box<dyn Job>,
    next: Option<Box<Queued>>,
}

impl Queue {
    fn push(&mut self, job: Box<dyn Job>) {
        let next = self.newest_first.take();
        self.newest_first = Some(Box::new(Queued { job, next }));
    }

    fn pop(&mut self) -> Option<Box<dyn Job>> {
        if self.oldest_first.is_none() {
            while let Some(mut queued) = self.newest_first.take() {
                self.newest_first = queued.next.take();
                queued.next = self.oldest_first.take();
                self.oldest_first = Some(queued);
            }
        }
        let oldest = *self.oldest_first.take()?;
        self.oldest_first = oldest.next;
        Some(oldest.job)
    }
}

/// Something that runs jobs.
pub trait Spawn: Send + Sync + Debug {
    /// Queues a job; never runs it on the calling thread, which may hold what the job needs.
    fn spawn(&self, job: Box<dyn Job>);
}

/// A rayon pool of the program's own.
struct RayonPool {
    pool: rayon::ThreadPool,
    waiting: Arc<Mutex<Queue>>,
}

impl Debug for RayonPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RayonPool({:?})", self.pool)
    }
}

impl Spawn for RayonPool {
    fn spawn(&self, job: Box<dyn Job>) {
        self.waiting.lock().push(job);
        let waiting = Arc::clone(&self.waiting);
        self.pool.spawn(move || {
            let oldest = waiting.lock().pop();
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
        waiting: Arc::default(),
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

    /// Tells its number when it runs.
    struct Numbered(u32, std::sync::mpsc::Sender<u32>);

    impl Job for Numbered {
        fn run(self: Box<Self>) {
            self.1.send(self.0).unwrap();
        }
    }

    #[test]
    fn jobs_come_out_as_they_went_in() {
        let (told, order) = std::sync::mpsc::channel();
        let mut queue = Queue::default();
        let mut next = 0;
        for round in 0..20 {
            for _ in 0..round {
                queue.push(Box::new(Numbered(next, told.clone())));
                next += 1;
            }
            for _ in 0..round / 2 {
                queue.pop().unwrap().run();
            }
        }
        while let Some(job) = queue.pop() {
            job.run();
        }
        assert!(order.try_iter().eq(0..next));
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
