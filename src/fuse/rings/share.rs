//! Large requests, and which of some neighbouring threads has nothing to do.
//!
//! Imports: `atomics`, `sync`.
//! Never: leaves something waiting while all threads rest; allocates after it was made.
//!
//! Who serves a large request copies all of its bytes, which takes tens of microseconds. Meanwhile
//! the requests that come to that thread's ring have to wait, even where another CPU is idle. So
//! what is large waits where all can take it: a thread puts it there as soon as it sees it, and
//! takes one whenever it has nothing small in hand.
//!
//! A thread that goes to rest says so first, and looks again afterwards; one that puts something
//! there looks for those who rest afterwards. Whichever comes second sees the other, so nothing is
//! left lying. The thread that put it there goes on until nothing waits, so it calls others only
//! for what it cannot begin at once: to wake a thread takes about as long as to serve a request.

use crate::atomics::{AtomicBool, Ordering};
use crate::sync::Mutex;
use std::collections::VecDeque;

/// What waits for any of a few threads.
#[derive(Debug)]
pub(super) struct Share<T> {
    waiting: Mutex<VecDeque<T>>,
    /// By the threads' places among themselves.
    resting: Vec<AtomicBool>,
}

impl<T> Share<T> {
    /// For so many threads, and for never more than `most` at a time.
    pub(super) fn new(threads: usize, most: usize) -> Self {
        Self {
            waiting: Mutex::new(VecDeque::with_capacity(most)),
            resting: (0..threads).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Leaves something for whoever comes first.
    pub(super) fn put(&self, item: T) {
        self.waiting.lock().push_back(item);
    }

    /// What has waited longest.
    pub(super) fn take(&self) -> Option<T> {
        self.waiting.lock().pop_front()
    }

    /// A thread says that it has nothing to do. False if there is something after all.
    pub(super) fn rest(&self, place: usize) -> bool {
        if let Some(resting) = self.resting.get(place) {
            resting.store(true, Ordering::SeqCst);
        }
        self.waiting.lock().is_empty()
    }

    /// A thread is at work again.
    pub(super) fn rise(&self, place: usize) {
        if let Some(resting) = self.resting.get(place) {
            resting.store(false, Ordering::SeqCst);
        }
    }

    /// Calls as many of those who rest as there is work for, without what the caller will begin
    /// with itself. Each of them is called once.
    pub(super) fn call<E>(
        &self,
        own: usize,
        mut call: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let spare = self.waiting.lock().len().saturating_sub(own);
        let rests = |place: &usize| {
            let resting = &self.resting[*place];
            resting.load(Ordering::SeqCst) && resting.swap(false, Ordering::SeqCst)
        };
        let places = 0..self.resting.len();
        places.filter(rests).take(spare).try_for_each(&mut call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{self, Receiver};
    use std::time::Duration;

    fn called(share: &Share<u32>, own: usize) -> Vec<usize> {
        let mut called = Vec::new();
        let note = |place| {
            called.push(place);
            Ok::<(), ()>(())
        };
        share.call(own, note).unwrap();
        called
    }

    #[test]
    fn those_who_rest_are_called_for_what_nobody_begins_with() {
        let share = Share::new(4, 8);
        assert!(share.rest(1) && share.rest(2) && share.rest(3));
        share.put(7);
        assert_eq!(called(&share, 1), [0; 0], "the caller takes it");
        share.put(8);
        assert_eq!(called(&share, 1), [1], "no more than there is work for");
        assert_eq!(called(&share, 0), [2, 3], "each of them once");
        assert_eq!(called(&share, 0), [0; 0]);
        assert!(!share.rest(1), "there is work");
        assert_eq!([share.take(), share.take()], [Some(7), Some(8)]);
        share.rise(1);
        assert!(share.rest(1) && share.take().is_none());
    }

    #[test]
    fn a_thread_that_was_not_called_stays_marked() {
        let share = Share::new(2, 8);
        assert!(share.rest(0) && share.rest(1));
        share.put(1);
        assert_eq!(called(&share, 0), [0]);
        assert_eq!(called(&share, 0), [1]);
        assert_eq!(share.call(0, |_| Err(())), Ok(()), "nobody rests");
    }

    /// Each item but the last ones puts two more, and what calls a thread is a channel: were one
    /// left while all rest, nobody would ever be called again.
    #[test]
    fn nothing_waits_while_all_rest() {
        const THREADS: usize = 4;
        const ITEMS: usize = (1 << 14) - 1;
        let share = Share::new(THREADS, ITEMS);
        let served = AtomicUsize::new(0);
        let (bells, ears): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| mpsc::channel()).unzip();
        share.put(1);
        let serve = |place: usize, ear: Receiver<bool>| {
            loop {
                while let Some(item) = share.take() {
                    if 2 * item < ITEMS {
                        share.put(2 * item);
                        share.put(2 * item + 1);
                    }
                    share.call(1, |other| bells[other].send(true)).unwrap();
                    if served.fetch_add(1, Ordering::SeqCst) + 1 == ITEMS {
                        bells.iter().for_each(|bell| bell.send(false).unwrap());
                    }
                }
                if share.rest(place) {
                    let said = ear.recv_timeout(Duration::from_secs(60));
                    if !said.expect("nobody called") {
                        return;
                    }
                }
                share.rise(place);
            }
        };
        std::thread::scope(|scope| {
            for (place, ear) in ears.into_iter().enumerate() {
                let serve = &serve;
                scope.spawn(move || serve(place, ear));
            }
        });
        assert_eq!(served.load(Ordering::SeqCst), ITEMS);
    }
}
