//! Gets a `/dev/fuse` descriptor mounted, and unmounts it again.
//!
//! Imports: `error`, `sys`.
//! Never: touches a mount that is not of type `fuse.ploopfs`, or not its own.
//!
//! Root calls mount(2) itself: only so the type in the host's table is `fuse.ploopfs` (tools look
//! for that, umount(8) finds its helper by it) and the source may hold any characters. Everyone
//! else goes through the setuid program `fusermount3`, which mounts and passes the descriptor back
//! over a socket. Nothing relies on `PATH`: mount(8) runs helpers with an empty environment.

use crate::error::{Error, ErrorKind, Result};
use crate::sys::mount::{self as sys_mount, MountEntry, Setting};
use crate::sys::process::{self, find_program};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The type that the host's mount table shows, before any `subtype=`.
pub const FS_TYPE: &str = "fuse.ploopfs";

const DEVICE: &str = "/dev/fuse";

/// Who may use the mount besides its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Nobody; not even root, unless it is the owner.
    #[default]
    Owner,
    /// Root.
    Root,
    /// Everybody, as far as the modes of the files allow.
    Everybody,
}

/// How to mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// The mount refuses writes, whatever the disk allows.
    pub read_only: bool,
    /// No program may be run from it.
    pub noexec: bool,
    /// Access times are not kept.
    pub noatime: bool,
    /// Writes are synchronous.
    pub sync: bool,
    /// Who else may use it.
    pub access: Access,
    /// The kernel checks the modes of files.
    pub default_permissions: bool,
    /// What the mount table shows as source, instead of the image.
    pub fsname: Option<OsString>,
    /// What follows `fuse.` in the type.
    pub subtype: Option<String>,
    /// Unmounted by a watching helper when the daemon dies.
    pub auto_unmount: bool,
    /// A directory with files in it may be covered.
    pub nonempty: bool,
    /// Largest read that the kernel may ask for.
    pub max_read: Option<u32>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            noexec: false,
            noatime: true,
            sync: false,
            access: Access::Owner,
            default_permissions: true,
            fsname: None,
            subtype: None,
            auto_unmount: false,
            nonempty: false,
            max_read: None,
        }
    }
}

impl MountOptions {
    fn fs_type(&self) -> String {
        self.subtype
            .as_ref()
            .map_or_else(|| FS_TYPE.to_owned(), |name| format!("fuse.{name}"))
    }
}

/// What is covered by the mount, and so what its root must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A directory.
    Directory,
    /// A regular file.
    File,
}

/// Quotes a path for a line that the user may paste into a shell.
#[must_use]
pub fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%{}".contains(c);
    if !text.is_empty() && text.chars().all(plain) && !text.contains('{') {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The path of a mountpoint without links, as the mount table has it. Works for a dead mount too,
/// which nothing can look into.
pub fn absolute(mountpoint: &Path) -> io::Result<PathBuf> {
    let full = std::path::absolute(mountpoint)?;
    // Even looking at a mount whose daemon hangs would hang; the table tells without looking.
    if visible_mount(&full)?.is_some() {
        return Ok(full);
    }
    match fs::canonicalize(mountpoint) {
        Ok(path) => return Ok(path),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::EACCES)) => {}
        Err(e) => return Err(e),
    }
    match (full.parent(), full.file_name()) {
        (Some(parent), Some(name)) => Ok(fs::canonicalize(parent)?.join(name)),
        _ => Ok(full),
    }
}

/// The visible mount at exactly this place, whatever its type.
pub fn visible_mount(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    let table = sys_mount::mount_table()?;
    Ok(table
        .into_iter()
        .rev()
        .find(|entry| entry.mountpoint == mountpoint))
}

/// True for a type that this program mounts; `subtype=` can hide it, but fusermount3 and we always
/// put `ploopfs` there by default.
#[must_use]
pub fn is_ours(entry: &MountEntry) -> bool {
    entry.fs_type == FS_TYPE
}

/// Refuses a place, given in full, where an image is mounted.
pub fn expect_free(place: &Path) -> Result<()> {
    if !visible_mount(place)?.is_some_and(|entry| is_ours(&entry)) {
        return Ok(());
    }
    let word = shell_word(place);
    Err(
        Error::why(ErrorKind::Mountpoint, "an image is mounted there already")
            .in_file(place)
            .fix(format!(
                "choose another one, or first: ploopfs umount {word}"
            )),
    )
}

/// Checks that the mountpoint can be used, and gives its path in full.
pub fn examine(mountpoint: &Path, options: &MountOptions) -> Result<(PathBuf, Shape)> {
    let word = shell_word(mountpoint);
    let bad = |why: String| Error::why(ErrorKind::Mountpoint, why).in_file(mountpoint);
    // The table is asked first: even looking at a mount whose daemon hangs would hang.
    let full = match absolute(mountpoint) {
        Ok(full) => full,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(bad("it does not exist".into()).fix(format!(
                "mkdir -p {word}      or, to mount over a file: touch {word}"
            )));
        }
        Err(e) => return Err(bad(format!("cannot find its full path: {e}"))),
    };
    expect_free(&full)?;
    let metadata = fs::metadata(&full).map_err(|e| bad(format!("cannot look at it: {e}")))?;
    sys_mount::may_cover(&full).map_err(|e| {
        bad(format!("you may not write there: {e}"))
            .fix("choose a mountpoint of your own, or ask its owner")
    })?;
    if metadata.is_file() {
        return Ok((full, Shape::File));
    }
    if !metadata.is_dir() {
        return Err(bad("it is neither a directory nor a regular file".into()));
    }
    if !options.nonempty {
        let mut files = fs::read_dir(&full).map_err(|e| bad(format!("cannot read it: {e}")))?;
        if files.next().is_some() {
            return Err(
                bad("the directory is not empty; its files would be hidden".into())
                    .fix("choose an empty directory, or add: -o nonempty"),
            );
        }
    }
    Ok((full, Shape::Directory))
}

/// Opens the kernel's door for file systems in user space.
pub fn open_device() -> Result<OwnedFd> {
    let failed = |e: &io::Error| {
        let error = Error::why(ErrorKind::Host, format!("cannot open {DEVICE}: {e}"));
        match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                error.fix("modprobe fuse; in a container, start it with --device /dev/fuse")
            }
            Some(libc::EACCES | libc::EPERM) => error.fix(
                "chmod 666 /dev/fuse (the usual mode); in a container: --device /dev/fuse \
                 --cap-add SYS_ADMIN",
            ),
            _ => error,
        }
    };
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|e| failed(&e))?;
    let kind = device.metadata().map_err(|e| failed(&e))?.file_type();
    if !kind.is_char_device() {
        return Err(
            Error::why(ErrorKind::Host, format!("{DEVICE} is not a device"))
                .fix("mknod /dev/fuse c 10 229"),
        );
    }
    Ok(device.into())
}

#[derive(Debug)]
enum Way {
    Direct,
    /// By fusermount3; with `auto_unmount` it goes on watching this socket.
    Helper {
        _watched: Option<(UnixStream, Child)>,
    },
}

/// A mount that this process made. Dropping it leaves it mounted.
#[derive(Debug)]
pub struct Mounted {
    mountpoint: PathBuf,
    /// What the table said of it when it was new.
    entry: Option<MountEntry>,
    way: Way,
}

/// Mounts at a place that [`examine`] found good. The descriptor serves the mount; nothing in it
/// can be used before a session answers there.
pub fn mount(
    source: &Path,
    mountpoint: &Path,
    shape: Shape,
    options: &MountOptions,
) -> Result<(OwnedFd, Mounted)> {
    let root = nix::unistd::geteuid().is_root();
    let direct = if root && !options.auto_unmount {
        let fd = open_device()?;
        match mount_direct(&fd, source, mountpoint, shape, options) {
            Ok(()) => Some(fd),
            // A container may lack the capability and yet have the helper allowed.
            Err(Errno::EPERM) if find_program("fusermount3").is_some() => None,
            Err(errno) => {
                let error = Error::why(ErrorKind::Host, format!("mount(2) failed: {errno}"))
                    .in_file(mountpoint);
                return Err(match errno {
                    Errno::ENODEV => error.fix("modprobe fuse"),
                    Errno::EPERM => error.fix("in a container: --cap-add SYS_ADMIN"),
                    _ => error,
                });
            }
        }
    } else {
        None
    };
    let (fd, way) = match direct {
        Some(fd) => (fd, Way::Direct),
        None => mount_by_helper(source, mountpoint, options)?,
    };
    let entry = visible_mount(mountpoint)?.filter(|entry| entry.fs_type.starts_with("fuse"));
    Ok((
        fd,
        Mounted {
            mountpoint: mountpoint.to_owned(),
            entry,
            way,
        },
    ))
}

fn kernel_data(fd: &OwnedFd, shape: Shape, options: &MountOptions) -> String {
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let root_mode = match shape {
        Shape::Directory => "40000",
        Shape::File => "100000",
    };
    let mut data = format!("fd={},rootmode={root_mode},user_id={uid},group_id={gid}", {
        fd.as_raw_fd()
    });
    if options.access != Access::Owner {
        data.push_str(",allow_other");
    }
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    if let Some(max_read) = options.max_read {
        data.push_str(&format!(",max_read={max_read}"));
    }
    data
}

fn mount_direct(
    fd: &OwnedFd,
    source: &Path,
    mountpoint: &Path,
    shape: Shape,
    options: &MountOptions,
) -> nix::Result<()> {
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    flags.set(MsFlags::MS_NOEXEC, options.noexec);
    flags.set(MsFlags::MS_NOATIME, options.noatime);
    flags.set(MsFlags::MS_SYNCHRONOUS, options.sync);
    let source = options.fsname.as_deref().unwrap_or(source.as_os_str());
    let data = kernel_data(fd, shape, options);
    nix::mount::mount(
        Some(source),
        mountpoint,
        Some(options.fs_type().as_str()),
        flags,
        Some(data.as_str()),
    )
}

/// Mounts without any place in the tree, for `attach`. The second descriptor is the mount: files
/// in it are opened relative to it, and it ends with its last user.
pub fn mount_nowhere(source: &Path, read_only: bool) -> Result<(OwnedFd, OwnedFd)> {
    let fd = open_device()?;
    let text = |text: String| CString::new(text).expect("digits hold no zero byte");
    let number = text(fd.as_raw_fd().to_string());
    let source = CString::new(source.as_os_str().as_bytes())
        .map_err(|e| Error::why(ErrorKind::Usage, "the path holds a zero byte").because(e))?;
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let (uid, gid) = (text(uid.to_string()), text(gid.to_string()));
    let settings = [
        Setting::Text(c"source", &source),
        Setting::Text(c"subtype", c"ploopfs"),
        Setting::Text(c"fd", &number),
        Setting::Text(c"rootmode", c"40000"),
        Setting::Text(c"user_id", &uid),
        Setting::Text(c"group_id", &gid),
    ];
    let mount = sys_mount::detached(c"fuse", &settings, read_only).map_err(|e| {
        Error::why(ErrorKind::Host, format!("cannot mount privately: {e}"))
            .fix("attach needs root and Linux 5.2 or newer; else mount it and use losetup")
    })?;
    Ok((fd, mount))
}

/// The helper separates options by commas, so those within a value need a backslash.
fn escape(value: &OsStr) -> OsString {
    let mut out = Vec::new();
    for byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    OsString::from_vec(out)
}

fn helper_words(source: &Path, options: &MountOptions) -> OsString {
    let mut words = OsString::from("nosuid,nodev");
    let flags = [
        (options.read_only, ",ro"),
        (options.noexec, ",noexec"),
        (options.noatime, ",noatime"),
        (options.sync, ",sync"),
        (options.access != Access::Owner, ",allow_other"),
        (options.default_permissions, ",default_permissions"),
        (options.auto_unmount, ",auto_unmount"),
    ];
    flags
        .iter()
        .filter(|(set, _)| *set)
        .for_each(|(_, word)| words.push(word));
    if let Some(max_read) = options.max_read {
        words.push(format!(",max_read={max_read}"));
    }
    words.push(",subtype=");
    words.push(options.subtype.as_deref().unwrap_or("ploopfs"));
    words.push(",fsname=");
    words.push(escape(
        options.fsname.as_deref().unwrap_or(source.as_os_str()),
    ));
    words
}

fn mount_by_helper(
    source: &Path,
    mountpoint: &Path,
    options: &MountOptions,
) -> Result<(OwnedFd, Way)> {
    let Some(program) = find_program("fusermount3") else {
        return Err(
            Error::why(ErrorKind::Host, "the program fusermount3 is not installed")
                .fix("install the package fuse3, or run this as root"),
        );
    };
    let (ours, theirs) = UnixStream::pair()?;
    process::keep_through_exec(theirs.as_fd())?;
    let mut child = Command::new(&program)
        .arg("-o")
        .arg(helper_words(source, options))
        .arg("--")
        .arg(mountpoint)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::from(e).in_file(&program))?;
    drop(theirs);
    let Some(fd) = sys_mount::receive_fd(&ours)? else {
        let mut said = String::new();
        if let Some(stderr) = child.stderr.as_mut() {
            let _ = stderr.take(4096).read_to_string(&mut said);
        }
        let _ = child.wait();
        return Err(helper_refused(said.trim(), mountpoint));
    };
    let watched = if options.auto_unmount {
        Some((ours, child))
    } else {
        child.wait()?;
        None
    };
    Ok((fd, Way::Helper { _watched: watched }))
}

fn helper_refused(said: &str, mountpoint: &Path) -> Error {
    let said = if said.is_empty() {
        "fusermount3 failed without saying why"
    } else {
        said
    };
    let error = Error::why(ErrorKind::Host, said).in_file(mountpoint);
    if said.contains("user_allow_other") {
        error.fix("as root, add the line user_allow_other to /etc/fuse.conf")
    } else if said.contains("/dev/fuse") {
        error.fix("as root: modprobe fuse; chmod 666 /dev/fuse; in a container: --device /dev/fuse")
    } else if said.contains("not permitted") {
        error.fix("fusermount3 must be setuid root; in a container: --cap-add SYS_ADMIN")
    } else if said.contains("no write access") || said.contains("Permission denied") {
        error.fix("mount on a directory or file that you own")
    } else {
        error
    }
}

impl Mounted {
    /// Where it is.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// `major:minor`, where the mount table has it.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        self.entry.as_ref().map(|entry| entry.device.as_str())
    }

    /// True while the mount that is visible at the place is the one made here. The device alone
    /// does not tell: its number is free again, and the next to be taken, once the mount has gone.
    pub fn is_visible(&self) -> bool {
        self.entry.is_some() && visible_mount(&self.mountpoint).is_ok_and(|now| now == self.entry)
    }

    /// Unmounts. EINVAL when something else is mounted there by now.
    pub fn unmount(&self, lazy: bool) -> io::Result<()> {
        if !self.is_visible() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        match self.way {
            Way::Direct => unmount_direct(&self.mountpoint, lazy),
            Way::Helper { .. } => unmount_any(&self.mountpoint, lazy),
        }
    }
}

fn unmount_direct(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    flags.set(MntFlags::MNT_DETACH, lazy);
    Ok(nix::mount::umount2(mountpoint, flags)?)
}

/// Unmounts whatever is visible at the place, in the way that this user may.
pub fn unmount_any(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return unmount_direct(mountpoint, lazy);
    }
    let Some(program) = find_program("fusermount3") else {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "fusermount3 is not installed",
        ));
    };
    let how = if lazy { "-uz" } else { "-u" };
    let output = Command::new(program)
        .args([how, "--"])
        .arg(mountpoint)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    Err(io::Error::other(said.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_backslashes_in_values_are_escaped() {
        let source = Path::new("/a,b\\c d.hdd");
        let options = MountOptions {
            max_read: Some(4096),
            ..MountOptions::default()
        };
        assert_eq!(
            helper_words(source, &options),
            OsString::from(
                "nosuid,nodev,noatime,default_permissions,max_read=4096,subtype=ploopfs,\
                 fsname=/a\\,b\\\\c d.hdd"
            )
        );
    }

    #[test]
    fn words_for_the_shell_are_quoted_where_needed() {
        assert_eq!(shell_word(Path::new("/mnt/a-b_c.hdd")), "/mnt/a-b_c.hdd");
        assert_eq!(shell_word(Path::new("/mnt/a b")), "'/mnt/a b'");
        assert_eq!(shell_word(Path::new("it's")), r"'it'\''s'");
        assert_eq!(shell_word(Path::new("{1}")), "'{1}'");
    }

    #[test]
    fn mountpoints_are_judged_before_anything_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let options = MountOptions::default();
        let missing = examine(&directory.path().join("no"), &options).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::Mountpoint);
        assert!(missing.fix_text().unwrap().contains("mkdir -p"));

        let (full, shape) = examine(directory.path(), &options).unwrap();
        assert_eq!(
            (full.as_path(), shape),
            (directory.path(), Shape::Directory)
        );

        let file = directory.path().join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(examine(&file, &options).unwrap().1, Shape::File);
        assert!(examine(directory.path(), &options).is_err());
        let options = MountOptions {
            nonempty: true,
            ..options
        };
        assert!(examine(directory.path(), &options).is_ok());
        assert!(examine(Path::new("/dev/null"), &options).is_err());
    }
}
