//! Power cuts and failures during every change of a bundle, at every operation.
//!
//! Whatever is kept of what was not durable: the descriptor can be read, every file that it names
//! is there and sound, every snapshot shows what it did before or does after, and the change can be
//! made again, to the same end, with nothing left over.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::splitmix;
use crate::forge::image::Mapped;
use crate::sim::directory::SimDirectory;
use crate::sim::faults::Nth;
use crate::sim::media::Media;
use crate::sim::storage::Manners;
use crate::steps::{FORCED, create, delete, line, mark, merge, name, switch};
use crate::world::{
    DESCRIPTOR, Step, after, carry_out, chain, described, expect_sound, like, load, over_plain,
    shows, split, with_file,
};
use ploopfs::admin::bundle::Bundle;
use ploopfs::admin::merge::Merge;
use ploopfs::admin::progress::Progress;
use ploopfs::admin::snapshot::Upper;
use ploopfs::delta::image::Image;
use ploopfs::error::{ErrorKind, Result};
use ploopfs::format::guid::Guid;
use ploopfs::storage::Directory;
use ploopfs::units::ClusterSize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

type Change = Box<dyn Fn(&mut Bundle<'_>) -> Result<()>>;

/// A change, and how it is begun.
struct Case {
    what: String,
    old: Media,
    step: Change,
}

fn case(what: &str, old: Media, step: impl Fn(&mut Bundle<'_>) -> Result<()> + 'static) -> Case {
    Case {
        what: what.to_owned(),
        old,
        step: Box::new(step),
    }
}

/// Deletes the last but one child of a marked snapshot; once that is gone, the marked one.
fn delete_both(child: Guid, marked: Guid) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    move |bundle| {
        let mut shots = bundle.descriptor().snapshots.iter();
        let is_there = shots.any(|shot| shot.guid == child);
        delete(if is_there { child } else { marked })(bundle)
    }
}

fn wide() -> BundleSpec {
    BundleSpec::chain(Style::Ploop, &like(2), 2, |level, image| {
        image.disk_sectors = if level == 0 { 237 } else { 400 };
    })
}

/// The lower image is cut to the size of the disk, and its clusters are moved for that.
fn narrow(mapped: &Mapped) -> BundleSpec {
    BundleSpec::chain(Style::Ploop, &like(2), 2, |level, image| {
        image.disk_sectors = if level == 0 { 8 * 1100 } else { 237 };
        if level == 0 {
            image.mapped = mapped.clone();
        }
    })
}

/// It has data behind the end of the upper disk.
fn behind() -> Media {
    load(&narrow(&Mapped::Every { step: 30, phase: 3 }))
}

/// It has none.
fn before_the_end() -> Media {
    load(&narrow(&Mapped::List((0..28).step_by(3).collect())))
}

fn forced() -> Upper {
    Upper {
        losses: FORCED,
        ..Upper::default()
    }
}

/// The upper disk needs a table that takes the place of the lower image's first clusters.
fn longer() -> BundleSpec {
    BundleSpec::chain(Style::Ploop, &like(2), 2, |level, image| {
        image.disk_sectors = if level == 0 { 237 } else { 8 * 1100 };
        if level == 1 {
            image.mapped = Mapped::Every { step: 30, phase: 3 };
        }
    })
}

fn three() -> Media {
    load(&chain(Style::Ploop, 2, 3))
}

/// A bundle of Parallels Desktop, which keeps the descriptor before.
fn desktop(depth: usize) -> Media {
    let state = load(&chain(Style::Parallels, 1, depth));
    with_file(&state, "DiskDescriptor.xml.Backup", b"what was before")
}

fn creations() -> Vec<Case> {
    let guids = line(&three());
    let keep = switch(guids[1], 1, Some(name(9)));
    vec![
        case("create", load(&chain(Style::Ploop, 2, 1)), create(1)),
        case("create over three", three(), create(1)),
        case("create with backup", desktop(2), create(1)),
        case("create, split", load(&split(2)), create(1)),
        case("create over plain", load(&over_plain(1)), create(1)),
        case("switch", three(), switch(guids[0], 1, None)),
        case("switch and keep", three(), keep),
    ]
}

fn deletions() -> Vec<Case> {
    let guids = line(&three());
    let forked = after(&three(), &switch(guids[0], 1, Some(name(9))));
    let marked = after(&forked, &delete(guids[0]));
    let left = after(&marked, &delete(name(9)));
    let mut children = described(&left, "").snapshots;
    children.retain(|shot| shot.parent == Some(guids[0]) && shot.guid != Guid::TOP);
    let both = delete_both(children[0].guid, guids[0]);
    let in_parts = load(&split(3));
    let base = line(&in_parts)[0];
    vec![
        case("delete the base", three(), delete(guids[0])),
        case("delete below the top", three(), delete(guids[1])),
        case("delete a leaf", forked.clone(), delete(name(9))),
        case("mark", forked, delete(guids[0])),
        case("collapse", left, both),
        case(
            "delete with backup",
            desktop(3),
            delete(line(&desktop(3))[1]),
        ),
        case("delete, split", in_parts, delete(base)),
        case(
            "delete over an interrupted one",
            after(&three(), &mark(guids[0])),
            delete(guids[1]),
        ),
        case(
            "mark over an interrupted one",
            over_marked(),
            delete(guids[1]),
        ),
    ]
}

/// The base is to go, and what is over it has two children.
fn over_marked() -> Media {
    let old = three();
    let guids = line(&old);
    let forked = after(&old, &switch(guids[1], 1, Some(name(9))));
    after(&forked, &mark(guids[0]))
}

fn merges() -> Vec<Case> {
    let plain = load(&over_plain(3));
    let base = line(&plain)[0];
    let into_new = Upper {
        into_new: Some("merged.hds".to_owned()),
        ..Upper::default()
    };
    let all = Upper {
        all: true,
        ..Upper::default()
    };
    let top = || merge(Upper::default());
    vec![
        case("merge into plain", plain.clone(), delete(base)),
        case("merge all", three(), merge(all.clone())),
        case("merge all into plain", plain, merge(all)),
        case("merge into a new file", three(), merge(into_new.clone())),
        case(
            "merge into new files, split",
            load(&split(3)),
            merge(into_new),
        ),
        case("merge into a smaller one", load(&wide()), top()),
        case("merge into a larger one", before_the_end(), top()),
        case("merge, and lose the end", behind(), merge(forced())),
        case("merge where the table grows", load(&longer()), top()),
    ]
}

fn cases() -> Vec<Case> {
    let all = [creations(), deletions(), merges()];
    all.into_iter().flatten().collect()
}

type Shown = BTreeMap<Guid, Vec<u8>>;

/// A change that nothing disturbs: its end, and every moment of it.
fn undisturbed(case: &Case) -> (Media, Vec<Media>) {
    let host = SimDirectory::on(&case.old);
    carry_out(&host, &*case.step).unwrap_or_else(|e| panic!("{}: {e}", case.what));
    (host.media(), host.world().moments().collect::<Vec<_>>())
}

/// Each snapshot shows one of what it shows before and after.
fn expect_shown(left: &Media, before: &Shown, after: &Shown, what: &str) {
    for (guid, bytes) in shows(left, what) {
        let known = [before, after].into_iter().filter_map(|all| all.get(&guid));
        let matches = known.into_iter().any(|known| {
            // A disk that a merge makes larger shows more, and no other.
            let len = known.len().min(bytes.len());
            known[..len] == bytes[..len] && known.len() == bytes.len()
        });
        assert!(matches, "{what}: {guid} shows something else");
    }
}

/// The tree is the old one, or the old one with marks, or the new one.
fn is_done(left: &Media, good: &Media, what: &str) -> bool {
    let (now, end) = (described(left, what), described(good, what));
    now.snapshots == end.snapshots && now.parts == end.parts
}

fn expect_completed(case: &Case, left: &Media, good: &Media, what: &str) {
    let host = SimDirectory::on(left);
    let settle = |bundle: &mut Bundle<'_>| bundle.settle();
    let again: Step<'_> = if is_done(left, good, what) {
        &settle
    } else {
        &*case.step
    };
    carry_out(&host, again).unwrap_or_else(|e| panic!("{what}: {e}"));
    let now = host.media();
    expect_sound(&now, true, what);
    assert!(
        shows(&now, what) == shows(good, what),
        "{what}: another end"
    );
    assert_eq!(now.names(), good.names(), "{what}: left over");
    let text = |state: &Media| state.bytes(DESCRIPTOR).map(<[u8]>::to_vec);
    assert_eq!(text(&now), text(good), "{what}");
}

/// What holds after a cut at any moment; the number of cuts that were tried.
pub(crate) fn cut_everywhere(attempts: usize, dice: &mut u64) -> usize {
    let mut cuts = 0;
    for case in cases() {
        let (good, moments) = undisturbed(&case);
        let (before, after) = (shows(&case.old, "before"), shows(&good, "after"));
        for (number, moment) in moments.iter().enumerate() {
            for attempt in 0..attempts {
                let left = moment.cut(dice);
                let what = format!("{}, operation {number}, attempt {attempt}", case.what);
                expect_sound(&left, false, &what);
                expect_shown(&left, &before, &after, &what);
                expect_completed(&case, &left, &good, &what);
                cuts += 1;
            }
        }
    }
    cuts
}

#[test]
fn a_change_cut_anywhere_is_there_or_not_and_can_be_repeated() {
    let cuts = cut_everywhere(4, &mut 1);
    assert!(cuts > 1000, "only {cuts} cuts");
    println!("{cuts} cuts");
}

#[test]
fn a_second_cut_changes_nothing() {
    let mut dice = 7;
    for case in cases() {
        let (good, moments) = undisturbed(&case);
        let (before, after) = (shows(&case.old, "before"), shows(&good, "after"));
        for _ in 0..12 {
            let first = &moments[splitmix(&mut dice) as usize % moments.len()];
            let first = first.cut(&mut dice);
            let what = format!("{}, cut twice", case.what);
            if is_done(&first, &good, &what) {
                continue;
            }
            let host = SimDirectory::on(&first);
            carry_out(&host, &*case.step).unwrap_or_else(|e| panic!("{what}: {e}"));
            let moments = host.world().moments().collect::<Vec<_>>();
            let second = &moments[splitmix(&mut dice) as usize % moments.len()];
            let left = second.cut(&mut dice);
            expect_sound(&left, false, &what);
            expect_shown(&left, &before, &after, &what);
            expect_completed(&case, &left, &good, &what);
        }
    }
}

#[test]
fn a_host_that_fails_leaves_a_bundle_and_a_way_on() {
    for case in cases() {
        let (good, moments) = undisturbed(&case);
        let (before, after) = (shows(&case.old, "before"), shows(&good, "after"));
        for number in 0..moments.len() as u64 - 1 {
            let host = SimDirectory::on(&case.old);
            host.world().fail_after(number);
            let what = format!("{}, failure {number}", case.what);
            let done = carry_out(&host, &*case.step);
            let left = host.media();
            // What fails when all is done is told, and left for the next change.
            let is_late = is_done(&left, &good, &what);
            assert!(done.is_err() || is_late, "{what} was lost");
            expect_sound(&left, false, &what);
            expect_shown(&left, &before, &after, &what);
            expect_completed(&case, &left, &good, &what);
        }
    }
}

/// One operation fails, and another process repeats the change: it sees what the host has given up
/// to write, and names that no sync has made to stay.
#[test]
fn a_change_that_is_repeated_after_a_failure_lasts() {
    let repeated = repeat_after_failures(&mut 5);
    assert!(repeated > 200, "only {repeated}");
}

/// The number of changes that were repeated.
pub(crate) fn repeat_after_failures(dice: &mut u64) -> usize {
    let mut repeated = 0;
    for case in cases() {
        let (good, _) = undisturbed(&case);
        let end = shows(&good, "after");
        let host = SimDirectory::on(&case.old);
        carry_out(&host, &*case.step).unwrap_or_else(|e| panic!("{}: {e}", case.what));
        let operations = host.world().total();
        for number in (splitmix(dice) % 3..operations).step_by(3) {
            let nth = Nth {
                nth: number,
                errno: libc::EIO,
                for_ever: false,
                of_all: true,
            };
            let manners = Manners {
                nth: Some(nth),
                ..Manners::default()
            };
            let host = SimDirectory::with(&case.old, manners);
            let _ = carry_out(&host, &*case.step);
            let failed = host.media();
            let what = format!("{}, operation {number} failed", case.what);
            let host = SimDirectory::on(&failed);
            let settle = |bundle: &mut Bundle<'_>| bundle.settle();
            let again: Step<'_> = match is_done(&failed, &good, &what) {
                true => &settle,
                false => &*case.step,
            };
            carry_out(&host, again).unwrap_or_else(|e| panic!("{what}: {e}"));
            for _ in 0..2 {
                let left = host.media().cut(dice);
                // A mark whose removal failed comes back, over an image that is whole.
                expect_sound(&left, false, &what);
                assert!(shows(&left, &what) == end, "{what}: another end");
                assert_eq!(left.names(), good.names(), "{what}: left over");
            }
            repeated += 1;
        }
    }
    repeated
}

/// A merge that goes on in several steps: what is above covers all that changes.
#[test]
fn every_run_of_a_merge_can_be_cut() {
    let mut dice = 11;
    let mut spec = like(2).mapping(Mapped::Percent(70));
    spec.disk_sectors = 237;
    let bundle = BundleSpec::chain(Style::Ploop, &spec, 3, |_, _| {});
    let old = load(&bundle);
    let before = shows(&old, "before");
    let files: Vec<String> = (0..3).map(|n| bundle.file_name("disk.hdd", 0, n)).collect();
    let run = |host: &SimDirectory| -> Result<()> {
        let image = |name: &String| Image::expanding(Path::new(name), host.open(name, true)?);
        let (lower, uppers) = (image(&files[0])?, [image(&files[1])?, image(&files[2])?]);
        let merge = Merge {
            lower: &lower,
            uppers: &uppers,
            cluster: ClusterSize::from_sectors(8).expect("a size"),
            window: 4,
            force_discard: false,
        };
        merge.examine()?;
        merge.carry_out(&Progress::default())
    };
    let host = SimDirectory::on(&old);
    run(&host).expect("it can be merged");
    let base = |state: &Media| state.bytes(&files[0]).map(<[u8]>::to_vec);
    let good = base(&host.media());
    let moments = host.world().moments().collect::<Vec<_>>();
    assert!(moments.len() > 30, "{}", moments.len());
    for (number, moment) in moments.iter().enumerate() {
        for _ in 0..6 {
            let left = moment.cut(&mut dice);
            let what = format!("operation {number}");
            expect_sound(&left, false, &what);
            assert!(
                shows(&left, &what)[&Guid::NONE] == before[&Guid::NONE],
                "{what}"
            );
            let host = SimDirectory::on(&left);
            run(&host).unwrap_or_else(|e| panic!("{what}: {e}"));
            let now = host.media();
            assert!(base(&now).map(|bytes| bytes.len()) == good.as_ref().map(Vec::len));
            expect_sound(&now, true, &what);
            assert!(
                shows(&now, &what)[&Guid::NONE] == before[&Guid::NONE],
                "{what}"
            );
        }
    }
}

/// A merge that is stopped once the lower file has changed so often leaves it closed.
#[test]
fn a_merge_that_is_stopped_leaves_no_mark() {
    let mut spec = like(2).mapping(Mapped::Percent(70));
    spec.disk_sectors = 237;
    let bundle = BundleSpec::chain(Style::Ploop, &spec, 2, |_, _| {});
    let old = load(&bundle);
    let before = shows(&old, "before");
    let run = |host: &SimDirectory, progress: &Progress| -> Result<()> {
        let image = |n| {
            let name = bundle.file_name("disk.hdd", 0, n);
            Image::expanding(Path::new(&name), host.open(&name, true)?)
        };
        let merge = Merge {
            lower: &image(0)?,
            uppers: &[image(1)?],
            cluster: ClusterSize::from_sectors(8).expect("a size"),
            window: 4,
            force_discard: false,
        };
        merge.carry_out(progress)
    };
    let mut some = 0;
    for changes in 0..200 {
        let progress = Arc::new(Progress::default());
        let host = SimDirectory::on(&old);
        host.world().cancel_after(changes, &progress);
        let ended = run(&host, &progress);
        let left = host.media();
        let what = format!("stopped after {changes}");
        expect_sound(&left, true, &what);
        assert!(shows(&left, &what)[&Guid::NONE] == before[&Guid::NONE]);
        match ended {
            Ok(()) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted, "{what}"),
        }
        some += 1;
        let host = SimDirectory::on(&left);
        run(&host, &Progress::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
        expect_sound(&host.media(), true, &what);
    }
    assert!((10..200).contains(&some), "{some}");
}
