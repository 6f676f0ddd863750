//! Where an open file really lies: the directory that has its name, and what else is in it.
//!
//! Imports: `storage`.
//! Never: opens a file; believes a path that leads to another file than the open one.
//!
//! What is kept beside a file must be found whatever way the file was named: through a symbolic
//! link, or in a directory that has been renamed since. So a path counts only where the name itself
//! is that of the open file; else the kernel is asked by which name it was opened, and then the
//! names are resolved again. A file that lies behind several names (hard links) has a home with
//! each of them, and this is one.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A directory, and the name of a file in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// The directory.
    pub directory: PathBuf,
    /// The file's name, which is no link.
    pub name: OsString,
}

impl Home {
    fn of(path: &Path) -> Option<Self> {
        let directory = match path.parent()? {
            empty if empty == Path::new("") => Path::new("."),
            parent => parent,
        };
        Some(Self {
            directory: directory.to_owned(),
            name: path.file_name()?.to_owned(),
        })
    }

    /// The path of a name that is the file's with something behind it.
    #[must_use]
    pub fn with(&self, end: &str) -> PathBuf {
        let mut name = self.name.clone();
        name.push(end);
        self.directory.join(name)
    }
}

fn metadata(file: BorrowedFd<'_>) -> io::Result<Metadata> {
    File::from(file.try_clone_to_owned()?).metadata()
}

/// How many names an open file has.
pub fn names(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(metadata(file)?.nlink())
}

/// Where an open file lies that was opened by a path; `None` where that cannot be told, as of one
/// that was removed.
pub fn home(file: BorrowedFd<'_>, path: &Path) -> io::Result<Option<Home>> {
    let opened = metadata(file)?;
    let is_it = |path: &PathBuf| {
        let found = path.symlink_metadata();
        found.is_ok_and(|found| (found.dev(), found.ino()) == (opened.dev(), opened.ino()))
    };
    let by_kernel = || fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok();
    let ways: [&dyn Fn() -> Option<PathBuf>; 3] = [&|| Some(path.to_owned()), &by_kernel, &|| {
        fs::canonicalize(path).ok()
    }];
    let found = ways.iter().find_map(|way| way().filter(is_it));
    Ok(found.as_deref().and_then(Home::of))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_file_is_at_home_where_its_own_name_is() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        fs::create_dir(real.join("sub")).unwrap();
        fs::write(real.join("sub/x"), "x").unwrap();
        symlink("sub/x", real.join("link")).unwrap();
        symlink("sub", real.join("sublink")).unwrap();
        let at = |name: &str| {
            let file = File::open(real.join(name)).unwrap();
            home(file.as_fd(), &real.join(name)).unwrap().unwrap()
        };
        assert_eq!(at("sub/x").directory, real.join("sub"));
        // As the user has it, where that is the same.
        assert_eq!(at("sublink/x").directory, real.join("sublink"));
        assert_eq!(at("link").with(".y"), real.join("sub/x.y"));
        let file = File::open(real.join("sub/x")).unwrap();
        assert_eq!(names(file.as_fd()).unwrap(), 1);
        fs::hard_link(real.join("sub/x"), real.join("other")).unwrap();
        assert_eq!(names(file.as_fd()).unwrap(), 2);
        assert_eq!(at("other").name, "other");
    }

    #[test]
    fn a_file_that_was_moved_or_removed_is_not_looked_for_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let path = real.join("x");
        fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        fs::rename(&path, real.join("y")).unwrap();
        fs::write(&path, "another").unwrap();
        let found = home(file.as_fd(), &path).unwrap().unwrap();
        assert_eq!(found.name, "y");
        fs::remove_file(real.join("y")).unwrap();
        assert_eq!(home(file.as_fd(), &path).unwrap(), None);
    }
}
