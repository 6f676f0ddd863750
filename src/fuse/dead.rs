//! What daemons of ours that have died left behind, told from all else, and cleared away.
//!
//! Imports: `error`, `sys`.
//! Never: unmounts what lives, what is not of this program, or what another user mounted.
//!
//! A path names whatever is mounted there at the moment. So the mount is first held by a descriptor
//! that asks nothing of the daemon (`O_PATH`): while it is open, the mount's number in the host's
//! table is no other's. Whether it is dead is asked, and the unmount is made, through this
//! descriptor. A connection that is dead never comes to life again.

use super::attach::Attached;
use super::holders;
use super::mount::{absolute, is_ours, shell_word, unmount_any};
use super::registry::{Record, Registry};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mount::{MountEntry, mount_id, mount_table};
use nix::errno::Errno;
use nix::mount::MntFlags;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Dead mounts over each other at one place; each try to mount leaves one at most.
const STACKED_MAX: usize = 64;

/// A mount that cannot be exchanged for another one while this value lives.
#[derive(Debug)]
struct Held {
    file: File,
    entry: MountEntry,
}

impl Held {
    /// The mount that is visible at this place, given in full. `None` where nothing is mounted.
    fn at(place: &Path) -> io::Result<Option<Self>> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(flags).open(place)?;
        let id = mount_id(file.as_fd())?;
        let mut table = mount_table()?.into_iter();
        let entry = table.find(|entry| entry.id == id && entry.mountpoint == place);
        Ok(entry.map(|entry| Self { file, entry }))
    }

    /// True when nobody serves the mount any more, and nobody ever will. Asks the daemon: one that
    /// hangs lets this hang.
    fn is_dead(&self) -> bool {
        // Attributes may be answered from what the kernel remembers; this never is.
        let ask = || nix::sys::statfs::fstatfs(&self.file).err();
        match ask() {
            Some(Errno::ECONNABORTED) => ask() == Some(Errno::ENOTCONN),
            answer => answer == Some(Errno::ENOTCONN),
        }
    }

    /// Takes the mount out of sight. Refused while another one lies over it or in it.
    fn unmount(&self) -> Result<()> {
        let within = |entry: &MountEntry| entry.parent == self.entry.id;
        if let Some(inner) = mount_table()?.into_iter().find(within) {
            let kind = inner.fs_type;
            let why = format!("a file system of type {kind} is mounted over it, or in it");
            let word = shell_word(&self.entry.mountpoint);
            return Err(self.bad(why).fix(format!(
                "see what it is with: findmnt -R {word}\n\
                 both go out of sight with: umount -l {word}"
            )));
        }
        let done = if nix::unistd::geteuid().is_root() {
            // By the descriptor, as the path may lead elsewhere by now.
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            nix::mount::umount2(path.as_str(), MntFlags::MNT_DETACH).map_err(io::Error::from)
        } else {
            unmount_any(&self.entry.mountpoint, true)
        };
        done.map_err(|e| self.bad("it cannot be unmounted".into()).because(e))
    }

    fn bad(&self, why: String) -> Error {
        Error::why(ErrorKind::Mountpoint, why).in_file(&self.entry.mountpoint)
    }

    /// True if a living daemon may serve the mount; it is not asked, as it may hang.
    fn may_live(&self, record: &Record) -> bool {
        let here = record.mountpoint.as_ref().map(|path| &path.0) == Some(&self.entry.mountpoint);
        here && record.is_about(&self.entry) && record.is_alive()
    }

    /// True if the record was about this mount, whatever type it was told to show. Records that
    /// hold an error stay, and the numbers of devices are taken again: the image must fit, too.
    fn is_recorded_as(&self, record: &Record) -> bool {
        let here = record.mountpoint.as_ref().map(|path| &path.0) == Some(&self.entry.mountpoint);
        here && record.is_about(&self.entry) && record.is_of(Path::new(&self.entry.source))
    }

    /// Nothing that somebody else mounted is ours to unmount.
    fn expect_own(&self, records: &[Record]) -> Result<()> {
        let entry = &self.entry;
        let word = shell_word(&entry.mountpoint);
        let recorded = records.iter().any(|record| self.is_recorded_as(record));
        if !is_ours(entry) && !recorded {
            let kind = &entry.fs_type;
            let why = format!("something else ({kind}) is mounted there whose daemon has died");
            return Err(self.bad(why).fix(format!("umount -l {word}")));
        }
        if entry.owner == Some(nix::unistd::getuid().as_raw()) {
            return Ok(());
        }
        let why = "another user's image is mounted there, whose daemon has died";
        Err(self
            .bad(why.into())
            .fix(format!("as that user: ploopfs umount {word}")))
    }
}

/// The records of this user's daemons; without a registry there are none.
fn records() -> Vec<Record> {
    let registry = Registry::open();
    registry
        .and_then(|registry| registry.all())
        .unwrap_or_default()
}

/// Sees to it that no dead mount is at the place: one of ours is unmounted if `replace` says so,
/// all others are refused. Gives the loop devices that still have a file of what was unmounted.
///
/// A mount that is alive is left to those who look at the place next.
pub fn make_way(mountpoint: &Path, replace: bool) -> Result<Vec<PathBuf>> {
    let mut orphans = Vec::new();
    for _ in 0..STACKED_MAX {
        let Ok(place) = absolute(mountpoint) else {
            break;
        };
        let Ok(Some(held)) = Held::at(&place) else {
            break;
        };
        let records = records();
        let may_live = records.iter().any(|record| held.may_live(record));
        let may_be_dead = held.entry.fs_type.starts_with("fuse") && !may_live;
        if !may_be_dead || !held.is_dead() {
            break;
        }
        held.expect_own(&records)?;
        if !replace {
            let word = shell_word(mountpoint);
            let why = "an image is mounted there whose daemon has died";
            return Err(held.bad(why.into()).fix(format!(
                "add --replace-dead, or first: ploopfs umount {word}"
            )));
        }
        orphans.extend(holders::loops(&place));
        held.unmount()?;
        log::info!("{}: the mount of a dead daemon is gone", place.display());
    }
    Ok(orphans)
}

/// A loop device of a daemon that has died.
#[derive(Debug)]
pub struct DeadLoop {
    device: Attached,
    record: Record,
}

impl DeadLoop {
    /// Its path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.device.path()
    }

    /// Those of this image, and those whose file system is mounted at `directory`.
    #[must_use]
    pub fn all(image: &Path, directory: Option<&Path>) -> Vec<Self> {
        let here = |record: &Record| {
            let place = record.file_system.as_ref().map(|path| path.0.as_path());
            directory.is_some() && place == directory
        };
        let left = |record: Record| {
            if record.is_alive() || !record.is_attached() {
                return None;
            }
            if !here(&record) && !record.is_of(image) {
                return None;
            }
            let device = Attached::find(&record.device.as_ref()?.0)?;
            device.is_dead().then_some(Self { device, record })
        };
        records().into_iter().filter_map(left).collect()
    }

    /// What `attach -m` mounted from it, where that is still visible.
    fn file_system(&self) -> Option<Held> {
        let place = &self.record.file_system.as_ref()?.0;
        let held = Held::at(place).ok()??;
        let mounts = self.device.sources();
        mounts(Path::new(&held.entry.source)).then_some(held)
    }

    /// True when its file system is what one sees at this place.
    #[must_use]
    pub fn covers(&self, directory: &Path) -> bool {
        let held = self.file_system();
        held.is_some_and(|held| held.entry.mountpoint == directory)
    }

    /// Unmounts what `attach -m` mounted, and takes the device away: now, or with its last user.
    pub fn clear(&self) -> Result<()> {
        if let Some(held) = self.file_system() {
            held.unmount()?;
        }
        self.device.clear(true)
    }
}
