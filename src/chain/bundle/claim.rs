//! Who may change a bundle: one program at a time, and nobody while its files are being opened.
//!
//! There are two locks, both of `flock(2)`, taken in this order:
//!
//! 1. The bundle's directory, exclusive for whoever may change the bundle. It is always there, and
//!    to lock it leaves no trace.
//! 2. ploop's lock file, which old versions of it make, lock for whatever they do, and never
//!    remove. Where it is, it is locked together with the directory. Where it is not, none of them
//!    has been here, and it is made by [`Held::claim`], right before the first change: what only
//!    plans, or is refused, leaves the directory as it was.
//!
//! The lock file gets its name when it is locked already, and not in the place of one that has come
//! meanwhile: then ploop has been at work since the bundle was read, and what was read may be old.

use super::with_hint;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::host::Roots;
use crate::storage::lock;
use crate::sys::{directory, open};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What a lock file is named until it is locked.
pub const NEW_LOCK: &str = ".lck.new";

/// What a bundle is locked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Reading, whoever else is at work: people are told.
    Reading,
    /// Reading, and nobody may change anything meanwhile.
    Still,
    /// Perhaps a change.
    Change,
}

impl Use {
    fn is_exclusive(self) -> bool {
        self == Self::Change
    }

    fn insists(self) -> bool {
        self != Self::Reading
    }
}

/// A locked bundle.
#[derive(Debug)]
pub(super) struct Held {
    directory: File,
    /// The descriptor's name.
    name: String,
    /// The directory, for messages.
    path: PathBuf,
    ploop: Mutex<Option<File>>,
}

impl Held {
    /// Locks a bundle. Reading makes do without where that fails.
    pub(super) fn take(
        roots: &Roots,
        descriptor_name: &str,
        purpose: Use,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        match Self::attempt(roots, descriptor_name, purpose) {
            Ok(held) => Ok(Some(held)),
            Err(error) if purpose.insists() => Err(error),
            Err(error) => {
                if error.kind() == ErrorKind::Locked {
                    warnings.push("another program is working on the bundle".to_owned());
                }
                Ok(None)
            }
        }
    }

    fn attempt(roots: &Roots, descriptor_name: &str, purpose: Use) -> Result<Self> {
        let path = roots.path();
        let directory = directory::reopen(roots.home());
        let directory = directory.map_err(|e| with_hint(Error::from(e).in_file(path), true))?;
        let directory = File::from(directory);
        let (alone, deadline) = (purpose.is_exclusive(), Instant::now() + lock::PATIENCE);
        match lock::bundle(&directory, alone, deadline) {
            Ok(true) => {}
            Ok(false) => return Err(lock::bundle_refusal(&directory, path)),
            // ploop's lock file and those of the images are left.
            Err(e) => log::debug!("{} is not locked: {e}", path.display()),
        }
        let held = Self {
            directory,
            name: descriptor_name.to_owned(),
            path: path.to_owned(),
            ploop: Mutex::new(None),
        };
        let lock_name = held.lock_name();
        let lock_path = path.join(&lock_name);
        match open::lock_file(roots.home(), Path::new(&lock_name), alone) {
            Ok(file) => match lock::bundle(&file, alone, deadline) {
                Ok(true) => *held.ploop.lock() = Some(file),
                Ok(false) => return Err(lock::bundle_refusal(&file, &lock_path)),
                Err(e) if alone => return Err(e.in_file(&lock_path)),
                Err(_) => {}
            },
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) if alone => return Err(no_lock_file(e, &lock_path)),
            // It is for its owner only; the images' own locks are left.
            Err(_) => {}
        }
        Ok(held)
    }

    fn lock_name(&self) -> String {
        format!("{}.lck", self.name)
    }

    /// Makes sure of ploop's lock before the first change.
    pub(super) fn claim(&self) -> Result<()> {
        let mut ploop = self.ploop.lock();
        if ploop.is_some() {
            return Ok(());
        }
        let (name, new) = (self.lock_name(), format!("{}{NEW_LOCK}", self.name));
        let path = self.path.join(&name);
        let (at, new) = (self.directory.as_fd(), Path::new(&new));
        let file = match directory::create_new(at, new) {
            // Left by one who was killed: whoever else makes it has the directory locked.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                directory::remove(at, new).and_then(|()| directory::create_new(at, new))
            }
            other => other,
        };
        let file = file.map_err(|e| no_lock_file(e, &path))?;
        let named = match lock::bundle(&file, true, Instant::now()) {
            Ok(true) => directory::rename_new(at, new, Path::new(&name)).map_err(|e| match e {
                e if e.kind() == io::ErrorKind::AlreadyExists => meanwhile(&path),
                e => no_lock_file(e, &path),
            }),
            Ok(false) => Err(lock::bundle_refusal(&file, &path)),
            Err(e) => Err(e.in_file(&path)),
        };
        if let Err(error) = named {
            let left = directory::remove(at, new);
            log::debug!("the lock file without its name is removed: {left:?}");
            return Err(error);
        }
        *ploop = Some(file);
        Ok(())
    }
}

fn meanwhile(path: &Path) -> Error {
    let why = "another program has begun to work on the bundle meanwhile";
    Error::why(ErrorKind::Locked, why)
        .in_file(path)
        .fix("nothing was changed: repeat the command when that program has ended")
}

fn no_lock_file(error: io::Error, path: &Path) -> Error {
    let kind = match error.raw_os_error() {
        // A link, or what `lock_file` has found to be no plain file.
        Some(libc::ELOOP | libc::ENXIO | libc::ENODEV | libc::EISDIR) | None => {
            let why = "ploop's lock file is not a plain file, so it was not made by ploop";
            let error = Error::why(ErrorKind::OutsideBundle, why).in_file(path);
            return error.fix("see what it is, and remove it");
        }
        Some(errno) => ErrorKind::Io(errno),
    };
    let why = "cannot take ploop's lock on the bundle";
    with_hint(Error::why(kind, why).because(error).in_file(path), true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const NAME: &str = "d.xml";

    fn take(dir: &Path, purpose: Use) -> Result<Option<Held>> {
        let roots = Roots::open(dir, &[])?;
        Held::take(&roots, NAME, purpose, &mut Vec::new())
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_made_before_the_first_change() {
        let dir = tempfile::tempdir().unwrap();
        let held = take(dir.path(), Use::Change).unwrap().unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
        for purpose in [Use::Change, Use::Still] {
            let error = take(dir.path(), purpose).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Locked);
        }
        let mut told = Vec::new();
        let roots = Roots::open(dir.path(), &[]).unwrap();
        let reader = Held::take(&roots, NAME, Use::Reading, &mut told).unwrap();
        assert!(reader.is_none() && told.len() == 1, "{told:?}");
        // One who was killed has left his.
        fs::write(dir.path().join("d.xml.lck.new"), "").unwrap();
        held.claim().unwrap();
        held.claim().unwrap();
        assert_eq!(names(dir.path()), ["d.xml.lck"]);
        let ploop = File::open(dir.path().join("d.xml.lck")).unwrap();
        assert!(!lock::bundle(&ploop, false, Instant::now()).unwrap());
        drop(held);
        assert!(lock::bundle(&ploop, true, Instant::now()).unwrap());
        assert!(take(dir.path(), Use::Change).is_err(), "ploop has it");
    }

    #[test]
    fn ploop_that_came_meanwhile_is_not_overlooked() {
        let dir = tempfile::tempdir().unwrap();
        let held = take(dir.path(), Use::Change).unwrap().unwrap();
        // It has done something, and ended already.
        fs::write(dir.path().join("d.xml.lck"), "").unwrap();
        let error = held.claim().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("meanwhile"), "{error}");
        assert_eq!(names(dir.path()), ["d.xml.lck"]);
        drop(held);
        let held = take(dir.path(), Use::Change).unwrap().unwrap();
        held.claim().unwrap();
    }

    #[test]
    fn readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path(), Use::Still).unwrap();
        assert!(first.is_some() && take(dir.path(), Use::Reading).unwrap().is_some());
        let error = take(dir.path(), Use::Change).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert_eq!(names(dir.path()), [""; 0]);
    }
}
