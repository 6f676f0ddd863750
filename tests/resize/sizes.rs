//! Disks that grow and shrink.

use crate::forge::content::GARBAGE;
use crate::forge::image::{IN_USE, ImageSpec, Layout, Mapped};
use crate::net::{Act, Case, Disk, forged, levels, shown, sound};
use crate::sim::directory::Names;
use crate::sim::media::Media;
use crate::sim::storage::{Manners, World};
use crate::stopping::Stopping;
use ploopfs::admin::progress::Progress;
use ploopfs::admin::resize::{Request, resize_image};
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::disk::{self, DiskOptions, Resources};
use ploopfs::error::ErrorKind;
use ploopfs::units::SectorCount;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

/// To this size, two clusters between syncs.
fn to(sectors: u64, force_discard: bool) -> Box<Act> {
    Box::new(move |files| {
        let lower = levels(files)?;
        let top = files.last().expect("a top");
        let request = Request {
            shrink: true,
            force_discard,
            batch_bytes: 8192,
            ..Request::new(SectorCount::new(sectors))
        };
        let done = resize_image(&**top, &lower, &request, &Progress::default(), &mut |_| {
            Ok(())
        });
        done.map(|_| ())
    })
}

/// 1000 entries of clusters of 4 KiB: a longer table takes the place of the first data clusters.
fn spec(version: u8, sectors: u64) -> ImageSpec {
    ImageSpec::new(version, 8, sectors)
}

fn case(name: &'static str, spec: &ImageSpec, sectors: u64, spare: u64) -> Case {
    Case {
        name,
        files: vec![forged(spec)],
        spare,
        act: to(sectors, false),
    }
}

/// The same, losing what is behind the new end, but no sooner than the disk has it.
fn discarding(name: &'static str, spec: &ImageSpec, sectors: u64) -> Case {
    Case {
        act: to(sectors, true),
        ..case(name, spec, sectors, NEVER)
    }
}

const NEVER: u64 = u64::MAX;

/// All kinds of growing and shrinking, each in some tens of operations.
pub(crate) fn cases() -> Vec<Case> {
    let some = |clusters: &[u64]| Mapped::List(clusters.to_vec());
    let mut gaps = spec(2, 8000).mapping(some(&[3, 999, 500, 7]));
    gaps.layout = Layout::Gaps(1);
    gaps.tail = 2;
    let mut shuffled = spec(1, 7999).mapping(some(&[999, 1, 2, 3, 4, 5, 900]));
    shuffled.layout = Layout::Shuffled(3);
    shuffled.garbage = true;
    let mut dirty = spec(2, 8000).mapping(some(&[0, 1, 2, 3, 4, 5]));
    dirty.mark = IN_USE;
    let mut high = spec(2, 8 * 2500).mapping(some(&[0, 1, 40, 7, 3]));
    high.layout = Layout::Gaps(30);
    let full = spec(1, 8 * 2500).mapping(some(&[1, 2, 3, 1200, 2499]));
    // What is cut off lies below what stays, which moves to its places.
    let mut low = spec(2, 8 * 2500).mapping(some(&[2400, 2450, 2300, 5, 60, 40, 9, 2499]));
    low.layout = Layout::Shuffled(2);
    low.garbage = true;
    let mut tight = spec(1, 8 * 900).mapping(some(&[880, 1, 890, 2, 25, 899]));
    tight.layout = Layout::Gaps(9);
    let base = spec(1, 6000).mapping(Mapped::Every { step: 97, phase: 4 });
    let top = spec(2, 8000).mapping(some(&[0, 97, 98, 101]));
    vec![
        case("grows over gaps", &gaps, 8 * 2500, NEVER),
        case("grows over all of its data", &shuffled, 8 * 9000, NEVER),
        case("grows though it was not closed", &dirty, 8 * 1500, NEVER),
        case("grows inside its table", &spec(2, 800), 8000, NEVER),
        case("grows in its last cluster", &shuffled, 8000, NEVER),
        case("shrinks where it is empty", &gaps_low(), 8 * 900, NEVER),
        case("shrinks and moves down", &high, 8 * 60, NEVER),
        discarding("shrinks and loses data", &full, 8 * 1000),
        discarding("shrinks and moves to what is lost", &low, 8 * 3),
        discarding("shrinks and loses all", &low, 8),
        discarding("shrinks within its table", &low, 8 * 2320),
        discarding("shrinks and moves, within its table", &tight, 8 * 30),
        Case {
            name: "a top grows over a smaller base",
            files: vec![forged(&base), forged(&top)],
            spare: NEVER,
            act: to(8 * 2100, false),
        },
        Case {
            name: "a top shrinks over a smaller base",
            files: vec![forged(&base), forged(&top)],
            spare: NEVER,
            act: to(7000, false),
        },
    ]
}

fn gaps_low() -> ImageSpec {
    let mut spec = spec(2, 8 * 2500).mapping(Mapped::List(vec![3, 17, 5]));
    spec.layout = Layout::Gaps(2);
    spec
}

/// The same clusters, in a disk of this size.
fn clipped(disk: &Disk, sectors: u64) -> Disk {
    let mut disk = disk.clone();
    disk.sectors = sectors;
    disk.clusters.retain(|cluster, _| *cluster * 8 < sectors);
    for (cluster, bytes) in &mut disk.clusters {
        bytes.resize(((sectors - cluster * 8) * 512).min(4096) as usize, 0);
    }
    disk
}

pub(crate) fn what_stays_is_as_before() {
    for case in cases() {
        let before = shown(&case.files);
        let good = case.good();
        let after = shown(&good);
        let name = case.name;
        assert_ne!(before.sectors, after.sectors, "{name}");
        assert_eq!(clipped(&before, after.sectors), after, "{name}");
        let top = good.last().expect("a top");
        let word = |at: usize| u32::from_le_bytes(top[at..at + 4].try_into().expect("four"));
        let entries = after.sectors.div_ceil(8);
        assert_eq!(u64::from(word(32)), entries, "{name}");
        let table = (64 + 4 * entries).div_ceil(4096);
        assert_eq!(u64::from(word(48)), table * 8, "{name}: the first block");
        assert_eq!(word(44), 0, "{name}: closed");
        assert_eq!(top.len() % 4096, 0, "{name}");
        let mapped = (0..entries).filter(|n| word(64 + 4 * *n as usize) != 0);
        let mapped = mapped.count() as u64;
        if name.contains("not closed") || name.contains("all of") {
            assert_eq!(
                top.len() as u64,
                (table + mapped) * 4096,
                "{name}: no waste"
            );
        }
        assert_eq!(u32::from(mapped == 0), word(52) & 1, "{name}: the flag");
    }
}

pub(crate) fn the_power_may_fail() {
    let mut states = 0;
    for case in cases() {
        for poor_host in [false, true] {
            let found = case.cuts(6, poor_host);
            assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
            states += found.states;
        }
    }
    assert!(states > 500, "only {states} states");
}

pub(crate) fn the_host_may_fail() {
    for case in cases() {
        let found = case.faults();
        assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
    }
}

pub(crate) fn garbage_does_not_come_up() {
    let mut spec = spec(2, 7999).mapping(Mapped::All);
    spec.garbage = true;
    let case = case("garbage", &spec, 8 * 1100, NEVER);
    let old = &case.files[0];
    assert!(old[old.len() - 512..].iter().all(|byte| *byte == GARBAGE));
    let after = shown(&case.good());
    assert_eq!(clipped(&shown(&case.files), 8 * 1100), after);
}

pub(crate) fn growing_and_shrinking_back() {
    for version in [1, 2] {
        let spec = spec(version, 8000).mapping(Mapped::Percent(30));
        let grown = case("there", &spec, 8 * 5000, NEVER).good();
        let back = Case {
            name: "and back",
            files: grown,
            spare: NEVER,
            act: to(8000, false),
        };
        assert_eq!(shown(&back.good()), shown(&[forged(&spec)]));
    }
}

/// Stopped at any operation, a disk is closed and is the old one or the new one.
pub(crate) fn stopping_leaves_a_closed_disk() {
    let mut sizes = BTreeSet::new();
    for case in cases() {
        let (before, after) = (shown(&case.files), shown(&case.good()));
        let name = case.name;
        for operations in 0..10_000 {
            let world = World::new(case.files.clone(), Manners::default(), false);
            let last = case.files.len() - 1;
            let files: Vec<_> = (0..=last).map(|n| world.open(n, n == last)).collect();
            let lower = levels(&files).expect("forged");
            let top = Stopping::new(files[last].clone(), operations);
            let request = Request {
                shrink: true,
                force_discard: true,
                batch_bytes: 8192,
                ..Request::new(SectorCount::new(after.sectors))
            };
            let done = resize_image(&top, &lower, &request, &top.progress, &mut |_| Ok(()));
            let now = world.files();
            let what = format!("{name}, stopped after {operations}");
            assert_eq!(now[last][44..48], [0; 4], "{what}: closed");
            let disk = shown(&now);
            assert!(disk == before || disk == after, "{what}: neither disk");
            sound(&now[last]).unwrap_or_else(|why| panic!("{what}: {why}"));
            match done {
                Ok(_) => break,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted, "{what}"),
            }
            sizes.insert((name, disk.sectors));
            let repeated = Case {
                name,
                files: now,
                spare: NEVER,
                act: to(after.sectors, true),
            };
            assert_eq!(shown(&repeated.good()), after, "{what}: repeated");
        }
    }
    // Some were stopped before the header, and some of those that shrink after it.
    assert!(sizes.len() > cases().len(), "{sizes:?}");
}

/// A disk of one image that is opened to be written to, and closed.
fn mounted(image: Vec<u8>, resources: &Resources) -> Vec<u8> {
    let world = World::new(vec![image], Manners::default(), false);
    let part = OpenedPart {
        start: SectorCount::ZERO,
        end: None,
        blocksize: None,
        files: vec![OpenedFile {
            path: PathBuf::from("x.hds"),
            storage: world.open(0, true),
            plain: Plain::No,
            guid: None,
        }],
    };
    let images = OpenedImages::from_parts(PathBuf::from("x.hds"), vec![part]);
    let opened = disk::open_with(Arc::new(images), &DiskOptions::default(), resources.clone());
    let (disk, _) = opened.expect("it opens");
    disk.close().expect("it closes");
    world.files().remove(0)
}

/// What an interrupted shrinking has left is mended before the mark goes, whoever closes the image.
pub(crate) fn half_cut_and_mounted_it_is_closed_clean() {
    let resources = Resources::new(1).expect("threads and memory");
    let (mut states, mut half_cut) = (0, 0);
    let all = cases().into_iter().filter(|case| case.files.len() == 1);
    for case in all.filter(|case| case.name.starts_with("shrinks")) {
        let world = World::new(case.files.clone(), Manners::default(), true);
        (case.act)(&[world.open(0, true)]).expect("undisturbed");
        let mut media = Media::new(&case.files, Names::new());
        let mut dice = 9;
        for event in &world.log() {
            if !media.take(event) {
                continue;
            }
            let (files, _) = media.after_cut(&mut dice);
            let before = shown(&files);
            let is_stray = |top: &[u8]| {
                let word = |at: usize| u32::from_le_bytes(top[at..at + 4].try_into().expect("4"));
                let (entries, first) = (word(32) as usize, word(48) as usize * 512);
                top[64 + 4 * entries..first].iter().any(|byte| *byte != 0)
            };
            half_cut += u64::from(is_stray(&files[0]));
            let now = mounted(files[0].clone(), &resources);
            let what = format!("{}, state {states}", case.name);
            assert_eq!(now[44..48], [0; 4], "{what}: closed");
            assert!(!is_stray(&now), "{what}: stray slots");
            sound(&now).unwrap_or_else(|why| panic!("{what}: {why}"));
            assert_eq!(shown(&[now]), before, "{what}: shows something else");
            states += 1;
        }
    }
    assert!(half_cut > 10 && states > 50, "{half_cut} of {states}");
}
