//! The words of a table, in pieces of bounded size.
//!
//! What the host stores as a hole is zeros and is skipped, so that a fresh disk of 16 TiB costs
//! nothing, and no number in a header decides over memory.

use crate::error::Result;
use crate::format::header::HEADER_LEN;
use crate::storage::Storage;
use crate::units::{FileOffset, len_u64};

/// Bytes that are read at a time.
pub const PIECE: usize = 64 * 1024;

/// Calls `each` with the position and the bytes of every piece of `64..end` that has data. Pieces
/// begin and end on borders of 4 bytes; a word that the end of the file cuts is filled up with
/// zeros.
pub fn words(
    storage: &dyn Storage,
    end: FileOffset,
    mut each: impl FnMut(FileOffset, &[u8]) -> Result<()>,
) -> Result<()> {
    let file_end = storage.len()?.get();
    let end = end.get().min(file_end);
    let mut buffer = vec![0; PIECE];
    let mut at = len_u64(HEADER_LEN);
    while at < end {
        let Some(data) = storage.next_data(FileOffset::new(at))? else {
            break;
        };
        // Entries are 4 bytes; a file system's blocks are more, so only the first start can be odd.
        at = at.max(data.start.get() & !3);
        let data_end = data.end.get().min(end);
        while at < data_end {
            // Holes begin on borders of larger blocks: only the end of the file can cut a word.
            let len = (data_end - at).next_multiple_of(4).min(len_u64(PIECE));
            let piece = &mut buffer[..usize::try_from(len).unwrap_or(0)];
            let there = usize::try_from(len.min(file_end - at)).unwrap_or(0);
            storage.read_at(FileOffset::new(at), &mut piece[..there])?;
            piece[there..].fill(0);
            each(FileOffset::new(at), piece)?;
            at += len;
        }
        at = at.max(data_end);
    }
    Ok(())
}

/// The word at an index of a piece.
#[must_use]
pub fn word(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
