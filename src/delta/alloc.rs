//! Which file clusters may be handed out, and which have been freed but must wait.
//!
//! A file cluster is in one of five states:
//!
//! ```text
//!            extend                reserve            publish
//!  (outside) ------> free -----------------> reserved -------> mapped
//!                     ^  <----- abort ------/                    |
//!                     |                                          | unmap
//!                     | punched                                  v
//!                  sealed <------------- seal ------------- quarantined
//! ```
//!
//! A quarantined cluster may be handed out again only when the page that dropped it is durable, no
//! request that could have seen it is still running, and its old bytes are punched: otherwise a
//! power cut, or a slow reader, would show one disk cluster another's data. `seal` fixes the batch
//! that the running flush makes durable; what is freed after it belongs to the next flush.
//!
//! A free cluster is *zero-known* when this process extended the file by it, or punched it, and
//! nobody has written to it since: then the bytes around a small write need no zeroing. Clusters
//! that lay inside the file at open are never zero-known.
//!
//! It is *zero-stable* when a power cut, too, leaves zeros in it: this process extended the file by
//! it, a sync has made that durable since, and it was never handed out before. The lowest free
//! cluster goes first, so two marks tell: everything from `virgin` on was never handed out, and
//! everything below `durable_end` is in the file for good. A punched cluster is not counted among
//! them: what the last owner left comes back when the cut takes the punch.

use super::bits::BitSet;
use crate::error::Result;
use crate::planted::{Bug, planted};
use crate::units::FileCluster;
use std::ops::Range;

/// A reserved cluster, and whether its bytes are known to be zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The cluster.
    pub cluster: FileCluster,
    /// True when all of it reads as zeros.
    pub zero_known: bool,
    /// True when it does so after a power cut, too, until somebody writes to it.
    pub zero_stable: bool,
}

/// The free map of one image file and the quarantine of what was freed.
#[derive(Debug)]
pub struct Allocator {
    free: BitSet,
    zero_known: BitSet,
    quarantined: BitSet,
    sealed: BitSet,
    /// First cluster after the table.
    first: u64,
    /// No cluster at or above this is ever handed out: table and entries together need no more.
    limit: u64,
    /// Whole clusters inside the file.
    file_end: u64,
    /// From here on no cluster was in the file at open, and none was handed out since.
    virgin: u64,
    /// Below this the file's length is durable.
    durable_end: u64,
    mapped: u64,
    reserved_ever: u64,
}

impl Allocator {
    /// An allocator for a file of `file_end` whole clusters, of which those from `first` up to the
    /// smaller of `file_end` and `limit` are free unless `mapped` has them.
    pub fn new(first: u64, limit: u64, file_end: u64, used: &BitSet, mapped: u64) -> Result<Self> {
        let mut free = BitSet::new(limit)?;
        free.insert_range(first..file_end.min(limit));
        let mut next = used.first_from(first);
        while let Some(cluster) = next {
            free.remove(cluster);
            next = used.first_from(cluster + 1);
        }
        let mut zero_known = BitSet::new(limit)?;
        if planted(Bug::FreeIsZero) {
            zero_known.insert_range(first..file_end.min(limit));
        }
        Ok(Self {
            free,
            zero_known,
            quarantined: BitSet::new(limit)?,
            sealed: BitSet::new(limit)?,
            first,
            limit,
            file_end,
            virgin: file_end,
            durable_end: file_end,
            mapped,
            reserved_ever: 0,
        })
    }

    /// Clusters that can be reserved now.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free.len()
    }

    /// How many clusters were ever reserved: a plan that finds it changed is out of date.
    #[must_use]
    pub fn reserved_ever(&self) -> u64 {
        self.reserved_ever
    }

    /// Clusters that the file still may grow by.
    #[must_use]
    pub fn growable(&self) -> u64 {
        self.limit.saturating_sub(self.file_end)
    }

    /// Clusters that will become free once flushed, drained and punched.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.quarantined.len() + self.sealed.len()
    }

    /// Clusters that have been freed and belong to no batch yet.
    #[must_use]
    pub fn quarantined(&self) -> u64 {
        self.quarantined.len()
    }

    /// Clusters that entries of this image map.
    #[must_use]
    pub fn mapped(&self) -> u64 {
        self.mapped
    }

    /// End of the file in whole clusters.
    #[must_use]
    pub fn file_end(&self) -> u64 {
        self.file_end
    }

    /// Takes the lowest free cluster. The caller has checked [`Allocator::free`] for all that it
    /// needs, so that a request gets all its clusters or none.
    pub fn reserve(&mut self) -> Option<Reserved> {
        let cluster = self.free.first_from(self.first)?;
        self.free.remove(cluster);
        self.reserved_ever += 1;
        let zero_known = self.zero_known.remove(cluster);
        let virgin = cluster >= self.virgin || zero_known && planted(Bug::OneBarrierForReused);
        let durable = cluster < self.durable_end || planted(Bug::GrowthStable);
        self.virgin = self.virgin.max(cluster + 1);
        Some(Reserved {
            cluster: FileCluster::new(cluster),
            zero_known,
            zero_stable: virgin && durable,
        })
    }

    /// Gives a reserved cluster back; what it holds by now is not known.
    pub fn abort(&mut self, cluster: FileCluster) {
        self.free.insert(cluster.get());
        if planted(Bug::AbortKeepsZero) {
            self.zero_known.insert(cluster.get());
        }
    }

    /// A reserved cluster has become the place of a disk cluster.
    pub fn published(&mut self) {
        self.mapped += 1;
    }

    /// The entry that named this cluster is 0 now (in memory). A cluster beyond the limit, which a
    /// foreign writer may have left, is forgotten until the next open.
    pub fn unmapped(&mut self, cluster: FileCluster) {
        self.mapped -= 1;
        if planted(Bug::NoQuarantine) {
            self.free.insert(cluster.get());
            return;
        }
        self.quarantined.insert(cluster.get());
    }

    /// Starts the batch that the running flush will make durable. `false` when the last batch is
    /// not through yet: then what is quarantined waits for a later flush.
    pub fn seal(&mut self) -> bool {
        if !self.sealed.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.quarantined, &mut self.sealed);
        true
    }

    /// True while a sealed batch is not through.
    #[must_use]
    pub fn has_sealed(&self) -> bool {
        !self.sealed.is_empty()
    }

    /// The next run of the sealed batch to punch, at most `longest` clusters.
    #[must_use]
    pub fn sealed_run(&self, longest: u64) -> Option<Range<u64>> {
        self.sealed.run_from(0, longest)
    }

    /// A run of the sealed batch is punched (or could not be, and then its content is unknown).
    pub fn release(&mut self, run: Range<u64>, zero_known: bool) {
        for cluster in run {
            if self.sealed.remove(cluster) {
                self.free.insert(cluster);
                if zero_known {
                    self.zero_known.insert(cluster);
                }
            }
        }
    }

    /// The file now ends at this many whole clusters, and all that were added read as zeros.
    pub fn extended(&mut self, file_end: u64) {
        let added = self.file_end..file_end.min(self.limit);
        self.free.insert_range(added.clone());
        self.zero_known.insert_range(added);
        self.file_end = self.file_end.max(file_end);
    }

    /// A sync that began when the file had this many whole clusters has returned.
    pub fn synced(&mut self, file_end: u64) {
        self.durable_end = self.durable_end.max(file_end);
    }

    /// The next run of free clusters at or above `from`, for punching at close.
    #[must_use]
    pub fn free_run(&self, from: u64, longest: u64) -> Option<Range<u64>> {
        self.free.run_from(from, longest)
    }

    /// End of the last cluster in use, never below the table's: where the file may be cut.
    ///
    /// Meaningful only when nothing is reserved, quarantined or sealed.
    #[must_use]
    pub fn used_end(&self) -> u64 {
        if self.file_end > self.limit {
            // Clusters beyond the limit are not tracked, so nothing is known to be unused there.
            return self.file_end;
        }
        let mut end = self.file_end;
        while end > self.first && self.free.contains(end - 1) {
            end -= 1;
        }
        end
    }

    /// The file was cut to this many clusters.
    pub fn truncated(&mut self, file_end: u64) {
        let mut next = self.free.first_from(file_end);
        while let Some(cluster) = next {
            self.free.remove(cluster);
            self.zero_known.remove(cluster);
            next = self.free.first_from(cluster + 1);
        }
        self.file_end = file_end;
        self.durable_end = self.durable_end.min(file_end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator() -> Allocator {
        let mut used = BitSet::new(100).unwrap();
        used.insert(3);
        Allocator::new(2, 12, 6, &used, 1).unwrap()
    }

    #[test]
    fn clusters_inside_the_file_at_open_are_not_zero_known() {
        let mut alloc = allocator();
        assert_eq!(alloc.free(), 3);
        let first = alloc.reserve().unwrap();
        assert_eq!(
            first,
            Reserved {
                cluster: FileCluster::new(2),
                zero_known: false,
                zero_stable: false
            }
        );
        assert_eq!(alloc.reserve().unwrap().cluster.get(), 4);
        alloc.extended(8);
        assert!(!alloc.reserve().unwrap().zero_known);
        assert!(alloc.reserve().unwrap().zero_known);
    }

    #[test]
    fn only_a_new_cluster_of_a_synced_length_is_zero_stable() {
        let mut alloc = allocator();
        let stable = |alloc: &mut Allocator| {
            let taken = alloc.reserve().unwrap();
            (taken.cluster.get(), taken.zero_stable)
        };
        // Inside the file at open, even after a sync.
        alloc.synced(6);
        assert_eq!(stable(&mut alloc), (2, false));
        alloc.extended(10);
        while alloc.free() > 4 {
            alloc.reserve();
        }
        // Longer, but not for good yet.
        assert_eq!(stable(&mut alloc), (6, false));
        // A sync that began before the file had the last of them.
        alloc.synced(9);
        assert_eq!(stable(&mut alloc), (7, true));
        // Written perhaps, and given back.
        alloc.abort(FileCluster::new(7));
        assert_eq!(stable(&mut alloc), (7, false));
        // Freed and punched: the punch may not outlive a power cut.
        alloc.published();
        alloc.unmapped(FileCluster::new(7));
        assert!(alloc.seal());
        alloc.release(7..8, true);
        assert_eq!(stable(&mut alloc), (7, false));
        assert_eq!(stable(&mut alloc), (8, true));
        assert_eq!(stable(&mut alloc), (9, false));
    }

    #[test]
    fn an_aborted_cluster_is_no_longer_zero_known() {
        let mut alloc = allocator();
        alloc.extended(7);
        let taken: Vec<_> = std::iter::from_fn(|| alloc.reserve()).collect();
        let last = *taken.last().unwrap();
        assert!(last.zero_known);
        alloc.abort(last.cluster);
        assert!(!alloc.reserve().unwrap().zero_known);
    }

    #[test]
    fn a_freed_cluster_waits_for_seal_and_release() {
        let mut alloc = allocator();
        while alloc.reserve().is_some() {}
        alloc.unmapped(FileCluster::new(3));
        assert_eq!((alloc.free(), alloc.waiting()), (0, 1));
        assert!(alloc.seal());
        alloc.published();
        alloc.unmapped(FileCluster::new(4));
        assert!(!alloc.seal(), "a second batch must wait for the first");
        assert_eq!(alloc.sealed_run(9), Some(3..4));
        alloc.release(3..4, true);
        assert_eq!((alloc.free(), alloc.waiting()), (1, 1));
        assert!(alloc.reserve().unwrap().zero_known);
    }

    #[test]
    fn the_file_is_cut_to_its_last_used_cluster() {
        let mut alloc = allocator();
        assert_eq!(alloc.used_end(), 4);
        alloc.truncated(4);
        assert_eq!((alloc.free(), alloc.file_end()), (1, 4));
        alloc.extended(9);
        assert_eq!(alloc.used_end(), 4);
        assert_eq!(alloc.growable(), 3);
    }
}
