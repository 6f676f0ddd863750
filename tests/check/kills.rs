//! The command killed at any moment, on real files.

use crate::forge::content::splitmix;
use crate::forge::image::{ImageSpec, Mapped};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, DiskOptions};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An image of which every third entry names the cluster of the one before it.
fn tangled(path: &Path) -> Vec<u8> {
    let spec = ImageSpec::new(2, 8, 8 * 6000).mapping(Mapped::Percent(50));
    spec.write(path).expect("the image is made");
    let mut bytes = std::fs::read(path).expect("the image was made");
    let mut last = [0; 4];
    for index in 0..6000 {
        let entry = &mut bytes[64 + 4 * index..68 + 4 * index];
        if entry == [0; 4] {
            continue;
        }
        if index % 3 == 0 && last != [0; 4] {
            entry.copy_from_slice(&last);
        }
        last.copy_from_slice(entry);
    }
    bytes.extend([7; 9000]);
    bytes
}

fn repair(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ploopfs"));
    command.arg("repair").arg("-qy").args(arguments);
    command.stdin(Stdio::null());
    command
}

fn expect_done(arguments: &[&str], what: &str) {
    let done = repair(arguments).status().expect("the program was built");
    assert!(done.success(), "{what}: {done}");
}

#[test]
fn a_killed_repair_goes_on_or_is_undone() {
    // A kill loses nothing that a sync would keep, so memory does as well as a disk.
    let dir = tempfile::Builder::new().tempdir_in("/dev/shm");
    let dir = dir
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary directory");
    let path = dir.path().join("x.hds");
    let old = tangled(&path);
    let (image, read) = (path.to_str().expect("UTF-8"), || {
        std::fs::read(&path).expect("there")
    });
    let saved = |end: &str| format!("{image}.{end}");
    std::fs::write(&path, &old).expect("there is room");
    let started = Instant::now();
    expect_done(&[image], "undisturbed");
    let (long, good) = (started.elapsed(), read());
    std::fs::remove_file(saved("undo")).expect("it was written");
    let (mut dice, mut kills) = (11, 0);
    for round in 0..8 {
        let what = format!("round {round}");
        std::fs::write(&path, &old).expect("there is room");
        for _ in 0..1 + round % 3 {
            let mut child = repair(&[image]).spawn().expect("the program was built");
            let part = (splitmix(&mut dice) % 1000) as u32;
            std::thread::sleep(Duration::from_nanos(long.as_nanos() as u64) * part / 1000);
            kills += u32::from(child.try_wait().expect("it is ours").is_none());
            let _ = child.kill();
            let _ = child.wait();
        }
        if round % 4 == 3 && Path::new(&saved("repair")).exists() {
            let undone = repair(&["--undo", &saved("repair"), image]).output();
            let undone = undone.expect("the program was built").status.success();
            // An undo file that was not finished is of no use, and of no need.
            assert!(read() == old, "{what}: undone is {undone}");
        }
        expect_done(&[image], &what);
        assert!(read() == good, "{what}: another end");
        expect_done(&["--undo", &saved("undo"), image], &what);
        assert!(read() == old, "{what}: not as it was");
    }
    assert!(kills > 3, "only {kills} kills");
}

#[test]
fn nobody_writes_beside_an_interrupted_repair() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("x.hds");
    ImageSpec::new(2, 8, 80).write(&path).expect("it is made");
    // By each of these the same file is meant; the undo file lies beside the first.
    std::fs::create_dir(dir.path().join("elsewhere")).expect("it is made");
    let links = [dir.path().join("y.hds"), dir.path().join("elsewhere/x.hds")];
    for link in &links {
        std::os::unix::fs::symlink(&path, link).expect("it is made");
    }
    let ways = [&path, &links[0], &links[1]];
    let open_by = |path: &Path, write: bool| {
        let selection = Selection {
            write,
            ..Selection::default()
        };
        let options = DiskOptions {
            read_only: !write,
            ..DiskOptions::default()
        };
        let images = bundle::open(path, &selection)?;
        disk::open(Arc::new(images), &options).map(|(_, notes)| notes)
    };
    let open = |write: bool| open_by(&path, write);
    assert!(open(true).is_ok());
    let saved = dir.path().join("x.hds.repair");
    std::fs::write(&saved, b"ploopfs undo 1\n\0").expect("there is room");
    let before = std::fs::read(&path).expect("there");
    for way in ways {
        let refused = open_by(way, true).expect_err("it is half mended");
        let refused = refused.to_string();
        assert!(refused.contains("x.hds.repair"), "{refused}");
    }
    assert!(std::fs::read(&path).expect("there") == before);
    for way in ways {
        let notes = open_by(way, false).expect("reading is allowed");
        assert!(notes.iter().any(|note| note.contains("interrupted")));
    }
    // The next repair has nothing to go on with, and removes it.
    expect_done(&[links[1].to_str().expect("UTF-8")], "a repair");
    assert!(!saved.exists() && ways.iter().all(|way| open_by(way, true).is_ok()));
}
