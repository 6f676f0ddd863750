//! What lies beside the images of a disk, and what commands leave beside them.

use crate::bundles::{bundle, contents, expect_refused, images};
use crate::corrupt;
use crate::interop::{ploopfs, status, story, text};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const DESCRIPTOR: &str = "DiskDescriptor.xml";
const OLD: &str = "DiskDescriptor.old.xml";
const LOCK: &str = "DiskDescriptor.xml.lck";

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// The GUIDs of a disk's images in the order of its chain, base first.
fn guids(bundle: &Path) -> Vec<String> {
    let output = ploopfs(&["check", "--json", text(bundle)]);
    let found: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON document");
    let files = found["files"].as_array().expect("a list of files");
    let guid = |file: &serde_json::Value| file["guid"].as_str().map(str::to_owned);
    files.iter().filter_map(guid).collect()
}

/// Ends with this status, and says all of this and none of that.
fn expect(arguments: &[&str], code: i32, words: &[&str], others: &[&str]) {
    let output = ploopfs(arguments);
    let story = story(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {story}");
    for word in words {
        assert!(story.contains(word), "{arguments:?}: no {word}: {story}");
    }
    for word in others {
        assert!(!story.contains(word), "{arguments:?}: {word}: {story}");
    }
}

/// A bundle of three levels, and an image that only a second descriptor names.
fn with_other(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let path = bundle(dir, name, 3);
    let other = path.join("other.hds");
    let base = images(&path).remove(0);
    fs::copy(&base, &other).expect("there is room");
    let file = base.file_name().and_then(|name| name.to_str());
    let file = file.expect("a name in UTF-8");
    let descriptor = fs::read_to_string(path.join(DESCRIPTOR)).expect("it is there");
    let descriptor = descriptor.replace(&format!(">{file}<"), ">other.hds<");
    assert!(descriptor.contains("other.hds"), "{descriptor}");
    fs::write(path.join(OLD), descriptor).expect("there is room");
    (path, other)
}

/// The list of files that come and go, as an interrupted change leaves it.
fn pend(bundle: &Path, names: &str) {
    let sum = crc32c::crc32c(names.as_bytes());
    let list = format!("ploopfs-pending {sum:08x}\n{names}\n");
    fs::write(bundle.join("DiskDescriptor.xml.pending"), list).expect("there is room");
}

#[test]
fn what_another_descriptor_names_is_no_orphan_and_is_never_removed() {
    let dir = directory();
    let (path, other) = with_other(dir.path(), "a.hdd");
    let check = ["check", text(&path)];
    let note = "DiskDescriptor.old.xml is a descriptor too";
    expect(&check, 0, &[note], &["no snapshot names"]);
    // Also where it cannot be read to its end, and where an interrupted change wanted it gone.
    let whole = fs::read(path.join(OLD)).expect("it is there");
    for old in [&whole[..], &whole[..whole.len() - 20]] {
        fs::write(path.join(OLD), old).expect("there is room");
        expect(&check, 0, &[note], &["no snapshot names"]);
        pend(&path, "[\"other.hds\",\"waste.hds\"]");
        fs::write(path.join("waste.hds"), "x").expect("there is room");
        expect(&["snapshot", "create", "-q", text(&path)], 0, &[], &[]);
        assert!(other.exists(), "another disk's file is gone");
        assert!(!path.join("waste.hds").exists(), "what is waste goes");
    }
    for verb in [&["resize", "-q"][..], &["compact", "-qy"]] {
        let size = if verb[0] == "resize" {
            &["4M"][..]
        } else {
            &[]
        };
        expect(&[verb, &[text(&path)], size].concat(), 0, &[], &[]);
    }
    fs::remove_file(path.join(OLD)).expect("it is there");
    let orphan = "other.hds is an image that no snapshot names";
    expect(&check, 3, &[orphan], &["a descriptor too"]);
}

#[test]
fn what_another_descriptor_needs_is_not_merged_nor_dropped() {
    let dir = directory();
    let path = bundle(dir.path(), "a.hdd", 3);
    let shots = guids(&path);
    // A copy that somebody has kept, and those that programs make.
    let descriptor = path.join(DESCRIPTOR);
    fs::copy(&descriptor, path.join(OLD)).expect("there is room");
    let bundle = text(&path);
    for arguments in [
        &["snapshot", "delete", "-y", bundle, &shots[0]][..],
        &["snapshot", "delete", "-y", bundle, &shots[1]],
        &["snapshot", "switch", "-y", bundle, &shots[0]],
        &["merge", "-y", bundle],
        &["merge", "-y", "--all", bundle],
        &["merge", "-y", "--into-new", "new.hds", bundle],
    ] {
        let words = [
            "would be lost",
            "DiskDescriptor.old.xml",
            "nothing was changed",
        ];
        expect_refused(arguments, 1, &words, &path);
    }
    for end in [".Backup", ".tmp"] {
        let known = path.join(format!("{DESCRIPTOR}{end}"));
        fs::rename(path.join(OLD), &known).expect("it is there");
        expect(
            &["check", bundle],
            if end == ".tmp" { 3 } else { 0 },
            &[],
            &["descriptor too"],
        );
        fs::rename(&known, path.join(OLD)).expect("it is there");
    }
    // What takes nothing away goes on; the old descriptor then describes an older disk.
    expect(&["snapshot", "create", "-q", bundle], 0, &[], &[]);
    // Only the base is in the other one's chain: what is above it can go.
    let text_of = fs::read_to_string(path.join(OLD)).expect("it is there");
    let names: Vec<PathBuf> = images(&path);
    let last = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let mut changed = text_of;
    for (number, name) in names.iter().enumerate().skip(1) {
        let name = last(name).expect("a name");
        changed = changed.replace(&format!(">{name}<"), &format!(">none{number}<"));
    }
    fs::write(path.join(OLD), changed).expect("there is room");
    expect(&["merge", "-qy", bundle], 0, &[], &[]);
    let base = ["snapshot", "delete", "-y", bundle, &shots[0]];
    expect_refused(&base, 1, &["would be lost"], &path);
    fs::remove_file(path.join(OLD)).expect("it is there");
    expect(&base, 0, &[], &[]);
    expect(&["check", "-q", bundle], 0, &[], &[]);
}

#[test]
fn what_is_left_of_the_making_of_disks_is_told_and_cleared_away() {
    let dir = directory();
    let at = |name: &str| dir.path().join(name);
    let path = bundle(dir.path(), "a.hdd", 1);
    let left = at("a.hdd.creating.0123abcd");
    fs::create_dir(&left).expect("there is room");
    fs::write(left.join("root.hds"), "x").expect("there is room");
    let check = ["check", text(&path)];
    let told = "a.hdd.creating.0123abcd: the making of a disk was interrupted";
    expect(&check, 3, &["leak", told], &[]);
    fs::rename(&left, at("b.hdd.creating.0123abcd")).expect("it is there");
    expect(&check, 0, &["note", "b.hdd.creating.0123abcd"], &["leak"]);
    let missing = at("b.hdd");
    let missing = ["check", text(&missing)];
    let words = [
        "not found",
        "nothing has this name",
        "b.hdd.creating.0123abcd",
    ];
    expect(&missing, 1, &words, &["a file of the disk"]);
    let around = text(dir.path());
    expect(&["check", around], 1, &["a.hdd"], &[]);
    // In the bundle itself.
    let inside = path.join("c.hds.creating.01234567");
    fs::write(&inside, "x").expect("there is room");
    expect(&check, 3, &["c.hds.creating.01234567"], &[]);
    fs::remove_file(&inside).expect("it is there");

    // Somebody else makes it just now: nobody clears it away, and nobody calls it left.
    let image = at("d.hds.creating.0123ABCD");
    fs::write(&image, "x").expect("there is room");
    for busy in [image, at("b.hdd.creating.0123abcd")] {
        let name = busy.file_name().and_then(|name| name.to_str());
        let (name, _) = name
            .and_then(|name| name.split_once(".creating."))
            .expect("a name");
        let (disk, open) = (at(name), File::open(&busy).expect("it is there"));
        let held = Flock::lock(open, FlockArg::LockExclusiveNonblock).expect("nobody has it");
        expect(&["create", "-q", "-s", "10M", text(&disk)], 0, &[], &[]);
        assert!(busy.exists(), "{} was in use", busy.display());
        expect(&["check", text(&disk)], 0, &[], &[name_of(&busy)]);
        drop(held);
        expect(&["check", text(&disk)], 3, &[name_of(&busy)], &[]);
        // A name that is taken is refused before anything is cleared away.
        expect(&["create", "-q", "-s", "10M", text(&disk)], 1, &[], &[]);
        assert!(busy.exists());
        let copy = at("copy.hds");
        if disk.is_file() {
            fs::rename(&disk, &copy).expect("it is there");
            expect(&["copy", "-q", text(&copy), text(&disk)], 0, &[], &[]);
            fs::remove_file(&copy).expect("it is there");
        } else {
            fs::remove_dir_all(&disk).expect("it is there");
            let source = at("d.hds");
            expect(&["convert", "-q", text(&source), text(&disk)], 0, &[], &[]);
        }
        assert!(!busy.exists(), "{} is still there", busy.display());
    }
}

fn name_of(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str());
    name.expect("a name in UTF-8")
}

#[test]
fn undo_files_of_what_is_gone_are_told() {
    use ploopfs::journal::Journal;
    use ploopfs::storage::directory::HostDirectory;
    let dir = directory();
    let path = bundle(dir.path(), "a.hdd", 2);
    let directory = HostDirectory::open(&path).expect("it is there");
    for name in ["gone.hds.undo", "gone.hds.undo.2"] {
        let mut journal = Journal::create(&directory, name).expect("there is room");
        journal.seal(&directory).expect("there is room");
    }
    fs::write(path.join("notes.undo"), "somebody's").expect("there is room");
    let words = [
        "gone.hds.undo: the undo file of a repair of gone.hds, which is no image",
        "gone.hds.undo.2: the undo file",
    ];
    expect(&["check", text(&path)], 0, &words, &["notes.undo"]);
}

#[test]
fn what_changes_nothing_leaves_nothing() {
    let dir = directory();
    let path = bundle(dir.path(), "a.hdd", 3);
    let shots = guids(&path);
    let bundle = text(&path);
    let size = format!("{}", 6400 * 512);
    expect(&["compact", "-qy", "--zeroes", bundle], 0, &[], &[]);
    expect(
        &["snapshot", "switch", "-qy", "--keep", bundle, &shots[0]],
        0,
        &[],
        &[],
    );
    expect(
        &["snapshot", "delete", "-qy", bundle, &shots[0]],
        0,
        &[],
        &[],
    );
    fs::remove_file(path.join(LOCK)).expect("the changes have made it");
    let time = |path: &Path| path.metadata().and_then(|meta| meta.modified()).ok();
    let before = (contents(&path), time(&path));
    for arguments in [
        &["compact", "-y", bundle][..],
        &["compact", "-y", "--zeroes", bundle],
        &["repair", "-y", bundle],
        &["repair", "-y", "--leaks-only", bundle],
        &["resize", "-y", bundle, &size],
        &["resize", "-y", "--shrink", bundle, &size],
        &["snapshot", "delete", "-n", bundle, &shots[0]],
        &["snapshot", "delete", "-y", bundle, &shots[0]],
        &["snapshot", "switch", "-n", bundle, &shots[0]],
    ] {
        let output = ploopfs(arguments);
        assert!(output.status.code().is_some(), "{arguments:?}");
        let now = (contents(&path), time(&path));
        assert!(now == before, "{arguments:?}: {}", story(&output));
    }
    // The mark is our own, and nobody else's.
    for verb in ["check", "info"] {
        expect(&[verb, bundle], 0, &[], &["another program"]);
    }
    assert_eq!(status(&["snapshot", "list", bundle]), 0);
}

#[test]
fn what_cannot_begin_says_that_nothing_was_changed() {
    let dir = directory();
    let path = bundle(dir.path(), "a.hdd", 2);
    let top = images(&path).pop().expect("it has images");
    corrupt::apply("t-leak-tail", &top).expect("it can be broken");
    // Nobody can make the lock file that keeps ploop out.
    fs::create_dir(path.join(format!("{LOCK}.new"))).expect("there is room");
    for verb in [
        &["resize", "-y", text(&path), "1G"][..],
        &["compact", "-y", text(&path)],
    ] {
        let words = ["lock file", "nothing was changed"];
        expect(verb, 1, &words, &["repeat the command", "-r"]);
    }
}

#[test]
fn what_is_not_there_is_called_so() {
    let dir = directory();
    let path = bundle(dir.path(), "a.hdd", 2);
    let image = images(&path).remove(0);
    for disk in [&path, &image] {
        let arguments = ["info", "--snapshot", "none", text(disk)];
        expect(&arguments, 1, &["no such snapshot", "none"], &[]);
    }
    expect(&["info", "--snapshot", "latest", text(&path)], 0, &[], &[]);
    let none = dir.path().join("none.hdd");
    for verb in [&["resize", "-y"][..], &["compact", "-y"], &["check"]] {
        let size = if verb[0] == "resize" {
            &["1G"][..]
        } else {
            &[]
        };
        let arguments = [verb, &[text(&none)], size].concat();
        expect(
            &arguments,
            1,
            &["not found", "nothing has this name"],
            &["of the disk"],
        );
    }
    // There is nothing to look at in an undo but the undo.
    let undo = path.join("x.undo");
    let arguments = ["repair", "--undo", text(&undo), text(&path)];
    expect(&arguments, 1, &["--yes"], &["--dry-run"]);
}
