//! Turns the process into a daemon whose parent waits until it is ready.
//!
//! Imports: `error`, `sys`.
//! Never: forks after a thread was started; keeps its caller's descriptors; lets an error of the
//! start get lost.
//!
//! The order matters:
//!
//! 1. fork, while there is one thread and no image is open: threads do not survive a fork, and a
//!    parent that holds an image's descriptor would hold its lock as well;
//! 2. child: new session, root directory, `/dev/null` as input and output (a caller that reads our
//!    output would wait for its end for ever), stray descriptors closed; stderr stays for now;
//! 3. the child opens, locks, starts its threads, mounts and answers INIT;
//! 4. it sends one frame over the socket to the parent: ready, or what went wrong. The parent
//!    acknowledges; were it gone instead, nobody would know of the mount, so the child gives up;
//! 5. only then stderr becomes `/dev/null`, and log lines go to syslog.

use super::logging;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory;
use crate::sys::process::{self, Fork};
use log::Level;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const READY: u8 = 0;
const FAILED: u8 = 1;
/// Longest text that a parent takes from its child.
const FRAME_MAX: u64 = 1 << 20;

/// What the child told its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It serves; the bytes are for the one who asked.
    Ready(Vec<u8>),
    /// It could not, and has ended or is about to.
    Failed(Vec<u8>),
}

/// The parent's end.
#[derive(Debug)]
pub struct Waiter {
    stream: UnixStream,
    pid: i32,
}

/// The daemon's end. One that stays in the foreground has nobody to report to.
#[derive(Debug)]
pub struct Reporter {
    stream: Option<UnixStream>,
    answered: Arc<AtomicBool>,
}

/// Which side of the fork this is.
#[derive(Debug)]
pub enum Side {
    /// Wait for the daemon.
    Parent(Waiter),
    /// Be the daemon.
    Child(Reporter),
}

/// Forks. The child keeps no descriptors above 2 but those in `keep`.
pub fn fork(keep: &[RawFd]) -> Result<Side> {
    let (ours, theirs) = UnixStream::pair()?;
    match process::fork().map_err(|e| Error::why(ErrorKind::Host, "cannot fork").because(e))? {
        Fork::Parent(pid) => Ok(Side::Parent(Waiter { stream: ours, pid })),
        Fork::Child => {
            drop(ours);
            nix::unistd::setsid().map_err(io::Error::from)?;
            nix::unistd::chdir("/").map_err(io::Error::from)?;
            let null = OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/null")?;
            nix::unistd::dup2_stdin(&null).map_err(io::Error::from)?;
            nix::unistd::dup2_stdout(&null).map_err(io::Error::from)?;
            drop(null);
            let mut keep = keep.to_vec();
            keep.push(theirs.as_raw_fd());
            process::close_strays(&keep)?;
            let answered = Arc::new(AtomicBool::new(false));
            Ok(Side::Child(Reporter {
                stream: Some(theirs),
                answered,
            }))
        }
    }
}

/// The descriptors that paths like `/dev/fd/3` name, which a daemon must not close.
pub fn named_descriptors<'a>(paths: impl Iterator<Item = &'a std::path::Path>) -> Vec<RawFd> {
    let number = |path: &std::path::Path| {
        let text = path.to_str()?;
        let number = ["/dev/fd/", "/proc/self/fd/"]
            .iter()
            .find_map(|p| text.strip_prefix(p))?;
        let fd = number.parse::<RawFd>().ok()?;
        (fd > 2 && process::is_open(fd)).then_some(fd)
    };
    paths.filter_map(number).collect()
}

impl Waiter {
    /// Waits for the daemon's word.
    pub fn wait(mut self) -> Result<Outcome> {
        let mut head = [0_u8; 5];
        let frame = self.stream.read_exact(&mut head).and_then(|()| {
            let [tag, len @ ..] = head;
            let len = u64::from(u32::from_le_bytes(len)).min(FRAME_MAX);
            let mut payload = Vec::new();
            Read::take(&mut self.stream, len).read_to_end(&mut payload)?;
            Ok((tag, payload))
        });
        let Ok((tag, payload)) = frame else {
            let how = match nix::sys::wait::waitpid(Pid::from_raw(self.pid), None) {
                Ok(WaitStatus::Exited(_, status)) => format!("exit status {status}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
                Ok(other) => format!("{other:?}"),
                Err(errno) => errno.to_string(),
            };
            let why = format!("the daemon ended before it was ready ({how})");
            return Err(Error::why(ErrorKind::Host, why).fix("see why with: ploopfs mount -f -d"));
        };
        if tag == READY {
            self.stream.write_all(&[1])?;
            return Ok(Outcome::Ready(payload));
        }
        // The child ends by itself now; wait, so that its locks are gone when we return.
        let _ = nix::sys::wait::waitpid(Pid::from_raw(self.pid), None);
        Ok(Outcome::Failed(payload))
    }
}

impl Reporter {
    /// One for a process that stays in the foreground.
    #[must_use]
    pub fn foreground() -> Self {
        Self {
            stream: None,
            answered: Arc::new(AtomicBool::new(false)),
        }
    }

    /// True when no parent waits.
    #[must_use]
    pub fn is_foreground(&self) -> bool {
        self.stream.is_none()
    }

    /// Ends the process as by SIGTERM if the parent dies while it waits. Signals must be blocked
    /// already, as this starts a thread.
    pub fn watch_parent(&self) -> Result<()> {
        let Some(stream) = &self.stream else {
            return Ok(());
        };
        let (stream, answered) = (stream.try_clone()?, Arc::clone(&self.answered));
        let watch = move || {
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
            while poll(&mut fds, PollTimeout::NONE).is_err() {}
            if !answered.load(Ordering::SeqCst) {
                log::warn!("the process that asked for this has died; giving up");
                let _ = kill(Pid::this(), Signal::SIGTERM);
            }
        };
        std::thread::Builder::new()
            .name("parent".into())
            .spawn(watch)?;
        Ok(())
    }

    fn send(&mut self, tag: u8, payload: &[u8]) -> io::Result<()> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut frame = vec![tag];
        frame.extend_from_slice(&len.to_le_bytes());
        frame.extend_from_slice(payload);
        stream.write_all(&frame)
    }

    /// Tells the parent, or the service manager, that requests are served, and lets go of stderr.
    pub fn ready(mut self, payload: &[u8], status: &str) -> Result<()> {
        self.answered.store(true, Ordering::SeqCst);
        if self.stream.is_none() {
            return notify_service_manager(status);
        }
        let gone = |e: io::Error| {
            Error::why(ErrorKind::Host, "the process that asked for this has died").because(e)
        };
        self.send(READY, payload).map_err(gone)?;
        if let Some(stream) = &mut self.stream {
            stream.read_exact(&mut [0_u8]).map_err(gone)?;
        }
        logging::to_syslog();
        let null = File::options().write(true).open("/dev/null")?;
        nix::unistd::dup2_stderr(&null).map_err(io::Error::from)?;
        Ok(())
    }

    /// Tells the parent what went wrong. The process is to end then.
    pub fn failed(mut self, payload: &[u8]) {
        self.answered.store(true, Ordering::SeqCst);
        if let Err(e) = self.send(FAILED, payload) {
            log::error!("cannot report: {e}");
        }
    }
}

/// `READY=1` to the socket that the service manager named. A manager that is told nothing would
/// wait for its start time-out, so failing to tell it is an error.
fn notify_service_manager(status: &str) -> Result<()> {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let send = || -> io::Result<()> {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::SocketAddr;
        let socket = UnixDatagram::unbound()?;
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&address)?,
        };
        let text = format!("READY=1\nSTATUS={status}\nMAINPID={}\n", std::process::id());
        socket.send_to_addr(text.as_bytes(), &address)?;
        Ok(())
    };
    send().map_err(|e| Error::why(ErrorKind::Host, "cannot notify the service manager").because(e))
}

/// Makes the process fit to serve a block device; call it before any thread is started. What the
/// host does not allow is left out.
///
/// Each thread has the mark of an I/O flusher for itself, and hands it to the threads it starts: so
/// it is set here, by the only one.
pub fn prepare_process() {
    if let Err(e) = process::ignore_signals() {
        log::debug!("cannot ignore signals: {e}");
    }
    let root = nix::unistd::geteuid().is_root();
    // Nobody expects these for users; root misses them only where it lacks a capability.
    let level = if root { Level::Info } else { Level::Debug };
    if let Err(e) = process::set_io_flusher() {
        log::log!(
            level,
            "not marked as an I/O flusher (needs CAP_SYS_RESOURCE): {e}"
        );
    }
    if memory::waits_for_write_back() {
        // Such a group may be full of what only this process can write back. Marked, it gets no
        // memory then and is killed; not marked, it waits for memory for ever.
        log::warn!(
            "this memory control group (version 1) must not hold those who write to the disk \
             through a loop device as well: both would come to a standstill, or this process be \
             killed"
        );
    }
    let wanted = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        Ok(_) => Ok(()),
        Err(e) => Err(e),
    };
    if let Err(e) = wanted {
        log::debug!("cannot raise the limit of open files: {e}");
    }
    if root {
        // The disk on top of a daemon that gets killed for memory is lost to its users.
        if let Err(e) = fs::write("/proc/self/oom_score_adj", "-500") {
            log::log!(
                level,
                "may be killed for memory (CAP_SYS_RESOURCE is missing): {e}"
            );
        }
    }
}

/// Locks the process's memory, that of now and that of later. A fork does not inherit it, so the
/// daemon itself must call this; before its threads are started, as their stacks count too and
/// what is wrong is then told at the start.
pub fn lock_memory() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(io::Error::from)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard).map_err(io::Error::from)?;
    }
    let error = |why: String| {
        Error::why(ErrorKind::Host, why)
            .fix("ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), or leave --lock-memory out")
    };
    // Below a limit the kernel would go along now, and refuse memory when it is needed.
    if hard != RLIM_INFINITY && !process::ignores_memory_limits()? {
        let why = format!(
            "memory cannot be locked: RLIMIT_MEMLOCK is {} KiB, and CAP_IPC_LOCK is missing",
            hard >> 10
        );
        return Err(error(why));
    }
    process::lock_memory().map_err(|e| {
        error("memory cannot be locked (see RLIMIT_MEMLOCK and CAP_IPC_LOCK)".into()).because(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn pair() -> (Waiter, Reporter) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answered = Arc::new(AtomicBool::new(false));
        (
            Waiter {
                stream: ours,
                pid: 0,
            },
            Reporter {
                stream: Some(theirs),
                answered,
            },
        )
    }

    #[test]
    fn a_failure_reaches_the_parent_whole() {
        let (waiter, reporter) = pair();
        let text = vec![b'x'; 100_000];
        let sent = text.clone();
        let child = std::thread::spawn(move || reporter.failed(&sent));
        assert_eq!(waiter.wait().unwrap(), Outcome::Failed(text));
        child.join().unwrap();
    }

    #[test]
    fn a_child_that_says_nothing_is_an_error() {
        let (waiter, reporter) = pair();
        drop(reporter);
        assert_eq!(waiter.wait().unwrap_err().kind(), ErrorKind::Host);
    }

    #[test]
    fn a_child_without_a_parent_gives_up() {
        let (waiter, reporter) = pair();
        drop(waiter);
        assert!(reporter.ready(b"", "").is_err());
    }

    #[test]
    fn only_open_descriptors_named_by_number_are_kept() {
        let file = File::open("/dev/null").unwrap();
        let fd = file.as_raw_fd();
        let names = [
            format!("/dev/fd/{fd}"),
            "/dev/fd/2".into(),
            "/dev/fd/999999".into(),
        ];
        let paths = names.iter().map(Path::new);
        assert_eq!(named_descriptors(paths), vec![fd]);
    }
}
