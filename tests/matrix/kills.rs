//! The commands killed or stopped at any moment, and repeated: nothing of any snapshot is lost, and
//! nothing is left behind.
//!
//! Imports: `case`, `disk`, `forge`, `peers`, `support`.
//! Never: kills anything but the program that it has started.
//!
//! A kill loses nothing that the host has taken, so memory does as well as a disk; what a power
//! cut may leave is enumerated in a simulation. `PLOOPFS_SEEDS` is the number of rounds of each
//! command, `PLOOPFS_SEED` decides the moments.

use crate::case::{does, expect_no_others, run};
use crate::disk::{self, Contents};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::splitmix;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::peers;
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{Outcome, command, scratch_tmpfs};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Rounds of each command where nobody says otherwise.
const ROUNDS: u64 = 6;
const SIGNALS: [Signal; 3] = [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM];

/// What is done to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// The middle snapshot goes into the one above.
    Delete,
    /// The top goes into the snapshot below it.
    Merge,
    /// All go into the base.
    MergeAll,
    /// A longer table, which clusters must give way to.
    Grow,
    /// Gaps are closed.
    Compact,
    /// And the clusters are sorted.
    Defrag,
    /// Entries that name each other's clusters.
    Repair,
    /// To a new image.
    Convert,
    /// To a new bundle.
    ConvertBundle,
    /// With all snapshots.
    Copy,
}

/// One after the other.
pub(crate) fn trials() -> Vec<Trial> {
    let deeds = [
        Deed::Delete,
        Deed::Merge,
        Deed::MergeAll,
        Deed::Grow,
        Deed::Compact,
        Deed::Defrag,
        Deed::Repair,
        Deed::Convert,
        Deed::ConvertBundle,
        Deed::Copy,
    ];
    let killed = |deed: Deed| {
        let name = format!("killed_{deed:?}").to_lowercase();
        trial(&name, &[Need::Qemu], move || Stage::new(deed)?.go())
    };
    deeds.into_iter().map(killed).collect()
}

/// The disk, and how long the command takes with it.
struct Stage {
    deed: Deed,
    scratch: tempfile::TempDir,
    contents: Contents,
    /// From the base up.
    guids: Vec<String>,
    long: Duration,
}

fn number(name: &str, usual: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}: {text}")),
        Err(_) => Ok(usual),
    }
}

/// Every third entry names the cluster of the one before it: both show the same bytes, and repair
/// copies them.
fn tangle(image: &Path) -> Outcome {
    let mut bytes = fs::read(image)?;
    let mut last = [0; 4];
    for (index, entry) in bytes[64..64 + 4 * 1000].chunks_exact_mut(4).enumerate() {
        if entry == [0; 4] {
            continue;
        }
        if index % 3 == 0 && last != [0; 4] {
            entry.copy_from_slice(&last);
        }
        last.copy_from_slice(entry);
    }
    Ok(fs::write(image, bytes)?)
}

impl Stage {
    fn new(deed: Deed) -> Result<Self> {
        let scratch = scratch_tmpfs()?;
        let stock = scratch.path().join("d.hdd");
        let mut like = ImageSpec::new(2, 128, 128 * 800).mapping(Mapped::Percent(40));
        like.layout = Layout::Gaps(1);
        if matches!(deed, Deed::Delete | Deed::Merge | Deed::MergeAll) {
            like.layout = Layout::Shuffled(3);
        }
        let depth = if deed == Deed::Repair { 1 } else { 3 };
        BundleSpec::chain(Style::Ploop, &like, depth, |_, _| {}).write(&stock)?;
        if deed == Deed::Repair {
            tangle(&disk::view(&stock)?.top_file()?)?;
            run(&["check", "-q"], &stock, &[])?.expect_code(2)?;
        }
        let view = disk::view(&stock)?;
        let chain = view.chain(&view.top)?;
        let mut stage = Self {
            deed,
            contents: disk::contents(&stock)?,
            guids: chain.iter().map(|shot| shot.guid.clone()).collect(),
            scratch,
            long: Duration::ZERO,
        };
        let dir = stage.fresh()?;
        let started = Instant::now();
        command::run(command::ploopfs(&[]).args(stage.line(&dir)))?.expect_code(0)?;
        stage.long = started.elapsed();
        stage.expect_done(&dir).context("undisturbed")?;
        Ok(stage)
    }

    fn fresh(&self) -> Result<PathBuf> {
        let dir = self.scratch.path().join("work");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir(&dir)?;
        disk::copy(&self.scratch.path().join("d.hdd"), &dir.join("d.hdd"))?;
        Ok(dir)
    }

    /// What the command makes, where it makes something.
    fn target(&self, dir: &Path) -> Option<PathBuf> {
        let name = match self.deed {
            Deed::Convert => "new.hds",
            Deed::ConvertBundle | Deed::Copy => "new.hdd",
            _ => return None,
        };
        Some(dir.join(name))
    }

    fn line(&self, dir: &Path) -> Vec<String> {
        let disk = text(&dir.join("d.hdd")).to_owned();
        let words = match self.deed {
            Deed::Delete => "snapshot delete -y",
            Deed::Merge => "merge -y",
            Deed::MergeAll => "merge -y --all",
            Deed::Grow => "resize",
            Deed::Compact => "compact -y",
            Deed::Defrag => "compact -y --defrag --zeroes",
            Deed::Repair => "repair -y",
            Deed::Convert | Deed::ConvertBundle => "convert",
            Deed::Copy => "copy",
        };
        let mut line: Vec<String> = words.split(' ').map(str::to_owned).collect();
        line.push(disk);
        match self.deed {
            Deed::Delete => line.push(self.guids[1].clone()),
            Deed::Grow => line.push("40G".to_owned()),
            _ => line.extend(self.target(dir).map(|target| text(&target).to_owned())),
        }
        line
    }

    /// Snapshots that the command does away with.
    fn goes(&self) -> &[String] {
        match self.deed {
            Deed::Delete | Deed::Merge => &self.guids[1..2],
            Deed::MergeAll => &self.guids[..2],
            _ => &[],
        }
    }

    /// It has done what it should already, so that once more would be too much.
    fn is_done(&self, dir: &Path) -> Result<bool> {
        if let Some(target) = self.target(dir) {
            return Ok(target.exists());
        }
        let view = disk::view(&dir.join("d.hdd"))?;
        let goes = self.goes().iter();
        let left = goes.filter(|guid| view.shot(guid).is_ok()).count();
        Ok(!self.goes().is_empty() && left == 0)
    }

    /// What stays shows what it did.
    fn expect_kept(&self, disk: &Path) -> Outcome {
        let view = disk::view(disk)?;
        for guid in &self.guids {
            let goes = self.goes().contains(guid);
            ensure!(goes || view.shot(guid).is_ok(), "{guid} is gone");
        }
        let mut shown = self.guids.iter().filter(|guid| !self.goes().contains(guid));
        shown.try_for_each(|guid| {
            let bytes = disk::start_of(disk, guid, self.contents[guid].len())?;
            disk::expect_same(guid, &self.contents[guid], &bytes)
        })
    }

    fn expect_done(&self, dir: &Path) -> Outcome {
        let disk = dir.join("d.hdd");
        ensure!(self.is_done(dir)? || self.goes().is_empty());
        self.expect_kept(&disk)?;
        if self.deed == Deed::Repair {
            let undo = format!("{}.undo", text(&disk::view(&disk)?.top_file()?));
            fs::remove_file(undo).context("no way back")?;
        }
        does(&["check"], &disk, &[])?;
        expect_no_others(&disk, &disk::view(&disk)?)?;
        if let Some(target) = self.target(dir) {
            does(&["check"], &target, &[])?;
            let (found, top) = (disk::contents(&target)?, disk::view(&target)?.top);
            disk::expect_same("new", &self.contents[&self.guids[2]], &found[&top])?;
            ensure!(found.len() == if self.deed == Deed::Copy { 3 } else { 1 });
        }
        for shot in disk::view(&disk)?.shots {
            peers::qemu_check(&shot.files[0])?;
        }
        Ok(())
    }

    /// Killed when the descriptor was right already, a command leaves files that nobody needs: what
    /// comes next clears them away.
    fn clear_left_overs(&self, disk: &Path) -> Outcome {
        let found = run(&["check"], disk, &[])?;
        if self.goes().is_empty() || found.code() != 3 {
            return Ok(());
        }
        found.expect_words(&["the next change"])?;
        let made = "{0b0e54a6-4f3c-4be5-a8e6-6b6a9d9d1a55}";
        run(&["snapshot", "create", "--uuid", made], disk, &[])?.expect_code(0)?;
        run(&["snapshot", "delete", "--yes"], disk, &[made])?.expect_code(0)?;
        Ok(())
    }

    /// Beside the disk there is only what the command makes; a program that was killed could not
    /// take the temporary name away that nobody takes for a disk.
    fn expect_beside(&self, dir: &Path, was_killed: bool) -> Outcome {
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let is_known = ["d.hdd", "new.hds", "new.hdd"].contains(&name.as_str());
            let is_excused = was_killed && name.contains(".creating.");
            ensure!(is_known || is_excused, "{name} is left behind");
        }
        Ok(())
    }

    fn interrupt(&self, child: &mut Child, signal: Signal, after: Duration) -> Result<ExitStatus> {
        std::thread::sleep(after);
        if child.try_wait()?.is_none() {
            kill(Pid::from_raw(i32::try_from(child.id())?), signal)?;
        }
        let asked = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if asked.elapsed() > Duration::from_secs(60) {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{signal} does not end it");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// One life of the disk; tells whether the command was interrupted.
    fn round(&mut self, round: u64, dice: &mut u64) -> Result<bool> {
        let dir = self.fresh()?;
        let disk = dir.join("d.hdd");
        let mut was_killed = false;
        let mut interrupted = false;
        for attempt in 0..1 + round % 2 {
            let signal = SIGNALS[((round + attempt) % 3) as usize];
            let part = (splitmix(dice) % 1000) as u32;
            let mut command = command::ploopfs(&[]);
            command.args(self.line(&dir));
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn()?;
            let status = self.interrupt(&mut child, signal, self.long * part / 1000)?;
            let stopped = status.code() == Some(128 + signal as i32);
            let is_dead = status.signal() == Some(signal as i32);
            ensure!(status.success() || stopped || is_dead, "{signal}: {status}");
            was_killed |= status.signal().is_some();
            interrupted |= !status.success();
            if status.success() {
                // The host is quicker than it was.
                self.long = self.long * 2 / 3;
            }
            self.expect_kept(&disk)
                .with_context(|| format!("after {signal}"))?;
            self.expect_beside(&dir, was_killed)?;
            // It can be opened, if only to look.
            run(&["info"], &disk, &[])?.expect_code(0)?;
            if self.is_done(&dir)? || status.success() {
                break;
            }
        }
        if !self.is_done(&dir)? {
            let again = command::run(command::ploopfs(&[]).args(self.line(&dir)))?;
            again.expect_code(0).context("repeated")?;
        } else if was_killed {
            self.clear_left_overs(&disk)?;
        }
        self.expect_done(&dir).context("in the end")?;
        self.expect_beside(&dir, was_killed)?;
        Ok(interrupted)
    }

    fn go(mut self) -> Outcome {
        let seed = number("PLOOPFS_SEED", 1)?;
        let rounds = number("PLOOPFS_SEEDS", ROUNDS)?;
        let mut dice = seed ^ self.deed as u64;
        let mut interrupted = 0;
        for round in 0..rounds {
            let what = format!("{:?}, seed {seed}, round {round}", self.deed);
            interrupted += u64::from(self.round(round, &mut dice).context(what)?);
        }
        ensure!(interrupted > 0, "none of {rounds} was interrupted");
        Ok(())
    }
}
