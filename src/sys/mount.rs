//! Mounts: ones without a place in the tree, descriptors passed by helpers, and the host's table.

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::{AccessFlags, access, getuid};
use std::ffi::{CStr, OsString};
use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::ptr;

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOUNT_ATTR_RDONLY: libc::c_uint = 1;
const MOUNT_ATTR_NOSUID: libc::c_uint = 2;
const MOUNT_ATTR_NODEV: libc::c_uint = 4;

const TABLE: &str = "/proc/self/mountinfo";

/// One argument of [`detached`].
#[derive(Clone, Copy, Debug)]
pub enum Setting<'a> {
    /// A word by itself.
    Flag(&'a CStr),
    /// A key and its value.
    Text(&'a CStr, &'a CStr),
}

fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for our caller; nothing else owns it.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Mounts a file system nowhere: it is reached through the descriptor only, no other program sees
/// it, and it goes when the descriptor and all files open in it are closed.
pub fn detached(fs_type: &CStr, settings: &[Setting<'_>], read_only: bool) -> io::Result<OwnedFd> {
    // SAFETY: `fs_type` is a live string that ends in a zero byte.
    #[allow(unsafe_code)]
    let context =
        new_fd(unsafe { libc::syscall(libc::SYS_fsopen, fs_type.as_ptr(), FSOPEN_CLOEXEC) })?;
    for setting in settings {
        let (command, key, value) = match setting {
            Setting::Flag(key) => (FSCONFIG_SET_FLAG, key.as_ptr(), ptr::null()),
            Setting::Text(key, value) => (FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr()),
        };
        fsconfig(&context, command, key, value)?;
    }
    fsconfig(&context, FSCONFIG_CMD_CREATE, ptr::null(), ptr::null())?;
    let read_only = if read_only { MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | read_only;
    // SAFETY: `context` is open for the call; the rest are plain numbers.
    #[allow(unsafe_code)]
    new_fd(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes,
        )
    })
}

fn fsconfig(
    context: &OwnedFd,
    command: libc::c_uint,
    key: *const libc::c_char,
    value: *const libc::c_char,
) -> io::Result<()> {
    // SAFETY: `context` is open for the call; `key` and `value` are null or come from live `CStr`s
    // of our one caller.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            key,
            value,
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Receives one descriptor that another process sends over the socket; `None` when the other side
/// closed it without sending one.
pub fn receive_fd(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0_u8; 1];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut bytes, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(message) => break message,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            if let Some(fd) = fds.first() {
                // SAFETY: the kernel has just installed this descriptor for us alone.
                #[allow(unsafe_code)]
                return Ok(Some(unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
        }
    }
    Ok(None)
}

/// One line of the host's mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's number; another mount may get it once this one has gone and nobody holds it.
    pub id: u64,
    /// The number of the mount that this one lies in.
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Its type, as `fuse.ploopfs`.
    pub fs_type: String,
    /// What was mounted.
    pub source: OsString,
    /// Of a FUSE file system: the user who mounted it.
    pub owner: Option<u32>,
}

/// The mounts that this process sees, in the order they were made: of several at one place, the
/// last is the visible one.
pub fn mount_table() -> io::Result<Vec<MountEntry>> {
    let table = fs::read(TABLE)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot read {TABLE}: {e}")))?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect())
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut words = line.split(|byte| *byte == b' ');
    let mut number = || std::str::from_utf8(words.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = words.by_ref().next()?;
    let mountpoint = words.by_ref().nth(1)?;
    // Optional fields end in a lone dash.
    words.by_ref().find(|word| *word == b"-")?;
    let (fs_type, source) = (words.next()?, words.next()?);
    let mut options = words.next().unwrap_or_default().split(|byte| *byte == b',');
    let owner = options.find_map(|word| {
        let digits = std::str::from_utf8(word.strip_prefix(b"user_id=")?);
        digits.ok()?.parse().ok()
    });
    Some(MountEntry {
        id,
        parent,
        device: String::from_utf8_lossy(device).into_owned(),
        mountpoint: PathBuf::from(unescape(mountpoint)),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        source: unescape(source),
        owner,
    })
}

/// The number of the mount that an open file is in. While the file is open, no other mount has it.
pub fn mount_id(file: BorrowedFd<'_>) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
    let info = fs::read_to_string(&path)?;
    let mut lines = info.lines();
    lines
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("{path} does not name the mount")))
}

/// The kernel writes blanks, tabs, newlines and backslashes as `\` and three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((byte, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (byte, code) {
            (b'\\', Some(code)) => {
                out.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            _ => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    OsString::from_vec(out)
}

/// Whether this user may mount something at a place: who may not change it must not cover it
/// either. Root may do anything; in a directory for all (with the sticky bit) only its owner may.
pub fn may_cover(place: &Path) -> io::Result<()> {
    let user = getuid();
    if user.is_root() {
        return Ok(());
    }
    access(place, AccessFlags::W_OK)?;
    let found = fs::metadata(place)?;
    let is_sticky = found.mode() & libc::S_ISVTX != 0;
    if found.is_dir() && is_sticky && found.uid() != user.as_raw() {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::path::Path;

    #[test]
    fn a_line_of_the_table_is_read_with_its_escapes() {
        let line = [
            br"36 35 0:45 / /mnt/a\040b\134c rw,nosuid shared:7 master:1".as_slice(),
            br" - fuse.ploopfs /x\011y rw,user_id=7,group_id=8",
        ]
        .concat();
        let entry = parse_line(&line).unwrap();
        assert_eq!((entry.id, entry.parent, entry.owner), (36, 35, Some(7)));
        assert_eq!(entry.device, "0:45");
        assert_eq!(entry.mountpoint, PathBuf::from("/mnt/a b\\c"));
        assert_eq!(entry.fs_type, "fuse.ploopfs");
        assert_eq!(entry.source, OsString::from("/x\ty"));
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"36 35 0:45 / /mnt rw no dash"), None);
        let plain = parse_line(b"1 0 0:1 / / rw - tmpfs none rw,user_id=x").unwrap();
        assert_eq!(plain.owner, None);
    }

    #[test]
    fn an_open_file_names_its_mount() {
        let root = fs::File::open("/").unwrap();
        let id = mount_id(root.as_fd()).unwrap();
        let table = mount_table().unwrap();
        let entry = table.iter().find(|entry| entry.id == id).unwrap();
        assert_eq!(entry.mountpoint, Path::new("/"));
    }

    #[test]
    fn the_hosts_table_has_a_root() {
        assert!(
            mount_table()
                .unwrap()
                .iter()
                .any(|entry| entry.mountpoint == Path::new("/"))
        );
    }
}
