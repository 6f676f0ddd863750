//! Which host files a name may lead to.
//!
//! What the user names is opened as named. What a *descriptor* names comes from whoever made the
//! disk, perhaps a tenant, while this program may run as root: it must be a plain file in the
//! bundle's own directory or in one that the user allowed. Symbolic links and absolute names are
//! resolved first; what they resolve to is then opened below the directory that contains it, by a
//! walk that follows no link at all, so that a link made in between changes nothing.

use crate::error::{Error, ErrorKind, Result, Shown};
use crate::sys::open as sys;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// An open directory, to start from.
#[derive(Debug)]
struct Directory {
    fd: OwnedFd,
    /// Absolute and without links.
    path: PathBuf,
}

impl Directory {
    fn open(path: &Path) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let fd = sys::directory(path)?;
            Self::of(fd, path)
        };
        open().map_err(|e| Error::from(e).in_file(path))
    }

    fn of(fd: OwnedFd, path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        // Both looked the name up; they must have met the same directory.
        let found = fs::metadata(&path)?;
        let opened = File::from(fd.try_clone()?).metadata()?;
        if (found.dev(), found.ino()) != (opened.dev(), opened.ino()) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        Ok(Self { fd, path })
    }

    /// The same for a directory that lies in one that the user named, and whose own name he has not
    /// given: its last component must not be a link.
    fn open_inside(path: &Path) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let (parent, name) = parent_and_name(path)?;
            let parent = sys::directory(parent)?;
            let fd = sys::directory_in(parent.as_fd(), name)?;
            Self::of(fd, path)
        };
        open().map_err(|e| linked(e, path))
    }
}

/// The two halves of a path that ends in a name.
fn parent_and_name(path: &Path) -> io::Result<(&Path, &Path)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, Path::new(name))),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// The error for a name that the user has not given and that turned out to be a link.
fn linked(error: io::Error, path: &Path) -> Error {
    match error.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR | libc::EXDEV) => {
            let why = "it is a symbolic link, or was changed while it was opened";
            Error::why(ErrorKind::OutsideBundle, why)
                .in_file(path)
                .fix("if it leads where you want, name the link itself")
        }
        _ => Error::from(error).in_file(path),
    }
}

/// A file that a descriptor named.
#[derive(Debug)]
pub struct Named {
    /// The open file, which is a plain one.
    pub file: File,
    /// Where it was found, as it is shown to people.
    pub path: PathBuf,
    /// The absolute name leads nowhere: found beside the descriptor instead.
    pub moved: bool,
}

/// The directories that a descriptor may name files in.
#[derive(Debug)]
pub struct Roots {
    home: Directory,
    /// The home directory as the user named it.
    shown: PathBuf,
    allowed: Vec<Directory>,
}

impl Roots {
    /// The descriptor's own directory, and those that the user allows besides.
    pub fn open(home: &Path, allowed: &[PathBuf]) -> Result<Self> {
        Self::around(Directory::open(home)?, home, allowed)
    }

    /// The same where the user has named the directory that the descriptor's own one lies in.
    pub fn open_inside(home: &Path, allowed: &[PathBuf]) -> Result<Self> {
        Self::around(Directory::open_inside(home)?, home, allowed)
    }

    fn around(home: Directory, shown: &Path, allowed: &[PathBuf]) -> Result<Self> {
        let allowed = allowed
            .iter()
            .map(|path| Directory::open(path))
            .collect::<Result<_>>()?;
        Ok(Self {
            home,
            shown: shown.to_owned(),
            allowed,
        })
    }

    /// The descriptor's own directory.
    #[must_use]
    pub fn home(&self) -> BorrowedFd<'_> {
        self.home.fd.as_fd()
    }

    /// The descriptor's own directory as the user named it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shown
    }

    /// Opens a file that the descriptor names.
    pub fn named(&self, name: &str, write: bool) -> Result<Named> {
        let path = self.shown.join(name);
        if name.is_empty() || name.contains('\0') {
            return Err(Error::why(
                ErrorKind::Descriptor,
                "a file name is empty or has a NUL",
            ));
        }
        let simple = Path::new(name)
            .components()
            .all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        let direct = if simple {
            sys::beneath(self.home(), Path::new(name), write)
        } else {
            Err(io::Error::from_raw_os_error(libc::EXDEV))
        };
        match direct {
            Ok(file) => Ok(Named {
                file: plain(file, &path)?,
                path,
                moved: false,
            }),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::EXDEV)) => {
                self.resolved(name, write)
            }
            Err(e) => Err(self.failed(e, &path)),
        }
    }

    /// The way for names that are absolute, lead upwards, or pass through links.
    fn resolved(&self, name: &str, write: bool) -> Result<Named> {
        let path = self.shown.join(name);
        let found = match fs::canonicalize(self.home.path.join(name)) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return self.moved(name, write),
            Err(e) => return Err(self.failed(e, &path)),
        };
        for root in std::iter::once(&self.home).chain(&self.allowed) {
            let Ok(below) = found.strip_prefix(&root.path) else {
                continue;
            };
            if below.as_os_str().is_empty() {
                return Err(not_plain(&path));
            }
            let file =
                sys::beneath(root.fd.as_fd(), below, write).map_err(|e| self.failed(e, &path))?;
            return Ok(Named {
                file: plain(file, &path)?,
                path,
                moved: false,
            });
        }
        let why = format!("{} is not in the bundle's directory", found.display());
        let fix = match found.parent() {
            Some(parent) => {
                let parent = parent.display().to_string();
                format!("if that is meant: --allow-outside {}", Shown(&parent))
            }
            None => "a disk's files must be plain files".to_owned(),
        };
        Err(Error::why(ErrorKind::OutsideBundle, why)
            .in_file(&path)
            .fix(fix))
    }

    /// A bundle that was moved has absolute names that lead nowhere; the files are beside the
    /// descriptor.
    fn moved(&self, name: &str, write: bool) -> Result<Named> {
        let missing = || Error::new(ErrorKind::Missing).in_file(&self.shown.join(name));
        if !Path::new(name).is_absolute() {
            return Err(missing());
        }
        let last = Path::new(name).file_name().ok_or_else(missing)?;
        let path = self.shown.join(last);
        let file = sys::beneath(self.home(), Path::new(last), write).map_err(|_| missing())?;
        Ok(Named {
            file: plain(file, &path)?,
            path,
            moved: true,
        })
    }

    fn failed(&self, error: io::Error, path: &Path) -> Error {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Error::new(ErrorKind::Missing).in_file(path),
            Some(libc::ENXIO | libc::EISDIR | libc::ENODEV) => not_plain(path),
            _ => Error::from(error).in_file(path),
        }
    }

    /// Reads a small file that the descriptor's directory holds: at most one byte more than `max`,
    /// so that the caller sees when there is too much.
    pub fn read(&self, name: &str, max: u64) -> Result<Vec<u8>> {
        let named = self.named(name, false)?;
        read_all(named.file, max).map_err(|e| e.in_file(&named.path))
    }
}

fn read_all(file: File, max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a small file beside the bundle that is nothing but a help, if it is there and readable.
#[must_use]
pub fn read_optional(directory: &Path, name: &str, max: u64) -> Option<Vec<u8>> {
    let fd = sys::directory(directory).ok()?;
    let file = sys::beneath(fd.as_fd(), Path::new(name), false).ok()?;
    read_all(plain(file, directory).ok()?, max).ok()
}

/// Opens an image that the user named.
pub fn by_user(path: &Path, write: bool) -> Result<File> {
    match sys::any(path, write) {
        Ok(file) if file.metadata().is_ok_and(|meta| meta.is_file()) => Ok(file),
        Ok(_) => Err(not_a_file(path)),
        Err(e) => match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Err(Error::new(ErrorKind::Missing).in_file(path)),
            Some(libc::ENXIO | libc::EISDIR | libc::ENODEV) => Err(not_a_file(path)),
            _ => Err(Error::from(e).in_file(path)),
        },
    }
}

/// Opens an image in a directory that the user named, not by a name of his: it must not be a link.
pub fn in_directory(path: &Path, write: bool) -> Result<File> {
    let open = || -> io::Result<File> {
        let (parent, name) = parent_and_name(path)?;
        let parent = sys::directory(parent)?;
        sys::beneath(parent.as_fd(), name, write)
    };
    match open() {
        Ok(file) => plain(file, path),
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::ENXIO | libc::EISDIR | libc::ENODEV)
            ) =>
        {
            Err(not_plain(path))
        }
        Err(e) => Err(linked(e, path)),
    }
}

fn not_a_file(path: &Path) -> Error {
    Error::why(ErrorKind::Usage, "an image must be a plain file").in_file(path)
}

fn not_plain(path: &Path) -> Error {
    let why = "a disk's files must be plain files, and this is a directory or a device";
    Error::why(ErrorKind::OutsideBundle, why).in_file(path)
}

fn plain(file: File, path: &Path) -> Result<File> {
    if file
        .metadata()
        .map_err(|e| Error::from(e).in_file(path))?
        .is_file()
    {
        Ok(file)
    } else {
        Err(not_plain(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::open::tests::with_and_without_openat2;
    use std::os::unix::fs::symlink;

    /// A bundle, a sibling directory, and files in both.
    fn house() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (home, other) = (dir.path().join("home"), dir.path().join("other"));
        for path in [&home, &other] {
            fs::create_dir_all(path.join("sub")).unwrap();
            fs::write(path.join("file"), path.to_str().unwrap()).unwrap();
            fs::write(path.join("sub/file"), "sub").unwrap();
        }
        (dir, home, other)
    }

    fn kind(result: Result<Named>) -> ErrorKind {
        result.unwrap_err().kind()
    }

    #[test]
    fn names_stay_in_the_directory_unless_allowed() {
        with_and_without_openat2(|| {
            let (_dir, home, other) = house();
            symlink("../other/file", home.join("out")).unwrap();
            symlink("sub/file", home.join("in")).unwrap();
            symlink("../other/sub", home.join("outsub")).unwrap();
            let (strict, lax) = (
                Roots::open(&home, &[]),
                Roots::open(&home, std::slice::from_ref(&other)),
            );
            let (strict, lax) = (strict.unwrap(), lax.unwrap());
            let outside = other.join("file");
            for name in [
                "out",
                "../other/file",
                "outsub/file",
                outside.to_str().unwrap(),
            ] {
                let refused = strict.named(name, false).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::OutsideBundle, "{name}");
                assert!(
                    refused.fix_text().unwrap().contains("--allow-outside"),
                    "{name}"
                );
                assert!(lax.named(name, true).is_ok(), "{name}");
            }
            for name in [
                "file",
                "sub/file",
                "in",
                "../home/file",
                home.join("file").to_str().unwrap(),
            ] {
                assert!(strict.named(name, true).is_ok(), "{name}");
            }
            assert_eq!(
                kind(lax.named("/etc/passwd", false)),
                ErrorKind::OutsideBundle
            );
            assert_eq!(kind(strict.named("../homely", false)), ErrorKind::Missing);
        });
    }

    #[test]
    fn a_moved_bundle_finds_its_files_beside_the_descriptor() {
        with_and_without_openat2(|| {
            let (_dir, home, _) = house();
            let roots = Roots::open(&home, &[]).unwrap();
            let found = roots.named("/nowhere/at/all/file", false).unwrap();
            assert!(found.moved);
            assert_eq!(found.path, home.join("file"));
            assert_eq!(
                kind(roots.named("/nowhere/at/all/none", false)),
                ErrorKind::Missing
            );
        });
    }

    #[test]
    fn only_plain_files_are_opened() {
        with_and_without_openat2(|| {
            let (_dir, home, _) = house();
            let mode = nix::sys::stat::Mode::S_IRWXU;
            nix::unistd::mkfifo(&home.join("fifo"), mode).unwrap();
            let _socket = std::os::unix::net::UnixListener::bind(home.join("socket")).unwrap();
            symlink("/dev/zero", home.join("device")).unwrap();
            symlink("/proc/self/fd/0", home.join("magic")).unwrap();
            symlink("loop", home.join("loop")).unwrap();
            symlink("fifo", home.join("to-fifo")).unwrap();
            let made = [
                ("char", libc::S_IFCHR, libc::makedev(1, 3)),
                ("block", libc::S_IFBLK, libc::makedev(7, 0)),
            ]
            .map(|(name, kind, device)| {
                let kind = nix::sys::stat::SFlag::from_bits_retain(kind);
                nix::sys::stat::mknod(&home.join(name), kind, mode, device).is_ok()
            });
            if made != [true; 2] {
                eprintln!("no devices are tried here: only root can make them");
            }
            let roots = Roots::open(&home, &[]).unwrap();
            for name in [
                "fifo",
                "socket",
                "sub",
                ".",
                "device",
                "/dev/null",
                "/proc/self/mem",
                "magic",
                "to-fifo",
                "char",
                "block",
            ] {
                for write in [false, true] {
                    let found = roots.named(name, write);
                    let refused = found.unwrap_err();
                    let kinds = [ErrorKind::OutsideBundle, ErrorKind::Missing];
                    assert!(kinds.contains(&refused.kind()), "{name}: {refused}");
                }
            }
            assert_eq!(kind(roots.named("loop", false)), ErrorKind::Io(libc::ELOOP));
            assert_eq!(kind(roots.named("", false)), ErrorKind::Descriptor);
            assert_eq!(kind(roots.named("none", false)), ErrorKind::Missing);
            for path in ["fifo", "sub", "device"] {
                assert_eq!(
                    by_user(&home.join(path), false).unwrap_err().kind(),
                    ErrorKind::Usage
                );
            }
        });
    }

    #[test]
    fn what_the_user_did_not_name_is_opened_through_no_link() {
        let (_dir, home, other) = house();
        symlink("../other", home.join("linked")).unwrap();
        symlink("file", home.join("link")).unwrap();
        let outside = |result: Result<()>| {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutsideBundle, "{error}");
            assert!(error.fix_text().unwrap().contains("link"));
        };
        with_and_without_openat2(|| {
            assert!(in_directory(&home.join("file"), true).is_ok());
            assert!(Roots::open_inside(&home.join("sub"), &[]).is_ok());
            outside(in_directory(&home.join("link"), false).map(drop));
            outside(Roots::open_inside(&home.join("linked"), &[]).map(drop));
            assert!(in_directory(&home.join("sub"), false).is_err());
        });
        assert!(Roots::open(&home.join("linked"), &[]).is_ok());
        assert!(by_user(&other.join("../home/link"), false).is_ok());
    }

    /// A file that turns into a link again and again while it is opened.
    #[test]
    fn a_name_that_changes_meanwhile_leads_nowhere_else() {
        let (_dir, home, other) = house();
        let own = fs::read(home.join("file")).unwrap();
        let (path, new, bytes) = (home.join("file"), home.join("new"), own.clone());
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let changing = std::thread::spawn(move || {
            use std::sync::mpsc::TryRecvError;
            while stopped.try_recv() == Err(TryRecvError::Empty) {
                symlink(other.join("file"), &new).unwrap();
                fs::rename(&new, &path).unwrap();
                fs::write(&new, &bytes).unwrap();
                fs::rename(&new, &path).unwrap();
            }
        });
        with_and_without_openat2(|| {
            let roots = Roots::open(&home, &[]).unwrap();
            let (mut opened, mut refused) = (0, 0);
            while opened < 200 || refused < 200 {
                match roots.named("file", false) {
                    Ok(named) => {
                        assert_eq!(read_all(named.file, 100).unwrap(), own);
                        opened += 1;
                    }
                    Err(_) => refused += 1,
                }
                if let Ok(file) = in_directory(&home.join("file"), false) {
                    assert_eq!(read_all(file, 100).unwrap(), own);
                }
            }
        });
        drop(stop);
        changing.join().unwrap();
    }

    #[test]
    fn small_files_are_read_up_to_a_bound() {
        let (_dir, home, _) = house();
        fs::write(home.join("long"), "12345678").unwrap();
        let roots = Roots::open(&home, &[]).unwrap();
        assert_eq!(roots.read("long", 3).unwrap(), b"1234");
        assert_eq!(read_optional(&home, "long", 100).unwrap(), b"12345678");
        assert_eq!(read_optional(&home, "none", 100), None);
    }
}
