//! One aligned buffer for each session thread, made before the first request.
//!
//! Imports: nothing of this crate.
//! Never: allocates on a thread that has its buffer already.
//!
//! [`Buffers::new`] makes as many buffers as there will be session threads and touches every page
//! of them, so that serving a request needs no memory from a host that may be reclaiming pages of
//! the very disk being served. A thread takes a buffer at its first request and keeps it until it
//! ends. A thread too many gets one made for it, if the host has the memory.

use parking_lot::Mutex;
use std::cell::RefCell;

/// Buffers start at a multiple of this, as O_DIRECT wants it.
pub(crate) const ALIGN: usize = 4096;

/// Largest request that fits: the kernel's limit of 256 pages, and a page more.
pub(crate) const SIZE: usize = (1 << 20) + ALIGN;

thread_local! {
    static MINE: RefCell<Option<Aligned>> = const { RefCell::new(None) };
}

/// Memory whose first byte is at a multiple of [`ALIGN`].
#[derive(Debug)]
struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
}

impl Aligned {
    fn new() -> Option<Self> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(SIZE.checked_add(ALIGN)?).ok()?;
        // A byte that is not zero: the allocator cannot satisfy this with untouched pages.
        bytes.resize(SIZE.checked_add(ALIGN)?, 0xa5);
        let skip = bytes.as_ptr().align_offset(ALIGN);
        (skip < ALIGN).then_some(Self { bytes, skip })
    }

    fn as_mut(&mut self) -> &mut [u8] {
        let Self { bytes, skip } = self;
        bytes
            .get_mut(*skip..)
            .and_then(|rest| rest.get_mut(..SIZE))
            .unwrap_or_default()
    }
}

/// The buffers that no thread has taken yet.
#[derive(Debug)]
pub(crate) struct Buffers {
    spare: Mutex<Vec<Aligned>>,
}

impl Buffers {
    /// Makes one buffer for each of `threads`; fewer when the host has no more memory.
    #[must_use]
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            spare: Mutex::new((0..threads).map_while(|_| Aligned::new()).collect()),
        }
    }

    /// Runs `serve` with this thread's buffer, of [`SIZE`] bytes. `None` without running it when
    /// the thread has none and the host has no memory for one.
    pub(crate) fn with<R>(&self, serve: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        MINE.with_borrow_mut(|mine| {
            if mine.is_none() {
                let spare = self.spare.lock().pop();
                *mine = spare.or_else(Aligned::new);
            }
            mine.as_mut().map(|mine| serve(mine.as_mut()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_one_aligned_buffer() {
        let buffers = Buffers::new(2);
        let place = |buf: &mut [u8]| (buf.as_ptr().addr(), buf.len());
        let first = buffers.with(place).unwrap();
        assert_eq!(first.0 % ALIGN, 0);
        assert_eq!(first.1, SIZE);
        assert_eq!(buffers.with(place), Some(first));
        let left = buffers.spare.lock().len();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| buffers.with(place)).join().unwrap().unwrap();
            assert_ne!(other.0, first.0);
        });
        assert_eq!(buffers.spare.lock().len() + 1, left);
    }

    #[test]
    fn a_thread_too_many_is_served_as_well() {
        let buffers = Buffers::new(0);
        let len = std::thread::scope(|scope| {
            scope
                .spawn(|| buffers.with(|buf| buf.len()))
                .join()
                .unwrap()
        });
        assert_eq!(len, Some(SIZE));
    }
}
