//! Mounts a file system of an attached disk where nobody sees it, and lets it discard what is free.
//!
//! Imports: `error`, `sys`.
//! Never: mounts at a place of the file tree, or what `volumes` did not find fit; leaves a mount
//! behind: it lives as long as one descriptor, and so goes with the process, whatever ends that.
//!
//! The kernel is asked to change as little as can be: ext4 may not go on writing tables that mkfs
//! left for later, and may not bring the host down where the file system's own setting is to panic.
//!
//! Only ranges that the image to be compacted holds are discarded, where the file system counts
//! bytes as the device does. What it does not hold takes no room in it; a discard there would in a
//! chain have to cover what is below, and make it longer.

use super::volumes::Volume;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::mount::{Setting, detached};
use crate::sys::trim::trim as trim_range;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bytes that are discarded in one call: the user may stop between two.
const PIECE: u64 = 16 << 30;

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// So many bytes of it are free, of those that were looked at.
    Trimmed(u64),
    /// It could not be mounted, or does not discard.
    Skipped(String),
}

/// Discards what is free in the file system on a device. `held` are ranges of the disk, in order.
/// `done` is told of bytes that are done, and fails where the user wants to stop.
pub fn trim(
    device: &Path,
    volume: &Volume,
    held: &[Range<u64>],
    done: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Outcome> {
    let root = match mount(device, &volume.kind) {
        Ok(root) => root,
        Err(e) => return Ok(Outcome::Skipped(refusal(&volume.kind, &e))),
    };
    let mut freed = 0_u64;
    for (range, len) in pieces(volume, held) {
        done(0)?;
        match trim_range(&root, range) {
            Ok(bytes) => freed = freed.saturating_add(bytes),
            // It ends before the device does, or its blocks are larger than the range.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {
                return Ok(Outcome::Skipped("it cannot discard".into()));
            }
            Err(e) => {
                let why = format!("discarding what is free on {} failed", volume.name());
                let errno = e.raw_os_error().unwrap_or(libc::EIO);
                return Err(Error::why(ErrorKind::Io(errno), why).because(e));
            }
        }
        done(len)?;
    }
    Ok(Outcome::Trimmed(freed))
}

/// How many bytes [`trim`] will tell of.
#[must_use]
pub fn amount(volume: &Volume, held: &[Range<u64>]) -> u64 {
    pieces(volume, held).map(|(_, len)| len).sum()
}

/// Ranges to ask for, each with its length for the progress.
fn pieces<'a>(
    volume: &Volume,
    held: &'a [Range<u64>],
) -> impl Iterator<Item = (Range<u64>, u64)> + use<'a> {
    let (first, end) = (volume.start, volume.start.saturating_add(volume.len));
    let is_linear = matches!(&*volume.kind, "ext" | "xfs");
    // The others have their own idea of what a position is: all of it, in one call.
    let all = (!is_linear).then_some((0..u64::MAX, volume.len));
    let inside = move |range: &Range<u64>| {
        let range = range.start.max(first)..range.end.min(end);
        (range.start < range.end).then(|| range.start - first..range.end - first)
    };
    let held = if is_linear { held } else { &[] };
    let cut = |range: Range<u64>| {
        let (start, end) = (range.start, range.end);
        let count = (end - start).div_ceil(PIECE);
        (0..count).map(move |number| {
            let at = start + number * PIECE;
            let len = PIECE.min(end - at);
            (at..at + len, len)
        })
    };
    all.into_iter()
        .chain(held.iter().filter_map(inside).flat_map(cut))
}

/// The root directory of a mount that is nowhere; the mount goes when it is closed.
fn mount(device: &Path, kind: &str) -> io::Result<File> {
    let device = CString::new(device.as_os_str().as_bytes())?;
    let source = Setting::Text(c"source", &device);
    let careful = [
        source,
        Setting::Flag(c"noinit_itable"),
        Setting::Text(c"errors", c"remount-ro"),
    ];
    let clone = [source, Setting::Flag(c"nouuid")];
    let tries: &[(&CStr, &[Setting<'_>])] = match kind {
        "ext" => &[
            (c"ext4", &careful),
            (c"ext3", &careful[..1]),
            (c"ext2", &careful[..1]),
        ],
        // The host may have another copy of it mounted.
        "xfs" => &[(c"xfs", &clone)],
        "btrfs" => &[(c"btrfs", &clone[..1])],
        "fat" => &[(c"vfat", &clone[..1])],
        "exfat" => &[(c"exfat", &clone[..1])],
        "ntfs" => &[(c"ntfs3", &clone[..1])],
        _ => &[],
    };
    let mut last = io::Error::from_raw_os_error(libc::ENODEV);
    for (fs_type, settings) in tries {
        match detached(fs_type, settings, false) {
            Ok(mount) => {
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                let root = nix::fcntl::openat(&mount, c".", flags, Mode::empty())?;
                return Ok(File::from(root));
            }
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

fn refusal(kind: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENODEV) => format!("this kernel knows no {kind}"),
        Some(libc::EROFS | libc::EACCES) => "it can only be mounted read-only".into(),
        Some(libc::EEXIST) => "another copy of it is mounted".into(),
        _ => format!("it cannot be mounted: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::volumes::Fit;
    use super::*;

    fn volume(kind: &str) -> Volume {
        Volume {
            partition: Some(1),
            start: 1 << 20,
            len: 40 << 30,
            kind: kind.to_owned(),
            fit: Fit::Closed,
        }
    }

    #[test]
    fn only_what_is_held_is_asked_for_in_pieces() {
        let (mib, gib) = (1_u64 << 20, 1_u64 << 30);
        let held = [0..2 * mib, 3 * mib..3 * mib + 33 * gib, 41 * gib..99 * gib];
        let found: Vec<_> = pieces(&volume("xfs"), &held).collect();
        let at = 2 * mib;
        let expected = vec![
            (0..mib, mib),
            (at..at + 16 * gib, 16 * gib),
            (at + 16 * gib..at + 32 * gib, 16 * gib),
            (at + 32 * gib..at + 33 * gib, gib),
        ];
        assert_eq!(found, expected);
        assert_eq!(amount(&volume("ext"), &held), 33 * gib + mib);
    }

    #[test]
    fn who_counts_otherwise_is_asked_for_all() {
        let found: Vec<_> = pieces(&volume("btrfs"), &[]).collect();
        assert_eq!(found, vec![(0..u64::MAX, 40 << 30)]);
    }
}
