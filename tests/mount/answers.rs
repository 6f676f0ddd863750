//! What the kernel is told, and what it may do to the daemon: rows of one real run each.

use crate::forge::content::Model;
use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{FsMount, Loop, Mounted, is_gone, is_mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, E2fsprogs, Fuse, Root};
use crate::support::{self, MIB, Outcome, PLOOPFS, command, expect_flat, expect_range, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::mount::MntFlags;
use nix::sys::signal::Signal;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const LOOP: &[Need] = &[Fuse, Root, Need::Loop, E2fsprogs];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("racing_mounts_have_one_winner", &[Fuse], racing_mounts),
        trial("killed_while_it_drains", LOOP, killed_while_it_drains),
        trial(
            "an_aborted_connection_closes_the_image",
            &[Fuse, Root],
            aborted_connection,
        ),
        trial("a_limit_on_files_kills_nobody", &[Fuse, Root], file_limit),
        trial("a_broken_log_pipe_kills_nobody", &[Fuse], broken_pipe),
        trial(
            "a_failed_read_shrinks_no_disk",
            &[Fuse],
            failed_read_shrinks_nothing,
        ),
        trial(
            "a_disk_reopened_shows_what_the_loop_wrote",
            &[Fuse, Root, Need::Loop],
            reopened_beside_a_loop,
        ),
        trial(
            "a_partition_reopened_shows_what_the_disk_got",
            &[Fuse],
            reopened_partition,
        ),
    ]
}

const SECTORS: u64 = 9600;

fn image(dir: &Path) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, SECTORS).mapping(Mapped::Percent(50));
    let path = dir.join("a.hds");
    spec.write(&path)?;
    Ok((spec, path))
}

fn write(disk: &Path, at: u64, bytes: &[u8]) -> Outcome {
    let file = OpenOptions::new().write(true).open(disk)?;
    file.write_all_at(bytes, at)?;
    Ok(file.sync_all()?)
}

/// Whoever has the lock reads the header again: nothing of the loser's look may count.
fn racing_mounts() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let places = ["left", "right"].map(|name| dir.path().join(name));
    places.iter().try_for_each(fs::create_dir)?;
    for round in 1..=12_u8 {
        let start = |at: &PathBuf| -> Result<Child> {
            let mut command = command::ploopfs(&["mount"]);
            Ok(command.arg(&path).arg(at).stderr(Stdio::piped()).spawn()?)
        };
        let racers = places.iter().map(start).collect::<Result<Vec<_>>>()?;
        let ended = racers.into_iter().map(Child::wait_with_output);
        let ended = ended.collect::<std::io::Result<Vec<_>>>()?;
        let winners: Vec<_> = (0..2).filter(|n| ended[*n].status.success()).collect();
        let worked = winners.first().map(|winner| {
            let disk = places[*winner].join("disk.img");
            let before = support::read_at(&disk, 0, 512);
            (before, write(&disk, 0, &[round; 512]))
        });
        for at in places.iter().filter(|at| is_mounted(at)) {
            command::run(command::ploopfs(&["umount"]).arg(at))?.expect_code(0)?;
        }
        ensure!(winners.len() == 1, "round {round}: {winners:?} {ended:?}");
        let loser = String::from_utf8_lossy(&ended[1 - winners[0]].stderr).into_owned();
        ensure!(loser.contains("locked"), "round {round}: {loser}");
        let (before, wrote) = worked.context("nobody")?;
        wrote?;
        let expected = [round - 1; 512];
        ensure!(
            round == 1 || before? == expected,
            "round {round}: old bytes"
        );
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn killed_while_it_drains() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 1 << 18).write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let device = Loop::new(&mounted.disk())?;
    command::ok(
        command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(device.dev()),
    )?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    let bytes = |number: u8| vec![number; 100_000];
    for number in 0..20 {
        // The first begins the drain, the others change nothing.
        if number % 5 == 4 {
            mounted.signal(Signal::SIGTERM)?;
        }
        let file = system.path().join(number.to_string());
        fs::write(&file, bytes(number))?;
        File::open(&file)?.sync_all()?;
    }
    command::ok(command::new("sync").arg("-f").arg(system.path()))?;
    ensure!(!is_gone(mounted.pid()), "a second signal ended the daemon");
    mounted.signal(Signal::SIGKILL)?;
    mounted.gone(Duration::from_secs(5))?;
    drop(system);
    device.detach()?;
    drop(mounted);
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let device = Loop::new(&mounted.disk())?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    for number in 0..20 {
        let found = fs::read(system.path().join(number.to_string()))?;
        ensure!(found == bytes(number), "file {number} holds other bytes");
    }
    system.umount()?;
    command::ok(command::new("e2fsck").arg("-fn").arg(device.dev()))?;
    device.detach()?;
    mounted.umount()?;
    support::expect_clean(&path)
}

/// The kernel gives up the connection under load: all requests end there, while they go on here.
fn aborted_connection() -> Outcome {
    let dir = scratch()?;
    for round in 0..5 {
        let path = dir.path().join(format!("{round}.hds"));
        ImageSpec::new(2, 64, 1 << 17).write(&path)?;
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        let disk = mounted.disk();
        write(&disk, 60 * MIB, &[7; 4096])?;
        let stop = AtomicBool::new(false);
        let load = |start: u64| {
            let Ok(file) = OpenOptions::new().write(true).open(&disk) else {
                return;
            };
            let mut at = start * 8 * MIB;
            while !stop.load(Ordering::Relaxed) && file.write_all_at(&[9; 70_000], at).is_ok() {
                at = start * 8 * MIB + (at + 70_000) % (7 * MIB);
            }
        };
        thread::scope(|scope| -> Outcome {
            for start in 0..4 {
                scope.spawn(move || load(start));
            }
            thread::sleep(Duration::from_millis(100 + 40 * round));
            let aborted = nix::mount::umount2(mounted.path(), MntFlags::MNT_FORCE);
            let gone = mounted.gone(Duration::from_secs(30));
            stop.store(true, Ordering::Relaxed);
            gone.with_context(|| format!("after {aborted:?}"))
        })?;
        drop(mounted);
        support::expect_clean(&path).with_context(|| format!("round {round}"))?;
        let again = Mounted::new(dir.path(), &path, &["-r"])?;
        let found = support::read_at(&again.disk(), 60 * MIB, 4096)?;
        ensure!(found == [7; 4096], "what was synced is gone");
        again.umount()?;
    }
    Ok(())
}

fn file_limit() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 1 << 17).write(&path)?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    // 16 MiB, in units of 512 bytes.
    let script = "ulimit -f 32768; exec \"$1\" mount \"$2\" \"$3\"";
    let args = [PLOOPFS, text(&path), text(&at)];
    command::run(&mut command::sh(script, &args))?.expect_code(0)?;
    let disk = at.join("disk.img");
    let mut wrote = 0;
    let refused = (0..64).find_map(|number| {
        let answer = write(&disk, number * MIB, &[number as u8 + 1; MIB as usize]);
        wrote = if answer.is_ok() { number + 1 } else { wrote };
        answer.err()
    });
    let kept = (0..wrote).try_for_each(|number| {
        let found = support::read_at(&disk, number * MIB, MIB as usize)?;
        let same = found.iter().all(|byte| *byte == number as u8 + 1);
        ensure!(same, "MiB {number} holds other bytes");
        Ok(())
    });
    command::run(command::ploopfs(&["umount"]).arg(&at))?.expect_code(0)?;
    let errno = refused.and_then(|e| e.downcast::<std::io::Error>().ok()?.raw_os_error());
    ensure!(errno == Some(Errno::EFBIG as i32), "refused with {errno:?}");
    ensure!(wrote > 4, "only {wrote} MiB were taken");
    kept?;
    support::expect_clean(&path)
}

/// Whoever read the log of a daemon in the foreground has gone.
fn broken_pipe() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let mut command = command::ploopfs(&["mount", "-d"]);
    let mut child = command.arg(&path).arg(&at).stderr(Stdio::piped()).spawn()?;
    let mut pipe = child.stderr.take().context("no pipe")?;
    let read = pipe.read(&mut [0; 64]);
    drop(pipe);
    let look = command::eventually(Duration::from_secs(20), || {
        ensure!(is_mounted(&at), "nothing is mounted");
        expect_flat(&at.join("disk.img"), &Model::of(&spec))
    });
    let over = command::run(command::ploopfs(&["umount"]).arg(&at));
    let ended = command::eventually(Duration::from_secs(10), || {
        child.try_wait()?.context("the daemon is still there")
    });
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ensure!(read? > 0, "no log");
    look?;
    over?.expect_code(0)?;
    ensure!(ended?.success(), "it ended with a failure");
    support::expect_clean(&path)
}

/// A short answer in the middle would be the disk's end to the kernel.
fn failed_read_shrinks_nothing() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    corrupt::apply("t-far", &path)?;
    let mounted = Mounted::new(dir.path(), &path, &["-r"])?;
    let disk = mounted.disk();
    let mut bytes = Vec::new();
    let mut failed = 0;
    for _ in 0..3 {
        bytes.clear();
        failed += usize::from(File::open(&disk)?.read_to_end(&mut bytes).is_err());
        let len = fs::metadata(&disk)?.len();
        ensure!(len == SECTORS * 512, "the disk has {len} bytes by now");
    }
    ensure!(failed == 3, "a bad cluster was read");
    // And what lies behind it is there.
    let last = (SECTORS - 64) * 512;
    expect_range(&disk, &Model::of(&spec), last, 64 * 512)?;
    mounted.umount()
}

/// Readers through the page cache go on while the loop device writes around it; whoever opens the
/// disk anew afterwards sees what was written.
fn reopened_beside_a_loop() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 1 << 15).write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let device = Loop::new(&mounted.disk())?;
    let disk = mounted.disk();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Outcome {
        let reader = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let read = File::open(&disk).and_then(|mut file| file.read_to_end(&mut Vec::new()));
                if read.is_err() {
                    return read.map(drop);
                }
            }
            Ok(())
        });
        let rounds = || -> Outcome {
            for round in 1..=10_u8 {
                let from = dir.path().join("from");
                fs::write(&from, vec![round; 4 << 20])?;
                let (from, to) = (
                    format!("if={}", text(&from)),
                    format!("of={}", text(device.dev())),
                );
                let mut dd = command::new("dd");
                command::ok(dd.args([&from, &to]).args([
                    "bs=64k",
                    "oflag=direct",
                    "conv=notrunc",
                ]))?;
                let found = support::read_at(&disk, 0, 4 << 20)?;
                let stale = found.iter().filter(|byte| **byte != round).count();
                ensure!(stale == 0, "round {round}: {stale} stale bytes");
            }
            Ok(())
        };
        let done = rounds();
        stop.store(true, Ordering::Relaxed);
        let read = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        done.and(read.context("the reader"))
    })?;
    device.detach()?;
    mounted.umount()
}

fn reopened_partition() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 65_536).write(&path)?;
    let mut sector = [0; 512];
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 12].copy_from_slice(&2048_u32.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&4096_u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    write(&mounted.disk(), 0, &sector)?;
    mounted.umount()?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let part = mounted.path().join("part1.img");
    for round in 1..=5_u8 {
        write(&mounted.disk(), 2048 * 512, &[round; 100_000])?;
        let found = support::read_at(&part, 0, 100_000)?;
        ensure!(found == [round; 100_000], "round {round}: stale bytes");
    }
    mounted.umount()
}
