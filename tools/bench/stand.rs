//! What is measured: a raw file and images of the same size, each on a loop device of its own.
//!
//! Imports: `forge`, `jobs`; std, `anyhow`, `nix`, `tempfile`.
//! Never: leaves a loop device, a daemon or a file behind, unless it is killed outright.
//!
//! The program under test is this one, started again as `ploopfs`, so that what is measured is what
//! has just been built, with the same flags.

use crate::forge::image::{ImageSpec, Mapped};
use crate::jobs::Job;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// With this variable in its environment the program is `ploopfs`.
pub(crate) const AS_PLOOPFS: &str = "PLOOPFS_BENCH_SERVES";

/// Name of the subject that all others are compared with.
pub(crate) const RAW: &str = "raw loop";

const MIB: u64 = 1 << 20;

/// How a subject is taken down.
#[derive(Debug)]
enum End {
    Losetup,
    Detach,
}

/// One loop device with what is behind it.
#[derive(Debug)]
pub(crate) struct Subject {
    /// Column of the table.
    pub(crate) name: String,
    /// The loop device.
    pub(crate) device: PathBuf,
    file: PathBuf,
    end: End,
}

impl Drop for Subject {
    fn drop(&mut self) {
        let ended = match self.end {
            End::Losetup => said(Command::new("losetup").arg("-d").arg(&self.device)),
            End::Detach => ploopfs().and_then(|mut it| said(it.arg("detach").arg(&self.device))),
        };
        if let Err(error) = ended {
            eprintln!("bench: {error:#}");
        }
    }
}

/// All subjects in one directory.
#[derive(Debug)]
pub(crate) struct Stand {
    // Dropped in this order: the devices before the files behind them.
    subjects: Vec<Subject>,
    /// What the place is called in the table.
    pub(crate) place: String,
    in_memory: bool,
    _dir: TempDir,
}

/// This program in its other role.
fn ploopfs() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(AS_PLOOPFS, "1");
    Ok(command)
}

/// Runs a command that must succeed and gives what it printed.
fn said(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {line}"))?;
    ensure!(out.status.success(), "{line} ended with {}", out.status);
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

/// Fills a file from `start` with bytes that are not zero.
fn fill(path: &Path, start: u64, end: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let bytes = vec![0x5a; MIB as usize];
    let mut at = start;
    while at < end {
        let piece = (end - at).min(MIB);
        file.write_all_at(&bytes[..piece as usize], at)?;
        at += piece;
    }
    file.sync_all()?;
    Ok(())
}

impl Stand {
    /// Makes the files and brings everything up.
    pub(crate) fn new(
        place: &Path,
        bytes: u64,
        cluster: u32,
        sets: &[(String, Vec<String>)],
    ) -> Result<Self> {
        let dir = TempDir::with_prefix_in("ploopfs-bench", place)
            .with_context(|| format!("cannot work in {}", place.display()))?;
        let system = said(Command::new("stat").args(["-f", "-c", "%T"]).arg(place))?;
        let mut stand = Self {
            subjects: Vec::new(),
            in_memory: system == "tmpfs",
            place: format!("{} ({system})", place.display()),
            _dir: dir,
        };
        let dir = stand._dir.path().to_owned();
        let raw = dir.join("raw");
        File::create_new(&raw)?.set_len(bytes)?;
        fill(&raw, 0, bytes)?;
        stand.subjects.push(loop_over(raw)?);
        for (number, (name, options)) in sets.iter().enumerate() {
            let image = dir.join(format!("{number}.hds"));
            let mut spec = ImageSpec::new(2, cluster, bytes / 512).mapping(Mapped::All);
            spec.no_data = true;
            spec.write(&image)?;
            fill(&image, spec.data_start() * 512, fs::metadata(&image)?.len())?;
            stand.subjects.push(attach(name, image, options)?);
        }
        Ok(stand)
    }

    /// The raw loop first, then the others as they were named.
    pub(crate) fn subjects(&self) -> &[Subject] {
        &self.subjects
    }

    /// Makes the host forget what it has of a subject's file before a job that only reads: the raw
    /// loop goes past the page cache, so ploopfs must not be measured with a warm one. In memory
    /// there is nothing to forget.
    pub(crate) fn forget(&self, subject: &Subject, job: &Job) -> Result<()> {
        if self.in_memory {
            return Ok(());
        }
        let file = File::open(&subject.file)?;
        file.sync_all()?;
        if job.only_reads() {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }
}

/// A loop device over a raw file, tuned as `ploopfs attach` tunes its own.
fn loop_over(file: PathBuf) -> Result<Subject> {
    let mut losetup = Command::new("losetup");
    losetup.args(["--find", "--show", "--direct-io=on"]);
    let device = PathBuf::from(said(losetup.arg(&file))?);
    let subject = Subject {
        name: RAW.to_owned(),
        device,
        file,
        end: End::Losetup,
    };
    let Some(name) = subject.device.file_name() else {
        bail!("losetup names no device");
    };
    let queue = Path::new("/sys/block").join(name).join("queue");
    fs::write(queue.join("read_ahead_kb"), "1024")?;
    fs::write(queue.join("max_sectors_kb"), "1024")?;
    Ok(subject)
}

fn attach(name: &str, image: PathBuf, options: &[String]) -> Result<Subject> {
    let mut attach = ploopfs()?;
    attach.arg("attach").args(options).arg(&image);
    let device = PathBuf::from(said(&mut attach)?);
    ensure!(device.exists(), "attach printed no device: {device:?}");
    Ok(Subject {
        name: name.to_owned(),
        device,
        file: image,
        end: End::Detach,
    })
}
