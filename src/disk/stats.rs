//! Live counters, as `stats.json` shows them.

use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters that requests bump as they pass.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// The counters at one moment, with what the disk adds to them.
        #[derive(Clone, Debug, Default, Serialize)]
        pub struct DiskStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Pages of the merged map in memory.
            pub bat_pages_resident: u64,
            /// Pages of the map that the file does not have yet.
            pub bat_pages_dirty: u64,
            /// Clusters that the writable files map.
            pub clusters_mapped: u64,
            /// Clusters inside the writable files that are free.
            pub clusters_free: u64,
            /// Freed clusters that are not reusable yet.
            pub clusters_quarantined: u64,
            /// Requests that wait for space on the host now.
            pub waiting_for_space: u64,
            /// Why the disk refuses writes, if it does.
            pub latched: Option<String>,
        }

        impl Counters {
            /// Reads all counters.
            #[must_use]
            pub fn snapshot(&self) -> DiskStats {
                DiskStats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    ..DiskStats::default()
                }
            }
        }
    };
}

counters! {
    /// Reads answered.
    reads,
    /// Bytes read.
    read_bytes,
    /// Writes answered.
    writes,
    /// Bytes written.
    written_bytes,
    /// Discard and zero-range requests answered.
    zeros,
    /// Flush requests answered.
    flushes,
    /// Flush rounds run for them, for the timer and for the program itself.
    flush_rounds,
    /// Requests served on the thread they arrived on.
    inline_requests,
    /// Requests whose bytes the transport's rings moved between file and memory.
    ring_io_requests,
    /// Requests handed to the pool.
    pooled_requests,
    /// Requests served on the thread they arrived on because no buffer was left for the pool.
    alone_requests,
    /// Times a request was parked for another one, for a flush or for space.
    parked,
    /// Clusters copied up from a lower level.
    clusters_copied,
    /// Clusters given a place in the top's file.
    clusters_allocated,
    /// Clusters unmapped by discards.
    clusters_unmapped,
    /// Pages of the map read from the files.
    bat_pages_loaded,
    /// Times the host had no space left.
    no_space_events,
}

/// Adds to a counter.
#[inline]
pub fn bump(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
