//! What a repair of a bundle refuses, and images that have several names.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::image::{ImageSpec, Mapped};
use crate::interop::{ploopfs, status, story, text};
use crate::{broken, corrupt, spec};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A bundle of this many levels.
pub(crate) fn bundle(dir: &Path, name: &str, levels: usize) -> PathBuf {
    let path = dir.join(name);
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(40));
    let bundle = BundleSpec::chain(Style::Ploop, &like, levels, |_, _| {});
    bundle.write(&path).expect("the bundle is made");
    path
}

/// Every file of a directory with its bytes and its time.
pub(crate) fn contents(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, std::time::SystemTime)> {
    let entries = std::fs::read_dir(dir).expect("it is there").flatten();
    let of = |path: PathBuf| {
        let time = path.metadata().and_then(|meta| meta.modified());
        let bytes = std::fs::read(&path).expect("it is a file");
        (path, (bytes, time.expect("it has a time")))
    };
    let files = entries.map(|entry| entry.path());
    files.map(of).collect()
}

/// The images of a bundle in the order of its chain, base first.
pub(crate) fn images(bundle: &Path) -> Vec<PathBuf> {
    let output = ploopfs(&["check", "--json", text(bundle)]);
    let found: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON document");
    let files = found["files"].as_array().expect("a list of files");
    let path = |file: &serde_json::Value| file["path"].as_str().map(PathBuf::from);
    files.iter().filter_map(path).collect()
}

/// Refused with this status and these words, and nothing has changed.
pub(crate) fn expect_refused(arguments: &[&str], code: i32, words: &[&str], dir: &Path) {
    let before = contents(dir);
    let output = ploopfs(arguments);
    let story = story(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {story}");
    for word in words {
        assert!(story.contains(word), "{arguments:?}: {word}: {story}");
    }
    assert!(contents(dir) == before, "{arguments:?}: something changed");
}

#[test]
fn a_file_with_two_names_is_not_repaired() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec(2), &["t-duplicate"]).expect("the image is made");
    let other = dir.path().join("other.hds");
    std::fs::hard_link(&path, &other).expect("the host has hard links");
    for way in [&path, &other] {
        for arguments in [&["repair", "-y"][..], &["repair", "-n"]] {
            let arguments = [arguments, &[text(way)]].concat();
            expect_refused(&arguments, 1, &["2 names", "copy"], dir.path());
        }
    }
    std::fs::remove_file(&other).expect("it is there");
    assert_eq!(status(&["repair", "-qy", text(&path)]), 0);
}

#[test]
fn a_frozen_image_is_known_by_any_of_its_names() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bundle = bundle(dir.path(), "b.hdd", 3);
    let images = images(&bundle);
    corrupt::apply("t-past-eof", &images[0]).expect("it can be broken");
    let linked = bundle.join("another-name.hds");
    std::fs::hard_link(&images[0], &linked).expect("the host has hard links");
    for way in [&images[0], &linked] {
        let arguments = ["repair", "-qy", text(way)];
        expect_refused(&arguments, 1, &["frozen", "copy it out"], &bundle);
    }
    // Elsewhere nobody sees the bundle, but the file has two names.
    let far = dir.path().join("far.hds");
    std::fs::hard_link(&images[0], &far).expect("the host has hard links");
    expect_refused(&["repair", "-qy", text(&far)], 1, &["3 names"], &bundle);
}

#[test]
fn a_top_that_is_another_snapshots_file_is_not_written_to() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bundle = bundle(dir.path(), "b.hdd", 2);
    let top = images(&bundle).pop().expect("it has images");
    // A snapshot beside the chain, in the top's file by another name.
    std::fs::hard_link(&top, bundle.join("side.hds")).expect("the host has hard links");
    let path = bundle.join("DiskDescriptor.xml");
    let descriptor = std::fs::read_to_string(&path).expect("it is there");
    let guid = "{12345678-0000-4000-8000-000000000000}";
    let none = "{00000000-0000-0000-0000-000000000000}";
    let image = format!(
        "<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>side.hds</File></Image></Storage>"
    );
    let shot =
        format!("<Shot><GUID>{guid}</GUID><ParentGUID>{none}</ParentGUID></Shot></Snapshots>");
    let descriptor =
        descriptor
            .replacen("</Storage>", &image, 1)
            .replacen("</Snapshots>", &shot, 1);
    std::fs::write(&path, descriptor).expect("there is room");
    corrupt::apply("t-past-eof", &top).expect("it can be broken");
    let words = ["has the same file"];
    expect_refused(&["repair", "-qy", text(&bundle)], 2, &words, &bundle);
}

#[test]
fn an_undo_file_must_lie_beside_its_image() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec(2), &["t-duplicate"]).expect("the image is made");
    let old = std::fs::read(&path).expect("it is there");
    // Named by a link, it is kept beside the image all the same.
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).expect("it is made");
    let link = elsewhere.join("link.hds");
    std::os::unix::fs::symlink(&path, &link).expect("it is made");
    assert_eq!(status(&["repair", "-qy", text(&link)]), 0);
    let undo = dir.path().join("x.hds.undo");
    let moved = elsewhere.join("x.hds.undo");
    std::fs::rename(&undo, &moved).expect("it was written");
    let arguments = ["repair", "-qy", "--undo", text(&moved), text(&link)];
    expect_refused(&arguments, 1, &["beside"], &elsewhere);
    std::fs::rename(&moved, &undo).expect("it is there");
    let arguments = ["repair", "-qy", "--undo", text(&undo), text(&link)];
    assert_eq!(status(&arguments), 0);
    assert!(std::fs::read(&path).expect("it is there") == old);
}

#[test]
fn what_contradicts_itself_is_not_repaired() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let word = |path: &Path, at: usize, value: u32| {
        let mut bytes = std::fs::read(path).expect("it is there");
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(path, bytes).expect("there is room");
    };
    let descriptor = |bundle: &Path, from: &str, to: &str| {
        let path = bundle.join("DiskDescriptor.xml");
        let text = std::fs::read_to_string(&path).expect("it is there");
        assert!(text.contains(from), "{from}: {text}");
        std::fs::write(&path, text.replacen(from, to, 1)).expect("there is room");
    };
    type Spoil<'a> = &'a dyn Fn(&Path, &[PathBuf]);
    let no_blocksize = |bundle: &Path| descriptor(bundle, "<Blocksize>64</Blocksize>", "");
    let cases: [(&str, Spoil<'_>, &[&str]); 7] = [
        (
            "clusters",
            &|_, images| word(&images[0], 28, 128),
            &["clusters of 128 sectors", "of 64 in the descriptor"],
        ),
        (
            "levels",
            &|bundle, images| {
                no_blocksize(bundle);
                word(&images[1], 28, 128);
            },
            &["clusters of 128 sectors", "of 64 in another image"],
        ),
        (
            "size",
            &|_, images| word(&images[1], 36, 6336),
            &["6336 sectors", "6400"],
        ),
        (
            "disk-size",
            &|bundle, _| descriptor(bundle, "<Disk_size>6400<", "<Disk_size>6464<"),
            &["6400 of 6464"],
        ),
        (
            "blocksize",
            &|bundle, _| descriptor(bundle, "<Blocksize>64<", "<Blocksize>128<"),
            &["clusters of 64 sectors", "of 128 in the descriptor"],
        ),
        (
            "no-end",
            &|bundle, _| descriptor(bundle, "</Virtuozzo_disk_image>", ""),
            &["descriptor"],
        ),
        (
            "no-top",
            &|bundle, _| descriptor(bundle, "</TopGUID>", "0</TopGUID>"),
            &["descriptor"],
        ),
    ];
    for (name, spoil, words) in cases {
        let bundle = bundle(dir.path(), &format!("{name}.hdd"), 2);
        let images = images(&bundle);
        corrupt::apply("t-past-eof", &images[1]).expect("it can be broken");
        spoil(&bundle, &images);
        for arguments in [&["repair", "-y"][..], &["repair", "-n"]] {
            let arguments = [arguments, &[text(&bundle)]].concat();
            expect_refused(&arguments, 2, words, &bundle);
        }
    }
}

#[test]
fn kinds_that_are_only_read_are_not_repaired() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let odd = ImageSpec::new(2, 4, 240).mapping(Mapped::Percent(50));
    let path = broken(dir.path(), &odd, &[]).expect("the image is made");
    for arguments in [["check", text(&path)], ["repair", text(&path)]] {
        assert_eq!(status(&arguments), 0, "{arguments:?}: nothing is wrong");
    }
    let path = broken(dir.path(), &odd, &["h-in-use"]).expect("the image is made");
    for arguments in [&["repair", "-y"][..], &["repair", "-n"]] {
        let arguments = [arguments, &[text(&path)]].concat();
        expect_refused(&arguments, 2, &["only read", "new image"], dir.path());
    }
}

#[test]
fn a_check_tells_how_an_interrupted_repair_is_ended() {
    use ploopfs::journal::{Journal, begin_undo};
    use ploopfs::storage::directory::HostDirectory;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec(2), &[]).expect("the image is made");
    let link = dir.path().join("link.hds");
    std::os::unix::fs::symlink(&path, &link).expect("it is made");
    let directory = HostDirectory::open(dir.path()).expect("it is there");
    let mut journal = Journal::create(&directory, "x.hds.repair").expect("there is room");
    let expect = |words: &[&str]| {
        for way in [&path, &link] {
            expect_refused(&["check", text(way)], 2, words, dir.path());
        }
        let plan = ["repair", "-n", text(&link)];
        expect_refused(&plan, 2, &["x.hds.repair"], dir.path());
    };
    expect(&["before it changed anything", "ploopfs repair "]);
    journal.seal(&directory).expect("there is room");
    expect(&["a repair was interrupted", "goes on", "--undo"]);
    let saved = ploopfs::storage::Directory::open(&directory, "x.hds.repair", true);
    begin_undo(&*saved.expect("it is there")).expect("there is room");
    expect(&["the undo of a repair was interrupted", "--undo"]);
    assert_eq!(status(&["repair", "-qy", text(&link)]), 0);
    assert_eq!(status(&["check", text(&path)]), 0);
}

#[test]
fn a_dry_run_tells_what_a_check_would() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (names, code, words) in [
        (&[][..], 0, &["clean"][..]),
        (&["t-leak-tail"], 3, &["step: cut off"]),
        (
            &["t-duplicate"],
            2,
            &["step: copy", "up to 4096 bytes are copied"],
        ),
        (&["h-size-absurd"], 2, &["nothing is guessed"]),
    ] {
        let path = broken(dir.path(), &spec(2), names).expect("the image is made");
        expect_refused(&["repair", "-n", text(&path)], code, words, dir.path());
    }
}
