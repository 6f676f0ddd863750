//! What the kernel is told of an error.
//!
//! Imports: `error`.
//! Never: yields 0, ENOSYS, or a number that the kernel rejects.
//!
//! One exhaustive match from [`ErrorKind`] to an errno. The host's own errno passes through, so
//! that ENOSPC arrives as ENOSPC, but for the few that mean something else to the kernel when a
//! FUSE daemon says them: one ENOSYS on FSYNC makes every later fsync succeed without asking,
//! EOPNOTSUPP makes a loop device give up discarding, EAGAIN and EINTR ask for a retry that
//! nobody makes, and a reply with a number from 512 up is dropped, so its request would hang.

use crate::error::{Error, ErrorKind};
use fuser::Errno;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// The largest errno of Linux (EHWPOISON).
const ERRNO_MAX: i32 = 133;

/// The errno for an error of this kind.
#[must_use]
pub fn of_kind(kind: ErrorKind) -> Errno {
    match kind {
        ErrorKind::Io(errno) => of_host(errno),
        ErrorKind::ReadOnly | ErrorKind::BitmapPresent => Errno::EROFS,
        ErrorKind::InUse | ErrorKind::Locked => Errno::EBUSY,
        ErrorKind::OutOfRange | ErrorKind::Usage => Errno::EINVAL,
        ErrorKind::Truncated
        | ErrorKind::NotAnImage
        | ErrorKind::Unsupported
        | ErrorKind::Corrupt
        | ErrorKind::Latched
        | ErrorKind::Missing
        | ErrorKind::Descriptor
        | ErrorKind::Manifest
        | ErrorKind::NoSuchSnapshot
        | ErrorKind::OutsideBundle
        | ErrorKind::Mountpoint
        | ErrorKind::Host
        | ErrorKind::TimedOut
        | ErrorKind::Interrupted => Errno::EIO,
    }
}

fn of_host(errno: i32) -> Errno {
    match errno {
        libc::ENOSYS | libc::EOPNOTSUPP | libc::EAGAIN | libc::EINTR => Errno::EIO,
        1..=ERRNO_MAX => Errno::from_i32(errno),
        _ => Errno::EIO,
    }
}

/// The errno for an error, which is also written to the log: at most one line a second, so that a
/// broken medium under a busy disk does not fill the host's log.
#[must_use]
pub fn answer(verb: &str, error: &Error) -> Errno {
    static LAST_S: AtomicU64 = AtomicU64::new(0);
    static HIDDEN: AtomicU64 = AtomicU64::new(0);
    let errno = of_kind(error.kind());
    let now_s = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    if LAST_S.swap(now_s, Ordering::Relaxed) == now_s {
        HIDDEN.fetch_add(1, Ordering::Relaxed);
        return errno;
    }
    match HIDDEN.swap(0, Ordering::Relaxed) {
        0 => log::error!("{verb} failed: {error}"),
        more => log::error!("{verb} failed: {error} (and {more} more failed requests before)"),
    }
    errno
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ErrorKind; 20] = [
        ErrorKind::Truncated,
        ErrorKind::NotAnImage,
        ErrorKind::Unsupported,
        ErrorKind::Corrupt,
        ErrorKind::InUse,
        ErrorKind::Locked,
        ErrorKind::BitmapPresent,
        ErrorKind::ReadOnly,
        ErrorKind::Latched,
        ErrorKind::OutOfRange,
        ErrorKind::Missing,
        ErrorKind::Descriptor,
        ErrorKind::Manifest,
        ErrorKind::NoSuchSnapshot,
        ErrorKind::OutsideBundle,
        ErrorKind::Usage,
        ErrorKind::Mountpoint,
        ErrorKind::Host,
        ErrorKind::TimedOut,
        ErrorKind::Interrupted,
    ];

    #[test]
    fn no_error_switches_a_verb_off_or_hangs_its_request() {
        let hosts = (-600..=600).chain([i32::MIN, i32::MAX]).map(ErrorKind::Io);
        for kind in hosts.chain(KINDS) {
            let code = of_kind(kind).code();
            assert!((1..=ERRNO_MAX).contains(&code), "{kind:?} became {code}");
            for bad in [libc::ENOSYS, libc::EOPNOTSUPP, libc::EAGAIN, libc::EINTR] {
                assert_ne!(code, bad, "{kind:?}");
            }
        }
    }

    #[test]
    fn what_the_host_says_arrives() {
        let said = [
            libc::ENOSPC,
            libc::EDQUOT,
            libc::EIO,
            libc::EROFS,
            libc::EFBIG,
            libc::ENOMEM,
        ];
        for errno in said {
            assert_eq!(of_kind(ErrorKind::Io(errno)).code(), errno);
        }
        assert_eq!(of_kind(ErrorKind::ReadOnly), Errno::EROFS);
        assert_eq!(answer("read", &Error::errno(libc::ENOSPC)), Errno::ENOSPC);
    }
}
