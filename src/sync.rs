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
//!
//! Each lock has a [`Rank`], and a thread takes locks in the order of their ranks only. Where the
//! checks of debug builds are on, whoever does otherwise panics, whether or not another thread is
//! there to make it a deadlock; release builds have none of this.

use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::io;
use std::ops::{Deref, DerefMut};
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

    /// Wakes one of those that wait for `event`, any of them.
    fn tell_one(&self, event: usize);

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
    debug_assert!(!Rank::Table.is_held(), "a wait under a table's lock");
    match scheduler() {
        Some(scheduler) => scheduler.wait(0, Some(scheduler.now() + time)),
        None => std::thread::sleep(time),
    }
}

/// Where a lock stands in the order in which a thread takes locks, outermost first. No two of one
/// rank are held at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Rank {
    /// How many requests a disk has in its pool: held while it is closed.
    Intake,
    /// A disk's flush rounds. May be held over system calls and waits, like the two after it.
    Flush,
    /// The length of a file.
    Grow,
    /// The loading of a page of the map.
    Load,
    /// All that changes together in memory: nothing but bounded work there is done under it.
    Table,
    /// Under such a lock no other is taken.
    #[default]
    Last,
}

thread_local! {
    /// The ranks of the locks that the thread holds, one bit each.
    static HELD: Cell<u8> = const { Cell::new(0) };
}

impl Rank {
    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// True when the calling thread holds a lock of this rank; never in a release build.
    #[must_use]
    pub fn is_held(self) -> bool {
        cfg!(debug_assertions) && HELD.get() & self.bit() != 0
    }

    /// Panics if the calling thread holds a lock that is to be taken after one of this rank, or
    /// another one of the same rank.
    #[inline]
    fn check(self) {
        if cfg!(debug_assertions) && HELD.get() >= self.bit() && !std::thread::panicking() {
            panic!(
                "locks out of order: {self:?} is taken under {:#b}",
                HELD.get()
            );
        }
    }

    #[inline]
    fn note(self, held: bool) {
        if cfg!(debug_assertions) {
            let others = HELD.get() & !self.bit();
            HELD.set(if held { others | self.bit() } else { others });
        }
    }
}

/// A lock.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized> {
    rank: Rank,
    inner: parking_lot::Mutex<T>,
}

/// A lock that is held.
#[derive(Debug)]
pub struct MutexGuard<'a, T: ?Sized> {
    rank: Rank,
    inner: parking_lot::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// A lock that nobody holds, and under which no other is taken.
    pub const fn new(value: T) -> Self {
        Self::ranked(Rank::Last, value)
    }

    /// A lock that nobody holds, with its place in the order.
    pub const fn ranked(rank: Rank, value: T) -> Self {
        Self {
            rank,
            inner: parking_lot::Mutex::new(value),
        }
    }

    /// Waits until nobody holds it.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.rank.check();
        let Some(scheduler) = scheduler() else {
            return MutexGuard::new(self.rank, self.inner.lock());
        };
        scheduler.step();
        loop {
            match self.try_lock() {
                Some(guard) => return guard,
                None => scheduler.blocked(),
            }
        }
    }

    /// `None` when somebody holds it.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let inner = self.inner.try_lock()?;
        Some(MutexGuard::new(self.rank, inner))
    }
}

impl<'a, T: ?Sized> MutexGuard<'a, T> {
    #[inline]
    fn new(rank: Rank, inner: parking_lot::MutexGuard<'a, T>) -> Self {
        rank.note(true);
        Self { rank, inner }
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.rank.note(false);
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
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
            self.0.wait_until(&mut guard.inner, until);
            return;
        };
        let mutex = parking_lot::MutexGuard::mutex(&guard.inner);
        parking_lot::MutexGuard::unlocked(&mut guard.inner, || {
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

    /// Wakes one who waits.
    pub fn notify_one(&self) {
        match scheduler() {
            Some(scheduler) => scheduler.tell_one(self.event()),
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

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn locks_are_taken_in_the_order_of_their_ranks() {
        let [flush, table] = [Rank::Flush, Rank::Table].map(|rank| Mutex::ranked(rank, ()));
        let (other, last) = (Mutex::ranked(Rank::Table, ()), Mutex::new(()));
        let panics = |take: &dyn Fn()| catch_unwind(AssertUnwindSafe(take)).is_err();
        assert!(!panics(&|| {
            let _held = (flush.lock(), table.lock(), last.lock());
        }));
        for (first, second) in [(&table, &flush), (&table, &other), (&last, &flush)] {
            let inverted = || {
                let _first = first.lock();
                drop(second.lock());
            };
            assert!(panics(&inverted));
            assert!(!Rank::Table.is_held() && second.try_lock().is_some());
        }
        // Tried in the wrong order is no deadlock, but what is taken under it may be one.
        assert!(panics(&|| {
            let _tried = (last.try_lock(), table.lock());
        }));
        // A guard of an outer lock may go first.
        let (outer, inner) = (flush.lock(), table.lock());
        drop(outer);
        assert!(Rank::Table.is_held() && !Rank::Flush.is_held());
        drop(inner);
        assert!(!panics(&|| drop(flush.lock())));
    }
}
