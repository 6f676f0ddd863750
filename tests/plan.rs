//! The planner against an oracle that thinks of one byte at a time.
//!
//! A fake chain maps random clusters on random levels; what a plan says of each byte must be what
//! looking from the top down gives for that byte, without gap or overlap, with nothing left to
//! merge, and with the cost promised: never more segments than there is room for.

use ploopfs::format::layout::{Layout, PageIndex};
use ploopfs::plan::{
    Fill, Geometry, Lookup, Mapping, Segment, Segments, Source, State, Stop, Target, Unmapping,
    plan_discard, plan_read, plan_write,
};
use ploopfs::units::{ClusterSize, DiskCluster, DiskOffset, FileOffset, Level};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Every level maps some clusters to places of its own file, and ends somewhere.
#[derive(Clone, Debug)]
struct FakeChain {
    geometry: Geometry,
    levels: Vec<(BTreeMap<u64, u64>, u64)>,
    pending: BTreeSet<u64>,
    bad: BTreeSet<u64>,
    missing: BTreeSet<u32>,
}

impl FakeChain {
    /// The highest level that maps a cluster, and where.
    fn winner(&self, cluster: u64) -> Option<(usize, u64)> {
        let from_top = self.levels.iter().enumerate().rev();
        from_top
            .filter_map(|(level, (map, _))| map.get(&cluster).map(|at| (level, *at)))
            .next()
    }

    fn mapped_levels(&self, cluster: u64) -> usize {
        self.levels
            .iter()
            .filter(|(map, _)| map.contains_key(&cluster))
            .count()
    }

    fn cluster_bytes(&self) -> u64 {
        self.geometry.cluster.bytes()
    }

    /// What one byte of the disk is: zeros, or a byte of a level's file.
    fn byte(&self, at: u64) -> Option<(usize, u64)> {
        let (cluster, within) = (at / self.cluster_bytes(), at % self.cluster_bytes());
        let (level, start) = self.winner(cluster)?;
        (at < self.levels[level].1).then_some((level, start + within))
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
        self.levels[level.index()].1
    }
}

fn offset(at: u64) -> FileOffset {
    FileOffset::new(at)
}

prop_compose! {
    fn fake_chain()(
        sectors in prop::sample::select(vec![1_u32, 3, 8]),
        clusters in 1_u64..40,
        cut in 0_u64..512,
        levels in prop::collection::vec(
            (prop::collection::btree_map(0_u64..40, 0_u64..60, 0..40), 0_u64..45), 1..5),
        neighbours in any::<bool>(),
    ) -> FakeChain {
        let cluster = ClusterSize::from_sectors(sectors).expect("a cluster size");
        let bytes = cluster.bytes();
        let disk_len = (clusters * bytes).saturating_sub(cut).max(1);
        let count = levels.len();
        let levels = levels.into_iter().enumerate().map(|(number, (map, end))| {
            let place = |(cluster, at): (u64, u64)| {
                // Neighbours on the disk are often neighbours in the file.
                (cluster, if neighbours { (cluster + 7) * bytes } else { at * bytes })
            };
            let map = map.into_iter().filter(|(cluster, _)| *cluster < clusters).map(place);
            let lower_end = (end * bytes + end % 512).min(disk_len);
            let end = if number + 1 == count { disk_len } else { lower_end };
            (map.collect(), end)
        });
        FakeChain {
            geometry: Geometry { cluster, disk_len, top: Level::new((count - 1) as u16) },
            levels: levels.collect(),
            pending: BTreeSet::new(),
            bad: BTreeSet::new(),
            missing: BTreeSet::new(),
        }
    }
}

fn range(chain: &FakeChain, a: u64, b: u64) -> (u64, u64) {
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

fn check_reads(chain: &FakeChain, at: u64, len: u64) {
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
            for byte in 0..segment.len {
                let expected = chain.byte(here.get() + segment.start + byte);
                let found = match segment.what {
                    Source::Zeros => None,
                    Source::Data { level, at } => Some((level.index(), at.get() + byte)),
                };
                assert_eq!(found, expected);
            }
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

/// A payload whose clusters are zero where `zeros` says so.
fn check_writes(chain: &FakeChain, at: u64, len: u64, zeros: u64) {
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
            for byte in 0..segment.len {
                let disk = here + segment.start + byte;
                check_target(chain, disk, *segment, byte, is_zero_cluster(disk / bytes));
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
                    let readable = chain.levels[winner].1.saturating_sub(cluster_start);
                    assert_eq!(len, readable.min(cluster_len));
                }
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{other:?}"),
    }
}

fn check_discards(chain: &FakeChain) {
    let top = chain.geometry.top.index();
    for number in 0..40 {
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn plans_agree_with_the_oracle(
        chain in fake_chain(),
        requests in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..6),
    ) {
        for (a, b, zeros) in requests {
            let (at, len) = range(&chain, a, b);
            check_reads(&chain, at, len);
            check_writes(&chain, at, len, zeros);
        }
        check_discards(&chain);
    }

    /// What stops a plan stops it at the first byte that it concerns, never later, and what comes
    /// before is planned as if nothing were wrong.
    #[test]
    fn obstacles_stop_plans_where_they_are(
        chain in fake_chain(),
        a in any::<u64>(), b in any::<u64>(), obstacle in 0_u64..40,
    ) {
        let (at, len) = range(&chain, a, b);
        let bytes = chain.cluster_bytes();
        let touched = obstacle >= at / bytes && obstacle <= (at + len - 1) / bytes;
        let first = obstacle == at / bytes;
        let here = DiskOffset::new(at);
        let mut segments = Segments::with_room(64);

        let mut bad = chain.clone();
        bad.bad.insert(obstacle);
        let read = plan_read(&bad, &bad.geometry, here, len, &mut segments);
        assert_eq!(read.is_err(), touched);

        segments.clear();
        let mut segments = Segments::with_room(64);
        let mut pending = chain.clone();
        pending.pending.insert(obstacle);
        let write = plan_write(&pending, &pending.geometry, here, len, |_, _| false, &mut segments);
        match write {
            Err(stop) => assert!(first && stop == Stop::Pending(DiskCluster::new(obstacle))),
            Ok(covered) if touched => assert_eq!(at + covered, obstacle * bytes),
            Ok(covered) => assert_eq!(covered, len),
        }

        let mut missing = chain;
        missing.missing.insert(0);
        let mut segments = Segments::inline();
        let read = plan_read(&missing, &missing.geometry, here, len, &mut segments);
        assert_eq!(read, Err(Stop::Missing(PageIndex(0))));
        let discard = plan_discard(&missing, &missing.geometry, DiskCluster::new(0));
        assert_eq!(discard, Err(Stop::Missing(PageIndex(0))), "missing is never a hole");
    }
}
