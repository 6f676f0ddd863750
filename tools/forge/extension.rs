//! The format extension: one dirty bitmap at the end of an image.
//!
//! Imports: `image` (its numbers), `md5`.
//! Never: knows what a bitmap is for.
//!
//! The clusters of the bitmap that are neither all zeros nor all ones come first, the extension's
//! own cluster last. [`rewrite`] changes bytes of a written extension and mends its checksum, so
//! that a test can break exactly one thing.

use super::content::SECTOR;
use super::image::ImageSpec;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// First bytes of an extension cluster.
pub(crate) const MAGIC: u64 = 0xab23_4cef_23dc_ea87;
/// First bytes of a dirty bitmap's section.
pub(crate) const BITMAP: u64 = 0x2038_5fae_252c_b34a;

/// One dirty bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BitmapSpec {
    /// 16 bytes in text order.
    pub(crate) uuid: [u8; 16],
    /// Sectors a bit.
    pub(crate) granularity: u32,
    /// Bits that are set.
    pub(crate) dirty: Vec<u64>,
    /// All bits are set; `dirty` is then ignored.
    pub(crate) all: bool,
}

impl BitmapSpec {
    /// A bitmap of 64 KiB units.
    pub(crate) fn new(dirty: Vec<u64>) -> Self {
        Self {
            uuid: *b"forged bitmap 01",
            granularity: 128,
            dirty,
            all: false,
        }
    }

    /// Writes bitmap and extension from `end` on; returns where the extension's cluster starts.
    pub(crate) fn write(&self, image: &ImageSpec, file: &File, end: u64) -> io::Result<u64> {
        let cluster = image.cluster_bytes() as usize;
        let bits = image.disk_sectors.div_ceil(u64::from(self.granularity));
        let mut map = vec![if self.all { 0xff } else { 0_u8 }; bits.div_ceil(8) as usize];
        for bit in self.dirty.iter().filter(|bit| **bit < bits && !self.all) {
            map[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        let mut at = end;
        let mut l1 = Vec::new();
        for piece in map.chunks(cluster) {
            if piece.iter().all(|byte| *byte == 0) {
                l1.push(0);
            } else if piece.iter().all(|byte| *byte == 0xff) {
                l1.push(1);
            } else {
                file.write_all_at(piece, at)?;
                l1.push(at / SECTOR);
                at += cluster as u64;
            }
        }
        file.write_all_at(&self.cluster(image, &l1), at)?;
        Ok(at)
    }

    fn cluster(&self, image: &ImageSpec, l1: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(BITMAP.to_le_bytes());
        bytes.extend(0_u64.to_le_bytes());
        bytes.extend(((32 + 8 * l1.len()) as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(image.disk_sectors.to_le_bytes());
        bytes.extend(self.uuid);
        bytes.extend(self.granularity.to_le_bytes());
        bytes.extend((l1.len() as u32).to_le_bytes());
        bytes.extend(l1.iter().flat_map(|entry| entry.to_le_bytes()));
        bytes.resize(image.cluster_bytes() as usize, 0);
        seal(&mut bytes);
        bytes
    }
}

fn seal(bytes: &mut [u8]) {
    let sum = md5::compute(&bytes[24..]).0;
    bytes[8..24].copy_from_slice(&sum);
}

/// Changes the extension cluster of a closed image and, where asked, mends its checksum.
pub(crate) fn rewrite(
    file: &File,
    seal_again: bool,
    change: impl FnOnce(&mut [u8]),
) -> io::Result<()> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    let cluster = u32::from_le_bytes([header[28], header[29], header[30], header[31]]);
    let mut word = [0; 8];
    word.copy_from_slice(&header[56..64]);
    let at = u64::from_le_bytes(word) * SECTOR;
    if at == 0 {
        return Err(io::Error::other(
            "this image has no extension to break (make it with --bitmap)",
        ));
    }
    let mut bytes = vec![0; cluster as usize * 512];
    file.read_exact_at(&mut bytes, at)?;
    change(&mut bytes);
    if seal_again {
        seal(&mut bytes);
    }
    file.write_all_at(&bytes, at)
}
