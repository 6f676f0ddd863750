//! Any bundle: opened, read at its top and at its snapshots, described, checked, written to, opened
//! again; or repaired, and the repair undone.
//!
//! A bundle that is in order is spoilt as the input says: headers and tables, what the names lead
//! to, the text of the descriptor. Nothing outside of it may be opened or changed, reading changes
//! nothing at all, and writing only the tops. README.md says how to run it.
#![no_main]

#[path = "bundle/directory.rs"]
mod directory;
#[path = "../../tools/forge/mod.rs"]
mod forge;
#[path = "bundle/recipe.rs"]
mod recipe;
mod support;

use directory::{Place, Tree};
use forge::reader::Flat;
use libfuzzer_sys::fuzz_target;
use ploopfs::admin::{check, info, repair};
use ploopfs::chain::bundle::{self, OpenedImages, Selection};
use ploopfs::disk::{self, Disk};
use ploopfs::plan::repair::Policy;
use ploopfs::units::DiskOffset;
use recipe::Recipe;
use std::path::PathBuf;
use std::sync::Arc;
use support::dice::Dice;
use support::window::Windows;

fn open(place: &Place, selection: &Selection) -> Option<(Arc<OpenedImages>, Arc<Disk>)> {
    let images = Arc::new(bundle::open(&place.bundle, selection).ok()?);
    let inside = place.files(!selection.allow_outside.is_empty());
    for file in images.parts.iter().flat_map(|part| &part.files) {
        let id = file.storage.file_id().expect("a file of the host");
        assert!(
            inside.contains(&(id.device, id.inode)),
            "{} is open and lies outside",
            file.path.display()
        );
    }
    let options = support::options(!selection.write);
    let (disk, _) = disk::open_with(Arc::clone(&images), &options, support::resources()).ok()?;
    Some((images, disk))
}

/// Holds what is shown against a reader that shares nothing with the program.
fn compare(place: &Place, disk: &Disk, shown: &Windows) {
    let Ok(flat) = Flat::open(&place.bundle) else {
        return;
    };
    if flat.bytes() != disk.size_bytes() {
        return;
    }
    for ((at, len), shown) in shown.iter() {
        if let (Some(shown), Ok(expected)) = (shown, flat.read(at, len as usize)) {
            assert!(*shown == expected, "{len} bytes at {at} are others");
        }
    }
}

fn describe(place: &Place, selection: &Selection) {
    let looking = Selection {
        no_lock: true,
        ..selection.clone()
    };
    if let Ok(told) = info::info(&place.bundle, &looking, info::Tables::Count) {
        assert!(!info::render(&told).is_empty());
    }
    let options = check::disk::Options {
        allow_outside: selection.allow_outside.clone(),
        no_lock: false,
    };
    // It fails where it must; what it finds is for `image` to judge.
    let _ = check::disk::check(&place.bundle, &options);
}

/// Repairs the disk, and undoes that: every file that was there is as it was.
fn mend(place: &Place, before: &Tree, selection: &Selection) {
    let opened = repair::disk::open(&place.bundle, &selection.allow_outside, true);
    let Ok(session) = opened else {
        return;
    };
    // Of a split disk the first part may be repaired, and the second refused.
    let Ok(done) = session.repair(&Policy::default()) else {
        return;
    };
    for file in done.files {
        if let Some(undo) = file.undo {
            assert_eq!(
                file.state,
                "clean",
                "{file_findings:?}",
                file_findings = file.findings
            );
            let undo = place.bundle.join(undo);
            session.undo(&undo).expect("a repair is undone");
        }
    }
    let changed = Tree::of(place).differences(before);
    let old = changed.iter().find(|path| before.has(path));
    assert_eq!(old, None, "repaired, undone, and still changed");
}

fn read(place: &Place, recipe: &Recipe, selection: &Selection) -> Option<Windows> {
    let (images, disk) = open(place, selection)?;
    let windows = Windows::of(&disk);
    for snapshot in images.snapshots.iter().take(4) {
        let view = images.open_snapshot(&snapshot.guid);
        if let Ok(view) = view.and_then(|view| disk::open_view(&disk, view)) {
            Windows::of(&view);
        }
    }
    if recipe.is_comparable && selection.snapshot.is_none() {
        compare(place, &disk, &windows);
    }
    disk.close().expect("nothing to do");
    Some(windows)
}

fn write(
    place: &Place,
    recipe: &Recipe,
    before: &Tree,
    selection: &Selection,
    seen: Option<&Windows>,
) {
    let writing = Selection {
        write: true,
        ..selection.clone()
    };
    let Some((images, disk)) = open(place, &writing) else {
        let changed = Tree::of(place).differences(before);
        let only_lock = |path: &PathBuf| path.extension().is_some_and(|end| end == "lck");
        assert!(
            changed.iter().all(only_lock),
            "refused and changed: {changed:?}"
        );
        return;
    };
    let tops = images.parts.iter().filter_map(|part| part.files.last());
    let mut changeable: Vec<PathBuf> = tops.map(|top| top.path.clone()).collect();
    changeable.push(place.bundle.join("DiskDescriptor.xml.lck"));
    drop(images);
    let mut windows = Windows::of(&disk);
    if let Some(seen) = seen {
        seen.assert_kept_by(&windows, "opened for writing");
    }
    // A bad entry in a lower delta makes its clusters, and no others, unreadable.
    if windows.is_whole() {
        let mut dice = Dice(recipe.seed);
        let count = 1 + dice.below(10);
        windows.change(&disk, &mut dice, count);
    } else {
        let _ = disk.write_at(DiskOffset::ZERO, b"a write that may fail");
        windows.forget_step(0);
    }
    disk.close().expect("it closes");
    for path in &Tree::of(place).differences(before) {
        assert!(
            place.is_one_of(path, &changeable),
            "{} has changed; the tops are {changeable:?}",
            path.display()
        );
    }
    let (_, disk) = open(place, selection).expect("it opens again");
    windows.assert_kept_by(&Windows::of(&disk), "closed and opened");
    disk.close().expect("nothing to do");
}

fn run(recipe: &Recipe) {
    let place = Place::new();
    recipe.write(&place);
    let outside = recipe.allows_outside.then(|| place.outside.clone());
    let selection = Selection {
        allow_outside: outside.into_iter().collect(),
        snapshot: recipe.snapshot.clone(),
        ..Selection::default()
    };
    let before = Tree::of(&place);
    let seen = read(&place, recipe, &selection);
    if recipe.seed % 8 == 0 || seen.is_none() {
        describe(&place, &selection);
    }
    let changed = Tree::of(&place).differences(&before);
    assert!(changed.is_empty(), "reading has changed {changed:?}");
    if recipe.repairs {
        mend(&place, &before, &selection);
    } else if recipe.writes {
        write(&place, recipe, &before, &selection, seen.as_ref());
    }
}

fuzz_target!(|data: &[u8]| {
    if let Some(recipe) = Recipe::read(data) {
        support::alone::run(|| run(&recipe));
    }
});
