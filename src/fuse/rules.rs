//! Which changes the mounted file takes, as a disk of fixed size that looks like a file.
//!
//! Imports: nothing of this crate.
//! Never: touches a disk, a node or a reply; every rule is a function of numbers.

use fuser::Errno;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The part of the disk that a `fallocate` zeroes, as start and length.
///
/// Punching and zeroing both make the range read as zeros: loop's write-zeroes may arrive as
/// either. Both keep the size, so what lies past the end is cut off, as every file system does. All
/// else is EOPNOTSUPP and never ENOSYS, after which the kernel would not ask again, not even to
/// punch.
pub(crate) fn fallocate(
    mode: i32,
    at: u64,
    len: u64,
    size: u64,
) -> Result<Option<(u64, u64)>, Errno> {
    if mode != PUNCH && mode != ZERO {
        return Err(Errno::EOPNOTSUPP);
    }
    if len == 0 {
        return Err(Errno::EINVAL);
    }
    let end = at
        .checked_add(len)
        .filter(|end| i64::try_from(*end).is_ok())
        .ok_or(Errno::EFBIG)?;
    let inside = end.min(size).saturating_sub(at);
    Ok((inside > 0).then_some((at, inside)))
}

/// Refuses a write that would make the disk grow, all of it: a short write is never answered, and
/// the part that fits is worth nothing to who wrote the wrong image.
pub(crate) fn write(at: u64, len: usize, size: u64) -> Result<(), Errno> {
    let end = u64::try_from(len)
        .ok()
        .and_then(|len| at.checked_add(len))
        .ok_or(Errno::EFBIG)?;
    if end <= size {
        Ok(())
    } else {
        Err(Errno::EFBIG)
    }
}

/// Bytes that a read of `len` at `at` answers: all of them, but for the end of the disk.
#[must_use]
pub(crate) fn read_len(at: u64, len: u32, size: u64) -> usize {
    let inside = u64::from(len).min(size.saturating_sub(at));
    usize::try_from(inside).unwrap_or(0)
}

/// What a file of the mount is, as far as `setattr` is concerned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Present {
    /// Size in bytes.
    pub(crate) size: u64,
    /// Permission bits.
    pub(crate) perm: u16,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Whether the bytes can be written.
    pub(crate) writable: bool,
}

/// What `setattr` asks for, without times, which are always taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// New mode, with or without the file type.
    pub(crate) mode: Option<u32>,
    /// New owner.
    pub(crate) uid: Option<u32>,
    /// New group.
    pub(crate) gid: Option<u32>,
    /// New size.
    pub(crate) size: Option<u64>,
}

/// Refuses whatever would change the size, the owner or the mode, and takes what asks for the state
/// that is there already, as careful programs do.
///
/// O_TRUNC comes here as size 0: were it taken, the kernel would believe an empty file.
pub(crate) fn setattr(now: Present, wanted: Wanted) -> Result<(), Errno> {
    if !now.writable {
        return Err(Errno::EROFS);
    }
    let same_mode = wanted
        .mode
        .is_none_or(|mode| mode & 0o7777 == u32::from(now.perm));
    let same_owner = wanted.uid.is_none_or(|uid| uid == now.uid);
    let same_group = wanted.gid.is_none_or(|gid| gid == now.gid);
    let same_size = wanted.size.is_none_or(|size| size == now.size);
    if same_mode && same_owner && same_group && same_size {
        Ok(())
    } else {
        Err(Errno::EPERM)
    }
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    /// The next byte that may differ from zero.
    Data,
    /// The next byte of a hole; the end of the file counts as one.
    Hole,
}

/// Reads the arguments of `lseek`: the position and what is sought.
pub(crate) fn seek(at: i64, whence: i32, size: u64) -> Result<(u64, Seek), Errno> {
    let sought = match whence {
        libc::SEEK_DATA => Seek::Data,
        libc::SEEK_HOLE => Seek::Hole,
        _ => return Err(Errno::EINVAL),
    };
    let at = u64::try_from(at).map_err(|_| Errno::ENXIO)?;
    if at < size {
        Ok((at, sought))
    } else {
        Err(Errno::ENXIO)
    }
}

/// The numbers of `statfs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Statfs {
    /// Size of the file system in units of [`Statfs::UNIT`].
    pub(crate) blocks: u64,
    /// How much of it is free.
    pub(crate) free: u64,
    /// What loop takes its discard granularity from.
    pub(crate) bsize: u32,
}

impl Statfs {
    /// Bytes that `blocks` and `free` count in (`f_frsize`).
    pub(crate) const UNIT: u32 = 4096;

    /// The numbers of a disk. Cluster sizes that no power of two are only ever read, and a queue
    /// limit of such a size would be refused, so they show as the unit.
    #[must_use]
    pub(crate) fn of(size: u64, cluster: u64, allocated: u64) -> Self {
        let unit = u64::from(Self::UNIT);
        let bsize = u32::try_from(cluster)
            .ok()
            .filter(|c| c.is_power_of_two() && *c >= 512);
        Self {
            blocks: size.div_ceil(unit),
            free: size.saturating_sub(allocated).div_euclid(unit),
            bsize: bsize.unwrap_or(Self::UNIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    #[test]
    fn every_fallocate_mode_but_two_is_not_supported() {
        for mode in -1..=0x1ff {
            let answer = fallocate(mode, 0, 512, SIZE);
            match mode {
                0x03 | 0x11 => assert_eq!(answer, Ok(Some((0, 512))), "mode {mode:#x}"),
                _ => assert_eq!(answer, Err(Errno::EOPNOTSUPP), "mode {mode:#x}"),
            }
        }
    }

    #[test]
    fn fallocate_ranges_are_cut_at_the_end() {
        let max = u64::MAX;
        for mode in [0x03, 0x11] {
            let cases = [
                (0, SIZE, Ok(Some((0, SIZE)))),
                (1, 1, Ok(Some((1, 1)))),
                (0, SIZE + 1, Ok(Some((0, SIZE)))),
                (SIZE - 1, 4096, Ok(Some((SIZE - 1, 1)))),
                (SIZE, 1, Ok(None)),
                (SIZE + 7, 1 << 40, Ok(None)),
                (0, 0, Err(Errno::EINVAL)),
                (SIZE, 0, Err(Errno::EINVAL)),
                (1, max, Err(Errno::EFBIG)),
                (max, 1, Err(Errno::EFBIG)),
                (0, 1 << 63, Err(Errno::EFBIG)),
            ];
            for (at, len, expected) in cases {
                assert_eq!(
                    fallocate(mode, at, len, SIZE),
                    expected,
                    "{mode:#x} {at} {len}"
                );
            }
        }
    }

    #[test]
    fn no_write_grows_the_disk() {
        assert_eq!(write(0, 1 << 20, SIZE), Ok(()));
        assert_eq!(write(SIZE, 0, SIZE), Ok(()));
        assert_eq!(write(SIZE, 1, SIZE), Err(Errno::EFBIG));
        assert_eq!(write(SIZE - 1, 2, SIZE), Err(Errno::EFBIG));
        assert_eq!(write(u64::MAX, 2, SIZE), Err(Errno::EFBIG));
    }

    #[test]
    fn reads_are_short_at_the_end_only() {
        assert_eq!(read_len(0, 4096, SIZE), 4096);
        assert_eq!(read_len(SIZE - 100, 4096, SIZE), 100);
        assert_eq!(read_len(SIZE, 4096, SIZE), 0);
        assert_eq!(read_len(u64::MAX, u32::MAX, SIZE), 0);
    }

    #[test]
    fn only_what_is_there_already_can_be_set() {
        let now = Present {
            size: SIZE,
            perm: 0o600,
            uid: 7,
            gid: 8,
            writable: true,
        };
        let none = Wanted::default();
        assert_eq!(setattr(now, none), Ok(()));
        assert_eq!(
            setattr(
                now,
                Wanted {
                    size: Some(SIZE),
                    ..none
                }
            ),
            Ok(())
        );
        assert_eq!(
            setattr(
                now,
                Wanted {
                    mode: Some(0o100_600),
                    ..none
                }
            ),
            Ok(())
        );
        for wanted in [
            Wanted {
                size: Some(0),
                ..none
            },
            Wanted {
                size: Some(SIZE + 1),
                ..none
            },
            Wanted {
                mode: Some(0o644),
                ..none
            },
            Wanted {
                uid: Some(0),
                ..none
            },
            Wanted {
                gid: Some(0),
                ..none
            },
        ] {
            assert_eq!(setattr(now, wanted), Err(Errno::EPERM), "{wanted:?}");
        }
        let frozen = Present {
            writable: false,
            ..now
        };
        assert_eq!(setattr(frozen, none), Err(Errno::EROFS));
    }

    #[test]
    fn seeks_end_with_the_file() {
        assert_eq!(seek(0, libc::SEEK_DATA, SIZE), Ok((0, Seek::Data)));
        assert_eq!(seek(5, libc::SEEK_HOLE, SIZE), Ok((5, Seek::Hole)));
        assert_eq!(seek(1 << 20, libc::SEEK_HOLE, SIZE), Err(Errno::ENXIO));
        assert_eq!(seek(-1, libc::SEEK_DATA, SIZE), Err(Errno::ENXIO));
        assert_eq!(seek(0, libc::SEEK_END, SIZE), Err(Errno::EINVAL));
    }

    #[test]
    fn df_sees_a_disk_of_the_right_size() {
        let full = Statfs::of(10 << 20, 1 << 20, 4 << 20);
        assert_eq!(
            full,
            Statfs {
                blocks: 2560,
                free: 1536,
                bsize: 1 << 20
            }
        );
        assert_eq!(
            Statfs::of(10 << 20, 63 * 512, 99 << 20),
            Statfs {
                blocks: 2560,
                free: 0,
                bsize: 4096
            }
        );
    }
}
