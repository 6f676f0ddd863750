//! The oracle itself: what forge writes and reads must agree with other programs and real disks.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

use anyhow::{Context, ensure};
use forge::bundle::{BundleSpec, Style};
use forge::content::{Level, Model};
use forge::extension::BitmapSpec;
use forge::image::{FirstBlock, ImageSpec, Layout, Mapped, V21};
use forge::reader::{self, Flat};
use forge::{content, corrupt};
use std::fs;
use std::path::Path;
use support::harness::{self, trial};
use support::probe::Need;
use support::{Outcome, command, scratch};

fn main() {
    harness::main(vec![
        trial(
            "forged_images_read_as_their_model",
            &[],
            forged_images_read_as_their_model,
        ),
        trial(
            "qemu_reads_forged_images_alike",
            &[Need::Qemu],
            qemu_reads_forged_images_alike,
        ),
        trial(
            "forge_reads_qemu_images",
            &[Need::Qemu],
            forge_reads_qemu_images,
        ),
        trial(
            "qemu_accepts_the_bitmap",
            &[Need::Qemu],
            qemu_accepts_the_bitmap,
        ),
        trial("forge_reads_the_samples", &[], forge_reads_the_samples),
        trial(
            "chains_and_parts_read_as_their_model",
            &[],
            chains_and_parts_read_as_their_model,
        ),
        trial(
            "every_corruption_changes_something",
            &[],
            every_corruption_changes_something,
        ),
        trial("huge_images_cost_nothing", &[], huge_images_cost_nothing),
    ])
}

/// One image of every layout, version and odd form.
fn odd_images() -> Vec<ImageSpec> {
    let mut specs = Vec::new();
    let layouts = [
        Layout::Packed,
        Layout::Identity,
        Layout::Shuffled(9),
        Layout::Gaps(2),
        Layout::Reversed,
    ];
    for version in [1, 2] {
        for (i, layout) in layouts.into_iter().enumerate() {
            let mut spec = ImageSpec::new(version, 8 << i, 8191).mapping(Mapped::Percent(60));
            spec.layout = layout;
            spec.tail = i as u64;
            specs.push(spec);
        }
        let mut spec = ImageSpec::new(version, 64, 8191).mapping(Mapped::All);
        spec.first_block = FirstBlock::Extra(2);
        spec.garbage = true;
        specs.push(spec);
    }
    for first_block in [FirstBlock::Zero, FirstBlock::Unaligned] {
        let mut spec = ImageSpec::new(1, 63, 6301).mapping(Mapped::Percent(70));
        spec.first_block = first_block;
        specs.push(spec);
    }
    specs
}

fn expect_model(path: &Path, model: &Model) -> Outcome {
    let flat = Flat::open(path)?;
    ensure!(flat.bytes() == model.bytes(), "{} bytes", flat.bytes());
    let found = flat.read(0, usize::try_from(flat.bytes())?)?;
    let difference = content::first_difference(0, &model.read(0, found.len()), &found);
    ensure!(
        difference.is_none(),
        "{}: {}",
        path.display(),
        difference.unwrap_or_default()
    );
    Ok(())
}

fn forged_images_read_as_their_model() -> Outcome {
    let dir = scratch()?;
    for (i, spec) in odd_images().iter().enumerate() {
        let path = dir.path().join(format!("{i}.hds"));
        spec.write(&path)?;
        expect_model(&path, &Model::of(spec)).with_context(|| format!("{spec:?}"))?;
        if matches!(spec.first_block, FirstBlock::Minimum | FirstBlock::Extra(_)) {
            support::expect_clean(&path)?;
        }
    }
    Ok(())
}

fn qemu_reads_forged_images_alike() -> Outcome {
    let dir = scratch()?;
    let raw = dir.path().join("raw");
    for (i, spec) in odd_images().iter().enumerate() {
        let path = dir.path().join(format!("{i}.hds"));
        spec.write(&path)?;
        let check = command::run(
            command::new("qemu-img")
                .args(["check", "-q", "-f", "parallels"])
                .arg(&path),
        )?;
        // 3: unused clusters at the end.
        ensure!(
            [0, 3].contains(&check.code()),
            "{spec:?}: {}",
            check.story()
        );
        let convert = ["convert", "-f", "parallels", "-O", "raw"];
        command::ok(command::new("qemu-img").args(convert).arg(&path).arg(&raw))?;
        ensure!(
            support::sha256(&raw)? == Flat::open(&path)?.sha256()?,
            "{spec:?}"
        );
    }
    Ok(())
}

fn forge_reads_qemu_images() -> Outcome {
    let dir = scratch()?;
    let (image, raw) = (dir.path().join("q.hds"), dir.path().join("raw"));
    let create = ["create", "-q", "-f", "parallels", "-o", "cluster_size=64k"];
    command::ok(
        command::new("qemu-img")
            .args(create)
            .arg(&image)
            .arg("20000256"),
    )?;
    let writes = [
        "-c",
        "write -P 7 65000 300000",
        "-c",
        "write -P 9 19900000 100000",
    ];
    command::ok(
        command::new("qemu-io")
            .args(["-f", "parallels"])
            .args(writes)
            .arg(&image),
    )?;
    let convert = ["convert", "-f", "parallels", "-O", "raw"];
    command::ok(command::new("qemu-img").args(convert).arg(&image).arg(&raw))?;
    ensure!(
        support::sha256(&raw)? == Flat::open(&image)?.sha256()?,
        "qemu and forge differ"
    );
    support::expect_clean(&image)
}

fn qemu_accepts_the_bitmap() -> Outcome {
    let dir = scratch()?;
    for (i, all) in [false, true].into_iter().enumerate() {
        let path = dir.path().join(format!("{i}.hds"));
        let mut spec = ImageSpec::new(2, 64, 1 << 20).mapping(Mapped::Percent(5));
        spec.mark = V21;
        spec.bitmap = Some(BitmapSpec {
            all,
            ..BitmapSpec::new(vec![0, 2, 87, 4000])
        });
        spec.write(&path)?;
        let info = command::ok(
            command::new("qemu-img")
                .args(["info", "--output=json"])
                .arg(&path),
        );
        // Without the format named, qemu probes; an extension that it cannot load fails the open.
        let info = info.with_context(|| format!("all = {all}"))?;
        ensure!(info.contains("\"parallels\""), "{info}");
        corrupt::apply("e-md5", &path)?;
        let broken = command::run(command::new("qemu-img").args(["info"]).arg(&path))?;
        ensure!(
            broken.code() == 1,
            "qemu did not look at the extension: {}",
            broken.story()
        );
    }
    Ok(())
}

fn forge_reads_the_samples() -> Outcome {
    let dir = scratch()?;
    for sample in support::samples::unpack(dir.path())? {
        if let Some(sha256) = sample.sha256.filter(|_| sample.bytes <= 1 << 30) {
            ensure!(
                Flat::open(&sample.path)?.sha256()? == sha256,
                "{}",
                sample.path.display()
            );
        }
    }
    Ok(())
}

fn chains_and_parts_read_as_their_model() -> Outcome {
    let dir = scratch()?;
    for (i, style) in [Style::Ploop, Style::Parallels].into_iter().enumerate() {
        let image = |sectors| {
            let mut spec = ImageSpec::new(2, 64, sectors).mapping(Mapped::Percent(30));
            spec.garbage = true;
            Level::Image(spec)
        };
        let base = Level::Plain {
            seed: 5,
            level: 0,
            bytes: 300_001,
        };
        let mut spec = BundleSpec::new(
            style,
            vec![base, image(900), image(4000), image(2000), image(3003)],
        );
        let mut other = ImageSpec::new(1, 128, 1001).mapping(Mapped::All);
        other.seed = 99;
        spec.push_part(vec![Level::Image(other); 5]);
        let path = dir.path().join(format!("{i}.hdd"));
        spec.write(&path)?;
        expect_model(&path, &spec.model())?;
        let frozen = Flat::open_at(&path, Some(&spec.guid(2)))?;
        let (want, have) = (
            spec.model().frozen(3).read(0, 450_000),
            frozen.read(0, 450_000)?,
        );
        ensure!(
            want == have,
            "{:?}",
            content::first_difference(0, &want, &have)
        );
    }
    Ok(())
}

fn every_corruption_changes_something() -> Outcome {
    let dir = scratch()?;
    for corruption in corrupt::ALL {
        let name = corruption.name;
        let mut spec = ImageSpec::new(1, 64, 6_500).mapping(Mapped::Percent(50));
        spec.bitmap = name.starts_with("e-").then(|| BitmapSpec::new(vec![3, 9]));
        spec.mark = if spec.bitmap.is_some() { V21 } else { 0 };
        let path = dir.path().join(name);
        let target = if name.starts_with("x-") {
            let style = if name == "x-engine" {
                Style::Parallels
            } else {
                Style::Ploop
            };
            let bundle = BundleSpec::chain(style, &spec, 3, |_, _| {});
            bundle.write(&path.join("d.hdd"))?;
            path.join("d.hdd")
        } else {
            spec.write(&path)?;
            path.clone()
        };
        let before = support::fingerprint(&path)?;
        corrupt::apply(name, &target).with_context(|| name.to_string())?;
        ensure!(
            before != support::fingerprint(&path)?,
            "{name} changed nothing"
        );
        let _ = reader::check(&path);
        let _ = Flat::open(&target);
    }
    Ok(())
}

fn huge_images_cost_nothing() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("huge.hds");
    let entries = (1_u64 << 29) - 1;
    let ends = Mapped::List(vec![0, entries / 2, entries - 1]);
    ImageSpec::new(2, 64, entries * 64)
        .mapping(ends)
        .write(&path)?;
    ensure!(
        fs::metadata(&path)?.len() > 1 << 31,
        "the table takes 2 GiB of addresses"
    );
    ensure!(support::host_bytes(&path)? < 1 << 20, "but no blocks");
    let found = Flat::open(&path)?.read((entries - 1) * 64 * 512, 512)?;
    ensure!(
        found == content::sector(1, 0, (entries - 1) * 64),
        "{}",
        content::describe(&found)
    );
    Ok(())
}
