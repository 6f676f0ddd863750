//! Mounts that read and write their images past the host's page cache.

use super::disks::{expect_shadow, scribble};
use super::load;
use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{Loop, Mounted, text};
use crate::support::harness::{skip_excused, trial};
use crate::support::probe::Need::{self, E2fsprogs, Fio, Fuse, Rings, Root};
use crate::support::{self, Outcome, command, expect_flat, rings, scratch, scratch_tmpfs};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::time::Duration;

const LOADED: &[Need] = &[Fuse, Root, Need::Loop, Fio, E2fsprogs];
const WAYS: [&str; 2] = ["fuser", "uring"];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "direct_mounts_leave_no_page_behind",
            &[Fuse, Root, Rings],
            leave_no_page,
        ),
        trial(
            "direct_mounts_take_any_bytes",
            &[Fuse, Root, Rings],
            take_any_bytes,
        ),
        trial("direct_mounts_verify_over_fuser", LOADED, || {
            verify("fuser")
        }),
        trial(
            "direct_mounts_verify_over_rings",
            &[Fuse, Root, Need::Loop, Fio, E2fsprogs, Rings],
            || verify("uring"),
        ),
        trial(
            "direct_mounts_over_rings_end_under_load",
            &[Fuse, Root, Fio, Rings],
            end_under_load,
        ),
        trial("what_cannot_be_direct_is_refused", &[Fuse], refused),
    ]
}

/// Bytes of a file that the host has in memory.
fn cached(path: &Path) -> Result<u64> {
    let mut fincore = command::new("fincore");
    let told = command::ok(fincore.args(["-b", "-n", "-o", "RES", text(path)]))?;
    Ok(told.trim().parse()?)
}

/// Has the host write and forget all of a file.
fn forget(path: &Path) -> Outcome {
    let script = "sync \"$1\" && dd if=\"$1\" iflag=nocache count=0 2>/dev/null";
    command::ok(&mut command::sh(script, &[text(path)]))?;
    Ok(())
}

fn leave_no_page() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    let spec = ImageSpec::new(2, 2048, 64 << 11).mapping(Mapped::Percent(50));
    spec.write(&path)?;
    for way in WAYS {
        forget(&path)?;
        if cached(&path)? > 0 {
            return Err(skip_excused("the file system keeps all in memory"));
        }
        let options = ["--direct", "--transport", way];
        let mounted = Mounted::new(dir.path(), &path, &options)?;
        // What the other mount, and the open of this one, look at before it is direct.
        let before = cached(&path)?;
        expect_flat(&mounted.disk(), &Model::of(&spec))?;
        let after = cached(&path)?;
        ensure!(
            after <= before,
            "{way}: {before} bytes in memory, {after} after all was read"
        );
        let info = mounted.json("info.json")?;
        ensure!(info["mount"]["options"]["direct"] == true, "{way}: {info}");
        mounted.umount()?;
    }
    support::expect_clean(&path)
}

/// On a file system whose blocks are as they are, and on one that has none.
fn take_any_bytes() -> Outcome {
    rings::on()?;
    for (dir, number) in [scratch()?, scratch_tmpfs()?].iter().zip(1..) {
        for (way, seed) in WAYS.into_iter().zip(7..) {
            let path = dir.path().join(way);
            let spec = ImageSpec::new(number, 64, 9600).mapping(Mapped::Percent(50));
            spec.write(&path)?;
            let options = ["--direct", "--transport", way];
            let mounted = Mounted::new(dir.path(), &path, &options)?;
            let model = Model::of(&spec);
            let mut shadow = model.read(0, 9600 * 512);
            scribble(&mounted.disk(), &mut shadow, seed, 1500)?;
            mounted.umount()?;
            expect_shadow(&path, &shadow)?;
            support::expect_clean(&path)?;
        }
    }
    Ok(())
}

fn verify(way: &str) -> Outcome {
    if way == "uring" {
        rings::on()?;
    }
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, load::SECTORS).write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &["--direct", "--transport", way])?;
    let device = Loop::new(&mounted.disk())?;
    load::fio(dir.path(), device.dev(), 48, 5)?;
    expect_way(&mounted, way)?;
    device.detach()?;
    mounted.umount()?;
    support::expect_clean(&path)
}

/// Rings carry out what lies in one piece, which much of this load does.
fn expect_way(mounted: &Mounted, way: &str) -> Outcome {
    let stats = mounted.json("stats.json")?;
    let count = |name: &str| stats[name].as_u64().unwrap_or(0);
    let (all, moved) = (count("reads") + count("writes"), count("ring_io_requests"));
    ensure!(
        if way == "uring" {
            4 * moved > all
        } else {
            moved == 0
        },
        "{way}: {moved} of {all} requests were carried out by rings: {stats}"
    );
    Ok(())
}

/// Ends a mount while rings carry requests out, in each of the ways that there are. What is closed
/// waits for them, and comes to an end; the image of a daemon that was killed is as good.
fn end_under_load() -> Outcome {
    rings::on()?;
    for way in ["kill -9 $2", "umount -f -l $1", "umount -l $1"] {
        let dir = scratch()?;
        let path = dir.path().join("a.hds");
        let spec = ImageSpec::new(2, 2048, 64 << 11).mapping(Mapped::All);
        spec.write(&path)?;
        let options = ["--direct", "--transport", "uring"];
        let mounted = Mounted::new(dir.path(), &path, &options)?;
        let mut load = command::new("fio");
        load.args([
            "--name=load",
            "--rw=randrw",
            "--bsrange=4k-256k",
            "--direct=1",
        ]);
        load.args([
            "--ioengine=libaio",
            "--iodepth=8",
            "--numjobs=2",
            "--thread",
            "--time_based",
        ]);
        load.args(["--runtime=60", "--max_latency=60s", "--filename"]);
        let log = fs::File::create(dir.path().join("fio.log"))?;
        load.arg(mounted.disk())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut load = load.spawn()?;
        let done = command::eventually(Duration::from_secs(30), || {
            let stats = mounted.json("stats.json")?;
            ensure!(stats["ring_io_requests"].as_u64() > Some(500), "{stats}");
            Ok(())
        });
        let pid = mounted.pid().to_string();
        let ended = command::ok(&mut command::sh(way, &[text(mounted.path()), &pid]));
        if way == "umount -l $1" {
            // Nobody ends it but who uses it.
            load.kill()?;
        }
        let gone = mounted.gone(Duration::from_secs(30));
        let _ = load.kill();
        load.wait()?;
        done?;
        ended?;
        gone.with_context(|| way.to_owned())?;
        drop(mounted);
        if way.starts_with("umount") {
            support::expect_clean(&path)?;
        }
        // All of it can be read and closed again.
        let mounted = Mounted::new(dir.path(), &path, &options)?;
        support::sha256(&mounted.disk())?;
        mounted.umount()?;
        support::expect_clean(&path)?;
    }
    Ok(())
}

/// Where the host does not say what it takes, blocks are as large as anywhere.
fn refused() -> Outcome {
    let dir = scratch_tmpfs()?;
    let path = dir.path().join("a.raw");
    fs::File::create(&path)?.set_len(3907 * 512)?;
    let before = support::fingerprint(&path)?;
    for option in [["--direct"].as_slice(), &["-o", "direct"]] {
        let options = [&["--format", "raw"], option].concat();
        let done = Mounted::refused(dir.path(), &path, &options)?;
        // Hosts of old have no direct I/O there at all.
        done.expect_words(&["a.raw", "leave out --direct"])?;
    }
    ensure!(
        before == support::fingerprint(&path)?,
        "a refused mount changed the image"
    );
    Ok(())
}
