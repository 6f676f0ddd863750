//! What the targets that open whole disks share: files in memory, windows into a disk, choices.

// Each target uses a part of it.
#![allow(dead_code)]

pub(crate) mod alone;
pub(crate) mod dice;
pub(crate) mod names;
pub(crate) mod sparse;
pub(crate) mod window;

use ploopfs::disk::{DiskOptions, EnospcPolicy, Resources};
use std::sync::Arc;

/// Options under which a small disk meets everything: a cache of one page, steps of 32 KiB.
pub(crate) fn options(read_only: bool) -> DiskOptions {
    DiskOptions {
        read_only,
        bat_cache: 1,
        grow_step: 1 << 15,
        enospc: EnospcPolicy::Fail,
        pool_threads: 1,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    }
}

/// No threads, and no buffers: a caller that waits for its answer needs neither.
pub(crate) fn resources() -> Resources {
    Resources::without_buffers(Arc::new(alone::NoPool))
}
