//! What a daemon must not do because it would be asking itself: done by a process beside it.
//!
//! Imports: `error`, `fuse`, `sys`.
//! Never: has a hand on the device of the mount; leaves a loop device behind whose daemon died
//! before it could say that it has it.
//!
//! A process that waits for an answer from its own threads cannot be killed: its threads die, the
//! wait goes on, and the descriptor whose end would end the mount stays open behind the wait. So
//! whatever can lead to a request to the own mount is done by this program under the name [`NAME`]:
//! opening the disk, setting the loop device up (the kernel reads its partitions), tuning and
//! mounting it, and taking it away. It lives as long as that takes:
//!
//! 1. the daemon starts it, with the mount as standard input and a socket as standard output, and
//!    lets go of both;
//! 2. the daemon writes an [`Order`]; words come back, the device before it is set up, so that it
//!    can be taken away again whatever happens;
//! 3. for a new device, the daemon says in the end that it keeps it. Without that word, which a
//!    dead daemon cannot give, the device is taken away.

use super::output::Report;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::attach::{self, Attached, FileSystemTarget, Slice};
use crate::fuse::logging;
use crate::fuse::mount;
use crate::fuse::registry::RecordedPath;
use crate::sys::process;
use log::LevelFilter;
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// What the program is called by then.
pub(super) const NAME: &str = "ploopfs-loop";
/// This very program, even when another one has its place by now.
const PROGRAM: &str = "/proc/self/exe";
/// What the daemon says last.
const KEPT: &[u8] = b"kept\n";

/// What is to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Put a loop device on the disk.
    Attach(Job),
    /// Take one away, and before that a file system of it.
    Clear(Attached, Option<RecordedPath>),
}

/// A loop device to be set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// The beginning of a report.
    pub(super) what: String,
    /// The disk's name in the mount.
    pub(super) name: String,
    /// Nobody may write.
    pub(super) read_only: bool,
    /// What the kernel may not find by itself.
    pub(super) slices: Vec<Slice>,
    /// Where a file system of it goes, and from which partition.
    pub(super) file_system: Option<(RecordedPath, Option<u32>)>,
}

impl Job {
    fn target(&self) -> Option<FileSystemTarget> {
        let (directory, partition) = self.file_system.as_ref()?;
        Some(FileSystemTarget {
            directory: directory.0.clone(),
            partition: *partition,
        })
    }
}

/// How far it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Word {
    /// This device has the disk, or is about to get it.
    Device(Attached),
    /// All is done.
    Done,
    /// Something went wrong; what there was is gone.
    Failed(Box<Report>),
}

/// An order with how log lines are to go.
#[derive(Debug, Serialize, Deserialize)]
struct Letter {
    order: Order,
    foreground: bool,
    debug: bool,
}

/// How log lines of a daemon go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    pub(super) foreground: bool,
    pub(super) debug: bool,
}

fn broken(e: io::Error) -> Error {
    Error::why(
        ErrorKind::Host,
        "the process that handles the loop device broke down",
    )
    .because(e)
    .fix(
        "repeat the command; the system log has what that process said, and `ploopfs mount` \
          shows the disk without a loop device",
    )
}

fn write_line(mut stream: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// The daemon's end.
#[derive(Debug)]
pub(super) struct Outside {
    child: Child,
    stream: BufReader<UnixStream>,
}

impl Outside {
    /// Starts the process; `shown` is for those who look at the host's processes.
    pub(super) fn start(
        shown: &str,
        input: Stdio,
        order: Order,
        Manner { foreground, debug }: Manner,
    ) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().map_err(broken)?;
        let mut command = Command::new(PROGRAM);
        let child = command
            .arg0(NAME)
            .arg(shown)
            .stdin(input)
            .stdout(OwnedFd::from(theirs))
            .spawn()
            .map_err(broken)?;
        // It holds what the child has got.
        drop(command);
        let outside = Self {
            child,
            stream: BufReader::new(ours),
        };
        let letter = Letter {
            order,
            foreground,
            debug,
        };
        if let Err(e) = write_line(outside.stream.get_ref(), &letter) {
            outside.end(false);
            return Err(broken(e));
        }
        Ok(outside)
    }

    /// Waits until all is done; `come` hears of the device before it is set up. What the
    /// process reports of a failure goes to `failed`.
    pub(super) fn wait(
        &mut self,
        mut come: impl FnMut(Attached),
        failed: impl FnOnce(Box<Report>),
    ) -> Result<()> {
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line).map_err(broken)? == 0 {
                return Err(broken(io::Error::other("it ended without a word")));
            }
            match serde_json::from_str(&line).map_err(|e| broken(e.into()))? {
                Word::Device(device) => come(device),
                Word::Done => return Ok(()),
                Word::Failed(report) => {
                    let error = Error::why(ErrorKind::Host, report.what.clone());
                    failed(report);
                    return Err(error);
                }
            }
        }
    }

    /// Ends the process. A new device stays if it is kept, else it has gone when this returns; but
    /// for a process that was killed, which is told by `true`.
    pub(super) fn end(mut self, kept: bool) -> bool {
        if kept {
            if let Err(e) = self.stream.get_ref().write_all(KEPT) {
                log::debug!("{NAME} was not told to keep the device: {e}");
            }
        }
        drop(self.stream);
        match self.child.wait() {
            Ok(status) => status.signal().is_some(),
            Err(e) => {
                log::debug!("{NAME} has ended: {e}");
                false
            }
        }
    }
}

/// Takes a device of ours away, or has it go with its last user.
pub(super) fn clear(
    device: &Attached,
    file_system: Option<RecordedPath>,
    manner: Manner,
) -> Result<()> {
    let shown = device.path().display().to_string();
    let order = Order::Clear(device.clone(), file_system);
    let mut why = None;
    let mut outside = match Outside::start(&shown, Stdio::null(), order, manner) {
        Ok(outside) => outside,
        Err(e) => {
            // Better from here than not at all.
            log::debug!("{e}");
            return device.clear(true);
        }
    };
    let done = outside.wait(drop, |report| why = report.why);
    outside.end(false);
    done.map_err(|e| match why {
        Some(why) => Error::why(ErrorKind::Host, why),
        None => e,
    })
}

/// True where the program was called to do this.
pub(super) fn is_meant(args: &[OsString]) -> bool {
    args.first().is_some_and(|name| name == NAME)
}

/// Does what the daemon orders; the exit status.
pub(super) fn run() -> u8 {
    match follow() {
        Ok(()) => 0,
        Err(e) => {
            log::debug!("{NAME}: {e}");
            super::exit::FAILED
        }
    }
}

fn follow() -> Result<()> {
    // Signals that end a daemon, from a terminal perhaps, are for it to heed: it says what to do.
    let signals: SigSet = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ]
    .into_iter()
    .collect();
    signals.thread_block().map_err(io::Error::from)?;
    process::ignore_signals()?;
    let mount = io::stdin().as_fd().try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    nix::unistd::dup2_stdin(&null).map_err(io::Error::from)?;
    let stream = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    let letter: Letter = serde_json::from_str(&line).map_err(io::Error::from)?;
    let level = match letter.debug {
        true => LevelFilter::Debug,
        false => LevelFilter::Info,
    };
    logging::start(level, letter.foreground);
    match letter.order {
        Order::Attach(job) => attach(&job, mount, &stream, lines),
        Order::Clear(device, file_system) => {
            if !letter.foreground {
                logging::to_syslog();
            }
            take_away(&device, file_system.as_ref().map(|place| &place.0));
            let word = match device.clear(true) {
                Ok(()) => Word::Done,
                Err(e) => Word::Failed(Report::new("cannot detach", &e)),
            };
            Ok(write_line(&stream, &word)?)
        }
    }
}

/// Unmounts a file system of the device, if it is still there.
fn take_away(device: &Attached, file_system: Option<&PathBuf>) {
    let Some(place) = file_system else {
        return;
    };
    let is_its = device.mounts().is_ok_and(|mounts| mounts.contains(place));
    if is_its {
        if let Err(e) = mount::unmount_any(place, true) {
            log::warn!("cannot unmount {}: {e}", place.display());
        }
    }
}

fn attach(
    job: &Job,
    mount: OwnedFd,
    stream: &UnixStream,
    mut lines: BufReader<UnixStream>,
) -> Result<()> {
    let tell = |device| Ok(write_line(stream, &Word::Device(device))?);
    let device = attach::attach(&mount, job.name.as_ref(), job.read_only, tell);
    // From here on the device alone keeps the session alive; without one it ends now.
    drop(mount);
    let failed = |e: &Error| write_line(stream, &Word::Failed(Report::new(&job.what, e)));
    let device = match device {
        Ok(device) => device,
        Err(e) => return Ok(failed(&e)?),
    };
    let target = job.target();
    let place = target.as_ref().map(|target| &target.directory);
    let mut set_up = || -> Result<()> {
        tell(device.clone())?;
        device.tune();
        device.add_partitions(&job.slices)?;
        if let Some(target) = &target {
            device.mount_file_system(target, job.read_only)?;
        }
        write_line(stream, &Word::Done)?;
        let mut word = String::new();
        lines.read_line(&mut word)?;
        if word.as_bytes() != KEPT {
            return Err(Error::why(ErrorKind::Host, "nobody keeps the device"));
        }
        Ok(())
    };
    let done = set_up();
    if let Err(e) = &done {
        take_away(&device, place);
        if let Err(e) = device.clear(true) {
            log::warn!("cannot detach {}: {e}", device.path().display());
        }
        if let Err(e) = failed(e) {
            // The daemon has died, or has given up before.
            log::debug!("nobody hears of it: {e}");
        }
    }
    Ok(())
}
