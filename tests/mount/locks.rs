//! One writer at a time, by whatever name the image is called, qemu included.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{Mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{Fuse, Qemu};
use crate::support::{self, Outcome, command, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("second_mount_is_refused", &[Fuse], second_mount_is_refused),
        trial(
            "lower_files_are_locked_too",
            &[Fuse],
            lower_files_are_locked_too,
        ),
        trial("readers_share", &[Fuse], readers_share),
        trial(
            "refused_while_qemu_writes",
            &[Fuse, Qemu],
            refused_while_qemu_writes,
        ),
        trial(
            "qemu_is_refused_while_mounted",
            &[Fuse, Qemu],
            qemu_is_refused_while_mounted,
        ),
        trial(
            "bundles_take_the_lock_of_ploop",
            &[Fuse],
            bundles_take_the_lock_of_ploop,
        ),
    ]
}

fn bundle(dir: &Path, depth: usize) -> Result<(BundleSpec, std::path::PathBuf)> {
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let spec = BundleSpec::chain(Style::Ploop, &like, depth, |_, _| {});
    let path = dir.join("d.hdd");
    spec.write(&path)?;
    Ok((spec, path))
}

fn second_mount_is_refused() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = bundle(dir.path(), 1)?;
    let image = spec.files(&path, 0).remove(0);
    let (soft, hard) = (dir.path().join("soft.hds"), dir.path().join("hard.hds"));
    symlink(&image, &soft)?;
    fs::hard_link(&image, &hard)?;
    symlink(&path, dir.path().join("soft.hdd"))?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let pid = mounted.pid().to_string();
    let descriptor = path.join("DiskDescriptor.xml");
    let names = [
        &path,
        &descriptor,
        &image,
        &soft,
        &hard,
        &dir.path().join("soft.hdd"),
    ];
    for name in names {
        let said = Mounted::refused(dir.path(), name, &[])?;
        let said = said
            .expect_words(&["lock"])
            .with_context(|| name.display().to_string())?;
        // The holder is there to be found: it is the daemon of the first mount.
        ensure!(
            said.stderr.contains(&pid),
            "the holder {pid} is not named: {}",
            said.stderr
        );
    }
    // What was refused has not hurt what is mounted.
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    file.write_all_at(b"still here", 0)?;
    file.sync_all()?;
    drop(file);
    mounted.umount()?;
    support::expect_clean(&image)?;
    Mounted::new(dir.path(), &hard, &[])?.umount()
}

fn lower_files_are_locked_too() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = bundle(dir.path(), 3)?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    for (level, file) in spec.files(&path, 0).iter().enumerate() {
        // By a name outside of the bundle, so that nothing but the lock can refuse it.
        let other = dir.path().join(format!("level{level}.hds"));
        fs::hard_link(file, &other)?;
        Mounted::refused(dir.path(), &other, &[])?.expect_words(&["lock"])?;
    }
    mounted.umount()
}

fn readers_share() -> Outcome {
    let dir = scratch()?;
    let (_, path) = bundle(dir.path(), 2)?;
    let before = support::fingerprint(&path)?;
    let first = Mounted::new(dir.path(), &path, &["-r"])?;
    let at = dir.path().join("second");
    fs::create_dir(&at)?;
    let second = Mounted::at(&at, &path, &["-r"])?;
    // Not even a lock file.
    let during = support::fingerprint(&path)?;
    ensure!(before == during, "read-only mounts changed the bundle");
    Mounted::refused(dir.path(), &path, &[])?.expect_words(&["lock"])?;
    second.umount()?;
    first.umount()
}

/// A qemu that holds the image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn hold(image: &Path, options: &[&str]) -> Result<Self> {
        let mut command = command::new("qemu-io");
        command.args(["-f", "parallels"]).args(options).arg(image);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = pipes.spawn()?;
        let stdin = child.stdin.as_mut().context("no pipe")?;
        // An answered command proves that the image is open.
        stdin.write_all(b"read 0 512\n")?;
        stdin.flush()?;
        let mut line = String::new();
        let mut lines = BufReader::new(child.stdout.take().context("no pipe")?);
        while !line.contains("read 512/512") {
            line.clear();
            ensure!(lines.read_line(&mut line)? > 0, "qemu-io ended at once");
        }
        Ok(Self(child))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let ended = command::eventually(Duration::from_secs(5), || {
            ensure!(self.0.try_wait()?.is_some(), "still running");
            Ok(())
        });
        if ended.is_err() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

fn refused_while_qemu_writes() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 6400)
        .mapping(Mapped::Percent(50))
        .write(&image)?;
    let qemu = Holder::hold(&image, &[])?;
    Mounted::refused(dir.path(), &image, &[])?.expect_words(&["lock"])?;
    drop(qemu);
    let qemu = Holder::hold(&image, &["-r"])?;
    let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
    drop(qemu);
    mounted.umount()?;
    Mounted::new(dir.path(), &image, &[])?.umount()
}

fn qemu_is_refused_while_mounted() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 6400)
        .mapping(Mapped::Percent(50))
        .write(&image)?;
    let qemu = |options: &[&str]| {
        let mut command = command::new("qemu-io");
        command
            .args(["-f", "parallels"])
            .args(options)
            .args(["-c", "read 0 512"])
            .arg(&image);
        command::run(&mut command)
    };
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    for options in [&[][..], &["-r"]] {
        qemu(options)?.expect_code(1)?.expect_words(&["lock"])?;
    }
    mounted.umount()?;
    let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
    qemu(&[])?.expect_code(1)?.expect_words(&["lock"])?;
    qemu(&["-r"])?.expect_code(0)?;
    mounted.umount()?;
    qemu(&[])?.expect_code(0)?;
    Ok(())
}

fn bundles_take_the_lock_of_ploop() -> Outcome {
    let dir = scratch()?;
    let (_, path) = bundle(dir.path(), 2)?;
    let lock = path.join("DiskDescriptor.xml.lck");
    let hold = "exec 9>\"$1\"; flock -n -x 9; shift; exec \"$@\"";
    let at = dir.path().join("held");
    fs::create_dir(&at)?;
    let args = [
        text(&lock),
        support::PLOOPFS,
        "mount",
        text(&path),
        text(&at),
    ];
    let refused = command::run(&mut command::sh(hold, &args))?;
    refused.expect_code(1)?.expect_words(&["lock"])?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let probe = command::run(&mut command::sh("flock -n -x \"$1\" true", &[text(&lock)]))?;
    ensure!(
        probe.code() == 1,
        "ploop's lock is free while the bundle is mounted for writing"
    );
    mounted.umount()?;
    command::ok(&mut command::sh("flock -n -x \"$1\" true", &[text(&lock)]))?;
    Ok(())
}
