//! A real directory of the host.
//!
//! The directory is opened once; all names are looked up in it and nowhere else, so that renaming
//! the directory itself, or one above it, leads nothing astray.

use super::file::FileStorage;
use super::{Directory, Hold, SharedStorage, Storage, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{directory as sys, open};
use crate::units::FileOffset;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// A real directory of the host.
#[derive(Debug)]
pub struct HostDirectory {
    fd: OwnedFd,
    /// As it is shown to people.
    path: PathBuf,
}

impl HostDirectory {
    /// Opens a directory that the user named.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = sys::open(path).map_err(|e| Error::from(e).in_file(path))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// Opens the directory behind a handle; `path` is what people call it.
    pub fn behind(handle: BorrowedFd<'_>, path: &Path) -> Result<Self> {
        let fd = sys::reopen(handle).map_err(|e| Error::from(e).in_file(path))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// The directory's name, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn failed(&self, name: &str, error: io::Error) -> Error {
        let path = self.path.join(name);
        match error.raw_os_error() {
            Some(libc::ENOENT) => Error::new(ErrorKind::Missing).because(error).in_file(&path),
            Some(libc::ELOOP | libc::ENXIO | libc::EISDIR | libc::ENODEV) => not_plain(&path),
            _ => Error::from(error).in_file(&path),
        }
    }

    fn storage(&self, name: &str, file: File) -> Result<SharedStorage> {
        let path = self.path.join(name);
        let meta = file.metadata().map_err(|e| self.failed(name, e))?;
        if !meta.is_file() {
            return Err(not_plain(&path));
        }
        Ok(Arc::new(
            FileStorage::new(file).map_err(|e| e.in_file(&path))?,
        ))
    }
}

/// Gives a new file the owner, the group and the mode of the one whose place it takes. Where either
/// is none of the host's there is nothing to give.
pub fn take_after(new: &dyn Storage, old: &dyn Storage) -> Result<()> {
    let (Some(new), Some(old)) = (new.as_host_fd(), old.as_host_fd()) else {
        return Ok(());
    };
    sys::take_after(new, old).map_err(|e| {
        let kind = Error::from(e);
        kind.fix("the owner of a file is kept: do this as its owner, or as root")
    })
}

/// Reads a whole file that must not have more than `max` bytes.
pub fn read_small(storage: &dyn Storage, max: u64) -> Result<Vec<u8>> {
    let len = storage.len()?.get();
    // One byte more than allowed is enough for whoever judges it.
    let mut bytes = vec![0; usize::try_from(len.min(max.saturating_add(1))).unwrap_or(0)];
    storage.read_at(FileOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

fn not_plain(path: &Path) -> Error {
    Error::why(ErrorKind::OutsideBundle, "not a plain file").in_file(path)
}

/// A name that stays in the directory.
fn single<'a>(path: &Path, name: &'a str) -> Result<&'a Path> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only == name && !name.contains('\0') => {
            Ok(Path::new(name))
        }
        _ => {
            let why = format!("{name:?} is no name of a file in a directory");
            Err(Error::why(ErrorKind::OutsideBundle, why).in_file(path))
        }
    }
}

impl Directory for HostDirectory {
    fn open(&self, name: &str, write: bool) -> Result<SharedStorage> {
        let file = open::beneath(self.fd.as_fd(), single(&self.path, name)?, write)
            .map_err(|e| self.failed(name, e))?;
        self.storage(name, file)
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        let file = sys::create_new(self.fd.as_fd(), single(&self.path, name)?)
            .map_err(|e| self.failed(name, e))?;
        self.storage(name, file)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (old, new) = (single(&self.path, from)?, single(&self.path, to)?);
        sys::rename(self.fd.as_fd(), old, new).map_err(|e| self.failed(from, e))
    }

    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        let (old, new) = (single(&self.path, from)?, single(&self.path, to)?);
        sys::rename_new(self.fd.as_fd(), old, new).map_err(|e| self.failed(to, e))
    }

    fn remove(&self, name: &str) -> Result<()> {
        sys::remove(self.fd.as_fd(), single(&self.path, name)?).map_err(|e| self.failed(name, e))
    }

    fn create_directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        let fd = sys::create_directory(self.fd.as_fd(), single(&self.path, name)?)
            .map_err(|e| self.failed(name, e))?;
        let path = self.path.join(name);
        Ok(Arc::new(Self { fd, path }))
    }

    fn open_directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        let fd = sys::open_in(self.fd.as_fd(), single(&self.path, name)?)
            .map_err(|e| self.failed(name, e))?;
        let path = self.path.join(name);
        Ok(Arc::new(Self { fd, path }))
    }

    fn hold(&self, name: &str, deadline: Instant) -> Result<Option<Hold>> {
        let (dir, place) = (self.fd.as_fd(), single(&self.path, name)?);
        let opened = match sys::open_in(dir, place) {
            Ok(directory) => Ok(File::from(directory)),
            Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => open::lock_file(dir, place, false),
            Err(e) => Err(e),
        };
        let file = match opened {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            other => other.map_err(|e| self.failed(name, e))?,
        };
        if !lock::bundle(&file, true, deadline)? {
            return Ok(None);
        }
        // Whoever had it may have renamed or removed it before he let it go.
        let is_it = sys::is_named(dir, place, file.as_fd()).map_err(|e| self.failed(name, e))?;
        Ok(is_it.then_some(Hold {
            _locked: Some(file),
        }))
    }

    fn remove_directory(&self, name: &str) -> Result<()> {
        sys::remove_directory(self.fd.as_fd(), single(&self.path, name)?)
            .map_err(|e| self.failed(name, e))
    }

    fn entries(&self) -> Result<Vec<String>> {
        let found = sys::entries(self.fd.as_fd()).map_err(|e| self.failed("", e))?;
        // A name that is not UTF-8 is listed as well as it can be; no descriptor can name it.
        let mut names: Vec<String> = found
            .iter()
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn available(&self) -> Result<Option<u64>> {
        let room = sys::available(self.fd.as_fd()).map_err(|e| self.failed("", e))?;
        Ok(Some(room))
    }

    fn sync(&self) -> Result<()> {
        sys::sync(self.fd.as_fd()).map_err(|e| self.failed("", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_renamed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let host = HostDirectory::open(dir.path()).unwrap();
        let file = host.create_new("a").unwrap();
        file.write_at(FileOffset::ZERO, b"old").unwrap();
        let again = host.create_new("a").unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Io(libc::EEXIST));
        host.create_new("c").unwrap();
        assert_eq!(host.entries().unwrap(), ["a", "c"]);
        host.rename("a", "c").unwrap();
        host.sync().unwrap();
        assert_eq!(host.entries().unwrap(), ["c"]);
        let found = host.open("c", false).unwrap();
        assert_eq!(found.len().unwrap().get(), 3);
        host.remove("c").unwrap();
        assert_eq!(host.entries().unwrap(), [""; 0]);
        for missing in [host.open("c", true).map(|_| ()), host.remove("c")] {
            assert_eq!(missing.unwrap_err().kind(), ErrorKind::Missing);
        }
    }

    #[test]
    fn directories_are_made_filled_and_take_no_name_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let host = HostDirectory::open(dir.path()).unwrap();
        let inner = host.create_directory("a").unwrap();
        inner.create_new("x").unwrap();
        host.create_new("file").unwrap();
        let exists = ErrorKind::Io(libc::EEXIST);
        assert_eq!(host.create_directory("a").unwrap_err().kind(), exists);
        for (from, to) in [("a", "file"), ("file", "a")] {
            assert_eq!(host.rename_new(from, to).unwrap_err().kind(), exists);
        }
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        assert_eq!(host.rename_new("a", "link").unwrap_err().kind(), exists);
        host.rename_new("a", "b").unwrap();
        assert_eq!(inner.entries().unwrap(), ["x"]);
        assert!(host.remove_directory("b").is_err(), "it is not empty");
        inner.remove("x").unwrap();
        host.remove_directory("b").unwrap();
        assert!(host.remove_directory("file").is_err());
        assert_eq!(host.entries().unwrap(), ["file", "link"]);
    }

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/file"), "x").unwrap();
        std::os::unix::fs::symlink("sub/file", dir.path().join("link")).unwrap();
        let host = HostDirectory::open(dir.path()).unwrap();
        for name in [
            "",
            ".",
            "..",
            "sub/file",
            "/etc/passwd",
            "file/",
            "./file",
            "a\0",
        ] {
            for result in [
                host.open(name, false).map(|_| ()),
                host.create_new(name).map(|_| ()),
                host.rename(name, "x"),
                host.rename("link", name),
                host.rename_new("link", name),
                host.remove(name),
                host.create_directory(name).map(|_| ()),
                host.remove_directory(name),
            ] {
                assert_eq!(
                    result.unwrap_err().kind(),
                    ErrorKind::OutsideBundle,
                    "{name:?}"
                );
            }
        }
        for name in ["link", "sub"] {
            let refused = host.open(name, false).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::OutsideBundle, "{name}");
        }
        assert!(host.create_new("link").is_err());
        assert!(host.remove("sub").is_err());
    }

    #[test]
    fn what_is_held_has_one_holder_and_still_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let host = HostDirectory::open(dir.path()).unwrap();
        host.create_directory("d").unwrap();
        host.create_new("f").unwrap();
        for name in ["d", "f"] {
            let held = host.hold(name, Instant::now()).unwrap();
            assert!(held.is_some());
            assert!(host.hold(name, Instant::now()).unwrap().is_none());
            drop(held);
            assert!(host.hold(name, Instant::now()).unwrap().is_some());
        }
        assert!(host.hold("none", Instant::now()).unwrap().is_none());
        std::os::unix::fs::symlink("f", dir.path().join("link")).unwrap();
        assert!(host.hold("link", Instant::now()).is_err());
        // It is renamed while somebody waits for it.
        let held = host.hold("f", Instant::now()).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| host.hold("f", Instant::now() + 30 * lock::PATIENCE));
            std::thread::sleep(lock::PATIENCE);
            host.rename_new("f", "g").unwrap();
            drop(held);
            assert!(waiting.join().unwrap().unwrap().is_none());
        });
        let inner = host.open_directory("d").unwrap();
        inner.create_new("x").unwrap();
        assert_eq!(inner.entries().unwrap(), ["x"]);
        let none = host.open_directory("g").unwrap_err();
        assert_eq!(none.kind(), ErrorKind::Io(libc::ENOTDIR));
    }
}
