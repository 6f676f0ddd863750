//! Pure decisions: a request and the map of its clusters in, steps for the executor out.
//!
//! Imports: `units`, `format`.
//! Never: performs I/O, takes a lock, reads a clock, or allocates on its own.
//!
//! A request is cut at cluster borders. Each piece becomes a [`Segment`] whose value says what the
//! executor does with it, and pieces that are neighbours both on the disk and in one file are
//! merged while they are pushed. A plan holds at most as many segments as its [`Segments`] has room
//! for; what does not fit is planned when the first part has been carried out, so no request, of
//! whatever size, needs memory in proportion to its length. A cluster whose page of the map is not
//! in memory stops the plan with [`Stop::Missing`]: load that page and plan again.
//!
//! [`repair`] decides in the same manner what is wrong with an image and what mends it, and
//! [`merge`] which clusters move when levels become one.

pub mod discard;
pub mod merge;
pub mod read;
pub mod repair;
pub mod request;
pub mod segments;
pub mod write;

use crate::format::layout::PageIndex;
use crate::units::{ClusterSize, DiskCluster, FileOffset, Level};

pub use discard::{Unmapping, plan_discard};
pub use read::{Source, plan_read};
pub use request::{INLINE_ORDER_DEFAULT, RequestOrder};
pub use segments::{Segment, Segments};
pub use write::{Fill, Target, plan_write};

/// Where a disk cluster's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No level maps it: it reads as zeros.
    Hole,
    /// The highest level that maps it, and the first byte of its cluster in that file.
    At {
        /// The level that wins.
        level: Level,
        /// First byte of the cluster in that level's file.
        start: FileOffset,
    },
    /// The entry that wins is invalid: any request that touches the cluster fails.
    Bad,
    /// The page of the map is not in memory.
    Missing(PageIndex),
}

/// What the map says about a disk cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where its content is.
    pub state: State,
    /// A write that gives it a new place is under way.
    pub pending: bool,
    /// A level below the one that wins maps it too, so it must never be unmapped.
    pub covers_lower: bool,
}

/// The map of one chain.
pub trait Lookup {
    /// What is known about a cluster.
    fn look_up(&self, cluster: DiskCluster) -> Mapping;

    /// Bytes of the disk, from its start, that a level has content for. Beyond them its clusters
    /// read as zeros, whatever the file holds there.
    fn readable_end(&self, level: Level) -> u64;
}

/// The numbers of a chain that every plan needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cluster size of the disk.
    pub cluster: ClusterSize,
    /// Length of the disk (of this part) in bytes.
    pub disk_len: u64,
    /// The writable level.
    pub top: Level,
}

impl Geometry {
    /// Bytes of a cluster that belong to the disk: all of it, but for the last one.
    #[must_use]
    pub fn cluster_len(&self, cluster: DiskCluster) -> u64 {
        let start = self.cluster.disk_start(cluster).get();
        self.disk_len
            .saturating_sub(start)
            .min(self.cluster.bytes())
    }
}

/// Why a plan ended before it covered anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Load this page of the map, then plan again.
    Missing(PageIndex),
    /// The cluster's entry is invalid; the request fails.
    Bad(DiskCluster),
    /// Another request is giving this cluster a place; wait for it, then plan again.
    Pending(DiskCluster),
}

/// Calls `each` for every piece of `at..at + len` that lies in one cluster, with the piece's
/// cluster, its offset in the cluster, its offset in the request and its length, until `each`
/// returns `false`. Returns the bytes of the pieces that were taken.
fn for_each_piece<E>(
    cluster_size: ClusterSize,
    at: crate::units::DiskOffset,
    len: u64,
    mut each: impl FnMut(DiskCluster, u64, u64, u64) -> Result<bool, E>,
) -> Result<u64, E> {
    let mut done = 0_u64;
    while done < len {
        let (cluster, within) =
            cluster_size.split(crate::units::DiskOffset::new(at.get().saturating_add(done)));
        let piece = cluster_size
            .bytes()
            .saturating_sub(within)
            .min(len.saturating_sub(done));
        if !each(cluster, within, done, piece)? {
            break;
        }
        done = done.saturating_add(piece);
    }
    Ok(done)
}
