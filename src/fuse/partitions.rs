//! Which byte ranges of a disk its partition table calls partitions.
//!
//! Imports: `disk`, `units`, `error`.
//! Never: panics, loops or allocates more than a few hundred KiB on a hostile table.
//!
//! The tables are decoded by the crates `gpt` and `mbrman`, but neither bounds itself: `gpt`
//! asserts on odd entry sizes and reserves what the header asks for, `mbrman` follows a chain of
//! extended boot records for as long as its numbers grow and adds them without checking. So the
//! numbers of a GPT header are looked at before its entries are read, and the chain is walked
//! here with one sector handed to the crate at a time.
//!
//! A GPT counts only beside an MBR with an entry of type 0xEE, as it does for Linux; the backup
//! header stands in for a damaged one. Partition numbers are those of Linux: GPT slots from 1,
//! primary entries 1 to 4, logical ones from 5, the extended partition itself not being listed.
//! A range past the end of the disk is dropped or cut; overlapping ones are left alone.

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::units::DiskOffset;
use gpt::disk::LogicalBlockSize;
use mbrman::{MBRHeader, MBRPartitionEntry};
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};

/// More partitions than this are not listed.
pub const PARTITIONS_MAX: usize = 256;

/// GPT headers that ask for more entries than this are refused (the table is then 128 KiB).
const GPT_ENTRIES_MAX: u32 = 1024;

/// The only entry size in use, and the only one that the `gpt` crate reads.
const GPT_ENTRY_BYTES: u32 = 128;

const SECTOR_BYTES: usize = 512;
const SECTOR: u64 = 512;
const GPT_GUARD: u8 = 0xee;

/// What the table says of a partition's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From a GPT: the type GUID and the name.
    Gpt {
        /// Type GUID, upper case with hyphens.
        guid: String,
        /// Name given by the user; may be empty, may hold anything.
        name: String,
    },
    /// From an MBR or an extended boot record: the type byte.
    Mbr(u8),
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// The number that Linux gives it.
    pub number: u32,
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes, at least 1, not past the end of the disk.
    pub len: u64,
    /// What it is for.
    pub kind: Kind,
}

/// Positional reads that are complete or fail.
pub(super) trait Bytes {
    fn size(&self) -> u64;
    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()>;
}

impl Bytes for Disk {
    fn size(&self) -> u64 {
        self.size_bytes()
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_at(DiskOffset::new(at), buf)
            .map_err(io::Error::other)
    }
}

/// The partitions of a disk, by number. A disk without a table has none; only a failing read of the
/// first sector is an error.
pub fn list(disk: &Disk) -> Result<Vec<Partition>> {
    scan(disk)
        .map_err(|e| Error::why(ErrorKind::Io(libc::EIO), "reading the partition table").because(e))
}

fn scan(source: &dyn Bytes) -> io::Result<Vec<Partition>> {
    if source.size() < SECTOR {
        return Ok(Vec::new());
    }
    let mut sector = [0; SECTOR_BYTES];
    source.read(0, &mut sector)?;
    let Some(mbr) = decode(&sector) else {
        return Ok(Vec::new());
    };
    if mbr.iter().any(|(_, entry)| entry.sys == GPT_GUARD) {
        let gpt = [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096]
            .into_iter()
            .find_map(|block| scan_gpt(source, block));
        if let Some(found) = gpt {
            return Ok(found);
        }
    }
    Ok(scan_mbr(source, &mbr))
}

/// Decodes a sector with four entries at byte 446: an MBR, or an extended boot record.
fn decode(sector: &[u8; SECTOR_BYTES]) -> Option<MBRHeader> {
    MBRHeader::read_from(&mut Cursor::new(&sector[..])).ok()
}

fn clip(source: &dyn Bytes, start: u64, len: u64) -> Option<(u64, u64)> {
    let len = len.min(source.size().checked_sub(start)?);
    (len > 0).then_some((start, len))
}

fn scan_gpt(source: &dyn Bytes, block: LogicalBlockSize) -> Option<Vec<Partition>> {
    let unit = block.as_u64();
    // The crate reads the header in block 1 of what it is given. Seen from two blocks before its
    // end, block 1 of the disk is its last one, where the backup header is.
    let bases = [
        Some(0),
        source
            .size()
            .div_euclid(unit)
            .checked_sub(2)
            .map(|lba| lba * unit),
    ];
    bases
        .into_iter()
        .flatten()
        .find_map(|base| scan_gpt_at(source, block, base))
}

fn scan_gpt_at(source: &dyn Bytes, block: LogicalBlockSize, base: u64) -> Option<Vec<Partition>> {
    let mut device = BufReader::with_capacity(
        SECTOR_BYTES,
        Window {
            source,
            base,
            at: 0,
        },
    );
    let header = gpt::header::read_header_from_arbitrary_device(&mut device, block).ok()?;
    if header.part_size != GPT_ENTRY_BYTES || header.num_parts > GPT_ENTRIES_MAX {
        return None;
    }
    let mut device = BufReader::with_capacity(
        1 << 14,
        Window {
            source,
            base: 0,
            at: 0,
        },
    );
    let entries = gpt::partition::file_read_partitions(&mut device, &header, block).ok()?;
    let mut found = Vec::new();
    for (number, entry) in entries
        .into_iter()
        .filter(|(_, e)| e.is_used())
        .take(PARTITIONS_MAX)
    {
        let place = entry.first_lba.checked_mul(block.as_u64()).zip(
            entry
                .last_lba
                .checked_sub(entry.first_lba)
                .and_then(|blocks| blocks.checked_add(1))
                .and_then(|blocks| blocks.checked_mul(block.as_u64())),
        );
        if let Some((start, len)) = place.and_then(|(start, len)| clip(source, start, len)) {
            let guid = entry
                .part_type_guid
                .guid
                .hyphenated()
                .to_string()
                .to_uppercase();
            found.push(Partition {
                number,
                start,
                len,
                kind: Kind::Gpt {
                    guid,
                    name: entry.name,
                },
            });
        }
    }
    Some(found)
}

fn scan_mbr(source: &dyn Bytes, mbr: &MBRHeader) -> Vec<Partition> {
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(mbr.iter().map(|(_, entry)| entry)) {
        if entry.sys != GPT_GUARD && !entry.is_extended() {
            found.extend(partition(source, number, 0, entry));
        }
    }
    let mut number = 5;
    for (_, extended) in mbr.iter().filter(|(_, entry)| entry.is_extended()) {
        for found_here in scan_extended(source, u64::from(extended.starting_lba)) {
            if found.len() < PARTITIONS_MAX {
                found.push(Partition {
                    number,
                    ..found_here
                });
                number += 1;
            }
        }
    }
    found
}

/// Follows a chain of extended boot records, each of which has one partition and the place of the
/// next. A chain that comes back to itself, leaves the disk or grows too long ends there.
fn scan_extended(source: &dyn Bytes, first_lba: u64) -> Vec<Partition> {
    let mut found = Vec::new();
    let mut seen = Vec::new();
    let mut lba = first_lba;
    while seen.len() < PARTITIONS_MAX && !seen.contains(&lba) {
        seen.push(lba);
        let mut sector = [0; SECTOR_BYTES];
        if clip(source, lba * SECTOR, SECTOR).is_none_or(|(_, len)| len < SECTOR)
            || source.read(lba * SECTOR, &mut sector).is_err()
        {
            break;
        }
        // Its third and fourth entries mean nothing and may hold anything.
        sector[478..510].fill(0);
        let Some(record) = decode(&sector) else { break };
        found.extend(partition(source, 0, lba, &record.partition_1));
        if !record.partition_2.is_extended() || record.partition_2.sectors == 0 {
            break;
        }
        lba = first_lba + u64::from(record.partition_2.starting_lba);
    }
    found
}

/// One entry whose start counts from sector `base`. All sectors here are sums of a few 32-bit
/// numbers, so nothing overflows.
fn partition(
    source: &dyn Bytes,
    number: u32,
    base: u64,
    entry: &MBRPartitionEntry,
) -> Option<Partition> {
    if entry.is_unused() || entry.is_extended() {
        return None;
    }
    let start = (base + u64::from(entry.starting_lba)) * SECTOR;
    let (start, len) = clip(source, start, u64::from(entry.sectors) * SECTOR)?;
    Some(Partition {
        number,
        start,
        len,
        kind: Kind::Mbr(entry.sys),
    })
}

/// The disk from `base` on, as the crates want to read it.
struct Window<'a> {
    source: &'a dyn Bytes,
    base: u64,
    at: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let start = self.base.saturating_add(self.at);
        let left = self.source.size().saturating_sub(start);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        if len == 0 {
            return Ok(0);
        }
        self.source.read(start, &mut buf[..len])?;
        self.at = self.at.saturating_add(crate::units::len_u64(len));
        Ok(len)
    }
}

impl Seek for Window<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let end = self.source.size().saturating_sub(self.base);
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => end.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

#[cfg(test)]
#[path = "partitions/tests.rs"]
mod tests;
