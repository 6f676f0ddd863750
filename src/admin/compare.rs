//! Whether two disks of any kind have the same bytes.
//!
//! Only what is data on one side or the other is read. Where one disk is longer, what it has more
//! must be zeros: converting a disk rounds its size up.

use crate::admin::progress::Progress;
use crate::admin::source::Source;
use crate::admin::source::work::{DataCursor, first_data, first_difference, in_order, read_padded};
use crate::error::Result;
use crate::units::len_usize;
use serde::Serialize;

/// Bytes that are compared at a time.
const PIECE: u64 = 1 << 20;

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// The same content.
    pub equal: bool,
    /// The sizes of both disks.
    pub size_bytes: [u64; 2],
    /// The first byte in which they differ.
    pub first_difference: Option<u64>,
}

/// A range of the disks and which of them have data there.
#[derive(Debug)]
struct Piece {
    start: u64,
    len: u64,
    has: [bool; 2],
    /// Up to here nothing is left to compare before it.
    before: u64,
}

/// Compares two disks. With `strict` disks of different sizes differ, whatever is in them.
pub fn compare(
    a: &dyn Source,
    b: &dyn Source,
    strict: bool,
    progress: &Progress,
) -> Result<Compared> {
    let size_bytes = [a.size(), b.size()];
    let (shorter, longer) = (a.size().min(b.size()), a.size().max(b.size()));
    let mut compared = Compared {
        equal: true,
        size_bytes,
        first_difference: None,
    };
    if strict && shorter < longer {
        compared.equal = false;
        return Ok(compared);
    }
    for source in [a, b] {
        source.prepare(progress)?;
    }
    progress.step("comparing", longer);
    let mut cursors = [DataCursor::new(a), DataCursor::new(b)];
    let mut at = 0;
    let pieces = std::iter::from_fn(|| {
        let piece = next_piece(&mut cursors, at).transpose();
        if let Some(Ok(piece)) = &piece {
            at = piece.start.saturating_add(piece.len);
        }
        piece
    });
    in_order(
        pieces,
        progress,
        |piece, buffers| {
            let (first, second) = buffers.two(len_usize(piece.len).unwrap_or(0))?;
            let found = match piece.has {
                [true, true] => {
                    read_padded(a, piece.start, first)?;
                    read_padded(b, piece.start, second)?;
                    first_difference(first, second)
                }
                [has_a, _] => {
                    let source = if has_a { a } else { b };
                    read_padded(source, piece.start, first)?;
                    first_data(first)
                }
            };
            let end = piece.start.saturating_add(piece.len);
            progress.add(end.saturating_sub(piece.before));
            Ok(found)
        },
        |piece, found| {
            if let Some(within) = found {
                compared.equal = false;
                compared.first_difference = Some(piece.start.saturating_add(within));
            }
            Ok(found.is_none())
        },
    )?;
    Ok(compared)
}

/// The next range from `at` on in which the same of the two have data.
fn next_piece(cursors: &mut [DataCursor<'_>; 2], at: u64) -> Result<Option<Piece>> {
    let [a, b] = cursors;
    let found = [a.at(at)?, b.at(at)?];
    let Some(start) = found.iter().flatten().map(|range| range.start).min() else {
        return Ok(None);
    };
    let mut end = start.next_multiple_of(PIECE).max(start.saturating_add(1));
    if start % PIECE == 0 {
        end = start.saturating_add(PIECE);
    }
    let mut has = [false; 2];
    for (has, range) in has.iter_mut().zip(&found) {
        let Some(range) = range else {
            continue;
        };
        *has = range.start <= start;
        end = end.min(if *has { range.end } else { range.start });
    }
    Ok(Some(Piece {
        start,
        len: end - start,
        has,
        before: at,
    }))
}
