//! The threads that serve what a session thread does not: large requests, and all that must
//! allocate, copy, load or wait.
//!
//! Jobs are only ever spawned. A `scope` or `join` would let a worker steal a job that wants what
//! the worker holds, and hang.

use super::table::Job;
use crate::error::{Error, ErrorKind, Result};
use std::fmt::Debug;
use std::sync::Arc;

/// Something that runs jobs.
pub trait Spawn: Send + Sync + Debug {
    /// Queues a job; never runs it on the calling thread, which may hold what the job needs.
    fn spawn(&self, job: Box<dyn Job>);
}

/// A rayon pool of the program's own.
#[derive(Debug)]
struct RayonPool {
    pool: rayon::ThreadPool,
}

impl Spawn for RayonPool {
    fn spawn(&self, job: Box<dyn Job>) {
        self.pool.spawn(move || job.run());
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
    Ok(Arc::new(RayonPool { pool }))
}
