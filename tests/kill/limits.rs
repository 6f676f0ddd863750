//! What a kill may cost: space that nothing maps, and the time of the next open.
//!
//! Imports: `subject`, `forge`, `support`; std, `anyhow`, `nix`.
//! Never: fails because one open of many was slow: hosts are. The fastest must keep the promise.

use super::subject::{Extent, Made};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Model, mix};
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::Mounted;
use crate::support::harness::trial;
use crate::support::probe::Need::Fuse;
use crate::support::{self, MIB, Outcome, command, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("leaks_are_bounded_and_reclaimed", &[Fuse], leaks),
        trial("a_killed_disk_of_64_gib_opens", &[Fuse], opens_64_gib),
        trial("mounts_at_once_after_a_kill", &[Fuse], mounts_at_once),
    ]
}

const CLUSTER: u64 = 64 << 10;
const STEP: u64 = 4 * MIB;

fn fill(file: &File, from: u64, to: u64) -> Result<()> {
    for at in (from..to).step_by(MIB as usize) {
        file.write_all_at(&[0x5a; MIB as usize], at)?;
    }
    Ok(())
}

fn punch(file: &File, from: u64, to: u64) -> Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, mode, from as i64, (to - from) as i64)?;
    Ok(())
}

fn die(mounted: &Mounted) -> Result<()> {
    mounted.signal(Signal::SIGKILL)?;
    mounted.gone(Duration::from_secs(20))
}

/// Written, of which half is discarded and flushed; then more is discarded and more is written
/// without a flush; then the kill.
fn leaks() -> Outcome {
    for version in [1, 2] {
        let dir = scratch()?;
        let image = dir.path().join("a.hds");
        let spec = ImageSpec::new(version, 128, 96 << 11);
        spec.write(&image)?;
        let options = ["--flush-interval=0", "--grow-step=4M"];
        let mounted = Mounted::new(dir.path(), &image, &options)?;
        let file = OpenOptions::new().write(true).open(mounted.disk())?;
        fill(&file, 0, 32 * MIB)?;
        file.sync_all()?;
        punch(&file, 4 * MIB, 20 * MIB)?;
        file.sync_all()?;
        command::eventually(Duration::from_secs(60), || {
            let waiting = mounted.json("stats.json")?["clusters_quarantined"].as_u64();
            ensure!(waiting == Some(0), "{waiting:?} clusters in quarantine");
            Ok(())
        })?;
        let discarded = 4 * MIB;
        punch(&file, 24 * MIB, 24 * MIB + discarded)?;
        let unflushed = 18 * MIB;
        fill(&file, 40 * MIB, 40 * MIB + unflushed)?;
        drop(file);
        die(&mounted)?;
        drop(mounted);
        let extent = Extent::of(&image)?;
        // What was freed and punched takes no space; it is used again before the file grows.
        let freed = 16 * MIB;
        let room = |bytes: u64| bytes.div_ceil(CLUSTER);
        let most = room(freed.max(unflushed) + STEP + discarded);
        ensure!(extent.leaked() <= most, "more than {most}: {extent:?}");
        let taken = (extent.table + extent.mapped + room(unflushed + STEP)) * CLUSTER + MIB;
        ensure!(extent.taken <= taken, "more than {taken}: {extent:?}");
        eprintln!("killed image of version {version}: {extent:?}");
        Mounted::new(dir.path(), &image, &options)?.umount()?;
        let made = Made::single(image, Model::of(&spec));
        made.expect_closed()?;
        let mapped = Extent::of(&made.image)?.mapped * CLUSTER;
        ensure!(mapped <= 16 * MIB, "{mapped} bytes mapped at the end");
    }
    Ok(())
}

/// 64 GiB with every cluster mapped, in clusters of 1 MiB and 64 KiB, and a chain of four.
fn opens_64_gib() -> Outcome {
    let dir = scratch()?;
    let sectors = 64 << 21;
    let spec = |cluster| {
        let mut spec = ImageSpec::new(2, cluster, sectors).mapping(Mapped::All);
        spec.no_data = true;
        spec
    };
    let large = dir.path().join("large.hds");
    spec(2048).write(&large)?;
    times("clusters of 1 MiB", dir.path(), &large, &large)?;
    fs::remove_file(&large)?;
    let small = dir.path().join("small.hds");
    spec(128).write(&small)?;
    times("clusters of 64 KiB", dir.path(), &small, &small)?;
    fs::remove_file(&small)?;
    let chain = BundleSpec::chain(Style::Ploop, &spec(128), 4, |_, _| {});
    let path = dir.path().join("chain.hdd");
    chain.write(&path)?;
    let top = chain.files(&path, 0).pop().context("no top")?;
    times("four levels of 64 KiB clusters", dir.path(), &path, &top)
}

/// Kills the daemon over an image again and again, and tells how long each next open took.
fn times(what: &str, dir: &Path, image: &Path, top: &Path) -> Outcome {
    let mut took = Vec::new();
    let place = |round: u64| mix(&[round]) % (64 << 20) * 1024;
    for round in 0..6 {
        let begun = Instant::now();
        let mounted = Mounted::new(dir, image, &[])?;
        if round > 0 {
            took.push(begun.elapsed().as_millis());
        }
        for earlier in 0..round {
            let found = support::read_at(&mounted.disk(), place(earlier), 1024)?;
            ensure!(
                found == [earlier as u8 + 1; 1024],
                "{what}: {earlier} is lost"
            );
        }
        let file = OpenOptions::new().write(true).open(mounted.disk())?;
        file.write_all_at(&[round as u8 + 1; 1024], place(round))?;
        file.sync_all()?;
        drop(file);
        die(&mounted)?;
        drop(mounted);
        let mark = support::mark_of(top)?;
        ensure!(
            mark == crate::forge::image::IN_USE,
            "{what}: mark {mark:#x}"
        );
    }
    eprintln!("64 GiB, {what}: opened again after a kill in {took:?} ms");
    let least = took.iter().min().context("no open after a kill")?;
    ensure!(
        *least < 1000,
        "{what}: no open in less than a second: {took:?}"
    );
    Mounted::new(dir, image, &[])?.umount()?;
    ensure!(support::mark_of(top)? == 0, "{what}: the mark stayed");
    Ok(())
}

/// The next mount does not wait until the dead one is cleared away: the image is free as soon as
/// the daemon is gone, whatever still uses the old mount.
fn mounts_at_once() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 128, 32 << 11).write(&image)?;
    let places = [dir.path().join("mnt0"), dir.path().join("mnt1")];
    for place in &places {
        fs::create_dir(place)?;
    }
    let mut held: Option<(Mounted, File)> = None;
    for round in 0..16 {
        let place = &places[round % 2];
        let mounted = Mounted::at(place, &image, &[])?;
        // Only now the one before goes: a file in it was open all the time.
        drop(held.take());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mounted.disk())?;
        let mut found = [0; 1024];
        file.read_exact_at(&mut found, 512)?;
        ensure!(
            found == [round as u8; 1024],
            "round {round} shows {}",
            found[0]
        );
        file.write_all_at(&[round as u8 + 1; 1024], 512)?;
        file.sync_all()?;
        fill(&file, MIB, 4 * MIB)?;
        mounted.signal(Signal::SIGKILL)?;
        held = Some((mounted, file));
    }
    drop(held);
    Mounted::at(&places[0], &image, &[])?.umount()?;
    support::expect_clean(&image)
}
