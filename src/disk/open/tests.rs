//! Images that are mended when they are opened, or refused as they are.

use super::*;
use crate::chain::bundle::{OpenedFile, Plain};
use crate::format::header::{IN_USE, MAGIC_V2, RawHeader};
use crate::storage::mem::MemStorage;
use crate::units::SectorCount;
use std::path::PathBuf;

/// Ten clusters of 4 KiB, marked in use; three of them are in the file, the last cut short.
fn image(entries: &[(usize, u32)]) -> Arc<MemStorage> {
    let raw = RawHeader {
        magic: MAGIC_V2,
        disk_type: 2,
        heads: 0,
        cylinders: 0,
        cluster_sectors: 8,
        entry_count: 10,
        size_in_sectors: 80,
        in_use: IN_USE,
        first_block: 8,
        flags: 0,
        extension: 0,
    };
    let mut bytes = vec![7; 3 * 4096 + 1000];
    bytes[..4096].fill(0);
    bytes[..64].copy_from_slice(&raw.encode());
    for (index, entry) in entries {
        bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
    }
    Arc::new(MemStorage::new(bytes))
}

/// A disk of one part for each image.
fn open_images(storages: &[&Arc<MemStorage>]) -> Result<Arc<Disk>> {
    open_told(storages).map(|(disk, _)| disk)
}

/// The same, with what the user is told.
fn open_told(storages: &[&Arc<MemStorage>]) -> Result<(Arc<Disk>, Vec<String>)> {
    open_as(storages, &DiskOptions::default())
}

fn open_as(
    storages: &[&Arc<MemStorage>],
    options: &DiskOptions,
) -> Result<(Arc<Disk>, Vec<String>)> {
    let part = |(number, storage): (u64, &&Arc<MemStorage>)| OpenedPart {
        start: SectorCount::new(80 * number),
        end: None,
        blocksize: None,
        files: vec![OpenedFile {
            path: PathBuf::from("x.hds"),
            storage: Arc::clone(storage) as crate::storage::SharedStorage,
            plain: Plain::No,
            guid: None,
        }],
    };
    let parts = (0..).zip(storages).map(part).collect();
    let images = OpenedImages::from_parts(PathBuf::from("x.hds"), parts);
    open(Arc::new(images), options)
}

#[test]
fn a_cluster_that_the_end_cuts_is_filled_up_with_zeros() {
    let storage = image(&[(0, 1), (4, 3)]);
    let disk = open_images(&[&storage]).unwrap();
    let mut found = [1; 4096];
    disk.read_at(crate::units::DiskOffset::new(4 * 4096), &mut found)
        .unwrap();
    assert!(found[..1000].iter().all(|byte| *byte == 7));
    assert!(found[1000..].iter().all(|byte| *byte == 0));
    disk.close().unwrap();
    assert_eq!(storage.to_vec().len(), 4 * 4096);
}

#[test]
fn two_that_share_it_are_refused_and_left_alone() {
    let storage = image(&[(0, 1), (4, 3), (5, 3)]);
    let before = storage.to_vec();
    let error = open_images(&[&storage]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(storage.to_vec() == before, "a refused open changes nothing");
}

#[test]
fn a_part_is_mended_only_if_all_parts_can_be_opened() {
    let (mendable, broken) = (image(&[(0, 1), (4, 3)]), image(&[(0, 1), (5, 1)]));
    let before = mendable.to_vec();
    let error = open_images(&[&mendable, &broken]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(
        mendable.to_vec() == before,
        "a refused open changes nothing"
    );
    open_images(&[&mendable, &image(&[])]).unwrap();
    assert!(mendable.to_vec() != before);
}

#[test]
fn no_more_is_missing_than_the_disk_has() {
    for (sectors, told) in [
        (80_u8, "bytes 37864 to 40959 of the disk are missing"),
        // The disk ends inside the cluster, behind what is there of it or before that.
        (75, "bytes 37864 to 38399 of the disk are missing"),
        (73, "nothing of the disk is missing"),
    ] {
        let storage = image(&[(9, 3)]);
        let size = crate::units::FileOffset::new(36);
        crate::storage::Storage::write_at(&*storage, size, &[sectors]).unwrap();
        let (_, notes) = open_told(&[&storage]).unwrap();
        assert!(notes.iter().any(|note| note.contains(told)), "{notes:?}");
    }
}

/// A reply that tells the thread that gave it.
struct Told(std::sync::mpsc::Sender<std::thread::ThreadId>);

impl crate::disk::ReadReply for Told {
    fn done(self, result: Result<&[u8]>) {
        assert_eq!(result.unwrap()[0], 7);
        self.0.send(std::thread::current().id()).unwrap();
    }
}

/// A request with its memory, which tells the thread that answers it.
struct Brings(Vec<u8>, std::sync::mpsc::Sender<std::thread::ThreadId>);

impl crate::disk::ReadInto for Brings {
    fn memory(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn done(self, result: Result<usize>) {
        assert_eq!((result.unwrap(), self.0[0]), (4096, 7));
        self.1.send(std::thread::current().id()).unwrap();
    }
}

impl crate::disk::DoneReply for Brings {
    fn done(self, result: Result<()>) {
        result.unwrap();
        self.1.send(std::thread::current().id()).unwrap();
    }

    fn brought(&self) -> &[u8] {
        &self.0
    }
}

#[test]
fn only_so_many_large_requests_stay_on_their_threads() {
    let options = DiskOptions {
        inline_order: 0,
        large_inline: InlineMax {
            reads: 3,
            writes: 2,
        },
        ..DiskOptions::default()
    };
    let storage = image(&[(0, 1)]);
    let (disk, _) = open_as(&[&storage], &options).unwrap();
    let mut buf = [0; 4096];
    // Loads the page of the map, and sets the in-use mark.
    disk.read_at(crate::units::DiskOffset::new(0), &mut buf)
        .unwrap();
    disk.write_at(crate::units::DiskOffset::new(0), &buf)
        .unwrap();
    let mut stay_here = || {
        let here = std::thread::current().id();
        let (told, heard) = std::sync::mpsc::channel();
        let start = crate::units::DiskOffset::new(0);
        disk.read(start, 4096, &mut buf, Told(told.clone()));
        let read = heard.recv() == Ok(here);
        disk.read_into(start, 4096, Brings(vec![0; 4096], told.clone()));
        assert_eq!(heard.recv() == Ok(here), read);
        disk.write_brought(start, Brings(vec![7; 4096], told));
        [read, heard.recv() == Ok(here)]
    };
    assert!((0..3).all(|_| stay_here() == [true; 2]));
    let one = disk.stay(4096, Kind::Read).unwrap();
    assert_eq!(stay_here(), [true; 2], "two of three are left");
    let two = disk.stay(4096, Kind::Write).unwrap();
    assert_eq!(stay_here(), [true, false], "writes leave more threads free");
    let three = disk.stay(4096, Kind::Read).unwrap();
    assert_eq!(stay_here(), [false; 2]);
    assert!(disk.stay(4096, Kind::Read).is_none());
    drop((one, three));
    assert_eq!(stay_here(), [true; 2]);
    drop(two);
    disk.close().unwrap();
}

/// Tells how a change went.
struct Went(std::sync::mpsc::Sender<Result<()>>);

impl crate::disk::DoneReply for Went {
    fn done(self, result: Result<()>) {
        self.0.send(result).unwrap();
    }
}

#[test]
fn what_comes_after_the_close_changes_nothing() {
    let storage = image(&[(0, 1)]);
    let options = DiskOptions {
        inline_order: 1,
        ..DiskOptions::default()
    };
    let (disk, _) = open_as(&[&storage], &options).unwrap();
    let start = crate::units::DiskOffset::new(0);
    disk.write_at(start, &[8; 8192]).unwrap();
    Arc::clone(&disk).close().unwrap();
    let closed = storage.to_vec();
    assert_eq!(&closed[44..48], &[0; 4], "the in-use mark");
    let (told, heard) = std::sync::mpsc::channel();
    // In place, in the pool, and what would give a cluster a place.
    disk.write(start, &[9; 512], Went(told.clone()));
    disk.write(start, &[9; 8192], Went(told.clone()));
    disk.zero(start, 8192, Went(told));
    for _ in 0..3 {
        assert_eq!(heard.recv().unwrap().unwrap_err().kind(), ErrorKind::Host);
    }
    assert!(disk.write_at(start, &[9; 8192]).is_err());
    assert!(storage.to_vec() == closed, "a closed image was changed");
    let (told, heard) = std::sync::mpsc::channel::<()>();
    disk.spawn(move || told.send(()).unwrap());
    assert!(heard.recv().is_err(), "a job ran after the close");
}
