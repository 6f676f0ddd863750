//! Brings the clusters of a file into the order of the disk, in place.
//!
//! The places right after the table are filled from the first to the last, a batch at a time. What
//! lies in the places of the batch and belongs elsewhere goes out of the way first, home where that
//! is free, else to the highest place that is; then what belongs there is fetched. Either is a move
//! of its own, with both its syncs ([`crate::admin::relocate`]), so that a place is used again only
//! when nothing durable names it. A batch frees as many places as it fills: the file becomes longer
//! by one batch at most, and no cluster is moved more than twice for each place.

use crate::admin::check;
use crate::admin::progress::Progress;
use crate::admin::relocate::{Move, Places, Sound, batch_len, move_batch};
use crate::delta::bits::BitSet;
use crate::delta::walk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::Layout;
use crate::storage::{Keep, Storage};
use crate::units::{DiskCluster, FileOffset, len_u64, len_usize};
use std::collections::BTreeSet;
use std::ops::Range;

/// Calls `each` for every mapped cluster of the disk, with the place that it has in the file.
fn mapped(
    storage: &dyn Storage,
    sound: &Sound,
    mut each: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let layout = sound.header.layout();
    walk::words(storage, layout.table_end(), |at, bytes| {
        check::entries(at, bytes, layout, |cluster, word| {
            let start = layout.entry_start(word).get();
            match (cluster, sound.space.grid.number(start)) {
                (Some(cluster), Some(place)) if word != 0 => each(cluster, place),
                _ => Ok(()),
            }
        })
    })
}

/// How many clusters are not in their place, those left out that will be freed.
pub(super) fn misplaced(storage: &dyn Storage, sound: &Sound, freed: &BitSet) -> Result<u64> {
    let (mut home, mut count) = (sound.first(), 0);
    mapped(storage, sound, |cluster, place| {
        if !freed.contains(cluster) {
            count += u64::from(place != home);
            home += 1;
        }
        Ok(())
    })?;
    Ok(count)
}

/// The clusters of the disk that are mapped, by their rank among these.
struct Order<'a> {
    storage: &'a dyn Storage,
    sound: &'a Sound,
    clusters: Vec<u32>,
    /// Where each is.
    places: Vec<u32>,
    /// Who is at each home: the rank and one more, or 0 for nobody.
    there: Vec<u32>,
    /// Places behind the batch that have become free.
    free: BTreeSet<u64>,
    /// And those behind the last home.
    more: Places<'a>,
}

fn narrow(number: u64) -> Result<u32> {
    u32::try_from(number).map_err(|_| Error::errno(libc::EOVERFLOW))
}

fn at(rank: u32) -> usize {
    usize::try_from(rank).unwrap_or(usize::MAX)
}

/// Brings them into order.
pub(super) fn carry_out(
    storage: &dyn Storage,
    sound: &Sound,
    batch_bytes: u64,
    progress: &Progress,
) -> Result<()> {
    let count = sound.mapped();
    let first = sound.first();
    let mut order = Order {
        storage,
        sound,
        clusters: Vec::new(),
        places: Vec::new(),
        there: Vec::new(),
        free: BTreeSet::new(),
        more: Places::new(&sound.space, first + count..u64::MAX),
    };
    order.load(len_usize(count).ok_or_else(|| Error::errno(libc::ENOMEM))?)?;
    let size = sound.header.layout().cluster().bytes();
    let step = len_u64(batch_len(batch_bytes, size));
    let mut from = 0;
    while from < count {
        let ranks = narrow(from)?..narrow((from + step).min(count))?;
        order.clear(ranks.clone(), progress)?;
        order.fetch(ranks, progress)?;
        from += step;
    }
    Ok(())
}

impl Order<'_> {
    fn load(&mut self, count: usize) -> Result<()> {
        let full = |_| Error::errno(libc::ENOMEM);
        for list in [&mut self.clusters, &mut self.places, &mut self.there] {
            list.try_reserve_exact(count).map_err(full)?;
        }
        self.there.resize(count, 0);
        mapped(self.storage, self.sound, |cluster, place| {
            self.clusters.push(narrow(cluster)?);
            self.places.push(narrow(place)?);
            let rank = narrow(len_u64(self.places.len()))?;
            if let Some(home) = self.home(place) {
                self.there[home] = rank;
            }
            Ok(())
        })
    }

    /// The rank whose home a place is, as an index.
    fn home(&self, place: u64) -> Option<usize> {
        let rank = len_usize(place.checked_sub(self.sound.first())?)?;
        (rank < self.there.len()).then_some(rank)
    }

    fn place_of(&self, rank: u32) -> u64 {
        self.sound.first() + u64::from(rank)
    }

    /// What lies in the places of the batch and belongs elsewhere goes out of the way.
    fn clear(&mut self, ranks: Range<u32>, progress: &Progress) -> Result<()> {
        let mut moves = Vec::new();
        for rank in ranks.clone() {
            self.free.remove(&self.place_of(rank));
        }
        for rank in ranks.clone() {
            let Some(other) = self.there[at(rank)].checked_sub(1) else {
                continue;
            };
            if other == rank {
                continue;
            }
            let to = match other {
                _ if other >= ranks.end && self.there[at(other)] == 0 => self.place_of(other),
                _ => self.spare()?,
            };
            self.free.remove(&to);
            moves.push(self.go(other, to)?);
            self.there[at(rank)] = 0;
        }
        self.carry(moves, progress)
    }

    /// A place that nobody needs before its own turn.
    fn spare(&mut self) -> Result<u64> {
        let full = || Error::why(ErrorKind::Unsupported, "the image has no room for a move");
        self.free
            .pop_last()
            .or_else(|| self.more.next())
            .ok_or_else(full)
    }

    /// What belongs into the places of the batch is fetched.
    fn fetch(&mut self, ranks: Range<u32>, progress: &Progress) -> Result<()> {
        let (mut moves, mut left) = (Vec::new(), Vec::new());
        for rank in ranks {
            let (old, home) = (u64::from(self.places[at(rank)]), self.place_of(rank));
            if old == home {
                continue;
            }
            moves.push(self.go(rank, home)?);
            if let Some(other) = self.home(old) {
                self.there[other] = 0;
            }
            left.push(old);
        }
        self.carry(moves, progress)?;
        // The host gets back what it had twice for a while.
        let grid = self.sound.space.grid;
        for place in left {
            let range = grid.start(place)..grid.start(place + 1);
            let range = FileOffset::new(range.start)..FileOffset::new(range.end);
            self.storage.zero(range, Keep::Nothing)?;
            self.free.insert(place);
        }
        Ok(())
    }

    /// Notes that a cluster is elsewhere from now on.
    fn go(&mut self, rank: u32, to: u64) -> Result<Move> {
        let grid = self.sound.space.grid;
        let old = u64::from(self.places[at(rank)]);
        let full = || {
            Error::why(
                ErrorKind::Unsupported,
                "no entry can name the end of the file",
            )
        };
        let entry = grid.entry(to).ok_or_else(full)?;
        self.places[at(rank)] = narrow(to)?;
        if let Some(home) = self.home(to) {
            self.there[home] = rank + 1;
        }
        let cluster = DiskCluster::new(self.clusters[at(rank)].into());
        Ok(Move {
            entry_at: Layout::entry_offset(cluster),
            from: grid.start(old),
            to: grid.start(to),
            entry,
        })
    }

    fn carry(&self, mut moves: Vec<Move>, progress: &Progress) -> Result<()> {
        let size = self.sound.header.layout().cluster().bytes();
        let end = moves.iter().map(|one| one.to + size).max().unwrap_or(0);
        if self.storage.len()?.get() < end {
            self.storage.set_len(FileOffset::new(end))?;
        }
        move_batch(self.storage, &mut moves, size, progress)?;
        Ok(())
    }
}
