//! Broken images, mended, repeated, and undone.
use super::*;
use crate::format::header::{CLOSED_V21, IN_USE, MAGIC_V1, MAGIC_V2, RawHeader};
use crate::plan::repair::Trouble;
use crate::storage::SharedStorage;
use crate::storage::mem::MemStorage;
use parking_lot::Mutex;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const C: usize = 4096;

/// Names and files in memory.
#[derive(Debug, Default)]
struct MemDirectory {
    files: Mutex<BTreeMap<String, Arc<MemStorage>>>,
    /// Bytes that are free.
    room: Option<u64>,
}

impl Directory for MemDirectory {
    fn open(&self, name: &str, _write: bool) -> Result<SharedStorage> {
        let found = self.files.lock().get(name).cloned();
        Ok(found.ok_or_else(|| Error::new(ErrorKind::Missing))?)
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        let mut files = self.files.lock();
        if files.contains_key(name) {
            return Err(Error::errno(libc::EEXIST));
        }
        let file = Arc::new(MemStorage::default());
        files.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut files = self.files.lock();
        let file = files
            .remove(from)
            .ok_or_else(|| Error::new(ErrorKind::Missing))?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        let gone = self.files.lock().remove(name);
        gone.map(|_| ())
            .ok_or_else(|| Error::new(ErrorKind::Missing))
    }

    fn entries(&self) -> Result<Vec<String>> {
        Ok(self.files.lock().keys().cloned().collect())
    }

    fn available(&self) -> Result<Option<u64>> {
        Ok(self.room)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

fn header(magic: [u8; 16]) -> RawHeader {
    RawHeader {
        magic,
        disk_type: 2,
        heads: 16,
        cylinders: 1,
        cluster_sectors: 8,
        entry_count: 20,
        size_in_sectors: 160,
        in_use: 0,
        first_block: 8,
        flags: 0,
        extension: 0,
    }
}

/// 20 entries of 4 KiB clusters; cluster n of the file is filled with n. `extra` bytes follow.
fn image(raw: &RawHeader, clusters: usize, entries: &[(usize, u32)], extra: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..clusters).flat_map(|n| vec![n as u8; C]).collect();
    bytes[..C].fill(0);
    bytes.resize(bytes.len() + extra, 0xee);
    bytes[..64].copy_from_slice(&raw.encode());
    for (index, entry) in entries {
        bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

fn entry(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[64 + 4 * index..68 + 4 * index].try_into().unwrap())
}

/// What a disk cluster holds, as a reader of version 2 sees it.
fn content(bytes: &[u8], index: usize) -> Vec<u8> {
    match entry(bytes, index) as usize {
        0 => vec![0; C],
        number => bytes[number * C..(number + 1) * C].to_vec(),
    }
}

fn words(checked: &Checked) -> Vec<&'static str> {
    let findings = checked.report.findings.iter();
    findings.map(|finding| finding.trouble.word()).collect()
}

/// Checks, repairs, checks again, repairs again, and undoes. Returns the image as mended.
fn mended(bytes: &[u8], expected: &[&str]) -> Vec<u8> {
    let storage = MemStorage::new(bytes.to_vec());
    let found = check::check_image(&storage).unwrap();
    assert_eq!(words(&found), expected);
    assert_eq!(storage.to_vec(), bytes, "a check changes nothing");
    let directory = MemDirectory::default();
    let keep = KeepOld::In {
        directory: &directory,
        image: "x",
    };
    let done = repair_image(&storage, keep, &Policy::default()).unwrap();
    assert!(is_clean(&done.after), "{:?}", words(&done.after));
    let result = storage.to_vec();
    let again = repair_image(&storage, keep, &Policy::default()).unwrap();
    assert_eq!((again.fixes, again.undo), (vec![], None));
    assert_eq!(storage.to_vec(), result);
    if let Some(name) = done.undo {
        assert_eq!(name, "x.undo");
        undo_image(&storage, &directory, &name).unwrap();
        assert_eq!(directory.entries().unwrap(), [""; 0]);
    }
    assert!(storage.to_vec() == bytes, "an undo gives every byte back");
    result
}

#[test]
fn a_clean_image_is_left_alone() {
    let bytes = image(&header(MAGIC_V2), 4, &[(0, 3), (7, 1), (9, 2)], 0);
    assert_eq!(mended(&bytes, &[]), bytes);
    let mut raw = header(MAGIC_V2);
    raw.in_use = 0x3232_6470;
    let bytes = image(&raw, 4, &[(0, 3), (7, 1), (9, 2)], 0);
    assert_eq!(mended(&bytes, &[]), bytes, "a creator's tag is no trouble");
}

#[test]
fn invalid_entries_become_holes() {
    let bytes = image(
        &header(MAGIC_V2),
        4,
        &[(0, 3), (1, 4), (2, u32::MAX), (3, 1)],
        0,
    );
    let result = mended(&bytes, &["entry-past-end", "leaked-clusters"]);
    assert_eq!([0, 1, 2, 3].map(|n| entry(&result, n)), [3, 0, 0, 1]);
    assert_eq!(content(&result, 0), vec![3; C]);
    assert_eq!(result[2 * C..3 * C], vec![0; C], "the leak is punched");
}

#[test]
fn shared_clusters_are_copied_apart() {
    let bytes = image(&header(MAGIC_V2), 4, &[(0, 3), (1, 3), (5, 3), (8, 1)], 0);
    let result = mended(&bytes, &["entry-shared", "leaked-clusters"]);
    assert_eq!([0, 1, 5, 8].map(|n| entry(&result, n)), [3, 2, 4, 1]);
    for index in [0, 1, 5] {
        assert_eq!(content(&result, index), vec![3; C]);
    }
    assert_eq!(result.len(), 5 * C);
}

#[test]
fn nothing_is_begun_without_room_for_the_copies() {
    let bytes = image(&header(MAGIC_V2), 4, &[(0, 3), (1, 3), (5, 3), (8, 1)], 0);
    let storage = MemStorage::new(bytes.clone());
    let checked = check::check_image(&storage).unwrap();
    let steps = fixes(&checked.facts, Policy::default()).unwrap();
    let wanted = 2 * len_u64(C);
    assert_eq!(copied_bytes(&checked.facts, &steps), wanted);
    for room in [0, wanted - 1, wanted] {
        let directory = MemDirectory {
            room: Some(room),
            ..MemDirectory::default()
        };
        let keep = KeepOld::In {
            directory: &directory,
            image: "x",
        };
        let done = repair_image(&storage, keep, &Policy::default());
        assert_eq!(done.is_ok(), room >= wanted, "{room}: {done:?}");
        if let Err(error) = done {
            assert_eq!(error.kind(), ErrorKind::Io(libc::ENOSPC));
            assert!(storage.to_vec() == bytes && directory.files.lock().is_empty());
        }
    }
}

#[test]
fn a_wish_to_stop_is_heard_and_the_way_is_told() {
    let bytes = image(&header(MAGIC_V2), 4, &[(0, 3), (1, 3), (5, 3), (8, 1)], 0);
    let storage = MemStorage::new(bytes.clone());
    let directory = MemDirectory::default();
    let keep = KeepOld::In {
        directory: &directory,
        image: "x",
    };
    let progress = Progress::default();
    progress.cancel();
    let stopped = repair_image_with(&storage, keep, &Policy::default(), &progress);
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Interrupted);
    assert!(storage.to_vec() == bytes && directory.files.lock().is_empty());
    let progress = Progress::default();
    repair_image_with(&storage, keep, &Policy::default(), &progress).unwrap();
    let seen = progress.seen();
    assert!(seen.step > 3 && seen.done <= seen.total, "{seen:?}");
}

#[test]
fn a_copy_never_makes_an_entry_past_the_end_valid() {
    // The copy of entry 1 goes to cluster 4, which entry 2 names wrongly.
    let bytes = image(
        &header(MAGIC_V2),
        4,
        &[(0, 3), (1, 3), (2, 4), (3, 1), (4, 2)],
        0,
    );
    let result = mended(&bytes, &["entry-past-end", "entry-shared"]);
    assert_eq!([0, 1, 2].map(|n| entry(&result, n)), [3, 4, 0]);
}

#[test]
fn a_cut_cluster_is_filled_up_and_a_tail_cut_off() {
    let bytes = image(&header(MAGIC_V2), 3, &[(0, 3), (1, 1), (2, 2), (3, 3)], 100);
    let result = mended(&bytes, &["entry-cut", "entry-shared"]);
    assert_eq!(result.len(), 5 * C);
    let mut expected = vec![0xee; 100];
    expected.resize(C, 0);
    assert_eq!(content(&result, 0), expected);
    assert_eq!(content(&result, 3), expected);
    let bytes = image(&header(MAGIC_V2), 5, &[(0, 1)], 100);
    assert_eq!(mended(&bytes, &["leaked-tail"]).len(), 2 * C);
}

#[test]
fn entries_off_the_borders_are_moved_with_their_content() {
    let bytes = image(
        &header(MAGIC_V1),
        6,
        &[(0, 8), (1, 17), (2, 17), (3, 32), (4, 40)],
        0,
    );
    let result = mended(&bytes, &["entry-misaligned"]);
    let sectors = [0, 1, 2, 3, 4].map(|n| entry(&result, n));
    assert_eq!(sectors, [8, 48, 56, 32, 40]);
    let mut expected = vec![2; C - 512];
    expected.resize(C, 3);
    for index in [1, 2] {
        let at = 512 * sectors[index] as usize;
        assert_eq!(result[at..at + C], expected);
    }
}

#[test]
fn marks_slots_and_stale_extensions_go() {
    let mut raw = header(MAGIC_V2);
    (raw.in_use, raw.extension, raw.flags) = (IN_USE, 77, 1);
    let bytes = image(&raw, 2, &[(0, 1), (20, 9), (22, 1)], 0);
    let result = mended(&bytes, &["in-use", "stray-slots", "extension-stale"]);
    let mut clean = header(MAGIC_V2);
    clean.flags = 0;
    assert_eq!(result, image(&clean, 2, &[(0, 1)], 0));
    let mut raw = header(MAGIC_V2);
    (raw.in_use, raw.extension) = (CLOSED_V21, 16);
    let bytes = image(&raw, 3, &[(0, 1)], 0);
    let result = mended(&bytes, &["extension-bad", "leaked-tail"]);
    assert_eq!(result, image(&header(MAGIC_V2), 2, &[(0, 1)], 0));
}

#[test]
fn header_fields_that_the_rest_tells_are_set_right() {
    let good = image(&header(MAGIC_V2), 3, &[(0, 1), (19, 2)], 0);
    for (at, value) in [
        (16, 3_u32),
        (32, 19),
        (32, 0),
        (32, u32::MAX),
        (48, 0),
        (48, 1),
        (48, 7),
        (48, 16),
        (48, 4096),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let storage = MemStorage::new(bytes.clone());
        let done = repair_image(&storage, KeepOld::Nowhere, &Policy::default()).unwrap();
        let troubles: Vec<Trouble> = done
            .before
            .report
            .findings
            .iter()
            .map(|finding| finding.trouble)
            .collect();
        assert!(
            matches!(troubles[..], [Trouble::Field(_)]),
            "{value} at {at}: {troubles:?}"
        );
        assert_eq!(storage.to_vec(), good, "{value} at {at}");
    }
    for (at, value) in [(0, 0_u32), (28, 0), (36, 1 << 30)] {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let storage = MemStorage::new(bytes.clone());
        let found = check::check_image(&storage).unwrap();
        assert!(found.report.has_unmendable(), "{value} at {at}");
        let refused = repair_image(&storage, KeepOld::Nowhere, &Policy::default());
        assert!(refused.is_err(), "{value} at {at}");
        assert_eq!(storage.to_vec(), bytes);
    }
}

#[test]
fn a_file_cut_within_its_table_clusters_is_lengthened() {
    let mut bytes = image(&header(MAGIC_V2), 2, &[], 0);
    bytes.truncate(1000);
    let result = mended(&bytes, &["short-table"]);
    assert_eq!(result.len(), C);
    bytes.truncate(100);
    let found = check::check_image(&MemStorage::new(bytes)).unwrap();
    assert_eq!(words(&found), ["header"]);
}

#[test]
fn leaks_alone_are_mended_on_request_unless_entries_are_bad() {
    let policy = Policy { leaks_only: true };
    let mut raw = header(MAGIC_V2);
    raw.in_use = IN_USE;
    let good = header(MAGIC_V2);
    let storage = MemStorage::new(image(&good, 6, &[(0, 3)], 10));
    let done = repair_image(&storage, KeepOld::Nowhere, &policy).unwrap();
    assert_eq!(done.fixes, [Fix::Punch, Fix::Cut]);
    assert_eq!(words(&done.after), [""; 0]);
    let mut unbelieved = good;
    (unbelieved.in_use, unbelieved.extension) = (CLOSED_V21, 16);
    for (header, entry) in [
        (&raw, (0, 3)),
        (&good, (1, 9)),
        (&good, (20, 9)),
        (&unbelieved, (0, 3)),
    ] {
        let bytes = image(header, 6, &[(0, 3), (3, 4), entry], 10);
        refused_unchanged(&bytes, &policy);
    }
}

/// A repair is refused, and the image is as it was.
fn refused_unchanged(bytes: &[u8], policy: &Policy) -> ErrorKind {
    let storage = MemStorage::new(bytes.to_vec());
    let refused = repair_image(&storage, KeepOld::Nowhere, policy).unwrap_err();
    assert!(storage.to_vec() == bytes, "a refusal changes nothing");
    refused.kind()
}

/// An image without fault in `mapped` clusters of `sectors`, 100 entries behind each other.
fn sound(magic: [u8; 16], sectors: usize, entries: usize, mapped: usize) -> Vec<u8> {
    let (size, n) = (512 * sectors, u32::try_from(entries).unwrap());
    let mut raw = header(magic);
    let table = (64 + 4 * entries).div_ceil(size);
    raw.cluster_sectors = u32::try_from(sectors).unwrap();
    raw.entry_count = n;
    raw.size_in_sectors = u64::from(n * raw.cluster_sectors);
    raw.first_block = u32::try_from(table * sectors).unwrap();
    let mut bytes = vec![0; (table + mapped) * size];
    bytes[..64].copy_from_slice(&raw.encode());
    let unit = if magic == MAGIC_V1 { sectors } else { 1 };
    for index in 0..mapped {
        let word = u32::try_from((table + index) * unit).unwrap();
        bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&word.to_le_bytes());
        bytes[(table + index) * size..][..size].fill(u8::try_from(index % 255).unwrap() + 1);
    }
    bytes
}

fn patched(mut bytes: Vec<u8>, at: usize, value: u32) -> Vec<u8> {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    bytes
}

#[test]
fn headers_that_lie_are_not_followed() {
    let both = [false, true].map(|leaks_only| Policy { leaks_only });
    let v2 = |entries, mapped| sound(MAGIC_V2, 8, entries, mapped);
    let mut other_magic = sound(MAGIC_V2, 64, 320, 60);
    other_magic[..16].copy_from_slice(&MAGIC_V1);
    let mut same = sound(MAGIC_V1, 64, 320, 60);
    same[..16].copy_from_slice(&MAGIC_V2);
    let mut tail = patched(v2(10_000, 1000), 28, 16);
    tail.resize(tail.len() * 11 / 10, 0xee);
    let mut moved = sound(MAGIC_V2, 64, 320, 100);
    moved.resize(moved.len() + 100, 7);
    for (story, bytes) in [
        (
            "a late first block",
            patched(sound(MAGIC_V2, 64, 320, 100), 48, 64 * 40),
        ),
        ("a late first block and a tail", patched(moved, 48, 64 * 40)),
        ("version 2 called 1", other_magic),
        ("version 1 called 2", same),
        ("half the cluster size", patched(v2(3000, 300), 28, 4)),
        (
            "half the cluster size, large",
            patched(sound(MAGIC_V2, 64, 3000, 50), 28, 32),
        ),
        ("twice the cluster size", tail),
        ("entries behind the disk", patched(v2(100, 60), 36, 50 * 8)),
    ] {
        for policy in &both {
            let kind = refused_unchanged(&bytes, policy);
            assert_eq!(kind, ErrorKind::Corrupt, "{story}");
        }
        let found = check::check_image(&MemStorage::new(bytes)).unwrap();
        assert!(found.report.has_unmendable(), "{story}");
    }
}

#[test]
fn words_behind_the_tables_clusters_are_no_slots() {
    let mut raw = header(MAGIC_V2);
    raw.first_block = 32;
    let mut bytes = image(&raw, 6, &[(0, 4), (3, 5), (20, 9)], 0);
    let result = mended(&bytes, &["stray-slots"]);
    assert_eq!(result[C..], bytes[C..], "data before the first block");
    bytes[64 + 4 * 20..68 + 4 * 20].fill(0);
    assert_eq!(mended(&bytes, &[]), bytes);
}

#[test]
fn an_extension_of_another_program_is_left_alone() {
    let mut raw = header(MAGIC_V2);
    (raw.in_use, raw.extension) = (0x3232_6470, 16);
    let bytes = image(&raw, 4, &[(0, 1)], 100);
    assert_eq!(mended(&bytes, &["extension-foreign"]), bytes);
    let bytes = image(&raw, 4, &[(0, 1), (1, 3), (2, 9)], 100);
    let kind = refused_unchanged(&bytes, &Policy::default());
    assert_eq!(kind, ErrorKind::Unsupported);
}

#[test]
fn an_undo_after_a_change_is_refused() {
    let bytes = image(&header(MAGIC_V2), 4, &[(0, 3), (1, 9)], 0);
    let storage = MemStorage::new(bytes);
    let directory = MemDirectory::default();
    let keep = KeepOld::In {
        directory: &directory,
        image: "x",
    };
    let done = repair_image(&storage, keep, &Policy::default()).unwrap();
    storage.write_at(FileOffset::new(68), &[2]).unwrap();
    let now = storage.to_vec();
    let refused = undo_image(&storage, &directory, &done.undo.unwrap()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
    assert_eq!(storage.to_vec(), now);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Any header, any entries: a check does not panic, a repair leaves a clean check or changes
    /// nothing, a second one finds nothing, an undo gives every byte back, and what good entries
    /// name is as it was.
    #[test]
    fn whatever_is_wrong_is_mended_or_said(
        v1 in any::<bool>(),
        clusters in 1_usize..12,
        extra in 0_usize..3000,
        cut in prop_oneof![3 => Just(usize::MAX), 1 => 0_usize..9000],
        entries in proptest::collection::vec((0..24_usize, 0..14_u32), 0..12),
        wild in proptest::collection::vec((0..24_usize, any::<u32>()), 0..2),
        patches in proptest::collection::vec((16..64_usize, any::<u8>()), 0..3),
        fields in proptest::collection::vec((4..16_usize, 0..30_u32), 0..2),
    ) {
        let mut raw = header(if v1 { MAGIC_V1 } else { MAGIC_V2 });
        raw.flags = 0;
        let mut all = entries.clone();
        if v1 {
            all.iter_mut().for_each(|(n, entry)| *entry = *entry * 8 + u32::from(*n % 7 == 0));
        }
        all.extend(&wild);
        let mut bytes = image(&raw, clusters, &all, extra);
        for (field, value) in &fields {
            bytes[4 * field..4 * field + 4].copy_from_slice(&value.to_le_bytes());
        }
        for (at, byte) in &patches {
            // Clusters of gigabytes are right, and no match for files in memory.
            if !(30..32).contains(at) {
                bytes[*at] = *byte;
            }
        }
        bytes.truncate(cut);
        let storage = MemStorage::new(bytes.clone());
        let found = check::check_image(&storage).unwrap();
        let directory = MemDirectory::default();
        let keep = KeepOld::In { directory: &directory, image: "x" };
        match repair_image(&storage, keep, &Policy::default()) {
            Err(_) => {
                assert!(found.report.has_unmendable());
                assert_eq!(storage.to_vec(), bytes);
            }
            Ok(done) => {
                assert!(!found.report.has_unmendable());
                assert_eq!(done.fixes.is_empty(), is_clean(&found), "{:?}", words(&found));
                assert!(is_clean(&done.after), "{:?} {:?}", words(&found), words(&done.after));
                let result = storage.to_vec();
                let again = repair_image(&storage, keep, &Policy::default()).unwrap();
                assert!(again.fixes.is_empty());
                assert_eq!(storage.to_vec(), result);
                same_good_clusters(&found, &bytes, &result);
                if let Some(name) = done.undo {
                    undo_image(&storage, &directory, &name).unwrap();
                }
                assert_eq!(storage.to_vec(), bytes);
            }
        }
    }
}

/// What entries that are no trouble name is the same before and after.
fn same_good_clusters(found: &Checked, before: &[u8], after: &[u8]) {
    let Ok(normal) = &found.facts.normal else {
        return;
    };
    let layout = normal.header.layout();
    let size = layout.cluster().bytes() as usize;
    for index in 0..layout.entry_count() as usize {
        let (old, new) = (entry(before, index), entry(after, index));
        let start = |entry| layout.entry_start(entry).get() as usize;
        if old != 0 && new != 0 && start(old) < before.len() {
            let end = (start(old) + size).min(before.len());
            let mut expected = before[start(old)..end].to_vec();
            expected.resize(size, 0);
            assert_eq!(after[start(new)..start(new) + size], expected, "{index}");
        }
        let sound = layout
            .check_entry(old, FileOffset::new(before.len() as u64))
            .is_ok();
        assert!(old == 0 || new != 0 || !sound, "entry {index} was lost");
    }
}
