//! One thread for the few requests that may take long and are no data.
//!
//! Imports: nothing of this crate.
//! Never: sees a read or a write of the disk that fits a buffer.
//!
//! Opening a snapshot, reading a partition table and looking for holes read BAT pages from the
//! host. Done on a session thread they would keep the kernel's reads and writes waiting; here they
//! wait for each other only. A job owns its reply; one that cannot be run is dropped, and dropping
//! a reply answers EIO.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

type Job = Box<dyn FnOnce() + Send>;

/// The thread and the way to it. Dropping it waits for the jobs that were handed in.
#[derive(Debug)]
pub(crate) struct Aside {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Aside {
    pub(crate) fn start() -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let thread = thread::Builder::new()
            .name("ploopfs-aside".to_owned())
            .spawn(move || {
                while let Ok(job) = inbox.recv() {
                    job();
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            // A thread that is gone gives the job back, and dropping it answers its request.
            drop(jobs.send(Box::new(job)));
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            log::error!("the thread for slow requests has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn jobs_run_in_order_and_all_before_the_end() {
        let count = Arc::new(AtomicU32::new(0));
        let aside = Aside::start().unwrap();
        for expected in 0..100 {
            let count = Arc::clone(&count);
            aside.run(move || assert_eq!(count.fetch_add(1, Ordering::Relaxed), expected));
        }
        drop(aside);
        assert_eq!(count.load(Ordering::Relaxed), 100);
    }
}
