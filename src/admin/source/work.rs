//! Pieces of work over one or two sources: cut where their data begins and ends, done by several
//! threads, and taken back in disk order.
//!
//! Memory is bounded by the number of threads: each has its buffers, and a result is small. A host
//! gives more with several requests at a time than with one, so there are more threads than there
//! may be processors. The two locks here are taken before any of the sources' own, one at a time.

use super::{Ranges, Source};
use crate::admin::progress::Progress;
use crate::error::{Error, Result};
use crate::units::{DiskOffset, len_u64, len_usize};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Threads at least, so that the host has several requests at a time.
const THREADS_MIN: usize = 4;
/// Results that may wait for the one before them.
const WAITING_MAX: usize = 4096;
/// Threads at most.
const THREADS_MAX: usize = 16;

/// Reads a range of a disk; what is past the disk's end is zeros.
pub fn read_padded(source: &dyn Source, at: u64, buf: &mut [u8]) -> Result<()> {
    let there = len_usize(source.size().saturating_sub(at)).unwrap_or(usize::MAX);
    let (bytes, past) = buf.split_at_mut(there.min(buf.len()));
    past.fill(0);
    if bytes.is_empty() {
        return Ok(());
    }
    source.read_at(DiskOffset::new(at), bytes)
}

/// The data ranges of a source, remembered while they are being passed.
pub struct DataCursor<'a> {
    ranges: Ranges<'a>,
    /// The range that has not been passed; `None` when there is none.
    found: Option<Range<u64>>,
    looked: bool,
}

impl<'a> DataCursor<'a> {
    /// At the start of the disk.
    #[must_use]
    pub fn new(source: &'a dyn Source) -> Self {
        Self {
            ranges: source.data(DiskOffset::ZERO),
            found: None,
            looked: false,
        }
    }

    /// The data at or after a position that never goes back.
    pub fn at(&mut self, at: u64) -> Result<Option<Range<u64>>> {
        while !self.looked || self.found.as_ref().is_some_and(|range| range.end <= at) {
            self.looked = true;
            let found = self.ranges.next().transpose()?;
            self.found = found.map(|range| range.start.get()..range.end.get());
        }
        Ok(self
            .found
            .clone()
            .map(|range| range.start.max(at)..range.end))
    }
}

impl fmt::Debug for DataCursor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataCursor({:?})", self.found)
    }
}

/// Runs `work` on every piece, on several threads, and gives what it returns to `each` in the order
/// of the pieces, one at a time, until that says `false`. Stops at the first piece that fails,
/// after all before it have been given.
pub fn in_order<P, T>(
    pieces: impl Iterator<Item = Result<P>> + Send,
    progress: &Progress,
    work: impl Fn(&P, &mut Buffers) -> Result<T> + Sync,
    each: impl FnMut(P, T) -> Result<bool> + Send,
) -> Result<()>
where
    P: Send,
    T: Send,
{
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let feed = Mutex::new(Feed {
        pieces: pieces.fuse(),
        next: 0,
    });
    let taker = Mutex::new(Taker {
        each,
        next: 0,
        waiting: BTreeMap::new(),
        result: Ok(()),
    });
    let over = AtomicBool::new(false);
    let run = || {
        let mut buffers = Buffers::default();
        let _end = EndOfPanic(&over);
        while !over.load(Ordering::Relaxed) {
            // Somebody else has the one that all wait for.
            if taker.lock().waiting.len() > WAITING_MAX {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let (number, piece) = {
                let mut feed = feed.lock();
                let Some(piece) = feed.pieces.next() else {
                    return;
                };
                let number = feed.next;
                feed.next += 1;
                (number, piece)
            };
            let done = piece.and_then(|piece| {
                progress.check()?;
                let done = work(&piece, &mut buffers)?;
                Ok((piece, done))
            });
            if !taker.lock().take(number, done) {
                over.store(true, Ordering::Relaxed);
            }
        }
    };
    let mut started = Ok(());
    std::thread::scope(|scope| {
        for number in 1..cores.clamp(THREADS_MIN, THREADS_MAX) {
            let thread = std::thread::Builder::new().name(format!("work-{number}"));
            if let Err(e) = thread.spawn_scoped(scope, run) {
                // This thread works, too; fewer are only slower.
                started = Err(e);
                break;
            }
        }
        run();
    });
    if let Err(e) = started {
        log::debug!("not all threads could be started: {e}");
    }
    taker.into_inner().result
}

/// Lets the others end when a thread panics, whose result they would wait for.
struct EndOfPanic<'a>(&'a AtomicBool);

impl Drop for EndOfPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

struct Feed<I> {
    pieces: I,
    next: u64,
}

struct Taker<P, T, E> {
    each: E,
    next: u64,
    waiting: BTreeMap<u64, Result<(P, T)>>,
    result: Result<()>,
}

impl<P, T, E: FnMut(P, T) -> Result<bool>> Taker<P, T, E> {
    /// Gives on what has its turn. `false` when no more is wanted.
    fn take(&mut self, number: u64, done: Result<(P, T)>) -> bool {
        if self.next == u64::MAX {
            return false;
        }
        self.waiting.insert(number, done);
        while let Some(done) = self.waiting.remove(&self.next) {
            self.next += 1;
            match done.and_then(|(piece, done)| (self.each)(piece, done)) {
                Ok(true) => {}
                Ok(false) => self.next = u64::MAX,
                Err(e) => {
                    self.result = Err(e);
                    self.next = u64::MAX;
                }
            }
        }
        self.next != u64::MAX
    }
}

/// Memory that a thread keeps for its pieces.
#[derive(Debug, Default)]
pub struct Buffers {
    pair: [Vec<u8>; 2],
}

impl Buffers {
    /// Two buffers of a length; what is in them is left over.
    pub fn two(&mut self, len: usize) -> Result<(&mut [u8], &mut [u8])> {
        for buffer in &mut self.pair {
            let more = len.saturating_sub(buffer.len());
            buffer
                .try_reserve_exact(more)
                .map_err(|_| Error::errno(libc::ENOMEM))?;
            buffer.resize(len.max(buffer.len()), 0);
        }
        let [a, b] = &mut self.pair;
        Ok((&mut a[..len], &mut b[..len]))
    }

    /// One buffer of a length.
    pub fn one(&mut self, len: usize) -> Result<&mut [u8]> {
        let [buffer, _] = &mut self.pair;
        let more = len.saturating_sub(buffer.len());
        buffer
            .try_reserve_exact(more)
            .map_err(|_| Error::errno(libc::ENOMEM))?;
        buffer.resize(len.max(buffer.len()), 0);
        Ok(&mut buffer[..len])
    }
}

/// The first byte in which two equally long ranges differ.
#[must_use]
pub fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    const STEP: usize = 4096;
    let pairs = a.chunks(STEP).zip(b.chunks(STEP));
    let (number, (a, b)) = pairs.enumerate().find(|(_, (a, b))| a != b)?;
    let within = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(len_u64(number * STEP + within))
}

/// True when all bytes are zeros.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    first_data(bytes).is_none()
}

/// The first byte that is not zero.
#[must_use]
pub fn first_data(bytes: &[u8]) -> Option<u64> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let pieces = bytes.chunks(ZEROS.len());
    let (number, piece) = pieces
        .enumerate()
        .find(|(_, piece)| **piece != ZEROS[..piece.len()])?;
    let within = piece.iter().position(|byte| *byte != 0)?;
    Some(len_u64(number * ZEROS.len() + within))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn squares(wanted: u64, fail_at: Option<u64>) -> (Vec<u64>, Result<()>) {
        let mut taken = Vec::new();
        let pieces = (0..1000_u64).map(|n| match fail_at {
            Some(bad) if bad == n => Err(Error::errno(libc::EIO)),
            _ => Ok(n),
        });
        let result = in_order(
            pieces,
            &Progress::default(),
            |n, buffers| {
                let buffer = buffers.one(8)?;
                buffer.copy_from_slice(&(n * n).to_le_bytes());
                Ok(u64::from_le_bytes(buffer.try_into().expect("eight")))
            },
            |n, square| {
                assert_eq!(square, n * n);
                taken.push(n);
                Ok(n + 1 < wanted)
            },
        );
        (taken, result)
    }

    #[test]
    fn results_come_in_order_and_no_further_than_wanted() {
        let (taken, result) = squares(u64::MAX, None);
        assert!(result.is_ok() && taken.iter().copied().eq(0..1000));
        let (taken, result) = squares(10, None);
        assert!(result.is_ok() && taken.iter().copied().eq(0..10));
    }

    #[test]
    fn a_failure_comes_after_what_is_before_it() {
        let (taken, result) = squares(u64::MAX, Some(500));
        assert!(result.is_err() && taken.iter().copied().eq(0..500));
        // What nobody wants to know any more is no failure.
        let (taken, result) = squares(10, Some(500));
        assert!(result.is_ok() && taken.len() == 10);
    }

    #[test]
    fn one_that_is_late_holds_the_others_back() {
        let ahead = std::sync::atomic::AtomicUsize::new(0);
        let most = WAITING_MAX + 2 * THREADS_MAX;
        let work = |n: &usize, _: &mut Buffers| {
            if *n == 0 {
                std::thread::sleep(Duration::from_millis(200));
                assert!(ahead.load(Ordering::Relaxed) <= most, "too far ahead");
            } else {
                ahead.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let pieces = (0..4 * WAITING_MAX).map(Ok);
        let mut count = 0;
        let taken = in_order(pieces, &Progress::default(), work, |_, ()| {
            count += 1;
            Ok(true)
        });
        assert!(taken.is_ok() && count == 4 * WAITING_MAX);
    }

    #[test]
    #[should_panic(expected = "scoped thread panicked")]
    fn a_panic_hangs_nobody() {
        let pieces = (0..4 * WAITING_MAX).map(Ok);
        let main = std::thread::current().id();
        let work = |n: &usize, _: &mut Buffers| {
            // On the thread that called, the message would be its own.
            if std::thread::current().id() == main {
                std::thread::sleep(Duration::from_millis(20));
            } else {
                assert!(*n % 3 != 0, "planned");
            }
            Ok(())
        };
        let _ = in_order(pieces, &Progress::default(), work, |_, ()| Ok(true));
    }

    #[test]
    fn a_wish_to_stop_ends_it() {
        let progress = Progress::default();
        progress.cancel();
        let pieces = (0..9).map(Ok);
        let result = in_order(pieces, &progress, |_: &i32, _| Ok(()), |_, ()| Ok(true));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn differences_are_found_to_the_byte() {
        let (mut a, b) = (vec![0; 10_000], vec![0; 10_000]);
        assert_eq!(first_difference(&a, &b), None);
        assert!(is_zero(&a));
        for at in [9_999, 4096, 4095, 0] {
            a[at] = 1;
            let at = Some(len_u64(at));
            assert_eq!((first_difference(&a, &b), first_data(&a)), (at, at));
        }
    }
}
