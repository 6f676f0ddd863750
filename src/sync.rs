//! All that a thread of a disk can wait for: locks, signals, time, and the end of another thread.
//!
//! Imports: nothing of this crate.
//! Never: decides how long to wait; costs a lock that is free more than one look at the thread.
//!
//! On any usual thread these are the locks of `parking_lot` and the threads and the clock of the
//! standard library. A thread with a [`Scheduler`] asks that instead wherever it would have to wait
//! or where another might go first, and so do the threads that it starts. A scheduler that lets one
//! thread run at a time, and takes who is next and what the clock says from a seed, makes a whole
//! disk with its pool, its flusher and its clients run the same way each time: `tests/sim` is one.

use parking_lot::MutexGuard;
use std::cell::RefCell;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Decides which of its threads runs.
pub trait Scheduler: Send + Sync + Debug {
    /// The time.
    fn now(&self) -> Instant;

    /// The calling thread has come to a point where another may go first.
    fn step(&self);

    /// The calling thread cannot go on until some other thread has run.
    fn blocked(&self);

    /// The calling thread waits until `event` is told, or for the time. May end early.
    fn wait(&self, event: usize, until: Option<Instant>);

    /// Wakes all that wait for `event`.
    fn tell(&self, event: usize);

    /// Starts a thread that this scheduler runs too, and that tells `ended` as its last act.
    fn spawn(&self, name: &str, ended: usize, body: Box<dyn FnOnce() + Send>) -> io::Result<()>;
}

thread_local! {
    static SCHEDULER: RefCell<Option<Arc<dyn Scheduler>>> = const { RefCell::new(None) };
}

/// From now on the calling thread waits as `scheduler` says; `None` for as usual.
pub fn set_scheduler(scheduler: Option<Arc<dyn Scheduler>>) {
    SCHEDULER.set(scheduler);
}

/// What the calling thread waits by.
#[must_use]
pub fn scheduler() -> Option<Arc<dyn Scheduler>> {
    // At the end of a thread there is none any more.
    SCHEDULER
        .try_with(|scheduler| scheduler.borrow().clone())
        .ok()
        .flatten()
}

/// A point where another thread may go first, if there is a scheduler to say so.
pub fn step() {
    if let Some(scheduler) = scheduler() {
        scheduler.step();
    }
}

/// The time.
#[must_use]
pub fn now() -> Instant {
    scheduler().map_or_else(Instant::now, |scheduler| scheduler.now())
}

/// Waits so long.
pub fn sleep(time: Duration) {
    match scheduler() {
        Some(scheduler) => scheduler.wait(0, Some(scheduler.now() + time)),
        None => std::thread::sleep(time),
    }
}

/// A lock.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(parking_lot::Mutex<T>);

impl<T> Mutex<T> {
    /// A lock that nobody holds.
    pub const fn new(value: T) -> Self {
        Self(parking_lot::Mutex::new(value))
    }

    /// Waits until nobody holds it.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let Some(scheduler) = scheduler() else {
            return self.0.lock();
        };
        scheduler.step();
        loop {
            match self.0.try_lock() {
                Some(guard) => return guard,
                None => scheduler.blocked(),
            }
        }
    }

    /// `None` when somebody holds it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock()
    }
}

/// A signal to those who wait while they give a lock away.
#[derive(Debug, Default)]
pub struct Condvar(parking_lot::Condvar);

impl Condvar {
    /// A signal for which nobody waits.
    #[must_use]
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new())
    }

    fn event(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Waits for the signal, or until the time. May end early.
    pub fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) {
        let Some(scheduler) = scheduler() else {
            self.0.wait_until(guard, until);
            return;
        };
        let mutex = MutexGuard::mutex(guard);
        MutexGuard::unlocked(guard, || {
            scheduler.wait(self.event(), Some(until));
            // The lock is taken right after this, and no other thread runs in between.
            while mutex.is_locked() {
                scheduler.blocked();
            }
        });
    }

    /// Waits for the signal, or so long. May end early.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, time: Duration) {
        self.wait_until(guard, now() + time);
    }

    /// Wakes one who waits, or more.
    pub fn notify_one(&self) {
        match scheduler() {
            Some(scheduler) => scheduler.tell(self.event()),
            None => {
                self.0.notify_one();
            }
        }
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        match scheduler() {
            Some(scheduler) => scheduler.tell(self.event()),
            None => {
                self.0.notify_all();
            }
        }
    }
}

/// A thread that was started here.
#[derive(Debug)]
pub struct Thread(Kind);

#[derive(Debug)]
enum Kind {
    Usual(std::thread::JoinHandle<()>),
    /// The flag is set when it has ended; its place is the event.
    Scheduled(Arc<parking_lot::Mutex<bool>>),
}

/// Starts a thread.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    let Some(scheduler) = scheduler() else {
        let builder = std::thread::Builder::new().name(name.to_owned());
        return builder
            .spawn(body)
            .map(|thread| Thread(Kind::Usual(thread)));
    };
    let ended = Arc::new(parking_lot::Mutex::new(false));
    let flag = Arc::clone(&ended);
    let event = Arc::as_ptr(&ended).addr();
    let body = Box::new(move || {
        let _at_the_end = SetAtEnd(flag);
        body();
    });
    scheduler.spawn(name, event, body)?;
    Ok(Thread(Kind::Scheduled(ended)))
}

/// Sets a flag when the thread ends, by a panic too.
struct SetAtEnd(Arc<parking_lot::Mutex<bool>>);

impl Drop for SetAtEnd {
    fn drop(&mut self) {
        *self.0.lock() = true;
    }
}

impl Thread {
    /// Waits for its end; `false` when it panicked.
    pub fn join(self) -> bool {
        match self.0 {
            Kind::Usual(thread) => thread.join().is_ok(),
            Kind::Scheduled(ended) => {
                while !*ended.lock() {
                    match scheduler() {
                        Some(scheduler) => scheduler.wait(Arc::as_ptr(&ended).addr(), None),
                        None => std::thread::yield_now(),
                    }
                }
                true
            }
        }
    }
}
