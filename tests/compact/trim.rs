//! `--trim`: file systems that discard what they do not use, and those that are left alone.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::ImageSpec;
use crate::support::guards::{FsMount, text};
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{MIB, Outcome, PLOOPFS, command, fingerprint, host_bytes, scratch, sha256};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

const MEANS: &[Need] = &[
    Need::Fuse,
    Need::Root,
    Need::Loop,
    Need::E2fsprogs,
    Need::Xfs,
];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("trim_frees_what_was_deleted", MEANS, deleted),
        trial("trim_leaves_snapshots_alone", MEANS, over_snapshots),
        trial("trim_of_a_split_disk_without_partitions", MEANS, split),
        trial("trim_leaves_what_was_not_unmounted", MEANS, not_unmounted),
        trial("trim_ends_with_the_command", MEANS, killed),
        trial("trim_needs_root_and_a_yes", &[], refused),
    ]
}

/// A disk on a loop device; dropped, it is detached.
struct Device {
    path: PathBuf,
    attached: bool,
}

impl Device {
    fn new(image: &Path) -> Result<Self> {
        let said = command::ok(command::ploopfs(&["attach"]).arg(image))?;
        Ok(Self {
            path: PathBuf::from(said.trim()),
            attached: true,
        })
    }

    fn part(&self, number: Option<u32>) -> PathBuf {
        number.map_or_else(
            || self.path.clone(),
            |number| PathBuf::from(format!("{}p{number}", self.path.display())),
        )
    }

    fn detach(mut self) -> Outcome {
        // Programs that look at new devices hold them for a moment.
        command::eventually(Duration::from_secs(10), || {
            command::ok(command::ploopfs(&["detach"]).arg(&self.path))
        })?;
        self.attached = false;
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.attached {
            let _ = command::run(command::ploopfs(&["detach"]).arg(&self.path));
        }
    }
}

/// Does something with the file system of a disk.
fn inside(
    image: &Path,
    part: Option<u32>,
    options: &[&str],
    act: impl FnOnce(&Path) -> Outcome,
) -> Outcome {
    let device = Device::new(image)?;
    let at = image.with_extension("fs");
    let mount = FsMount::with(&device.part(part), &at, options)?;
    act(mount.path())?;
    mount.umount()?;
    device.detach()
}

/// Writes random bytes to a file and has them on the disk.
fn fill(path: &Path, mib: u64) -> Outcome {
    let script = "head -c $(($2 << 20)) /dev/urandom >\"$1\" && sync \"$1\"";
    command::ok(&mut command::sh(script, &[text(path), &mib.to_string()]))?;
    Ok(())
}

fn tops(image: &Path) -> Result<u64> {
    let sizes = fs::read_dir(image)?.map(|entry| host_bytes(&entry?.path()));
    sizes.sum()
}

fn trim(image: &Path, more: &[&str]) -> Result<String> {
    let mut args = vec!["compact", "--trim", "--yes"];
    args.extend(more);
    command::ok(command::ploopfs(&args).arg(image))
}

/// The file system on a disk that nobody has must be sound.
fn expect_sound(image: &Path, part: Option<u32>, kind: &str) -> Outcome {
    let device = Device::new(image)?;
    let path = device.part(part);
    let mut judge = match kind {
        "ext4" => command::new("e2fsck"),
        _ => command::new("xfs_repair"),
    };
    command::ok(
        judge
            .args(if kind == "ext4" {
                &["-fn"][..]
            } else {
                &["-n"]
            })
            .arg(path),
    )?;
    device.detach()?;
    command::ok(command::ploopfs(&["check", "-q"]).arg(image))?;
    Ok(())
}

/// Writes two files, deletes one, and trims: its space must be gone, and the other still there.
fn round(image: &Path, part: Option<u32>, kind: &str) -> Outcome {
    let mut kept = String::new();
    inside(image, part, &[], |at| {
        fill(&at.join("gone"), 80)?;
        fill(&at.join("kept"), 20)?;
        kept = sha256(&at.join("kept"))?;
        fs::remove_file(at.join("gone"))?;
        Ok(())
    })?;
    let before = tops(image)?;
    let said = trim(image, &[])?;
    let after = tops(image)?;
    ensure!(after + 70 * MIB < before, "{before} to {after}: {said}");
    expect_sound(image, part, kind)?;
    inside(image, part, &["-r"], |at| {
        ensure!(sha256(&at.join("kept"))? == kept, "{said}");
        ensure!(!at.join("gone").exists());
        Ok(())
    })?;
    let said = command::ok(command::ploopfs(&["compact", "--trim", "-n"]).arg(image))?;
    ensure!(
        said.contains(if kind == "ext4" { "(ext)" } else { "(xfs)" }),
        "{said}"
    );
    Ok(())
}

fn create(dir: &Path, kind: &str) -> Result<PathBuf> {
    let image = dir.join(format!("{kind}.hdd"));
    let args = ["create", "-q", "-s", "700M", "--mkfs", kind];
    command::ok(command::ploopfs(&args).arg(&image))?;
    Ok(image)
}

fn deleted() -> Outcome {
    let dir = scratch()?;
    for kind in ["ext4", "xfs"] {
        let image = create(dir.path(), kind)?;
        round(&image, Some(1), kind).with_context(|| kind)?;
    }
    Ok(())
}

fn over_snapshots() -> Outcome {
    let dir = scratch()?;
    for kind in ["ext4", "xfs"] {
        let image = create(dir.path(), kind)?;
        inside(&image, Some(1), &[], |at| fill(&at.join("old"), 60))?;
        let base = image.join("root.hds");
        let said = ["snapshot", "create", "-q"];
        command::ok(command::ploopfs(&said).arg(&image))?;
        let frozen = fingerprint(&base)?;
        inside(&image, Some(1), &[], |at| {
            Ok(fs::remove_file(at.join("old"))?)
        })?;
        let before = tops(&image)?;
        trim(&image, &[])?;
        // What is deleted is in the snapshot; hiding it must not cost blocks.
        let after = tops(&image)?;
        ensure!(after < before + 8 * MIB, "{kind}: {before} to {after}");
        round(&image, Some(1), kind).with_context(|| kind)?;
        ensure!(
            fingerprint(&base)? == frozen,
            "{kind}: the snapshot was changed"
        );
        fs::remove_dir_all(&image)?;
    }
    Ok(())
}

fn split() -> Outcome {
    let dir = scratch()?;
    let part = || vec![Level::Image(ImageSpec::new(2, 2048, 400 * 2048))];
    let mut spec = BundleSpec::new(Style::Parallels, part());
    spec.push_part(part());
    let image = dir.path().join("split.hdd");
    spec.write(&image)?;
    let device = Device::new(&image)?;
    command::ok(command::new("mkfs.ext4").arg("-q").arg(&device.path))?;
    device.detach()?;
    round(&image, None, "ext4")?;
    // Both parts were written to, or this shows nothing.
    inside(&image, None, &[], |at| fill(&at.join("large"), 500))?;
    inside(&image, None, &[], |at| {
        Ok(fs::remove_file(at.join("large"))?)
    })?;
    let before = tops(&image)?;
    trim(&image, &["--defrag"])?;
    let after = tops(&image)?;
    ensure!(after + 450 * MIB < before, "{before} to {after}");
    expect_sound(&image, None, "ext4")
}

fn not_unmounted() -> Outcome {
    let dir = scratch()?;
    for kind in ["ext4", "xfs"] {
        let image = create(dir.path(), kind)?;
        let mut kept = String::new();
        inside(&image, Some(1), &[], |at| {
            fill(&at.join("gone"), 40)?;
            fs::remove_file(at.join("gone"))?;
            fill(&at.join("kept"), 5)?;
            kept = sha256(&at.join("kept"))?;
            // From here on it writes nothing, not even that it is unmounted.
            command::ok(
                command::new("xfs_io")
                    .args(["-x", "-c", "shutdown -f"])
                    .arg(at),
            )?;
            Ok(())
        })?;
        let (before, shown) = (tops(&image)?, fingerprint(&image)?);
        let said = trim(&image, &[])?;
        ensure!(said.contains("was not unmounted"), "{kind}: {said}");
        ensure!(tops(&image)? + 20 * MIB > before, "{kind}: {said}");
        let bytes = |found: Vec<(PathBuf, String, i64, i64)>| {
            found.into_iter().map(|one| one.1).collect::<Vec<_>>()
        };
        ensure!(
            bytes(fingerprint(&image)?) == bytes(shown),
            "{kind}: {said}"
        );
        let said = trim(&image, &["--force"])?;
        let after = tops(&image)?;
        ensure!(
            after + 35 * MIB < before,
            "{kind}: {before} to {after}: {said}"
        );
        expect_sound(&image, Some(1), kind)?;
        inside(&image, Some(1), &["-r"], |at| {
            ensure!(sha256(&at.join("kept"))? == kept, "{kind}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Whatever ends the command, nothing stays mounted or attached, and the disk is closed.
fn killed() -> Outcome {
    let dir = scratch()?;
    let image = create(dir.path(), "ext4")?;
    inside(&image, Some(1), &[], |at| {
        fill(&at.join("kept"), 10)?;
        (0..400).try_for_each(|n| fs::write(at.join(format!("{n}")), vec![7; 100_000]))?;
        (0..400)
            .step_by(2)
            .try_for_each(|n| fs::remove_file(at.join(format!("{n}"))))?;
        Ok(())
    })?;
    let began = Instant::now();
    trim(&image, &[])?;
    let whole = began.elapsed();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        for number in 0..8 {
            let mut run = command::ploopfs(&["compact", "--trim", "--yes", "-q"]);
            let run = run.arg(&image).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = run.spawn()?;
            let delay = whole * number / 8;
            thread::sleep(delay);
            let pid = Pid::from_raw(i32::try_from(child.id())?);
            let _ = kill(pid, signal);
            let status = child.wait()?;
            let story = || format!("{signal} after {delay:?} of {whole:?}: {status}");
            // Locked, as long as the daemon is there.
            command::eventually(Duration::from_secs(30), || {
                command::ok(command::ploopfs(&["check", "-q"]).arg(&image))
            })
            .with_context(story)?;
            let left = command::ok(&mut command::ploopfs(&["list", "--json"]))?;
            ensure!(!left.contains(text(&image)), "{}: {left}", story());
        }
    }
    expect_sound(&image, Some(1), "ext4")?;
    trim(&image, &[])?;
    expect_sound(&image, Some(1), "ext4")
}

fn refused() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("x.hds");
    ImageSpec::new(2, 2048, 40 * 2048).write(&image)?;
    let before = fingerprint(&image)?;
    let mut plain = command::ploopfs(&["compact", "--trim", "--yes"]);
    if nix::unistd::geteuid().is_root() {
        // A copy that anybody may run and read.
        let open = tempfile::Builder::new()
            .prefix("ploopfs-test")
            .tempdir_in("/tmp")?;
        let modes = "cp \"$1\" \"$2/ploopfs\" && cp \"$3\" \"$2/x.hds\" && chmod 755 \"$2\" \
                     \"$2/ploopfs\" && chmod 666 \"$2/x.hds\"";
        let names = [PLOOPFS, text(open.path()), text(&image)];
        command::ok(&mut command::sh(modes, &names))?;
        plain = command::new(text(&open.path().join("ploopfs")));
        plain
            .args(["compact", "--trim", "--yes"])
            .current_dir("/")
            .uid(65534)
            .gid(65534);
        let said = command::run(plain.arg(open.path().join("x.hds")))?;
        said.expect_code(1)?
            .expect_words(&["root", "nothing was changed", "sudo"])?;
    } else {
        let said = command::run(plain.arg(&image))?;
        said.expect_code(1)?
            .expect_words(&["root", "nothing was changed", "sudo"])?;
    }
    let said = command::run(command::ploopfs(&["compact", "--force"]).arg(&image))?;
    said.expect_code(1)?.expect_words(&["--trim"])?;
    ensure!(fingerprint(&image)? == before);
    Ok(())
}
