//! The note of unsynced bytes, and the gate of the in-use mark.

use super::{FEW, MANY, fails, holds, races};
use crate::atomics::{AtomicBool, AtomicU64, Ordering};
use crate::disk::flags::{Gate, Unsynced};
use crate::sys::raced::Raced;
use Ordering::{Acquire, Relaxed, Release, SeqCst};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// One sector a writer, in the host's cache and on its medium.
struct File {
    cached: [AtomicU64; 2],
    durable: Mutex<[u64; 2]>,
    unsynced: Unsynced,
    /// The same, for a mistake in it.
    loose: AtomicBool,
}

type Flush = fn(&File, &mut [u64; 2]);

impl File {
    fn sync(&self, durable: &mut [u64; 2]) {
        *durable = [self.cached[0].load(Relaxed), self.cached[1].load(Relaxed)];
    }

    fn flush(&self, durable: &mut [u64; 2]) {
        if self.unsynced.take() {
            self.sync(durable);
        }
    }
}

/// Two clients that each write and flush, and a timer that flushes too if told.
fn flushing(write: fn(&File, usize), flush: Flush, timer: bool) -> impl Fn() + Send + Sync {
    move || {
        let file = Arc::new(File {
            cached: Default::default(),
            durable: Mutex::new([0; 2]),
            unsynced: Unsynced::default(),
            loose: AtomicBool::default(),
        });
        let client = move |file: &File, own: usize| {
            write(file, own);
            let mut durable = file.durable.lock().expect("nobody panics");
            flush(file, &mut durable);
            assert_eq!(durable[own], 1, "lost what was flushed");
        };
        let other = {
            let file = Arc::clone(&file);
            thread::spawn(move || client(&file, 1))
        };
        let third = timer.then(|| {
            let file = Arc::clone(&file);
            thread::spawn(move || flush(&file, &mut file.durable.lock().expect("nobody panics")))
        });
        client(&file, 0);
        other.join().expect("it ends");
        third.map(|third| third.join().expect("it ends"));
    }
}

fn write_then_note(file: &File, own: usize) {
    file.cached[own].store(1, Relaxed);
    file.unsynced.note();
}

#[test]
fn a_flush_covers_all_that_was_answered_before() {
    holds(MANY, flushing(write_then_note, File::flush, false));
    holds(FEW, flushing(write_then_note, File::flush, true));
}

#[test]
fn notes_at_the_wrong_time_are_found() {
    let early = |file: &File, own: usize| {
        file.unsynced.note();
        file.cached[own].store(1, Relaxed);
    };
    // The flag is only cleared when the sync is through.
    let late = |file: &File, durable: &mut [u64; 2]| {
        if file.unsynced.take() {
            file.unsynced.note();
            file.sync(durable);
            let _ = file.unsynced.take();
        }
    };
    let lost = |write: fn(&File, usize), flush: Flush| {
        let found = fails(FEW, flushing(write, flush, true));
        assert!(found.contains("lost what was flushed"), "{found}");
    };
    lost(early, File::flush);
    lost(write_then_note, late);
    // A note that overwrites another client's hides what came before that.
    let store = |file: &File, own: usize| {
        file.cached[own].store(1, Relaxed);
        file.loose.store(true, SeqCst);
    };
    let take = |file: &File, durable: &mut [u64; 2]| {
        if file.loose.swap(false, SeqCst) {
            file.sync(durable);
        }
    };
    lost(store, take);
}

/// First writers at a new image; whoever writes must have the mark on the medium behind it.
fn marking(open: fn(&Gate, &AtomicBool), is_open: fn(&Gate, &AtomicBool) -> bool) -> impl Fn() {
    move || {
        let image = Arc::new((
            Gate::new(false),
            AtomicBool::new(false),
            Mutex::new(false),
            Raced::default(),
        ));
        let client = move |image: &(Gate, AtomicBool, Mutex<bool>, Raced)| {
            let (gate, loose, flush, mark) = image;
            if !is_open(gate, loose) {
                let mut set = flush.lock().expect("nobody panics");
                if !*set {
                    mark.change();
                    *set = true;
                }
                open(gate, loose);
            }
            mark.read();
        };
        let other = {
            let image = Arc::clone(&image);
            thread::spawn(move || client(&image))
        };
        client(&image);
        other.join().expect("it ends");
    }
}

#[test]
fn nobody_writes_before_the_mark_is_durable() {
    holds(
        MANY,
        marking(|gate, _| gate.open(), |gate, _| gate.is_open()),
    );
    let set = |_: &Gate, loose: &AtomicBool| loose.store(true, Release);
    holds(MANY, marking(set, |_, loose| loose.load(Acquire)));
    races(MANY, marking(set, |_, loose| loose.load(Relaxed)));
    let set = |_: &Gate, loose: &AtomicBool| loose.store(true, Relaxed);
    races(MANY, marking(set, |_, loose| loose.load(Acquire)));
}
