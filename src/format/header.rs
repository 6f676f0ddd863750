//! The 64-byte header: any bytes decode to a [`RawHeader`]; a [`Header`] holds its invariants.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::chs::Chs;
use crate::format::layout::Layout;
use crate::units::{ClusterSize, FileCluster, FileOffset, SECTOR, SectorCount};
use thiserror::Error;

/// Bytes of the header at the start of every image.
pub const HEADER_LEN: usize = 64;
/// First 16 bytes of a version 1 image; there is no terminating NUL.
pub const MAGIC_V1: [u8; 16] = *b"WithoutFreeSpace";
/// First 16 bytes of a version 2 image.
pub const MAGIC_V2: [u8; 16] = *b"WithouFreSpacExt";
/// The only value of `m_Type` that exists.
pub const TYPE: u32 = 2;
/// `m_DiskInUse` of an image that is open for writing or was not closed: the bytes "Ynot".
pub const IN_USE: u32 = 0x746f_6e59;
/// `m_DiskInUse` of a closed image whose format extension is valid: the bytes "v2.1".
pub const CLOSED_V21: u32 = 0x312e_3276;
/// `m_Flags` bit: no cluster is mapped.
pub const FLAG_EMPTY: u32 = 1;
/// `m_Flags` bit: a conversion between versions is under way.
pub const FLAG_CONVERTING: u32 = 2;
/// The most entries a BAT may have (QEMU's bound: the table then stays below 2 GiB).
pub const ENTRY_COUNT_MAX: u32 = (1 << 29) - 1;
/// Largest cluster, in sectors, of an image that is opened for writing (64 MiB).
pub const WRITE_CLUSTER_SECTORS_MAX: u64 = 131_072;

/// Byte offsets of the fields, in the order of the format's documents.
pub mod offset {
    /// Magic, 16 bytes.
    pub const M_SIG: usize = 0;
    /// Disk type, always 2.
    pub const M_TYPE: usize = 16;
    /// CHS heads, informational.
    pub const M_HEADS: usize = 20;
    /// CHS cylinders, informational.
    pub const M_CYLINDERS: usize = 24;
    /// Cluster size in sectors.
    pub const M_SECTORS: usize = 28;
    /// Number of BAT entries.
    pub const M_SIZE: usize = 32;
    /// Disk size in sectors: 32 bits in version 1, 64 bits in version 2.
    pub const M_SIZE_IN_SECTORS: usize = 36;
    /// In-use mark.
    pub const M_DISK_IN_USE: usize = 44;
    /// First data cluster, in sectors.
    pub const M_FIRST_BLOCK_OFFSET: usize = 48;
    /// Flag bits.
    pub const M_FLAGS: usize = 52;
    /// Format extension, in sectors; 0 for none.
    pub const M_FORMAT_EXTENSION_OFFSET: usize = 56;
}

/// The unit of BAT entries and the width of the size field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// `WithoutFreeSpace`: entries are sector numbers; what Parallels Desktop writes.
    V1,
    /// `WithouFreSpacExt`: entries are cluster numbers; what Virtuozzo and QEMU write.
    V2,
}

impl Version {
    /// The magic that says so.
    #[must_use]
    pub const fn magic(self) -> [u8; 16] {
        match self {
            Self::V1 => MAGIC_V1,
            Self::V2 => MAGIC_V2,
        }
    }

    /// 1 or 2.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
        }
    }

    /// The version whose magic starts these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes.get(..16)? {
            magic if magic == MAGIC_V1 => Some(Self::V1),
            magic if magic == MAGIC_V2 => Some(Self::V2),
            _ => None,
        }
    }
}

/// What is wrong with a header. Numbers only: the text is made where it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer than 64 bytes.
    #[error("the file has {len} bytes, fewer than the 64 of a header")]
    Short {
        /// Length of the file in bytes.
        len: u64,
    },
    /// Neither magic.
    #[error("neither magic of the format is there")]
    Magic,
    /// `m_Type` is not 2.
    #[error("disk type {0} instead of 2")]
    Type(u32),
    /// Cluster size 0 or beyond any reader's bound.
    #[error("cluster size of {0} sectors is impossible")]
    ClusterSize(u32),
    /// More entries than any reader takes.
    #[error("{0} BAT entries are more than the format allows (536870911)")]
    EntryCount(u32),
    /// No entries, yet a size.
    #[error("no BAT entries for a disk of {0} sectors")]
    NoEntries(u64),
    /// A disk size whose bytes do not fit a file size.
    #[error("a disk of {0} sectors cannot exist")]
    DiskSize(u64),
    /// The table does not fit in the file.
    #[error("the BAT ends at byte {table_end}, the file at {len}")]
    TableTruncated {
        /// End of the last entry, bytes.
        table_end: u64,
        /// Length of the file, bytes.
        len: u64,
    },
    /// A version conversion was interrupted, so the unit of the entries is unknown.
    #[error("a conversion between versions was interrupted")]
    Converting,
    /// Too few entries for the size (read-only is possible while they cover half of it).
    #[error("{entries} BAT entries do not cover {sectors} sectors")]
    TooFewEntries {
        /// Entries there are.
        entries: u32,
        /// Size of the disk in sectors.
        sectors: u64,
    },
    /// Data would start within the table (read-only is possible).
    #[error("the first block lies at sector {first}, inside the BAT that ends at sector {minimum}")]
    FirstBlockInTable {
        /// `m_FirstBlockOffset`.
        first: u32,
        /// Least value that the table leaves room for, sectors.
        minimum: u64,
    },
    /// `m_FirstBlockOffset` is 0, so where data starts is computed (read-only is possible).
    #[error("m_FirstBlockOffset is 0; data is taken to start at sector {first}, after the BAT")]
    FirstBlockMissing {
        /// Where it starts.
        first: u64,
    },
    /// Data would start past the end of the file (read-only is possible).
    #[error("the first block lies at sector {first}, past the end of the file")]
    FirstBlockPastEnd {
        /// `m_FirstBlockOffset`.
        first: u64,
    },
    /// Data clusters are not aligned to the cluster size (read-only is possible).
    #[error(
        "the first block at sector {first} is no multiple of the cluster size ({cluster} sectors)"
    )]
    FirstBlockUnaligned {
        /// First block in sectors.
        first: u64,
        /// Cluster size in sectors.
        cluster: u64,
    },
    /// A cluster size that is not written to (read-only is possible).
    #[error("clusters of {0} sectors are only read: writing needs a multiple of 8, at most 131072")]
    ClusterSizeReadOnly(u64),
    /// A disk of no bytes (read-only is possible).
    #[error("the disk has no sectors")]
    Empty,
}

/// The header's fields as found, meaning nothing yet. Any 64 bytes decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawHeader {
    /// `m_Sig`.
    pub magic: [u8; 16],
    /// `m_Type`.
    pub disk_type: u32,
    /// `m_Heads`.
    pub heads: u32,
    /// `m_Cylinders`.
    pub cylinders: u32,
    /// `m_Sectors`: cluster size in sectors.
    pub cluster_sectors: u32,
    /// `m_Size`: number of BAT entries.
    pub entry_count: u32,
    /// `m_SizeInSectors`, all 64 bits.
    pub size_in_sectors: u64,
    /// `m_DiskInUse`.
    pub in_use: u32,
    /// `m_FirstBlockOffset`, sectors.
    pub first_block: u32,
    /// `m_Flags`.
    pub flags: u32,
    /// `m_FormatExtensionOffset`, sectors.
    pub extension: u64,
}

fn take<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    out
}

fn put(bytes: &mut [u8; HEADER_LEN], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

impl RawHeader {
    /// Reads the fields.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let le_u32 = |at| u32::from_le_bytes(take(bytes, at));
        let le_u64 = |at| u64::from_le_bytes(take(bytes, at));
        Self {
            magic: take(bytes, offset::M_SIG),
            disk_type: le_u32(offset::M_TYPE),
            heads: le_u32(offset::M_HEADS),
            cylinders: le_u32(offset::M_CYLINDERS),
            cluster_sectors: le_u32(offset::M_SECTORS),
            entry_count: le_u32(offset::M_SIZE),
            size_in_sectors: le_u64(offset::M_SIZE_IN_SECTORS),
            in_use: le_u32(offset::M_DISK_IN_USE),
            first_block: le_u32(offset::M_FIRST_BLOCK_OFFSET),
            flags: le_u32(offset::M_FLAGS),
            extension: le_u64(offset::M_FORMAT_EXTENSION_OFFSET),
        }
    }

    /// Writes the fields.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        put(&mut bytes, offset::M_SIG, &self.magic);
        put(&mut bytes, offset::M_TYPE, &self.disk_type.to_le_bytes());
        put(&mut bytes, offset::M_HEADS, &self.heads.to_le_bytes());
        put(
            &mut bytes,
            offset::M_CYLINDERS,
            &self.cylinders.to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::M_SECTORS,
            &self.cluster_sectors.to_le_bytes(),
        );
        put(&mut bytes, offset::M_SIZE, &self.entry_count.to_le_bytes());
        put(
            &mut bytes,
            offset::M_SIZE_IN_SECTORS,
            &self.size_in_sectors.to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::M_DISK_IN_USE,
            &self.in_use.to_le_bytes(),
        );
        put(
            &mut bytes,
            offset::M_FIRST_BLOCK_OFFSET,
            &self.first_block.to_le_bytes(),
        );
        put(&mut bytes, offset::M_FLAGS, &self.flags.to_le_bytes());
        put(
            &mut bytes,
            offset::M_FORMAT_EXTENSION_OFFSET,
            &self.extension.to_le_bytes(),
        );
        bytes
    }
}

/// A header whose numbers fit together and fit the file, so that reading through it is safe.
///
/// Guaranteed: the magic and type are right; the cluster size exists; the whole table lies in the
/// file; the disk's size in bytes fits an `i64`. What forbids *writing* is kept in
/// [`Header::write_refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    raw: RawHeader,
    version: Version,
    size: SectorCount,
    layout: Layout,
    write_refusal: Option<HeaderError>,
}

impl Header {
    /// Checks the header against itself and against the length of its file in bytes.
    pub fn validate(raw: &RawHeader, file_len: FileOffset) -> Result<Self, HeaderError> {
        let version = Version::of(&raw.magic).ok_or(HeaderError::Magic)?;
        if raw.disk_type != TYPE {
            return Err(HeaderError::Type(raw.disk_type));
        }
        let cluster = ClusterSize::from_sectors(raw.cluster_sectors)
            .ok_or(HeaderError::ClusterSize(raw.cluster_sectors))?;
        if raw.entry_count > ENTRY_COUNT_MAX {
            return Err(HeaderError::EntryCount(raw.entry_count));
        }
        let sectors = match version {
            // The upper half is "unused" in version 1 and to be ignored.
            Version::V1 => raw.size_in_sectors & u64::from(u32::MAX),
            Version::V2 => raw.size_in_sectors,
        };
        let size = SectorCount::new(sectors);
        match size.bytes() {
            Some(bytes) if i64::try_from(bytes).is_ok() => {}
            _ => return Err(HeaderError::DiskSize(sectors)),
        }
        if raw.entry_count == 0 && sectors > 0 {
            return Err(HeaderError::NoEntries(sectors));
        }
        // A table that is an entry short still shows the rest of the disk. Of one that lacks the
        // larger half, either number is garbage, and a disk of nothing but zeros helps nobody.
        let covered = u64::from(raw.entry_count).saturating_mul(cluster.sectors().get());
        if covered < sectors.div_ceil(2) {
            let entries = raw.entry_count;
            return Err(HeaderError::TooFewEntries { entries, sectors });
        }
        let layout = Layout::new(version, cluster, raw.entry_count, raw.first_block);
        if layout.table_end() > file_len {
            let (table_end, len) = (layout.table_end().get(), file_len.get());
            return Err(HeaderError::TableTruncated { table_end, len });
        }
        if raw.in_use == IN_USE && raw.flags != u32::MAX && raw.flags & FLAG_CONVERTING != 0 {
            return Err(HeaderError::Converting);
        }
        let write_refusal = write_refusal(raw, size, &layout, file_len);
        Ok(Self {
            raw: *raw,
            version,
            size,
            layout,
            write_refusal,
        })
    }

    /// The fields as found.
    #[must_use]
    pub fn raw(&self) -> &RawHeader {
        &self.raw
    }

    /// The image's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Size of the disk.
    #[must_use]
    pub fn size(&self) -> SectorCount {
        self.size
    }

    /// Size of the disk in bytes; fits an `i64`.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        // Checked by `validate`.
        self.size.get().saturating_mul(SECTOR)
    }

    /// Where the table and the data lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// True when the image is open elsewhere or was not closed.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.raw.in_use == IN_USE
    }

    /// Where a format extension claims to be; valid only with the closed mark "v2.1".
    #[must_use]
    pub fn extension(&self) -> Option<SectorCount> {
        (self.raw.in_use == CLOSED_V21 && self.raw.extension != 0)
            .then(|| SectorCount::new(self.raw.extension))
    }

    /// The fields of this image with a disk of another size: an entry for each of its clusters, and
    /// data that begins in the first cluster after the table. `None` where the version cannot hold
    /// such a disk with every cluster mapped.
    #[must_use]
    pub fn resized(&self, size: SectorCount) -> Option<RawHeader> {
        let cluster = self.layout.cluster();
        let bytes = size.bytes().filter(|bytes| i64::try_from(*bytes).is_ok())?;
        let entries = u32::try_from(cluster.count_for(bytes).get()).ok()?;
        if entries > ENTRY_COUNT_MAX {
            return None;
        }
        if self.version == Version::V1 && u32::try_from(size.get()).is_err() {
            return None;
        }
        let after = Layout::new(self.version, cluster, entries, 0);
        let table = cluster.count_for(after.table_end().get()).get();
        let last = table.saturating_add(entries.into()).saturating_sub(1);
        after.entry_for(FileCluster::new(last))?;
        let first = table.saturating_mul(cluster.sectors().get());
        let chs = Chs::of(size);
        Some(RawHeader {
            heads: chs.heads,
            cylinders: chs.header_cylinders(),
            entry_count: entries,
            size_in_sectors: size.get(),
            first_block: u32::try_from(first).ok()?,
            ..self.raw
        })
    }

    /// Why this image cannot be opened for writing, where it cannot.
    #[must_use]
    pub fn write_refusal(&self) -> Option<HeaderError> {
        self.write_refusal
    }
}

/// The conditions that reading survives and writing does not.
fn write_refusal(
    raw: &RawHeader,
    size: SectorCount,
    layout: &Layout,
    file_len: FileOffset,
) -> Option<HeaderError> {
    let cluster = layout.cluster().sectors().get();
    if size.get() == 0 {
        return Some(HeaderError::Empty);
    }
    if cluster.rem_euclid(8) != 0 || cluster > WRITE_CLUSTER_SECTORS_MAX {
        return Some(HeaderError::ClusterSizeReadOnly(cluster));
    }
    if u64::from(raw.entry_count).saturating_mul(cluster) < size.get() {
        let (entries, sectors) = (raw.entry_count, size.get());
        return Some(HeaderError::TooFewEntries { entries, sectors });
    }
    let minimum = layout.table_end().get().div_ceil(SECTOR);
    let first = layout.first_block().get();
    if raw.first_block != 0 && first < minimum {
        return Some(HeaderError::FirstBlockInTable {
            first: raw.first_block,
            minimum,
        });
    }
    if raw.first_block == 0 {
        return Some(HeaderError::FirstBlockMissing { first });
    }
    if first.rem_euclid(cluster) != 0 {
        return Some(HeaderError::FirstBlockUnaligned { first, cluster });
    }
    if first.saturating_mul(SECTOR) > file_len.get() {
        return Some(HeaderError::FirstBlockPastEnd { first });
    }
    None
}

#[cfg(test)]
mod tests;
