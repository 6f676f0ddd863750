//! Processes: fork, stray descriptors, signals to ignore, and who is still alive.

use nix::sys::signal::{SigHandler, SigSet, Signal};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// linux/prctl.h; newer than the `libc` crate's list.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// linux/capability.h.
const CAP_IPC_LOCK: u32 = 14;

/// Where programs of the host are.
const DIRECTORIES: [&str; 5] = ["/usr/bin", "/bin", "/usr/local/bin", "/sbin", "/usr/sbin"];

/// Before usual threads, which have 0 as nice(1) counts, and behind the kernel's first ones (-20).
const NICE: libc::c_int = -10;

/// Has the calling thread, and no other, go before usual ones. Needs CAP_SYS_NICE, or RLIMIT_NICE.
pub fn go_first() -> io::Result<()> {
    // SAFETY: plain numbers; 0 stands for the calling thread.
    #[allow(unsafe_code)]
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Finds a program of the host without the help of `PATH`.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    DIRECTORIES
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.is_file())
}

/// Which side of a fork this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// The process that called; the child has this id.
    Parent(i32),
    /// The new process.
    Child,
}

/// Forks. Refused once there is a second thread, because that thread and the locks it holds would
/// be missing in the child.
pub fn fork() -> io::Result<Fork> {
    let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(io::Error::other("fork after threads were started"));
    }
    // SAFETY: this process has one thread, so the child inherits every lock in a known state and
    // may go on as any program does.
    #[allow(unsafe_code)]
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

fn close_range(first: u32, last: u32, flags: libc::c_uint) -> io::Result<()> {
    let flags = libc::c_int::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: plain numbers. The callers see to it that no live object owns a descriptor that
    // gets closed here.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close_range(first, last, flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Closes every descriptor above 2 but the ones to `keep`: those that the caller of this program
/// left open must not live as long as a daemon does. Only for a child that has just been forked and
/// owns nothing but `keep`.
pub fn close_strays(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = first.max(fd.saturating_add(1));
    }
    close_range(first, u32::MAX, 0)
}

/// Keeps every descriptor above 2 from programs that this process starts.
pub fn hide_strays() -> io::Result<()> {
    close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

/// The signals that a daemon ignores: of a broken pipe or a file that is too large the call that
/// fails tells enough.
fn ignored() -> impl Iterator<Item = Signal> {
    [Signal::SIGPIPE, Signal::SIGXFSZ].into_iter()
}

/// Ignores from now on what a daemon ignores.
pub fn ignore_signals() -> io::Result<()> {
    ignored().try_for_each(|signal| set_handler(signal, SigHandler::SigIgn))
}

fn set_handler(signal: Signal, handler: SigHandler) -> io::Result<()> {
    // SAFETY: the callers pass SIG_IGN or SIG_DFL, which run no code of ours.
    #[allow(unsafe_code)]
    let old = unsafe { nix::sys::signal::signal(signal, handler) };
    Ok(old.map(drop)?)
}

/// Lets a program start with no signal blocked or ignored: a file system's own daemon, which
/// mount(8) may start, would otherwise be deaf to SIGTERM for ever.
pub fn with_plain_signals(command: &mut Command) -> &mut Command {
    let plain = || {
        SigSet::empty().thread_set_mask()?;
        ignored().try_for_each(|signal| set_handler(signal, SigHandler::SigDfl))
    };
    // SAFETY: between fork and exec this makes system calls that are safe there, on values of its
    // own; it takes no lock and asks the heap for nothing.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(plain)
    }
}

/// Tells the kernel that this thread, and those it starts, serve a block device: memory that they
/// ask for is not gained by writing to it. Needs CAP_SYS_RESOURCE.
pub fn set_io_flusher() -> io::Result<()> {
    let (one, zero): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: this operation takes plain numbers only.
    #[allow(unsafe_code)]
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, one, zero, zero, zero) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Keeps from now on what this process has touched of its memory in memory: never swapped out, nor
/// read again from the program's file. What it has not touched costs nothing.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: plain numbers; the call changes how the kernel treats pages, not what is in them.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// True if this process may lock any amount of memory, whatever its limits.
pub fn ignores_memory_limits() -> io::Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    Ok(mask.unwrap_or(0) & (1 << CAP_IPC_LOCK) != 0)
}

/// Lets this process get SIGTERM when the thread that forked it ends, whatever ends that.
pub fn end_with_parent() -> io::Result<()> {
    let signal = libc::c_ulong::try_from(libc::SIGTERM).map_err(io::Error::other)?;
    // SAFETY: this operation takes plain numbers only.
    #[allow(unsafe_code)]
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A descriptor of a process: it becomes readable when the process has ended.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the result is a new descriptor that nothing else owns.
    #[allow(unsafe_code)]
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Borrows a descriptor number that the user named, as in `/dev/fd/3`, to learn whether it is open.
#[must_use]
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD only looks the number up; a closed one is an error.
    #[allow(unsafe_code)]
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags >= 0
}

/// Lets a descriptor live through `exec`.
pub fn keep_through_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `fd` is borrowed and so open for the call; the rest are plain numbers.
    #[allow(unsafe_code)]
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// When a process was started, in clock ticks since the host booted. With the process id this names
/// one process for ever, however often ids are reused. ESRCH for one that has ended, though nobody
/// may have taken its status yet.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    start_time_in(&stat).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// Field 22; the program's name (field 2) may hold blanks and brackets, so count from its end.
fn start_time_in(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_start_time_is_found_behind_odd_names() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        for name in ["sh", "a) b", "((", ""] {
            let stat = format!("12 ({name}) {fields}");
            assert_eq!(start_time_in(&stat), Some(4711), "{name:?}");
        }
        assert_eq!(start_time_in("12 (sh) S 1"), None);
        assert_eq!(start_time_in(""), None);
        let zombie = fields.replacen('S', "Z", 1);
        assert_eq!(start_time_in(&format!("12 (sh) {zombie}")), None);
    }

    #[test]
    fn this_process_has_one_start_time_and_a_pidfd() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(start_time(pid).unwrap(), start_time(pid).unwrap());
        let fd = pidfd_open(pid).unwrap();
        assert!(is_open(fd.as_fd().as_raw_fd()));
        assert!(!is_open(1_000_000));
    }

    #[test]
    fn programs_start_with_plain_signals() {
        // A thread's mask ends with it, and SIGXFSZ means nothing to the other tests.
        let said = std::thread::spawn(|| {
            SigSet::all().thread_block().unwrap();
            set_handler(Signal::SIGXFSZ, SigHandler::SigIgn).unwrap();
            let mut command = Command::new("cat");
            command.arg("/proc/self/status");
            with_plain_signals(&mut command).output().unwrap().stdout
        });
        let said = String::from_utf8(said.join().unwrap()).unwrap();
        let mask = |name: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
        };
        assert_eq!(mask("SigBlk:"), 0);
        assert_eq!(mask("SigIgn:") & (1 << (libc::SIGXFSZ - 1)), 0);
    }

    #[test]
    fn fork_is_refused_with_more_than_one_thread() {
        // The test harness runs each test on a thread of its own.
        assert!(fork().is_err());
    }
}
