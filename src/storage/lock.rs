//! Who may use an image file at the same time: the byte-range locks that QEMU takes, and ploop's.
//!
//! Byte 100 + n says "I use permission n", byte 200 + n "nobody else may have permission n"; all
//! are shared locks, so that they add up, and whoever wants to use n looks for locks on byte 200 +
//! n, and the other way round. Permissions: 0 consistent read, 1 write, 3 resize. ploop takes bytes
//! 200 to 204 for a change and 300 to 304 for a long operation.
//!
//! | open for | takes | looks for others on |
//! |----------|-------|---------------------|
//! | writing  | 100 101 103 201 203 | 101 103, 200 201 203, 300-304 |
//! | reading  | 100 201 203         | 101 103, 200, 300-304 |
//!
//! The locks belong to the open file, not to the process: they end when the storage is closed, and
//! a second open of the file by this process meets them as any other program does.

use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock as sys;
use std::cell::OnceCell;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a lock is asked for before its holder is named: a killed process may keep its open
/// files for a moment.
/// Unit tests, in which nobody lets go, wait less.
pub const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 1000 });

/// What an image file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Reading; others may read too.
    Read,
    /// Reading and writing, alone.
    Write,
}

/// Whether there is a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Locked {
    /// It is held.
    Yes,
    /// The host's file system has no such locks.
    Unsupported,
}

/// A program that has a lock on a file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command line, shortened.
    pub command: String,
}

/// One byte of the scheme.
const fn byte(at: u64) -> Range<u64> {
    at..at + 1
}

impl Purpose {
    fn takes(self) -> &'static [Range<u64>] {
        const READ: [Range<u64>; 3] = [byte(100), byte(201), byte(203)];
        const WRITE: [Range<u64>; 5] = [byte(100), byte(101), byte(103), byte(201), byte(203)];
        match self {
            Self::Read => &READ,
            Self::Write => &WRITE,
        }
    }

    /// What tells most about the other comes first, for the message.
    fn looks_for(self) -> &'static [Range<u64>] {
        const READ: [Range<u64>; 4] = [byte(101), byte(103), byte(200), 300..305];
        const WRITE: [Range<u64>; 6] = [
            byte(101),
            byte(103),
            byte(200),
            byte(201),
            byte(203),
            300..305,
        ];
        match self {
            Self::Read => &READ,
            Self::Write => &WRITE,
        }
    }
}

/// Locks an open image file, trying until `deadline`.
pub fn image(file: &File, path: &Path, purpose: Purpose, deadline: Instant) -> Result<Locked> {
    loop {
        match attempt(file, purpose) {
            Ok(None) => return Ok(Locked::Yes),
            Ok(Some(conflict)) if Instant::now() >= deadline => {
                return Err(refusal(file, path, conflict));
            }
            Ok(Some(_)) => pause(),
            Err(e) if is_unsupported(&e) => return Ok(Locked::Unsupported),
            Err(e) => return Err(Error::from(e).in_file(path)),
        }
    }
}

/// Two that try at the same time both see each other and both let go; uneven pauses part them.
fn pause() {
    let jitter = u64::from(std::process::id() % 17);
    std::thread::sleep(Duration::from_millis(15 + jitter));
}

fn is_unsupported(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(
        errno,
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}

/// Looks, takes, looks again: a lock that came between the first look and the taking is seen by the
/// second look of at least one of the two.
fn attempt(file: &File, purpose: Purpose) -> io::Result<Option<sys::Conflict>> {
    if let Some(conflict) = look(file, purpose)? {
        return Ok(Some(conflict));
    }
    for range in purpose.takes() {
        if !sys::share(file.as_fd(), range)? {
            // Someone has an exclusive lock, which nobody in this scheme takes.
            let conflict = sys::Conflict {
                start: range.start,
                pid: None,
            };
            return give_up(file, purpose, conflict);
        }
    }
    match look(file, purpose)? {
        Some(conflict) => give_up(file, purpose, conflict),
        None => Ok(None),
    }
}

fn look(file: &File, purpose: Purpose) -> io::Result<Option<sys::Conflict>> {
    for range in purpose.looks_for() {
        if let Some(conflict) = sys::conflict(file.as_fd(), range)? {
            // The kernel joins locks side by side; what matters is the byte that was asked about.
            return Ok(Some(sys::Conflict {
                start: range.start,
                ..conflict
            }));
        }
    }
    Ok(None)
}

fn give_up(
    file: &File,
    purpose: Purpose,
    conflict: sys::Conflict,
) -> io::Result<Option<sys::Conflict>> {
    for range in purpose.takes() {
        sys::release(file.as_fd(), range)?;
    }
    Ok(Some(conflict))
}

fn refusal(file: &File, path: &Path, conflict: sys::Conflict) -> Error {
    let use_of_it = match conflict.start {
        101 | 103 => "has it open for writing",
        300..=304 => "runs a long operation on it",
        _ => "uses it and lets nobody else write to it",
    };
    let mut holders = holders_of(file);
    if let (true, Some(pid)) = (holders.is_empty(), conflict.pid) {
        holders.push(Holder {
            pid,
            command: command_of(pid),
        });
    }
    let who = match holders.first() {
        Some(holder) => format!("pid {} ({})", holder.pid, holder.command),
        None => "another program".to_owned(),
    };
    Error::why(ErrorKind::Locked, format!("{who} {use_of_it}"))
        .in_file(path)
        .fix("end that program's use of the image first; nothing was changed")
}

/// Takes ploop's lock on a bundle's lock file, trying until `deadline`. `false` where another
/// program keeps it.
pub fn bundle(file: &File, exclusive: bool, deadline: Instant) -> Result<bool> {
    loop {
        match sys::whole(file.as_fd(), exclusive) {
            Ok(true) => return Ok(true),
            Ok(false) if Instant::now() >= deadline => return Ok(false),
            Ok(false) => pause(),
            Err(e) => return Err(e.into()),
        }
    }
}

/// The error for a bundle's lock file that another program keeps.
#[must_use]
pub fn bundle_refusal(file: &File, path: &Path) -> Error {
    let who = match holders_of(file).first() {
        Some(holder) => format!("pid {} ({})", holder.pid, holder.command),
        None => "another program".to_owned(),
    };
    Error::why(ErrorKind::Locked, format!("{who} is working on the bundle"))
        .in_file(path)
        .fix("end that program's use of the disk first; nothing was changed")
}

/// Who uses which files, as of the first question: for looking at many files at once.
#[derive(Debug, Default)]
pub struct Users {
    table: OnceCell<Vec<Listed>>,
}

impl Users {
    /// Everybody else who has locks of the scheme on this file, so far as it can be seen; pid 0 for
    /// one who cannot. `None` where the host cannot tell.
    #[must_use]
    pub fn of(&self, file: &File) -> Option<Vec<Holder>> {
        let Some(conflict) = sys::conflict(file.as_fd(), &(100..305)).ok()? else {
            return Some(Vec::new());
        };
        let mut holders = among(self.table.get_or_init(listed), file);
        if holders.is_empty() {
            let pid = conflict.pid.unwrap_or(0);
            let command = if pid == 0 {
                String::new()
            } else {
                command_of(pid)
            };
            holders.push(Holder { pid, command });
        }
        Some(holders)
    }
}

/// A lock that the host lists with the open file that has it.
#[derive(Debug)]
struct Listed {
    inode: u64,
    pid: u32,
    /// The open file, to be asked which one it is.
    link: PathBuf,
}

fn holders_of(file: &File) -> Vec<Holder> {
    among(&listed(), file)
}

/// All locks of all processes that can be seen; those of other users only by root. Reading the
/// lists touches none of the files themselves, which may be on a file system that does not answer.
fn listed() -> Vec<Listed> {
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else {
        return found;
    };
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(entries) = fs::read_dir(process.path().join("fdinfo")) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(text) = fs::read_to_string(entry.path()) else {
                continue;
            };
            let link = process.path().join("fd").join(entry.file_name());
            let mut inodes: Vec<u64> = text.lines().filter_map(locked_inode).collect();
            inodes.dedup();
            found.extend(inodes.into_iter().map(|inode| Listed {
                inode,
                pid,
                link: link.clone(),
            }));
        }
    }
    found
}

/// The inode in a line such as `lock: 1: OFDLCK ADVISORY READ -1 fe:00:4711 100 101`.
fn locked_inode(line: &str) -> Option<u64> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace();
    let place = words.find(|word| word.split(':').count() == 3)?;
    place.rsplit(':').next()?.parse().ok()
}

fn among(table: &[Listed], file: &File) -> Vec<Holder> {
    let Ok(own) = file.metadata() else {
        return Vec::new();
    };
    let mut holders: Vec<Holder> = Vec::new();
    for listed in table.iter().filter(|listed| listed.inode == own.ino()) {
        // The device in those lists is not always the one that `stat` tells, so ask the open file.
        let same = fs::metadata(&listed.link)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (own.dev(), own.ino()));
        if same && holders.iter().all(|holder| holder.pid != listed.pid) {
            holders.push(Holder {
                pid: listed.pid,
                command: command_of(listed.pid),
            });
        }
    }
    holders
}

fn command_of(pid: u32) -> String {
    const SHOWN: usize = 80;
    if pid == std::process::id() {
        return "this program itself".to_owned();
    }
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    let line = if line.is_empty() {
        fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default()
    } else {
        line.into_owned()
    };
    let blank = |c: char| if c.is_control() { ' ' } else { c };
    let text: String = line
        .trim_end_matches(['\0', '\n'])
        .chars()
        .map(blank)
        .take(SHOWN)
        .collect();
    if text.is_empty() {
        "ended meanwhile".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::open;

    fn lock(path: &Path, purpose: Purpose) -> (File, Result<Locked>) {
        let file = open::any(path, purpose == Purpose::Write).unwrap();
        let locked = image(&file, path, purpose, Instant::now());
        (file, locked)
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.hds");
        fs::write(&path, "x").unwrap();
        let link = dir.path().join("link.hds");
        fs::hard_link(&path, &link).unwrap();
        let (first, locked) = lock(&path, Purpose::Read);
        assert!(matches!(locked, Ok(Locked::Yes)));
        let (second, locked) = lock(&link, Purpose::Read);
        assert!(matches!(locked, Ok(Locked::Yes)));
        let (_refused, locked) = lock(&link, Purpose::Write);
        let error = locked.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("this program itself"), "{error}");
        assert!(error.to_string().contains("nobody else write"), "{error}");
        drop(first);
        drop(second);
        let (_writer, locked) = lock(&path, Purpose::Write);
        assert!(matches!(locked, Ok(Locked::Yes)));
        for purpose in [Purpose::Read, Purpose::Write] {
            let (_refused, locked) = lock(&link, purpose);
            let error = locked.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked);
            assert!(error.to_string().contains("open for writing"), "{error}");
        }
    }

    #[test]
    fn a_refused_open_leaves_no_lock_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.hds");
        fs::write(&path, "x").unwrap();
        let (reader, _) = lock(&path, Purpose::Read);
        let (refused, locked) = lock(&path, Purpose::Write);
        assert!(locked.is_err());
        drop(reader);
        let (_writer, locked) = lock(&path, Purpose::Write);
        assert!(matches!(locked, Ok(Locked::Yes)));
        drop(refused);
    }

    #[test]
    fn ploop_locks_are_respected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.hds");
        fs::write(&path, "x").unwrap();
        for range in [200..205, 300..305] {
            let other = open::any(&path, false).unwrap();
            assert!(sys::share(other.as_fd(), &range).unwrap());
            for purpose in [Purpose::Read, Purpose::Write] {
                assert_eq!(
                    lock(&path, purpose).1.unwrap_err().kind(),
                    ErrorKind::Locked
                );
            }
        }
    }

    #[test]
    fn a_lock_that_ends_in_time_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.hds");
        fs::write(&path, "x").unwrap();
        let (writer, _) = lock(&path, Purpose::Write);
        let ending = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(writer);
        });
        let file = open::any(&path, true).unwrap();
        let locked = image(&file, &path, Purpose::Write, Instant::now() + 10 * PATIENCE);
        assert!(matches!(locked, Ok(Locked::Yes)));
        ending.join().unwrap();
    }

    #[test]
    fn lines_of_locks_are_understood() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:4711 100 101";
        assert_eq!(locked_inode(line), Some(4711));
        assert_eq!(
            locked_inode("lock:\t1: FLOCK  ADVISORY  WRITE 12 08:01:99 0 EOF"),
            Some(99)
        );
        for other in ["flags:\t0100000", "lock:", "lock: a:b:c", ""] {
            assert_eq!(locked_inode(other), None, "{other}");
        }
    }

    #[test]
    fn users_are_told_without_taking_a_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let users = || Users::default().of(file.as_file()).unwrap();
        assert_eq!(users(), vec![]);
        let (reader, _) = lock(file.path(), Purpose::Read);
        assert_eq!(users()[0].pid, std::process::id());
        drop(reader);
        assert!(matches!(
            lock(file.path(), Purpose::Write).1,
            Ok(Locked::Yes)
        ));
    }

    #[test]
    fn bundle_locks_exclude() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (file.reopen().unwrap(), file.reopen().unwrap());
        assert!(bundle(&first, true, Instant::now()).unwrap());
        assert!(!bundle(&second, false, Instant::now()).unwrap());
        let error = bundle_refusal(&second, file.path());
        assert!(error.to_string().contains("this program itself"), "{error}");
        drop(first);
        assert!(bundle(&second, true, Instant::now()).unwrap());
    }
}
