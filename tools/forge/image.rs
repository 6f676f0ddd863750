//! Writes one image file exactly as asked, however odd.
//!
//! Imports: `content`, `extension`.
//! Never: judges whether what was asked for makes sense.
//!
//! Only what is not zero is written, so a disk of 16 TiB or 2^29 entries costs milliseconds.

use super::content::{self, GARBAGE, SECTOR};
use super::extension::BitmapSpec;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// `m_DiskInUse`: open, or not closed.
pub(crate) const IN_USE: u32 = 0x746f_6e59;
/// Closed, with a valid extension.
pub(crate) const V21: u32 = 0x312e_3276;
/// Closed by Parallels Desktop 17.
pub(crate) const PD17: u32 = 0x3731_6470;
/// Closed by Parallels Desktop 22.
pub(crate) const PD22: u32 = 0x3232_6470;

/// Which clusters an image maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// None.
    Nothing,
    /// All of them.
    All,
    /// Cluster `phase` and every `step`th after it.
    Every { step: u64, phase: u64 },
    /// Each with this probability, decided by the seed and the level.
    Percent(u64),
    /// Exactly these, in this order in the file.
    List(Vec<u64>),
}

/// Where the mapped clusters lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One after the other, in disk order.
    Packed,
    /// Each at its own number, as a preallocated image has it.
    Identity,
    /// Packed, in an order that the seed gives.
    Shuffled(u64),
    /// In disk order with so many unused clusters between.
    Gaps(u64),
    /// Packed, last cluster first.
    Reversed,
}

/// `m_FirstBlockOffset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstBlock {
    /// The least whole number of clusters that hold the table.
    Minimum,
    /// So many clusters more than that.
    Extra(u32),
    /// The field is 0, and data starts at the first sector after the table (old version 1).
    Zero,
    /// The field names the first sector after the table (version 1 of 63-sector clusters).
    Unaligned,
}

/// One image file.
#[derive(Clone, Debug)]
pub(crate) struct ImageSpec {
    /// 1 or 2.
    pub(crate) version: u8,
    /// `m_Sectors`.
    pub(crate) cluster_sectors: u32,
    /// Size of the disk.
    pub(crate) disk_sectors: u64,
    /// Where the disk of this image starts on the whole disk; only the content depends on it.
    pub(crate) disk_start: u64,
    /// Seed of content, of `Percent` and so on.
    pub(crate) seed: u64,
    /// Level that the sectors carry.
    pub(crate) level: u16,
    /// Which clusters are mapped.
    pub(crate) mapped: Mapped,
    /// Where they lie.
    pub(crate) layout: Layout,
    /// Where data starts.
    pub(crate) first_block: FirstBlock,
    /// Unused clusters at the end of the file, as left by preallocation.
    pub(crate) tail: u64,
    /// `m_DiskInUse`.
    pub(crate) mark: u32,
    /// `m_Flags`; `None` for 1 (empty) where nothing is mapped, else 0.
    pub(crate) flags: Option<u32>,
    /// Fill the last, partial cluster with garbage after the end of the disk.
    pub(crate) garbage: bool,
    /// Leave the clusters as holes of the file instead of writing content.
    pub(crate) no_data: bool,
    /// A format extension with one dirty bitmap.
    pub(crate) bitmap: Option<BitmapSpec>,
}

impl ImageSpec {
    /// A closed image with packed clusters and nothing odd.
    pub(crate) fn new(version: u8, cluster_sectors: u32, disk_sectors: u64) -> Self {
        Self {
            version,
            cluster_sectors,
            disk_sectors,
            disk_start: 0,
            seed: 1,
            level: 0,
            mapped: Mapped::Nothing,
            layout: Layout::Packed,
            first_block: FirstBlock::Minimum,
            tail: 0,
            mark: 0,
            flags: None,
            garbage: false,
            no_data: false,
            bitmap: None,
        }
    }

    /// The same with these clusters mapped.
    #[must_use]
    pub(crate) fn mapping(mut self, mapped: Mapped) -> Self {
        self.mapped = mapped;
        self
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_bytes(&self) -> u64 {
        u64::from(self.cluster_sectors) * SECTOR
    }

    /// `m_Size`.
    pub(crate) fn entries(&self) -> u64 {
        self.disk_sectors.div_ceil(u64::from(self.cluster_sectors))
    }

    /// Sector of the file where data starts.
    pub(crate) fn data_start(&self) -> u64 {
        let table = 64 + 4 * self.entries();
        let clusters = table.div_ceil(self.cluster_bytes());
        match self.first_block {
            FirstBlock::Minimum => clusters * u64::from(self.cluster_sectors),
            FirstBlock::Extra(n) => (clusters + u64::from(n)) * u64::from(self.cluster_sectors),
            FirstBlock::Zero | FirstBlock::Unaligned => table.div_ceil(SECTOR),
        }
    }

    /// Does this image map the disk cluster?
    pub(crate) fn maps(&self, cluster: u64) -> bool {
        if cluster >= self.entries() {
            return false;
        }
        match &self.mapped {
            Mapped::Nothing => false,
            Mapped::All => true,
            Mapped::Every { step, phase } => cluster >= *phase && (cluster - phase) % step == 0,
            Mapped::Percent(percent) => {
                content::mix(&[self.seed, u64::from(self.level), cluster, 77]) % 100 < *percent
            }
            Mapped::List(clusters) => clusters.contains(&cluster),
        }
    }

    /// The mapped disk clusters with the number of the data cluster that holds each.
    pub(crate) fn slots(&self) -> Vec<(u64, u64)> {
        let mut clusters: Vec<u64> = match &self.mapped {
            Mapped::List(clusters) => clusters
                .iter()
                .copied()
                .filter(|c| *c < self.entries())
                .collect(),
            Mapped::Nothing => Vec::new(),
            _ => (0..self.entries())
                .filter(|cluster| self.maps(*cluster))
                .collect(),
        };
        match self.layout {
            Layout::Packed | Layout::Gaps(_) | Layout::Identity => {}
            Layout::Reversed => clusters.reverse(),
            Layout::Shuffled(seed) => {
                let mut state = seed;
                for i in (1..clusters.len()).rev() {
                    clusters.swap(i, (content::splitmix(&mut state) % (i as u64 + 1)) as usize);
                }
            }
        }
        let numbered = clusters.into_iter().zip(0_u64..);
        numbered
            .map(|(cluster, i)| match self.layout {
                Layout::Identity => (cluster, cluster),
                Layout::Gaps(gap) => (cluster, i * (gap + 1) + gap),
                _ => (cluster, i),
            })
            .collect()
    }

    /// The BAT entry that names a data cluster.
    pub(crate) fn entry(&self, slot: u64) -> u32 {
        let sector = self.data_start() + slot * u64::from(self.cluster_sectors);
        let entry = if self.version == 1 {
            sector
        } else {
            sector / u64::from(self.cluster_sectors)
        };
        u32::try_from(entry).expect("forged images stay within 32-bit entries")
    }

    /// Byte of the file where a data cluster starts.
    pub(crate) fn slot_at(&self, slot: u64) -> u64 {
        self.data_start() * SECTOR + slot * self.cluster_bytes()
    }

    /// The 64 bytes.
    pub(crate) fn header(&self, extension_sector: u64) -> [u8; 64] {
        let mut bytes = [0; 64];
        let magic = if self.version == 1 {
            b"WithoutFreeSpace"
        } else {
            b"WithouFreSpacExt"
        };
        let empty = u32::from(self.slots_are_none());
        let first = match self.first_block {
            FirstBlock::Zero => 0,
            _ => u32::try_from(self.data_start()).expect("the table is far below 2 TiB"),
        };
        let entries = u32::try_from(self.entries()).expect("the format counts entries in 32 bits");
        bytes[..16].copy_from_slice(magic);
        bytes[16..20].copy_from_slice(&2_u32.to_le_bytes());
        bytes[20..24].copy_from_slice(&16_u32.to_le_bytes());
        bytes[24..28].copy_from_slice(&((self.disk_sectors / 512) as u32).to_le_bytes());
        bytes[28..32].copy_from_slice(&self.cluster_sectors.to_le_bytes());
        bytes[32..36].copy_from_slice(&entries.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.disk_sectors.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.mark.to_le_bytes());
        bytes[48..52].copy_from_slice(&first.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.flags.unwrap_or(empty).to_le_bytes());
        bytes[56..64].copy_from_slice(&extension_sector.to_le_bytes());
        bytes
    }

    fn slots_are_none(&self) -> bool {
        match &self.mapped {
            Mapped::Nothing => true,
            Mapped::List(clusters) => clusters.is_empty(),
            _ => (0..self.entries()).all(|cluster| !self.maps(cluster)),
        }
    }

    /// The bytes of a disk cluster as this image stores it.
    pub(crate) fn cluster_content(&self, cluster: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.cluster_bytes() as usize);
        let first = cluster * u64::from(self.cluster_sectors);
        for local in first..first + u64::from(self.cluster_sectors) {
            if local < self.disk_sectors {
                bytes.extend(content::sector(
                    self.seed,
                    self.level,
                    self.disk_start + local,
                ));
            } else {
                bytes.extend([if self.garbage { GARBAGE } else { 0 }; 512]);
            }
        }
        bytes
    }

    /// Writes the image to a new file.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        let slots = self.slots();
        let used = slots.iter().map(|(_, slot)| slot + 1).max().unwrap_or(0);
        let mut end = self.slot_at(used + self.tail);
        let mut header = self.header(0);
        if let Some(bitmap) = &self.bitmap {
            let extension_at = bitmap.write(self, &file, end)?;
            end = extension_at + self.cluster_bytes();
            header = self.header(extension_at / SECTOR);
        }
        file.set_len(end)?;
        file.write_all_at(&header, 0)?;
        self.write_table(&file, &slots)?;
        if !self.no_data {
            for (cluster, slot) in &slots {
                file.write_all_at(&self.cluster_content(*cluster), self.slot_at(*slot))?;
            }
        }
        Ok(())
    }

    fn write_table(&self, file: &File, slots: &[(u64, u64)]) -> io::Result<()> {
        let mut entries: Vec<(u64, u32)> = slots
            .iter()
            .map(|(cluster, slot)| (*cluster, self.entry(*slot)))
            .collect();
        entries.sort_unstable();
        // One write for each run of neighbours keeps full tables quick and sparse ones sparse.
        for run in entries.chunk_by(|a, b| a.0 + 1 == b.0) {
            let bytes: Vec<u8> = run
                .iter()
                .flat_map(|(_, entry)| entry.to_le_bytes())
                .collect();
            file.write_all_at(&bytes, 64 + 4 * run[0].0)?;
        }
        Ok(())
    }
}

/// Writes a plain base of so many bytes.
pub(crate) fn write_plain(
    path: &Path,
    seed: u64,
    level: u16,
    start: u64,
    len: u64,
) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    let mut bytes = Vec::new();
    let mut at = 0;
    for local in 0..len.div_ceil(SECTOR) {
        bytes.extend(content::sector(seed, level, start + local));
        if bytes.len() >= 1 << 20 {
            file.write_all_at(&bytes, at)?;
            at += bytes.len() as u64;
            bytes.clear();
        }
    }
    file.write_all_at(&bytes, at)?;
    file.set_len(len)
}
