//! Every kind of disk shows its right bytes, and takes writes where it may.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{self, Level, Model};
use crate::forge::image::{FirstBlock, IN_USE, ImageSpec, Layout, Mapped, PD17, PD22};
use crate::forge::reader::Flat;
use crate::support::guards::{Loop, Mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, Fuse, Qemu};
use crate::support::{self, MIB, Outcome, command, expect_flat, expect_range, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOP: &[Need] = &[Fuse, Need::Root, Need::Loop];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("samples_by_fuse", &[Fuse], samples_by_fuse),
        trial("samples_by_loop", LOOP, samples_by_loop),
        trial("odd_images_read_right", &[Fuse], odd_images_read_right),
        trial(
            "unaligned_images_are_read_only",
            &[Fuse],
            unaligned_images_are_read_only,
        ),
        trial("closed_marks_are_clean", &[Fuse], closed_marks_are_clean),
        trial(
            "writes_reach_v1_and_v2",
            &[Fuse, Qemu],
            writes_reach_v1_and_v2,
        ),
        trial("odd_chains_read_right", &[Fuse], odd_chains_read_right),
        trial(
            "lower_files_stay_as_they_were",
            &[Fuse, Qemu],
            lower_files_stay_as_they_were,
        ),
        trial("deltas_named_by_hand", &[Fuse], deltas_named_by_hand),
        trial("chain_253_deep", &[Fuse], chain_253_deep),
        trial(
            "split_disk_across_the_border",
            &[Fuse],
            split_disk_across_the_border,
        ),
        trial("sixteen_tebibytes", &[Fuse], sixteen_tebibytes),
        trial("snapshots_as_files", &[Fuse], snapshots_as_files),
        trial("plain_only_on_request", &[Fuse], plain_only_on_request),
    ]
}

/// Writes the same bytes to a flat file and to a copy in memory, at odd places.
pub(crate) fn scribble(flat: &Path, shadow: &mut [u8], seed: u64, writes: u64) -> Outcome {
    let file = OpenOptions::new().write(true).open(flat)?;
    let mut state = seed;
    for number in 0..writes {
        let len = 1 + content::splitmix(&mut state) as usize % (300 << (number % 11));
        let len = len.min(shadow.len());
        let at = content::splitmix(&mut state) as usize % (shadow.len() - len + 1);
        let fill = content::splitmix(&mut state).to_le_bytes();
        // Every seventh write is all zeros, which a hole must swallow and data must not.
        let bytes: Vec<u8> = match number % 7 {
            0 => vec![0; len],
            _ => (0..len)
                .map(|i| fill[(at + i) % 8] ^ (i >> 9) as u8)
                .collect(),
        };
        shadow[at..at + len].copy_from_slice(&bytes);
        file.write_all_at(&bytes, at as u64)?;
    }
    file.sync_all().context("fsync of the flat file")
}

/// The dumb reader must find exactly these bytes.
pub(crate) fn expect_shadow(image: &Path, shadow: &[u8]) -> Outcome {
    let flat = Flat::open(image)?;
    let found = flat.read(0, shadow.len())?;
    let difference = content::first_difference(0, shadow, &found);
    ensure!(
        difference.is_none(),
        "{}: {}",
        image.display(),
        difference.unwrap_or_default()
    );
    Ok(())
}

fn samples_by_fuse() -> Outcome {
    let dir = scratch()?;
    for sample in support::samples::unpack(dir.path())? {
        let before = support::fingerprint(&sample.path)?;
        let mounted = Mounted::new(dir.path(), &sample.path, &["-r"])?;
        let disk = mounted.disk();
        ensure!(
            fs::metadata(&disk)?.len() == sample.bytes,
            "{}",
            sample.path.display()
        );
        match sample.sha256 {
            Some(sha256) => ensure!(support::sha256(&disk)? == sha256, "{}", disk.display()),
            None => {
                let none = super::files::seek(&disk, 0, nix::unistd::Whence::SeekData)?;
                ensure!(none.is_none(), "an empty disk has data at {none:?}");
                for at in (0..sample.bytes)
                    .step_by(3 << 30)
                    .chain([sample.bytes - MIB])
                {
                    let piece = support::read_at(&disk, at, MIB as usize)?;
                    ensure!(piece.iter().all(|byte| *byte == 0), "not zeros at {at}");
                }
            }
        }
        mounted.umount()?;
        ensure!(
            before == support::fingerprint(&sample.path)?,
            "-r changed {:?}",
            sample.path
        );
    }
    Ok(())
}

fn samples_by_loop() -> Outcome {
    let dir = scratch()?;
    for sample in support::samples::unpack(dir.path())? {
        let mounted = Mounted::new(dir.path(), &sample.path, &["-r"])?;
        let device = Loop::with(&mounted.disk(), &["-r"])?;
        let size = command::ok(
            command::new("blockdev")
                .arg("--getsize64")
                .arg(device.dev()),
        )?;
        ensure!(
            size.trim() == sample.bytes.to_string(),
            "{}: {size}",
            sample.path.display()
        );
        match sample.sha256 {
            Some(sha256) => {
                ensure!(
                    support::sha256(device.dev())? == sha256,
                    "{}",
                    sample.path.display()
                );
            }
            None => {
                let piece = support::read_at(device.dev(), sample.bytes - MIB, MIB as usize)?;
                ensure!(piece.iter().all(|byte| *byte == 0), "the end is not zeros");
            }
        }
        device.detach()?;
        mounted.umount()?;
    }
    Ok(())
}

fn show(dir: &Path, image: &Path, model: &Model, options: &[&str]) -> Outcome {
    let mounted = Mounted::new(dir, image, options)?;
    expect_flat(&mounted.disk(), model)?;
    mounted.umount()
}

fn odd_images_read_right() -> Outcome {
    let dir = scratch()?;
    let layouts = [
        Layout::Packed,
        Layout::Identity,
        Layout::Shuffled(9),
        Layout::Gaps(2),
        Layout::Reversed,
    ];
    for version in [1, 2] {
        for (i, layout) in layouts.into_iter().enumerate() {
            let clusters = [64, 8, 2048, 256, 1000][i];
            let mut spec = ImageSpec::new(version, clusters, 20_001).mapping(Mapped::Percent(60));
            spec.layout = layout;
            spec.tail = i as u64;
            spec.garbage = true;
            spec.first_block = if i == 3 {
                FirstBlock::Extra(2)
            } else {
                FirstBlock::Minimum
            };
            let path = dir.path().join(format!("{version}-{i}.hds"));
            spec.write(&path)?;
            for options in [&["-r"][..], &[]] {
                show(dir.path(), &path, &Model::of(&spec), options)
                    .with_context(|| format!("{options:?} {spec:?}"))?;
            }
            support::expect_clean(&path).with_context(|| format!("{spec:?}"))?;
        }
    }
    Ok(())
}

fn unaligned_images_are_read_only() -> Outcome {
    let dir = scratch()?;
    for (i, first_block) in [FirstBlock::Zero, FirstBlock::Unaligned]
        .into_iter()
        .enumerate()
    {
        let mut spec = ImageSpec::new(1, 63, 6301).mapping(Mapped::Percent(70));
        spec.first_block = first_block;
        let path = dir.path().join(format!("{i}.hds"));
        spec.write(&path)?;
        let before = support::fingerprint(&path)?;
        Mounted::refused(dir.path(), &path, &[])?.expect_words(&["-r"])?;
        show(dir.path(), &path, &Model::of(&spec), &["-r"])?;
        ensure!(
            before == support::fingerprint(&path)?,
            "the image was changed"
        );
    }
    Ok(())
}

fn closed_marks_are_clean() -> Outcome {
    let dir = scratch()?;
    for (i, mark) in [0, 1, PD17, PD22].into_iter().enumerate() {
        let mut spec = ImageSpec::new(1, 64, 4096).mapping(Mapped::Percent(50));
        spec.mark = mark;
        let path = dir.path().join(format!("{i}.hds"));
        spec.write(&path)?;
        show(dir.path(), &path, &Model::of(&spec), &["-r"])?;
        ensure!(
            support::mark_of(&path)? == mark,
            "-r changed the mark {mark:#x}"
        );
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        let file = OpenOptions::new().write(true).open(mounted.disk())?;
        file.write_all_at(b"now in use", 0)?;
        ensure!(
            support::mark_of(&path)? == IN_USE,
            "no in-use mark while writing"
        );
        drop(file);
        mounted.umount()?;
        ensure!(support::mark_of(&path)? == 0, "the mark was not cleared");
    }
    Ok(())
}

fn writes_reach_v1_and_v2() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        let mut spec = ImageSpec::new(version, 128, 40_001).mapping(Mapped::Percent(40));
        spec.layout = Layout::Shuffled(3);
        let path = dir.path().join(format!("{version}.hds"));
        spec.write(&path)?;
        let mut shadow = Model::of(&spec).read(0, 40_001 * 512);
        for round in 0..3 {
            let mounted = Mounted::new(dir.path(), &path, &[])?;
            scribble(&mounted.disk(), &mut shadow, 100 + round, 150)?;
            let shown = support::read_at(&mounted.disk(), 0, shadow.len())?;
            let difference = content::first_difference(0, &shadow, &shown);
            ensure!(
                difference.is_none(),
                "through the mount: {}",
                difference.unwrap_or_default()
            );
            mounted.umount()?;
            expect_shadow(&path, &shadow)?;
            support::expect_clean(&path)?;
        }
        command::ok(
            command::new("qemu-img")
                .args(["check", "-f", "parallels"])
                .arg(&path),
        )?;
    }
    Ok(())
}

/// A chain with lower deltas smaller and larger than the upper ones, over a base of odd length.
fn odd_chain(style: Style) -> BundleSpec {
    let image = |version, sectors, percent| {
        let mut spec = ImageSpec::new(version, 64, sectors).mapping(Mapped::Percent(percent));
        spec.garbage = true;
        spec.layout = Layout::Shuffled(sectors);
        Level::Image(spec)
    };
    let base = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 900_001,
    };
    BundleSpec::new(
        style,
        vec![
            base,
            image(2, 900, 30),
            image(2, 9000, 30),
            image(2, 3001, 30),
            image(2, 6003, 20),
        ],
    )
}

fn odd_chains_read_right() -> Outcome {
    let dir = scratch()?;
    for (i, style) in [Style::Ploop, Style::Parallels].into_iter().enumerate() {
        for top_guid in [true, false] {
            let mut spec = odd_chain(style);
            spec.top_guid = top_guid;
            let path = dir.path().join(format!("{i}{top_guid}.hdd"));
            spec.write(&path)?;
            show(dir.path(), &path, &spec.model(), &["-r"])?;
            show(
                dir.path(),
                &path.join("DiskDescriptor.xml"),
                &spec.model(),
                &["-r"],
            )?;
        }
    }
    Ok(())
}

/// The options with which qemu opens one file over another.
fn qemu_chain(files: &[PathBuf]) -> String {
    let mut node = String::new();
    for (level, path) in files.iter().enumerate() {
        let driver = if level == 0 { "raw" } else { "parallels" };
        let file = format!(
            r#""file":{{"driver":"file","filename":"{}"}}"#,
            path.display()
        );
        let backing = if level == 0 {
            String::new()
        } else {
            format!(r#","backing":{node}"#)
        };
        node = format!(r#"{{"driver":"{driver}",{file}{backing}}}"#);
    }
    format!("json:{node}")
}

fn lower_files_stay_as_they_were() -> Outcome {
    let dir = scratch()?;
    let base = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 24_000 * 512,
    };
    let image = ImageSpec::new(2, 128, 24_000).mapping(Mapped::Percent(30));
    let mut levels = vec![base];
    levels.resize(5, Level::Image(image));
    let spec = BundleSpec::new(Style::Ploop, levels);
    let path = dir.path().join("root.hdd");
    spec.write(&path)?;
    let files = spec.files(&path, 0);
    let hashes = || {
        files[..4]
            .iter()
            .map(|file| support::sha256(file))
            .collect::<Result<Vec<_>>>()
    };
    let before = hashes()?;
    let mut shadow = spec.model().read(0, 24_000 * 512);
    for round in 0..2 {
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        scribble(&mounted.disk(), &mut shadow, round, 200)?;
        mounted.umount()?;
        ensure!(before == hashes()?, "a lower file was written to");
        expect_shadow(&path, &shadow)?;
        support::expect_clean(&files[4])?;
    }
    let raw = dir.path().join("raw");
    let chain = qemu_chain(&files);
    command::ok(
        command::new("qemu-img")
            .args(["convert", "-O", "raw"])
            .arg(chain)
            .arg(&raw),
    )?;
    let difference = content::first_difference(0, &shadow, &fs::read(&raw)?);
    ensure!(
        difference.is_none(),
        "qemu with backing: {}",
        difference.unwrap_or_default()
    );
    Ok(())
}

fn deltas_named_by_hand() -> Outcome {
    let dir = scratch()?;
    let spec = odd_chain(Style::Ploop);
    let path = dir.path().join("d.hdd");
    spec.write(&path)?;
    let files = spec.files(&path, 0);
    let mut options = vec!["-r"];
    for file in &files[..4] {
        options.extend(["--lower", text(file)]);
    }
    // The base has no magic, and a plain base must be asked for.
    options.extend(["--format", "raw"]);
    show(dir.path(), &files[4], &spec.model(), &options)
}

/// A read-only open that takes less than two seconds. The host may be busy with what other tests
/// wrote, so it has three tries: what is slow by itself is slow each time.
fn mount_quickly(dir: &Path, image: &Path) -> Result<Mounted> {
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        let started = Instant::now();
        let mounted = Mounted::new(dir, image, &["-r"])?;
        if started.elapsed() < Duration::from_secs(2) {
            return Ok(mounted);
        }
        slowest = slowest.max(started.elapsed());
        mounted.umount()?;
    }
    anyhow::bail!("a read-only open took up to {slowest:?}, three times over")
}

fn chain_253_deep() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 20_480);
    let spec = BundleSpec::chain(Style::Ploop, &like, 253, |level, image| {
        image.mapped = Mapped::Every {
            step: 251,
            phase: level as u64,
        };
    });
    let path = dir.path().join("deep.hdd");
    spec.write(&path)?;
    let mounted = mount_quickly(dir.path(), &path)?;
    expect_flat(&mounted.disk(), &spec.model())?;
    let snapshots = fs::read_dir(mounted.path().join("snapshots"))?.count();
    ensure!(snapshots >= 252, "{snapshots} snapshots are shown");
    mounted.umount()?;
    let mut shadow = spec.model().read(0, 20_480 * 512);
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    scribble(&mounted.disk(), &mut shadow, 8, 60)?;
    mounted.umount()?;
    expect_shadow(&path, &shadow)
}

fn split_disk_across_the_border() -> Outcome {
    let dir = scratch()?;
    let part = |version, cluster, sectors, seed| {
        let mut spec = ImageSpec::new(version, cluster, sectors).mapping(Mapped::Percent(50));
        spec.seed = seed;
        vec![Level::Image(spec.clone()), Level::Image(spec)]
    };
    let mut spec = BundleSpec::new(Style::Parallels, part(1, 2048, 10_001, 1));
    spec.push_part(part(2, 128, 7_777, 2));
    spec.push_part(part(1, 64, 13, 3));
    spec.push_part(vec![
        Level::Plain {
            seed: 4,
            level: 0,
            bytes: 3000 * 512,
        },
        Level::Image(ImageSpec::new(2, 256, 3000)),
    ]);
    let path = dir.path().join("split.hdd");
    spec.write(&path)?;
    show(dir.path(), &path, &spec.model(), &["-r"])?;
    let total = spec.model().bytes() as usize;
    let mut shadow = spec.model().read(0, total);
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    // One write over every border, at an odd place, then many anywhere.
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    for border in [10_001_usize, 17_778, 17_791] {
        let at = border * 512 - 7001;
        let bytes: Vec<u8> = (0..14_002_u32)
            .map(|i| (i * 7 + border as u32) as u8)
            .collect();
        shadow[at..at + bytes.len()].copy_from_slice(&bytes);
        file.write_all_at(&bytes, at as u64)?;
    }
    drop(file);
    scribble(&mounted.disk(), &mut shadow, 77, 150)?;
    mounted.umount()?;
    expect_shadow(&path, &shadow)?;
    for part in 0..4 {
        support::expect_clean(&spec.files(&path, part)[1])?;
    }
    Ok(())
}

fn sixteen_tebibytes() -> Outcome {
    let dir = scratch()?;
    // 16 TiB in 1 MiB clusters, and as many entries as a table may have.
    for (name, cluster, clusters) in [("v2", 2048_u32, 1_u64 << 24), ("most", 64, (1 << 29) - 1)] {
        let ends = Mapped::List(vec![0, clusters / 2, clusters - 1]);
        let sectors = clusters * u64::from(cluster);
        let spec = ImageSpec::new(2, cluster, sectors).mapping(ends);
        let path = dir.path().join(name);
        spec.write(&path)?;
        let mounted = mount_quickly(dir.path(), &path).context(name)?;
        let model = Model::of(&spec);
        let middle = clusters / 2 * u64::from(cluster) * 512;
        for at in [0, middle - MIB, middle, sectors * 512 - MIB] {
            expect_range(&mounted.disk(), &model, at, MIB as usize)?;
        }
        let peak = mounted.memory(true)?;
        ensure!(
            peak < 96 * MIB,
            "{name}: the daemon took {} MiB",
            peak / MIB
        );
        mounted.umount()?;
    }
    Ok(())
}

fn snapshots_as_files() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 6003).mapping(Mapped::Percent(40));
    let spec = BundleSpec::chain(Style::Ploop, &like, 4, |_, _| {});
    let path = dir.path().join("d.hdd");
    spec.write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let mut shadow = spec.model().read(0, 6003 * 512);
    scribble(&mounted.disk(), &mut shadow, 6, 80)?;
    // The top moves on; what is frozen does not.
    for level in 0..3 {
        let file = mounted
            .path()
            .join("snapshots")
            .join(spec.guid(level))
            .join("disk.img");
        expect_flat(&file, &spec.model().frozen(level + 1))?;
        let opened = OpenOptions::new().write(true).open(&file);
        let errno = opened.err().and_then(|error| error.raw_os_error());
        ensure!(
            errno == Some(nix::errno::Errno::EROFS as i32),
            "a snapshot: errno {errno:?}"
        );
    }
    let latest = mounted.path().join("snapshots/latest/disk.img");
    expect_flat(&latest, &spec.model().frozen(3))?;
    mounted.umount()?;
    expect_shadow(&path, &shadow)?;
    for (name, levels) in [(spec.guid(1), 2), ("latest".to_string(), 3)] {
        let mounted = Mounted::new(dir.path(), &path, &["-r", "--snapshot", &name])?;
        expect_flat(&mounted.disk(), &spec.model().frozen(levels))?;
        mounted.umount()?;
    }
    Mounted::refused(dir.path(), &path, &["-r", "--snapshot", "no such name"])?;
    Ok(())
}

fn plain_only_on_request() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("disk.raw");
    crate::forge::image::write_plain(&path, 3, 0, 0, 3 * MIB)?;
    Mounted::refused(dir.path(), &path, &[])?.expect_words(&["--format"])?;
    let mut shadow = fs::read(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &["--format", "raw"])?;
    scribble(&mounted.disk(), &mut shadow, 4, 40)?;
    mounted.umount()?;
    ensure!(
        fs::read(&path)? == shadow,
        "the plain image holds other bytes"
    );
    Ok(())
}
