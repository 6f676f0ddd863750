//! An image on a host that can be told to fail, its books, and a daemon whose log can be read.
//!
//! Imports: `host`, `ledger`, `writer`, `forge`, `support`; std, `anyhow`, `nix`.
//! Never: relies on a time that something should take.

use super::host::{Fault, Host};
use super::ledger::{Content, Ledger};
use super::seed;
use super::subject::Extent;
use super::writer::{self, Aligned, Load, Writer};
use crate::forge::bundle::{BundleSpec, Style, TOP};
use crate::forge::content::{Level, mix, splitmix};
use crate::forge::corrupt;
use crate::forge::image::{IN_USE, ImageSpec, Mapped, write_plain};
use crate::forge::reader::{self, Flat};
use crate::support::guards::{Mounted, is_mounted, text};
use crate::support::{self, Outcome, PLOOPFS, command, rings, scratch};
use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Sectors of a cluster.
pub(crate) const CLUSTER: u32 = 128;
/// Sectors of the disk.
pub(crate) const SECTORS: u64 = 24 * 2048;

pub(crate) fn spec_of(version: u8) -> ImageSpec {
    let mut spec = ImageSpec::new(version, CLUSTER, SECTORS).mapping(Mapped::Percent(30));
    spec.seed = seed();
    spec
}

/// The usual image.
pub(crate) fn spec() -> ImageSpec {
    spec_of(2)
}

/// Bytes of its table.
pub(crate) fn table() -> std::ops::Range<u64> {
    64..64 + 4 * spec().entries()
}

/// An image on a failing host, with its books.
pub(crate) struct Bench {
    pub(crate) host: Host,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) image: PathBuf,
    /// A plain base below the image.
    pub(crate) base: Option<PathBuf>,
    pub(crate) dice: u64,
    // The mounts above go first.
    pub(crate) dir: TempDir,
}

/// `ploopfs mount -f`, whose log can be read.
pub(crate) struct Front {
    child: Child,
    at: PathBuf,
    pub(crate) log: PathBuf,
}

impl Front {
    pub(crate) fn start(bench: &Bench, options: &[&str]) -> Result<Self> {
        let (at, log) = (bench.dir.path().join("mnt"), bench.dir.path().join("log"));
        fs::create_dir_all(&at)?;
        let child = command::new(PLOOPFS)
            .args(["mount", "-f", &rings::option()])
            .args(options)
            .arg(&bench.image)
            .arg(&at)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let mut front = Self { child, at, log };
        let begun = Instant::now();
        while !front.disk().exists() {
            let ended = front.child.try_wait()?;
            ensure!(ended.is_none(), "ended with {ended:?}: {}", front.said());
            ensure!(
                begun.elapsed() < command::LIMIT,
                "not mounted: {}",
                front.said()
            );
            sleep(Duration::from_millis(5));
        }
        Ok(front)
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.at.join("disk.img")
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn latched(&self) -> Result<Option<String>> {
        let text = fs::read_to_string(self.at.join("stats.json"))?;
        let stats: serde_json::Value = serde_json::from_str(&text)?;
        let latched = stats.get("latched").context("stats.json has no latched")?;
        Ok(latched.as_str().map(str::to_owned))
    }

    /// Why the disk is read-only must be in stats.json and in the log.
    pub(crate) fn expect_told(&self, why: &str) -> Outcome {
        let latched = self.latched()?.context("stats.json tells nothing")?;
        ensure!(latched.contains(why), "stats.json says {latched:?}");
        let said = self.said();
        ensure!(
            said.contains("read-only from now on") && said.contains(why),
            "the log says {said:?}"
        );
        Ok(())
    }

    /// Unmounts by `ploopfs umount`; the codes of both programs.
    pub(crate) fn umount(mut self) -> Result<(command::Finished, i32)> {
        let done = command::run(command::ploopfs(&["umount"]).arg(&self.at))?;
        let status = command::eventually(Duration::from_secs(20), || {
            self.child.try_wait()?.context("the daemon stays")
        })?;
        Ok((done, status.code().unwrap_or(-1)))
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if is_mounted(&self.at) {
            let _ = command::run(command::new("umount").args(["-i", "-l", text(&self.at)]));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bench {
    pub(crate) fn new(number: u64) -> Result<Self> {
        Self::with(number, &spec(), false)
    }

    pub(crate) fn with(number: u64, spec: &ImageSpec, over_base: bool) -> Result<Self> {
        Self::damaged(number, spec, over_base, &[])
    }

    /// The same with damage that takes no content away.
    pub(crate) fn damaged(
        number: u64,
        spec: &ImageSpec,
        over_base: bool,
        damage: &[&str],
    ) -> Result<Self> {
        let dir = scratch()?;
        let image = dir.path().join("a.hds");
        let dice = mix(&[seed(), number]);
        let mut levels = vec![Level::Image(spec.clone())];
        let mut base = None;
        if over_base {
            let bytes = SECTORS * 512 - 70_001;
            let path = dir.path().join("base.raw");
            write_plain(&path, dice, 0, 0, bytes)?;
            let (seed, level) = (dice, 0);
            levels.insert(0, Level::Plain { seed, level, bytes });
            base = Some(path);
        }
        // The levels get their numbers here, which the sectors carry.
        let mut model = BundleSpec::new(Style::Ploop, levels).model();
        match model.parts[0].levels.last_mut() {
            Some(Level::Image(top)) => top.write(&image)?,
            _ => unreachable!("the top is an image"),
        }
        for name in damage {
            corrupt::apply(name, &image).with_context(|| (*name).to_owned())?;
        }
        Ok(Self {
            host: Host::over(&image)?,
            ledger: Arc::new(Ledger::new(dice, model)),
            image,
            base,
            dice,
            dir,
        })
    }

    /// A split disk of two parts over lower deltas; the host of the second fails.
    pub(crate) fn split(number: u64) -> Result<Self> {
        let dir = scratch()?;
        let dice = mix(&[seed(), number]);
        let part = |sectors| {
            let spec = ImageSpec::new(2, CLUSTER, sectors);
            let lower = spec.clone().mapping(Mapped::Percent(40));
            vec![Level::Image(lower), Level::Image(spec)]
        };
        let first = SECTORS / 2 + 24;
        let mut bundle = BundleSpec::new(Style::Parallels, part(first));
        bundle.push_part(part(SECTORS - first));
        let path = dir.path().join("a.hdd");
        bundle.write(&path)?;
        let top = bundle.files(&path, 1).pop().context("no second part")?;
        Ok(Self {
            host: Host::over(&top)?,
            ledger: Arc::new(Ledger::new(dice, bundle.model())),
            image: path,
            base: None,
            dice,
            dir,
        })
    }

    /// The writable file of the other part.
    pub(crate) fn sound_part(&self) -> Result<PathBuf> {
        let mut files = fs::read_dir(&self.image)?
            .flatten()
            .map(|entry| entry.path());
        let top = files.find(|path| {
            let name = path.to_string_lossy();
            name.contains(".0.") && name.contains(TOP)
        });
        top.context("no first part")
    }

    /// How the chain is named to `ploopfs mount`.
    pub(crate) fn options(&self) -> Vec<&str> {
        let lower = |base| vec!["--format", "raw", "--lower", text(base)];
        self.base.as_deref().map(lower).unwrap_or_default()
    }

    fn load(&self) -> Load {
        Load {
            threads: 3,
            region: 0..SECTORS,
            cluster: u64::from(CLUSTER),
            grain: 1,
            direct: true,
            device: false,
            full: false,
            flushes: 8,
            zeros: 12,
            reads: 15,
        }
    }

    /// A load that meets no fault, and a flush at its end.
    pub(crate) fn work(&mut self, disk: &Path) -> Outcome {
        let seed = splitmix(&mut self.dice);
        let writer = Writer::start(disk, &self.ledger, &self.load(), seed);
        sleep(Duration::from_millis(300));
        writer.stop()?;
        let begun = self.ledger.flush();
        File::open(disk)?.sync_all()?;
        self.ledger.flushed(begun);
        Ok(())
    }

    /// A discard, or a zero range.
    pub(crate) fn zero(&self, file: &File, first: u64, count: u64, punch: bool) -> nix::Result<()> {
        let number = self.ledger.issue(Content::Zeros, first..first + count);
        let way = match punch {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let mode = way | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let result = fallocate(file, mode, first as i64 * 512, count as i64 * 512);
        match result {
            Ok(()) => self.ledger.done(number),
            Err(_) => self.ledger.failed(number),
        }
        result
    }

    /// A flush.
    pub(crate) fn flush(&self, file: &File) -> std::io::Result<()> {
        let begun = self.ledger.flush();
        file.sync_all()?;
        self.ledger.flushed(begun);
        Ok(())
    }

    /// One write of so many sectors.
    pub(crate) fn write(&self, file: &File, first: u64, count: u64) -> std::io::Result<()> {
        let number = self.ledger.issue(Content::Stamp, first..first + count);
        let mut buffer = Aligned::new();
        let bytes = buffer.take(count as usize * 512);
        self.ledger.fill(number, first, bytes);
        let result = file.write_all_at(bytes, first * 512);
        match &result {
            Ok(()) => self.ledger.done(number),
            Err(_) => self.ledger.failed(number),
        }
        result
    }

    /// Writes in place, to holes and across borders.
    pub(crate) fn scatter(&mut self, file: &File) -> Outcome {
        for _ in 0..40 {
            let first = splitmix(&mut self.dice) % (SECTORS - 300);
            let count = 1 + splitmix(&mut self.dice) % 300;
            self.write(file, first, count)?;
        }
        Ok(())
    }

    /// Every sector can be read, and shows nothing older than what is durable. It may be older than
    /// what was written last: a host that failed to keep that may have forgotten it.
    pub(crate) fn read_all(&self, file: &File) -> Outcome {
        writer::read_all(file, 0..SECTORS, |first, bytes| {
            self.ledger.seen(0, first, bytes)
        })
    }

    /// Writes, zeros and flushes fail with EIO, now and later; reads go on.
    pub(crate) fn expect_latched(&self, file: &File) -> Outcome {
        for round in 0..3 {
            let errno = Errno::EIO as i32;
            let expect = |what: &str, result: std::io::Result<()>| {
                let found = result.as_ref().err().and_then(std::io::Error::raw_os_error);
                ensure!(found == Some(errno), "{what} {round}: {result:?}");
                Ok(())
            };
            expect("fsync", file.sync_all())?;
            expect("fdatasync", file.sync_data())?;
            expect("write", self.write(file, round * 77, 9))?;
            let zeroed = self.zero(file, 128, 128, true);
            expect("discard", zeroed.map_err(Into::into))?;
            self.read_all(file)?;
        }
        Ok(())
    }

    /// After the daemon has gone: the mark is there, and a restart shows what was durable.
    pub(crate) fn expect_durable(&mut self) -> Outcome {
        ensure!(self.host.durable_mark() == IN_USE, "the mark has gone");
        self.host.arm(Fault::None);
        self.reopen()?;
        // Nor does a power cut take any of that away.
        self.host.cut(&mut self.dice)?;
        self.reopen()
    }

    pub(crate) fn reopen(&mut self) -> Outcome {
        let mounted = Mounted::new(self.dir.path(), &self.image, &self.options())?;
        let file = writer::open(&mounted.disk(), true)?;
        writer::read_all(&file, 0..SECTORS, |first, bytes| {
            self.ledger.settle(first, bytes)
        })
        .context("after a restart")?;
        drop(file);
        mounted.umount()?;
        let copy = self.dir.path().join("copy");
        self.host.save(&copy)?;
        support::expect_clean(&copy)
    }
}

impl Bench {
    /// A mount, a load, a kill, a power cut, and what it left.
    pub(crate) fn cut(&mut self) -> Outcome {
        let intervals = ["--flush-interval=0.05", "--flush-interval=5"];
        let interval = intervals[(splitmix(&mut self.dice) % 2) as usize];
        let seed = splitmix(&mut self.dice);
        let pause = Duration::from_millis(splitmix(&mut self.dice) % 400);
        let mut options = vec![interval, "--grow-step=1M", "--bat-cache=4K"];
        options.extend(self.options());
        let mounted = Mounted::new(self.dir.path(), &self.image, &options)?;
        let file = writer::open(&mounted.disk(), true)?;
        let settle = |first, bytes: &[u8]| self.ledger.settle(first, bytes);
        writer::read_all(&file, 0..SECTORS, settle).context("after a restart")?;
        drop(file);
        let writer = Writer::start(&mounted.disk(), &self.ledger, &self.load(), seed);
        sleep(pause);
        writer.expect_death();
        mounted.signal(Signal::SIGKILL)?;
        writer.stop()?;
        mounted.gone(Duration::from_secs(20))?;
        drop(mounted);
        self.host.cut(&mut self.dice)?;
        self.look()
    }

    /// True while no request has changed the image.
    fn is_new(&self) -> bool {
        self.ledger.issued() == 0
    }

    /// Judges what the cut left, by the reader that knows nothing of ploopfs.
    pub(crate) fn look(&self) -> Outcome {
        let copy = self.dir.path().join("copy");
        self.host.save(&copy)?;
        let mut wrong = reader::check(&copy)?;
        if support::mark_of(&copy)? == IN_USE {
            // What no entry names may end anywhere.
            let harmless = [
                "in-use mark",
                "flag Empty",
                "no multiple",
                "after the last entry",
            ];
            wrong.retain(|what| !harmless.iter().any(|word| what.contains(word)));
        } else {
            // Nobody will look at it again, so nothing may be left to do.
            let extent = Extent::of(&copy)?;
            let is_cut = extent.len == extent.used_end * extent.cluster;
            ensure!(is_cut || self.is_new(), "no mark, and a tail: {extent:?}");
        }
        ensure!(wrong.is_empty(), "needs repair: {}", wrong.join("; "));
        let chain: Vec<PathBuf> = self.base.iter().cloned().chain([copy]).collect();
        let flat = Flat::chain(&chain)?;
        for first in (0..SECTORS).step_by(2048) {
            let count = (SECTORS - first).min(2048);
            let bytes = flat.read(first * 512, count as usize * 512)?;
            let settled = self.ledger.settle(first, &bytes);
            settled.context("in the file that a power cut left")?;
        }
        Ok(())
    }
}
