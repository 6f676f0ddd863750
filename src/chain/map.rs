//! The merged map of a chain, in pages that are loaded when first looked at.
//!
//! A page is found through a directory of atomic pointers, so a look-up takes no lock and waits for
//! nobody. Pages are loaded once: one loader for a page at a time holds that page's `loading` lock
//! over the reading and the insertion, so a stale copy can never replace a page that was loaded,
//! changed, written and evicted in the meantime. Which pages stay is decided by an LRU list with a
//! second chance for those that were touched; pages that are dirty, or that a reservation will
//! publish into, are never evicted.

use super::Chain;
use super::page::{Frames, MapPage, Word};
use crate::error::{Error, Result};
use crate::format::layout::{BAT_PAGE_LEN, BAT_PAGE_SLOTS, Layout, PageIndex};
use crate::plan::{Lookup, Mapping, State};
use crate::planted::{Bug, planted};
use crate::sync::{Mutex, MutexGuard, Rank};
use crate::units::{DiskCluster, FileOffset, Level, len_u64};
use arc_swap::{ArcSwapOption, Guard};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::Arc;

const LOADING_LOCKS: usize = 16;
/// Pages that may be held beyond the budget: one for each request that is publishing at a time.
const OVERSHOOT: usize = 256;
/// Page memory set aside for when the heap has none.
const RESERVE_FRAMES: usize = 64;

/// The pages of one chain's map.
#[derive(Debug)]
pub struct PageMap {
    directory: Vec<ArcSwapOption<MapPage>>,
    frames: Arc<Frames>,
    loading: [Mutex<()>; LOADING_LOCKS],
}

/// The pages in memory, in the order of their use. Lives under the part's `table` lock.
#[derive(Debug)]
pub struct Resident {
    pages: LruCache<PageIndex, Arc<MapPage>>,
    budget: usize,
    dirty_max: usize,
}

impl Resident {
    /// Room for this many bytes of pages (at least one page).
    #[must_use]
    pub fn new(bytes: u64, page_count: u32) -> Self {
        let page_bytes = len_u64(BAT_PAGE_SLOTS) * 8;
        let at_most_all =
            |pages: u64| usize::try_from(pages.clamp(1, u64::from(page_count.max(1)))).unwrap_or(1);
        let budget = at_most_all(bytes / page_bytes);
        // Twice the room that is needed. A table of hashes that is more than half full grows when
        // removed entries have used it up, and it takes what the heap may not have; one that is
        // less full cleans itself in place.
        let most = budget.saturating_add(OVERSHOOT);
        let room = NonZeroUsize::MIN.saturating_add(most.saturating_mul(2));
        Self {
            pages: LruCache::new(room),
            budget,
            dirty_max: at_most_all(bytes / page_bytes / 2),
        }
    }

    /// Pages that may have unwritten changes: half of the memory, not half of the table, of which a
    /// small disk has a page or two that must not take turns.
    #[must_use]
    pub fn dirty_max(&self) -> usize {
        self.dirty_max
    }

    /// Pages in memory.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// True when no page is in memory.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

impl PageMap {
    /// An empty map for a chain. Fails where memory for the directory is short.
    pub fn new(chain: &Chain) -> Result<Self> {
        let count = chain.top().layout().map_or(0, Layout::page_count);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let mut directory = Vec::new();
        directory
            .try_reserve_exact(count)
            .map_err(|_| Error::errno(libc::ENOMEM))?;
        directory.resize_with(count, ArcSwapOption::empty);
        Ok(Self {
            directory,
            frames: Arc::new(Frames::new(RESERVE_FRAMES.min(count))?),
            loading: std::array::from_fn(|_| Mutex::ranked(Rank::Load, ())),
        })
    }

    /// Number of pages of the table.
    #[must_use]
    pub fn page_count(&self) -> usize {
        self.directory.len()
    }

    /// The page, if it is in memory.
    #[must_use]
    #[inline]
    pub fn get(&self, index: PageIndex) -> Guard<Option<Arc<MapPage>>> {
        match self.directory.get(index.index()) {
            Some(place) => place.load(),
            // Positions past the table never get here; an empty answer fails the request.
            None => Guard::from_inner(None),
        }
    }

    /// The lock that the loader of a page holds from before its reading until its insertion.
    pub fn loading(&self, index: PageIndex) -> MutexGuard<'_, ()> {
        self.loading[index.index() % LOADING_LOCKS].lock()
    }

    /// An empty page to load into, or `None` while no memory can be had for one.
    #[must_use]
    pub fn blank(&self, index: PageIndex) -> Option<MapPage> {
        MapPage::new(index, &self.frames)
    }

    /// Makes a loaded page visible, evicting others over the budget.
    pub fn insert(&self, resident: &mut Resident, page: MapPage) -> Arc<MapPage> {
        let page = Arc::new(page);
        if let Some(place) = self.directory.get(page.index().index()) {
            while resident.pages.len() >= resident.budget && self.evict_one(resident) {}
            resident.pages.put(page.index(), Arc::clone(&page));
            place.store(Some(Arc::clone(&page)));
        }
        page
    }

    /// Drops the page that was not used for the longest time. `false` when none may go.
    pub fn evict_one(&self, resident: &mut Resident) -> bool {
        for _ in 0..resident.pages.len().saturating_mul(2).min(4 * OVERSHOOT) {
            let Some((index, page)) = resident.pages.pop_lru() else {
                return false;
            };
            // Beside the list and the directory, only a request that has just loaded the page and
            // plans with it holds on to it.
            let is_planned_with = Arc::strong_count(&page) > 2;
            let is_needed = page.is_held() || is_planned_with;
            if is_needed && !planted(Bug::DirtyEvicted) || page.take_touch() {
                resident.pages.put(index, page);
                continue;
            }
            if let Some(place) = self.directory.get(index.index()) {
                place.store(None);
            }
            return true;
        }
        false
    }
}

/// Fills a blank page with the merged entries of all levels.
///
/// `top_len` is the length of the top's file now; the lower files do not change.
pub fn load(chain: &Chain, page: &MapPage, top_len: FileOffset) -> Result<()> {
    let mut bytes = [0; BAT_PAGE_LEN];
    for (number, image) in chain.levels().iter().enumerate().rev() {
        let level = Level::new(u16::try_from(number).unwrap_or(u16::MAX));
        let is_top = level == chain.geometry().top;
        let file_len = if is_top { top_len } else { image.len() };
        // What a lower delta has past its own disk is never seen. The top keeps such entries, so
        // that writing the page back does not drop them.
        let end = if is_top { u64::MAX } else { image.disk_len() };
        let Some(layout) = image.layout() else {
            merge(chain, page, level, end, |_| Some(Ok(0)));
            continue;
        };
        if page.index().0 >= layout.page_count() {
            continue;
        }
        image
            .read_bat_page(page.index(), &mut bytes)
            .map_err(|e| e.at_level(level))?;
        merge(chain, page, level, end, |slot| {
            let word = bytes.get(4 * slot..4 * slot + 4)?;
            let entry = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            (entry != 0).then(|| {
                layout
                    .check_entry(entry, file_len)
                    .map(|()| entry)
                    .or(Err(entry))
            })
        });
    }
    Ok(())
}

/// Lays one level under what the page has already. `entry_of` gives a slot's entry, `Err` for a bad
/// one, `None` where the level does not map it.
fn merge(
    chain: &Chain,
    page: &MapPage,
    level: Level,
    disk_end: u64,
    entry_of: impl Fn(usize) -> Option<std::result::Result<u32, u32>>,
) {
    let cluster_size = chain.geometry().cluster;
    for slot in 0..BAT_PAGE_SLOTS {
        let Some(cluster) = Layout::cluster_of(page.index(), slot) else {
            continue;
        };
        if cluster_size.disk_start(cluster).get() >= disk_end {
            break;
        }
        let Some(entry) = entry_of(slot) else {
            continue;
        };
        let word = page.word(slot);
        let merged = match (word.level(), entry) {
            (Some(_), _) => word.covering_lower(),
            (None, Ok(entry)) => Word::mapped(level, entry),
            (None, Err(entry)) => Word::mapped(level, entry).bad(),
        };
        page.set_word(slot, merged);
    }
}

/// A chain with its map: what plans look clusters up in.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The chain.
    pub chain: &'a Chain,
    /// Its map.
    pub map: &'a PageMap,
}

impl View<'_> {
    /// Turns a word into what plans work with.
    #[inline]
    fn mapping(&self, word: Word, cluster: DiskCluster) -> Mapping {
        let state = match word.level() {
            None => State::Hole,
            Some(_) if word.is_bad() => State::Bad,
            Some(level) => {
                let disk_start = self.chain.geometry().cluster.disk_start(cluster).get();
                State::At {
                    level,
                    start: self.chain.place_of(level, word.entry(), disk_start),
                }
            }
        };
        Mapping {
            state,
            pending: word.is_pending() && !planted(Bug::PendingIgnored),
            covers_lower: word.covers_lower(),
        }
    }
}

impl Lookup for View<'_> {
    #[inline]
    fn look_up(&self, cluster: DiskCluster) -> Mapping {
        if self.chain.is_plain() {
            let word = Word::mapped(self.chain.geometry().top, 0).covering_lower();
            return self.mapping(word, cluster);
        }
        let (index, slot) = Layout::page_of(cluster);
        match self.map.get(index).as_deref() {
            Some(page) => {
                page.touch();
                self.mapping(page.word(slot), cluster)
            }
            None if index.index() < self.map.page_count() => Mapping {
                state: State::Missing(index),
                pending: false,
                covers_lower: false,
            },
            // More disk than entries (possible read-only): nothing maps what is past the table.
            None => Mapping {
                state: State::Hole,
                pending: false,
                covers_lower: false,
            },
        }
    }

    #[inline]
    fn readable_end(&self, level: Level) -> u64 {
        self.chain.readable_end(level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_memory_may_be_dirty_and_all_of_a_small_table() {
        let page = 8 * 1024;
        for (pages_of_memory, page_count, dirty) in [
            (0, 100, 1),
            (1, 100, 1),
            (10, 100, 5),
            (8192, 2, 2),
            (8192, 65, 65),
            (100, 65, 50),
        ] {
            let resident = Resident::new(pages_of_memory * page, page_count);
            assert_eq!(
                resident.dirty_max(),
                dirty,
                "{pages_of_memory} {page_count}"
            );
        }
    }
}
