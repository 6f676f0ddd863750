//! What a header may say, and is read and written by, that other programs mind or nobody expects.
//!
//! Imports: `format::header`, `format::layout`.
//! Never: refuses anything; what cannot be read or written is a
//! [`HeaderError`](crate::format::header::HeaderError).
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::header::{FLAG_CONVERTING, FLAG_EMPTY, Header};
use thiserror::Error;

/// Cluster sizes that ploop's tools and kernel drivers take: powers of two, in sectors.
const PLOOP_CLUSTER_SECTORS: std::ops::RangeInclusive<u64> = 64..=131_072;

/// Something that is tolerated in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HeaderOddity {
    /// A cluster size that matters to ploop only.
    #[error(
        "clusters of {0} sectors, which ploop's tools and kernel drivers refuse: they want a power \
         of two from 64 to 131072"
    )]
    ClusterSize(u64),
    /// At least one entry more than the disk has clusters.
    #[error(
        "{entries} BAT entries for a disk of {needed} clusters; those past its end are ignored"
    )]
    ExtraEntries {
        /// Entries there are.
        entries: u64,
        /// Entries that the size asks for.
        needed: u64,
    },
    /// Data starts later than it could.
    #[error(
        "the first block lies at sector {first} where sector {minimum} would do, so the kernel's \
         dm-ploop refuses the image"
    )]
    LateFirstBlock {
        /// `m_FirstBlockOffset`.
        first: u64,
        /// The least multiple of the cluster size that the table leaves room for.
        minimum: u64,
    },
    /// Bits of `m_Flags` without a known meaning.
    #[error("unknown bits in m_Flags ({0:#x})")]
    Flags(u32),
}

impl HeaderOddity {
    /// True where only those who write to the image need to know.
    #[must_use]
    pub fn is_for_writers(self) -> bool {
        matches!(self, Self::ClusterSize(_))
    }
}

/// All that is odd about a header.
#[must_use]
pub fn of(header: &Header) -> Vec<HeaderOddity> {
    let layout = header.layout();
    let cluster = layout.cluster();
    let sectors = cluster.sectors().get();
    let mut odd = Vec::new();
    if !sectors.is_power_of_two() || !PLOOP_CLUSTER_SECTORS.contains(&sectors) {
        odd.push(HeaderOddity::ClusterSize(sectors));
    }
    let entries = u64::from(layout.entry_count());
    let needed = cluster.count_for(header.size_bytes()).get();
    if entries > needed {
        odd.push(HeaderOddity::ExtraEntries { entries, needed });
    }
    let first = layout.first_block().get();
    let minimum = cluster.count_for(layout.table_end().get()).get();
    let minimum = minimum.saturating_mul(sectors);
    if first > minimum {
        odd.push(HeaderOddity::LateFirstBlock { first, minimum });
    }
    let unknown = header.raw().flags & !(FLAG_EMPTY | FLAG_CONVERTING);
    if unknown != 0 {
        odd.push(HeaderOddity::Flags(unknown));
    }
    odd
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::{MAGIC_V2, RawHeader};
    use crate::units::FileOffset;

    fn odd(change: impl FnOnce(&mut RawHeader)) -> Vec<HeaderOddity> {
        // A 10 MiB disk of 32 KiB clusters, as any writer makes it.
        let mut raw = RawHeader {
            magic: MAGIC_V2,
            disk_type: 2,
            heads: 16,
            cylinders: 40,
            cluster_sectors: 64,
            entry_count: 320,
            size_in_sectors: 20480,
            in_use: 0,
            first_block: 64,
            flags: FLAG_EMPTY,
            extension: 0,
        };
        change(&mut raw);
        of(&Header::validate(&raw, FileOffset::new(1 << 20)).unwrap())
    }

    #[test]
    fn only_what_is_odd_is_told() {
        assert_eq!(odd(|_| {}), []);
        // The last cluster may be partial.
        assert_eq!(odd(|h| h.size_in_sectors -= 63), []);
        assert_eq!(
            odd(|h| h.size_in_sectors -= 64),
            [HeaderOddity::ExtraEntries {
                entries: 320,
                needed: 319
            }]
        );
        assert_eq!(
            odd(|h| h.first_block = 128),
            [HeaderOddity::LateFirstBlock {
                first: 128,
                minimum: 64
            }]
        );
        assert_eq!(
            odd(|h| h.flags = u32::MAX),
            [HeaderOddity::Flags(u32::MAX - 3)]
        );
        assert_eq!(
            odd(|h| {
                h.cluster_sectors = 72;
                h.first_block = 72;
                h.size_in_sectors = 320 * 72;
            }),
            [HeaderOddity::ClusterSize(72)]
        );
    }
}
