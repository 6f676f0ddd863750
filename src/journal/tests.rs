//! Records, seals, and what an undo makes of them.
use super::*;
use crate::storage::Keep;
use crate::storage::mem::MemStorage;
use std::sync::Arc;

/// One file, always the same.
#[derive(Debug)]
struct OneFile(Arc<MemStorage>);

impl Directory for OneFile {
    fn open(&self, _: &str, _: bool) -> Result<SharedStorage> {
        Ok(self.0.clone())
    }
    fn create_new(&self, _: &str) -> Result<SharedStorage> {
        Ok(self.0.clone())
    }
    fn rename(&self, _: &str, _: &str) -> Result<()> {
        Ok(())
    }
    fn remove(&self, _: &str) -> Result<()> {
        Ok(())
    }
    fn entries(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

fn at(from: u64, to: u64) -> Range<FileOffset> {
    FileOffset::new(from)..FileOffset::new(to)
}

/// 3000 bytes of which the middle thousand are zeros.
fn original() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..3000_u32).map(|n| n as u8 | 1).collect();
    bytes[1000..2000].fill(0);
    bytes
}

/// A journal of all of the file, and the file.
fn sealed() -> (Arc<MemStorage>, Journal, MemStorage) {
    let (log, file) = (Arc::new(MemStorage::default()), MemStorage::new(original()));
    let mut journal = Journal::create(&OneFile(log.clone()), "x").unwrap();
    journal.record_len(FileOffset::new(3000)).unwrap();
    for (from, to) in [(0, 64), (64, 1000), (1000, 2000), (2000, 9000)] {
        journal.record(&file, at(from, to)).unwrap();
    }
    journal.seal(&OneFile(log.clone())).unwrap();
    (log, journal, file)
}

#[test]
fn old_bytes_and_the_old_length_come_back() {
    for len in [0, 100, 1500, 3000, 5000] {
        let (log, _, file) = sealed();
        file.zero(at(0, 3000), Keep::Nothing).unwrap();
        file.write_at(FileOffset::new(1200), &[9; 900]).unwrap();
        file.set_len(FileOffset::new(len)).unwrap();
        restore(&*log, &file).unwrap();
        assert_eq!(file.to_vec(), original(), "{len}");
        restore(&*log, &file).unwrap();
        assert_eq!(file.to_vec(), original(), "{len}");
    }
}

#[test]
fn a_range_is_recorded_once() {
    let (log, journal, file) = sealed();
    drop(journal);
    file.write_at(FileOffset::new(500), &[9; 900]).unwrap();
    let mut journal = Journal::resume(log.clone()).unwrap();
    journal.record_len(FileOffset::new(7)).unwrap();
    journal.record(&file, at(0, 64)).unwrap();
    journal.record(&file, at(400, 2900)).unwrap();
    let before = journal.len();
    journal.seal(&OneFile(log.clone())).unwrap();
    assert_eq!(before + 24, journal.len());
    assert_eq!(inspect(&*log, &file).unwrap().records, 5);
    restore(&*log, &file).unwrap();
    assert_eq!(file.to_vec(), original());
}

#[test]
fn what_follows_the_last_seal_is_not_believed() {
    let (log, mut journal, file) = sealed();
    let sound = log.to_vec();
    journal.record(&file, at(0, 3000)).unwrap();
    for cut in 0..sound.len() + 60 {
        let mut bytes = log.to_vec();
        bytes.truncate(cut);
        let found = inspect(&MemStorage::new(bytes), &file);
        assert_eq!(found.is_ok(), cut >= sound.len(), "{cut}");
    }
}

#[test]
fn no_changed_byte_is_believed() {
    let (log, _, file) = sealed();
    let sound = log.to_vec();
    for at in 0..sound.len() {
        let mut bytes = sound.clone();
        bytes[at] ^= 0x40;
        assert!(inspect(&MemStorage::new(bytes), &file).is_err(), "{at}");
    }
}

#[test]
fn a_complete_change_tells_what_it_left() {
    let (log, mut journal, file) = sealed();
    file.write_at(FileOffset::new(70), &[0xff; 20]).unwrap();
    file.set_len(FileOffset::new(2500)).unwrap();
    journal.complete(&file, None).unwrap();
    let found = inspect(&*log, &file).unwrap();
    assert!(found.complete && found.as_left);
    assert_eq!(found.first.unwrap()[..], original()[..64]);
    for (place, len) in [(70, 2500), (2400, 2500), (2600, 2601)] {
        let (other, byte) = (MemStorage::new(file.to_vec()), FileOffset::new(place));
        other.write_at(byte, &[0x55]).unwrap();
        assert_eq!(other.len().unwrap().get(), len);
        assert!(!inspect(&*log, &other).unwrap().as_left, "{place}");
    }
    restore(&*log, &file).unwrap();
    assert_eq!(file.to_vec(), original());
    let found = inspect(&*log, &file).unwrap();
    assert!(!found.complete && found.untouched);
}

#[test]
fn a_change_of_what_was_to_be_left_alone_is_seen() {
    let (log, file) = (Arc::new(MemStorage::default()), MemStorage::new(original()));
    let mut journal = Journal::create(&OneFile(log.clone()), "x").unwrap();
    for (from, to) in [(300, 400), (0, 64), (900, 1100)] {
        journal.record(&file, at(from, to)).unwrap();
    }
    journal.frame(&file, 1000).unwrap();
    journal.seal(&OneFile(log.clone())).unwrap();
    assert!(inspect(&*log, &file).unwrap().untouched);
    for (place, holds, untouched) in [
        (5, true, false),
        (64, false, true),
        (299, false, true),
        (300, true, false),
        (400, false, true),
        (899, false, true),
        (900, true, false),
        (1099, true, false),
        (1100, true, true),
    ] {
        let other = MemStorage::new(original());
        other.write_at(FileOffset::new(place), &[0x5a]).unwrap();
        let found = inspect(&*log, &other).unwrap();
        assert_eq!(
            (found.frame_holds, found.untouched),
            (holds, untouched),
            "{place}"
        );
    }
}

#[test]
fn what_an_undo_cuts_or_relies_on_must_be_as_it_was() {
    let (log, file) = (Arc::new(MemStorage::default()), MemStorage::new(original()));
    let mut journal = Journal::create(&OneFile(log.clone()), "x").unwrap();
    journal.record_len(FileOffset::new(3000)).unwrap();
    journal.record(&file, at(0, 64)).unwrap();
    journal.watch(500..600).unwrap();
    journal.record_late(&file, at(1000, 1100)).unwrap();
    journal.seal(&OneFile(log.clone())).unwrap();
    file.set_len(FileOffset::new(3500)).unwrap();
    let closed = [7; 64];
    journal.complete(&file, Some(closed)).unwrap();
    let found = inspect(&*log, &file).unwrap();
    assert!(found.complete && found.as_left_last && !found.as_left);
    file.write_at(FileOffset::ZERO, &closed).unwrap();
    let found = inspect(&*log, &file).unwrap();
    assert!(found.as_left && !found.as_left_last);
    for (place, as_left) in [
        (499, true),
        (500, false),
        (599, false),
        (600, true),
        (1050, false),
        (2999, true),
        (3000, false),
        (3499, false),
    ] {
        let other = MemStorage::new(file.to_vec());
        other.write_at(FileOffset::new(place), &[0x5a]).unwrap();
        assert_eq!(inspect(&*log, &other).unwrap().as_left, as_left, "{place}");
    }
    begin_undo(&*log).unwrap();
    begin_undo(&*log).unwrap();
    let found = inspect(&*log, &file).unwrap();
    assert!(!found.complete && found.as_left);
    restore(&*log, &file).unwrap();
    assert_eq!(file.to_vec(), original());
}

#[test]
fn random_bytes_never_panic() {
    let (log, _, file) = sealed();
    let sound = log.to_vec();
    let mut state = 1_u64;
    for _ in 0..2000 {
        let mut bytes = sound.clone();
        for _ in 0..3 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(99);
            let at = (state >> 33) as usize % bytes.len();
            bytes[at] = (state >> 20) as u8;
        }
        let _ = Journal::resume(Arc::new(MemStorage::new(bytes)));
    }
    assert!(inspect(&MemStorage::default(), &file).is_err());
}

/// 4 GiB of which the first 8 KiB hold something. Nobody needs to read the rest.
#[derive(Debug)]
struct Vast(MemStorage);

impl Vast {
    const LEN: u64 = 1 << 32;
    const DATA: u64 = 8192;
}

impl Storage for Vast {
    fn len(&self) -> Result<FileOffset> {
        Ok(FileOffset::new(Self::LEN))
    }
    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        assert!(
            at.get() + len_u64(buf.len()) <= Self::DATA,
            "a hole is read"
        );
        self.0.read_at(at, buf)
    }
    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        self.0.write_at(at, buf)
    }
    fn sync_data(&self) -> Result<()> {
        Ok(())
    }
    fn set_len(&self, _: FileOffset) -> Result<()> {
        unreachable!("nobody cuts it")
    }
    fn allocate(&self, _: Range<FileOffset>) -> Result<()> {
        unreachable!("nobody lengthens it")
    }
    fn zero(&self, _: Range<FileOffset>, _: Keep) -> Result<()> {
        unreachable!("nobody punches it")
    }
    fn copy_from(&self, _: FileOffset, _: &dyn Storage, _: Range<FileOffset>) -> Result<bool> {
        Ok(false)
    }
    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let end = FileOffset::new(Self::DATA);
        Ok((from < end).then_some(from..end))
    }
    fn allocated_bytes(&self) -> Result<u64> {
        Ok(Self::DATA)
    }
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
    fn file_id(&self) -> Option<crate::storage::FileId> {
        None
    }
}

#[test]
fn what_was_never_written_is_not_read() {
    let log = Arc::new(MemStorage::default());
    let file = Vast(MemStorage::new(vec![0; 8192]));
    file.write_at(FileOffset::new(0), &[1; 100]).unwrap();
    let mut journal = Journal::create(&OneFile(log.clone()), "x").unwrap();
    journal.record_len(file.len().unwrap()).unwrap();
    journal.record(&file, at(0, 64)).unwrap();
    journal
        .record_late(&file, at(1 << 31, (1 << 31) + (8 << 20)))
        .unwrap();
    journal.watch(1 << 30..1 << 31).unwrap();
    journal.frame(&file, 1 << 32).unwrap();
    journal.seal(&OneFile(log.clone())).unwrap();
    journal.complete(&file, None).unwrap();
    let found = inspect(&*log, &file).unwrap();
    assert!(found.untouched && found.frame_holds && found.as_left);
    // Not a byte of the rest may be another, nor lie elsewhere.
    for (place, was) in [(70, 1), (5000, 0), (4096, 0)] {
        file.write_at(FileOffset::new(place), &[9]).unwrap();
        let holds = inspect(&*log, &file).unwrap().frame_holds;
        assert!(!holds, "a change at {place} goes unnoticed");
        file.write_at(FileOffset::new(place), &[was]).unwrap();
        assert!(inspect(&*log, &file).unwrap().frame_holds);
    }
    file.write_at(FileOffset::new(64), &[0; 36]).unwrap();
    file.write_at(FileOffset::new(4096), &[1; 36]).unwrap();
    assert!(!inspect(&*log, &file).unwrap().frame_holds, "moved");
}
