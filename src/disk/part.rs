//! One part of the disk: a chain with its map and all that changes while it is served.
//!
//! Lock order, outermost first: the disk's `flush`, this part's `grow`, this part's `table`; debug
//! builds check it ([`Rank`]).

use super::DiskOptions;
use super::epoch::Epochs;
use super::flags::{Gate, Unsynced};
use super::pool::Spawn;
use super::stats::{Counters, bump};
use super::table::{Parked, Table, Wait};
use super::write::Need;
use crate::chain::Chain;
use crate::chain::map::{self, PageMap, Resident, View};
use crate::chain::page::MapPage;
use crate::delta::alloc::Allocator;
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::PageIndex;
use crate::plan::Stop;
use crate::planted::{Bug, planted};
use crate::storage::{Keep, SharedStorage};
use crate::sync::{self, Condvar, Mutex, Rank};
use crate::units::{DiskCluster, FileOffset};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the table for which blocks are reserved: what a disk of 16 TiB with clusters of 1 MiB
/// has.
const TABLE_RESERVE_MAX: u64 = 64 << 20;

/// One part of the disk.
#[derive(Debug)]
pub struct Part {
    /// First byte of the disk in this part.
    pub start: u64,
    /// Its deltas.
    pub chain: Chain,
    /// Where its clusters are.
    pub map: PageMap,
    /// Everything that changes together.
    pub table: Mutex<Table>,
    /// Signalled, with the `table` lock, when something that blocking callers wait for changed.
    pub changed: Condvar,
    /// Who may still use freed clusters.
    pub epochs: Epochs,
    /// Set after bytes were written, cut or zeroed; cleared by the flush that syncs them.
    pub data_dirty: Unsynced,
    /// True once the file may be changed: its in-use mark is durable.
    pub marked: Gate,
    /// Held while the file's length changes.
    pub grow: Mutex<()>,
    /// Clusters by which the file grows at a time.
    pub grow_clusters: u64,
    /// What is copied up shares its blocks with the lower file where the host can do that.
    pub reflink: bool,
    /// Where requests that waited go on.
    pub pool: Arc<dyn Spawn>,
}

/// How far one step of a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// This many bytes are done.
    Done(u64),
    /// Nothing could be done yet.
    Wait(Wait),
}

/// What comes after a step that could not be planned or made.
#[derive(Debug)]
pub enum Next {
    /// Plan again. A page that was loaded for it comes along: as long as it is held, it stays in
    /// memory, so that requests cannot take each other's pages away for ever.
    Again(Option<Arc<MapPage>>),
    /// Wait, holding nothing.
    Wait(Wait),
}

impl Part {
    /// A part over a chain. `alloc` is there where the top has a table and is writable.
    pub fn new(
        start: u64,
        chain: Chain,
        alloc: Option<Allocator>,
        bat_cache: u64,
        options: &DiskOptions,
        pool: Arc<dyn Spawn>,
    ) -> Result<Self> {
        let map = PageMap::new(&chain)?;
        let pages = u32::try_from(map.page_count()).unwrap_or(u32::MAX);
        let table = Table::new(Resident::new(bat_cache, pages), alloc)?;
        let cluster = chain.geometry().cluster.bytes();
        Ok(Self {
            start,
            map,
            table: Mutex::ranked(Rank::Table, table),
            changed: Condvar::new(),
            epochs: Epochs::default(),
            data_dirty: Unsynced::default(),
            // A plain file has no header to carry a mark.
            marked: Gate::new(chain.is_plain()),
            grow: Mutex::ranked(Rank::Grow, ()),
            grow_clusters: (options.grow_step / cluster).max(1),
            reflink: options.reflink,
            pool,
            chain,
        })
    }

    /// Lets requests go on whose wait is over. Never called under the `table` lock.
    pub fn wake(&self, mut woken: Parked) {
        self.changed.notify_all();
        while let Some(job) = woken.next_job() {
            self.pool.spawn(job);
        }
    }

    /// Length of this part of the disk in bytes.
    #[must_use]
    pub fn disk_len(&self) -> u64 {
        self.chain.geometry().disk_len
    }

    /// What plans look clusters up in.
    #[must_use]
    #[inline]
    pub fn view(&self) -> View<'_> {
        View {
            chain: &self.chain,
            map: &self.map,
        }
    }

    /// The writable file.
    #[must_use]
    pub fn top_storage(&self) -> &SharedStorage {
        self.chain.top().storage()
    }

    /// Bytes reached the file since the last sync of it began.
    ///
    /// Called after the bytes are down and before the reply: a flush that clears the flag in
    /// between syncs them, one that runs later sees the flag.
    #[inline]
    pub fn note_data(&self) {
        self.data_dirty.note();
    }

    /// The page of the map, read from the files if it is not in memory. May wait for the host.
    pub fn load(&self, index: PageIndex, counters: &Counters) -> Result<Arc<MapPage>> {
        let stale = planted(Bug::StalePageInserted);
        let _sole_loader = (!stale).then(|| self.map.loading(index));
        if let Some(page) = self.map.get(index).as_ref().filter(|_| !stale) {
            return Ok(Arc::clone(page));
        }
        let page = loop {
            if let Some(page) = self.map.blank(index) {
                break page;
            }
            // No memory anywhere: some page must go, and those in use go soon.
            let evicted = self.map.evict_one(&mut self.table.lock().resident);
            if !evicted {
                sync::sleep(Duration::from_millis(1));
            }
        };
        let top_len = self.top_storage().len()?;
        map::load(&self.chain, &page, top_len)?;
        bump(&counters.bat_pages_loaded, 1);
        Ok(self.map.insert(&mut self.table.lock().resident, page))
    }

    /// Does what a stopped plan asks for.
    pub fn after_stop(&self, stop: Stop, counters: &Counters) -> Result<Next> {
        match stop {
            Stop::Missing(page) => Ok(Next::Again(Some(self.load(page, counters)?))),
            Stop::Pending(cluster) => Ok(Next::Wait(Wait::Pending(cluster))),
            Stop::Bad(cluster) => Err(self.bad_entry(cluster)),
        }
    }

    /// The error for a cluster whose entry is invalid.
    #[must_use]
    pub fn bad_entry(&self, cluster: DiskCluster) -> Error {
        Error::why(ErrorKind::Corrupt, "the entry of the cluster is invalid")
            .in_file(self.chain.top().path())
            .at_cluster(cluster)
    }

    /// Reserves the host's blocks for the table, which may be a hole of the file, so that a full
    /// host fails the writes that need clusters and not the flush of those that had some. The
    /// file's mark is set when this is called.
    pub fn reserve_table(&self) {
        let Some(layout) = self.chain.top().layout() else {
            return;
        };
        let end = layout.table_end().min(FileOffset::new(TABLE_RESERVE_MAX));
        if let Err(error) = self.top_storage().allocate(FileOffset::ZERO..end) {
            let path = self.chain.top().path().display();
            log::warn!("{path}: no blocks could be reserved for the table: {error}");
        }
    }

    /// Makes as many clusters free inside the file as a plan needs, by lengthening it.
    ///
    /// 1. cut what a failed extension, or another program, left beyond the last whole cluster, so
    ///    that all that is added reads as zeros;
    /// 2. reserve blocks and lengthen the file, by a step where there is room for one;
    /// 3. only then are the clusters free. Entries that name them are written after a sync, which
    ///    makes the length durable first: an entry past the end would make the image unusable.
    ///
    /// With [`Keep::Nothing`] the new clusters are a hole without blocks of their own, for masks.
    pub fn grow(&self, need: Need) -> Result<Next> {
        let Need { count, blocks, .. } = need;
        if planted(Bug::LocksInverted) {
            let _table = self.table.lock();
            drop(self.grow.lock());
        }
        let _length = self.grow.lock();
        let (free, file_end, growable, waiting, is_current) = {
            let table = self.table.lock();
            let Some(alloc) = &table.alloc else {
                return Err(Error::errno(libc::EROFS));
            };
            (
                alloc.free(),
                alloc.file_end(),
                alloc.growable(),
                alloc.waiting(),
                alloc.reserved_ever() == need.reserved_ever,
            )
        };
        if free >= count {
            return Ok(Next::Again(None));
        }
        let missing = count - free;
        if growable < missing {
            // The disk needs no more than its entries: what is missing is in quarantine, or others
            // have taken it, for the same disk clusters.
            return match (waiting > 0, is_current) {
                (true, _) => Ok(Next::Wait(Wait::Flush)),
                (false, false) => Ok(Next::Again(None)),
                (false, true) => Err(Error::errno(libc::ENOSPC).in_file(self.chain.top().path())),
            };
        }
        let cluster = self.chain.geometry().cluster;
        let place = |number| cluster.file_start(crate::units::FileCluster::new(number));
        let storage = self.top_storage();
        if storage.len()? != place(file_end) {
            storage.set_len(place(file_end))?;
        }
        let wanted = missing.max(self.grow_clusters).min(growable);
        let result = self.extend(file_end, wanted, blocks).or_else(|error| {
            // Whatever it was (a limit on the length is no lack of space), less may still do.
            if wanted == missing {
                return Err(error);
            }
            self.extend(file_end, missing, blocks)
        });
        if !planted(Bug::GrowthBelieved) {
            self.note_data();
        }
        match result {
            Ok(new_end) => {
                let mut table = self.table.lock();
                if let Some(alloc) = table.alloc.as_mut() {
                    alloc.extended(new_end);
                }
                Ok(Next::Again(None))
            }
            // What is in quarantine goes back to the host with the next flush.
            Err(error) if error.is_no_space() && waiting > 0 => Ok(Next::Wait(Wait::Flush)),
            Err(error) if error.is_no_space() => Ok(Next::Wait(Wait::Space)),
            Err(error) => Err(error),
        }
    }

    /// Lengthens the file from `file_end` clusters by `count`; on failure it has the old length.
    fn extend(&self, file_end: u64, count: u64, blocks: Keep) -> Result<u64> {
        let cluster = self.chain.geometry().cluster;
        let place = |number| cluster.file_start(crate::units::FileCluster::new(number));
        let storage = self.top_storage();
        let new_end = file_end.saturating_add(count);
        let extended = match blocks {
            Keep::Blocks => storage.allocate(place(file_end)..place(new_end)),
            Keep::Nothing => storage.set_len(place(new_end)),
        };
        match extended {
            Ok(()) => Ok(new_end),
            Err(error) => {
                // A failed fallocate may leave the file longer by any amount.
                let len: FileOffset = storage.len()?;
                if len != place(file_end) {
                    storage.set_len(place(file_end))?;
                }
                Err(error.in_file(self.chain.top().path()))
            }
        }
    }
}
