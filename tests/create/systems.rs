//! File systems made on new disks: their own checkers, the kernel, a user who is not root.

use crate::interop::create;
use crate::support::guards::{FsMount, Loop, Mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, scratch, scratch_tmpfs};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "ext4_is_sound_and_writable",
            &[Need::Fuse, Need::Root, Need::Loop, Need::E2fsprogs],
            ext4,
        ),
        trial("xfs_is_sound", &[Need::Fuse, Need::Xfs], xfs),
        trial("no_root_is_needed", &[Need::Root, Need::E2fsprogs], no_root),
        trial("examples_of_the_manual_run", &[Need::E2fsprogs], examples),
    ]
}

/// The first partition of the disk, through a mount of its own.
fn with_partition(disk: &Path, dir: &Path, look: impl FnOnce(&Path) -> Outcome) -> Outcome {
    let mounted = Mounted::new(dir, disk, &[])?;
    look(&mounted.path().join("part1.img"))?;
    mounted.umount()
}

const KINDS: [&[&str]; 5] = [
    &["x.hdd"],
    &["y.hds", "--image-version", "1", "--cluster-size", "64K"],
    &["z.hdd", "-f", "plain"],
    &["p.hdd", "-f", "preallocated"],
    &["d.hdd", "--for", "parallels-desktop"],
];

fn ext4() -> Outcome {
    let dir = scratch()?;
    for kind in KINDS {
        let disk = dir.path().join(kind[0]);
        let args = ["-s", "512M", "--mkfs", "ext4", "--label", "our data"];
        create(&disk, &[&args[..], &kind[1..]].concat())?;
        command::ok(command::ploopfs(&["check", "-q"]).arg(&disk))?;
        if kind == ["x.hdd"] {
            let on_host = support::host_bytes(&disk.join("root.hds"))?;
            ensure!(on_host < 32 << 20, "{on_host} bytes for an empty one");
        }
        with_partition(&disk, dir.path(), |partition| {
            command::ok(command::new("e2fsck").arg("-fn").arg(partition))?;
            let said = command::ok(command::new("dumpe2fs").arg("-h").arg(partition))?;
            ensure!(said.contains("our data"), "{said}");
            // Views of partitions are read-only; the disk is not.
            let whole = partition.with_file_name("disk.img");
            let device = Loop::with(&whole, &["--offset", "1048576"])?;
            let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
            fs::write(system.path().join("file"), vec![7; 3_000_000])?;
            system.umount()?;
            device.detach()
        })?;
        with_partition(&disk, dir.path(), |partition| {
            command::ok(command::new("e2fsck").arg("-fn").arg(partition)).map(|_| ())
        })?;
        command::ok(command::ploopfs(&["check", "-q"]).arg(&disk))?;
    }
    Ok(())
}

fn xfs() -> Outcome {
    let dir = scratch()?;
    let disk = dir.path().join("x.hdd");
    create(&disk, &["-s", "2G", "--mkfs", "xfs", "--label", "data"])?;
    command::ok(command::ploopfs(&["check", "-q"]).arg(&disk))?;
    with_partition(&disk, dir.path(), |partition| {
        command::ok(command::new("xfs_repair").args(["-n", "-f"]).arg(partition)).map(|_| ())
    })
}

/// What a directory holds, hidden files too.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>> {
    let names = fs::read_dir(dir)?.flatten();
    let mut names: Vec<String> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

fn no_root() -> Outcome {
    // The usual scratch directories may lie where nobody else may look.
    let dir = scratch_tmpfs()?;
    command::ok(command::new("chmod").arg("777").arg(dir.path()))?;
    let program = dir.path().join("ploopfs");
    fs::copy(support::PLOOPFS, &program)?;
    for (name, system) in [("x.hdd", "ext4"), ("y.hds", "ext4")] {
        let mut line = command::new("setpriv");
        line.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        line.arg(&program);
        line.args(["create", "-q", "-s", "300M", "--mkfs", system]);
        command::ok(line.arg(dir.path().join(name)))?;
        command::ok(command::ploopfs(&["check", "-q"]).arg(dir.path().join(name)))?;
    }
    ensure!(names(dir.path())? == ["ploopfs", "x.hdd", "y.hds"]);
    Ok(())
}

fn examples() -> Outcome {
    let dir = scratch()?;
    let ran = run_examples("ploopfs-create.1", dir.path())?;
    ensure!(
        ran >= 3 && names(dir.path())?.len() == ran,
        "{ran} examples"
    );
    Ok(())
}

/// Runs what a page of the manual shows, in a directory.
pub(crate) fn run_examples(page: &str, dir: &Path) -> Result<usize> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(page);
    let page = fs::read_to_string(page)?;
    let program = Path::new(support::PLOOPFS)
        .parent()
        .context("a directory")?;
    let mut ran = 0;
    for line in page.lines().filter_map(|line| line.strip_prefix("$ ")) {
        let script = format!("PATH={}:$PATH; cd \"$1\"; {line}", text(program));
        command::ok(&mut command::sh(&script, &[text(dir)]))?;
        ran += 1;
    }
    Ok(ran)
}
