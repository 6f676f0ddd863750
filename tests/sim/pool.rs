//! The disk's pool, with threads that the scheduler runs.

use super::heap::{self, Ration};
use ploopfs::disk::pool::Spawn;
use ploopfs::disk::table::Job;
use ploopfs::sync::{self, Condvar, Mutex, Rank, Thread};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Box<dyn Job>>,
    ends: bool,
}

#[derive(Default)]
struct Shared {
    ration: Option<&'static Ration>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// Runs jobs in the order in which they come.
pub(crate) struct SimPool {
    shared: Arc<Shared>,
    threads: parking_lot::Mutex<Vec<Thread>>,
}

impl fmt::Debug for SimPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimPool")
    }
}

impl SimPool {
    /// Starts so many threads; called on a thread that a scheduler runs.
    pub(crate) fn start(threads: u64, ration: Option<&'static Ration>) -> Arc<Self> {
        let shared = Arc::new(Shared {
            ration,
            ..Shared::default()
        });
        let start = |_| {
            let shared = Arc::clone(&shared);
            sync::spawn("pool", move || work(&shared)).expect("a thread")
        };
        Arc::new(Self {
            threads: parking_lot::Mutex::new((0..threads).map(start).collect()),
            shared,
        })
    }

    /// Ends the threads when no job is left.
    pub(crate) fn stop(&self) {
        self.shared.queue.lock().ends = true;
        self.shared.wake.notify_all();
        let threads = std::mem::take(&mut *self.threads.lock());
        threads.into_iter().for_each(|thread| {
            thread.join();
        });
    }
}

fn work(shared: &Shared) {
    loop {
        let job = {
            let mut queue = shared.queue.lock();
            loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.ends {
                    return;
                }
                shared.wake.wait_for(&mut queue, Duration::from_secs(3600));
            }
        };
        heap::with(shared.ration, || job.run());
    }
}

impl Spawn for SimPool {
    fn spawn(&self, job: Box<dyn Job>) {
        assert!(!Rank::Table.is_held(), "a job is handed over under a lock");
        heap::with(None, || self.shared.queue.lock().jobs.push_back(job));
        self.shared.wake.notify_one();
    }
}
