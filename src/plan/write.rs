//! Decides where the bytes of a write go, and what must fill the rest of a fresh cluster.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::segments::{Merge, Segment, Segments};
use super::{Geometry, Lookup, State, Stop, for_each_piece};
use crate::units::{DiskCluster, DiskOffset, FileOffset, Level};

/// What becomes of the bytes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Zeros into a hole: nothing to do.
    Nothing,
    /// The top maps the cluster: write into its file.
    InPlace {
        /// First byte in the top's file.
        at: FileOffset,
    },
    /// The cluster needs a place in the top's file first.
    Fresh {
        /// The disk cluster.
        cluster: DiskCluster,
        /// Offset of the segment in the cluster.
        within: u64,
        /// What the bytes around the segment are.
        fill: Fill,
    },
}

/// What the bytes of a fresh cluster are that the write does not cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The write covers the cluster as far as the disk goes.
    Whole,
    /// Zeros: no level maps the cluster.
    Zeros,
    /// The content that a lower level has for the cluster.
    Copy {
        /// The level that maps it.
        level: Level,
        /// First byte of the cluster in that level's file.
        start: FileOffset,
        /// Bytes of the cluster that the level has content for; the rest is zeros.
        len: u64,
    },
}

impl Merge for Target {
    #[inline]
    fn merge(self, len: u64, next: Self) -> Option<Self> {
        match (self, next) {
            (Self::Nothing, Self::Nothing) => Some(Self::Nothing),
            (Self::InPlace { at }, Self::InPlace { at: next_at })
                if at.checked_add(len) == Some(next_at) =>
            {
                Some(self)
            }
            _ => None,
        }
    }
}

/// Plans a write of `len` bytes at `at`, both within the disk, as far as `segments` has room.
/// `is_zero` tells whether a range of the payload (start, length) is all zeros; it is asked only
/// where that would save a cluster. Returns the bytes covered: at least one piece, unless `len` is
/// 0.
#[inline]
pub fn plan_write(
    map: &impl Lookup,
    geometry: &Geometry,
    at: DiskOffset,
    len: u64,
    is_zero: impl Fn(u64, u64) -> bool,
    segments: &mut Segments<Target>,
) -> Result<u64, Stop> {
    for_each_piece(
        geometry.cluster,
        at,
        len,
        |cluster, within, start, piece| {
            let mapping = map.look_up(cluster);
            if mapping.pending {
                return if start > 0 {
                    Ok(false)
                } else {
                    Err(Stop::Pending(cluster))
                };
            }
            let whole = within == 0 && piece == geometry.cluster_len(cluster);
            let what = match mapping.state {
                State::At { level, start: at } if level == geometry.top => Target::InPlace {
                    at: at.saturating_add(within),
                },
                State::At { .. } if whole => Target::Fresh {
                    cluster,
                    within,
                    fill: Fill::Whole,
                },
                State::At { level, start } => {
                    let cluster_at = geometry.cluster.disk_start(cluster).get();
                    let len = map.readable_end(level).saturating_sub(cluster_at);
                    let len = len.min(geometry.cluster_len(cluster));
                    Target::Fresh {
                        cluster,
                        within,
                        fill: Fill::Copy { level, start, len },
                    }
                }
                State::Hole if is_zero(start, piece) => Target::Nothing,
                State::Hole if whole => Target::Fresh {
                    cluster,
                    within,
                    fill: Fill::Whole,
                },
                State::Hole => Target::Fresh {
                    cluster,
                    within,
                    fill: Fill::Zeros,
                },
                State::Bad => return Err(Stop::Bad(cluster)),
                State::Missing(_) if start > 0 => return Ok(false),
                State::Missing(page) => return Err(Stop::Missing(page)),
            };
            Ok(segments.push(Segment {
                start,
                len: piece,
                what,
            }))
        },
    )
}
