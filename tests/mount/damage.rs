//! Damaged images: mended where that is safe, refused unchanged where it is not, never guessed.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Model;
use crate::forge::corrupt;
use crate::forge::extension::BitmapSpec;
use crate::forge::image::{FirstBlock, ImageSpec, Mapped, V21};
use crate::support::guards::Mounted;
use crate::support::harness::trial;
use crate::support::probe::Need::{Fuse, Qemu};
use crate::support::{self, Outcome, command, expect_flat, expect_range, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("safe_damage_is_mended", &[Fuse], safe_damage_is_mended),
        trial(
            "cut_last_cluster_is_extended",
            &[Fuse],
            cut_last_cluster_is_extended,
        ),
        trial(
            "odd_descriptors_are_understood",
            &[Fuse],
            odd_descriptors_are_understood,
        ),
        trial("worse_damage_is_refused", &[Fuse], worse_damage_is_refused),
        trial(
            "bad_entries_are_eio_and_nothing_else",
            &[Fuse],
            bad_entries_are_eio,
        ),
        trial(
            "shared_entries_are_refused",
            &[Fuse],
            shared_entries_are_refused,
        ),
        trial(
            "bitmaps_are_kept_or_dropped",
            &[Fuse, Qemu],
            bitmaps_are_kept_or_dropped,
        ),
        trial(
            "bad_extensions_do_not_matter",
            &[Fuse],
            bad_extensions_do_not_matter,
        ),
        trial(
            "no_damage_brings_the_daemon_down",
            &[Fuse],
            no_damage_brings_the_daemon_down,
        ),
        trial("no_space_arrives_as_no_space", &[Fuse], no_space_arrives),
    ]
}

const SECTORS: u64 = 12_803;

/// Half of the clusters mapped; data starts late, so that entries can point into the table.
fn spec(version: u8) -> ImageSpec {
    let mut spec = ImageSpec::new(version, 64, SECTORS);
    // Cluster 0 is a hole, so that what is broken first has neighbours on both sides.
    spec.mapped = Mapped::Every { step: 2, phase: 1 };
    spec.first_block = FirstBlock::Extra(2);
    spec
}

fn broken(dir: &Path, version: u8, names: &[&str]) -> Result<PathBuf> {
    let path = dir.join(format!("{version}-{}.hds", names.join("+")));
    spec(version).write(&path)?;
    for name in names {
        corrupt::apply(name, &path).with_context(|| (*name).to_string())?;
    }
    Ok(path)
}

fn safe_damage_is_mended() -> Outcome {
    let dir = scratch()?;
    let safe: [&[&str]; 6] = [
        &["h-in-use"],
        &["t-leak-tail", "h-in-use"],
        &["t-odd-length", "h-in-use"],
        &["h-extension-stale", "h-in-use"],
        &["h-extension-stale"],
        &["t-slots-after-end", "h-in-use"],
    ];
    for version in [1, 2] {
        for names in safe {
            let path = broken(dir.path(), version, names)?;
            let at = dir.path().join("mnt");
            fs::create_dir_all(&at)?;
            let (mounted, said) = Mounted::telling(&at, &path, &[])?;
            if names.contains(&"h-in-use") {
                ensure!(
                    !said.stderr.trim().is_empty(),
                    "{names:?}: mending was not told"
                );
            }
            expect_flat(&mounted.disk(), &Model::of(&spec(version)))
                .with_context(|| format!("{names:?}"))?;
            let file = OpenOptions::new().write(true).open(mounted.disk())?;
            file.write_all_at(&[1; 512], (SECTORS - 1) * 512)?;
            drop(file);
            mounted.umount()?;
            support::expect_clean(&path).with_context(|| format!("{names:?}"))?;
            let extension = support::read_at(&path, 56, 8)?;
            ensure!(
                extension == [0; 8],
                "{names:?}: a stale extension offset stayed"
            );
        }
    }
    Ok(())
}

/// A crash while the file was growing: the entry is there, half of its cluster is not. What was
/// never written reads as zeros, and the user is told.
fn cut_last_cluster_is_extended() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        let path = broken(dir.path(), version, &["t-straddle", "h-in-use"])?;
        let last = spec(version).slots().last().context("nothing is mapped")?.0;
        let model = Model::of(&spec(version));
        let total = usize::try_from(model.bytes())?;
        let mut want = model.read(0, total);
        let lost = usize::try_from(last)? * 64 * 512 + 32 * 512;
        let end = total.min(lost + 32 * 512);
        want[lost.min(end)..end].fill(0);
        let at = dir.path().join("mnt");
        fs::create_dir_all(&at)?;
        // Looking only: what is not all there is an error, not a guess.
        let mounted = Mounted::at(&at, &path, &["-r"])?;
        expect_one_bad(&mounted.disk(), &model, last)?;
        mounted.umount()?;
        let (mounted, said) = Mounted::telling(&at, &path, &[])?;
        ensure!(
            !said.stderr.trim().is_empty(),
            "nothing was told about the lost tail"
        );
        let found = support::read_at(&mounted.disk(), 0, total)?;
        mounted.umount()?;
        let difference = crate::forge::content::first_difference(0, &want, &found);
        ensure!(difference.is_none(), "{}", difference.unwrap_or_default());
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn worse_damage_is_refused() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        for name in [
            "t-in-table",
            "t-past-eof",
            "t-far",
            "t-all-ones",
            "t-duplicate",
        ] {
            let path = broken(dir.path(), version, &[name, "h-in-use"])?;
            let before = support::fingerprint(&path)?;
            let refused = Mounted::refused(dir.path(), &path, &[])?;
            // What to do next: mend it, or look at it without writing.
            refused
                .expect_words(&["repair", "mount -r"])
                .with_context(|| name.to_string())?;
            let at = dir.path().join("mnt");
            fs::create_dir_all(&at)?;
            let (mounted, said) = Mounted::telling(&at, &path, &["-r"])?;
            ensure!(
                !said.stderr.trim().is_empty(),
                "{name}: mount -r gave no warning"
            );
            mounted.umount()?;
            ensure!(
                before == support::fingerprint(&path)?,
                "{name}: the image was changed"
            );
        }
    }
    Ok(())
}

/// Every cluster reads as its model says, except one, every read of which is EIO.
fn expect_one_bad(disk: &Path, model: &Model, bad: u64) -> Outcome {
    let cluster = 64 * 512;
    let file = File::open(disk)?;
    for number in 0..SECTORS.div_ceil(64) {
        let at = number * cluster;
        let len = cluster.min(SECTORS * 512 - at) as usize;
        if number != bad {
            expect_range(disk, model, at, len)?;
            continue;
        }
        // Whole, its first and last sector, and across either border.
        for (at, len) in [
            (at, 512),
            (at + cluster - 512, 512),
            (at, len),
            (at - 512, 1024),
        ] {
            let mut bytes = vec![0; len];
            let answer = file.read_at(&mut bytes, at);
            let errno = answer.as_ref().err().and_then(std::io::Error::raw_os_error);
            // Page cache may cut a read before the bad cluster; what it returns must then be right.
            match answer {
                Ok(short) if at < bad * cluster && short <= 512 => {
                    expect_range(disk, model, at, short)?;
                }
                _ => ensure!(
                    errno == Some(Errno::EIO as i32),
                    "{len} bytes at {at}: {answer:?}"
                ),
            }
        }
    }
    Ok(())
}

fn bad_entries_are_eio() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        for name in ["t-in-table", "t-past-eof", "t-far", "t-all-ones"] {
            let path = broken(dir.path(), version, &[name])?;
            let before = support::fingerprint(&path)?;
            let bad = corrupt::nth_mapped(&path, 0)?;
            let context = || format!("version {version}, {name}, cluster {bad}");
            ensure!(
                bad > 0,
                "the first cluster has none before it: choose another seed"
            );
            Mounted::refused(dir.path(), &path, &[])?
                .expect_words(&["repair"])
                .with_context(context)?;
            let mounted = Mounted::new(dir.path(), &path, &["-r"]).with_context(context)?;
            expect_one_bad(&mounted.disk(), &Model::of(&spec(version)), bad)
                .with_context(context)?;
            mounted.umount()?;
            ensure!(
                before == support::fingerprint(&path)?,
                "{}: changed",
                context()
            );
        }
    }
    Ok(())
}

fn odd_descriptors_are_understood() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(1, 64, 6403).mapping(Mapped::Percent(40));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {});
    for name in [
        "x-root",
        "x-no-top",
        "x-two-roots",
        "x-upper-guid",
        "x-bare-guid",
        "x-no-blocksize",
        "x-left-tmp",
        "x-image-without-shot",
        "x-key-id",
        "x-lower-in-use",
        "x-plain-type",
    ] {
        let path = dir.path().join(format!("{name}.hdd"));
        bundle.write(&path)?;
        corrupt::apply(name, &path)?;
        let before = support::fingerprint(&path)?;
        let mounted = Mounted::new(dir.path(), &path, &["-r"]).context(name)?;
        expect_flat(&mounted.disk(), &bundle.model()).context(name)?;
        mounted.umount()?;
        ensure!(
            before == support::fingerprint(&path)?,
            "{name}: -r changed the bundle"
        );
    }
    Ok(())
}

fn shared_entries_are_refused() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        let path = broken(dir.path(), version, &["t-duplicate"])?;
        let before = support::fingerprint(&path)?;
        Mounted::refused(dir.path(), &path, &[])?.expect_words(&["repair"])?;
        ensure!(
            before == support::fingerprint(&path)?,
            "a refused mount changed the image"
        );
    }
    Ok(())
}

fn with_bitmap(path: &Path) -> Result<ImageSpec> {
    let mut spec = ImageSpec::new(2, 64, SECTORS).mapping(Mapped::Percent(50));
    spec.mark = V21;
    spec.bitmap = Some(BitmapSpec::new(vec![0, 3, 40]));
    spec.write(path)?;
    Ok(spec)
}

fn bitmaps_are_kept_or_dropped() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    let spec = with_bitmap(&path)?;
    let before = support::fingerprint(&path)?;
    Mounted::refused(dir.path(), &path, &[])?.expect_words(&["bitmap", "--drop-bitmaps"])?;
    let mounted = Mounted::new(dir.path(), &path, &["-r"])?;
    expect_flat(&mounted.disk(), &Model::of(&spec))?;
    mounted.umount()?;
    ensure!(
        before == support::fingerprint(&path)?,
        "the bitmap was touched"
    );
    let at = dir.path().join("mnt");
    let (mounted, said) = Mounted::telling(&at, &path, &["--drop-bitmaps"])?;
    said.expect_words(&["bitmap"])?;
    let header = support::read_at(&path, 44, 20)?;
    ensure!(
        &header[..4] == b"Ynot" && header[12..] == [0; 8],
        "header {header:02x?} while open"
    );
    expect_flat(&mounted.disk(), &Model::of(&spec))?;
    mounted.umount()?;
    support::expect_clean(&path)?;
    let header = support::read_at(&path, 44, 20)?;
    ensure!(
        header[..4] == [0; 4] && header[12..] == [0; 8],
        "header {header:02x?} when closed"
    );
    command::ok(
        command::new("qemu-img")
            .args(["check", "-f", "parallels"])
            .arg(&path),
    )?;
    Ok(())
}

fn bad_extensions_do_not_matter() -> Outcome {
    let dir = scratch()?;
    for name in corrupt::ALL
        .iter()
        .map(|c| c.name)
        .filter(|name| name.starts_with("e-"))
    {
        let path = dir.path().join(name);
        let spec = with_bitmap(&path)?;
        corrupt::apply(name, &path)?;
        let before = support::fingerprint(&path)?;
        let mounted = Mounted::new(dir.path(), &path, &["-r"]).context(name)?;
        expect_flat(&mounted.disk(), &Model::of(&spec)).context(name)?;
        mounted.umount()?;
        ensure!(
            before == support::fingerprint(&path)?,
            "{name}: -r changed the image"
        );
        // A feature that says it is necessary forbids writing; what is unreadable is dropped or
        // refused. Either way the data stays.
        let at = dir.path().join("mnt");
        match Mounted::at(&at, &path, &[]) {
            Ok(mounted) => {
                ensure!(name != "e-necessary", "a necessary feature was ignored");
                expect_flat(&mounted.disk(), &Model::of(&spec)).context(name)?;
                mounted.umount()?;
                support::expect_clean(&path).context(name)?;
            }
            Err(_) => {
                ensure!(
                    before == support::fingerprint(&path)?,
                    "{name}: changed and refused"
                );
            }
        }
    }
    Ok(())
}

fn no_damage_brings_the_daemon_down() -> Outcome {
    let dir = scratch()?;
    let images = corrupt::ALL
        .iter()
        .map(|c| c.name)
        .filter(|n| !n.starts_with(['x', 'e']));
    for name in images {
        let path = broken(dir.path(), 1, &[name])?;
        let before = support::fingerprint(&path)?;
        let at = dir.path().join("mnt");
        fs::create_dir_all(&at)?;
        match Mounted::at(&at, &path, &["-r"]) {
            Ok(mounted) => {
                let size = fs::metadata(mounted.disk())?.len();
                let file = File::open(mounted.disk())?;
                let mut piece = vec![0; 100_000];
                for at in (0..size.min(64 << 20)).step_by(100_000) {
                    let _ = file.read_at(&mut piece, at);
                }
                drop(file);
                mounted.umount().with_context(|| name.to_string())?;
            }
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(!text.contains("panicked"), "{name}: {text}");
            }
        }
        ensure!(
            before == support::fingerprint(&path)?,
            "{name}: -r changed the image"
        );
    }
    Ok(())
}

fn no_space_arrives() -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err(support::harness::skip("only root can make a small tmpfs"));
    }
    let dir = scratch()?;
    let small = dir.path().join("small");
    let host = support::guards::FsMount::with(
        Path::new("none"),
        &small,
        &["-t", "tmpfs", "-o", "size=24m"],
    )?;
    let path = small.join("a.hds");
    ImageSpec::new(2, 2048, 200 << 11).write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &["--enospc", "fail"])?;
    let file = OpenOptions::new().write(true).open(mounted.disk())?;
    let mut written = 0;
    let errno = loop {
        match file.write_all_at(&vec![written as u8 + 1; 1 << 20], written << 20) {
            Ok(()) => written += 1,
            Err(error) => break error.raw_os_error(),
        }
        ensure!(written < 200, "200 MiB went into 24");
    };
    ensure!(
        errno == Some(Errno::ENOSPC as i32),
        "errno {errno:?} after {written} MiB"
    );
    ensure!(written > 4, "only {written} MiB fitted");
    file.sync_all().context("fsync after ENOSPC")?;
    // What is there already can still be read and written.
    file.write_all_at(b"in place", 0)?;
    drop(file);
    for number in 1..written {
        let found = support::read_at(&mounted.disk(), number << 20, 1 << 20)?;
        ensure!(
            found.iter().all(|byte| *byte == number as u8 + 1),
            "MiB {number} is torn"
        );
    }
    mounted.umount()?;
    support::expect_clean(&path)?;
    host.umount()
}
