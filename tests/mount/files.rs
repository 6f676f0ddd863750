//! The flat file behaves as a file that a loop device can sit on.

use super::disks::{expect_shadow, scribble};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{FsMount, Loop, Mounted};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, E2fsprogs, Fuse};
use crate::support::{self, MIB, Outcome, command, expect_flat, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("file_mountpoint", &[Fuse], file_mountpoint),
        trial("sizes_tell_the_cluster", &[Fuse], sizes_tell_the_cluster),
        trial(
            "loop_discards_whole_clusters",
            &[Fuse, Need::Root, Need::Loop],
            loop_granularity,
        ),
        trial(
            "seek_answers_from_the_map",
            &[Fuse],
            seek_answers_from_the_map,
        ),
        trial(
            "punched_ranges_read_as_zeros",
            &[Fuse],
            punched_ranges_read_as_zeros,
        ),
        trial(
            "other_fallocate_modes_are_refused",
            &[Fuse],
            other_modes_are_refused,
        ),
        trial("size_never_changes", &[Fuse], size_never_changes),
        trial("read_only_is_erofs", &[Fuse], read_only_is_erofs),
        trial(
            "directory_holds_what_is_promised",
            &[Fuse],
            directory_holds_what_is_promised,
        ),
        trial("partitions_as_files", &[Fuse], partitions_as_files),
        trial(
            "zeros_to_a_hole_allocate_nothing",
            &[Fuse],
            zeros_allocate_nothing,
        ),
        trial(
            "fstrim_on_a_chain_takes_no_space",
            &[Fuse, Need::Root, Need::Loop, E2fsprogs],
            fstrim_on_a_chain_takes_no_space,
        ),
    ]
}

/// `lseek` with a way to look; `None` where nothing of it follows.
pub(crate) fn seek(path: &Path, at: u64, whence: Whence) -> Result<Option<u64>> {
    let file = File::open(path)?;
    match lseek(&file, i64::try_from(at)?, whence) {
        Ok(found) => Ok(Some(u64::try_from(found)?)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno).with_context(|| format!("lseek to {at}")),
    }
}

fn file_mountpoint() -> Outcome {
    let dir = scratch()?;
    let spec = ImageSpec::new(1, 64, 9001).mapping(Mapped::Percent(50));
    let image = dir.path().join("a.hds");
    spec.write(&image)?;
    let at = dir.path().join("flat");
    fs::write(&at, b"covered")?;
    let mounted = Mounted::at(&at, &image, &[])?;
    ensure!(
        fs::metadata(&at)?.is_file(),
        "the disk mounted over a file is a file"
    );
    expect_flat(&at, &Model::of(&spec))?;
    let mut shadow = Model::of(&spec).read(0, 9001 * 512);
    scribble(&at, &mut shadow, 5, 50)?;
    mounted.umount()?;
    ensure!(fs::read(&at)? == b"covered", "the file below is back");
    expect_shadow(&image, &shadow)?;
    // Mounted over itself, as other programs do it.
    let mounted = Mounted::at(&image, &image, &["-r"])?;
    ensure!(
        fs::metadata(&image)?.len() == 9001 * 512,
        "the image shows itself, not the disk"
    );
    ensure!(
        support::read_at(&image, 0, shadow.len())? == shadow,
        "other bytes over itself"
    );
    mounted.umount()
}

fn sizes_tell_the_cluster() -> Outcome {
    let dir = scratch()?;
    for cluster in [64_u32, 2048] {
        let spec = ImageSpec::new(2, cluster, 100_003).mapping(Mapped::Every { step: 5, phase: 1 });
        let image = dir.path().join(format!("{cluster}.hds"));
        spec.write(&image)?;
        let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
        let at = mounted.disk();
        let stat = nix::sys::statfs::statfs(&at)?;
        let block = u64::try_from(stat.block_size())?;
        ensure!(block == u64::from(cluster) * 512, "f_bsize is {block}");
        let meta = fs::metadata(&at)?;
        ensure!(meta.len() == 100_003 * 512, "size {}", meta.len());
        let allocated = meta.blocks() * 512;
        let file = fs::metadata(&image)?.len();
        ensure!(
            allocated > 0 && allocated <= file + 65536,
            "st_blocks tells {allocated} bytes"
        );
        mounted.umount()?;
    }
    Ok(())
}

fn loop_granularity() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 204_800).write(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    let device = Loop::new(&mounted.disk())?;
    let granularity = device.queue("discard_granularity")?;
    ensure!(
        granularity == "1048576",
        "discard_granularity is {granularity}"
    );
    device.detach()?;
    mounted.umount()
}

fn seek_answers_from_the_map() -> Outcome {
    let dir = scratch()?;
    let cluster = 64 * 512;
    // Data in clusters 2, 3 and 9 of 12; scattered in the file, so only the map can tell.
    let spec = ImageSpec::new(2, 64, 64 * 12).mapping(Mapped::List(vec![9, 3, 2]));
    let image = dir.path().join("a.hds");
    spec.write(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
    let disk = mounted.disk();
    for (at, data, hole) in [
        (0, Some(2 * cluster), Some(0)),
        (cluster + 5, Some(2 * cluster), Some(cluster + 5)),
        (2 * cluster, Some(2 * cluster), Some(4 * cluster)),
        (3 * cluster + 7, Some(3 * cluster + 7), Some(4 * cluster)),
        (4 * cluster, Some(9 * cluster), Some(4 * cluster)),
        (9 * cluster, Some(9 * cluster), Some(10 * cluster)),
        (10 * cluster, None, Some(10 * cluster)),
        (12 * cluster - 1, None, Some(12 * cluster - 1)),
        (12 * cluster, None, None),
    ] {
        let found = (
            seek(&disk, at, Whence::SeekData)?,
            seek(&disk, at, Whence::SeekHole)?,
        );
        ensure!(
            found == (data, hole),
            "from {at}: {found:?}, not {:?}",
            (data, hole)
        );
    }
    mounted.umount()
}

fn punched_ranges_read_as_zeros() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 64 * 200).mapping(Mapped::Percent(50));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for depth in [1, 3] {
        let spec = BundleSpec::chain(Style::Ploop, &like, depth, |_, _| {});
        let path = dir.path().join(format!("{depth}.hdd"));
        spec.write(&path)?;
        let total = 64 * 200 * 512_usize;
        let mut shadow = spec.model().read(0, total);
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mounted.disk())?;
        let mut state = 40 + depth as u64;
        for round in 0..60_usize {
            let mode = if round % 2 == 0 { punch } else { zero };
            let random = |state: &mut u64| crate::forge::content::splitmix(state) as usize;
            let len = 1 + random(&mut state) % (700 << (round % 10));
            let at = random(&mut state) % (total - len);
            fallocate(&file, mode, i64::try_from(at)?, i64::try_from(len)?)
                .with_context(|| format!("mode {mode:?} at {at}, {len} bytes"))?;
            shadow[at..at + len].fill(0);
            // A write in between makes a cluster come back from the free ones.
            let (at, len) = (random(&mut state) % (total - 9000), 9000);
            let bytes = vec![round as u8 + 1; len];
            shadow[at..at + len].copy_from_slice(&bytes);
            file.write_all_at(&bytes, at as u64)?;
        }
        file.sync_all()?;
        let shown = support::read_at(&mounted.disk(), 0, total)?;
        let difference = crate::forge::content::first_difference(0, &shadow, &shown);
        ensure!(
            difference.is_none(),
            "{depth} deep: {}",
            difference.unwrap_or_default()
        );
        drop(file);
        mounted.umount()?;
        expect_shadow(&path, &shadow)?;
        support::expect_clean(&spec.files(&path, 0)[depth - 1])?;
    }
    Ok(())
}

fn other_modes_are_refused() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 6400)
        .mapping(Mapped::All)
        .write(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    for mode in [
        FallocateFlags::empty(),
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
        FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
        FallocateFlags::FALLOC_FL_INSERT_RANGE,
    ] {
        let answer = fallocate(&file, mode, 0, 65536);
        ensure!(
            answer == Err(Errno::EOPNOTSUPP),
            "mode {mode:?}: {answer:?}"
        );
    }
    drop(file);
    mounted.umount()
}

fn size_never_changes() -> Outcome {
    let dir = scratch()?;
    let spec = ImageSpec::new(2, 64, 6401).mapping(Mapped::Percent(50));
    let image = dir.path().join("a.hds");
    spec.write(&image)?;
    let size = 6401 * 512;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    for len in [0, 512, size - 1, size + 1, 1 << 40] {
        ensure!(
            file.set_len(len).is_err(),
            "truncation to {len} was accepted"
        );
    }
    ensure!(
        file.write_all_at(b"past", size).is_err(),
        "a write past the end was accepted"
    );
    // Shell redirections truncate; what cannot be done must not be half done.
    let truncated = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(mounted.disk());
    ensure!(truncated.is_err(), "O_TRUNC was accepted");
    drop(file);
    expect_flat(&mounted.disk(), &Model::of(&spec))?;
    mounted.umount()
}

fn read_only_is_erofs() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(1, 64, 6400)
        .mapping(Mapped::All)
        .write(&image)?;
    let before = support::fingerprint(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(mounted.disk());
    let errno = opened.err().and_then(|error| error.raw_os_error());
    ensure!(
        errno == Some(Errno::EROFS as i32),
        "O_RDWR gave errno {errno:?}"
    );
    mounted.umount()?;
    ensure!(
        before == support::fingerprint(&image)?,
        "-r changed the image"
    );
    Ok(())
}

fn directory_holds_what_is_promised() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 6400)
        .mapping(Mapped::Percent(50))
        .write(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    let info = mounted.json("info.json")?;
    ensure!(info.is_object(), "info.json is {info}");
    ensure!(
        info.to_string().contains(&mounted.pid().to_string()),
        "no pid in {info}"
    );
    let before = mounted.json("stats.json")?;
    support::read_at(&mounted.disk(), 0, 65536)?;
    let after = mounted.json("stats.json")?;
    ensure!(before != after, "stats.json does not move: {after}");
    for name in ["disk.img", "info.json", "stats.json"] {
        let path = mounted.path().join(name);
        ensure!(fs::metadata(&path)?.is_file(), "{name} is no file");
        if name != "disk.img" {
            ensure!(
                OpenOptions::new().write(true).open(&path).is_err(),
                "{name} is writable"
            );
        }
    }
    ensure!(
        fs::write(mounted.path().join("new"), b"x").is_err(),
        "a new file was accepted"
    );
    ensure!(
        fs::remove_file(mounted.disk()).is_err(),
        "disk.img could be removed"
    );
    let types = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(
        types.contains("fuse.ploopfs"),
        "the type is not fuse.ploopfs"
    );
    mounted.umount()
}

fn partitions_as_files() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 64, 65_536).write(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    // An MBR with two primary partitions, by hand: type 0x83, start and length in sectors.
    let mut sector = [0; 512];
    for (slot, (start, len)) in [(2048_u32, 4096_u32), (8192, 1000)].into_iter().enumerate() {
        let at = 446 + 16 * slot;
        sector[at + 4] = 0x83;
        sector[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        sector[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    file.write_all_at(&sector, 0)?;
    file.write_all_at(b"first", 2048 * 512)?;
    file.write_all_at(b"second", 8192 * 512)?;
    drop(file);
    mounted.umount()?;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    for (name, len, word) in [
        ("part1.img", 4096, &b"first"[..]),
        ("part2.img", 1000, b"second"),
    ] {
        let path = mounted.path().join(name);
        ensure!(
            fs::metadata(&path)?.len() == len * 512,
            "{name} has another size"
        );
        ensure!(
            support::read_at(&path, 0, word.len())? == word,
            "{name} starts elsewhere"
        );
        ensure!(
            OpenOptions::new().write(true).open(&path).is_err(),
            "{name} is writable"
        );
    }
    ensure!(
        !mounted.path().join("part3.img").exists(),
        "a third partition"
    );
    mounted.umount()
}

fn zeros_allocate_nothing() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 204_800).write(&image)?;
    let before = fs::metadata(&image)?.len();
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    for at in 0..90 {
        file.write_all_at(&vec![0; MIB as usize], at * MIB + 777)?;
    }
    file.sync_all()?;
    drop(file);
    mounted.umount()?;
    ensure!(
        fs::metadata(&image)?.len() == before,
        "zeros made the file grow"
    );
    let flags = support::read_at(&image, 52, 4)?;
    ensure!(
        flags[0] & 1 == 1,
        "nothing is mapped, so the flag Empty must stay set"
    );
    Ok(())
}

fn fstrim_on_a_chain_takes_no_space() -> Outcome {
    let dir = scratch()?;
    // The base holds a file system full of data; the top is a new snapshot over it.
    let base = dir.path().join("root.hds");
    ImageSpec::new(2, 2048, 1 << 21).write(&base)?;
    let mounted = Mounted::new(dir.path(), &base, &[])?;
    let device = Loop::new(&mounted.disk())?;
    command::ok(
        command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(device.dev()),
    )?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    fs::write(system.path().join("big"), vec![0x5a; 400 << 20])?;
    system.umount()?;
    device.detach()?;
    mounted.umount()?;
    let top = dir.path().join("top.hds");
    ImageSpec::new(2, 2048, 1 << 21).write(&top)?;
    let lower = base.display().to_string();
    let mounted = Mounted::new(dir.path(), &top, &["--lower", &lower])?;
    let device = Loop::new(&mounted.disk())?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    ensure!(
        fs::metadata(system.path().join("big"))?.len() == 400 << 20,
        "the file is there"
    );
    fs::remove_file(system.path().join("big"))?;
    command::ok(command::new("sync").arg("-f").arg(system.path()))?;
    let before = support::host_bytes(&top)?;
    let said = command::ok(command::new("fstrim").arg("-v").arg(system.path()))?;
    ensure!(!said.contains(" 0 B "), "nothing was trimmed: {said}");
    system.umount()?;
    device.detach()?;
    mounted.umount()?;
    let after = support::host_bytes(&top)?;
    // BAT pages, and the edges of clusters that the file shared with live data.
    let allowed = before + 24 * MIB;
    ensure!(
        after <= allowed,
        "masking {said} took {} MiB",
        (after - before) / MIB
    );
    support::expect_clean(&top)?;
    let mounted = Mounted::new(dir.path(), &top, &["-r", "--lower", &lower])?;
    command::ok(command::new("e2fsck").arg("-fn").arg(mounted.disk()))?;
    mounted.umount()
}
