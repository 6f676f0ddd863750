//! A fake chain, and what a plan must say of each of its bytes.
//!
//! A fake chain maps clusters on levels as it is told; what a plan says of each byte must be what
//! looking from the top down gives for that byte, without gap or overlap, with nothing left to
//! merge, and with the cost promised: never more segments than there is room for.

use ploopfs::format::layout::{Layout, PageIndex};
use ploopfs::plan::{
    Fill, Geometry, Lookup, Mapping, Segment, Segments, Source, State, Stop, Target, Unmapping,
    plan_discard, plan_read, plan_write,
};
use ploopfs::units::{ClusterSize, DiskCluster, DiskOffset, FileOffset, Level};
use std::collections::BTreeSet;
use std::sync::Arc;

/// One level: the place of each cluster in its file, and the end of its own disk.
#[derive(Clone, Debug)]
struct FakeLevel {
    places: Vec<Option<u64>>,
    end: u64,
}

/// What a byte is: zeros, or a byte of a level's file. A number, so that many are compared quickly.
type Place = u64;
const ZEROS: Place = u64::MAX;

fn place(level: usize, at: u64) -> Place {
    (level as u64) << 48 | at
}

/// Every level maps some clusters to places of its own file, and ends somewhere.
#[derive(Clone, Debug)]
pub(crate) struct FakeChain {
    geometry: Geometry,
    levels: Vec<FakeLevel>,
    /// What each byte of the disk is.
    bytes: Arc<Vec<Place>>,
    pending: BTreeSet<u64>,
    bad: BTreeSet<u64>,
    missing: BTreeSet<u32>,
}

/// What a fake chain is made of.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// Cluster size in sectors.
    pub(crate) sectors: u32,
    /// Clusters of the disk, at least 1.
    pub(crate) clusters: u64,
    /// Bytes by which the last cluster is shorter.
    pub(crate) cut: u64,
    /// For each level, base first: pairs of a cluster and its place, and where its disk ends, in
    /// clusters. The end of the top is that of the disk.
    pub(crate) levels: Vec<(Vec<(u64, u64)>, u64)>,
    /// Neighbours on the disk are neighbours in the file, whatever the places say.
    pub(crate) neighbours: bool,
}

impl Recipe {
    /// The chain.
    pub(crate) fn chain(&self) -> FakeChain {
        let cluster = ClusterSize::from_sectors(self.sectors).expect("a cluster size");
        let bytes = cluster.bytes();
        let disk_len = (self.clusters * bytes).saturating_sub(self.cut).max(1);
        let top = self.levels.len() - 1;
        let levels = self.levels.iter().enumerate().map(|(number, (map, end))| {
            let mut places = vec![None; self.clusters as usize];
            for (cluster, at) in map.iter().filter(|(cluster, _)| *cluster < self.clusters) {
                let at = if self.neighbours { cluster + 7 } else { *at };
                places[*cluster as usize] = Some(at * bytes);
            }
            let lower_end = (end * bytes + end % 512).min(disk_len);
            let end = if number == top { disk_len } else { lower_end };
            FakeLevel { places, end }
        });
        let mut chain = FakeChain {
            levels: levels.collect(),
            bytes: Arc::default(),
            geometry: Geometry {
                cluster,
                disk_len,
                top: Level::new(top as u16),
            },
            pending: BTreeSet::new(),
            bad: BTreeSet::new(),
            missing: BTreeSet::new(),
        };
        let mut all = Vec::new();
        for cluster in 0..self.clusters {
            let (start, winner) = (cluster * bytes, chain.winner(cluster));
            let end = (start + bytes).min(disk_len);
            if let Some((level, from)) = winner {
                let data_end = chain.levels[level].end.min(end);
                all.extend((start..data_end).map(|at| place(level, from + at - start)));
            }
            // Holes, and what is past the end of the level's own disk.
            all.resize(all.len().max(end as usize), ZEROS);
        }
        chain.bytes = Arc::new(all);
        chain
    }
}

impl FakeChain {
    /// Clusters of the disk.
    fn clusters(&self) -> u64 {
        self.geometry.disk_len.div_ceil(self.cluster_bytes())
    }

    fn place(&self, level: usize, cluster: u64) -> Option<u64> {
        *self.levels[level].places.get(cluster as usize)?
    }

    /// The highest level that maps a cluster, and where.
    fn winner(&self, cluster: u64) -> Option<(usize, u64)> {
        let from_top = (0..self.levels.len()).rev();
        from_top
            .filter_map(|level| self.place(level, cluster).map(|at| (level, at)))
            .next()
    }

    fn mapped_levels(&self, cluster: u64) -> usize {
        (0..self.levels.len())
            .filter(|level| self.place(*level, cluster).is_some())
            .count()
    }

    fn cluster_bytes(&self) -> u64 {
        self.geometry.cluster.bytes()
    }
}

impl Lookup for FakeChain {
    fn look_up(&self, cluster: DiskCluster) -> Mapping {
        let number = cluster.get();
        let (page, _) = Layout::page_of(cluster);
        let state = match self.winner(number) {
            _ if self.missing.contains(&page.0) => State::Missing(page),
            _ if self.bad.contains(&number) => State::Bad,
            None => State::Hole,
            Some((level, at)) => State::At {
                level: Level::new(level as u16),
                start: offset(at),
            },
        };
        let covers_lower = self.mapped_levels(number) > 1;
        Mapping {
            state,
            pending: self.pending.contains(&number),
            covers_lower,
        }
    }

    fn readable_end(&self, level: Level) -> u64 {
        self.levels[level.index()].end
    }
}

fn offset(at: u64) -> FileOffset {
    FileOffset::new(at)
}

/// A range of the disk that two numbers choose.
pub(crate) fn range(chain: &FakeChain, a: u64, b: u64) -> (u64, u64) {
    let at = a % chain.geometry.disk_len;
    (at, b % (chain.geometry.disk_len - at) + 1)
}

/// No gap, no overlap, nothing empty, and all that was said to be covered.
fn assert_tiled<T: Copy>(segments: &[Segment<T>], covered: u64) {
    let mut next = 0;
    for segment in segments {
        assert_eq!(segment.start, next);
        assert!(segment.len > 0);
        next += segment.len;
    }
    assert_eq!(next, covered);
}

/// Plans a read to its end and holds every byte against the chain.
pub(crate) fn check_reads(chain: &FakeChain, at: u64, len: u64) {
    let mut done = 0;
    while done < len {
        let mut segments = Segments::inline();
        let here = DiskOffset::new(at + done);
        let covered = plan_read(chain, &chain.geometry, here, len - done, &mut segments)
            .expect("all pages are there");
        assert!(covered > 0, "a plan always gets on");
        assert!(segments.is_inline());
        assert_tiled(segments.as_slice(), covered);
        for segment in segments.as_slice() {
            let first = (here.get() + segment.start) as usize;
            let found: Vec<Place> = match segment.what {
                Source::Zeros => vec![ZEROS; segment.len as usize],
                Source::Data { level, at } => (at.get()..at.get() + segment.len)
                    .map(|at| place(level.index(), at))
                    .collect(),
            };
            assert_eq!(found, chain.bytes[first..first + segment.len as usize]);
        }
        for pair in segments.as_slice().windows(2) {
            let joinable = match (pair[0].what, pair[1].what) {
                (Source::Zeros, Source::Zeros) => true,
                (Source::Data { level: a, at }, Source::Data { level: b, at: next }) => {
                    a == b && at.get() + pair[0].len == next.get()
                }
                _ => false,
            };
            assert!(!joinable, "neighbours are merged");
        }
        done += covered;
    }
}

/// Plans a write to its end, of a payload whose clusters are zero where `zeros` says so.
pub(crate) fn check_writes(chain: &FakeChain, at: u64, len: u64, zeros: u64) {
    let bytes = chain.cluster_bytes();
    let is_zero_cluster = |cluster: u64| zeros >> (cluster % 64) & 1 == 1;
    let mut done = 0;
    while done < len {
        let mut segments = Segments::inline();
        let here = at + done;
        let zero = |start: u64, len: u64| {
            assert_eq!(
                (here + start) / bytes,
                (here + start + len - 1) / bytes,
                "one cluster"
            );
            is_zero_cluster((here + start) / bytes)
        };
        let position = DiskOffset::new(here);
        let covered = plan_write(
            chain,
            &chain.geometry,
            position,
            len - done,
            zero,
            &mut segments,
        )
        .expect("all pages are there");
        assert!(covered > 0);
        assert_tiled(segments.as_slice(), covered);
        for segment in segments.as_slice() {
            let (first, end) = (here + segment.start, here + segment.start + segment.len);
            for cluster in first / bytes..=(end - 1) / bytes {
                // What a target says of the bytes in one cluster, it says of the first and the
                // last, or of none.
                let piece = first.max(cluster * bytes)..end.min((cluster + 1) * bytes);
                for disk in [piece.start, piece.end - 1] {
                    check_target(
                        chain,
                        disk,
                        *segment,
                        disk - first,
                        is_zero_cluster(cluster),
                    );
                }
            }
        }
        done += covered;
    }
}

fn check_target(chain: &FakeChain, disk: u64, segment: Segment<Target>, byte: u64, zero: bool) {
    let top = chain.geometry.top.index();
    let (number, within) = (disk / chain.cluster_bytes(), disk % chain.cluster_bytes());
    let cluster_len = chain.geometry.cluster_len(DiskCluster::new(number));
    match (chain.winner(number), segment.what) {
        (Some((level, start)), Target::InPlace { at }) => {
            assert_eq!((level, start + within), (top, at.get() + byte));
        }
        (None, Target::Nothing) => assert!(zero),
        (
            winner,
            Target::Fresh {
                cluster,
                within: first,
                fill,
            },
        ) => {
            assert_eq!((cluster.get(), first + byte), (number, within));
            assert_eq!(
                fill == Fill::Whole,
                first == 0 && segment.len == cluster_len
            );
            match (fill, winner) {
                (Fill::Whole, None) | (Fill::Zeros, None) => assert!(!zero),
                (Fill::Whole, Some((level, _))) => assert!(level < top),
                (Fill::Copy { level, start, len }, Some((winner, at))) => {
                    assert_eq!((level.index(), start.get()), (winner, at));
                    assert!(winner < top);
                    let cluster_start = number * chain.cluster_bytes();
                    let readable = chain.levels[winner].end.saturating_sub(cluster_start);
                    assert_eq!(len, readable.min(cluster_len));
                }
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{other:?}"),
    }
}

/// Plans the discard of every cluster, and of one past the end.
pub(crate) fn check_discards(chain: &FakeChain) {
    let top = chain.geometry.top.index();
    for number in 0..=chain.clusters() {
        let what = plan_discard(chain, &chain.geometry, DiskCluster::new(number));
        let expected = match chain.winner(number) {
            None => Unmapping::Nothing,
            Some((level, _)) if level < top => Unmapping::MaskWithZeros,
            Some((_, at)) if chain.mapped_levels(number) == 1 => {
                Unmapping::Unmap { at: offset(at) }
            }
            Some((_, at)) => Unmapping::ZeroInPlace { at: offset(at) },
        };
        assert_eq!(what, Ok(expected));
    }
}

/// What stops a plan stops it at the first byte that it concerns, never later, and what comes
/// before is planned as if nothing were wrong.
pub(crate) fn check_obstacles(chain: FakeChain, at: u64, len: u64, obstacle: u64) {
    let bytes = chain.cluster_bytes();
    let touched = obstacle >= at / bytes && obstacle <= (at + len - 1) / bytes;
    let first = obstacle == at / bytes;
    let here = DiskOffset::new(at);
    let mut segments = Segments::with_room(64);

    let mut bad = chain.clone();
    bad.bad.insert(obstacle);
    let read = plan_read(&bad, &bad.geometry, here, len, &mut segments);
    assert_eq!(read.is_err(), touched);

    let mut segments = Segments::with_room(64);
    let mut pending = chain.clone();
    pending.pending.insert(obstacle);
    let write = plan_write(
        &pending,
        &pending.geometry,
        here,
        len,
        |_, _| false,
        &mut segments,
    );
    match write {
        Err(stop) => assert!(first && stop == Stop::Pending(DiskCluster::new(obstacle))),
        Ok(covered) if touched => assert_eq!(at + covered, obstacle * bytes),
        Ok(covered) => assert_eq!(covered, len),
    }
    let discard = plan_discard(&pending, &pending.geometry, DiskCluster::new(obstacle));
    assert_eq!(discard, Err(Stop::Pending(DiskCluster::new(obstacle))));

    let mut missing = chain;
    missing.missing.insert(0);
    let absent = Stop::Missing(PageIndex(0));
    let mut segments = Segments::inline();
    let read = plan_read(&missing, &missing.geometry, here, len, &mut segments);
    assert_eq!(read, Err(absent));
    let mut segments = Segments::inline();
    let write = plan_write(
        &missing,
        &missing.geometry,
        here,
        len,
        |_, _| true,
        &mut segments,
    );
    assert_eq!(write, Err(absent), "missing is never a hole");
    let discard = plan_discard(&missing, &missing.geometry, DiskCluster::new(0));
    assert_eq!(discard, Err(absent), "missing is never a hole");
}
