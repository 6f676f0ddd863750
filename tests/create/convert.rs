//! Conversions: content by an oracle, holes, sharing, refusals that leave nothing.

use crate::ends::Small;
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, Model, first_difference};
use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::forge::reader::Flat;
use crate::support::guards::{Xfs, text};
use crate::support::harness::{self, trial};
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, scratch, scratch_tmpfs};
use crate::systems::{names, run_examples};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use ploopfs::storage::lock;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("every_disk_converts_to_every_kind", &[], to_every_kind),
        trial("qcow2_and_back", &[Need::Qemu], qcow2_and_back),
        trial("disks_of_other_programs_convert", &[Need::Qemu], foreign),
        trial("snapshots_convert", &[], snapshots),
        trial("zeros_take_no_room", &[], zeros),
        trial("sizes_are_kept_or_rounded_up", &[], sizes),
        trial("streams_are_whole", &[], streams),
        trial(
            "blocks_are_shared_on_xfs",
            &[Need::Root, Need::Loop, Need::Xfs],
            shared,
        ),
        trial("memory_is_bounded", &[], memory),
        trial("refused_conversions_touch_nothing", &[], refusals),
        trial("failed_conversions_leave_nothing", &[Need::Root], failures),
        trial(
            "names_that_may_not_last_are_taken_back",
            &[Need::Strace, Need::Qemu],
            unsynced,
        ),
        trial("nothing_is_made_in_its_own_source", &[], within),
        trial(
            "examples_of_convert_run",
            &[Need::Qemu, Need::E2fsprogs],
            examples,
        ),
    ]
}

pub(crate) fn convert(source: &Path, target: &Path, args: &[&str]) -> Outcome {
    let mut line = command::ploopfs(&["convert", "-q"]);
    command::ok(line.args(args).arg(source).arg(target)).map(|_| ())
}

/// An image of ours, or a raw file, shows what the model says.
pub(crate) fn expect(target: &Path, model: &Model) -> Outcome {
    let extension = target.extension().and_then(|end| end.to_str());
    if extension == Some("raw") {
        return support::expect_flat(target, model);
    }
    command::ok(command::ploopfs(&["check", "-q"]).arg(target))?;
    let flat = Flat::open(target)?;
    ensure!(flat.bytes() >= model.bytes(), "{}", target.display());
    let mut at = 0;
    while at < flat.bytes() {
        let len = (flat.bytes() - at).min(1 << 20) as usize;
        let there = model.bytes().saturating_sub(at).min(len as u64) as usize;
        let mut wanted = model.read(at, there);
        wanted.resize(len, 0);
        if let Some(told) = first_difference(at, &wanted, &flat.read(at, len)?) {
            bail!("{}: {told}", target.display());
        }
        at += len as u64;
    }
    Ok(())
}

/// Disks of all shapes: name, files, content.
pub(crate) fn disks(dir: &Path) -> Result<Vec<(PathBuf, Model)>> {
    let mut made = Vec::new();
    let mut odd = ImageSpec::new(2, 128, 128 * 120 + 77).mapping(Mapped::Percent(40));
    odd.layout = Layout::Shuffled(5);
    odd.garbage = true;
    for (name, version) in [("v1.hds", 1), ("v2.hds", 2)] {
        let path = dir.join(name);
        let spec = ImageSpec {
            version,
            ..odd.clone()
        };
        spec.write(&path)?;
        made.push((path, Model::of(&spec)));
    }
    // Its clusters are larger than those that the targets have.
    let large = ImageSpec::new(2, 8192, 8192 * 6 + 8).mapping(Mapped::Every { step: 2, phase: 1 });
    large.write(&dir.join("large.hds"))?;
    made.push((dir.join("large.hds"), Model::of(&large)));
    let chain = BundleSpec::chain(Style::Ploop, &odd, 3, |level, image| {
        image.mapped = Mapped::Percent(20 + 10 * level as u64);
    });
    chain.write(&dir.join("chain.hdd"))?;
    made.push((dir.join("chain.hdd"), chain.model()));
    let small = ImageSpec::new(1, 64, 64 * 500).mapping(Mapped::Percent(50));
    let mut split = BundleSpec::new(Style::Parallels, vec![Level::Image(small.clone())]);
    split.push_part(vec![Level::Image(ImageSpec {
        cluster_sectors: 2048,
        ..small
    })]);
    split.write(&dir.join("split.hdd"))?;
    made.push((dir.join("split.hdd"), split.model()));
    let base = Level::Plain {
        seed: 9,
        level: 0,
        bytes: odd.disk_sectors * 512,
    };
    let plain = BundleSpec::new(Style::Ploop, vec![base, Level::Image(odd)]);
    plain.write(&dir.join("plain.hdd"))?;
    made.push((dir.join("plain.hdd"), plain.model()));
    Ok(made)
}

fn to_every_kind() -> Outcome {
    let dir = scratch()?;
    let made = disks(dir.path())?;
    let before = support::fingerprint(dir.path())?;
    let out = scratch()?;
    for (source, model) in &made {
        for (target, args) in [
            ("x.raw", &[][..]),
            ("x.hds", &[]),
            ("y.hds", &["--image-version", "1", "--cluster-size", "64K"]),
            ("z.hds", &["--cluster-size", "4M"]),
            ("x.hdd", &[]),
            ("d.hdd", &["--for", "parallels-desktop"]),
            ("v.hdd", &["--for", "virtuozzo", "--cluster-size", "32K"]),
        ] {
            let target = out.path().join(target);
            convert(source, &target, args)?;
            expect(&target, model).with_context(|| format!("{} {args:?}", source.display()))?;
            if target.is_dir() {
                fs::remove_dir_all(&target)?;
            } else {
                fs::remove_file(&target)?;
            }
        }
    }
    ensure!(names(out.path())?.is_empty(), "{:?}", names(out.path())?);
    ensure!(
        support::fingerprint(dir.path())? == before,
        "a source was changed"
    );
    Ok(())
}

fn qcow2_and_back() -> Outcome {
    let dir = scratch()?;
    for (source, model) in disks(dir.path())? {
        let (there, back) = (dir.path().join("x.qcow2"), dir.path().join("back.raw"));
        convert(&source, &there, &[])?;
        command::ok(command::new("qemu-img").args(["check", "-q"]).arg(&there))?;
        convert(&there, &back, &[])?;
        expect(&back, &model)?;
        fs::remove_file(there)?;
        fs::remove_file(back)?;
    }
    Ok(())
}

fn foreign() -> Outcome {
    let dir = scratch()?;
    let spec = ImageSpec::new(2, 2048, 2048 * 20).mapping(Mapped::Percent(50));
    let (image, raw) = (dir.path().join("a.hds"), dir.path().join("a.raw"));
    spec.write(&image)?;
    convert(&image, &raw, &[])?;
    for format in ["qcow2", "vmdk", "vhdx", "vdi", "raw"] {
        let there = dir.path().join(format!("x.{format}"));
        let mut line = command::new("qemu-img");
        line.args(["convert", "-f", "raw", "-O", format]);
        command::ok(line.arg(&raw).arg(&there))?;
        let target = dir.path().join(format!("{format}.hdd"));
        convert(&there, &target, &[])?;
        expect(&target, &Model::of(&spec)).context(format)?;
    }
    Ok(())
}

fn snapshots() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 64 * 200).mapping(Mapped::Percent(40));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {});
    let source = dir.path().join("s.hdd");
    bundle.write(&source)?;
    for level in 0..2 {
        let target = dir.path().join(format!("{level}.raw"));
        convert(&source, &target, &["--snapshot", &bundle.guid(level)])?;
        expect(&target, &bundle.model().frozen(level + 1))?;
    }
    Ok(())
}

fn mapped(image: &Path) -> Result<u64> {
    let said = command::ok(command::ploopfs(&["check", "--json"]).arg(image))?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    said["files"][0]["mapped_clusters"]
        .as_u64()
        .context("a number of clusters")
}

fn zeros() -> Outcome {
    let dir = scratch()?;
    // All of it is mapped, and nothing was ever written there.
    let mut spec = ImageSpec::new(2, 2048, 2048 * 64).mapping(Mapped::All);
    spec.no_data = true;
    let source = dir.path().join("holes.hds");
    spec.write(&source)?;
    // Zeros that were written, with one byte among them.
    let written = dir.path().join("written.raw");
    let mut bytes = vec![0; 64 << 20];
    bytes[33 << 20] = 1;
    fs::write(&written, bytes)?;
    for (source, clusters, most) in [(source, 0, 4096), (written, 1, 68 << 10)] {
        let (image, raw) = (dir.path().join("x.hds"), dir.path().join("x.raw"));
        convert(&source, &image, &[])?;
        convert(&source, &raw, &[])?;
        let found = mapped(&image)?;
        ensure!(found == clusters, "{}: {found}", source.display());
        ensure!(support::host_bytes(&raw)? <= most, "{}", source.display());
        fs::remove_file(image)?;
        fs::remove_file(raw)?;
    }
    // A huge disk is instant.
    let huge = dir.path().join("huge.hds");
    command::ok(command::ploopfs(&["create", "-q", "-s", "500G"]).arg(&huge))?;
    let started = std::time::Instant::now();
    convert(&huge, &dir.path().join("huge.raw"), &[])?;
    let took = started.elapsed();
    ensure!(took.as_secs() < 5, "{took:?} for nothing but holes");
    Ok(())
}

fn sizes() -> Outcome {
    let dir = scratch()?;
    let source = dir.path().join("a.raw");
    for (bytes, exact, rounded) in [
        (10_000_000_u64, 10_000_384, 10 << 20),
        (512, 512, 1 << 20),
        (3 << 20, 3 << 20, 3 << 20),
    ] {
        fs::write(&source, vec![0x5a; bytes as usize])?;
        for (name, args, size) in [
            ("a.hds", &[][..], exact),
            ("b.hds", &["--for", "virtuozzo"], rounded),
            ("c.hdd", &["--for", "parallels-desktop"], rounded),
        ] {
            let target = dir.path().join(format!("{bytes}{name}"));
            convert(&source, &target, args)?;
            let flat = Flat::open(&target)?;
            ensure!(flat.bytes() == size, "{bytes}: {}", flat.bytes());
            let all = flat.read(0, size as usize)?;
            let (data, rest) = all.split_at(bytes as usize);
            ensure!(data.iter().all(|byte| *byte == 0x5a), "{name}: data");
            ensure!(rest.iter().all(|byte| *byte == 0), "{name}: the rest");
        }
    }
    Ok(())
}

fn streams() -> Outcome {
    let dir = scratch()?;
    for (source, model) in disks(dir.path())? {
        let target = dir.path().join("out.raw");
        let script = format!("\"$1\" convert \"$2\" - > {}", text(&target));
        let args = [support::PLOOPFS, text(&source)];
        command::ok(&mut command::sh(&script, &args))?;
        expect(&target, &model)?;
    }
    // A reader that goes away is no failure worth a word.
    let source = dir.path().join("large.hds");
    let script = "{ \"$1\" convert \"$2\" - || echo $? >&2; } | head -c 1 > /dev/null";
    let args = [support::PLOOPFS, text(&source)];
    let done = command::run(&mut command::sh(script, &args))?;
    ensure!(done.stderr == "141\n", "{}", done.story());
    let mut line = command::ploopfs(&["convert", "-O", "hds"]);
    let refused = command::run(line.arg(&source).arg("-"))?.expect_code(1)?;
    ensure!(refused.stdout.is_empty(), "{}", refused.story());
    Ok(())
}

fn used(dir: &Path) -> Result<u64> {
    let said = command::ok(command::new("df").args(["-B1", "--output=used"]).arg(dir))?;
    let number = said.lines().last().map(str::trim);
    Ok(number.context("a line")?.parse()?)
}

fn shared() -> Outcome {
    let system = Xfs::new(2 << 30)?;
    let at = |name: &str| system.path().join(name);
    let spec = ImageSpec::new(2, 2048, 2048 * 200 + 8).mapping(Mapped::Percent(75));
    spec.write(&at("a.hds"))?;
    command::ok(command::new("sync").arg("-f").arg(system.path()))?;
    let before = used(system.path())?;
    for name in ["b.hds", "c.raw", "d.hdd"] {
        convert(&at("a.hds"), &at(name), &[])?;
    }
    // Other clusters are no obstacle where they are smaller.
    convert(&at("a.hds"), &at("e.hds"), &["--cluster-size", "64K"])?;
    let mut copy = command::ploopfs(&["copy", "-q"]);
    command::ok(copy.arg(at("d.hdd")).arg(at("f.hdd")))?;
    command::ok(command::new("sync").arg("-f").arg(system.path()))?;
    let more = used(system.path())?.saturating_sub(before);
    ensure!(more < 32 << 20, "{more} bytes for five copies of 150 MiB");
    for name in ["b.hds", "c.raw", "d.hdd", "e.hds", "f.hdd"] {
        expect(&at(name), &Model::of(&spec)).context("shared")?;
    }
    system.end()
}

fn memory() -> Outcome {
    let dir = scratch_tmpfs()?;
    let source = dir.path().join("a.raw");
    fs::write(&source, vec![0xc3; 400 << 20])?;
    for name in ["b.hds", "c.raw"] {
        let target = dir.path().join(name);
        // Kilobytes of memory that the program may have for its data.
        let script = "ulimit -d 250000; exec \"$1\" convert -q \"$2\" \"$3\"";
        let args = [support::PLOOPFS, text(&source), text(&target)];
        command::ok(&mut command::sh(script, &args))?;
        fs::remove_file(target)?;
    }
    Ok(())
}

fn refusals() -> Outcome {
    let dir = scratch()?;
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    let spec = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    spec.write(Path::new(&at("a.hds")))?;
    spec.write(Path::new(&at("cut.hds")))?;
    corrupt::apply("t-past-eof", Path::new(&at("cut.hds")))?;
    spec.write(Path::new(&at("busy.hds")))?;
    // As a program that writes locks it.
    let busy = fs::File::options()
        .read(true)
        .write(true)
        .open(at("busy.hds"))?;
    let now = std::time::Instant::now();
    let held = lock::image(&busy, Path::new(&at("busy.hds")), lock::Purpose::Write, now)?;
    ensure!(held == lock::Locked::Yes, "the host has no locks");
    let secret = BundleSpec::chain(Style::Ploop, &spec, 1, |_, _| {});
    secret.write(Path::new(&at("secret.hdd")))?;
    corrupt::apply("x-key-id", Path::new(&at("secret.hdd")))?;
    fs::write(at("there.raw"), "somebody's")?;
    fs::create_dir(at("there.hdd"))?;
    let before = (names(dir.path())?, support::fingerprint(dir.path())?);
    for (line, word) in [
        ("a.hds there.raw", "there already"),
        ("a.hds there.hdd", "there already"),
        ("a.hds a.hds", "there already"),
        ("a.hds none/x.raw", "No such file"),
        ("a.hds x", "-O raw"),
        ("none.hds x.raw", "nothing has this name"),
        ("a.hds x.raw --image-version 1", "targets of ours"),
        ("a.hds x.qcow2 --for virtuozzo", "targets of ours"),
        ("a.hds x.hds --cluster-size 100", "power of two"),
        ("a.hds x.hds --snapshot latest", "only a bundle"),
        ("busy.hds x.raw", "locked"),
        ("secret.hdd x.hdd", "encrypted"),
        ("cut.hds x.raw", "corrupt image"),
        ("cut.hds x.hdd", "corrupt image"),
        ("cut.hds x.qcow2", "corrupt image"),
    ] {
        let mut words = line.split(' ');
        let paths = words.by_ref().take(2).map(at).collect::<Vec<_>>();
        let mut refused = command::ploopfs(&["convert"]);
        let done = command::run(refused.args(words).args(paths))?.expect_code(1)?;
        ensure!(done.stderr.contains(word), "{line}: {}", done.story());
        let now = (names(dir.path())?, support::fingerprint(dir.path())?);
        ensure!(now == before, "{line}: {:?}", now.0);
    }
    Ok(())
}

fn failures() -> Outcome {
    let dir = scratch()?;
    let source = dir.path().join("a.hds");
    let spec = ImageSpec::new(2, 2048, 2048 * 40).mapping(Mapped::All);
    spec.write(&source)?;
    let small = Small::new(&dir.path().join("small"), "16M")?;
    for name in ["x.raw", "x.hds", "x.hdd", "x.qcow2"] {
        let mut line = command::ploopfs(&["convert"]);
        let done = command::run(line.arg(&source).arg(small.0.join(name)))?.expect_code(1)?;
        ensure!(names(&small.0)?.is_empty(), "{name}: {}", done.story());
        let told = done.stderr.contains("nothing was left");
        ensure!(told, "{name}: {}", done.story());
    }
    Ok(())
}

/// The directory cannot be synced, so the new name might be gone after a power cut.
fn unsynced() -> Outcome {
    let dir = scratch()?;
    let source = dir.path().join("a.hds");
    let spec = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    spec.write(&source)?;
    let out = scratch()?;
    for name in ["x.raw", "x.hds", "x.hdd", "x.qcow2"] {
        let mut line = command::new("strace");
        line.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync"]);
        line.args(["-e", "inject=fsync:error=EIO", support::PLOOPFS, "convert"]);
        let done = command::run(line.arg(&source).arg(out.path().join(name)))?;
        if done.stderr.contains("ptrace") {
            return Err(harness::skip("strace may not trace here"));
        }
        let done = done.expect_code(1)?.expect_words(&["nothing was left"])?;
        let left = names(out.path())?;
        ensure!(left.is_empty(), "{name}: {left:?}: {}", done.story());
    }
    Ok(())
}

fn within() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 64 * 20).mapping(Mapped::Percent(40));
    let bundle = dir.path().join("b.hdd");
    BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {}).write(&bundle)?;
    fs::create_dir(bundle.join("deeper"))?;
    std::os::unix::fs::symlink("b.hdd/deeper", dir.path().join("link"))?;
    let base = bundle.join("root.hds");
    let before = support::fingerprint(dir.path())?;
    let descriptor = bundle.join("DiskDescriptor.xml");
    for target in [
        "b.hdd/in.hds",
        "b.hdd/deeper/in.hdd",
        "link/in.raw",
        "b.hdd/in.qcow2",
    ] {
        for source in [&bundle, &descriptor, &base] {
            for verb in [&["convert"][..], &["copy"], &["convert", "--format", "raw"]] {
                if verb.len() > 1 && source != &base {
                    continue;
                }
                let mut line = command::ploopfs(verb);
                let done = command::run(line.arg(source).arg(dir.path().join(target)))?;
                let done = done.expect_code(1)?;
                done.expect_words(&["would lie in the disk"])?;
                ensure!(support::fingerprint(dir.path())? == before, "{target}");
            }
        }
    }
    // Named from within, too.
    let mut line = command::ploopfs(&["convert", ".", "in.raw"]);
    let done = command::run(line.current_dir(&bundle))?.expect_code(1)?;
    done.expect_words(&["would lie in the disk"])?;
    let mut line = command::ploopfs(&["convert", "-q", ".", "../out.raw"]);
    command::ok(line.current_dir(&bundle)).map(|_| ())
}

fn examples() -> Outcome {
    let dir = scratch()?;
    let disk = dir.path().join("disk.hdd");
    let mut create = command::ploopfs(&["create", "-q", "-s", "100M", "--mkfs", "ext4"]);
    command::ok(create.arg(disk))?;
    let ran = run_examples("ploopfs-convert.1", dir.path())?;
    ensure!(ran >= 4, "{ran} examples");
    Ok(())
}
