//! A real file system with many files on a loop device, and what other programs say of the image.

use crate::forge::content;
use crate::forge::image::ImageSpec;
use crate::support::guards::{FsMount, Loop, Mounted};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, E2fsprogs, Fuse, Ploop, Qemu};
use crate::support::{self, MIB, Outcome, command, scratch, scratch_tmpfs};
use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

const NEEDS: &[Need] = &[Fuse, Need::Root, Need::Loop, E2fsprogs, Qemu];
const PLOOP_NEEDS: &[Need] = &[Fuse, Need::Root, Need::Loop, E2fsprogs, Ploop];
/// Small files, spread over directories of a hundred.
const FILES: u64 = 20_000;
/// Large files of 128 MiB; every second one is deleted again.
const LARGE: u64 = 10;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "ext4_tree_on_a_qemu_image",
            NEEDS,
            ext4_tree_on_a_qemu_image,
        ),
        trial("ext4_tree_on_a_v1_image", NEEDS, ext4_tree_on_a_v1_image),
        trial("ploop_check_agrees", PLOOP_NEEDS, ploop_check_agrees),
    ]
}

fn small(number: u64) -> Vec<u8> {
    let len = content::mix(&[number, 1]) % 6000;
    let mut state = number;
    (0..len)
        .map(|_| content::splitmix(&mut state) as u8)
        .collect()
}

fn small_path(root: &Path, number: u64) -> std::path::PathBuf {
    root.join(format!("d{}/f{number}", number / 100))
}

/// One mebibyte of a large file.
fn large(number: u64, mib: u64) -> Vec<u8> {
    let words = content::mix(&[number, mib]).to_le_bytes();
    words.iter().copied().cycle().take(MIB as usize).collect()
}

fn fill(root: &Path) -> Outcome {
    for number in 0..FILES {
        let path = small_path(root, number);
        if number % 100 == 0 {
            fs::create_dir(root.join(format!("d{}", number / 100)))?;
        }
        fs::write(path, small(number))?;
    }
    for number in 0..LARGE {
        let mut file = File::create(root.join(format!("large{number}")))?;
        for mib in 0..128 {
            file.write_all(&large(number, mib))?;
        }
    }
    command::ok(command::new("sync").arg("-f").arg(root))?;
    Ok(())
}

fn verify(root: &Path) -> Outcome {
    for number in 0..FILES {
        let found = fs::read(small_path(root, number))?;
        ensure!(
            found == small(number),
            "small file {number} holds other bytes"
        );
    }
    for number in (1..LARGE).step_by(2) {
        let path = root.join(format!("large{number}"));
        for mib in 0..128 {
            let found = support::read_at(&path, mib * MIB, MIB as usize)?;
            ensure!(
                found == large(number, mib),
                "MiB {mib} of large file {number} differs"
            );
        }
    }
    Ok(())
}

fn tree(image: &Path, dir: &Path) -> Outcome {
    let mounted = Mounted::new(dir, image, &[])?;
    let device = Loop::new(&mounted.disk())?;
    command::ok(
        command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(device.dev()),
    )?;
    let system = FsMount::new(device.dev(), &dir.join("fs"))?;
    fill(system.path())?;
    let full = support::host_bytes(image)?;
    for number in (0..LARGE).step_by(2) {
        fs::remove_file(system.path().join(format!("large{number}")))?;
    }
    command::ok(command::new("sync").arg("-f").arg(system.path()))?;
    command::ok(command::new("fstrim").arg("-v").arg(system.path()))?;
    system.umount()?;
    device.detach()?;
    mounted.umount()?;

    support::expect_clean(image)?;
    let trimmed = support::host_bytes(image)?;
    // 640 MiB were deleted in whole clusters, but for the edges of their extents.
    ensure!(
        trimmed + 600 * MIB <= full,
        "fstrim freed too little: {} MiB, then {} MiB",
        full / MIB,
        trimmed / MIB
    );
    command::ok(
        command::new("qemu-img")
            .args(["check", "-f", "parallels"])
            .arg(image),
    )?;

    let mounted = Mounted::new(dir, image, &["-r"])?;
    command::ok(command::new("e2fsck").arg("-fn").arg(mounted.disk()))?;
    let mut compare = command::new("qemu-img");
    compare
        .args(["compare", "-f", "parallels", "-F", "raw"])
        .arg(image)
        .arg(mounted.disk());
    command::ok(&mut compare)?;
    let device = Loop::with(&mounted.disk(), &["-r"])?;
    let system = FsMount::with(device.dev(), &dir.join("fs"), &["-o", "ro"])?;
    verify(system.path())?;
    system.umount()?;
    device.detach()?;
    mounted.umount()
}

fn ext4_tree_on_a_qemu_image() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("q.hds");
    let create = ["create", "-q", "-f", "parallels"];
    command::ok(command::new("qemu-img").args(create).arg(&image).arg("4G"))?;
    tree(&image, dir.path())
}

fn ext4_tree_on_a_v1_image() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("v1.hds");
    ImageSpec::new(1, 2048, 4 << 21).write(&image)?;
    tree(&image, dir.path())
}

/// Debian's ploop writes even when asked not to, so the bytes must be compared as well; on ext4 it
/// calls every partly written cluster sparse, hence a copy in memory.
fn ploop_check(image: &Path) -> Outcome {
    let memory = scratch_tmpfs()?;
    let copy = memory.path().join("copy.hds");
    command::ok(
        command::new("cp")
            .arg("--sparse=never")
            .arg(image)
            .arg(&copy),
    )?;
    let before = support::sha256(&copy)?;
    let mut command = command::new("ploop");
    // It is found in sbin, and it crashes with a small environment.
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("PLOOP_PADDING", "x".repeat(8192));
    let done = command::run(command.args(["check", "-f", "-c", "-r"]).arg(&copy))?;
    let done = done.expect_code(0)?;
    ensure!(
        before == support::sha256(&copy)?,
        "ploop changed the copy: {}",
        done.story()
    );
    Ok(())
}

fn ploop_check_agrees() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        let image = dir.path().join(format!("{version}.hds"));
        ImageSpec::new(version, 2048, 1 << 20).write(&image)?;
        let mounted = Mounted::new(dir.path(), &image, &[])?;
        let device = Loop::new(&mounted.disk())?;
        command::ok(
            command::new("mkfs.ext4")
                .args(["-q", "-F"])
                .arg(device.dev()),
        )?;
        let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
        for number in 0..100_u8 {
            fs::write(
                system.path().join(format!("f{number}")),
                vec![number; 1_300_000],
            )?;
        }
        for number in 20..60_u8 {
            fs::remove_file(system.path().join(format!("f{number}")))?;
        }
        command::ok(command::new("fstrim").arg(system.path()))?;
        system.umount()?;
        device.detach()?;
        mounted.umount()?;
        ploop_check(&image)?;
    }
    // Nothing mapped: the flag Empty must be what ploop expects of such an image.
    let image = dir.path().join("empty.hds");
    ImageSpec::new(2, 2048, 1 << 20).write(&image)?;
    Mounted::new(dir.path(), &image, &[])?.umount()?;
    ploop_check(&image)
}

/// Used by the load tests: a file system that is checked afterwards.
pub(crate) fn small_tree(root: &Path, files: u64) -> Result<()> {
    for number in 0..files {
        if number % 100 == 0 {
            fs::create_dir(root.join(format!("d{}", number / 100)))?;
        }
        fs::write(small_path(root, number), small(number))?;
    }
    command::ok(command::new("sync").arg("-f").arg(root)).map(|_| ())
}
