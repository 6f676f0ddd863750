//! Puts a loop device over a disk that is mounted nowhere.
//!
//! Imports: `error`, `sys`.
//! Never: holds the loop device open, or the mount once the device is set up: the device's hold on
//! its file is all that keeps the session alive, so the daemon ends by itself after `losetup -d`.
//!
//! The file system is mounted without a place in the tree, so no other program sees it. The file
//! in it bears the image's name, which is what `losetup -l` shows. Partitions are announced by
//! BLKPG, as not every kernel can read a GPT itself.

use super::partitions::Partition;
use super::volumes::{self, Class};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::loopdev::{self, Setup, Status};
use crate::sys::mount::mount_table;
use crate::sys::process::{self, find_program};
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Others may be faster at taking a free device; so often is enough.
const TRIES: u32 = 64;

/// Longer than the kernel believes the attributes that a daemon of ours told it.
const BELIEVED: Duration = Duration::from_secs(3);

/// What the queue of a loop device should be like, in KiB: see [`Attached::tune`].
pub const TUNED: [(&str, u32); 2] = [("read_ahead_kb", 1024), ("max_sectors_kb", 1024)];

/// Longer than a program takes that only looks at what lies on a device.
const LOOKED_AT: Duration = Duration::from_secs(1);

/// A range of the disk that is a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// The number that Linux gives it.
    pub number: u32,
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl From<&Partition> for Slice {
    fn from(partition: &Partition) -> Self {
        let Partition {
            number, start, len, ..
        } = *partition;
        Self { number, start, len }
    }
}

/// A loop device of ours. What is done with it may wait for whoever serves the file below, so a
/// daemon leaves that to a process beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attached {
    number: u32,
    /// Unknown where the daemon behind the file has died: looking at the file fails then.
    status: Option<Status>,
}

/// Where to mount a file system of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSystemTarget {
    /// The directory, in full.
    pub directory: PathBuf,
    /// The partition, where the user named one.
    pub partition: Option<u32>,
}

fn host(what: &str, e: io::Error) -> Error {
    let errno = e.raw_os_error();
    let error = Error::why(ErrorKind::Host, what).because(e);
    match errno {
        Some(libc::EACCES | libc::EPERM) => error.fix(
            "attach needs root; as a desktop user: ploopfs mount, then udisksctl loop-setup -f",
        ),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            error.fix("modprobe loop; in a container, give it /dev/loop-control and /dev/loop0 ...")
        }
        _ => error,
    }
}

/// Sets a free loop device up over a file of the mount. `tried` hears of each before it is, so that
/// it can be taken away by somebody else, should this process be killed meanwhile.
pub fn attach(
    mount: &OwnedFd,
    name: &Path,
    read_only: bool,
    mut tried: impl FnMut(Attached) -> Result<()>,
) -> Result<Attached> {
    let access = if read_only {
        OFlag::O_RDONLY
    } else {
        OFlag::O_RDWR
    };
    let file = nix::fcntl::openat(mount, name, access | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| Error::from(io::Error::from(errno)).in_file(name))?;
    let file = File::from(file);
    let meta = file.metadata().map_err(|e| Error::from(e).in_file(name))?;
    let expected = Status {
        device: meta.dev(),
        inode: meta.ino(),
        autoclear: false,
        direct_io: true,
    };
    let shown = name.to_string_lossy();
    let setup = Setup {
        read_only,
        block_size: 0,
        name: &shown,
    };
    for attempt in 0..TRIES {
        let number = loopdev::get_free().map_err(|e| host("no free loop device", e))?;
        let path = loopdev::path(number);
        let device = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(device) => device,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => continue,
            Err(e) => return Err(host("cannot open the loop device", e).in_file(&path)),
        };
        tried(Attached {
            number,
            status: Some(expected),
        })?;
        match loopdev::configure(&device, file.as_fd(), &setup) {
            Ok(()) => match loopdev::status(device.as_fd()) {
                Ok(status) => {
                    let status = Some(status);
                    return Ok(Attached { number, status });
                }
                Err(e) => {
                    // The caller gets no device that it could take away.
                    if let Err(e) = loopdev::clear(device.as_fd()) {
                        log::warn!("cannot detach {}: {e}", path.display());
                    }
                    return Err(host("cannot look at the loop device", e).in_file(&path));
                }
            },
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(Duration::from_millis(5 * u64::from(attempt.min(20))));
            }
            Err(e) => return Err(host("cannot set the loop device up", e).in_file(&path)),
        }
    }
    Err(Error::why(
        ErrorKind::Host,
        "other programs took every free loop device",
    )
    .fix("losetup -l shows them; detach one with losetup -d"))
}

impl Attached {
    /// A device that this or another process set up; `None` where it is none, or has no file.
    #[must_use]
    pub fn find(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let number = name.strip_prefix("loop")?.parse().ok()?;
        let device = File::open(loopdev::path(number)).ok()?;
        let status = match loopdev::status(device.as_fd()) {
            Ok(status) => Some(status),
            Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => None,
            Err(_) => return None,
        };
        Some(Self { number, status })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        loopdev::path(self.number)
    }

    /// The path of one of its partitions.
    #[must_use]
    pub fn partition(&self, number: u32) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}p{number}", self.number))
    }

    fn sysfs(&self, rest: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/loop{}/{rest}", self.number))
    }

    /// Requests of up to a cluster, and a read-ahead that streams need: without it sequential
    /// reads through a file system are a third as fast. A device that cannot be set so is slow, and
    /// no worse.
    pub fn tune(&self) {
        let device = self.path();
        let device = device.display();
        for (file, value) in TUNED {
            if let Err(e) = fs::write(self.sysfs("queue").join(file), value.to_string()) {
                log::warn!("{device} is slower than it could be: cannot set {file}: {e}");
            }
        }
        if self.status.is_some_and(|status| !status.direct_io) {
            log::warn!("{device} is slower than it could be: the kernel refuses direct I/O");
        }
    }

    /// Announces the partitions that the kernel has not found by itself.
    pub fn add_partitions(&self, slices: &[Slice]) -> Result<()> {
        if slices.is_empty() {
            return Ok(());
        }
        let device = File::open(self.path())?;
        for partition in slices {
            let number = partition.number;
            if self
                .sysfs(&format!("loop{}p{number}", self.number))
                .exists()
            {
                continue;
            }
            let added = loopdev::add_partition(&device, number, partition.start, partition.len);
            match added {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => log::warn!("partition {number} cannot be made known: {e}"),
            }
        }
        Ok(())
    }

    fn partition_numbers(&self) -> Vec<u32> {
        let prefix = format!("loop{}p", self.number);
        let Ok(entries) = fs::read_dir(self.sysfs("")) else {
            return Vec::new();
        };
        let number = |entry: fs::DirEntry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix(&prefix)?
                .parse::<u32>()
                .ok()
        };
        let mut numbers: Vec<u32> = entries.flatten().filter_map(number).collect();
        numbers.sort_unstable();
        numbers
    }

    /// True once nobody serves the file below. Until the kernel stops to believe what it was told
    /// of the file, that cannot be seen, so this may take a moment.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        let deadline = Instant::now() + BELIEVED;
        loop {
            let status = File::open(self.path()).and_then(|device| loopdev::status(device.as_fd()));
            match status {
                Ok(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                status => {
                    let errno = status.err().and_then(|e| e.raw_os_error());
                    return errno == Some(libc::ENOTCONN);
                }
            }
        }
    }

    /// Tells what is the device or a partition of it.
    pub(super) fn sources(&self) -> impl Fn(&Path) -> bool + use<> {
        let device = self.path();
        let prefix = format!("{}p", device.display());
        move |source| {
            source == device
                || source
                    .to_str()
                    .is_some_and(|text| text.starts_with(&prefix))
        }
    }

    /// Where file systems of the device or its partitions are mounted.
    pub fn mounts(&self) -> Result<Vec<PathBuf>> {
        let of_this = self.sources();
        let table = mount_table()?;
        let ours = table
            .into_iter()
            .filter(|entry| of_this(Path::new(&entry.source)));
        Ok(ours.map(|entry| entry.mountpoint).collect())
    }

    /// True while the device has the file that it had when this value was made.
    fn is_same(&self, device: &File) -> bool {
        let file = |status: Status| (status.device, status.inode);
        match loopdev::status(device.as_fd()) {
            Ok(status) => self.status.map(file) == Some(file(status)),
            Err(e) => e.raw_os_error() == Some(libc::ENOTCONN),
        }
    }

    /// Takes the file away. With `lazy`, a device that is in use goes with its last user; else that
    /// is refused and nothing changes.
    pub fn clear(&self, lazy: bool) -> Result<()> {
        let path = self.path();
        let exclusive = self.open_exclusive(!lazy);
        let (device, idle) = match exclusive {
            Ok(device) => (device, true),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && lazy => (File::open(&path)?, false),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(self.busy()),
            Err(e) => return Err(Error::from(e).in_file(&path)),
        };
        if !self.is_same(&device) {
            return Ok(());
        }
        if idle {
            for number in self.partition_numbers() {
                if let Err(e) = loopdev::delete_partition(&device, number) {
                    log::debug!("partition {number} stays: {e}");
                }
            }
        }
        loopdev::clear(device.as_fd()).map_err(|e| Error::from(e).in_file(&path))
    }

    /// Opens the device for nobody else. Others do so for a moment to look at it, and are waited
    /// for with `patient`, if it is not mounted.
    fn open_exclusive(&self, patient: bool) -> io::Result<File> {
        let path = self.path();
        let begun = Instant::now();
        loop {
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_EXCL)
                .open(&path);
            let is_busy = |e: &io::Error| e.raw_os_error() == Some(libc::EBUSY);
            let may_pass = patient
                && opened.as_ref().is_err_and(is_busy)
                && begun.elapsed() < LOOKED_AT
                && self.mounts().is_ok_and(|mounts| mounts.is_empty());
            if !may_pass {
                return opened;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn busy(&self) -> Error {
        let path = self.path();
        let error = |why: String| Error::why(ErrorKind::Io(libc::EBUSY), why).in_file(&path);
        match self.mounts().unwrap_or_default().first() {
            Some(place) => error(format!("it is mounted at {}", place.display()))
                .fix(format!("umount {}", super::mount::shell_word(place))),
            None => error("another program or device uses it".into())
                .fix("lsblk shows what lies on top of it (LVM, RAID, swap)"),
        }
    }

    /// Mounts a file system of the disk: the one on the partition named, or the only one there is.
    pub fn mount_file_system(&self, target: &FileSystemTarget, read_only: bool) -> Result<()> {
        let device = self.choose(target.partition)?;
        match find_program("mount") {
            Some(program) => run_mount(&program, &device, &target.directory, read_only),
            None => mount_by_trying(&device, &target.directory, read_only),
        }
    }

    fn choose(&self, partition: Option<u32>) -> Result<PathBuf> {
        let numbers = self.partition_numbers();
        if let Some(number) = partition {
            if numbers.contains(&number) {
                return Ok(self.partition(number));
            }
            let have = numbers
                .iter()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(", ");
            let have = if have.is_empty() {
                "none".to_owned()
            } else {
                have
            };
            let why = format!("the disk has no partition {number} (it has: {have})");
            return Err(Error::why(ErrorKind::Usage, why));
        }
        if file_system_on(&self.path()).is_some() {
            return Ok(self.path());
        }
        let with_one: Vec<(u32, &str)> = numbers
            .iter()
            .filter_map(|number| Some((*number, file_system_on(&self.partition(*number))?)))
            .collect();
        match with_one.as_slice() {
            [(number, _)] => Ok(self.partition(*number)),
            [] => Err(Error::why(
                ErrorKind::Unsupported,
                "no file system was recognised on it",
            )
            .fix("leave -m out and look at the device with: blkid, lsblk -f")),
            many => {
                let list = many
                    .iter()
                    .map(|(number, kind)| format!("{number} ({kind})"));
                let list = list.collect::<Vec<_>>().join(", ");
                let why = format!("several partitions have a file system: {list}");
                Err(Error::why(ErrorKind::Usage, why).fix("choose one with -p N"))
            }
        }
    }
}

fn run_mount(program: &Path, device: &Path, directory: &Path, read_only: bool) -> Result<()> {
    let mut command = Command::new(program);
    if read_only {
        command.arg("-r");
    }
    let output = process::with_plain_signals(&mut command)
        .arg("--")
        .args([device, directory])
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .map_err(|e| Error::from(e).in_file(program))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("mount:").trim();
    Err(Error::why(ErrorKind::Host, format!("mount failed: {said}")).in_file(device))
}

/// Without a mount program: every type that the kernel knows for block devices.
fn mount_by_trying(device: &Path, directory: &Path, read_only: bool) -> Result<()> {
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_RDONLY, read_only);
    let types = fs::read_to_string("/proc/filesystems")?;
    for kind in types
        .lines()
        .filter(|line| !line.starts_with("nodev"))
        .map(str::trim)
    {
        let none: Option<&str> = None;
        if nix::mount::mount(Some(device), directory, Some(kind), flags, none).is_ok() {
            return Ok(());
        }
    }
    Err(Error::why(
        ErrorKind::Unsupported,
        "the kernel knows no file system like it",
    )
    .in_file(device))
}

fn file_system_on(device: &Path) -> Option<&'static str> {
    let device = File::open(device).ok()?;
    let found = volumes::recognise(|at, buf| device.read_exact_at(buf, at));
    found.and_then(|(name, class)| (class == Class::FileSystem).then_some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_known_by_their_signatures() {
        let directory = tempfile::tempdir().unwrap();
        for (at, bytes, name, class) in volumes::SIGNATURES {
            let path = directory.path().join("x");
            let file = File::create(&path).unwrap();
            file.set_len(1 << 20).unwrap();
            assert_eq!(file_system_on(&path), None);
            file.write_all_at(bytes, at).unwrap();
            let expected = (class == Class::FileSystem).then_some(name);
            assert_eq!(file_system_on(&path), expected);
        }
        assert_eq!(file_system_on(Path::new("/nonexistent")), None);
    }

    #[test]
    fn only_loop_devices_with_a_file_are_found() {
        assert!(Attached::find(Path::new("/dev/null")).is_none());
        assert!(Attached::find(Path::new("/dev/loop99999")).is_none());
        assert!(Attached::find(Path::new("/")).is_none());
    }
}
