//! What each sector of the disk may hold.
//!
//! Every write has a time at which it began and one at which its client was told the end; times
//! are positions in the log. A content may be seen unless another one has certainly replaced it: a
//! write that began after this one had ended, and that had itself ended, successfully, before the
//! read began, or before the flush that made it durable.

use std::ops::Range;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// Number of a write within its run.
pub(crate) type WriteId = u64;

/// Tells one write's content from another's; each sector of a write carries it with its own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp(pub(crate) u64);

impl Stamp {
    /// Zeros.
    pub(crate) const ZERO: Self = Self(0);

    fn word(self, sector: u64, index: u64) -> u64 {
        (self.0 << 32) | (sector << 8) | (index % 251 + 1)
    }

    /// The payload of a write to these sectors.
    pub(crate) fn bytes(self, sectors: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; ((sectors.end - sectors.start) * SECTOR) as usize];
        if self != Self::ZERO {
            for (sector, chunk) in sectors.zip(bytes.chunks_exact_mut(SECTOR as usize)) {
                for (index, word) in (0..).zip(chunk.chunks_exact_mut(8)) {
                    word.copy_from_slice(&self.word(sector, index).to_le_bytes());
                }
            }
        }
        bytes
    }

    fn is(self, sector: u64, found: &[u8]) -> bool {
        if self == Self::ZERO {
            return found.iter().all(|byte| *byte == 0);
        }
        (0..)
            .zip(found.chunks_exact(8))
            .all(|(index, word)| *word == self.word(sector, index).to_le_bytes())
    }
}

#[derive(Clone, Copy, Debug)]
enum Content {
    /// What the disk showed when it was opened.
    Shown,
    Stamp(Stamp),
}

/// One content of a sector, and when it was written.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: WriteId,
    content: Content,
    began: u64,
    /// When the client was told, and whether all went well.
    ended: Option<(u64, bool)>,
}

impl Candidate {
    /// True when a write that had surely ended before `time` took this one's place.
    fn replaced_before(&self, all: &[Self], time: u64) -> bool {
        all.iter().any(|later| {
            matches!(later.ended, Some((ended, true)) if ended < time)
                && self.ended.is_some_and(|(ended, _)| ended < later.began)
        })
    }
}

/// All sectors.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    shown: std::sync::Arc<Vec<u8>>,
    sectors: Vec<Vec<Candidate>>,
}

impl Model {
    /// A disk that shows these bytes, all durable.
    pub(crate) fn new(shown: std::sync::Arc<Vec<u8>>) -> Self {
        let first = Candidate {
            id: WriteId::MAX,
            content: Content::Shown,
            began: 0,
            ended: Some((0, true)),
        };
        let count = shown.len() / SECTOR as usize;
        Self {
            shown,
            sectors: vec![vec![first]; count],
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.shown.len()
    }

    /// A write of these sectors begins.
    pub(crate) fn issue(&mut self, id: WriteId, sectors: Range<u64>, stamp: Stamp, now: u64) {
        for sector in &mut self.sectors[sectors.start as usize..sectors.end as usize] {
            sector.push(Candidate {
                id,
                content: Content::Stamp(stamp),
                began: now,
                ended: None,
            });
        }
    }

    /// The client of a write was told its end.
    pub(crate) fn end(&mut self, id: WriteId, sectors: Range<u64>, ok: bool, now: u64) {
        for sector in &mut self.sectors[sectors.start as usize..sectors.end as usize] {
            for candidate in sector.iter_mut().filter(|candidate| candidate.id == id) {
                candidate.ended = Some((now, ok));
            }
        }
    }

    /// A flush that was asked for then has been answered: what it covers is durable, and nothing
    /// that was replaced before may be seen again.
    pub(crate) fn durable(&mut self, asked: u64) {
        for sector in &mut self.sectors {
            if sector.len() > 1 {
                let all = sector.clone();
                sector.retain(|candidate| !candidate.replaced_before(&all, asked));
            }
        }
    }

    fn fits(&self, content: Content, sector: u64, found: &[u8]) -> bool {
        match content {
            Content::Shown => {
                let start = (sector * SECTOR) as usize;
                self.shown[start..start + SECTOR as usize] == *found
            }
            Content::Stamp(stamp) => stamp.is(sector, found),
        }
    }

    /// What is wrong with the first of these sectors, read by a request that began then.
    pub(crate) fn complaint(&self, first: u64, bytes: &[u8], began: u64) -> Option<String> {
        let found = (first..).zip(bytes.chunks(SECTOR as usize));
        for (number, found) in found {
            let all = &self.sectors[number as usize];
            let seen = all
                .iter()
                .filter(|candidate| all.len() == 1 || !candidate.replaced_before(all, began))
                .any(|candidate| self.fits(candidate.content, number, found));
            if !seen {
                let word =
                    |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("8 bytes"));
                let of =
                    |word: u64| format!("write {} sector {}", word >> 32, word >> 8 & 0xff_ffff);
                return Some(format!(
                    "sector {number} starts with {} and ends with {}; allowed: {:?}",
                    of(word(0)),
                    of(word(504)),
                    all.iter().map(|one| one.content).collect::<Vec<_>>()
                ));
            }
        }
        None
    }

    /// What is wrong with the whole disk after a power cut.
    pub(crate) fn wrong(&self, bytes: &[u8]) -> Option<String> {
        self.complaint(0, bytes, 0)
    }
}
