//! Numbers with meaning: positions on the disk, positions in a file, and the units they count in.
//!
//! Imports: nothing.
//! Never: performs I/O, uses `as`, or lets a disk position be added to a file position.
//!
//! `disk_*` names a position on the flat disk that users see, `file_*` one in an image file on the
//! host. The two never mix without the map between them, so they are different types and only the
//! operators that make sense exist.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use std::fmt;

/// Bytes in the sector that the image format counts in.
pub const SECTOR: u64 = 512;

/// Widens a length in memory to the file-sized integers used everywhere else.
///
/// Lossless on every target that has at most 64-bit pointers, which is all that Linux runs on.
#[must_use]
pub fn len_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Narrows a file-sized length to a length in memory, or `None` where it does not fit.
#[must_use]
pub fn len_usize(len: u64) -> Option<usize> {
    usize::try_from(len).ok()
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0);

            /// Wraps a plain number.
            #[must_use]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The plain number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{}", $unit), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number!(
    /// A byte position on the flat disk.
    DiskOffset, " B (disk)"
);
number!(
    /// The number of a cluster on the flat disk (of one part, where the disk is split).
    DiskCluster, " (disk cluster)"
);
number!(
    /// A byte position in an image file.
    FileOffset, " B (file)"
);
number!(
    /// The number of a cluster in an image file, counted from byte 0 of the file.
    FileCluster, " (file cluster)"
);
number!(
    /// A number of clusters.
    ClusterCount, " clusters"
);
number!(
    /// A number of 512-byte sectors.
    SectorCount, " sectors"
);

impl SectorCount {
    /// The same length in bytes, or `None` where that overflows 64 bits.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR)
    }
}

impl DiskOffset {
    /// The position `len` bytes further on, or `None` on overflow.
    #[must_use]
    pub fn checked_add(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(Self)
    }
}

impl FileOffset {
    /// The position `len` bytes further on, or `None` on overflow.
    #[must_use]
    pub fn checked_add(self, len: u64) -> Option<Self> {
        self.0.checked_add(len).map(Self)
    }

    /// The position `len` bytes further on; the end of the number space on overflow, which no file
    /// reaches, so the operation that uses it fails with the host's own error.
    #[must_use]
    pub fn saturating_add(self, len: u64) -> Self {
        Self(self.0.saturating_add(len))
    }
}

/// Size of a cluster: a whole, non-zero number of sectors below 2 GiB.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterSize {
    bytes: u64,
    /// log2 of `bytes` where that is exact: divisions on the hot path become shifts.
    shift: Option<u32>,
}

impl ClusterSize {
    /// Most sectors in a cluster that any known reader accepts (QEMU: `i32::MAX / 513`).
    pub const SECTORS_MAX: u32 = 4_186_127;

    /// A cluster of this many sectors, or `None` for 0 and for more than [`Self::SECTORS_MAX`].
    #[must_use]
    pub fn from_sectors(sectors: u32) -> Option<Self> {
        if sectors == 0 || sectors > Self::SECTORS_MAX {
            return None;
        }
        let bytes = u64::from(sectors).checked_mul(SECTOR)?;
        let shift = bytes.is_power_of_two().then(|| bytes.trailing_zeros());
        Some(Self { bytes, shift })
    }

    /// Bytes in a cluster.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Sectors in a cluster.
    #[must_use]
    pub fn sectors(self) -> SectorCount {
        SectorCount(self.bytes.div_euclid(SECTOR))
    }

    /// True when the size is a power of two, as every driver but QEMU's demands.
    #[must_use]
    pub const fn is_power_of_two(self) -> bool {
        self.shift.is_some()
    }

    /// Cuts a disk position into its cluster and the offset within it.
    #[must_use]
    #[inline]
    pub fn split(self, at: DiskOffset) -> (DiskCluster, u64) {
        let (cluster, within) = self.divide(at.0);
        (DiskCluster(cluster), within)
    }

    /// First byte of a disk cluster; saturates at the end of the number space.
    #[must_use]
    #[inline]
    pub fn disk_start(self, cluster: DiskCluster) -> DiskOffset {
        DiskOffset(cluster.0.saturating_mul(self.bytes))
    }

    /// First byte of a file cluster; saturates at the end of the number space.
    #[must_use]
    #[inline]
    pub fn file_start(self, cluster: FileCluster) -> FileOffset {
        FileOffset(cluster.0.saturating_mul(self.bytes))
    }

    /// The whole clusters that fit below a file position.
    #[must_use]
    pub fn whole_below(self, end: FileOffset) -> FileCluster {
        FileCluster(self.divide(end.0).0)
    }

    /// Clusters needed for this many bytes, rounded up.
    #[must_use]
    pub fn count_for(self, bytes: u64) -> ClusterCount {
        let (whole, rest) = self.divide(bytes);
        ClusterCount(whole.saturating_add(u64::from(rest != 0)))
    }

    #[inline]
    fn divide(self, value: u64) -> (u64, u64) {
        match self.shift {
            Some(shift) => {
                let whole = value.checked_shr(shift).unwrap_or(0);
                (whole, value & self.bytes.saturating_sub(1))
            }
            None => (value.div_euclid(self.bytes), value.rem_euclid(self.bytes)),
        }
    }
}

impl fmt::Debug for ClusterSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B (cluster size)", self.bytes)
    }
}

/// Height of a delta in its chain; the base is level 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Level(u16);

impl Level {
    /// The lowest delta of a chain.
    pub const BASE: Self = Self(0);

    /// Wraps a plain number.
    #[must_use]
    pub const fn new(level: u16) -> Self {
        Self(level)
    }

    /// The plain number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The level as an index into a slice of levels.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {}", self.0)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_sizes_divide_alike_with_and_without_a_shift() {
        for sectors in [1_u32, 8, 63, 64, 100, 128, 504, 2048, 131_072] {
            let size = ClusterSize::from_sectors(sectors).unwrap();
            let bytes = u64::from(sectors) * SECTOR;
            assert_eq!(size.bytes(), bytes);
            for at in [
                0,
                1,
                bytes - 1,
                bytes,
                bytes + 1,
                7 * bytes + 3,
                (1 << 44) - 1,
            ] {
                let (cluster, within) = size.split(DiskOffset::new(at));
                assert_eq!((cluster.get(), within), (at / bytes, at % bytes));
                assert_eq!(size.count_for(at).get(), at.div_ceil(bytes));
            }
        }
    }

    #[test]
    fn impossible_cluster_sizes_do_not_exist() {
        assert_eq!(ClusterSize::from_sectors(0), None);
        assert!(ClusterSize::from_sectors(ClusterSize::SECTORS_MAX).is_some());
        assert_eq!(
            ClusterSize::from_sectors(ClusterSize::SECTORS_MAX + 1),
            None
        );
        assert_eq!(ClusterSize::from_sectors(u32::MAX), None);
    }
}
