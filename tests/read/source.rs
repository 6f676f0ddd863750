//! Sources: what every kind of disk gives, and what opening one leaves alone.

use crate::forge::content::{self, Model};
use crate::forge::image::{IN_USE, ImageSpec, Mapped};
use crate::kinds;
use crate::support::guards::Loop;
use crate::support::{MIB, Outcome, command, fingerprint, samples, scratch};
use anyhow::{Context, Result, bail, ensure};
use ploopfs::admin::progress::Progress;
use ploopfs::admin::source::{Asked, Opened, Source, What, open};
use ploopfs::units::DiskOffset;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

fn opened(path: &Path) -> Result<Opened> {
    Ok(open(path, &Asked::default())?)
}

/// The whole disk by way of its data ranges; what they leave out is zeros.
fn flat(source: &dyn Source) -> Result<Vec<u8>> {
    source.prepare(&Progress::default())?;
    let mut bytes = vec![0; usize::try_from(source.size())?];
    let mut at = 0;
    for range in source.data(DiskOffset::ZERO) {
        let range = range?;
        let (start, end) = (range.start.get(), range.end.get());
        ensure!(
            at <= start && start < end && end <= source.size(),
            "{range:?}"
        );
        let piece = &mut bytes[usize::try_from(start)?..usize::try_from(end)?];
        source.read_at(range.start, piece)?;
        at = end;
    }
    Ok(bytes)
}

/// Extents follow each other from the start to the end, and holes are zeros; what lies in a file
/// is there.
fn expect_extents(source: &dyn Source, bytes: &[u8]) -> Outcome {
    let mut at = 0;
    for extent in source.extents(DiskOffset::ZERO) {
        let extent = extent?;
        let (start, end) = (extent.range.start.get(), extent.range.end.get());
        ensure!(start == at && end > start, "{extent:?} after {at}");
        let here = &bytes[usize::try_from(start)?..usize::try_from(end)?];
        match (extent.what, extent.place) {
            (What::Bad, _) => bail!("{extent:?}"),
            (What::Hole | What::Zeros, _) => {
                ensure!(here.iter().all(|byte| *byte == 0), "{extent:?}");
            }
            (What::Data, None) => {}
            (What::Data, Some((file, at))) => {
                let mut there = vec![0; here.len()];
                let file = File::open(&source.files()[file])?;
                let read = file.read_at(&mut there, at.get())?;
                // A plain file may end in the middle of a sector.
                ensure!(there.len() - read < 512 && here == there, "{extent:?}");
            }
        }
        if let Some(place) = source.host_place(extent.range.start, u64::MAX)? {
            let mut first = [0; 1];
            place.storage.read_at(place.at, &mut first)?;
            ensure!(first[0] == here[0] && place.len > 0, "{place:?}");
        }
        at = end;
    }
    ensure!(at == source.size(), "the extents end at {at}");
    Ok(())
}

fn expect_model(path: &Path, model: &Model) -> Outcome {
    let source = opened(path)?.source;
    let bytes = flat(source.as_ref())?;
    ensure!(source.size() == model.bytes(), "{} bytes", source.size());
    let difference = content::first_difference(0, &model.read(0, bytes.len()), &bytes);
    ensure!(difference.is_none(), "{}", difference.unwrap_or_default());
    expect_extents(source.as_ref(), &bytes)
}

/// Makes the access times older than the changes, so that any reader would renew them.
fn age(path: &Path) -> Outcome {
    let path = path.to_str().context("a path that is text")?;
    let script = "find \"$1\" -type f -exec touch -a -d 1999-01-01 {} +";
    command::ok(&mut command::sh(script, &[path]))?;
    Ok(())
}

/// Access times of every file of a disk.
fn access_times(path: &Path) -> Result<Vec<(i64, i64)>> {
    let mut files = vec![path.to_path_buf()];
    if path.is_dir() {
        let names: Result<Vec<_>, _> = fs::read_dir(path)?.collect();
        files = names?.iter().map(fs::DirEntry::path).collect();
        files.sort();
    }
    let times = files.iter().map(|file| {
        let meta = fs::metadata(file)?;
        Ok((meta.atime(), meta.atime_nsec()))
    });
    times.collect()
}

pub(crate) fn sources_of_ours_hold_what_the_model_says() -> Outcome {
    let dir = scratch()?;
    let mut made = kinds::images(dir.path())?;
    made.extend(kinds::bundles(dir.path())?);
    for disk in made {
        let before = fingerprint(&disk.path)?;
        age(&disk.path)?;
        let accessed = access_times(&disk.path)?;
        flat(opened(&disk.path)?.source.as_ref())?;
        ensure!(access_times(&disk.path)? == accessed, "access times moved");
        expect_model(&disk.path, &disk.model).with_context(|| disk.path.display().to_string())?;
        ensure!(fingerprint(&disk.path)? == before, "it was changed");
    }
    Ok(())
}

pub(crate) fn raw_files_are_sources() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("disk.raw");
    let file = File::create(&path)?;
    file.write_all_at(b"start", 0)?;
    file.write_all_at(&[7; 5000], 3 * MIB)?;
    age(&path)?;
    let accessed = access_times(&path)?;
    let source = opened(&path)?.source;
    ensure!(source.format() == "raw" && source.size() == (3 * MIB + 5000).next_multiple_of(512));
    let bytes = flat(source.as_ref())?;
    ensure!(bytes.starts_with(b"start\0"), "the start is gone");
    let tail = usize::try_from(3 * MIB)?;
    ensure!(bytes[tail..tail + 5000].iter().all(|byte| *byte == 7));
    ensure!(bytes[tail + 5000..].iter().all(|byte| *byte == 0));
    ensure!(access_times(&path)? == accessed, "its access time moved");
    expect_extents(source.as_ref(), &bytes)?;
    let extents: Result<Vec<_>, _> = source.extents(DiskOffset::ZERO).collect();
    let whats: Vec<What> = extents?.iter().map(|extent| extent.what).collect();
    ensure!(whats == [What::Data, What::Zeros, What::Data], "{whats:?}");
    Ok(())
}

pub(crate) fn block_devices_are_sources() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("disk.raw");
    let mut file = File::create(&path)?;
    // The guest's own bytes say nothing about what the device is.
    file.write_all(b"QFI\xfb not a qcow2 image")?;
    file.set_len(4 * MIB)?;
    let device = Loop::new(&path)?;
    let source = opened(device.dev())?.source;
    ensure!(source.format() == "raw" && source.size() == 4 * MIB);
    let bytes = flat(source.as_ref())?;
    ensure!(bytes == fs::read(&path)?, "other bytes");
    drop(source);
    device.detach()
}

pub(crate) fn other_formats_are_read_through_qemu() -> Outcome {
    let dir = scratch()?;
    let raw = dir.path().join("disk.raw");
    let file = File::create(&raw)?;
    file.set_len(8 * MIB)?;
    let bytes: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    file.write_all_at(&bytes, 2 * MIB + 512)?;
    let expected = fs::read(&raw)?;
    for format in ["qcow2", "vmdk", "vhdx", "vpc", "vdi", "qed"] {
        let path = dir.path().join(format!("disk.{format}"));
        let mut convert = command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]);
        if format == "vpc" {
            // Else the size is rounded to what cylinders make.
            convert.args(["-o", "force_size=on"]);
        }
        command::ok(convert.arg(&raw).arg(&path))?;
        let before = fingerprint(&path)?;
        let Opened { source, notes } = opened(&path)?;
        ensure!(source.format() == format, "{format}: {}", source.format());
        ensure!(
            notes.iter().any(|note| note.contains("qemu-img")),
            "{notes:?}"
        );
        let early = source.read_at(DiskOffset::ZERO, &mut [0; 512]);
        ensure!(early.is_err(), "read before it was prepared");
        ensure!(flat(source.as_ref())? == expected, "{format}: other bytes");
        expect_extents(source.as_ref(), &expected).context(format)?;
        ensure!(fingerprint(&path)? == before, "{format}: it was changed");
    }
    let broken = dir.path().join("broken.qcow2");
    fs::write(&broken, b"QFI\xfb and no more of it")?;
    let error = open(&broken, &Asked::default()).err().context("opened")?;
    ensure!(error.to_string().contains("qcow2"), "{error}");
    Ok(())
}

fn qemu_img(dir: &Path, args: &[&str]) -> Outcome {
    command::ok(command::new("qemu-img").current_dir(dir).args(args)).map(|_| ())
}

pub(crate) fn what_other_formats_name_lies_beside_them() -> Outcome {
    let dir = scratch()?;
    let (home, away) = (dir.path().join("home"), dir.path().join("away"));
    fs::create_dir(&home)?;
    fs::create_dir(&away)?;
    fs::write(away.join("secret"), vec![7; 1 << 20])?;
    let data = away.join("data");
    for line in [
        "create -q -f qcow2 -b ../away/secret -F raw backing.qcow2",
        "create -q -f qcow2 -b backing.qcow2 -F qcow2 deep.qcow2",
        &format!(
            "create -q -f qcow2 -o data_file={} data.qcow2 1M",
            data.display()
        ),
    ] {
        qemu_img(&home, &line.split(' ').collect::<Vec<_>>())?;
    }
    let before = fingerprint(dir.path())?;
    for name in ["backing.qcow2", "deep.qcow2", "data.qcow2"] {
        for verb in ["map", "checksum", "measure"] {
            let mut read = command::ploopfs(&[verb]);
            let done = command::run(read.arg(home.join(name)))?;
            ensure!(
                done.code() > 0 && done.stdout.len() < 100,
                "{}",
                done.story()
            );
            done.expect_words(&["outside the bundle", "--allow-outside"])?;
            let mut read = command::ploopfs(&[verb, "--allow-outside"]);
            command::ok(read.arg(&away).arg(home.join(name)))?;
        }
    }
    // What lies beside it is its own.
    qemu_img(
        &home,
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            "v",
            "1M",
        ],
    )?;
    command::ok(command::ploopfs(&["checksum"]).arg(home.join("v")))?;
    fs::remove_file(home.join("v"))?;
    fs::remove_file(home.join("v-flat.vmdk")).or_else(|_| fs::remove_file(home.join("v-flat")))?;
    ensure!(fingerprint(dir.path())? == before, "something was changed");
    Ok(())
}

pub(crate) fn samples_are_sources() -> Outcome {
    let dir = scratch()?;
    for sample in samples::unpack(dir.path())? {
        let source = opened(&sample.path)?.source;
        ensure!(source.size() == sample.bytes, "{}", sample.path.display());
        let Some(sha256) = sample.sha256.filter(|_| sample.bytes < 1 << 30) else {
            ensure!(source.data(DiskOffset::ZERO).next().is_none() || sample.sha256.is_some());
            continue;
        };
        let flat_path = dir.path().join("flat");
        fs::write(&flat_path, flat(source.as_ref())?)?;
        let found = crate::support::sha256(&flat_path)?;
        ensure!(found == sha256, "{}", sample.path.display());
    }
    Ok(())
}

pub(crate) fn what_is_in_use_is_read_and_told() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    let mut spec = ImageSpec::new(2, 64, 4096).mapping(Mapped::All);
    spec.mark = IN_USE;
    spec.write(&path)?;
    let told = opened(&path)?.notes.join("\n");
    ensure!(told.contains("in-use mark"), "{told}");
    // As a program that writes locks it.
    let file = File::options().read(true).write(true).open(&path)?;
    let deadline = std::time::Instant::now();
    let purpose = ploopfs::storage::lock::Purpose::Write;
    let locked = ploopfs::storage::lock::image(&file, &path, purpose, deadline)?;
    ensure!(locked == ploopfs::storage::lock::Locked::Yes);
    let Opened { source, notes } = opened(&path)?;
    let told = notes.join("\n");
    ensure!(told.contains("in use: "), "{told}");
    let bytes = flat(source.as_ref())?;
    let expected = Model::of(&spec).read(0, bytes.len());
    ensure!(bytes == expected, "other bytes");
    Ok(())
}

/// What a guest wrote to its raw disk does not decide what the disk is.
pub(crate) fn the_name_of_a_raw_disk_decides() -> Outcome {
    let dir = scratch()?;
    let at = |name: &str| dir.path().join(name);
    let mut bytes = vec![7_u8; 1 << 20];
    let footer = bytes.len() - 512;
    bytes[footer..footer + 8].copy_from_slice(b"conectix");
    for name in ["a.img", "a"] {
        std::fs::write(at(name), &bytes)?;
        let said = command::ok(command::ploopfs(&["map"]).arg(at(name)))?;
        ensure!(said.contains("0x100000"), "{name}: {said}");
    }
    bytes[..4].copy_from_slice(b"QFI\xfb");
    std::fs::write(at("b.img"), &bytes)?;
    let done = command::run(command::ploopfs(&["map"]).arg(at("b.img")))?;
    done.expect_code(1)?
        .expect_words(&["--format raw", "qcow2"])?;
    command::ok(command::ploopfs(&["map", "--format", "raw"]).arg(at("b.img"))).map(drop)
}
