//! A flat clone shows what the ordinary mount shows, or the mount is refused.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, Model};
use crate::forge::image::{FirstBlock, IN_USE, ImageSpec, Mapped};
use crate::support::guards::{Loop, Mounted, Xfs, text};
use crate::support::harness::{skip_excused, trial};
use crate::support::probe::Need::{self, Fuse, Loop as LoopDevices, Rings, Root};
use crate::support::{
    self, Outcome, command, expect_flat, fingerprint, rings, scratch, scratch_tmpfs,
};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const HOST: &[Need] = &[Fuse, Root, LoopDevices, Need::Xfs];
const FLAT: &[&str] = &["-r", "--linearize"];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("a_flat_clone_is_the_disk", HOST, is_the_disk),
        trial("a_flat_clone_of_odd_ends_is_the_disk", HOST, odd_ends),
        trial("a_flat_clone_of_a_split_disk", HOST, split_disk),
        trial("a_flat_clone_over_loop", HOST, over_loop),
        trial(
            "a_flat_clone_where_rings_are_offered",
            &[Fuse, Root, LoopDevices, Need::Xfs, Rings],
            where_rings_are_offered,
        ),
        trial("what_is_not_aligned_has_no_flat_clone", HOST, not_aligned),
        trial("what_cannot_be_read_has_no_flat_clone", HOST, unreadable),
        trial("an_unclosed_image_has_a_flat_clone", HOST, unclosed),
        trial("a_flat_clone_needs_the_right_to_it", HOST, no_right),
        trial(
            "hosts_that_share_no_blocks_are_told",
            &[Fuse, Root],
            no_reflink,
        ),
    ]
}

/// A file system that shares blocks.
struct Host(Xfs);

impl Host {
    fn new() -> Result<Self> {
        Ok(Self(Xfs::new(400 << 20)?))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn dir(&self) -> &Path {
        self.0.outside()
    }

    fn end(self) -> Outcome {
        self.0.end()
    }

    /// Mounts flat, and ordinarily: both show the model, the first without asking the daemon, and
    /// neither changes anything.
    fn expect_same(&self, image: &Path, model: &Model, options: &[&str]) -> Outcome {
        let before = fingerprint(self.0.path())?;
        let options = [FLAT, options].concat();
        let mounted = Mounted::new(self.dir(), image, &options)?;
        ensure!(fs::metadata(mounted.disk())?.len() == model.bytes(), "size");
        expect_flat(&mounted.disk(), model)?;
        let flat = support::sha256(&mounted.disk())?;
        let read = &mounted.json("stats.json")?["read_bytes"];
        ensure!(read.as_u64().is_some_and(|bytes| bytes < 1 << 20), "{read}");
        let opened = OpenOptions::new().write(true).open(mounted.disk());
        let errno = opened.err().and_then(|error| error.raw_os_error());
        ensure!(errno == Some(libc::EROFS), "for writing: {errno:?}");
        mounted.umount()?;
        let plain = [&["-r"], &options[FLAT.len()..]].concat();
        let mounted = Mounted::new(self.dir(), image, &plain)?;
        ensure!(support::sha256(&mounted.disk())? == flat, "another disk");
        mounted.umount()?;
        let after = fingerprint(self.0.path())?;
        ensure!(before == after, "something was changed or left");
        Ok(())
    }

    /// Must be refused with these words, and shown by an ordinary mount.
    fn expect_refused(&self, image: &Path, words: &[&str], model: &Model) -> Outcome {
        let before = fingerprint(self.0.path())?;
        Mounted::refused(self.dir(), image, FLAT)?.expect_words(words)?;
        let mounted = Mounted::new(self.dir(), image, &["-r"])?;
        expect_flat(&mounted.disk(), model)?;
        mounted.umount()?;
        ensure!(before == fingerprint(self.0.path())?, "changed");
        Ok(())
    }
}

fn chain() -> BundleSpec {
    // Parts of the same clusters at every level, and neighbours as well as single ones.
    let like = ImageSpec::new(2, 64, 64 * 1100).mapping(Mapped::Percent(40));
    BundleSpec::chain(Style::Ploop, &like, 4, |number, image| {
        if number == 0 {
            image.layout = crate::forge::image::Layout::Shuffled(3);
        }
        if number == 2 {
            image.mapped = Mapped::Every { step: 50, phase: 3 };
        }
    })
}

fn is_the_disk() -> Outcome {
    let host = Host::new()?;
    let spec = chain();
    let path = host.at("d.hdd");
    spec.write(&path)?;
    host.expect_same(&path, &spec.model(), &[])?;
    let snapshot = &["--snapshot", "latest"];
    host.expect_same(&path, &spec.model().frozen(3), snapshot)?;
    // Over a file, by mount(8)'s words, opened more than once at a time.
    let place = host.dir().join("flat");
    fs::write(&place, "")?;
    let mounted = Mounted::at(&place, &path, &["-o", "ro,linearize"])?;
    let other = File::open(mounted.disk())?;
    expect_flat(&mounted.disk(), &spec.model())?;
    let mut first = [0; 512];
    other.read_exact_at(&mut first, 0)?;
    ensure!(first[..] == spec.model().read(0, 512)[..], "the other one");
    drop(other);
    expect_flat(&mounted.disk(), &spec.model())?;
    mounted.umount()?;
    // What is written later is not seen: the clone is of the moment of the mount.
    let mounted = Mounted::new(host.dir(), &path, FLAT)?;
    expect_flat(
        &mounted.path().join("snapshots/latest/disk.img"),
        &spec.model().frozen(3),
    )?;
    ensure!(
        mounted.json("info.json")?["mount"]["options"]["linearize"] == true,
        "not told"
    );
    let mut spoiled = 0;
    for entry in fs::read_dir(&path)? {
        let file = entry?.path();
        let len = fs::metadata(&file)?.len();
        // Behind the header and the table.
        let Some(len) = len.checked_sub(1 << 16) else {
            continue;
        };
        let file = OpenOptions::new().write(true).open(&file)?;
        file.write_all_at(&vec![0xee; len as usize], 1 << 16)?;
        file.sync_all()?;
        spoiled += 1;
    }
    ensure!(spoiled == 4, "{spoiled} images");
    expect_flat(&mounted.disk(), &spec.model())?;
    mounted.umount()?;
    host.end()
}

fn odd_ends() -> Outcome {
    let host = Host::new()?;
    for (number, (version, cluster, sectors)) in [
        (1, 2048, 2048 * 20 + 8),
        (2, 2048, 9999),
        (2, 8, 8001),
        (1, 128, 130),
    ]
    .into_iter()
    .enumerate()
    {
        let mut spec = ImageSpec::new(version, cluster, sectors).mapping(Mapped::Percent(80));
        spec.garbage = true;
        let path = host.at(&format!("{number}.hds"));
        spec.write(&path)?;
        host.expect_same(&path, &Model::of(&spec), &[])
            .with_context(|| format!("{version} {cluster} {sectors}"))?;
    }
    // Levels that end before the disk does, one of them a plain file.
    let mut low = ImageSpec::new(2, 64, 64 * 50 + 3).mapping(Mapped::All);
    low.garbage = true;
    let plain = Level::Plain {
        seed: 9,
        level: 0,
        bytes: 64 * 30 * 512 + 1536,
    };
    let top = ImageSpec::new(2, 64, 64 * 80 + 5).mapping(Mapped::Every { step: 9, phase: 2 });
    let levels = vec![plain, Level::Image(low), Level::Image(top)];
    let spec = BundleSpec::new(Style::Parallels, levels);
    let path = host.at("short.hdd");
    spec.write(&path)?;
    host.expect_same(&path, &spec.model(), &[])?;
    host.end()
}

fn split_disk() -> Outcome {
    let host = Host::new()?;
    let part = |sectors, seed| {
        let mut spec = ImageSpec::new(2, 128, sectors).mapping(Mapped::Percent(50));
        spec.seed = seed;
        vec![Level::Image(spec.clone()), Level::Image(spec)]
    };
    let mut spec = BundleSpec::new(Style::Parallels, part(10_000, 1));
    spec.push_part(part(7_777, 2));
    let path = host.at("split.hdd");
    spec.write(&path)?;
    host.expect_same(&path, &spec.model(), &[])?;
    // A border within a block: what follows does not lie as the blocks do.
    let mut spec = BundleSpec::new(Style::Parallels, part(10_001, 1));
    spec.push_part(part(7_777, 2));
    let path = host.at("odd.hdd");
    spec.write(&path)?;
    let words = ["not supported", "bytes off", "4096", "--linearize"];
    host.expect_refused(&path, &words, &spec.model())?;
    host.end()
}

fn over_loop() -> Outcome {
    let host = Host::new()?;
    let spec = chain();
    let path = host.at("d.hdd");
    spec.write(&path)?;
    let mounted = Mounted::new(host.dir(), &path, FLAT)?;
    let device = Loop::with(&mounted.disk(), &["-r"])?;
    expect_device(device.dev(), &spec.model())?;
    device.detach()?;
    mounted.umount()?;
    let mut attach = command::ploopfs(&["attach", "-r", "--linearize"]);
    let said = command::ok(attach.arg(&path))?;
    let device = Path::new(said.trim());
    let same = expect_device(device, &spec.model());
    command::ok(command::ploopfs(&["detach"]).arg(device))?;
    same?;
    host.end()
}

/// Rings, which `auto` would take there, have no way to it.
fn where_rings_are_offered() -> Outcome {
    rings::on()?;
    let host = Host::new()?;
    let spec = chain();
    let path = host.at("d.hdd");
    spec.write(&path)?;
    host.expect_same(&path, &spec.model(), &["--transport", "auto"])?;
    host.end()
}

/// The device has the model's bytes.
fn expect_device(device: &Path, model: &Model) -> Outcome {
    let size = command::ok(command::new("blockdev").arg("--getsize64").arg(device))?;
    ensure!(size.trim() == model.bytes().to_string(), "{size}");
    support::expect_range(device, model, 0, model.bytes() as usize)
}

fn not_aligned() -> Outcome {
    let host = Host::new()?;
    let cases = [
        (1, 63, FirstBlock::Unaligned, "clusters of 32256 bytes"),
        (2, 4, FirstBlock::Minimum, "clusters of 2048 bytes"),
        (1, 64, FirstBlock::Zero, "bytes off"),
    ];
    for (number, (version, cluster, first, word)) in cases.into_iter().enumerate() {
        let mut spec = ImageSpec::new(version, cluster, 9000).mapping(Mapped::Percent(50));
        spec.first_block = first;
        let path = host.at(&format!("{number}.hds"));
        spec.write(&path)?;
        let words = ["not supported", word, "--linearize", "nothing was changed"];
        host.expect_refused(&path, &words, &Model::of(&spec))?;
    }
    host.end()
}

fn unreadable() -> Outcome {
    let host = Host::new()?;
    let spec = ImageSpec::new(2, 64, 64 * 100).mapping(Mapped::All);
    let path = host.at("bad.hds");
    spec.write(&path)?;
    let file = OpenOptions::new().write(true).open(&path)?;
    // Past the end of the file, past a later end, and the cluster which that one cuts.
    for entry in [1_000_000_u32, 102, 101] {
        file.write_all_at(&entry.to_le_bytes(), 64 + 4 * 57)?;
        let len = file.metadata()?.len();
        if entry == 102 {
            file.set_len(len + 8192)?;
        }
        let told = Mounted::refused(host.dir(), &path, FLAT)?;
        told.expect_words(&["corrupt", "entry", "cluster 57", "--linearize"])?;
        let mounted = Mounted::new(host.dir(), &path, &["-r"])?;
        let errno = support::read_at(&mounted.disk(), 57 * 64 * 512, 512).err();
        ensure!(errno.is_some(), "the cluster can be read");
        support::expect_range(&mounted.disk(), &Model::of(&spec), 0, 57 * 64 * 512)?;
        mounted.umount()?;
    }
    drop(file);
    host.end()
}

fn unclosed() -> Outcome {
    let host = Host::new()?;
    let mut spec = ImageSpec::new(2, 64, 64 * 300).mapping(Mapped::Percent(50));
    spec.mark = IN_USE;
    spec.tail = 3;
    let path = host.at("open.hds");
    spec.write(&path)?;
    host.expect_same(&path, &Model::of(&spec), &[])?;
    host.end()
}

fn no_right() -> Outcome {
    let host = Host::new()?;
    let spec = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let path = host.at("a.hds");
    spec.write(&path)?;
    let place = host.dir().join("place");
    fs::create_dir(&place)?;
    let words = [support::PLOOPFS, text(&path), text(&place)];
    let tried = command::run(&mut command::sh("exec unshare -Urm true", &[]))?;
    if !tried.status.success() {
        let why = format!("no user name spaces: {}", tried.text());
        host.end()?;
        return Err(skip_excused(why));
    }
    let script = "exec unshare -Urm \"$1\" mount -r --linearize \"$2\" \"$3\"";
    let told = command::run(&mut command::sh(script, &words))?.expect_code(1)?;
    told.expect_words(&["passthrough", "CAP_SYS_ADMIN", "--linearize"])?;
    host.end()
}

fn no_reflink() -> Outcome {
    let (dir, place) = (scratch()?, scratch()?);
    let memory = scratch_tmpfs()?;
    let spec = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let disk = nix::sys::statfs::statfs(dir.path())?.filesystem_type();
    for at in [dir.path(), memory.path()] {
        if at == dir.path() && disk != nix::sys::statfs::EXT4_SUPER_MAGIC {
            continue;
        }
        let path = at.join("a.hds");
        spec.write(&path)?;
        let before = fingerprint(at)?;
        let told = Mounted::refused(place.path(), &path, FLAT)?;
        let words = [
            "not supported",
            "share blocks",
            "XFS",
            "leave --linearize out",
        ];
        told.expect_words(&words)?;
        ensure!(before == fingerprint(at)?, "changed, or left");
        fs::remove_file(path)?;
    }
    let path = memory.path().join("a.hds");
    spec.write(&path)?;
    for (options, words) in [
        (&["--linearize"][..], ["wrong usage", "-r"]),
        (
            &["-r", "--linearize", "--transport", "dev"],
            ["wrong usage", "--transport"],
        ),
    ] {
        Mounted::refused(place.path(), &path, options)?.expect_words(&words)?;
    }
    let mut attach = command::ploopfs(&["attach", "-r", "--linearize"]);
    let told = command::run(attach.arg(&path))?.expect_code(1)?;
    told.expect_words(&["share blocks", "--linearize"])?;
    Ok(())
}
