//! Exit codes.
//!
//! Imports: `error`.
//! Never: gives a command of this program another status than 0 (done) or 1 (not done) without an
//! entry here. A signal that stopped one adds its number to 128, as shells do.

use crate::error::ErrorKind;

/// The command was not carried out, whatever the reason.
pub const FAILED: u8 = 1;
/// `check`, `repair`: the image is corrupt, or still is.
pub const CORRUPT: u8 = 2;
/// `check`, `repair --dry-run`: space is wasted, the data is safe.
pub const LEAKS: u8 = 3;
/// `compare`, `checksum`: could not tell, where 1 says that disks differ.
pub const TROUBLE: u8 = 2;
/// mount(8): the helper could not mount.
pub const MOUNT_FAILED: u8 = 32;

/// The status of a command that failed with this kind of error.
#[must_use]
pub fn status(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Io(_)
        | ErrorKind::Truncated
        | ErrorKind::NotAnImage
        | ErrorKind::Unsupported
        | ErrorKind::Corrupt
        | ErrorKind::InUse
        | ErrorKind::Locked
        | ErrorKind::BitmapPresent
        | ErrorKind::ReadOnly
        | ErrorKind::Latched
        | ErrorKind::OutOfRange
        | ErrorKind::Missing
        | ErrorKind::Descriptor
        | ErrorKind::Manifest
        | ErrorKind::NoSuchSnapshot
        | ErrorKind::OutsideBundle
        | ErrorKind::Usage
        | ErrorKind::Mountpoint
        | ErrorKind::Host
        | ErrorKind::TimedOut => FAILED,
        ErrorKind::Interrupted => super::progress::signal_status(),
    }
}

/// The status of a check that found a disk in this state.
#[must_use]
pub fn state(state: &str) -> u8 {
    match state {
        "clean" => 0,
        "leaks" => LEAKS,
        _ => CORRUPT,
    }
}

/// The status that mount(8) expects of its helper: 1 for wrong usage, 32 for a failed mount.
#[must_use]
pub const fn helper_status(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Usage => FAILED,
        _ => MOUNT_FAILED,
    }
}

/// True for errors by which a command refuses before it has changed anything.
#[must_use]
pub const fn is_refusal(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::NotAnImage
        | ErrorKind::Unsupported
        | ErrorKind::Corrupt
        | ErrorKind::InUse
        | ErrorKind::Locked
        | ErrorKind::BitmapPresent
        | ErrorKind::Missing
        | ErrorKind::Descriptor
        | ErrorKind::Manifest
        | ErrorKind::NoSuchSnapshot
        | ErrorKind::OutsideBundle
        | ErrorKind::Truncated
        | ErrorKind::ReadOnly
        | ErrorKind::Usage
        | ErrorKind::Mountpoint => true,
        ErrorKind::Io(_)
        | ErrorKind::Latched
        | ErrorKind::OutOfRange
        | ErrorKind::Host
        | ErrorKind::TimedOut
        | ErrorKind::Interrupted => false,
    }
}
