//! What this host can do, found by trying.
//!
//! Imports: `command`.
//! Never: assumes a capability from the name of a kernel or a distribution.

use super::command;
use std::fs::OpenOptions;
use std::path::Path;

/// Something that a test cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Mounting a FUSE file system.
    Fuse,
    /// Being root.
    Root,
    /// Loop devices.
    Loop,
    /// `qemu-img` and `qemu-io` with the parallels driver.
    Qemu,
    /// `fio`.
    Fio,
    /// `ploop` (the user-space tool).
    Ploop,
    /// `mkfs.ext4`, `e2fsck`.
    E2fsprogs,
    /// `mkfs.xfs`, `xfs_io`.
    Xfs,
    /// `strace`.
    Strace,
    /// A kernel that can be told to offer FUSE over io_uring.
    Rings,
}

impl Need {
    /// The word that `PLOOPFS_REQUIRE` takes.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Root => "root",
            Self::Loop => "loop",
            Self::Qemu => "qemu",
            Self::Fio => "fio",
            Self::Ploop => "ploop",
            Self::E2fsprogs => "e2fsprogs",
            Self::Xfs => "xfs",
            Self::Strace => "strace",
            Self::Rings => "rings",
        }
    }

    /// Why the host lacks it; `None` where it does not.
    pub(crate) fn missing(self) -> Option<String> {
        match self {
            Self::Fuse => {
                let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
                device.err().map(|error| format!("/dev/fuse: {error}"))
            }
            Self::Root => (!nix::unistd::geteuid().is_root()).then(|| "not root".to_string()),
            Self::Loop => {
                let control = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/loop-control");
                control
                    .err()
                    .map(|error| format!("/dev/loop-control: {error}"))
                    .or_else(|| program("losetup", "--version", ""))
            }
            Self::Qemu => program("qemu-img", "--help", "parallels")
                .or_else(|| program("qemu-io", "--version", "")),
            Self::Fio => program("fio", "--version", ""),
            Self::Ploop => {
                let found = ["/usr/sbin/ploop", "/sbin/ploop", "/usr/bin/ploop"];
                let none = !found.iter().any(|path| Path::new(path).exists());
                none.then(|| "no ploop program".to_string())
            }
            Self::E2fsprogs => {
                program("mkfs.ext4", "-V", "").or_else(|| program("e2fsck", "-V", ""))
            }
            Self::Xfs => program("mkfs.xfs", "-V", "").or_else(|| program("xfs_io", "-V", "")),
            Self::Strace => program("strace", "-V", ""),
            Self::Rings => super::rings::missing(),
        }
    }
}

/// Every capability, in the order in which they are printed.
pub(crate) const ALL: [Need; 10] = [
    Need::Fuse,
    Need::Root,
    Need::Loop,
    Need::Qemu,
    Need::Fio,
    Need::Ploop,
    Need::E2fsprogs,
    Need::Xfs,
    Need::Strace,
    Need::Rings,
];

/// Why a program cannot be used: it does not run, or does not print a word.
fn program(name: &str, argument: &str, word: &str) -> Option<String> {
    match command::run(command::new(name).arg(argument)) {
        Err(_) => Some(format!("no {name} program")),
        Ok(done) if !done.text().contains(word) => Some(format!("{name} knows no {word}")),
        Ok(_) => None,
    }
}
