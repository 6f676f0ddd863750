//! Decides which bytes of which delta answer a read.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::segments::{Merge, Segment, Segments};
use super::{Geometry, Lookup, State, Stop, for_each_piece};
use crate::units::{DiskOffset, FileOffset, Level};

/// Where the bytes of a segment come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Zeros.
    Zeros,
    /// The file of a level, from this byte on.
    Data {
        /// The level whose file it is.
        level: Level,
        /// First byte in that file.
        at: FileOffset,
    },
}

impl Merge for Source {
    #[inline]
    fn merge(self, len: u64, next: Self) -> Option<Self> {
        match (self, next) {
            (Self::Zeros, Self::Zeros) => Some(Self::Zeros),
            (
                Self::Data { level, at },
                Self::Data {
                    level: next_level,
                    at: next_at,
                },
            ) if level == next_level && at.checked_add(len) == Some(next_at) => Some(self),
            _ => None,
        }
    }
}

/// Plans a read of `len` bytes at `at`, both already clipped to the disk, as far as `segments` has
/// room. Returns the bytes covered, at least one piece unless `len` is 0.
#[inline]
pub fn plan_read(
    map: &impl Lookup,
    geometry: &Geometry,
    at: DiskOffset,
    len: u64,
    segments: &mut Segments<Source>,
) -> Result<u64, Stop> {
    for_each_piece(
        geometry.cluster,
        at,
        len,
        |cluster, within, start, piece| {
            let (level, cluster_start) = match map.look_up(cluster).state {
                State::At { level, start } => (level, start),
                State::Hole => {
                    return Ok(segments.push(Segment {
                        start,
                        len: piece,
                        what: Source::Zeros,
                    }));
                }
                State::Bad => return Err(Stop::Bad(cluster)),
                // What has been planned so far can be carried out before the page is loaded.
                State::Missing(_) if start > 0 => return Ok(false),
                State::Missing(page) => return Err(Stop::Missing(page)),
            };
            let disk_at = at.get().saturating_add(start);
            let readable = map.readable_end(level).saturating_sub(disk_at).min(piece);
            let file_at = cluster_start.saturating_add(within);
            let data = Source::Data { level, at: file_at };
            if readable == piece {
                return Ok(segments.push(Segment {
                    start,
                    len: piece,
                    what: data,
                }));
            }
            if readable == 0 {
                return Ok(segments.push(Segment {
                    start,
                    len: piece,
                    what: Source::Zeros,
                }));
            }
            // The level's own disk ends within this piece: data, then zeros. Both halves need room;
            // where there is room for one only, the piece waits for the next plan.
            if !segments.has_room(2) {
                return Ok(false);
            }
            let (tail_start, tail) = (
                start.saturating_add(readable),
                piece.saturating_sub(readable),
            );
            Ok(segments.push(Segment {
                start,
                len: readable,
                what: data,
            }) && segments.push(Segment {
                start: tail_start,
                len: tail,
                what: Source::Zeros,
            }))
        },
    )
}
