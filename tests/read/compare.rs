//! `compare` and `checksum`: equal across kinds, different to the byte, and honest about trouble.

use crate::forge::image::{ImageSpec, Mapped};
use crate::kinds::{self, Made};
use crate::support::command::Finished;
use crate::support::guards::text;
use crate::support::{Outcome, command, samples, scratch};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

fn run(args: &[&str], paths: &[&Path]) -> Result<Finished> {
    command::run(command::ploopfs(args).args(paths))
}

/// The disk's bytes as a raw file.
fn raw_of(made: &Made, dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::write(
        &path,
        made.model.read(0, usize::try_from(made.model.bytes())?),
    )?;
    Ok(path)
}

fn flip(path: &Path, at: u64) -> Outcome {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x10], at)?;
    Ok(())
}

pub(crate) fn equal_disks_are_equal_and_a_byte_is_found() -> Outcome {
    let dir = scratch()?;
    let mut all = kinds::images(dir.path())?;
    all.extend(kinds::bundles(dir.path())?);
    for (number, made) in all.iter().enumerate() {
        let raw = raw_of(made, dir.path(), "copy.raw")?;
        run(&["compare"], &[&made.path, &raw])?.expect_code(0)?;
        run(&["compare", "--strict"], &[&raw, &made.path])?.expect_code(0)?;
        let len = fs::metadata(&raw)?.len();
        let at = [0, len - 1, len / 2, len / 3 + 511][number % 4];
        flip(&raw, at)?;
        let told = run(&["compare", "--json"], &[&made.path, &raw])?.expect_code(1)?;
        let told: Value = serde_json::from_str(&told.text())?;
        ensure!(
            told["equal"] == false && told["first_difference"] == at,
            "{told}, not {at}"
        );
        let said = run(&["compare"], &[&raw, &made.path])?.expect_code(1)?;
        ensure!(
            said.text()
                .contains(&format!("at byte {at} (sector {})", at / 512))
        );
        let silent = run(&["compare", "-q"], &[&raw, &made.path])?.expect_code(1)?;
        ensure!(
            silent.stdout.is_empty() && silent.stderr.is_empty(),
            "{}",
            silent.story()
        );
    }
    Ok(())
}

pub(crate) fn sizes_are_compared_as_qemu_does() -> Outcome {
    let dir = scratch()?;
    let (a, b) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    fs::write(&a, vec![5; 8192])?;
    for (tail, code, strict) in [(vec![0; 4096], 0, 1), (vec![9; 4096], 1, 1), (vec![], 0, 0)] {
        fs::write(&b, [vec![5; 8192], tail.clone()].concat())?;
        for pair in [[&*a, &*b], [&*b, &*a]] {
            let said = run(&["compare"], &pair)?.expect_code(code)?;
            let differ = !tail.is_empty();
            ensure!(
                said.text().contains("sizes differ") == differ,
                "{}",
                said.story()
            );
            run(&["compare", "--strict"], &pair)?.expect_code(strict)?;
            let mut theirs = command::new("qemu-img");
            theirs
                .args(["compare", "-f", "raw", "-F", "raw"])
                .args(pair);
            command::run(&mut theirs)?.expect_code(code)?;
        }
    }
    Ok(())
}

pub(crate) fn trouble_is_no_difference() -> Outcome {
    let dir = scratch()?;
    let (good, bad) = (dir.path().join("good.hds"), dir.path().join("bad.hds"));
    let spec = ImageSpec::new(2, 64, 4096).mapping(Mapped::All);
    spec.write(&good)?;
    spec.write(&bad)?;
    File::options()
        .write(true)
        .open(&bad)?
        .write_all_at(&[0xff; 4], 64 + 4 * 31)?;
    run(&["compare"], &[&good, &bad])?
        .expect_code(2)?
        .expect_words(&["corrupt"])?;
    for args in [&["compare"][..], &["compare", "--bogus"], &["checksum"]] {
        run(args, &[])?.expect_code(2)?;
    }
    let none = dir.path().join("none");
    for pair in [[&*good, &*none], [&*none, &*good]] {
        run(&["compare"], &pair)?
            .expect_code(2)?
            .expect_words(&["none", "missing"])?;
    }
    run(&["checksum"], &[&none])?.expect_code(2)?;
    run(&["checksum"], &[&bad])?.expect_code(2)?;
    let raw = dir.path().join("disk.raw");
    fs::write(&raw, [1; 512])?;
    run(&["map", "--snapshot", "latest"], &[&raw])?
        .expect_code(1)?
        .expect_words(&["--snapshot", "raw", "nothing was changed"])?;
    run(&["map", "--format", "hds"], &[&raw])?
        .expect_code(1)?
        .expect_words(&["neither magic"])?;
    run(&["map"], &[&none])?.expect_code(1)?;
    run(&["measure"], &[&none])?.expect_code(1)?;
    Ok(())
}

pub(crate) fn the_partition_of_a_difference_is_named() -> Outcome {
    let dir = scratch()?;
    let (raw, image) = (dir.path().join("a.raw"), dir.path().join("a.hds"));
    let mut bytes = vec![0; 4 << 20];
    // A Linux partition of 4096 sectors from sector 2048 on.
    let entry = [0_u8, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0];
    bytes[446..462].copy_from_slice(&entry);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&raw, bytes)?;
    let mut convert = command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "parallels"]);
    command::ok(convert.arg(&raw).arg(&image))?;
    for (at, partition) in [(3 << 20, None), (2048 * 512 + 700, Some(1))] {
        flip(&raw, at)?;
        let told = run(&["compare", "--json"], &[&raw, &image])?.expect_code(1)?;
        let told: Value = serde_json::from_str(&told.text())?;
        ensure!(told["partition"].as_u64() == partition, "{told}");
        let said = run(&["compare"], &[&raw, &image])?.text();
        ensure!(
            said.contains("byte 700 of partition 1") == partition.is_some(),
            "{said}"
        );
    }
    Ok(())
}

pub(crate) fn snapshots_are_compared() -> Outcome {
    let dir = scratch()?;
    let made = kinds::bundles(dir.path())?.swap_remove(1);
    run(&["compare"], &[&made.path, &made.path])?.expect_code(0)?;
    let same = [
        "compare",
        "--snapshot",
        "latest",
        "--other-snapshot",
        "latest",
    ];
    run(&same, &[&made.path, &made.path])?.expect_code(0)?;
    run(&same[..3], &[&made.path, &made.path])?.expect_code(1)?;
    Ok(())
}

pub(crate) fn a_manifest_proves_a_copy_of_any_kind() -> Outcome {
    let dir = scratch()?;
    let mut all = kinds::images(dir.path())?;
    all.extend(kinds::bundles(dir.path())?);
    for made in &all {
        let raw = raw_of(made, dir.path(), "copy.raw")?;
        for json in [
            &["checksum", "--cluster-size", "32k"][..],
            &["--json", "checksum"],
        ] {
            let sums = run(json, &[&made.path])?.expect_code(0)?;
            let manifest = dir.path().join("sums");
            fs::write(&manifest, &sums.stdout)?;
            let verify = ["checksum", "--verify", text(&manifest)];
            for copy in [&made.path, &raw] {
                run(&verify, &[copy])?.expect_code(0)?;
            }
        }
        // The sums do not depend on how the disk is stored.
        let sums = |path| run(&["checksum", "--cluster-size", "32k"], &[path]);
        ensure!(
            sums(&made.path)?.stdout == sums(&raw)?.stdout,
            "{}",
            made.path.display()
        );
    }
    Ok(())
}

pub(crate) fn bit_rot_is_found_and_named() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    let spec = ImageSpec::new(2, 64, 8191).mapping(Mapped::Every { step: 2, phase: 1 });
    spec.write(&path)?;
    let manifest = dir.path().join("sums");
    fs::write(
        &manifest,
        run(&["checksum"], &[&path])?.expect_code(0)?.stdout,
    )?;
    let verify = ["checksum", "--verify", text(&manifest)];
    run(&verify, &[&path])?.expect_code(0)?;
    // Cluster 5 is the third of those that are stored.
    let cluster = 64 * 512;
    flip(&path, cluster * 3 + 77)?;
    let said = run(&verify, &[&path])?.expect_code(1)?.text();
    let range = format!("bytes {} to {}", 5 * cluster, 6 * cluster - 1);
    let place = format!("from byte {} of {}", 3 * cluster, text(&path));
    ensure!(said.contains(&range) && said.contains(&place), "{said}");
    let json = ["checksum", "--json", "--verify", text(&manifest)];
    let told = run(&json, &[&path])?.expect_code(1)?.text();
    let told: Value = serde_json::from_str(&told)?;
    let found = told["differences"].as_array().context("a list")?;
    ensure!(
        found.len() == 1 && found[0]["start"] == 5 * cluster,
        "{told}"
    );
    // What cannot be read differs, and the rest is still looked at.
    File::options()
        .write(true)
        .open(&path)?
        .write_all_at(&[0xff; 4], 64 + 4 * 9)?;
    let said = run(&verify, &[&path])?.expect_code(1)?.text();
    let range = format!("bytes {} to {}", 9 * cluster, 10 * cluster - 1);
    ensure!(
        said.contains(&range) && said.matches("differs: ").count() == 2,
        "{said}"
    );
    Ok(())
}

pub(crate) fn a_spoilt_manifest_is_trouble() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    ImageSpec::new(2, 64, 4096)
        .mapping(Mapped::All)
        .write(&path)?;
    let sums = run(&["checksum"], &[&path])?.expect_code(0)?.stdout;
    let manifest = dir.path().join("sums");
    let verify = ["checksum", "--verify", text(&manifest)];
    for spoilt in [&sums[..sums.len() / 2], b"", b"{}", b"\xff\xfe"] {
        fs::write(&manifest, spoilt)?;
        run(&verify, &[&path])?
            .expect_code(2)?
            .expect_words(&["bad manifest", "make it anew"])?;
    }
    run(&["checksum", "--verify", "/nonexistent/sums"], &[&path])?.expect_code(2)?;
    // Longer by zeros is as the manifest says; longer by anything else is not.
    fs::write(&manifest, &sums)?;
    let raw = dir.path().join("copy.raw");
    let spec = ImageSpec::new(2, 64, 4096).mapping(Mapped::All);
    let model = crate::forge::content::Model::of(&spec);
    let bytes = model.read(0, 4096 * 512);
    for (tail, code) in [(vec![0; 70_000], 0), (vec![1; 512], 1)] {
        fs::write(&raw, [bytes.clone(), tail].concat())?;
        let said = run(&verify, &[&raw])?.expect_code(code)?.text();
        ensure!(said.contains("the manifest 2097152"), "{said}");
    }
    fs::write(&raw, &bytes[..bytes.len() - 512])?;
    run(&verify, &[&raw])?.expect_code(1)?;
    Ok(())
}

pub(crate) fn samples_are_compared_and_summed_up() -> Outcome {
    let dir = scratch()?;
    let unpacked = samples::unpack(dir.path())?;
    let plain = &unpacked.first().context("samples")?.path;
    let expanding = &unpacked.get(1).context("samples")?.path;
    run(&["compare", "--strict"], &[plain, expanding])?.expect_code(0)?;
    for sample in &unpacked {
        let sums = run(&["checksum"], &[&sample.path])?.expect_code(0)?.stdout;
        let manifest = dir.path().join("sums");
        fs::write(&manifest, sums)?;
        run(&["checksum", "--verify", text(&manifest)], &[&sample.path])?.expect_code(0)?;
        run(&["map", "--json"], &[&sample.path])?.expect_code(0)?;
    }
    Ok(())
}
