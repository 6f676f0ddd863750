//! The command: its exit status and its words, undo files, bundles.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::image::{ImageSpec, Mapped};
use crate::{broken, corrupt, spec};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn run(program: &str, args: &[&str]) -> std::io::Result<Output> {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
}

pub(crate) fn ploopfs(args: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_ploopfs"), args).expect("the program was built for this test")
}

pub(crate) fn status(args: &[&str]) -> i32 {
    ploopfs(args).status.code().expect("it was not killed")
}

pub(crate) fn story(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

/// A directory on a file system that calls no hole of a file sparse: ploop 1.15 minds on ext4.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix("check")
        .tempdir_in("/dev/shm");
    dir.or_else(|_| tempfile::tempdir())
        .expect("a temporary directory")
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary names are UTF-8")
}

#[test]
fn the_exit_status_tells_the_state() {
    let dir = directory();
    for (names, before, after) in [
        (&[][..], 0, 0),
        (&["t-leak-tail"], 3, 0),
        (&["t-duplicate"], 2, 0),
        (&["h-in-use"], 2, 0),
        (&["h-size-absurd"], 2, 2),
        (&["h-converting"], 2, 2),
    ] {
        let path = broken(dir.path(), &spec(2), names).expect("the image is made");
        let old = std::fs::read(&path).expect("the image was made");
        let path = text(&path);
        assert_eq!(status(&["check", path]), before, "{names:?}");
        let json = ploopfs(&["check", "--json", path]);
        let found: Value = serde_json::from_slice(&json.stdout).expect("one JSON document");
        let state = ["clean", "", "corrupt", "leaks"][before as usize];
        assert_eq!(found["state"], state, "{names:?}");
        // Nobody is there to say yes, and a dry run asks nobody.
        assert_eq!(status(&["repair", "-n", path]), before, "{names:?}");
        let unasked = status(&["repair", path]);
        assert_eq!(
            unasked,
            if before == 0 { 0 } else { after.max(1) },
            "{names:?}"
        );
        assert!(
            std::fs::read(path).expect("still there") == old,
            "{names:?}"
        );
        assert_eq!(status(&["repair", "-y", path]), after, "{names:?}");
    }
    assert_eq!(status(&["check", "/nonexistent"]), 1);
    let other = broken(dir.path(), &spec(2), &["h-magic"]).expect("the file is made");
    for verb in ["check", "repair"] {
        assert_eq!(status(&[verb, text(&other)]), 1, "{verb}: no image at all");
    }
}

#[test]
fn an_undo_brings_back_every_byte() {
    let dir = directory();
    let path = broken(dir.path(), &spec(2), &["t-duplicate", "t-odd-length"]).expect("made");
    let old = std::fs::read(&path).expect("the image was made");
    let (path, undo) = (text(&path), format!("{}.undo", text(&path)));
    assert_eq!(status(&["repair", "-qy", path]), 0);
    assert_eq!(
        status(&["repair", "--undo", &undo, path]),
        1,
        "nobody said yes"
    );
    assert_eq!(
        status(&["repair", "-y", "--undo", path, path]),
        1,
        "no undo file"
    );
    assert_eq!(status(&["repair", "-qy", "--undo", &undo, path]), 0);
    assert!(std::fs::read(path).expect("still there") == old);
    assert!(!Path::new(&undo).exists());
    // A frozen image, a locked one and other files are not touched.
    assert_eq!(status(&["repair", "-qy", path]), 0);
    assert_eq!(status(&["check", path]), 0);
}

fn kinds(path: &Path) -> (i32, Vec<String>) {
    let output = ploopfs(&["check", "--json", text(path)]);
    let found: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", story(&output)));
    let all = |list: &Value| -> Vec<String> {
        let kind = |finding: &Value| finding["kind"].as_str().map(str::to_owned);
        let list = list.as_array().cloned().unwrap_or_default();
        let bad = list.iter().filter(|finding| finding["severity"] != "note");
        bad.filter_map(kind).collect()
    };
    let mut kinds = all(&found["findings"]);
    for file in found["files"].as_array().expect("a list of files") {
        kinds.extend(all(&file["findings"]));
    }
    (output.status.code().expect("it was not killed"), kinds)
}

#[test]
fn a_bundle_is_checked_as_a_whole() {
    let dir = directory();
    for (name, code, kind) in [
        ("", 0, ""),
        ("x-left-tmp", 3, "left-over"),
        ("x-empty", 2, "descriptor"),
        ("x-cycle", 2, "chain"),
        ("x-parent-missing", 2, "chain"),
        ("x-blocksize", 2, "chain"),
        ("x-size", 2, "descriptor"),
        ("x-file-missing", 2, "image-file"),
        ("x-file-dotdot", 2, "image-file"),
        ("x-same-file", 2, "image-file"),
        ("x-lower-in-use", 2, "in-use"),
        ("x-shot-without-image", 2, "chain"),
    ] {
        let path = dir.path().join(format!("b{name}.hdd"));
        let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(40));
        let bundle = BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {});
        bundle.write(&path).expect("the bundle is made");
        if !name.is_empty() {
            corrupt::apply(name, &path).expect("it can be broken");
        }
        let (found, kinds) = kinds(&path);
        assert_eq!(found, code, "{name}: {kinds:?}");
        assert!(
            kind.is_empty() || kinds.iter().any(|k| k == kind),
            "{name}: {kinds:?}"
        );
        if name.is_empty() {
            let first = std::fs::read_dir(&path).expect("the bundle is there");
            let image = first
                .flatten()
                .map(|entry| entry.path())
                .find(|path| text(path).contains(".hds"));
            let image = image.expect("a bundle has images");
            std::fs::copy(&image, path.join("more.hds")).expect("there is room");
            let (found, kinds) = self::kinds(&path);
            assert_eq!((found, kinds), (3, vec!["orphan".to_owned()]));
        }
    }
}

#[test]
fn only_the_top_of_a_bundle_is_repaired() {
    let dir = directory();
    let path = dir.path().join("b.hdd");
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(40));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {});
    bundle.write(&path).expect("the bundle is made");
    let output = ploopfs(&["check", "--json", text(&path)]);
    let found: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    let files: Vec<String> = found["files"]
        .as_array()
        .expect("a list of files")
        .iter()
        .filter_map(|file| file["path"].as_str().map(str::to_owned))
        .collect();
    let mut hurt = Vec::new();
    for file in &files {
        corrupt::apply("t-past-eof", Path::new(file)).expect("it can be broken");
        hurt.push(std::fs::read(file).expect("still there"));
    }
    let done = ploopfs(&["repair", "-y", text(&path)]);
    assert_eq!(
        done.status.code(),
        Some(2),
        "the frozen one is as bad as before"
    );
    assert!(story(&done).contains("not touched"), "{}", story(&done));
    let now: Vec<_> = files
        .iter()
        .map(|file| std::fs::read(file).expect("there"))
        .collect();
    let changed: Vec<bool> = now.iter().zip(&hurt).map(|(a, b)| a != b).collect();
    assert_eq!(
        changed.iter().filter(|changed| **changed).count(),
        1,
        "{changed:?}"
    );
    // Named alone, a frozen image is refused.
    let frozen = changed
        .iter()
        .position(|changed| !changed)
        .expect("one is frozen");
    assert_eq!(status(&["repair", "-qy", &files[frozen]]), 1);
    assert!(std::fs::read(&files[frozen]).expect("there") == hurt[frozen]);
}

#[test]
fn a_locked_image_is_looked_at_on_request_only() {
    use ploopfs::storage::lock::{self, Locked, Purpose};
    let dir = directory();
    let path = broken(dir.path(), &spec(2), &["t-leak-tail"]).expect("the image is made");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path);
    let file = file.expect("the image is there");
    let locked = lock::image(&file, &path, Purpose::Write, std::time::Instant::now());
    assert!(matches!(locked, Ok(Locked::Yes)));
    let path = text(&path);
    let refused = ploopfs(&["check", path]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(story(&refused).contains("--no-lock"), "{}", story(&refused));
    assert_eq!(status(&["check", "--no-lock", path]), 3);
    assert_eq!(status(&["repair", "-y", path]), 1);
    drop(file);
    assert_eq!(status(&["repair", "-y", path]), 0);
}
