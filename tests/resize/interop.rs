//! What other programs say of disks of another size, and what is in them.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, Model};
use crate::forge::image::{ImageSpec, Mapped};
use crate::forge::reader::Flat;
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, scratch, scratch_tmpfs};
use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::Path;
use std::process::Command;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("images_keep_their_content", &[], images),
        trial("qemu_agrees", &[Need::Qemu], qemu_agrees),
        trial("ploop_agrees", &[Need::Ploop], ploop_agrees),
        trial("ploop_and_we_grow_in_turn", &[Need::Ploop], in_turn),
        trial("bundles_keep_their_content", &[], bundles),
        trial("a_plain_disk_is_resized", &[], plain),
        trial("huge_disks_grow_at_once", &[], huge),
    ]
}

pub(crate) fn resize(path: &Path, args: &[&str]) -> Result<String> {
    let mut all = vec!["resize", text(path)];
    all.extend(args);
    command::ok(&mut command::ploopfs(&all))
}

/// ploop crashes in a small environment.
fn ploop(args: &[&str], path: &Path) -> Command {
    let mut command = command::new("ploop");
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("PLOOP_PADDING", "x".repeat(8192))
        .args(args)
        .arg(path);
    command
}

/// The disk of a model, and zeros after it.
fn expect_content(path: &Path, model: &Model, bytes: u64) -> Outcome {
    let disk = Flat::open(path)?;
    ensure!(disk.bytes() == bytes, "{} instead of {bytes}", disk.bytes());
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(1 << 20) as usize;
        let mut expected = vec![0; len];
        if at < model.bytes() {
            let there = model.read(at, len.min((model.bytes() - at) as usize));
            expected[..there.len()].copy_from_slice(&there);
        }
        ensure!(disk.read(at, len)? == expected, "other bytes after {at}");
        at += len as u64;
        // What has grown is looked at here and there.
        if at >= model.bytes() + (4 << 20) {
            at += (bytes / 50) >> 20 << 20;
        }
    }
    Ok(())
}

/// Version, sectors of a cluster, sectors of the disk, its next sizes.
const SHAPES: [(u8, u32, u64, [&str; 3]); 4] = [
    (1, 128, 40_000, ["3G", "+4G", "9G"]),
    (2, 128, 40_001, ["3G", "+1M", "20G"]),
    (1, 2048, 100_000, ["300G", "+1", "900G"]),
    (2, 2048, 100_000, ["600G", "+1s", "5T"]),
];

/// Grows an image step by step and back, and lets `judge` see each.
fn each(dir: &Path, judge: impl Fn(&Path, &Model, u64) -> Outcome) -> Outcome {
    for (version, cluster, sectors, sizes) in SHAPES {
        let mut spec = ImageSpec::new(version, cluster, sectors).mapping(Mapped::Percent(60));
        spec.layout = crate::forge::image::Layout::Shuffled(2);
        let path = dir.join("x.hds");
        spec.write(&path)?;
        let model = Model::of(&spec);
        for size in sizes {
            resize(&path, &[size])?;
            command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
            let bytes = Flat::open(&path)?.bytes();
            ensure!(bytes % (u64::from(cluster) * 512) == 0, "{bytes}");
            judge(&path, &model, bytes)?;
        }
        let back = format!("{}s", sectors);
        resize(&path, &["--shrink", "-y", &back])?;
        command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
        let bytes = sectors.next_multiple_of(cluster.into()) * 512;
        judge(&path, &model, bytes)?;
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn images() -> Outcome {
    let dir = scratch_tmpfs()?;
    each(dir.path(), expect_content)
}

fn qemu_agrees() -> Outcome {
    let dir = scratch_tmpfs()?;
    each(dir.path(), |path, model, bytes| {
        let qemu = |args: &[&str]| command::ok(command::new("qemu-img").args(args));
        qemu(&["check", "-q", "-f", "parallels", text(path)])?;
        if bytes > 1 << 40 {
            // It compares none of 5 TiB, not even one of its own making: "Input/output error".
            return Ok(());
        }
        let raw = path.with_file_name("raw");
        fs::write(&raw, model.read(0, model.bytes() as usize))?;
        fs::File::options().write(true).open(&raw)?.set_len(bytes)?;
        let args = ["compare", "-q", "-f", "parallels", "-F", "raw"];
        qemu(&[&args[..], &[text(path), text(&raw)]].concat())?;
        Ok(())
    })
}

/// It writes even when asked not to, so the bytes are compared.
fn expect_ploop(image: &Path) -> Outcome {
    let copy = image.with_extension("copy");
    command::ok(
        command::new("cp")
            .arg("--sparse=always")
            .args([image, &copy]),
    )?;
    let before = support::sha256(&copy)?;
    let done = command::run(&mut ploop(&["check", "-f", "-c", "-r"], &copy))?.expect_code(0)?;
    ensure!(before == support::sha256(&copy)?, "{}", done.story());
    fs::remove_file(&copy)?;
    Ok(())
}

fn ploop_agrees() -> Outcome {
    let dir = scratch_tmpfs()?;
    each(dir.path(), |path, _, _| expect_ploop(path))
}

fn in_turn() -> Outcome {
    let dir = scratch_tmpfs()?;
    for version in [1, 2] {
        let spec = ImageSpec::new(version, 64, 6400).mapping(Mapped::Percent(60));
        let path = dir.path().join(format!("{version}.hds"));
        spec.write(&path)?;
        for size in ["300M", "700M", "900M", "1500M"] {
            let ours = ["700M", "1500M"].contains(&size);
            if ours {
                resize(&path, &[size])?;
            } else {
                command::ok(&mut ploop(&["grow", "-s", size], &path))?;
            }
            command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
            expect_ploop(&path)?;
        }
        expect_content(&path, &Model::of(&spec), 1500 << 20)?;
    }
    Ok(())
}

fn level(version: u8, sectors: u64, percent: u64) -> Level {
    Level::Image(ImageSpec::new(version, 64, sectors).mapping(Mapped::Percent(percent)))
}

fn all_bundles() -> Vec<BundleSpec> {
    let plain = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 5000 * 512,
    };
    let over_plain = vec![plain.clone(), level(2, 6400, 30)];
    let mut split = BundleSpec::new(
        Style::Parallels,
        vec![level(1, 6400, 50), level(1, 6400, 20)],
    );
    split.push_part(vec![level(1, 3200, 50), level(1, 3200, 20)]);
    let chain = vec![level(1, 6000, 40), level(2, 6400, 30), level(2, 6400, 20)];
    vec![
        BundleSpec::new(Style::Ploop, vec![level(2, 6400, 50)]),
        BundleSpec::new(Style::Ploop, chain),
        BundleSpec::new(Style::Ploop, over_plain),
        BundleSpec::new(Style::Parallels, vec![plain]),
        split,
    ]
}

fn bundles() -> Outcome {
    let dir = scratch()?;
    for (number, spec) in all_bundles().iter().enumerate() {
        let path = dir.path().join(format!("{number}.hdd"));
        spec.write(&path)?;
        let model = spec.model();
        let tops: Vec<_> = (0..spec.parts.len())
            .map(|part| spec.files(&path, part))
            .collect();
        let last = tops
            .last()
            .and_then(|files| files.last())
            .expect("a top")
            .clone();
        let others: Vec<_> = tops
            .iter()
            .flatten()
            .filter(|file| **file != last)
            .collect();
        let before: Result<Vec<_>> = others
            .iter()
            .map(|file| support::fingerprint(file))
            .collect();
        let before = before?;
        for (size, bytes) in [("800M", 800_u64 << 20), ("+8M", 808 << 20)] {
            resize(&path, &[size])?;
            expect_content(&path, &model, bytes)?;
            command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
        }
        let unit = match spec.parts[0].levels.last() {
            Some(Level::Plain { .. }) => 1 << 20,
            _ => 32768,
        };
        let bytes = model.bytes().next_multiple_of(unit);
        let back = bytes.to_string();
        resize(&path, &["--shrink", "-y", &back])?;
        expect_content(&path, &model, bytes)?;
        command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
        for (file, old) in others.iter().zip(before) {
            ensure!(
                support::fingerprint(file)? == old,
                "{} changed",
                file.display()
            );
        }
        let done = resize(&path, &[&back])?;
        ensure!(done.contains("already"), "{done}");
    }
    Ok(())
}

fn plain() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.raw");
    fs::write(&path, [7; 1000])?;
    let args = |size| vec!["--format", "raw", size];
    resize(&path, &args("1M"))?;
    let bytes = fs::read(&path)?;
    ensure!(bytes.len() == 1 << 20 && bytes[..1000] == [7; 1000]);
    ensure!(bytes[1000..].iter().all(|byte| *byte == 0));
    resize(&path, &args("+1000"))?;
    ensure!(fs::metadata(&path)?.len() == (1 << 20) + 1024);
    resize(&path, &[&args("1024")[..], &["--shrink", "-y"]].concat())?;
    ensure!(fs::metadata(&path)?.len() == 1024);
    Ok(())
}

fn huge() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    ImageSpec::new(2, 128, 40_000)
        .mapping(Mapped::Percent(50))
        .write(&path)?;
    let started = std::time::Instant::now();
    resize(&path, &["16T"])?;
    let took = started.elapsed();
    ensure!(took.as_secs() < 20, "{took:?}");
    ensure!(support::host_bytes(&path)? < 200 << 20);
    ensure!(Flat::open(&path)?.bytes() == 16 << 40);
    Ok(())
}
