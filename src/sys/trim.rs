//! FITRIM: a mounted file system tells its device what it does not use.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// linux/fs.h: `_IOWR('X', 121, struct fstrim_range)`.
const FITRIM: u32 = 0xc018_5879;

/// As linux/fs.h has it.
#[repr(C)]
struct TrimRange {
    start: u64,
    len: u64,
    min_len: u64,
}

/// Discards what is free in a range of the file system that `root` is a directory of; gives the
/// bytes of it.
pub fn trim(root: &File, range: Range<u64>) -> io::Result<u64> {
    let mut asked = TrimRange {
        start: range.start,
        len: range.end.saturating_sub(range.start),
        min_len: 0,
    };
    // SAFETY: `root` is open for the call, and `asked` is a live, exclusively borrowed value of the
    // layout that this request reads and fills.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(root.as_raw_fd(), FITRIM.into(), &mut asked) };
    if result == 0 {
        Ok(asked.len)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_names_the_layout() {
        // Bits 16 to 29 of a request are the size of its argument.
        assert_eq!((FITRIM >> 16 & 0x3fff) as usize, size_of::<TrimRange>());
        let error = trim(&File::open("/proc").unwrap(), 0..1).unwrap_err();
        assert!(error.raw_os_error().is_some());
    }
}
