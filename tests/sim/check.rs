//! The simulated files and names do what the host's do, and a power cut takes from them what it
//! may.

use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Mapped};
use crate::sim::directory::{Names, SimDirectory};
use crate::sim::media::Media;
use crate::sim::storage::{Event, Manners, World};
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::disk::{self, DiskOptions};
use ploopfs::error::{ErrorKind, Result};
use ploopfs::storage::directory::HostDirectory;
use ploopfs::storage::{Directory, Keep, Storage};
use ploopfs::units::{FileOffset, SectorCount};
use std::path::PathBuf;
use std::sync::Arc;

const OLD: &[u8] = &[1; 700];
const NEW: &[u8] = &[2; 1500];

fn at(position: u64) -> FileOffset {
    FileOffset::new(position)
}

fn content(storage: &dyn Storage) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(storage.len()?.get()).expect("small")];
    storage.read_at(FileOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

/// Everything that the two traits can do, as a story.
fn story(directory: &dyn Directory) -> Vec<String> {
    let mut told = Vec::new();
    let mut tell = |what: &str, result: Result<Vec<u8>>| {
        told.push(match result {
            Ok(bytes) => format!("{what}: {} {:?}", bytes.len(), bytes.iter().max()),
            Err(error) => format!("{what}: {:?}", error.kind()),
        });
    };
    let a = directory.create_new("a").expect("a new file");
    tell("new", content(a.as_ref()));
    let again = directory.create_new("a").map(|_| Vec::new());
    tell("created twice", again);
    tell(
        "write",
        a.write_at(at(100), OLD).and_then(|()| content(a.as_ref())),
    );
    tell(
        "longer",
        a.set_len(at(5000)).and_then(|()| content(a.as_ref())),
    );
    tell(
        "shorter",
        a.set_len(at(750)).and_then(|()| content(a.as_ref())),
    );
    let zeroed = a.zero(at(0)..at(512), Keep::Nothing);
    tell("zero", zeroed.and_then(|()| content(a.as_ref())));
    let past = a.zero(at(600)..at(4096), Keep::Blocks);
    tell("zero past the end", past.and_then(|()| content(a.as_ref())));
    let allocated = a.allocate(at(0)..at(8192));
    tell("allocate", allocated.and_then(|()| content(a.as_ref())));
    tell(
        "read past the end",
        a.read_at(at(8000), &mut [0; 512]).map(|()| Vec::new()),
    );
    tell("sync", a.sync_data().map(|()| Vec::new()));
    tell(
        "rename nothing",
        directory.rename("x", "y").map(|()| Vec::new()),
    );
    tell("remove nothing", directory.remove("x").map(|()| Vec::new()));
    tell(
        "open nothing",
        directory.open("x", false).map(|_| Vec::new()),
    );
    let b = directory.create_new("b").expect("a new file");
    b.write_at(at(0), NEW).expect("it is written");
    tell("rename", directory.rename("b", "a").map(|()| Vec::new()));
    let opened = directory.open("a", false).expect("it is there");
    tell("renamed over", content(opened.as_ref()));
    tell("still open", content(a.as_ref()));
    tell(
        "names",
        directory
            .entries()
            .map(|names| names.join(" ").into_bytes()),
    );
    tell("remove", directory.remove("a").map(|()| Vec::new()));
    tell("sync names", directory.sync().map(|()| Vec::new()));
    tell(
        "names",
        directory
            .entries()
            .map(|names| names.join(" ").into_bytes()),
    );
    told
}

#[test]
fn simulated_files_behave_like_real_ones() {
    let dir = tempfile::tempdir().expect("a directory");
    let real = HostDirectory::open(dir.path()).expect("it opens");
    let world = World::new(Vec::new(), Manners::default(), true);
    let told = story(&SimDirectory::new(&world));
    assert!(told.len() > 18);
    assert_eq!(told, story(&real));
}

/// How a file is replaced, and what is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forgotten {
    Nothing,
    SyncOfTheFile,
    SyncOfTheNames,
}

fn replace(directory: &dyn Directory, forgotten: Forgotten) {
    let fresh = directory.create_new("new").expect("a new file");
    fresh
        .write_at(FileOffset::ZERO, NEW)
        .expect("it is written");
    if forgotten != Forgotten::SyncOfTheFile {
        fresh.sync_data().expect("it is synced");
    }
    directory.rename("new", "name").expect("it is renamed");
    if forgotten != Forgotten::SyncOfTheNames {
        directory.sync().expect("the names are synced");
    }
}

/// What is wrong after power cuts while a file is replaced, and after it.
fn complaints(forgotten: Forgotten) -> Vec<String> {
    let world = World::new(vec![OLD.to_vec()], Manners::default(), true);
    let names = Names::from([("name".to_owned(), 0)]);
    world.set_names(names.clone());
    replace(&SimDirectory::new(&world), forgotten);
    let log = world.log();
    let mut media = Media::new(&[OLD.to_vec()], names);
    let mut dice = 1;
    let mut complaints = Vec::new();
    for (moment, event) in log.iter().enumerate() {
        media.take(event);
        for _ in 0..40 {
            let (files, names) = media.after_cut(&mut dice);
            let is_over = moment + 1 == log.len();
            match names.get("name").map(|file| &files[*file][..]) {
                Some(bytes) if bytes == NEW || bytes == OLD && !is_over => {}
                other => complaints.push(format!("{moment}: {:?}", other.map(<[u8]>::len))),
            }
        }
    }
    complaints
}

#[test]
fn a_replaced_file_is_the_old_or_the_new_one() {
    assert_eq!(complaints(Forgotten::Nothing), Vec::<String>::new());
    for forgotten in [Forgotten::SyncOfTheFile, Forgotten::SyncOfTheNames] {
        assert!(
            !complaints(forgotten).is_empty(),
            "{forgotten:?} went unnoticed"
        );
    }
}

#[test]
fn a_lower_file_cannot_be_written() {
    let world = World::new(vec![OLD.to_vec()], Manners::default(), true);
    let lower = world.open(0, false);
    let write = || lower.write_at(FileOffset::ZERO, NEW);
    let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(write));
    assert!(written.is_err());
}

#[test]
fn a_dead_process_changes_nothing() {
    let world = World::new(vec![OLD.to_vec()], Manners::default(), true);
    let file = world.open(0, true);
    world.kill_after(1);
    file.write_at(FileOffset::ZERO, &[3; 512])
        .expect("the first");
    let error = file
        .write_at(FileOffset::ZERO, NEW)
        .expect_err("the second");
    assert_eq!(error.kind(), ErrorKind::Io(libc::EIO));
    assert_eq!(world.files()[0][..512], [3; 512]);
    let next = world.open(0, true);
    next.write_at(FileOffset::ZERO, OLD)
        .expect("a new process writes");
}

/// An image of ten clusters, broken in these ways.
fn broken(names: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    let spec = ImageSpec::new(2, 8, 80).mapping(Mapped::Percent(80));
    spec.write(&path).expect("an image");
    for name in names {
        corrupt::apply(name, &path).expect("it can be broken");
    }
    std::fs::read(path).expect("its bytes")
}

/// The table of the second part is right in the host's cache only: a sync has failed. No part may
/// be mended before that has come out.
#[test]
fn no_part_is_changed_for_what_another_has_in_the_cache_only() {
    let (first, second) = (
        broken(&["t-straddle", "h-in-use"]),
        broken(&["t-duplicate", "h-in-use"]),
    );
    let world = World::new(vec![first.clone(), second], Manners::default(), true);
    let table = &broken(&[])[64..64 + 4 * 10];
    let written = world.open(1, true).write_at(at(64), table);
    written.expect("memory");
    world.note(Event::SyncFailed { file: 1 });
    let part = |number: u64| OpenedPart {
        start: SectorCount::new(80 * number),
        end: Some(SectorCount::new(80 * (number + 1))),
        blocksize: None,
        files: vec![OpenedFile {
            path: PathBuf::from("simulated"),
            storage: world.open(usize::try_from(number).expect("small"), true),
            plain: Plain::No,
            guid: None,
        }],
    };
    let images = OpenedImages::from_parts(PathBuf::from("simulated"), vec![part(0), part(1)]);
    let opened = disk::open(Arc::new(images), &DiskOptions::default());
    let refused = opened.expect_err("two entries share a cluster");
    assert_eq!(refused.kind(), ErrorKind::InUse, "{refused}");
    assert!(world.files()[0] == first, "the first part was mended");
}
