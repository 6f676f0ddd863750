//! The format extension: a cluster of feature sections, of which dirty bitmaps are the known ones.
//!
//! | offset | size | field |
//! |-------:|-----:|-------|
//! |      0 |    8 | magic |
//! |      8 |   16 | MD5 of the rest of the cluster |
//! |     24 |      | sections: magic, flags, data length (24 bytes), then the data, padded to 8 |
//!
//! The bitmap's own bits lie in clusters elsewhere in the file, which its table (L1) names by
//! sector. Nothing here reads them; what matters is which clusters are taken, and whether to
//! believe any of it. The extension is meaningful only in a file with the closed mark "v2.1".
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::guid::Guid;
use crate::format::header::Header;
use crate::units::{FileOffset, SECTOR, SectorCount, len_u64};
use std::collections::HashSet;
use thiserror::Error;

/// First 8 bytes of the cluster.
pub const MAGIC: u64 = 0xab23_4cef_23dc_ea87;
/// Magic of a dirty bitmap's section.
pub const BITMAP_MAGIC: u64 = 0x2038_5fae_252c_b34a;
/// Section flag: who does not understand it must not write to the image.
pub const FLAG_NECESSARY: u64 = 1;
/// Section flag: who does not understand it keeps it as it is.
pub const FLAG_TRANSIT: u64 = 2;
/// Bytes of magic and checksum.
const CHECKED_FROM: usize = 24;
/// Bytes of a section's own header.
const SECTION_LEN: usize = 24;
/// Bytes of a bitmap's data before its L1 table.
const BITMAP_LEN: usize = 32;

/// Byte offsets within the data of a dirty bitmap's section.
pub mod offset {
    /// Disk size in sectors, 8 bytes.
    pub const SIZE: usize = 0;
    /// Id, 16 bytes in the order in which a GUID is written.
    pub const ID: usize = 8;
    /// Sectors per bit, 4 bytes.
    pub const GRANULARITY: usize = 24;
    /// Number of L1 entries, 4 bytes.
    pub const L1_SIZE: usize = 28;
    /// The L1 table, 8 bytes an entry.
    pub const L1: usize = 32;
}

/// Why an extension is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ExtensionError {
    /// It is said to lie where no cluster of data can be.
    #[error("the extension at sector {0} is not a whole data cluster of the file")]
    Place(u64),
    /// Another magic.
    #[error("magic {0:#x} instead of the extension's")]
    Magic(u64),
    /// Wrong MD5.
    #[error("the extension's checksum does not match")]
    Checksum,
    /// A section that leaves the cluster.
    #[error("the section at byte {at} claims {len} bytes, more than are left")]
    Section {
        /// Offset in the cluster.
        at: usize,
        /// Claimed length of its data.
        len: u32,
    },
    /// A bitmap whose section is too short for it.
    #[error("the bitmap's section has {len} bytes of the {needed} that it needs")]
    BitmapShort {
        /// Length of the data.
        len: usize,
        /// What it takes.
        needed: u64,
    },
    /// A bitmap of another disk.
    #[error("the bitmap is of a disk of {found} sectors instead of {disk}")]
    BitmapSize {
        /// What it says.
        found: u64,
        /// Size of the disk.
        disk: u64,
    },
    /// Not a power of two.
    #[error("a bitmap granularity of {0} sectors is no power of two")]
    Granularity(u32),
    /// A table of the wrong length.
    #[error("the bitmap has {found} L1 entries instead of {needed}")]
    L1Size {
        /// What it says.
        found: u32,
        /// What the size and granularity ask for.
        needed: u64,
    },
    /// An L1 entry that names no data cluster of the file.
    #[error("L1 entry {index} names sector {sector}, which is no whole data cluster of the file")]
    L1Entry {
        /// Which entry.
        index: u32,
        /// What it says.
        sector: u64,
    },
    /// A cluster used twice.
    #[error("the cluster at sector {0} is used twice")]
    Twice(u64),
}

/// A dirty bitmap, without its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its id.
    pub id: Guid,
    /// Sectors per bit.
    pub granularity: SectorCount,
    /// What holds its bits, in order.
    pub l1: Vec<L1>,
}

/// What holds one cluster's worth of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L1 {
    /// All clean; nothing is stored.
    Zeros,
    /// All dirty; nothing is stored.
    Ones,
    /// A cluster of the file, by its first sector.
    At(SectorCount),
}

/// A section of a kind that is not known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownSection {
    /// Its magic.
    pub magic: u64,
    /// Its flags.
    pub flags: u64,
}

/// A whole extension that is believable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Dirty bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// Everything else.
    pub unknown: Vec<UnknownSection>,
    /// First sectors of all file clusters that the extension and its bitmaps occupy, itself first.
    pub clusters: Vec<SectorCount>,
}

impl Extension {
    /// True where a section that is not understood forbids writing to the image.
    #[must_use]
    pub fn forbids_writing(&self) -> bool {
        self.unknown
            .iter()
            .any(|section| section.flags & FLAG_NECESSARY != 0)
    }

    /// True where a section that is not understood asks to be kept by those who write.
    #[must_use]
    pub fn wants_keeping(&self) -> bool {
        self.unknown
            .iter()
            .any(|section| section.flags & FLAG_TRANSIT != 0)
    }
}

/// First byte of the extension's cluster, or `None` where the header names none. The cluster is
/// then wholly inside the file and behind the BAT; whether data clusters lie there too only the BAT
/// can tell.
pub fn locate(header: &Header, file_len: FileOffset) -> Result<Option<FileOffset>, ExtensionError> {
    match header.extension() {
        None => Ok(None),
        Some(at) => cluster_at(header, file_len, at.get())
            .map(Some)
            .ok_or(ExtensionError::Place(at.get())),
    }
}

fn cluster_at(header: &Header, file_len: FileOffset, sector: u64) -> Option<FileOffset> {
    let layout = header.layout();
    let start = FileOffset::new(sector.checked_mul(SECTOR)?);
    let cluster = layout.cluster();
    let aligned = cluster.file_start(cluster.whole_below(start)) == start;
    let behind_table = start >= layout.data_start() && start >= layout.table_end();
    let inside = start.checked_add(cluster.bytes())? <= file_len;
    (aligned && behind_table && inside).then_some(start)
}

/// Reads the cluster that [`locate`] found, `cluster` being its bytes.
pub fn parse(
    cluster: &[u8],
    header: &Header,
    file_len: FileOffset,
) -> Result<Extension, ExtensionError> {
    let own = header.extension().unwrap_or_default();
    if len_u64(cluster.len()) != header.layout().cluster().bytes() {
        return Err(ExtensionError::Place(own.get()));
    }
    let magic = le_u64(cluster, 0);
    if magic != MAGIC {
        return Err(ExtensionError::Magic(magic));
    }
    let (head, checked) = cluster
        .split_at_checked(CHECKED_FROM)
        .unwrap_or((cluster, &[]));
    if head.get(8..) != Some(&md5::compute(checked).0[..]) {
        return Err(ExtensionError::Checksum);
    }
    let mut taken = Taken {
        header,
        file_len,
        seen: HashSet::from([own.get()]),
        order: vec![own],
    };
    let (mut bitmaps, mut unknown) = (Vec::new(), Vec::new());
    let mut at = CHECKED_FROM;
    // A full cluster needs no section of zeros at its end.
    while let Some(start) = cluster.get(at..).filter(|rest| rest.len() >= SECTION_LEN) {
        let (magic, flags, len) = (le_u64(start, 0), le_u64(start, 8), le_u32(start, 16));
        if magic == 0 {
            break;
        }
        let data = usize::try_from(len)
            .ok()
            .and_then(|len| start.get(SECTION_LEN..)?.get(..len))
            .ok_or(ExtensionError::Section { at, len })?;
        if magic == BITMAP_MAGIC {
            bitmaps.push(bitmap(data, header, &mut taken)?);
        } else {
            unknown.push(UnknownSection { magic, flags });
        }
        let padded = data.len().saturating_add(7) & !7;
        at = at.saturating_add(SECTION_LEN).saturating_add(padded);
    }
    Ok(Extension {
        bitmaps,
        unknown,
        clusters: taken.order,
    })
}

/// The file clusters that are spoken for.
struct Taken<'a> {
    header: &'a Header,
    file_len: FileOffset,
    seen: HashSet<u64>,
    order: Vec<SectorCount>,
}

fn bitmap(data: &[u8], header: &Header, taken: &mut Taken<'_>) -> Result<Bitmap, ExtensionError> {
    let short = |needed| ExtensionError::BitmapShort {
        len: data.len(),
        needed,
    };
    let table = data.get(offset::L1..).ok_or(short(len_u64(BITMAP_LEN)))?;
    let (size, disk) = (le_u64(data, offset::SIZE), header.size().get());
    if size != disk {
        return Err(ExtensionError::BitmapSize { found: size, disk });
    }
    let granularity = le_u32(data, offset::GRANULARITY);
    if !granularity.is_power_of_two() {
        return Err(ExtensionError::Granularity(granularity));
    }
    let l1_size = le_u32(data, offset::L1_SIZE);
    let bytes = size.div_ceil(u64::from(granularity)).div_ceil(8);
    let needed = header.layout().cluster().count_for(bytes).get();
    // ploop writes no table at all where no bit is set.
    if u64::from(l1_size) != needed && l1_size != 0 {
        return Err(ExtensionError::L1Size {
            found: l1_size,
            needed,
        });
    }
    let table_len = u64::from(l1_size).saturating_mul(8);
    let table = usize::try_from(table_len)
        .ok()
        .and_then(|len| table.get(..len))
        .ok_or(short(table_len.saturating_add(len_u64(BITMAP_LEN))))?;
    let mut l1 = Vec::with_capacity(table.len() >> 3);
    for (index, entry) in (0_u32..).zip(table.chunks_exact(8)) {
        l1.push(match le_u64(entry, 0) {
            0 => L1::Zeros,
            1 => L1::Ones,
            sector => {
                cluster_at(taken.header, taken.file_len, sector)
                    .ok_or(ExtensionError::L1Entry { index, sector })?;
                if !taken.seen.insert(sector) {
                    return Err(ExtensionError::Twice(sector));
                }
                taken.order.push(SectorCount::new(sector));
                L1::At(SectorCount::new(sector))
            }
        });
    }
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(data.iter().skip(offset::ID)) {
        *to = *from;
    }
    let granularity = SectorCount::new(granularity.into());
    Ok(Bitmap {
        id: Guid::from_bytes(id),
        granularity,
        l1,
    })
}

/// Little-endian; 0 where the bytes end too early, which every caller has ruled out.
fn le_u64(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::format::header::{CLOSED_V21, HEADER_LEN, MAGIC_V2, RawHeader};

    const C: usize = 32768;
    const LEN: FileOffset = FileOffset::new(8 * 32768);

    /// A disk of 640 MiB in 32 KiB clusters: 20480 entries, a table of 3 clusters, the extension in
    /// file cluster 4.
    fn header(extension: u64) -> Header {
        let raw = RawHeader {
            magic: MAGIC_V2,
            disk_type: 2,
            heads: 16,
            cylinders: 1,
            cluster_sectors: 64,
            entry_count: 20480,
            size_in_sectors: 20480 * 64,
            in_use: CLOSED_V21,
            first_block: 192,
            flags: 0,
            extension,
        };
        assert_eq!(RawHeader::decode(&raw.encode()), raw);
        assert_eq!(raw.encode().len(), HEADER_LEN);
        Header::validate(&raw, LEN).unwrap()
    }

    fn seal(cluster: &mut [u8]) {
        let sum = md5::compute(&cluster[24..]).0;
        cluster[8..24].copy_from_slice(&sum);
    }

    /// A bitmap of 1 sector a bit: 1310720 bits, 5 clusters.
    fn good() -> Vec<u8> {
        let mut c = vec![0; C];
        c[..8].copy_from_slice(&[0x87, 0xea, 0xdc, 0x23, 0xef, 0x4c, 0x23, 0xab]);
        c[24..32].copy_from_slice(&[0x4a, 0xb3, 0x2c, 0x25, 0xae, 0x5f, 0x38, 0x20]);
        c[40] = 32 + 5 * 8;
        c[48..56].copy_from_slice(&(20480_u64 * 64).to_le_bytes());
        c[56..72].copy_from_slice(&[0xab; 16]);
        c[72] = 1;
        c[76] = 5;
        for (index, entry) in [0_u64, 1, 5 * 64, 0, 7 * 64].iter().enumerate() {
            c[80 + 8 * index..88 + 8 * index].copy_from_slice(&entry.to_le_bytes());
        }
        seal(&mut c);
        c
    }

    fn patched(change: impl FnOnce(&mut [u8])) -> Result<Extension, ExtensionError> {
        let mut cluster = good();
        change(&mut cluster);
        seal(&mut cluster);
        parse(&cluster, &header(256), LEN)
    }

    #[test]
    fn a_good_bitmap_and_its_clusters() {
        let found = parse(&good(), &header(256), LEN).unwrap();
        let sectors: Vec<u64> = found.clusters.iter().map(|sector| sector.get()).collect();
        assert_eq!(sectors, [256, 320, 448]);
        let bitmap = &found.bitmaps[0];
        assert_eq!(bitmap.id.bare(), "abababab-abab-abab-abab-abababababab");
        assert_eq!(bitmap.granularity.get(), 1);
        let at = |sector| L1::At(SectorCount::new(sector));
        assert_eq!(
            bitmap.l1,
            [L1::Zeros, L1::Ones, at(320), L1::Zeros, at(448)]
        );
        assert!(!found.forbids_writing() && !found.wants_keeping());
    }

    #[test]
    fn places() {
        for (sector, good) in [
            (192, true),
            (448, true),
            (128, false),
            (257, false),
            (512, false),
            (449, false),
            (1 << 54, false),
            (u64::MAX, false),
        ] {
            let found = locate(&header(sector), LEN);
            let wanted = FileOffset::new(sector.wrapping_mul(512));
            let expected = if good {
                Ok(Some(wanted))
            } else {
                Err(ExtensionError::Place(sector))
            };
            assert_eq!(found, expected, "{sector}");
        }
        assert_eq!(locate(&header(0), LEN), Ok(None));
    }

    #[test]
    fn broken_ones_are_told_apart() {
        use ExtensionError as E;
        let mut cluster = good();
        cluster[C - 1] = 1;
        assert_eq!(parse(&cluster, &header(256), LEN), Err(E::Checksum));
        assert_eq!(parse(&cluster[1..], &header(256), LEN), Err(E::Place(256)));
        assert_eq!(patched(|c| c[0] = 0), Err(E::Magic(0xab23_4cef_23dc_ea00)));
        assert_eq!(
            patched(|c| c[43] = 0xff),
            Err(E::Section {
                at: 24,
                len: 0xff00_0048
            })
        );
    }

    #[test]
    fn broken_bitmaps_are_told_apart() {
        use ExtensionError as E;
        assert_eq!(
            patched(|c| c[40] = 31),
            Err(E::BitmapShort {
                len: 31,
                needed: 32
            })
        );
        assert_eq!(
            patched(|c| c[40] = 71),
            Err(E::BitmapShort {
                len: 71,
                needed: 72
            })
        );
        assert_eq!(
            patched(|c| c[48] = 1),
            Err(E::BitmapSize {
                found: 1_310_721,
                disk: 1_310_720
            })
        );
        assert_eq!(patched(|c| c[72] = 0), Err(E::Granularity(0)));
        assert_eq!(patched(|c| c[72] = 96), Err(E::Granularity(96)));
        assert_eq!(
            patched(|c| c[72] = 2),
            Err(E::L1Size {
                found: 5,
                needed: 3
            })
        );
        assert_eq!(
            patched(|c| c[79] = 0x7f),
            Err(E::L1Size {
                found: 0x7f00_0005,
                needed: 5
            })
        );
        assert_eq!(
            patched(|c| c[80] = 2),
            Err(E::L1Entry {
                index: 0,
                sector: 2
            })
        );
        assert_eq!(
            patched(|c| c[87] = 0x80),
            Err(E::L1Entry {
                index: 0,
                sector: 0x8000_0000_0000_0000
            })
        );
        let again = 320_u64.to_le_bytes();
        assert_eq!(
            patched(|c| c[80..88].copy_from_slice(&again)),
            Err(E::Twice(320))
        );
        let itself = 256_u64.to_le_bytes();
        assert_eq!(
            patched(|c| c[80..88].copy_from_slice(&itself)),
            Err(E::Twice(256))
        );
    }

    #[test]
    fn unknown_sections_are_stepped_over_and_their_flags_kept() {
        let with = |flags: u8| {
            patched(|c| {
                c.copy_within(24..120, 56);
                c[24..56].fill(0);
                c[24] = 7;
                c[32] = flags;
                // Five bytes, padded to eight.
                c[40] = 5;
            })
            .unwrap()
        };
        assert_eq!(with(0).bitmaps.len(), 1);
        assert_eq!(with(0).unknown, [UnknownSection { magic: 7, flags: 0 }]);
        assert!(with(1).forbids_writing() && !with(1).wants_keeping());
        assert!(with(2).wants_keeping() && !with(2).forbids_writing());
    }

    #[test]
    fn an_empty_table_means_no_bit_set() {
        let found = patched(|c| c[76] = 0).unwrap();
        assert_eq!(found.bitmaps[0].l1, []);
        assert_eq!(found.clusters.len(), 1);
    }

    #[test]
    fn changed_bytes_never_panic() {
        for at in 0..160 {
            for byte in [0, 1, 2, 0x7f, 0x80, 0xff] {
                let _ = patched(|c| c[at] = byte);
            }
        }
    }
}
