//! A mount, a loop device, a mounted file system: each undoes itself when dropped.
//!
//! Imports: `command`, `harness` (the root directory).
//! Never: touches a mount, a loop device or a process that this run did not make.

use super::command::{self, Finished};
use super::{Outcome, PLOOPFS, harness, rings, scratch};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// Longest that a mount of ours may live before the watchdog ends it.
const LIFE: Duration = Duration::from_secs(280);

/// A path as text; scratch paths are always text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap_or("a scratch path that is no text")
}

/// Is something mounted exactly here?
pub(crate) fn is_mounted(at: &Path) -> bool {
    mounts().iter().any(|(place, _)| place == at)
}

/// Mountpoints and file system types, as this process sees them.
fn mounts() -> Vec<(PathBuf, String)> {
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let line = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let place = before.split(' ').nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(place), after.split(' ').next()?.to_string()))
    };
    info.lines().filter_map(line).collect()
}

/// Does this process run our program?
fn is_ours(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| exe.to_string_lossy().starts_with(PLOOPFS))
}

/// Is the process gone (a zombie counts as gone)?
pub(crate) fn is_gone(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| {
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('Z'))
    })
}

fn lazy_unmount(at: &Path) {
    let done = command::run(command::new("umount").args(["-i", "-l"]).arg(at));
    if !done.is_ok_and(|done| done.status.success()) {
        let _ = command::run(command::new("fusermount3").arg("-uz").arg(at));
    }
}

fn end(at: &Path, pid: Option<i32>) {
    if is_mounted(at) {
        lazy_unmount(at);
    }
    if let Some(pid) = pid.filter(|pid| is_ours(*pid)) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// An image mounted by the program under test.
#[derive(Debug)]
pub(crate) struct Mounted {
    at: PathBuf,
    pid: i32,
    done: bool,
    _watchdog: Sender<()>,
}

impl Mounted {
    /// Mounts on a new directory beside nothing else; `options` come before IMAGE.
    pub(crate) fn new(dir: &Path, image: &Path, options: &[&str]) -> Result<Self> {
        let at = dir.join("mnt");
        if !at.exists() {
            fs::create_dir(&at)?;
        }
        Self::at(&at, image, options)
    }

    /// Mounts on an existing directory or file.
    pub(crate) fn at(at: &Path, image: &Path, options: &[&str]) -> Result<Self> {
        let (mounted, _) = Self::telling(at, image, options)?;
        Ok(mounted)
    }

    /// The same, with what was said.
    pub(crate) fn telling(at: &Path, image: &Path, options: &[&str]) -> Result<(Self, Finished)> {
        let pid_file = at.with_extension("pid");
        let done = Self::attempt(at, image, options, &pid_file)?;
        if !done.status.success() {
            bail!("{}", done.story());
        }
        let said = fs::read_to_string(&pid_file).context("no pid file after a mount")?;
        let pid: i32 = said
            .trim()
            .parse()
            .context("the pid file holds no number")?;
        ensure!(
            is_mounted(at),
            "mount returned, but nothing is mounted at {}",
            at.display()
        );
        ensure!(
            is_ours(pid),
            "the pid file names process {pid}, which is not our program"
        );
        let (sender, receiver) = mpsc::channel();
        let place = at.to_path_buf();
        thread::spawn(move || {
            if receiver.recv_timeout(LIFE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("watchdog: ending the mount at {}", place.display());
                end(&place, Some(pid));
            }
        });
        Ok((
            Self {
                at: at.to_path_buf(),
                pid,
                done: false,
                _watchdog: sender,
            },
            done,
        ))
    }

    fn attempt(at: &Path, image: &Path, options: &[&str], pid_file: &Path) -> Result<Finished> {
        let _ = fs::remove_file(pid_file);
        let mut command = command::ploopfs(&["mount", "--pid-file", text(pid_file)]);
        if !options.iter().any(|option| option.contains("transport")) {
            command.arg(rings::option());
        }
        command.args(options).arg(image).arg(at);
        command::run_within(&mut command, Duration::from_secs(60))
    }

    /// A mount that must be refused with exit code 1, leaving nothing mounted.
    pub(crate) fn refused(dir: &Path, image: &Path, options: &[&str]) -> Result<Finished> {
        let at = dir.join("refused");
        if !at.exists() {
            fs::create_dir(&at)?;
        }
        let done = Self::attempt(&at, image, options, &dir.join("refused.pid"))?;
        if is_mounted(&at) {
            let pid = fs::read_to_string(dir.join("refused.pid")).unwrap_or_default();
            end(&at, pid.trim().parse().ok());
            bail!("should have been refused: {}", done.story());
        }
        done.expect_code(1)
    }

    /// The mountpoint.
    pub(crate) fn path(&self) -> &Path {
        &self.at
    }

    /// The flat disk.
    pub(crate) fn disk(&self) -> PathBuf {
        if self.at.is_dir() {
            self.at.join("disk.img")
        } else {
            self.at.clone()
        }
    }

    /// The daemon.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Unmounts by `ploopfs umount`; the daemon must then be gone and the image closed.
    pub(crate) fn umount(mut self) -> Outcome {
        let mut command = command::ploopfs(&["umount"]);
        command.arg(&self.at);
        command::run_within(&mut command, Duration::from_secs(120))?.expect_code(0)?;
        ensure!(
            !is_mounted(&self.at),
            "`ploopfs umount` returned, but the mount is still there"
        );
        self.done = true;
        self.gone(Duration::from_secs(2))
    }

    /// Sends a signal to the daemon.
    pub(crate) fn signal(&self, signal: Signal) -> Outcome {
        ensure!(is_ours(self.pid), "the daemon {} is gone already", self.pid);
        kill(Pid::from_raw(self.pid), signal)?;
        Ok(())
    }

    /// Waits until the daemon has ended by itself.
    pub(crate) fn gone(&self, limit: Duration) -> Outcome {
        command::eventually(limit, || {
            ensure!(is_gone(self.pid), "the daemon {} is still there", self.pid);
            Ok(())
        })
    }

    /// Resident memory of the daemon in bytes; `peak` for the most so far.
    pub(crate) fn memory(&self, peak: bool) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let field = if peak { "VmHWM:" } else { "VmRSS:" };
        let line = status
            .lines()
            .find(|line| line.starts_with(field))
            .context("no such field")?;
        let kib: u64 = line
            .split_whitespace()
            .nth(1)
            .context("no number")?
            .parse()?;
        Ok(kib * 1024)
    }

    /// A JSON document that the mount shows (`info.json`, `stats.json`).
    pub(crate) fn json(&self, name: &str) -> Result<serde_json::Value> {
        let text = fs::read_to_string(self.at.join(name))?;
        serde_json::from_str(&text).with_context(|| format!("{name} is no JSON: {text}"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.done || is_mounted(&self.at) {
            end(&self.at, Some(self.pid));
        }
    }
}

/// A loop device of ours.
#[derive(Debug)]
pub(crate) struct Loop {
    dev: PathBuf,
    file: Option<PathBuf>,
    attached: bool,
}

/// The file under a loop device, as the host shows it.
pub(crate) fn backing_file(dev: &Path) -> Option<PathBuf> {
    let name = dev.file_name()?.to_string_lossy();
    let shown = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    Some(PathBuf::from(shown.trim_end_matches('\n')))
}

impl Loop {
    /// Attaches a file with direct I/O.
    pub(crate) fn new(file: &Path) -> Result<Self> {
        Self::with(file, &[])
    }

    /// The same with further options of losetup.
    pub(crate) fn with(file: &Path, options: &[&str]) -> Result<Self> {
        // Others on this host take devices, too; a race for the same number ends as busy.
        let dev = command::eventually(Duration::from_secs(30), || {
            let mut command = command::new("losetup");
            command::ok(
                command
                    .args(["-f", "--show", "--direct-io=on"])
                    .args(options)
                    .arg(file),
            )
        })?;
        let dev = PathBuf::from(dev.trim());
        Ok(Self {
            file: backing_file(&dev),
            dev,
            attached: true,
        })
    }

    /// `/dev/loopN`.
    pub(crate) fn dev(&self) -> &Path {
        &self.dev
    }

    /// A number or word of the device's queue.
    pub(crate) fn queue(&self, name: &str) -> Result<String> {
        let number = self
            .dev
            .file_name()
            .context("no name")?
            .to_string_lossy()
            .into_owned();
        let path = format!("/sys/block/{number}/queue/{name}");
        Ok(fs::read_to_string(path)?.trim().to_string())
    }

    /// Detaches and waits until the device is free.
    pub(crate) fn detach(mut self) -> Outcome {
        self.attached = false;
        command::ok(command::new("losetup").arg("-d").arg(&self.dev))?;
        command::eventually(Duration::from_secs(20), || {
            // Another test may have the number by now.
            let is_ours = self.file.is_some() && backing_file(&self.dev) == self.file;
            ensure!(!is_ours, "{} still has its file", self.dev.display());
            Ok(())
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.attached {
            let _ = command::run(command::new("losetup").arg("-d").arg(&self.dev));
        }
    }
}

/// A file system mounted from a device of ours.
#[derive(Debug)]
pub(crate) struct FsMount {
    at: PathBuf,
    mounted: bool,
}

impl FsMount {
    /// Mounts a device on a directory, which is made where it is missing.
    pub(crate) fn new(dev: &Path, at: &Path) -> Result<Self> {
        Self::with(dev, at, &[])
    }

    /// The same with options of mount(8).
    pub(crate) fn with(dev: &Path, at: &Path, options: &[&str]) -> Result<Self> {
        fs::create_dir_all(at)?;
        command::ok(command::new("mount").args(options).arg(dev).arg(at))?;
        Ok(Self {
            at: at.to_path_buf(),
            mounted: true,
        })
    }

    /// The mountpoint.
    pub(crate) fn path(&self) -> &Path {
        &self.at
    }

    /// Unmounts. A program that another test starts holds all that is open here for a moment.
    pub(crate) fn umount(mut self) -> Outcome {
        command::eventually(Duration::from_secs(5), || {
            command::ok(command::new("umount").arg(&self.at))
        })?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for FsMount {
    fn drop(&mut self) {
        if self.mounted {
            lazy_unmount(&self.at);
        }
    }
}

/// A file system whose files can share blocks, on a medium of its own.
#[derive(Debug)]
pub(crate) struct Xfs {
    // What comes first goes first.
    mount: FsMount,
    device: Loop,
    dir: TempDir,
}

impl Xfs {
    /// One of this size; no test where the kernel has none.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let dir = scratch()?;
        let medium = dir.path().join("xfs.img");
        File::create(&medium)?.set_len(bytes)?;
        let mut make = command::new("mkfs.xfs");
        command::ok(make.args(["-q", "-m", "reflink=1"]).arg(&medium))?;
        let device = Loop::new(&medium)?;
        let mount = FsMount::new(device.dev(), &dir.path().join("xfs")).map_err(|why| {
            let why = format!("{why:#}");
            if why.contains("unknown filesystem type") {
                return harness::skip_excused(format!("the kernel has no XFS: {why}"));
            }
            anyhow::Error::msg(why)
        })?;
        Ok(Self { mount, device, dir })
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        self.mount.path()
    }

    /// A directory that is not on it.
    pub(crate) fn outside(&self) -> &Path {
        self.dir.path()
    }

    /// Takes it away.
    pub(crate) fn end(self) -> Outcome {
        self.mount.umount()?;
        self.device.detach()
    }
}

/// Mounts, loop devices and daemons of this run that are still there; they are ended as they are
/// told.
pub(crate) fn leftovers() -> Vec<String> {
    let root = harness::root();
    let mut left = Vec::new();
    for (place, kind) in mounts().into_iter().rev() {
        if place.starts_with(&root) {
            left.push(format!("mount of {kind} at {}", place.display()));
            lazy_unmount(&place);
        }
    }
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = entry.path().join("loop/backing_file");
        let file = fs::read_to_string(backing).unwrap_or_default();
        if file.starts_with(text(&root)) {
            let dev = PathBuf::from("/dev").join(entry.file_name());
            left.push(format!("{} on {}", dev.display(), file.trim()));
            let _ = command::run(command::new("losetup").arg("-d").arg(&dev));
        }
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if is_ours(pid) && line.contains(text(&root)) {
            left.push(format!("process {pid}: {line}"));
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    left
}
