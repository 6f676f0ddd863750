//! How each kind of file system says whether it was unmounted.

use super::{Bytes, Class, Fit, recognise};
use crate::units::{len_u64, len_usize};
use std::io;

/// The kind of a swap area that holds a suspended system.
pub(super) const SUSPENDED: &str = "suspended system";

/// XFS writes its log in blocks of this size.
const LOG_BLOCK: u64 = 512;
/// The longest log that XFS makes is a block short of this.
const LOG_BYTES_MAX: u64 = 2 << 30;
/// Bytes of the log that are read at a time.
const LOG_STRIDE: u64 = 1 << 20;
/// A header block of the log describes this many bytes of it.
const LOG_HEADER_COVERS: u32 = 32 << 10;

/// What a device has on it.
pub(super) fn of(device: &dyn Bytes) -> io::Result<(&'static str, Fit)> {
    let in_array = "it is a part of something larger";
    if is_raid_at_its_end(device)? {
        return Ok(("RAID", never(in_array)));
    }
    let Some((kind, class)) = recognise(|at, buf| device.read(at, buf)) else {
        return Ok(("", unknown()));
    };
    let fit = match (class, kind) {
        (Class::Member, "LUKS" | "BitLocker") => never("it is encrypted"),
        (Class::Member, _) => never(in_array),
        (Class::Swap, _) => never("it is no file system"),
        (Class::Suspended, _) => return Ok((SUSPENDED, never("it is no file system"))),
        (Class::FileSystem, "ext") => ext(device)?,
        (Class::FileSystem, "xfs") => xfs(device)?,
        (Class::FileSystem, "btrfs") => btrfs(device)?,
        (Class::FileSystem, "fat") => fat(device)?,
        (Class::FileSystem, "exfat") => match le16(device, 106)? & 2 {
            0 => Fit::Closed,
            _ => in_use("it was not unmounted"),
        },
        (Class::FileSystem, "ntfs") => in_use("whether Windows sleeps in it cannot be told"),
        (Class::FileSystem, _) => never("file systems of its kind are not trimmed"),
    };
    Ok((kind, fit))
}

/// Nothing that has a name here.
pub(super) fn unknown() -> Fit {
    never("what it holds is not known")
}

fn never(why: &str) -> Fit {
    Fit::Never(why.to_owned())
}

fn in_use(why: &str) -> Fit {
    Fit::InUse(why.to_owned())
}

fn bytes<const N: usize>(device: &dyn Bytes, at: u64) -> io::Result<[u8; N]> {
    let mut buf = [0; N];
    device.read(at, &mut buf)?;
    Ok(buf)
}

fn le16(device: &dyn Bytes, at: u64) -> io::Result<u16> {
    bytes(device, at).map(u16::from_le_bytes)
}

fn le32(device: &dyn Bytes, at: u64) -> io::Result<u32> {
    bytes(device, at).map(u32::from_le_bytes)
}

fn le64(device: &dyn Bytes, at: u64) -> io::Result<u64> {
    bytes(device, at).map(u64::from_le_bytes)
}

/// XFS has its numbers the other way round.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// The old formats of Linux's arrays, which leave the beginning to what the array holds.
fn is_raid_at_its_end(device: &dyn Bytes) -> io::Result<bool> {
    let size = device.size();
    let places = [
        (size & !0xffff).checked_sub(0x1_0000),
        (size & !0x1ff).checked_sub(0x2000).map(|at| at & !0xfff),
    ];
    for at in places.into_iter().flatten() {
        if le32(device, at)? == 0xa92b_4efc {
            return Ok(true);
        }
    }
    Ok(false)
}

fn ext(device: &dyn Bytes) -> io::Result<Fit> {
    let (state, incompatible) = (le16(device, 0x43a)?, le32(device, 0x460)?);
    let (compatible, orphan) = (le32(device, 0x464)?, le32(device, 0x4e8)?);
    if incompatible & 0x8 != 0 {
        return Ok(never("it is the journal of another file system"));
    }
    if state & 2 != 0 {
        return Ok(in_use("errors are recorded in it"));
    }
    // Mounted, it has its journal to be replayed, or without a journal no mark of being closed.
    if incompatible & 0x4 != 0 || state & 1 == 0 || compatible & 0x1_0000 != 0 || orphan != 0 {
        return Ok(in_use("it was not unmounted"));
    }
    Ok(Fit::Closed)
}

fn btrfs(device: &dyn Bytes) -> io::Result<Fit> {
    if le64(device, 0x1_0088)? != 1 {
        return Ok(never("it is one of several devices"));
    }
    // A log tree is there only between an fsync and the commit that follows.
    Ok(match le64(device, 0x1_0060)? {
        0 => Fit::Closed,
        _ => in_use("it was not unmounted"),
    })
}

fn fat(device: &dyn Bytes) -> io::Result<Fit> {
    let at = match &bytes(device, 0x52)? {
        b"FAT32" => 0x41,
        _ => 0x25,
    };
    let [state] = bytes(device, at)?;
    Ok(match state & 3 {
        0 => Fit::Closed,
        _ => in_use("it was not unmounted"),
    })
}

/// The log tells: its last record is that of an unmount.
fn xfs(device: &dyn Bytes) -> io::Result<Fit> {
    let block: [u8; 128] = bytes(device, 0)?;
    let field = |at: usize, len: usize| number(&block[at..at + len]);
    let (log_start, log_blocks) = (field(48, 8), field(96, 4));
    if log_start == 0 {
        return Ok(never("its log is on another device"));
    }
    let (group_shift, block_shift) = (block[124], block[120]);
    let place = || {
        let mask = 1_u64.checked_shl(group_shift.into())?.checked_sub(1)?;
        let group = log_start.checked_shr(group_shift.into())?;
        let blocks = group.checked_mul(field(84, 4))?;
        let blocks = blocks.checked_add(log_start & mask)?;
        let bytes = 1_u64.checked_shl(block_shift.into())?;
        Some((blocks.checked_mul(bytes)?, log_blocks.checked_mul(bytes)?))
    };
    let broken = in_use("its log makes no sense");
    let Some((start, len)) = place().filter(|(_, len)| *len <= LOG_BYTES_MAX) else {
        return Ok(broken);
    };
    match last_record(device, start, len) {
        Ok(Some(true)) => Ok(Fit::Closed),
        Ok(Some(false)) => Ok(in_use("it was not unmounted")),
        Ok(None) => Ok(broken),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(broken),
        Err(e) => Err(e),
    }
}

/// Whether the newest record of a log is that of an unmount; `None` without any.
fn last_record(device: &dyn Bytes, start: u64, len: u64) -> io::Result<Option<bool>> {
    let mut newest: Option<(u64, u64)> = None;
    let mut buf = vec![0; len_usize(LOG_STRIDE.min(len)).unwrap_or(0)];
    let mut at = 0;
    while at < len {
        let piece = &mut buf[..len_usize((len - at).min(LOG_STRIDE)).unwrap_or(0)];
        device.read(start + at, piece)?;
        for (block, from) in piece.chunks_exact(512).zip((at..).step_by(512)) {
            if block[..4] != [0xfe, 0xed, 0xba, 0xbe] {
                continue;
            }
            // The cycle, and the block at which the record begins.
            let position = number(&block[16..24]);
            if position & 0xffff_ffff == from / LOG_BLOCK && newest.is_none_or(|n| n.0 < position) {
                newest = Some((position, from));
            }
        }
        at += len_u64(piece.len());
    }
    let Some((_, at)) = newest else {
        return Ok(None);
    };
    let header: [u8; 512] = bytes(device, start + at)?;
    let field = |at: usize| u32::try_from(number(&header[at..at + 4])).unwrap_or(0);
    let headers = match (field(8) & 2, field(320)) {
        (2, size) if size > LOG_HEADER_COVERS => u64::from(size.div_ceil(LOG_HEADER_COVERS)),
        _ => 1,
    };
    // The log is a ring.
    let body = (at + headers * LOG_BLOCK) % len;
    let operation: [u8; 12] = bytes(device, start + body)?;
    Ok(Some(field(40) == 1 && operation[9] & 0x20 != 0))
}
