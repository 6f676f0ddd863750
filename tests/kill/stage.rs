//! A disk that is served: by `mount`, by `mount` under a loop device, or by `attach`.
//!
//! Imports: `subject` (door), `support`; std, `anyhow`, `nix`.
//! Never: leaves a daemon, a mount or a loop device behind when dropped.

use super::subject::Door;
use super::writer;
use crate::support::command::Finished;
use crate::support::guards::{Loop, Mounted, backing_file, is_gone, is_mounted, text};
use crate::support::{Outcome, PLOOPFS, command, rings};
use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// Longest that a killed daemon may take to be gone.
const GONE: Duration = Duration::from_secs(20);

/// A loop device with the daemon of `ploopfs attach` behind it.
#[derive(Debug)]
struct Attached {
    dev: PathBuf,
    file: Option<PathBuf>,
    pid: i32,
    done: bool,
}

impl Attached {
    /// False once the device is free, or another test has it.
    fn is_there(&self) -> bool {
        self.file.is_some() && backing_file(&self.dev) == self.file
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if !self.done {
            if runs_ploopfs(self.pid) {
                let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            }
            if self.is_there() {
                let _ = command::run(command::new("losetup").arg("-d").arg(&self.dev));
            }
        }
    }
}

// Dropped in this order: the device before the mount below it.
#[derive(Debug)]
enum Hold {
    Mount(Option<Loop>, Mounted),
    Attach(Attached),
}

/// See above.
#[derive(Debug)]
pub(crate) struct Stage {
    /// The disk.
    pub(crate) path: PathBuf,
    /// Sectors that every request is a multiple of.
    pub(crate) grain: u64,
    hold: Hold,
}

fn runs_ploopfs(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| exe.to_string_lossy().starts_with(PLOOPFS))
}

/// Is there a program of ours with these words on its command line?
pub(crate) fn is_running(words: &str) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.any(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        runs_ploopfs(pid) && String::from_utf8_lossy(&line).contains(words) && !is_gone(pid)
    })
}

/// Takes a mount of ours that nobody serves any more away.
pub(crate) fn lazy(at: &Path) -> Outcome {
    if is_mounted(at) {
        command::ok(command::new("umount").args(["-i", "-l", text(at)]))?;
    }
    ensure!(!is_mounted(at), "{} is still mounted", at.display());
    Ok(())
}

/// Where the disk is mounted.
pub(crate) fn mountpoint(dir: &Path) -> Result<PathBuf> {
    let at = dir.join("mnt");
    fs::create_dir_all(&at)?;
    Ok(at)
}

fn attach(dir: &Path, image: &Path, options: &[&str]) -> Result<(Attached, Finished)> {
    let pid_file = dir.join("attach.pid");
    let mut tool = command::ploopfs(&["attach", "--pid-file", text(&pid_file)]);
    tool.arg(rings::option());
    let said = command::run(tool.args(options).arg(image))?.expect_code(0)?;
    let pid = fs::read_to_string(&pid_file).context("no pid file after attach")?;
    let dev = PathBuf::from(said.text().trim());
    let attached = Attached {
        file: backing_file(&dev),
        dev,
        pid: pid.trim().parse().context("the pid file holds no number")?,
        done: false,
    };
    ensure!(runs_ploopfs(attached.pid), "{pid} is not our daemon");
    ensure!(attached.is_there(), "{} is not attached", said.text());
    Ok((attached, said))
}

fn sectors_of(dev: &Path) -> Result<u64> {
    let name = dev.file_name().context("no device")?.to_string_lossy();
    let path = format!("/sys/block/{name}/queue/logical_block_size");
    writer::grain_of(fs::read_to_string(path)?.trim())
}

impl Stage {
    /// Starts a daemon; what it said when it was ready.
    pub(crate) fn start(
        door: Door,
        dir: &Path,
        image: &Path,
        options: &[&str],
    ) -> Result<(Self, Finished)> {
        if door == Door::Attach {
            let (attached, said) = attach(dir, image, options)?;
            let stage = Self {
                path: attached.dev.clone(),
                grain: sectors_of(&attached.dev)?,
                hold: Hold::Attach(attached),
            };
            return Ok((stage, said));
        }
        let (mounted, said) = Mounted::telling(&mountpoint(dir)?, image, options)?;
        let stage = match door {
            Door::Loop => {
                let device = Loop::new(&mounted.disk())?;
                Self {
                    path: device.dev().to_owned(),
                    grain: sectors_of(device.dev())?,
                    hold: Hold::Mount(Some(device), mounted),
                }
            }
            _ => Self {
                path: mounted.disk(),
                grain: 1,
                hold: Hold::Mount(None, mounted),
            },
        };
        Ok((stage, said))
    }

    fn pid(&self) -> i32 {
        match &self.hold {
            Hold::Mount(_, mounted) => mounted.pid(),
            Hold::Attach(attached) => attached.pid,
        }
    }

    /// Asks the daemon to end when nobody uses it any more.
    pub(crate) fn terminate(&self) -> Outcome {
        Ok(kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?)
    }

    /// Kills the daemon. False when it has ended by itself.
    pub(crate) fn kill(&self) -> Result<bool> {
        let pid = self.pid();
        if !runs_ploopfs(pid) {
            return Ok(false);
        }
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes away what a killed daemon leaves outside of its image.
    pub(crate) fn clear_away(self) -> Outcome {
        let pid = self.pid();
        command::eventually(GONE, || {
            ensure!(is_gone(pid), "the killed daemon {pid} is still there");
            Ok(())
        })?;
        match self.hold {
            Hold::Mount(device, mounted) => {
                if let Some(device) = device {
                    device.detach()?;
                }
                let at = mounted.path().to_owned();
                drop(mounted);
                ensure!(!is_mounted(&at), "a dead mount stays");
            }
            Hold::Attach(mut attached) => {
                // It says that the image was not closed, and frees the device all the same.
                let mut tool = command::ploopfs(&["detach"]);
                let done = command::run(tool.arg(&attached.dev))?;
                attached.done = true;
                ensure!(
                    !attached.is_there(),
                    "detach leaves the device: {}",
                    done.story()
                );
            }
        }
        Ok(())
    }

    /// Closes it well.
    pub(crate) fn close(self) -> Outcome {
        match self.hold {
            Hold::Mount(device, mounted) => {
                if let Some(device) = device {
                    device.detach()?;
                }
                mounted.umount()
            }
            Hold::Attach(mut attached) => {
                let mut tool = command::ploopfs(&["detach"]);
                command::run(tool.arg(&attached.dev))?.expect_code(0)?;
                attached.done = true;
                Ok(())
            }
        }
    }

    /// Begins to close it: by a signal, or by the command that does it, which then runs.
    pub(crate) fn begin_close(self, by_signal: bool) -> Result<Closing> {
        let pid = self.pid();
        let (at, mut tool) = match &self.hold {
            Hold::Mount(_, mounted) => {
                let mut tool = command::ploopfs(&["umount"]);
                tool.arg(mounted.path());
                (Some(mounted.path().to_owned()), tool)
            }
            Hold::Attach(attached) => {
                let mut tool = command::ploopfs(&["detach"]);
                tool.arg(&attached.dev);
                (None, tool)
            }
        };
        let mut stage = self;
        if let Hold::Mount(device, _) = &mut stage.hold {
            if let Some(device) = device.take() {
                device.detach()?;
            }
        }
        let tool = if by_signal && at.is_some() {
            kill(Pid::from_raw(pid), Signal::SIGTERM)?;
            None
        } else {
            let tool = tool.stdout(Stdio::null()).stderr(Stdio::null());
            Some(tool.spawn()?)
        };
        Ok(Closing { stage, tool, at })
    }
}

/// A daemon that is closing its image.
#[derive(Debug)]
pub(crate) struct Closing {
    stage: Stage,
    tool: Option<Child>,
    at: Option<PathBuf>,
}

impl Closing {
    /// Kills the daemon. Whether it still was there; and whether the command, if there is one, said
    /// that the image is closed.
    pub(crate) fn kill(mut self) -> Result<(bool, bool)> {
        let was_there = self.stage.kill()?;
        let pid = self.stage.pid();
        command::eventually(GONE, || {
            ensure!(is_gone(pid), "the daemon {pid} is still there");
            Ok(())
        })?;
        let mut closed = false;
        if let Some(mut tool) = self.tool.take() {
            let status = command::eventually(Duration::from_secs(60), || {
                tool.try_wait()?.context("umount or detach does not end")
            });
            if status.is_err() {
                let _ = tool.kill();
            }
            closed = status?.success();
        }
        // What it holds goes with it.
        drop(self.stage);
        self.at.as_deref().map_or(Ok(()), lazy)?;
        Ok((was_there, closed))
    }
}
