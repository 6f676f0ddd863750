//! Makes the table that waiting threads queue in as large as it will ever be.
//!
//! Imports: nothing of this crate.
//! Never: leaves a thread behind.
//!
//! `parking_lot` keeps one table for all threads that wait for a lock. It makes it larger when a
//! thread waits for the first time in its life and the table is small for so many, asks the heap
//! for it in one piece, and ends the program when there is none; for two dozen threads that is
//! more than 4 KiB already. It never makes it smaller, so it is enough to have had so many threads
//! wait at one time.

use parking_lot::{Condvar, Mutex};
use std::io;
use std::thread;

/// The stack of a thread that does next to nothing.
const STACK: usize = 64 << 10;

/// Sees to it that so many threads can wait for locks without asking the heap for a larger table.
pub(crate) fn prepare(threads: usize) -> io::Result<()> {
    let (here, all_here) = (Mutex::new(0), Condvar::new());
    let wait = || {
        let mut count = here.lock();
        *count += 1;
        while *count < threads {
            all_here.wait(&mut count);
        }
        all_here.notify_all();
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            let builder = thread::Builder::new().stack_size(STACK);
            if let Err(error) = builder.spawn_scoped(scope, wait) {
                *here.lock() = threads;
                all_here.notify_all();
                return Err(error);
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_threads_meets_and_goes() {
        for threads in [0, 1, 2, 50] {
            prepare(threads).unwrap();
        }
    }
}
