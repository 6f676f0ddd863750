//! What each sector of the disk may hold: the content that the last flush made durable, or any that
//! was issued since.

use std::ops::Range;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// Tells one write's content from another's; each sector of a write carries it with its own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(u64);

impl Stamp {
    /// Zeros.
    pub(crate) const ZERO: Self = Self(0);

    fn sector(self, number: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        if self != Self::ZERO {
            for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
                let value = (self.0 << 32) | (number << 8) | (index as u64 % 251 + 1);
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
        bytes
    }

    /// The payload of a write to these sectors.
    pub(crate) fn bytes(self, range: Range<u64>) -> Vec<u8> {
        range.flat_map(|number| self.sector(number)).collect()
    }
}

/// All contents that a sector may have, the durable one first.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    sectors: Vec<Vec<Content>>,
    next: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// What was there when the disk was made.
    First(Box<[u8]>),
    Stamp(Stamp),
}

impl Model {
    /// A disk with these bytes, all durable.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let first = |sector: &[u8]| vec![Content::First(sector.into())];
        Self {
            sectors: bytes.chunks(SECTOR as usize).map(first).collect(),
            next: 1,
        }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.sectors.len() * SECTOR as usize
    }

    pub(crate) fn next_stamp(&mut self) -> Stamp {
        self.next += 1;
        Stamp(self.next)
    }

    /// A write of these sectors begins.
    pub(crate) fn issue(&mut self, range: Range<u64>, stamp: Stamp) {
        for sector in &mut self.sectors[range.start as usize..range.end as usize] {
            sector.push(Content::Stamp(stamp));
        }
    }

    /// How much of each sector's history a flush that begins now covers.
    pub(crate) fn all_issued(&self) -> Vec<usize> {
        self.sectors.iter().map(Vec::len).collect()
    }

    /// A flush that covers so much has returned: nothing older may be seen any more.
    pub(crate) fn durable(&mut self, covered: Vec<usize>) {
        for (sector, covered) in self.sectors.iter_mut().zip(covered) {
            sector.drain(..covered - 1);
        }
    }

    /// The disk was opened anew and showed this: what it did not show is gone for good.
    pub(crate) fn saw(&mut self, bytes: &[u8]) {
        for (sector, bytes) in self.sectors.iter_mut().zip(bytes.chunks(SECTOR as usize)) {
            *sector = vec![Content::First(bytes.into())];
        }
    }

    /// This model, with what `later`, which came from it, has issued on top.
    pub(crate) fn with_issued_of(mut self, later: &Self) -> Self {
        for (sector, later) in self.sectors.iter_mut().zip(&later.sectors) {
            for content in later {
                if !sector.contains(content) {
                    sector.push(content.clone());
                }
            }
        }
        self
    }

    /// What is wrong with the first sector that holds none of its contents.
    pub(crate) fn complaint(&self, bytes: &[u8]) -> Option<String> {
        let found = bytes.chunks(SECTOR as usize);
        (0_u64..)
            .zip(self.sectors.iter().zip(found))
            .find_map(|(number, (allowed, found))| {
                let fits = allowed.iter().any(|content| match content {
                    Content::First(bytes) => **bytes == *found,
                    Content::Stamp(stamp) => stamp.sector(number) == *found,
                });
                let word =
                    |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("8 bytes"));
                let seen = (word(0) >> 32, word(0) >> 8 & 0xff_ffff, word(504) >> 32);
                (!fits)
                    .then(|| format!("sector {number} shows {seen:?}, {} allowed", allowed.len()))
            })
    }
}
