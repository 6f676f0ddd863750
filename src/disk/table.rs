//! What the `table` lock of a part guards: pages in memory, free clusters, dirty pages, the parked.
//!
//! The lock covers bounded work in memory only: no system call, no wait, nothing handed to the
//! pool while it is held.

use crate::chain::map::Resident;
use crate::chain::page::MapPage;
use crate::delta::alloc::Allocator;
use crate::error::{Error, Result};
use crate::units::DiskCluster;
use std::sync::Arc;

/// Dirty pages beyond the budget: one for each request that publishes while the budget is reached.
const DIRTY_SLACK: usize = 256;

/// What a request waits for, holding nothing but its reply and its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Another request's write to this cluster.
    Pending(DiskCluster),
    /// A flush, for dirty pages to become clean or quarantined clusters to become free.
    Flush,
    /// Space on the host.
    Space,
}

/// A request that can be taken up again.
pub trait Job: Send {
    /// Goes on with it, on a thread of the pool.
    fn run(self: Box<Self>);
}

/// Requests that wait. A list of boxes, so that it never asks for a large piece of memory.
#[derive(Default)]
pub struct Parked {
    first: Option<Box<Waiting>>,
}

struct Waiting {
    wait: Wait,
    job: Box<dyn Job>,
    next: Option<Box<Waiting>>,
}

impl std::fmt::Debug for Parked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parked(empty: {})", self.first.is_none())
    }
}

impl Parked {
    /// Adds a request.
    pub fn add(&mut self, wait: Wait, job: Box<dyn Job>) {
        let next = self.first.take();
        self.first = Some(Box::new(Waiting { wait, job, next }));
    }

    /// Takes out all requests whose wait `is_over`.
    #[must_use]
    pub fn take(&mut self, is_over: impl Fn(Wait) -> bool) -> Self {
        let mut over = Self::default();
        let mut rest = self.first.take();
        while let Some(mut waiting) = rest {
            rest = waiting.next.take();
            let list = if is_over(waiting.wait) {
                &mut over
            } else {
                &mut *self
            };
            waiting.next = list.first.take();
            list.first = Some(waiting);
        }
        over
    }

    /// The jobs, one by one.
    pub fn next_job(&mut self) -> Option<Box<dyn Job>> {
        let waiting = *self.first.take()?;
        self.first = waiting.next;
        Some(waiting.job)
    }
}

/// The state under the lock.
#[derive(Debug)]
pub struct Table {
    /// Pages of the map in memory.
    pub resident: Resident,
    /// Free clusters of the top; `None` where it is read-only or plain.
    pub alloc: Option<Allocator>,
    /// Pages with changes that no flush has taken up.
    pub dirty: Vec<Arc<MapPage>>,
    /// Pages that the running flush writes.
    pub in_flush: usize,
    /// Number of dirty pages from which on writers wait for a flush.
    pub dirty_max: usize,
    /// Requests that wait.
    pub parked: Parked,
}

impl Table {
    /// A table with room for the dirty pages that the budget of `resident` allows.
    pub fn new(resident: Resident, alloc: Option<Allocator>) -> Result<Self> {
        let dirty_max = resident.dirty_max();
        let mut dirty = Vec::new();
        if alloc.is_some() {
            dirty
                .try_reserve_exact(dirty_max + DIRTY_SLACK)
                .map_err(|_| Error::errno(libc::ENOMEM))?;
        }
        Ok(Self {
            resident,
            alloc,
            dirty,
            in_flush: 0,
            dirty_max,
            parked: Parked::default(),
        })
    }

    /// Notes a change of a page.
    pub fn changed(&mut self, page: &Arc<MapPage>) {
        if page.changed() {
            self.dirty.push(Arc::clone(page));
        }
    }

    /// True when a change of this page would exceed the dirty budget.
    #[must_use]
    pub fn is_over_budget(&self, page: &MapPage) -> bool {
        !page.is_dirty() && self.dirty.len() + self.in_flush >= self.dirty_max
    }
}
