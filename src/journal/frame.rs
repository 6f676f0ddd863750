//! Checksums of parts of a file.
//!
//! Imports: `storage` and lower.
//! Never: reads what the host stores as a hole.
//!
//! A part is taken as its blocks of 4096 bytes, of which the first of the file ends at byte 64 and
//! begins again there. A block that holds only zeros counts for nothing; any other is preceded by
//! its place.

use super::{BYTES, FRAME_START, HEAD, MAGIC, RECORD_MAX, ZEROS, read_head};
use crate::error::Result;
use crate::storage::Storage;
use crate::units::{FileOffset, len_u64, len_usize};
use std::ops::Range;

/// Bytes of a block.
const BLOCK: u64 = 4096;

/// CRC-32C of a file from byte 64 to `end`, without the ranges that the first `len` bytes of a
/// journal record.
pub(super) fn frame(journal: &dyn Storage, len: u64, file: &dyn Storage, end: u64) -> Result<u32> {
    let mut skip: Vec<Range<u64>> = Vec::new();
    let mut at = len_u64(MAGIC.len());
    while at < len {
        let head = read_head(journal, at)?;
        if matches!(head.what(), BYTES | ZEROS) && head.place < end {
            skip.push(head.place..head.place.saturating_add(head.len));
        }
        at = at
            .saturating_add(len_u64(HEAD))
            .saturating_add(head.bytes_len());
    }
    skip.sort_unstable_by_key(|range| range.start);
    skip.push(end..end);
    let (mut at, mut crc, mut bytes) = (FRAME_START, 0, Vec::new());
    for range in skip {
        fold(&mut crc, file, at..range.start.min(end), &mut bytes)?;
        at = at.max(range.end);
    }
    Ok(crc)
}

/// Adds a part of a file to a checksum: the blocks of it that hold a byte that is not 0, each with
/// its place. So it does not matter which zeros are holes of the file, and a table of gigabytes
/// that nobody ever wrote to is not read.
pub(super) fn fold(
    crc: &mut u32,
    file: &dyn Storage,
    range: Range<u64>,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    let mut at = range.start;
    let range_end = range.end.min(file.len()?.get());
    while at < range_end {
        let Some(data) = file.next_data(FileOffset::new(at))? else {
            break;
        };
        // Where the host's blocks are smaller, what is between them is zeros.
        at = at.max(data.start.get() / BLOCK * BLOCK);
        let end = data.end.get().next_multiple_of(BLOCK).min(range_end);
        while at < end {
            let len = (end - at).min(RECORD_MAX - at % BLOCK);
            bytes.resize(len_usize(len).unwrap_or(0), 0);
            file.read_at(FileOffset::new(at), bytes)?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let border = match at {
                    ..FRAME_START => FRAME_START,
                    _ => at / BLOCK * BLOCK + BLOCK,
                };
                let len = len_usize(border - at).unwrap_or(0).min(rest.len());
                let (block, more) = rest.split_at(len);
                fold_block(crc, at, block);
                (at, rest) = (at + len_u64(len), more);
            }
        }
    }
    Ok(())
}

pub(super) fn fold_block(crc: &mut u32, at: u64, block: &[u8]) {
    if block.iter().any(|byte| *byte != 0) {
        *crc = crc32c::crc32c_append(*crc, &at.to_le_bytes());
        *crc = crc32c::crc32c_append(*crc, block);
    }
}
