//! Decides how whole clusters come to read as zeros, with what is below them in mind.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::{Geometry, Lookup, State, Stop};
use crate::units::{DiskCluster, FileOffset};

/// How one whole cluster becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapping {
    /// It reads as zeros already.
    Nothing,
    /// Only the top maps it: its entry becomes 0 and its file cluster is freed.
    Unmap {
        /// First byte of the file cluster that is freed.
        at: FileOffset,
    },
    /// A lower level maps it too, which an entry of 0 would uncover: the entry stays, the file
    /// cluster is punched.
    ZeroInPlace {
        /// First byte of the file cluster.
        at: FileOffset,
    },
    /// Only a lower level maps it: a file cluster without blocks of its own covers that.
    MaskWithZeros,
}

/// Plans the discard of one whole cluster (whole as far as the disk goes).
pub fn plan_discard(
    map: &impl Lookup,
    geometry: &Geometry,
    cluster: DiskCluster,
) -> Result<Unmapping, Stop> {
    let mapping = map.look_up(cluster);
    if mapping.pending {
        return Err(Stop::Pending(cluster));
    }
    match mapping.state {
        State::Hole => Ok(Unmapping::Nothing),
        State::At { level, start } if level == geometry.top => Ok(if mapping.covers_lower {
            Unmapping::ZeroInPlace { at: start }
        } else {
            Unmapping::Unmap { at: start }
        }),
        State::At { .. } => Ok(Unmapping::MaskWithZeros),
        State::Bad => Err(Stop::Bad(cluster)),
        State::Missing(page) => Err(Stop::Missing(page)),
    }
}
