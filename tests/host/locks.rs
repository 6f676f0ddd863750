//! QEMU sees our locks and we see QEMU's.

use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{Outcome, scratch};
use libtest_mimic::Trial;
use ploopfs::chain::bundle::{Selection, open};
use ploopfs::error::ErrorKind;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("qemu_sees_our_locks", &[Need::Qemu], qemu_sees_our_locks),
        trial(
            "we_see_the_locks_of_qemu_and_name_it",
            &[Need::Qemu],
            we_see_the_locks_of_qemu_and_name_it,
        ),
    ]
}

fn image(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("a.hds");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "parallels"])
        .arg(&path)
        .arg("10M")
        .status()
        .expect("QEMU runs");
    assert!(made.success());
    path
}

fn qemu_can_open(path: &Path, read_only: bool) -> bool {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "parallels", "-c", "read 0 512"]);
    if read_only {
        command.arg("-r");
    }
    command
        .arg(path)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .expect("QEMU runs")
        .success()
}

/// A QEMU that has the image open until it is dropped.
struct Qemu(Child);

impl Qemu {
    fn open(path: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "parallels"]);
        if read_only {
            command.arg("-r");
        }
        let pipes = command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = pipes.spawn().expect("QEMU runs");
        // It answers only when the image is open.
        child
            .stdin
            .as_mut()
            .expect("QEMU runs")
            .write_all(b"length\n")
            .expect("QEMU runs");
        let mut answer = String::new();
        BufReader::new(child.stdout.take().expect("QEMU runs"))
            .read_line(&mut answer)
            .expect("QEMU runs");
        assert!(answer.contains("10 MiB"), "{answer}");
        Self(child)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn selection(write: bool) -> Selection {
    Selection {
        write,
        ..Selection::default()
    }
}

fn qemu_sees_our_locks() -> Outcome {
    let dir = scratch()?;
    let path = image(dir.path());
    let writer = open(&path, &selection(true))?;
    assert!(!qemu_can_open(&path, false));
    assert!(!qemu_can_open(&path, true));
    drop(writer);
    let reader = open(&path, &selection(false))?;
    assert!(!qemu_can_open(&path, false));
    assert!(qemu_can_open(&path, true));
    drop(reader);
    assert!(qemu_can_open(&path, false));
    Ok(())
}

fn we_see_the_locks_of_qemu_and_name_it() -> Outcome {
    let dir = scratch()?;
    let path = image(dir.path());
    let link = dir.path().join("link.hds");
    std::fs::hard_link(&path, &link)?;
    for (qemu_reads, write, wanted) in [
        (false, true, false),
        (false, false, false),
        (true, true, false),
        (true, false, true),
    ] {
        let _qemu = Qemu::open(&path, qemu_reads);
        match open(&link, &selection(write)) {
            Ok(_) => assert!(wanted, "both have it: {qemu_reads} {write}"),
            Err(e) => {
                assert!(!wanted, "{e}");
                assert_eq!(e.kind(), ErrorKind::Locked);
                assert!(e.to_string().contains("qemu-io"), "{e}");
            }
        }
    }
    open(&path, &selection(true))?;
    Ok(())
}
