//! Images with gaps, zeros and disorder.

use crate::forge::image::{IN_USE, ImageSpec, Layout, Mapped};
use crate::net::{Act, Case, forged, levels, shown};
use ploopfs::admin::compact::{Request, compact_image, plan_image};
use ploopfs::admin::progress::Progress;
use ploopfs::delta::image::Image;
use ploopfs::storage::SharedStorage;
use std::path::Path;
use std::sync::Arc;

fn request(zeroes: bool, defrag: bool) -> Request {
    Request {
        zeroes,
        defrag,
        // Two clusters.
        batch_bytes: 8192,
        ..Request::default()
    }
}

fn with(zeroes: bool, defrag: bool) -> Box<Act> {
    Box::new(move |files| {
        let (lower, top) = (levels(files)?, files.last().expect("a top"));
        let request = request(zeroes, defrag);
        compact_image(&**top, &lower, &request, &Progress::default()).map(|_| ())
    })
}

/// Clusters of an image, at this index among those in the file, are zeros.
fn blank(spec: &ImageSpec, which: &[usize]) -> Vec<u8> {
    let mut bytes = forged(spec);
    for (number, (_, slot)) in spec.slots().iter().enumerate() {
        if which.contains(&number) {
            let at = spec.slot_at(*slot) as usize;
            bytes[at..at + 4096].fill(0);
        }
    }
    bytes
}

/// All kinds, each in some tens of operations.
pub(crate) fn cases() -> Vec<Case> {
    let some = |version, clusters: &[u64], layout| {
        let mapped = Mapped::List(clusters.to_vec());
        let mut spec = ImageSpec::new(version, 8, 800).mapping(mapped);
        spec.layout = layout;
        spec
    };
    let gaps = some(1, &[3, 7, 9, 30, 31, 99], Layout::Gaps(2));
    let mut tail = some(2, &[1, 2], Layout::Packed);
    tail.tail = 5;
    let mut dirty = some(2, &[5, 6, 80, 81, 82], Layout::Gaps(1));
    dirty.mark = IN_USE;
    let packed = some(2, &[1, 2, 3, 4, 5, 6], Layout::Packed);
    let reversed = some(1, &[0, 1, 2, 3, 4, 5, 6, 7, 8], Layout::Reversed);
    let shuffled = some(2, &[0, 11, 22, 33, 44, 55, 66, 77], Layout::Shuffled(9));
    let base = some(1, &[2, 3, 50], Layout::Packed);
    let case = |name, files, act| Case {
        name,
        files,
        spare: u64::MAX,
        act,
    };
    let mut scattered = some(2, &[9, 8, 70, 71, 3, 2], Layout::Gaps(3));
    scattered.disk_sectors = 797;
    vec![
        case("gaps", vec![forged(&gaps)], with(false, false)),
        case("tail", vec![forged(&tail)], with(false, false)),
        case("not closed", vec![forged(&dirty)], with(false, false)),
        case("zeros", vec![blank(&packed, &[0, 2, 3])], with(true, false)),
        case("only zeros", vec![blank(&tail, &[0, 1])], with(true, false)),
        case(
            "zeros over a base",
            vec![forged(&base), blank(&packed, &[0, 1, 2, 3])],
            with(true, false),
        ),
        case("reversed", vec![forged(&reversed)], with(false, true)),
        case("shuffled", vec![forged(&shuffled)], with(false, true)),
        case("scattered", vec![blank(&scattered, &[1])], with(true, true)),
        case("order alone", vec![forged(&gaps)], with(false, true)),
    ]
}

pub(crate) fn undisturbed() {
    for case in cases() {
        let good = case.good();
        let (top, name) = (good.last().expect("a top"), case.name);
        assert_eq!(shown(&case.files), shown(&good), "{name}");
        let word = |at: usize| u32::from_le_bytes(top[at..at + 4].try_into().expect("four"));
        let unit = if top[8] == b'r' { 8 } else { 1 };
        let entries: Vec<u32> = (0..100).map(|n| word(64 + 4 * n) / unit).collect();
        let mapped: Vec<u32> = entries.into_iter().filter(|entry| *entry != 0).collect();
        let count = mapped.len() as u32;
        assert_eq!(top.len() as u32, (1 + count) * 4096, "{name}");
        assert_eq!(word(44), 0, "{name}: closed");
        let kept = match name {
            "zeros" => 3,
            "only zeros" => 0,
            // Two of the four are below too.
            "zeros over a base" => 4,
            _ => count,
        };
        assert_eq!(count, kept, "{name}");
        if ["reversed", "shuffled", "scattered", "order alone"].contains(&name) {
            assert_eq!(mapped, (1..=count).collect::<Vec<_>>(), "{name}");
        }
    }
}

pub(crate) fn twice() {
    for mut case in cases() {
        case.files = case.good();
        let (zeroes, defrag) = (case.name.contains("zero"), case.name == "reversed");
        let files: Vec<SharedStorage> = case
            .files
            .iter()
            .map(|bytes| -> SharedStorage {
                Arc::new(ploopfs::storage::mem::MemStorage::new(bytes.clone()))
            })
            .collect();
        let (top, below) = files.split_last().expect("a top");
        let lower: Vec<Image> = below
            .iter()
            .map(|file| Image::expanding(Path::new("lower"), Arc::clone(file)).expect("forged"))
            .collect();
        let request = request(zeroes && lower.is_empty(), defrag);
        let told = plan_image(&**top, &lower, &request, &Progress::default());
        let told = told.expect("it is sound");
        assert!(told.is_nothing(), "{}: {told:?}", case.name);
    }
}

pub(crate) fn the_power_may_fail() {
    let mut states = 0;
    for case in cases() {
        for poor_host in [false, true] {
            let found = case.cuts(8, poor_host);
            assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
            states += found.states;
        }
    }
    assert!(states > 700, "only {states} states");
}

pub(crate) fn the_host_may_fail() {
    for case in cases() {
        let found = case.faults();
        assert!(found.complaints.is_empty(), "{:#?}", found.complaints);
    }
}

pub(crate) fn stopping_leaves_a_closed_disk() {
    for case in cases() {
        // In order already, and closed: there is nothing to stop.
        if case.name != "zeros over a base" && case.name != "zeros" {
            case.stopped(|files, progress| {
                let (lower, top) = (levels(files)?, files.last().expect("a top"));
                compact_image(&**top, &lower, &request(false, true), progress).map(|_| ())
            });
        }
    }
}
