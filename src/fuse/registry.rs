//! One record for each running daemon, so that other commands find it.
//!
//! Imports: `chain` (names of images), `error`, `sys`.
//! Never: is trusted about a process: a record counts only while a process with its id *and* start
//! time lives. Nothing breaks without records but the comfort of waiting.
//!
//! Root's records are in `/run/ploopfs`, a user's in `$XDG_RUNTIME_DIR/ploopfs`, or in
//! `/tmp/ploopfs-UID` where neither can be had. A daemon writes its record when it is mounted and
//! removes it when the image is closed. If the close fails it leaves the reason in the record, for
//! the `umount` that waits for it.

use crate::chain::bundle::subject;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mount::{MountEntry, mount_table};
use crate::sys::process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Largest record that is read.
const RECORD_MAX: u64 = 1 << 16;

/// Paths that are no UTF-8 go into JSON as their bytes.
mod path_text {
    use super::{Deserialize, OsStrExt, OsString, OsStringExt, Path, PathBuf, Serialize};
    use serde::{Deserializer, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Text {
        Plain(String),
        Bytes(Vec<u8>),
    }

    pub(super) fn serialize<S: Serializer>(path: &Path, out: S) -> Result<S::Ok, S::Error> {
        let text = match path.to_str() {
            Some(text) => Text::Plain(text.to_owned()),
            None => Text::Bytes(path.as_os_str().as_bytes().to_vec()),
        };
        text.serialize(out)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(match Text::deserialize(from)? {
            Text::Plain(text) => PathBuf::from(text),
            Text::Bytes(bytes) => PathBuf::from(OsString::from_vec(bytes)),
        })
    }
}

/// A path in a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RecordedPath(#[serde(with = "path_text")] pub PathBuf);

/// What a daemon tells about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its process id.
    pub pid: i32,
    /// When that process was started, in ticks since boot.
    pub start: u64,
    /// The number of its mount name space (the inode of `/proc/self/ns/mnt`): whoever is in another
    /// one cannot see whether the mount is still there.
    #[serde(default)]
    pub mount_space: Option<u64>,
    /// The image, in full.
    pub image: RecordedPath,
    /// Where it is mounted; nothing for `attach`.
    pub mountpoint: Option<RecordedPath>,
    /// `major:minor` of the mount, which tells it from later ones at the same place.
    pub mount_device: Option<String>,
    /// The loop device that `attach` made.
    pub device: Option<RecordedPath>,
    /// Where `attach -m` mounted a file system of the disk.
    pub file_system: Option<RecordedPath>,
    /// Nobody can write.
    pub read_only: bool,
    /// Seconds since 1970 when it was mounted.
    pub since: u64,
    /// Why the image could not be closed cleanly.
    pub error: Option<String>,
}

impl Record {
    /// A record of this process, mounted now.
    pub fn of_this_process(image: &Path, read_only: bool) -> Result<Self> {
        let pid = i32::try_from(std::process::id())
            .map_err(|e| Error::new(ErrorKind::Host).because(e))?;
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        Ok(Self {
            pid,
            start: process::start_time(pid)?,
            mount_space: mount_space(),
            image: RecordedPath(image.to_owned()),
            mountpoint: None,
            mount_device: None,
            device: None,
            file_system: None,
            read_only,
            since,
            error: None,
        })
    }

    /// True while the very process that wrote the record lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        process::start_time(self.pid).is_ok_and(|start| start == self.start)
    }

    /// True for the mount that this record is about. The number of a device is taken again when it
    /// is free, perhaps by a file system of another type.
    #[must_use]
    pub fn is_about(&self, entry: &MountEntry) -> bool {
        Some(&entry.device) == self.mount_device.as_ref() && entry.fs_type.starts_with("fuse")
    }

    /// True where this process sees the mounts that the daemon saw. Records of earlier releases do
    /// not tell.
    fn is_of_these_mounts(&self) -> bool {
        self.mount_space.is_none() || self.mount_space == mount_space()
    }

    /// True where nobody is left who could see the mounts that the dead daemon saw: no process is
    /// in their name space, as `spaces` tells. Where these are not known, somebody may be.
    fn is_lost(&self, spaces: Option<&HashSet<u64>>) -> bool {
        let known = self.mount_space.zip(spaces);
        known.is_some_and(|(own, spaces)| !spaces.contains(&own))
    }

    /// True if a younger daemon has the mount or the loop device that this one had: then this one's
    /// is gone. An older one that is still closing its image tells of what it had, and whose number
    /// may be this one's since.
    fn is_replaced_by(&self, other: &Self) -> bool {
        if other.start < self.start {
            return false;
        }
        let mount = self.mount_device.is_some() && self.mount_device == other.mount_device;
        mount || (self.device.is_some() && self.device == other.device)
    }

    /// True when `target`, in full, is the image by any of its names: another link to it, the
    /// descriptor instead of its bundle, the bundle instead of its virtual machine.
    #[must_use]
    pub fn is_of(&self, target: &Path) -> bool {
        let identity = |path: &Path| {
            let meta = fs::metadata(subject(path).ok()?).ok()?;
            Some((meta.dev(), meta.ino()))
        };
        // Compared as text first: what an image lies on may be gone, or be covered by its mount.
        self.image.0 == target
            || identity(target).is_some_and(|found| Some(found) == identity(&self.image.0))
    }

    /// True while the mount that this record is about is the visible one at its place.
    #[must_use]
    pub fn is_mounted(&self) -> bool {
        let Some(place) = &self.mountpoint else {
            return false;
        };
        let table = mount_table().unwrap_or_default();
        let visible = table.iter().rev().find(|entry| entry.mountpoint == place.0);
        visible.is_some_and(|entry| self.is_about(entry))
    }

    /// True while the mount exists at all, visible or under another one.
    #[must_use]
    pub fn has_mount(&self) -> bool {
        let table = mount_table().unwrap_or_default();
        table.iter().any(|entry| self.is_about(entry))
    }

    /// True while the loop device that this record is about has the image's file, which lies at the
    /// top of a mount without a place. Many images have the same name, but not there.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        let name = self.device.as_ref().and_then(|device| device.0.file_name());
        let Some(name) = name else { return false };
        let shown = Path::new("/sys/block").join(name).join("loop/backing_file");
        let Ok(backing) = fs::read(shown) else {
            return false;
        };
        is_shown_as(&self.image.0, &backing)
    }

    fn file_in(&self, directory: &Path) -> PathBuf {
        directory.join(format!("{}.json", self.pid))
    }
}

/// The mount name space of this process, where the host tells it.
fn mount_space() -> Option<u64> {
    fs::metadata("/proc/self/ns/mnt")
        .ok()
        .map(|meta| meta.ino())
}

/// The mount name spaces that a process is in; `None` where this user may not ask all processes.
fn mount_spaces() -> Option<HashSet<u64>> {
    let mut spaces = HashSet::new();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        if !name.as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        match fs::metadata(entry.path().join("ns/mnt")) {
            Ok(meta) => drop(spaces.insert(meta.ino())),
            // It has ended.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            Err(_) => return None,
        }
    }
    Some(spaces)
}

/// True where a loop device's file, as the kernel tells it, is an image at the top of a mount. The
/// mount's own names are UTF-8, whatever the image's is; blanks at the end belong to the name.
fn is_shown_as(image: &Path, backing: &[u8]) -> bool {
    let backing = backing.strip_suffix(b"\n").unwrap_or(backing);
    let name = image.file_name().map(OsStr::to_string_lossy);
    name.is_some_and(|name| backing.strip_prefix(b"/") == Some(name.as_bytes()))
}

/// The directory of records of one user.
#[derive(Clone, Debug)]
pub struct Registry {
    directory: PathBuf,
}

impl Registry {
    /// The registry of this user, made where it does not exist yet.
    pub fn open() -> Result<Self> {
        let uid = nix::unistd::geteuid();
        let fallback = PathBuf::from(format!("/tmp/ploopfs-{uid}"));
        let first = if uid.is_root() {
            PathBuf::from("/run/ploopfs")
        } else {
            // mount(8) passes no environment; what it mounts is to be found all the same.
            std::env::var_os("XDG_RUNTIME_DIR")
                .map_or_else(|| format!("/run/user/{uid}").into(), PathBuf::from)
                .join("ploopfs")
        };
        let mut last = None;
        for directory in [first, fallback] {
            match Self::at(directory) {
                Ok(registry) => return Ok(registry),
                Err(e) => last = Some(e),
            }
        }
        Err(last.unwrap_or_else(|| Error::new(ErrorKind::Host)))
    }

    /// The registry in this directory. Another user's directory is refused: in `/tmp` anybody could
    /// have made it.
    pub fn at(directory: PathBuf) -> Result<Self> {
        let made = DirBuilder::new().mode(0o700).create(&directory);
        if let Err(e) = made {
            if e.kind() != io::ErrorKind::AlreadyExists {
                return Err(Error::from(e).in_file(&directory));
            }
        }
        let found = fs::symlink_metadata(&directory)?;
        let own = found.uid() == nix::unistd::geteuid().as_raw();
        if !found.is_dir() || !own || found.mode() & 0o022 != 0 {
            let why = "not a directory that only this user can write to";
            return Err(Error::why(ErrorKind::Host, why).in_file(&directory));
        }
        Ok(Self { directory })
    }

    /// Writes a record, or replaces it.
    pub fn write(&self, record: &Record) -> Result<()> {
        let path = record.file_in(&self.directory);
        let temporary = path.with_extension("new");
        let text = serde_json::to_vec(record).map_err(|e| Error::from(io::Error::from(e)))?;
        let write = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&temporary)?.write_all(&text)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| Error::from(e).in_file(&path))
    }

    /// Takes a record away after its image was closed well. It is emptied first: so whoever
    /// watches it knows that its daemon did this, and not somebody who found the daemon dead.
    pub fn closed(&self, record: &Record) {
        let path = record.file_in(&self.directory);
        let emptied = OpenOptions::new().write(true).truncate(true).open(path);
        if let Err(e) = emptied {
            log::debug!("cannot empty the record of process {}: {e}", record.pid);
        }
        self.remove(record);
    }

    /// Keeps an eye on a record. To be called before the daemon is made to end.
    #[must_use]
    pub fn watch(&self, record: &Record) -> Watched {
        Watched {
            record: record.clone(),
            file: fs::File::open(record.file_in(&self.directory)).ok(),
        }
    }

    /// Removes a record; one that is gone already is fine.
    pub fn remove(&self, record: &Record) {
        if let Err(e) = fs::remove_file(record.file_in(&self.directory)) {
            if e.kind() != io::ErrorKind::NotFound {
                log::debug!("cannot remove the record of process {}: {e}", record.pid);
            }
        }
    }

    fn read(&self, path: &Path) -> Option<Record> {
        let file = fs::File::open(path).ok()?;
        let text = io::read_to_string(io::Read::take(file, RECORD_MAX)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// The record as it is now.
    #[must_use]
    pub fn reread(&self, record: &Record) -> Option<Record> {
        let now = self.read(&record.file_in(&self.directory))?;
        (now.start == record.start).then_some(now)
    }

    /// The records of living daemons, oldest first, of those that left an error, and of those that
    /// died and left a mount or a device behind. The records of others are removed, except where
    /// only another mount name space shows what they left, and somebody may still be in it.
    pub fn all(&self) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory)?.flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let Some(record) = self.read(&path) else {
                log::debug!("cannot read {}", path.display());
                if entry.metadata().is_ok_and(|meta| meta.len() == 0) {
                    // Its daemon closed the image, and was killed right after.
                    let _ = fs::remove_file(&path);
                }
                continue;
            };
            records.push(record);
        }
        let (living, dead): (Vec<_>, Vec<_>) = records.into_iter().partition(Record::is_alive);
        let is_left = |record: &Record| {
            let replaced = living.iter().any(|other| record.is_replaced_by(other));
            record.error.is_some() || (!replaced && (record.is_mounted() || record.is_attached()))
        };
        let (left, gone): (Vec<_>, Vec<_>) = dead.into_iter().partition(is_left);
        let (ours, others): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(Record::is_of_these_mounts);
        ours.iter().for_each(|record| self.remove(record));
        // Looked for only where such a record is, as that takes a look at every process.
        let spaces = (!others.is_empty()).then(mount_spaces).flatten();
        let lost = others
            .iter()
            .filter(|record| record.is_lost(spaces.as_ref()));
        lost.for_each(|record| self.remove(record));
        let mut records = living;
        records.extend(left);
        records.sort_by_key(|record| (record.since, record.pid));
        Ok(records)
    }
}

/// A record that somebody has open, to see how it goes.
///
/// Any program of ours takes the records of dead daemons away, perhaps while another waits for just
/// that daemon: that a record is gone does not say that the image was closed.
#[derive(Debug)]
pub struct Watched {
    record: Record,
    file: Option<fs::File>,
}

impl Watched {
    /// What it said when it was found.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Of a record that is gone: true when its daemon took it away.
    fn is_closed(&self) -> bool {
        // One that was gone before it could be opened was there a moment earlier, with its mount.
        let Some(file) = &self.file else { return true };
        file.metadata().is_ok_and(|meta| meta.len() == 0)
    }
}

/// Waits until a daemon has ended and so closed its image, and gives its error where it left one.
/// `slow` is called once when it takes long.
pub fn wait_closed(
    registry: &Registry,
    watched: &Watched,
    timeout: Option<Duration>,
    slow: impl FnOnce(),
) -> Result<()> {
    let started = Instant::now();
    let record = watched.record();
    let mut slow = Some(slow);
    // The descriptor is taken before the check, so it cannot be another process's.
    if let Ok(pidfd) = process::pidfd_open(record.pid) {
        while record.is_alive() {
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(250_u8)).is_ok_and(|ready| ready > 0) {
                break;
            }
            if timeout.is_some_and(|timeout| started.elapsed() >= timeout) {
                let why = format!("process {} has not closed the image yet", record.pid);
                return Err(Error::why(ErrorKind::TimedOut, why)
                    .fix("end the programs that use the disk; the daemon then closes by itself"));
            }
            if started.elapsed() > Duration::from_secs(2) {
                if let Some(slow) = slow.take() {
                    slow();
                }
            }
        }
    }
    let left = match registry.reread(record) {
        Some(left) => left,
        None if watched.is_closed() => return Ok(()),
        None => record.clone(),
    };
    registry.remove(&left);
    match left.error {
        Some(error) => Err(Error::why(ErrorKind::Io(libc::EIO), error)
            .in_file(&left.image.0)
            .fix("ploopfs mount examines the image and mends what is safe to mend")),
        // Nothing was written, so nothing is left half done.
        None if left.read_only => Ok(()),
        None => Err(Error::why(
            ErrorKind::InUse,
            "the daemon died before it closed the image",
        )
        .in_file(&left.image.0)
        .fix("ploopfs mount examines the image and mends what is safe to mend")),
    }
}

#[cfg(test)]
mod tests;
