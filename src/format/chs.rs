//! Cylinders, heads and sectors: written because other programs expect them, never believed.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::units::SectorCount;

/// A geometry whose product is exactly the disk's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u64,
    /// Heads.
    pub heads: u32,
    /// Sectors of a track.
    pub sectors: u32,
}

impl Chs {
    /// The geometry for a disk: 16 heads of 32 sectors, as Parallels Desktop and QEMU have it,
    /// where that divides the size; else the nearest that does.
    #[must_use]
    pub fn of(size: SectorCount) -> Self {
        let largest = |total: u64, wanted: &[u32]| {
            let divides = |number: &&u32| total.checked_rem(u64::from(**number)) == Some(0);
            wanted.iter().find(divides).copied().unwrap_or(1)
        };
        let sectors = largest(size.get(), &[32, 63, 16, 8, 4, 2]);
        let tracks = size.get().checked_div(sectors.into()).unwrap_or(0);
        let heads = largest(tracks, &[16, 8, 4, 2]);
        Self {
            cylinders: tracks.checked_div(heads.into()).unwrap_or(0),
            heads,
            sectors,
        }
    }

    /// The number of cylinders as a header holds it, in 32 bits.
    #[must_use]
    pub fn header_cylinders(self) -> u32 {
        u32::try_from(self.cylinders).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::as_conversions)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_the_size() {
        for size in [
            0, 1, 7, 63, 64, 640, 1954, 2048, 204_800, 258_048, 16_777_216,
        ] {
            let chs = Chs::of(SectorCount::new(size));
            let product = chs.cylinders * u64::from(chs.heads) * u64::from(chs.sectors);
            assert_eq!(product, size);
        }
        let desktop = Chs::of(SectorCount::new(204_800));
        assert_eq!(
            (desktop.cylinders, desktop.heads, desktop.sectors),
            (400, 16, 32)
        );
        let huge = Chs::of(SectorCount::new(1 << 50));
        assert_eq!(huge.header_cylinders(), u32::MAX);
    }
}
