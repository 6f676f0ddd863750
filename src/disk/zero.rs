//! Making ranges read as zeros: discard and zero-range alike, partial clusters included.
//!
//! A request is worked off in steps, each within one page of the map, each reserved, zeroed and
//! published by itself; zeroing again is harmless. In one step, under the `table` lock, whole
//! clusters that only the top maps lose their entry; what must be punched or covered is collected
//! and done outside of the lock:
//!
//! 1. remove the mapping, quarantine the file cluster: it may not be punched yet, a reader that saw
//!    the mapping may still read it, and a crash may bring the old entry back, which must then find
//!    the old bytes or zeros, never another cluster's. It is punched when the flush that made the
//!    entry 0 is durable and all readers of that time are gone.
//! 2. where a lower level maps the cluster too, the entry stays and the file cluster is punched in
//!    place: an entry of 0 would uncover the lower content.
//! 3. a cluster that only a lower level maps gets a file cluster of its own, punched before it is
//!    published, so that it takes a number and no blocks.

use super::part::{Next, Part, Progress};
use super::stats::{Counters, bump};
use super::table::Wait;
use super::write::{Refused, Reservation, TakenList, wait_for_space};
use crate::error::Result;
use crate::format::layout::{BAT_PAGE_SLOTS, Layout};
use crate::plan::{Stop, Unmapping, plan_discard};
use crate::planted::{Bug, planted};
use crate::storage::Keep;
use crate::units::{DiskCluster, DiskOffset, FileOffset, len_u64, len_usize};
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Bytes of a plain file that are punched in one step.
const PLAIN_STEP: u64 = 1 << 30;
/// Ranges to punch, or clusters to cover, that are collected in one step.
const COLLECTED: usize = 8;

/// What one step has found to do outside of the lock.
#[derive(Default)]
struct Collected<'a> {
    /// Disk bytes that the step settles.
    len: u64,
    punch: SmallVec<[Range<FileOffset>; COLLECTED]>,
    cover: Option<Reservation<'a>>,
    unmapped: u64,
}

impl Collected<'_> {
    /// Adds a file cluster to punch; `false` when there is no room.
    fn add_punch(&mut self, range: Range<FileOffset>) -> bool {
        let is_full = self.punch.len() == COLLECTED;
        match self.punch.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if is_full => return false,
            _ => self.punch.push(range),
        }
        true
    }
}

impl Part {
    /// Makes the first bytes of `len` at `at` read as zeros. The range lies within the part.
    pub fn zero_step(&self, at: DiskOffset, len: u64, counters: &Counters) -> Result<Progress> {
        if self.chain.is_plain() {
            return self.zero_plain(at, len.min(PLAIN_STEP));
        }
        let geometry = self.chain.geometry();
        let (cluster, within) = geometry.cluster.split(at);
        let cluster_len = geometry.cluster_len(cluster);
        if within > 0 || len < cluster_len {
            let piece = (cluster_len - within).min(len).min(len_u64(ZEROS.len()));
            let piece = &ZEROS[..len_usize(piece).unwrap_or(0)];
            return self.write_step(at, piece, counters);
        }
        let mut held = None;
        loop {
            let _pin = self.epochs.pin();
            let collected = match self.collect(cluster, len) {
                Ok(collected) => collected,
                Err(refused) => match self.after_refusal(refused, counters)? {
                    Next::Wait(wait) => return Ok(Progress::Wait(wait)),
                    Next::Again(page) => {
                        held = page.or(held);
                        continue;
                    }
                },
            };
            bump(&counters.clusters_unmapped, collected.unmapped);
            let done = self.carry_out_zeros(&collected);
            if done.is_ok() {
                if let Some(cover) = collected.cover {
                    cover.publish(counters);
                }
            }
            return wait_for_space(done.map(|()| collected.len));
        }
    }

    fn zero_plain(&self, at: DiskOffset, len: u64) -> Result<Progress> {
        let start = FileOffset::new(at.get());
        let zeroed = self
            .top_storage()
            .zero(start..start.saturating_add(len), Keep::Nothing);
        self.note_data();
        let zeroed = zeroed.map_err(|e| e.in_file(self.chain.top().path()));
        wait_for_space(zeroed.map(|()| len))
    }

    /// Settles whole clusters from `first` on, under the lock, as far as one page of the map and
    /// the room for what must be done outside go.
    fn collect(&self, first: DiskCluster, len: u64) -> Result<Collected<'_>, Refused> {
        let geometry = self.chain.geometry();
        let (index, first_slot) = Layout::page_of(first);
        let mut collected = Collected::default();
        let mut cover = TakenList::new();
        let mut table = self.table.lock();
        let Some(page) = self.map.get(index).as_ref().map(Arc::clone) else {
            return Err(Refused::Stop(Stop::Missing(index)));
        };
        let over_budget = table.is_over_budget(&page);
        let mut changed = false;
        let mut stopped = None;
        for slot in first_slot..BAT_PAGE_SLOTS {
            let cluster = DiskCluster::new(first.get() + len_u64(slot - first_slot));
            let cluster_len = geometry.cluster_len(cluster);
            if cluster_len == 0 || collected.len + cluster_len > len {
                break;
            }
            let place = |at: FileOffset| at..at.saturating_add(geometry.cluster.bytes());
            let planned = match plan_discard(&self.view(), geometry, cluster) {
                Ok(Unmapping::ZeroInPlace { at }) if planted(Bug::DiscardUncovers) => {
                    Ok(Unmapping::Unmap { at })
                }
                planned => planned,
            };
            let taken = match planned {
                Ok(Unmapping::Nothing) => Ok(true),
                Ok(Unmapping::ZeroInPlace { at }) => Ok(collected.add_punch(place(at))),
                Ok(_) if over_budget => Err(Refused::Wait(Wait::Flush)),
                Ok(Unmapping::Unmap { at }) => {
                    page.set_word(slot, crate::chain::page::Word::HOLE);
                    if let Some(alloc) = table.alloc.as_mut() {
                        alloc.unmapped(geometry.cluster.whole_below(at));
                    }
                    changed = true;
                    collected.unmapped += 1;
                    Ok(true)
                }
                Ok(Unmapping::MaskWithZeros) if cover.len() == COLLECTED => Ok(false),
                Ok(Unmapping::MaskWithZeros) => self
                    .take_one(&mut table, &page, cluster, Keep::Nothing, &mut cover)
                    .map(|()| true),
                Err(stop) => Err(Refused::Stop(stop)),
            };
            match taken {
                Ok(true) => collected.len += cluster_len,
                Ok(false) => break,
                Err(refused) => {
                    stopped = Some(refused);
                    break;
                }
            }
        }
        if changed {
            table.changed(&page);
        }
        if !cover.is_empty() {
            collected.cover = Some(Reservation::new(self, &page, cover));
        }
        drop(table);
        match stopped {
            Some(refused) if collected.len == 0 => Err(refused),
            _ => Ok(collected),
        }
    }

    /// Punches what the step collected.
    fn carry_out_zeros(&self, collected: &Collected<'_>) -> Result<()> {
        let top = self.top_storage();
        let cluster_size = self.chain.geometry().cluster;
        let covers = collected
            .cover
            .iter()
            .flat_map(Reservation::places)
            .map(|cluster| {
                let start = cluster_size.file_start(cluster);
                start..start.saturating_add(cluster_size.bytes())
            });
        let mut result = Ok(());
        for range in collected.punch.iter().cloned().chain(covers) {
            result = top.zero(range, Keep::Nothing);
            let unnoted = [Bug::ZeroNotNoted, Bug::PunchBelieved, Bug::GrowthBelieved];
            if !unnoted.into_iter().any(planted) {
                self.note_data();
            }
            if result.is_err() {
                break;
            }
        }
        result.map_err(|e| e.in_file(self.chain.top().path()))
    }
}
