//! One pass over a whole table: which clusters are used, and all that is wrong with the entries.
//!
//! Every read-write open makes this pass; it is the only way to see two entries that share a
//! cluster.

use super::bits::BitSet;
use super::classify::{Class, Classifier};
use super::image::Image;
use super::walk;
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::bat::EntryError;
use crate::format::header::{HEADER_LEN, Header};
use crate::format::layout::Layout;
use crate::units::{DiskCluster, FileOffset, len_u64};
use std::fmt;

/// Findings that are kept word for word; of the others only the number is known.
const KEPT: usize = 16;

/// Entries that count up from which on they are taken together.
const RUN_MIN: u64 = 16;

/// What is wrong with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The entry points nowhere useful.
    Entry(EntryError),
    /// Another entry names the same cluster.
    Duplicate(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry(error) => write!(f, "{error}"),
            Self::Duplicate(entry) => {
                write!(
                    f,
                    "the entry {entry} names a cluster that another one has too"
                )
            }
        }
    }
}

/// What a whole pass found.
#[derive(Debug)]
pub struct Survey {
    /// Clusters below [`Survey::limit`] that entries name, the table's own not among them.
    pub used: BitSet,
    /// Entries that are not 0.
    pub mapped: u64,
    /// One past the highest file cluster that a good entry names.
    pub used_end: u64,
    /// No file cluster at or above this will ever be handed out.
    pub limit: u64,
    /// The first faults, in disk order.
    pub faults: Vec<(DiskCluster, Fault)>,
    /// Number of all faults.
    pub fault_count: u64,
    /// Slots after the last entry that are not 0. They mean nothing and are never read as entries;
    /// a mend clears them, and whatever makes the table longer has to.
    pub stray_slots: u64,
    /// Bytes after the last whole cluster of the file.
    pub tail_len: u64,
    /// True when an entry points to that tail, so that it must be filled up, not cut.
    pub tail_used: bool,
}

impl Survey {
    /// The error for an image with faults, which writing would make worse.
    #[must_use]
    pub fn refusal(&self, image: &Image) -> Option<Error> {
        let (cluster, fault) = self.faults.first()?;
        let more = match self.fault_count {
            1 => String::new(),
            count => format!(", and {} more faults", count - 1),
        };
        Some(
            Error::why(ErrorKind::Corrupt, format!("{fault}{more}"))
                .in_file(image.path())
                .at_cluster(*cluster)
                .at_offset(Layout::entry_offset(*cluster))
                .fix(REPAIR_HINT),
        )
    }
}

struct Walk<'a> {
    layout: &'a Layout,
    classifier: Classifier<'a>,
    survey: Survey,
}

impl Walk<'_> {
    fn fault(&mut self, cluster: DiskCluster, fault: Fault) {
        self.survey.fault_count += 1;
        if self.survey.faults.len() < KEPT {
            self.survey.faults.push((cluster, fault));
        }
    }

    fn entry(&mut self, cluster: DiskCluster, entry: u32) -> Result<()> {
        self.survey.mapped += u64::from(entry != 0);
        match self
            .classifier
            .class(entry)
            .map_err(|e| e.at_cluster(cluster))?
        {
            Class::Hole => {}
            Class::Good(number) => self.survey.used_end = self.survey.used_end.max(number + 1),
            Class::Cut(_) => {
                self.survey.tail_used = true;
                self.fault(cluster, Fault::Entry(EntryError::CutByEnd(entry)));
            }
            Class::Shared(_) => self.fault(cluster, Fault::Duplicate(entry)),
            Class::Misaligned => self.fault(cluster, Fault::Entry(EntryError::Misaligned(entry))),
            Class::Bad(error) => self.fault(cluster, Fault::Entry(error)),
        }
        Ok(())
    }

    fn piece(&mut self, at: FileOffset, bytes: &[u8]) -> Result<()> {
        let entries_end = self.layout.table_end().get();
        let (entries, after) = bytes.split_at(
            usize::try_from(entries_end.saturating_sub(at.get()))
                .unwrap_or(usize::MAX)
                .min(bytes.len()),
        );
        let mut cluster = (at.get() - len_u64(HEADER_LEN)) / 4;
        let mut rest = entries;
        while let Some(first) = rest.first_chunk().map(|word| u32::from_le_bytes(*word)) {
            let count = run_len(first, rest);
            let run = u64::from(first)..u64::from(first) + count;
            let taken = count >= RUN_MIN && self.classifier.take_run(run.clone());
            if taken {
                self.survey.mapped += count;
                self.survey.used_end = self.survey.used_end.max(run.end);
            }
            for number in (0..count).filter(|_| !taken) {
                let entry = u32::try_from(run.start + number).unwrap_or(u32::MAX);
                self.entry(DiskCluster::new(cluster + number), entry)?;
            }
            cluster += count;
            rest = &rest[usize::try_from(4 * count).unwrap_or(rest.len())..];
        }
        let is_stray = |word: &&[u8]| walk::word(word) != 0;
        self.survey.stray_slots += len_u64(after.chunks_exact(4).filter(is_stray).count());
        Ok(())
    }
}

/// How many entries count up by one from the first of these, which is `first`.
fn run_len(first: u32, entries: &[u8]) -> u64 {
    let words = entries.chunks_exact(4).map(walk::word);
    let differs = |(number, word): (u32, u32)| first.checked_add(number) != Some(word);
    let whole = entries.len() / 4;
    let end = (0..).zip(words).position(differs).unwrap_or(whole);
    len_u64(end.max(1))
}

/// Walks the table of an image whose header allows writing.
pub fn survey(image: &Image, header: &Header) -> Result<Survey> {
    let layout = header.layout();
    let storage = image.storage();
    let file_len = storage.len()?;
    let whole = layout.cluster().whole_below(file_len);
    let classifier = Classifier::new(layout, file_len)?;
    let limit = classifier.limit();
    let mut walk = Walk {
        layout,
        classifier,
        survey: Survey {
            used: BitSet::new(0)?,
            mapped: 0,
            used_end: 0,
            limit,
            faults: Vec::new(),
            fault_count: 0,
            stray_slots: 0,
            tail_len: file_len.get() - layout.cluster().file_start(whole).get(),
            tail_used: false,
        },
    };
    walk::words(storage.as_ref(), layout.data_start(), |at, bytes| {
        walk.piece(at, bytes)
    })?;
    walk.survey.used = walk.classifier.finish().into_bits();
    Ok(walk.survey)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::header::{MAGIC_V1, MAGIC_V2, RawHeader};
    use crate::storage::mem::MemStorage;
    use std::path::Path;
    use std::sync::Arc;

    /// Ten entries, clusters of 4 KiB, table in cluster 0, `clusters` clusters in the file.
    fn image(magic: [u8; 16], clusters: usize, entries: &[(usize, u32)], extra: usize) -> Image {
        let raw = RawHeader {
            magic,
            disk_type: 2,
            heads: 0,
            cylinders: 0,
            cluster_sectors: 8,
            entry_count: 10,
            size_in_sectors: 80,
            in_use: 0,
            first_block: 8,
            flags: 0,
            extension: 0,
        };
        let mut bytes = vec![0; clusters * 4096 + extra];
        bytes[..64].copy_from_slice(&raw.encode());
        for (index, entry) in entries {
            bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
        }
        Image::expanding(Path::new("x.hds"), Arc::new(MemStorage::new(bytes))).unwrap()
    }

    fn survey_of(image: &Image) -> Survey {
        survey(image, image.header().unwrap()).unwrap()
    }

    #[test]
    fn a_good_table_has_its_clusters_and_no_faults() {
        let found = survey_of(&image(MAGIC_V2, 5, &[(0, 4), (3, 1), (9, 2)], 0));
        assert_eq!((found.mapped, found.used.len(), found.used_end), (3, 3, 5));
        assert_eq!(
            (found.fault_count, found.stray_slots, found.tail_len),
            (0, 0, 0)
        );
        assert_eq!(found.limit, 11);
    }

    #[test]
    fn every_fault_is_told_with_its_cluster() {
        let entries = [(0, 1), (1, 1), (2, 5), (3, u32::MAX)];
        let found = survey_of(&image(MAGIC_V2, 5, &entries, 0));
        let expected = [
            (DiskCluster::new(1), Fault::Duplicate(1)),
            (DiskCluster::new(2), Fault::Entry(EntryError::PastEnd(5))),
            (
                DiskCluster::new(3),
                Fault::Entry(EntryError::PastEnd(u32::MAX)),
            ),
        ];
        assert_eq!(found.faults, expected);
        let found = survey_of(&image(MAGIC_V1, 5, &[(0, 9), (1, 7)], 0));
        let expected = [
            (DiskCluster::new(0), Fault::Entry(EntryError::Misaligned(9))),
            (DiskCluster::new(1), Fault::Entry(EntryError::InTable(7))),
        ];
        assert_eq!(found.faults, expected);
    }

    /// Entries that count up are taken together, and nothing is lost by that.
    #[test]
    fn runs_count_as_what_their_entries_are() {
        let run = |slots: std::ops::Range<usize>, first: u32| {
            slots.clone().zip(first..).collect::<Vec<_>>()
        };
        let wide = |entries: &[(usize, u32)]| {
            let mut image = image(MAGIC_V2, 200, &[], 0);
            let header = *image.header().unwrap();
            let raw = RawHeader {
                entry_count: 100,
                size_in_sectors: 800,
                ..*header.raw()
            };
            let mut bytes = vec![0; 200 * 4096];
            bytes[..64].copy_from_slice(&raw.encode());
            for (index, entry) in entries {
                bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
            }
            image = Image::expanding(Path::new("x.hds"), Arc::new(MemStorage::new(bytes))).unwrap();
            survey_of(&image)
        };
        let good = wide(&[run(0..40, 1), run(50..100, 51)].concat());
        assert_eq!(
            (good.mapped, good.used.len(), good.fault_count),
            (90, 90, 0)
        );
        assert_eq!(good.used_end, 101);
        // The second run begins within the first, which has five of its clusters.
        let shared = wide(&[run(0..40, 1), run(50..90, 36)].concat());
        assert_eq!(
            (shared.mapped, shared.used.len(), shared.fault_count),
            (80, 75, 5)
        );
        assert_eq!(
            shared.faults[0],
            (DiskCluster::new(50), Fault::Duplicate(36))
        );
        // It ends past the file.
        let past = wide(&run(0..40, 190));
        assert_eq!(
            (past.mapped, past.fault_count, past.used_end),
            (40, 30, 200)
        );
        // It counts up from nothing.
        let from_zero = wide(&run(3..40, 0));
        assert_eq!((from_zero.mapped, from_zero.fault_count), (36, 0));
    }

    #[test]
    fn tails_and_stray_slots_are_seen() {
        let found = survey_of(&image(MAGIC_V2, 3, &[(10, 77), (11, 1)], 100));
        assert_eq!(
            (found.stray_slots, found.tail_len, found.tail_used),
            (2, 100, false)
        );
        let found = survey_of(&image(MAGIC_V2, 3, &[(5, 3)], 100));
        assert!(found.tail_used);
    }
}
