//! Mount, load, kill, look, mount again: as often as asked.
//!
//! Imports: `ledger`, `writer`, `subject`, `stage`, `fio`, `support`; std, `anyhow`.
//! Never: kills a process that it did not start; goes on after the first wrong sector.
//!
//! After each kill the files are read three times: by the dumb reader as they lie there, which
//! settles what the disk holds; through the next mount, which must show the same; and strictly
//! checked in between, as nothing but the mark may need mending.

use super::fio::Fio;
use super::ledger::Ledger;
use super::stage::{self, Stage};
use super::subject::{ALL, Door, Made, Place, Subject};
use super::writer::{self, Load, Writer};
use super::{STOP, seed};
use crate::forge::content::{mix, splitmix};
use crate::forge::reader::Flat;
use crate::support::guards::{FsMount, is_mounted, text};
use crate::support::{command, rings, scratch};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// When the daemon is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// Somewhere in the load.
    Load,
    /// The same, where half of the requests are flushes.
    Flushes,
    /// At the first write after a clean close: the in-use mark is being set.
    FirstWrite,
    /// While it opens and mends.
    Opening,
    /// After SIGTERM, while it closes.
    Closing,
    /// Not at all: a clean close.
    Never,
}

/// What a run has done.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    kills: u64,
    kinds: [u64; 6],
    clean: u64,
    restarts: Vec<Duration>,
    leaked: u64,
    fio: u64,
    full: u64,
}

/// One disk on its way through many kills.
#[derive(Debug)]
pub(crate) struct Run {
    subject: Subject,
    // What lies in the directory goes before it.
    _host: Option<FsMount>,
    dir: TempDir,
    made: Made,
    ledger: Arc<Ledger>,
    dice: u64,
    tally: Tally,
    fio: Option<Fio>,
}

impl Run {
    /// Makes the disk.
    pub(crate) fn new(subject: Subject) -> Result<Self> {
        let dir = scratch()?;
        let mut home = dir.path().to_owned();
        let host = match subject.host.mib() {
            Some(mib) => {
                home.push("small");
                let size = format!("size={mib}m");
                let none = Path::new("none");
                Some(FsMount::with(none, &home, &["-t", "tmpfs", "-o", &size])?)
            }
            None => None,
        };
        let made = subject.make(&home)?;
        let name = subject.name.bytes().map(u64::from);
        let seed = mix(&[seed(), mix(&name.collect::<Vec<_>>())]);
        let ledger = Arc::new(Ledger::new(seed, made.model.clone()));
        let quarter = ledger.sectors() / 4 / 2048 * 2048;
        let fio = subject
            .fio
            .then(|| Fio::new(ledger.sectors() - quarter, quarter));
        Ok(Self {
            subject,
            _host: host,
            dir,
            made,
            ledger,
            dice: seed,
            tally: Tally::default(),
            fio,
        })
    }

    fn below(&mut self, bound: u64) -> u64 {
        splitmix(&mut self.dice) % bound
    }

    /// Sectors of the own writer.
    fn region(&self) -> std::ops::Range<u64> {
        let end = self.fio.as_ref().map(Fio::start);
        0..end.unwrap_or(self.ledger.sectors())
    }

    /// Kills so often, and closes the disk for good.
    pub(crate) fn go(mut self, kills: u64) -> Result<()> {
        let mut cycle = 0;
        while self.tally.kills < kills {
            cycle += 1;
            let moment = match self.below(20) {
                0..=8 => Moment::Load,
                9..=11 => Moment::Flushes,
                12 | 13 => Moment::FirstWrite,
                14..=16 => Moment::Opening,
                17 | 18 => Moment::Closing,
                _ => Moment::Never,
            };
            let told = |name: &str| {
                format!(
                    "{name}: cycle {cycle}, {moment:?}\nrepeat with: PLOOPFS_SEED={} \
                     PLOOPFS_KILLS={} cargo test --test kill -- --exact {name}",
                    seed(),
                    kills * ALL.len() as u64,
                )
            };
            self.cycle(moment)
                .with_context(|| told(self.subject.name))?;
            ensure!(!STOP.load(Ordering::Relaxed), "stopped by a signal");
        }
        if self.fio.is_some() && self.tally.fio == 0 {
            self.cycle(Moment::Load).context("once more, for fio")?;
        }
        let end = self.cycle(Moment::Never);
        end.and_then(|()| self.made.expect_approved())
            .with_context(|| format!("{}: the last close", self.subject.name))?;
        let is_small = self.subject.host == Place::Full;
        ensure!(!is_small || self.tally.full > 0, "the host was never full");
        let has_fio = self.fio.is_some();
        ensure!(!has_fio || self.tally.fio > 0, "fio has verified nothing");
        self.report();
        Ok(())
    }

    fn report(&self) {
        let millis = |duration: &Duration| duration.as_secs_f64() * 1000.0;
        let all: Vec<f64> = self.tally.restarts.iter().map(millis).collect();
        let mean = all.iter().sum::<f64>() / all.len().max(1) as f64;
        let most = all.iter().copied().fold(0.0, f64::max);
        let [load, flushes, first, opening, closing, _] = self.tally.kinds;
        // The tool that runs this for hours adds these lines up.
        eprintln!(
            "killed {} : {} kills {} sectors {} requests 0 bad | load {load} flushes {flushes} \
             first write {first} opening {opening} closing {closing} | {} clean closes, {} fio \
             verifies | restart mean {mean:.0} ms, longest {most:.0} ms | at most {} clusters \
             leaked, {} times no space",
            self.subject.name,
            self.tally.kills,
            self.ledger.judged(),
            self.ledger.issued(),
            self.tally.clean,
            self.tally.fio,
            self.tally.leaked,
            self.tally.full,
        );
    }

    fn cycle(&mut self, moment: Moment) -> Result<()> {
        match moment {
            Moment::Opening => return self.kill_opening(),
            Moment::FirstWrite => {
                let stage = self.start()?;
                self.close(stage)?;
            }
            _ => {}
        }
        let stage = self.start()?;
        let load = self.load(&stage, moment);
        let fio = match (&mut self.fio, moment) {
            (Some(fio), Moment::Load) => Some(fio.start_writing(&stage.path, self.dice)?),
            _ => None,
        };
        let seed = splitmix(&mut self.dice);
        let writer = Writer::start(&stage.path, &self.ledger, &load, seed);
        let gets_through = self.below(2) == 0 || self.tally.fio == 0;
        if let Some(job) = fio.as_ref().filter(|_| gets_through) {
            // The first time, and then half of the time, fio gets to its end: all must survive.
            job.wait()?;
        }
        let pause = match moment {
            Moment::FirstWrite => Duration::from_micros(self.below(6000)),
            _ => Duration::from_millis(50 + self.below(900)),
        };
        sleep(pause);
        match moment {
            Moment::Closing => self.kill_closing(stage, writer)?,
            Moment::Never => {
                self.tally.full += writer.stop()?;
                self.close(stage)?;
            }
            _ => {
                writer.expect_death();
                ensure!(stage.kill()?, "the daemon has gone by itself");
                let stopped = writer.stop();
                if let (Some(fio), Some(job)) = (&mut self.fio, &fio) {
                    fio.ended(job)?;
                }
                self.tally.full += stopped?;
                stage.clear_away()?;
                self.killed(moment)?;
            }
        }
        Ok(())
    }

    /// Mounts, and judges all that is there.
    fn start(&mut self) -> Result<Stage> {
        let mut options: Vec<&str> = Vec::new();
        let tables: [&[&str]; 5] = [
            &[
                "--flush-interval=0.1",
                "--flush-interval=1",
                "--flush-interval=5",
            ],
            &["--bat-cache=4K", "--bat-cache=32M"],
            &["--grow-step=64K", "--grow-step=1M", "--grow-step=16M"],
            &["--inline-order=0", "--inline-order=4", "--inline-order=7"],
            &["--pool-threads=1", "--pool-threads=4"],
        ];
        if self.subject.host == Place::Full {
            options.push("--enospc=fail");
        }
        for words in tables {
            let pick = self.below(words.len() as u64) as usize;
            options.push(words[pick]);
        }
        let was_marked = self.made.is_marked()?;
        let begun = Instant::now();
        let (door, image) = (self.subject.door, &self.made.image);
        let (stage, said) = Stage::start(door, self.dir.path(), image, &options)?;
        if was_marked {
            self.tally.restarts.push(begun.elapsed());
            // The note of a mended image, and nothing that was lost.
            for word in ["cut short", "cleared", "reads as zeros"] {
                ensure!(!said.stderr.contains(word), "{}", said.story());
            }
        }
        let file = writer::open(&stage.path, self.subject.door != Door::Cached)?;
        let settle = |first, bytes: &[u8]| self.ledger.settle(first, bytes);
        writer::read_all(&file, self.region(), settle).context("after a restart")?;
        drop(file);
        if let Some(fio) = &self.fio {
            self.tally.fio += u64::from(fio.verify(&stage.path)?);
        }
        Ok(stage)
    }

    fn load(&mut self, stage: &Stage, moment: Moment) -> Load {
        let flushes = match moment {
            Moment::Flushes => 50,
            _ => [2, 10, 20][self.below(3) as usize],
        };
        Load {
            threads: 3 + self.below(3),
            region: self.region(),
            cluster: u64::from(self.subject.cluster),
            grain: stage.grain,
            direct: self.subject.door != Door::Cached,
            device: matches!(self.subject.door, Door::Loop | Door::Attach),
            full: self.subject.host == Place::Full,
            flushes,
            zeros: [4, 12, 20][self.below(3) as usize],
            reads: 15,
        }
    }

    /// A clean close: all that was answered is in the image now, flushed or not.
    fn close(&mut self, stage: Stage) -> Result<()> {
        let begun = self.ledger.flush();
        stage.close()?;
        self.ledger.flushed(begun);
        self.tally.clean += 1;
        ensure!(!self.made.is_marked()?, "the mark is set after a close");
        self.made.expect_closed()?;
        self.look()
    }

    /// SIGTERM, or the command that closes; and the kill while the image is being closed.
    fn kill_closing(&mut self, stage: Stage, writer: Writer) -> Result<()> {
        self.tally.full += writer.stop()?;
        let begun = self.ledger.flush();
        let closing = stage.begin_close(self.below(2) == 0)?;
        let most = [2_000, 10_000, 40_000][self.below(3) as usize];
        sleep(Duration::from_micros(self.below(most)));
        let (was_there, said_closed) = closing.kill()?;
        let is_marked = self.made.is_marked()?;
        ensure!(!(said_closed && is_marked), "called closed with its mark");
        if !is_marked {
            // The mark goes last, so the flush of the close has been.
            self.ledger.flushed(begun);
            self.made.expect_closed()?;
        }
        if was_there {
            return self.killed(Moment::Closing);
        }
        self.tally.clean += 1;
        self.look()
    }

    /// A kill while the daemon opens the image, mends it and mounts; or of the command that waits
    /// for it, after which it must give up or be there for good.
    fn kill_opening(&mut self) -> Result<()> {
        let at = stage::mountpoint(self.dir.path())?;
        let pid_file = self.dir.path().join("opening.pid");
        let of_parent = self.below(3) == 0;
        let mut command = command::ploopfs(&["mount", "--pid-file", text(&pid_file)]);
        if !of_parent {
            command.arg("-f");
        }
        let mut child = command
            .arg(rings::option())
            .arg(&self.made.image)
            .arg(&at)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        sleep(Duration::from_micros(self.below(40_000)));
        let killed = child.kill();
        let status = child.wait()?;
        killed?;
        if of_parent {
            return self.orphaned(&at, &pid_file);
        }
        ensure!(
            status.code().is_none(),
            "mount -f ended by itself: {status}"
        );
        stage::lazy(&at)?;
        self.killed(Moment::Opening)
    }

    /// The daemon whose caller has died either goes away, or serves and can be unmounted.
    fn orphaned(&mut self, at: &Path, pid_file: &Path) -> Result<()> {
        let serves = command::eventually(Duration::from_secs(60), || {
            let serves = is_mounted(at) && at.join("disk.img").exists();
            let is_there = stage::is_running(text(pid_file));
            ensure!(serves || !is_there, "neither there nor gone");
            Ok(is_there)
        })?;
        if serves {
            let done = command::run(command::ploopfs(&["umount"]).arg(at))?;
            done.expect_code(0)?;
            self.tally.clean += 1;
        } else {
            stage::lazy(at)?;
        }
        let _ = std::fs::remove_file(pid_file);
        self.look()
    }

    fn killed(&mut self, moment: Moment) -> Result<()> {
        self.tally.kills += 1;
        self.tally.kinds[moment as usize] += 1;
        let leaked = self.made.expect_sound()?;
        self.tally.leaked = self.tally.leaked.max(leaked);
        self.look()
    }

    /// Judges the disk by its files alone, with the reader that knows nothing of ploopfs.
    fn look(&self) -> Result<()> {
        let flat = Flat::open(&self.made.image)?;
        let mut first = self.region().start;
        while first < self.region().end {
            let count = (self.region().end - first).min(2048);
            let bytes = flat.read(first * 512, count as usize * 512)?;
            let settled = self.ledger.settle(first, &bytes);
            settled.context("in the files of the image")?;
            first += count;
        }
        Ok(())
    }
}
