//! Aligned buffers for session threads, made before the first request.
//!
//! Imports: nothing of this crate.
//! Never: allocates while there are no more requests at a time than buffers were made.
//!
//! [`Buffers::new`] makes as many buffers as there will be session threads and touches every page
//! of them, so that serving a request needs no memory from a host that may be reclaiming pages of
//! the very disk being served. A request takes the buffer that was given back last: with as many
//! requests at a time as there are CPUs, the same few buffers are used all the time, and what they
//! are made of stays in the caches of the CPUs. One for each thread would not, as the kernel has
//! the threads take turns. A request too many gets a buffer made for it, if the host has the
//! memory.

use parking_lot::Mutex;

/// Buffers start at a multiple of this, as O_DIRECT wants it.
pub(crate) const ALIGN: usize = 4096;

/// Largest request that fits: the kernel's limit of 256 pages, and a page more.
pub(crate) const SIZE: usize = (1 << 20) + ALIGN;

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

/// The buffers that no request has now; the last one was given back last.
#[derive(Debug)]
pub(crate) struct Buffers {
    spare: Mutex<Vec<Aligned>>,
}

/// A buffer of one request, which goes back after it.
struct Taken<'a> {
    bytes: Option<Aligned>,
    home: &'a Buffers,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut spare = self.home.spare.lock();
        // One too many goes, or keeping it would need memory.
        if spare.len() < spare.capacity() {
            spare.extend(self.bytes.take());
        }
    }
}

impl Buffers {
    /// Makes one buffer for each of `threads`; fewer when the host has no more memory.
    #[must_use]
    pub(crate) fn new(threads: usize) -> Self {
        let mut spare = Vec::with_capacity(threads);
        spare.extend((0..threads).map_while(|_| Aligned::new()));
        Self {
            spare: Mutex::new(spare),
        }
    }

    /// Runs `serve` with a buffer of [`SIZE`] bytes. `None` without running it when all are taken
    /// and the host has no memory for another one.
    pub(crate) fn with<R>(&self, serve: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let spare = self.spare.lock().pop();
        let mut taken = Taken {
            bytes: spare.or_else(Aligned::new),
            home: self,
        };
        taken.bytes.as_mut().map(|bytes| serve(bytes.as_mut()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::AssertUnwindSafe;

    fn place(buf: &mut [u8]) -> (usize, usize) {
        (buf.as_ptr().addr(), buf.len())
    }

    #[test]
    fn the_buffer_that_was_used_last_is_used_next() {
        let buffers = Buffers::new(3);
        let first = buffers.with(place).unwrap();
        assert_eq!(first.0 % ALIGN, 0);
        assert_eq!(first.1, SIZE);
        let others = buffers.with(|_| {
            let second = buffers.with(place);
            let on_another_thread = || buffers.with(place);
            let third = std::thread::scope(|scope| scope.spawn(on_another_thread).join().unwrap());
            assert_eq!(second, third);
            third
        });
        assert_ne!(others.unwrap(), Some(first));
        assert_eq!(buffers.with(place), Some(first));
        assert_eq!(buffers.spare.lock().len(), 3);
    }

    #[test]
    fn a_request_too_many_is_served_as_well() {
        let buffers = Buffers::new(1);
        let len = buffers.with(|_| buffers.with(|buf| buf.len()));
        assert_eq!(len, Some(Some(SIZE)));
        assert_eq!(buffers.spare.lock().len(), 1, "it was not kept");
        let panicked =
            std::panic::catch_unwind(AssertUnwindSafe(|| buffers.with(|_| panic!("planted"))));
        assert!(panicked.is_err());
        assert_eq!(buffers.spare.lock().len(), 1, "it came back");
    }
}
