//! A host that fails a sync or a write of the table: the disk is read-only from then on, says so,
//! and what was durable is there after a restart. And power cuts under a running daemon.
//!
//! Imports: `host`, `ledger`, `writer`, `forge`, `support`; std, `anyhow`, `nix`.
//! Never: relies on a time that something should take.

use super::host::{Fault, Host};
use super::ledger::{Content, Ledger};
use super::writer::{self, Aligned, Load, Writer};
use super::{STOP, seed};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, mix, splitmix};
use crate::forge::image::{IN_USE, ImageSpec, Mapped, write_plain};
use crate::forge::reader::{self, Flat};
use crate::support::guards::{Mounted, is_mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, Fuse, Root};
use crate::support::{self, Outcome, PLOOPFS, command, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;
use tempfile::TempDir;

const NEEDS: &[Need] = &[Fuse, Root];
const CLUSTER: u32 = 128;
const SECTORS: u64 = 24 * 2048;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("failed_data_sync_latches", NEEDS, || {
            latches(Fault::Sync(0))
        }),
        trial("failed_table_sync_latches", NEEDS, || {
            latches(Fault::Sync(1))
        }),
        trial("failed_table_write_latches", NEEDS, || {
            latches(Fault::Write(table()))
        }),
        trial("failed_timer_flush_latches", NEEDS, timer_latches),
        trial("failed_close_keeps_the_mark", NEEDS, close_keeps_the_mark),
        trial("failed_mark_lets_nothing_through", NEEDS, mark_fails),
        trial("failed_data_write_is_one_error", NEEDS, write_fails),
        trial("power_cuts_under_the_daemon", NEEDS, power_cuts),
    ]
}

fn spec_of(version: u8) -> ImageSpec {
    let mut spec = ImageSpec::new(version, CLUSTER, SECTORS).mapping(Mapped::Percent(30));
    spec.seed = seed();
    spec
}

fn spec() -> ImageSpec {
    spec_of(2)
}

fn table() -> std::ops::Range<u64> {
    64..64 + 4 * spec().entries()
}

/// An image on a failing host, with its books.
struct Bench {
    host: Host,
    ledger: Arc<Ledger>,
    image: PathBuf,
    /// A plain base below the image.
    base: Option<PathBuf>,
    dice: u64,
    // The mounts above go first.
    dir: TempDir,
}

/// `ploopfs mount -f`, whose log can be read.
struct Front {
    child: Child,
    at: PathBuf,
    log: PathBuf,
}

impl Front {
    fn start(bench: &Bench, options: &[&str]) -> Result<Self> {
        let (at, log) = (bench.dir.path().join("mnt"), bench.dir.path().join("log"));
        fs::create_dir_all(&at)?;
        let child = command::new(PLOOPFS)
            .args(["mount", "-f"])
            .args(options)
            .arg(&bench.image)
            .arg(&at)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        let mut front = Self { child, at, log };
        command::eventually(Duration::from_secs(60), || {
            let ended = front.child.try_wait()?;
            ensure!(ended.is_none(), "ended with {ended:?}: {}", front.said());
            ensure!(front.disk().exists(), "not mounted: {}", front.said());
            Ok(())
        })?;
        Ok(front)
    }

    fn disk(&self) -> PathBuf {
        self.at.join("disk.img")
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn latched(&self) -> Result<Option<String>> {
        let text = fs::read_to_string(self.at.join("stats.json"))?;
        let stats: serde_json::Value = serde_json::from_str(&text)?;
        let latched = stats.get("latched").context("stats.json has no latched")?;
        Ok(latched.as_str().map(str::to_owned))
    }

    /// Why the disk is read-only must be in stats.json and in the log.
    fn expect_told(&self, why: &str) -> Outcome {
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
    fn umount(mut self) -> Result<(command::Finished, i32)> {
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
    fn new(number: u64) -> Result<Self> {
        Self::with(number, &spec(), false)
    }

    fn with(number: u64, spec: &ImageSpec, over_base: bool) -> Result<Self> {
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
        Ok(Self {
            host: Host::over(&image)?,
            ledger: Arc::new(Ledger::new(dice, model)),
            image,
            base,
            dice,
            dir,
        })
    }

    /// How the chain is named to `ploopfs mount`.
    fn options(&self) -> Vec<&str> {
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
    fn work(&mut self, disk: &Path) -> Outcome {
        let seed = splitmix(&mut self.dice);
        let writer = Writer::start(disk, &self.ledger, &self.load(), seed);
        sleep(Duration::from_millis(300));
        writer.stop()?;
        let begun = self.ledger.flush();
        File::open(disk)?.sync_all()?;
        self.ledger.flushed(begun);
        Ok(())
    }

    /// One write of so many sectors.
    fn write(&self, file: &File, first: u64, count: u64) -> std::io::Result<()> {
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
    fn scatter(&mut self, file: &File) -> Outcome {
        for _ in 0..40 {
            let first = splitmix(&mut self.dice) % (SECTORS - 300);
            let count = 1 + splitmix(&mut self.dice) % 300;
            self.write(file, first, count)?;
        }
        Ok(())
    }

    /// Every sector can be read, and shows nothing older than what is durable. It may be older than
    /// what was written last: a host that failed to keep that may have forgotten it.
    fn read_all(&self, file: &File) -> Outcome {
        writer::read_all(file, 0..SECTORS, |first, bytes| {
            self.ledger.seen(0, first, bytes)
        })
    }

    /// Writes, zeros and flushes fail with EIO, now and later; reads go on.
    fn expect_latched(&self, file: &File) -> Outcome {
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
            let number = self.ledger.issue(Content::Zeros, 128..256);
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let zeroed = fallocate(file, mode, 128 * 512, 128 * 512);
            self.ledger.failed(number);
            expect("discard", zeroed.map_err(Into::into))?;
            self.read_all(file)?;
        }
        Ok(())
    }

    /// After the daemon has gone: the mark is there, and a restart shows what was durable.
    fn expect_durable(&mut self) -> Outcome {
        ensure!(self.host.durable_mark() == IN_USE, "the mark has gone");
        self.host.arm(Fault::None);
        self.reopen()?;
        // Nor does a power cut take any of that away.
        self.host.cut(&mut self.dice)?;
        self.reopen()
    }

    fn reopen(&mut self) -> Outcome {
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

/// A fault in a flush that somebody waits for.
fn latches(fault: Fault) -> Outcome {
    let mut bench = Bench::new(1)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    bench.scatter(&file)?;
    ensure!(front.latched()?.is_none(), "latched too early");
    bench.host.arm(fault);
    let failed = file.sync_all().err().and_then(|e| e.raw_os_error());
    ensure!(failed == Some(Errno::EIO as i32), "fsync: errno {failed:?}");
    ensure!(bench.host.failed() == 1, "the fault did not happen");
    bench.expect_latched(&file)?;
    front.expect_told("a flush failed")?;
    drop(file);
    let (done, status) = front.umount()?;
    // The mount has gone, but whoever asked must know that the image was not closed.
    ensure!(
        done.code() != 0 && status != 0,
        "{status}: {}",
        done.story()
    );
    bench.expect_durable()
}

/// Nobody waits for the flush that fails; the next who asks must be told.
fn timer_latches() -> Outcome {
    let mut bench = Bench::new(2)?;
    let front = Front::start(&bench, &["--flush-interval=0.1"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    bench.host.arm(Fault::Sync(0));
    // Once the timer has met the fault, writes fail, too.
    command::eventually(Duration::from_secs(60), || {
        // The timer has something to do when clusters get a place, so any place will do here.
        let first = splitmix(&mut bench.dice) % SECTORS;
        let _ = bench.write(&file, first, 1);
        ensure!(front.latched()?.is_some(), "the timer does not flush");
        Ok(())
    })?;
    bench.expect_latched(&file)?;
    front.expect_told("a flush failed")?;
    drop(file);
    let (done, status) = front.umount()?;
    ensure!(
        done.code() != 0 && status != 0,
        "{status}: {}",
        done.story()
    );
    bench.expect_durable()
}

/// The last flush fails, or the sync that makes the cut durable: the mark stays.
fn close_keeps_the_mark() -> Outcome {
    for after in 0..4 {
        let mut bench = Bench::new(3 + u64::from(after))?;
        let front = Front::start(&bench, &["--flush-interval=0"])?;
        bench.work(&front.disk())?;
        let file = writer::open(&front.disk(), true)?;
        bench.scatter(&file)?;
        drop(file);
        bench.host.arm(Fault::Sync(after));
        let log = front.log.clone();
        let (done, status) = front.umount()?;
        if bench.host.failed() == 0 {
            ensure!(after > 2, "a close with {after} syncs");
            continue;
        }
        let said = fs::read_to_string(log)?;
        let story = format!(
            "sync {after}: status {status}, {}, log {said}",
            done.story()
        );
        ensure!(done.code() != 0 && status != 0, "{story}");
        ensure!(said.contains("read-only from now on"), "{story}");
        bench.expect_durable().context(story)?;
    }
    Ok(())
}

/// The mark cannot be made durable: no write gets through, and nothing else has changed.
fn mark_fails() -> Outcome {
    let mut bench = Bench::new(8)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    let file = writer::open(&front.disk(), true)?;
    bench.host.arm(Fault::Sync(0));
    let failed = bench
        .write(&file, 0, 64)
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(failed == Some(Errno::EIO as i32), "write: errno {failed:?}");
    ensure!(bench.host.failed() == 1, "the fault did not happen");
    bench.read_all(&file)?;
    bench.expect_latched(&file)?;
    front.expect_told("mark")?;
    drop(file);
    front.umount()?;
    // Marked or not, but with the content of before.
    bench.host.arm(Fault::None);
    bench.reopen()
}

/// A write of data that fails is an error of that request alone.
fn write_fails() -> Outcome {
    let mut bench = Bench::new(9)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    let data = spec().data_start() * 512;
    bench.host.arm(Fault::Write(data..u64::MAX));
    let failed = bench
        .write(&file, 640, 200)
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(failed == Some(Errno::EIO as i32), "write: errno {failed:?}");
    bench.scatter(&file)?;
    let begun = bench.ledger.flush();
    file.sync_all().context("fsync after a failed write")?;
    bench.ledger.flushed(begun);
    bench.read_all(&file)?;
    ensure!(front.latched()?.is_none(), "latched by a failed write");
    drop(file);
    let (done, status) = front.umount()?;
    ensure!(
        done.code() == 0 && status == 0,
        "{status}: {}",
        done.story()
    );
    bench.reopen()
}

/// The daemon is killed and the host loses what was not synced, again and again.
fn power_cuts() -> Outcome {
    let cuts = super::number("PLOOPFS_KILLS").unwrap_or(super::KILLS) / 6;
    let benches = [
        Bench::with(10, &spec_of(2), false)?,
        Bench::with(11, &spec_of(1), false)?,
        Bench::with(12, &spec_of(2), true)?,
    ];
    let (mut kills, mut judged, mut issued) = (0, 0, 0);
    for mut bench in benches {
        let before = bench.base.as_deref().map(support::sha256).transpose()?;
        for cut in 0..cuts.max(2) {
            let told = || format!("power cut {cut}, PLOOPFS_SEED={}", seed());
            bench.cut().with_context(told)?;
            kills += 1;
            ensure!(!STOP.load(Ordering::Relaxed), "stopped by a signal");
        }
        bench.reopen()?;
        let after = bench.base.as_deref().map(support::sha256).transpose()?;
        ensure!(before == after, "the base was written to");
        judged += bench.ledger.judged();
        issued += bench.ledger.issued();
    }
    eprintln!(
        "killed power_cuts_under_the_daemon : {kills} kills {judged} sectors {issued} requests \
         0 bad"
    );
    Ok(())
}

impl Bench {
    /// A mount, a load, a kill, a power cut, and what it left.
    fn cut(&mut self) -> Outcome {
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

    /// Judges what the cut left, by the reader that knows nothing of ploopfs.
    fn look(&self) -> Outcome {
        let copy = self.dir.path().join("copy");
        self.host.save(&copy)?;
        let mut wrong = reader::check(&copy)?;
        // What no entry names may end anywhere.
        let harmless = ["in-use mark", "flag Empty", "no multiple"];
        wrong.retain(|what| !harmless.iter().any(|word| what.contains(word)));
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
