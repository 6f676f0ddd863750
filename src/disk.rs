//! The flat disk: read, write, make zero, flush, close.
//!
//! Imports: `chain` and lower.
//! Never: knows of FUSE, prints, or follows a path.
//!
//! A request arrives on a thread of the transport, which must get back to the kernel soon. If its
//! size is below the order threshold and nothing stands in its way, it is served right there,
//! without a lock and without asking for memory: [`read`] and the in-place half of
//! [`write`](mod@write). So are a few larger ones at a time, since a copy and a wake-up cost more
//! than a thread that is busy, as long as others are free.
//! Everything else goes to the [`pool`] with a buffer that was set aside at the start
//! ([`buffers`]): large requests, and those that must load a page of the map, give a cluster a
//! place, copy one up, or make a range zero. What would have to wait there for another request is
//! parked ([`table`]), holding nothing but its reply and its buffer. When no buffer is left, the
//! thread on which the request arrived serves it alone: slower, but always to the end.
//!
//! Durability is [`flush`]'s business, and the thread that runs its rounds is the [`flusher`]'s.
//! A failure there [latches](health) the disk.

pub mod buffers;
pub mod direct;
pub mod epoch;
pub mod extents;
pub mod flags;
pub mod flush;
pub mod flusher;
pub mod health;
pub mod linear;
#[cfg(all(test, feature = "loom"))]
mod models {
    mod tests;
}
pub mod moving;
pub mod open;
pub mod part;
pub mod pool;
pub mod prepare;
pub mod read;
pub mod seek;
pub mod serve;
pub mod stats;
pub mod table;
pub mod write;
pub mod zero;

use crate::error::{Error, ErrorKind, Result};
use crate::plan::{INLINE_ORDER_DEFAULT, RequestOrder};
use crate::sync::{self, Condvar, Mutex};
use crate::units::DiskOffset;
use arc_swap::{ArcSwap, Guard};
use flush::FlushState;
use flusher::Flusher;
use health::Health;
use moving::Moving;
use part::Part;
use stats::{Counters, DiskStats, bump};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub use open::{Resources, open, open_view, open_with};

/// Requests that may wait for space at a time; the rest fail at once. Well below what the kernel
/// keeps in flight, so that other requests always get through.
const SPACE_WAITERS_MAX: usize = 8;

/// How many requests above the threshold may stay at a time on the threads on which they arrive, of
/// which there must be more, or as many where each has requests of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InlineMax {
    /// Another read stays while fewer than this do. It keeps its thread for a copy from memory.
    pub reads: usize,
    /// Another write stays while fewer than this do. It may keep its thread for longer: the host
    /// makes writers wait where much is unwritten, and reads what is around less than a page.
    pub writes: usize,
}

/// How a disk is opened and served.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Nothing is ever written.
    pub read_only: bool,
    /// Requests of this order (log2 of 4 KiB pages) and above go to the pool.
    pub inline_order: u32,
    /// But for a few at a time whose clusters are there already.
    pub large_inline: InlineMax,
    /// Bytes of memory for pages of the map.
    pub bat_cache: u64,
    /// The files are read and written past the host's page cache ([`direct`]).
    pub direct: bool,
    /// Bytes by which a file grows.
    pub grow_step: u64,
    /// What is copied up from a lower delta shares its blocks where the host can do that.
    pub reflink: bool,
    /// What happens when the host has no space.
    pub enospc: EnospcPolicy,
    /// Drop a dirty bitmap that writing would make a lie.
    pub drop_bitmaps: bool,
    /// Threads of the pool.
    pub pool_threads: usize,
    /// Milliseconds after which changed entries are flushed without being asked; 0 for never.
    pub flush_interval_ms: u64,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            inline_order: INLINE_ORDER_DEFAULT.0,
            large_inline: InlineMax::default(),
            bat_cache: 32 << 20,
            direct: false,
            grow_step: 16 << 20,
            reflink: true,
            enospc: EnospcPolicy::Seconds(60),
            drop_bitmaps: false,
            pool_threads: 4,
            flush_interval_ms: 5000,
        }
    }
}

/// What a request does when the host has no space for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnospcPolicy {
    /// Waits for ever.
    Wait,
    /// Fails at once.
    Fail,
    /// Waits this many seconds, then fails.
    Seconds(u64),
}

impl EnospcPolicy {
    /// True when a request that began to wait then waits no longer.
    #[must_use]
    pub fn is_over(self, since: Instant) -> bool {
        match self {
            Self::Wait => false,
            Self::Fail => true,
            Self::Seconds(seconds) => {
                sync::now().duration_since(since) >= Duration::from_secs(seconds)
            }
        }
    }
}

/// The answer to a read: called exactly once, from any thread.
pub trait ReadReply: Send + 'static {
    /// Gives the bytes, or says why there are none.
    fn done(self, result: Result<&[u8]>);
}

/// The answer to a request that returns no bytes: called exactly once, from any thread.
pub trait DoneReply: Send + 'static {
    /// Says that it is done, or why not.
    fn done(self, result: Result<()>);

    /// The bytes of a write that come with its reply, for [`Disk::write_brought`].
    fn brought(&self) -> &[u8] {
        &[]
    }

    /// Has the transport write them itself, and end that with [`Moving::written`]. Where it cannot,
    /// both come back.
    fn start(self, moving: Moving) -> std::result::Result<(), (Self, Moving)>
    where
        Self: Sized,
    {
        Err((self, moving))
    }
}

/// A read with the memory for it, which goes where the request goes.
pub trait ReadInto: Send + 'static {
    /// Where the bytes are to be.
    fn memory(&mut self) -> &mut [u8];

    /// Says how many are there now, or why there are none: called exactly once, from any thread.
    fn done(self, result: Result<usize>);

    /// Has the transport read them itself, and end that with [`Moving::came`]. Where it cannot,
    /// both come back.
    fn start(self, moving: Moving) -> std::result::Result<(), (Self, Moving)>
    where
        Self: Sized,
    {
        Err((self, moving))
    }
}

/// The flat disk. Requests may come concurrently, from any number of threads.
#[derive(Debug)]
pub struct Disk {
    /// The parts in disk order. Requests take them as a snapshot, so that they can be exchanged.
    parts: ArcSwap<Vec<Part>>,
    size: u64,
    read_only: bool,
    /// Every byte of the files comes from the medium, and goes there.
    direct: bool,
    inline_order: RequestOrder,
    enospc: EnospcPolicy,
    resources: Resources,
    health: Health,
    counters: Counters,
    /// Held for a flush round; `None` where nothing is writable.
    flush: Mutex<Option<FlushState>>,
    flusher: Arc<Flusher>,
    /// Requests in the pool or parked.
    in_flight: Mutex<usize>,
    idle: Condvar,
    space_waiters: AtomicUsize,
    /// A lack of space has been logged and is not over yet.
    space_is_short: AtomicBool,
    closing: AtomicBool,
    /// Set under the lock of `in_flight`: nothing that comes later changes the files.
    closed: AtomicBool,
    /// Keeps locks and descriptors for as long as the disk is served.
    _images: Arc<crate::chain::bundle::OpenedImages>,
}

impl Disk {
    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// Cluster size in bytes; the smallest of a split disk's parts.
    #[must_use]
    pub fn cluster_bytes(&self) -> u64 {
        let parts = self.parts();
        parts
            .iter()
            .map(|part| part.chain.geometry().cluster.bytes())
            .min()
            .unwrap_or(4096)
    }

    /// True when every change is refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// True when its files are read and written past the host's page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Host bytes that all files of the disk's chains occupy.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let mut sum = 0_u64;
        for part in self.parts().iter() {
            sum = sum.saturating_add(part.chain.allocated_bytes()?);
        }
        Ok(sum)
    }

    /// The counters now.
    #[must_use]
    pub fn stats(&self) -> DiskStats {
        let mut stats = self.counters.snapshot();
        for part in self.parts().iter() {
            let table = part.table.lock();
            let pages = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
            stats.bat_pages_resident += pages(table.resident.len());
            stats.bat_pages_dirty += pages(table.dirty.len() + table.in_flush);
            if let Some(alloc) = &table.alloc {
                stats.clusters_mapped += alloc.mapped();
                stats.clusters_free += alloc.free();
                stats.clusters_quarantined += alloc.waiting();
            }
        }
        stats.waiting_for_space =
            u64::try_from(self.space_waiters.load(Ordering::Relaxed)).unwrap_or(u64::MAX);
        stats.latched = self.health.reason();
        stats
    }

    /// The parts as they are now.
    fn parts(&self) -> Guard<Arc<Vec<Part>>> {
        self.parts.load()
    }

    /// The part that holds a position below the size, and the position in it.
    fn locate(parts: &[Part], at: DiskOffset) -> (usize, DiskOffset) {
        if parts.len() == 1 {
            return (0, at);
        }
        let after = parts.partition_point(|part| part.start <= at.get());
        let index = after.saturating_sub(1);
        (index, DiskOffset::new(at.get() - parts[index].start))
    }

    /// Refuses a change that cannot be: on a read-only or latched disk, or past the end.
    fn check_change(&self, at: DiskOffset, len: u64) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly));
        }
        if at.checked_add(len).is_none_or(|end| end.get() > self.size) {
            return Err(Error::new(ErrorKind::OutOfRange));
        }
        self.expect_open()?;
        self.health.check()
    }

    /// Fails once the disk is closed. A session that broke down may still have a request somewhere.
    fn expect_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::why(ErrorKind::Host, "the disk is closed already"));
        }
        Ok(())
    }

    /// Lets so many requests above the threshold stay on the threads on which they arrive, over
    /// the disk and its frozen views; for a transport whose threads are others than expected.
    pub fn set_large_inline(&self, max: InlineMax) {
        self.resources.large.set(max);
    }

    /// Gives back the memory for large requests that bring none: a transport whose requests bring
    /// theirs has no use for it. Should there be such requests all the same, they are served alone.
    pub fn release_buffers(&self) {
        self.resources.buffers.release();
    }

    /// Sets that memory aside again, for a transport whose requests turn out to bring none.
    pub fn restore_buffers(&self) -> Result<()> {
        self.resources.buffers.restore()
    }

    /// Counts a lack of space, and logs the first of a series.
    fn note_no_space(&self, error: &Error) {
        bump(&self.counters.no_space_events, 1);
        if !self.space_is_short.swap(true, Ordering::Relaxed) {
            log::warn!("no space on the host, requests wait: {error}");
        }
    }

    /// Drains, flushes, trims the files and clears the in-use marks. On an error the marks stay,
    /// and the next open examines the image.
    ///
    /// Nobody may make requests any more; those that are under way are waited for, and what comes
    /// later all the same is refused.
    pub fn close(self: Arc<Self>) -> Result<()> {
        self.closing.store(true, Ordering::Release);
        let mut in_flight = self.in_flight.lock();
        while *in_flight > 0 {
            self.flusher.request();
            self.idle
                .wait_for(&mut in_flight, Duration::from_millis(100));
        }
        self.closed.store(true, Ordering::Release);
        drop(in_flight);
        self.flusher.stop();
        if self.read_only {
            return Ok(());
        }
        self.health.check()?;
        self.close_files()
    }
}
