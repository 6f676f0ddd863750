//! Loop devices and their partitions.

use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;

const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_GET_STATUS64: u32 = 0x4c05;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
const BLKPG: u32 = 0x1269;

const FLAG_READ_ONLY: u32 = 1;
const FLAG_AUTOCLEAR: u32 = 4;
const FLAG_PARTSCAN: u32 = 8;
const FLAG_DIRECT_IO: u32 = 16;

const PARTITION_ADD: libc::c_int = 1;
const PARTITION_DELETE: libc::c_int = 2;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct blkpg_partition` of linux/blkpg.h.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg` of linux/blkpg.h.
#[repr(C)]
struct BlkpgArg {
    op: libc::c_int,
    flags: libc::c_int,
    data_len: libc::c_int,
    data: *mut BlkpgPartition,
}

const NO_INFO: LoopInfo = LoopInfo {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// How a loop device is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup<'a> {
    /// Nobody may write through the device.
    pub read_only: bool,
    /// Bytes of the device's logical sector; 0 for the kernel's choice.
    pub block_size: u32,
    /// What the kernel shows as the file's name where it cannot show a path.
    pub name: &'a str,
}

/// What a loop device says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Device number of the file system that the backing file is on.
    pub device: u64,
    /// Inode of the backing file.
    pub inode: u64,
    /// The device goes by itself once its last user has closed it.
    pub autoclear: bool,
    /// The device transfers around the page cache.
    pub direct_io: bool,
}

/// The path of the loop device with this number.
#[must_use]
pub fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// The number of a loop device that was free a moment ago.
pub fn get_free() -> io::Result<u32> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    // SAFETY: `control` is open for the call, and the request takes no argument.
    #[allow(unsafe_code)]
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE.into()) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Puts a file under the loop device, with direct I/O and partitions. EBUSY when another program
/// was faster.
pub fn configure(device: &File, backing: BorrowedFd<'_>, setup: &Setup<'_>) -> io::Result<()> {
    let mut info = NO_INFO;
    info.flags = FLAG_PARTSCAN | FLAG_DIRECT_IO;
    if setup.read_only {
        info.flags |= FLAG_READ_ONLY;
    }
    // The last byte stays zero and ends the name.
    let name = setup.name.bytes().take(info.file_name.len() - 1);
    info.file_name
        .iter_mut()
        .zip(name)
        .for_each(|(to, byte)| *to = byte);
    let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let config = LoopConfig {
        fd,
        block_size: setup.block_size,
        info,
        reserved: [0; 8],
    };
    // SAFETY: both descriptors are open for the call, and `config` is a live value of the layout
    // that this request reads.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE.into(), &config) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Takes the file away, at once or, while the device is in use, when its last user closes it.
pub fn clear(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `device` is borrowed and so open for the call; the request takes no argument.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD.into(), 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What is under the loop device; ENXIO where there is nothing.
pub fn status(device: BorrowedFd<'_>) -> io::Result<Status> {
    let mut info = NO_INFO;
    // SAFETY: `device` is open for the call, and `info` is a live, exclusively borrowed value of
    // the layout that this request fills; any bytes are a valid value of it.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64.into(), &mut info) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Status {
        device: info.device,
        inode: info.inode,
        autoclear: info.flags & FLAG_AUTOCLEAR != 0,
        direct_io: info.flags & FLAG_DIRECT_IO != 0,
    })
}

fn blkpg(device: &File, op: libc::c_int, number: u32, start: u64, len: u64) -> io::Result<()> {
    let number = libc::c_int::try_from(number).map_err(io::Error::other)?;
    let start = i64::try_from(start).map_err(io::Error::other)?;
    let length = i64::try_from(len).map_err(io::Error::other)?;
    let mut partition = BlkpgPartition {
        start,
        length,
        number,
        names: [0; 128],
    };
    let data_len = libc::c_int::try_from(size_of::<BlkpgPartition>()).map_err(io::Error::other)?;
    let arg = BlkpgArg {
        op,
        flags: 0,
        data_len,
        data: &raw mut partition,
    };
    // SAFETY: `device` is open for the call; `arg` and the `partition` it points to are live for
    // it and have the layouts that this request reads.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), BLKPG.into(), &arg) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes a partition of `len` bytes at byte `start` known to the kernel.
pub fn add_partition(device: &File, number: u32, start: u64, len: u64) -> io::Result<()> {
    blkpg(device, PARTITION_ADD, number, start, len)
}

/// Makes the kernel forget a partition; EBUSY while it is in use.
pub fn delete_partition(device: &File, number: u32) -> io::Result<()> {
    blkpg(device, PARTITION_DELETE, number, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
        assert_eq!(size_of::<BlkpgPartition>(), 152);
    }
}
