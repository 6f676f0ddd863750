//! Requests that a transport carries out, and keeps for as long as it likes.

use super::*;
use crate::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use crate::disk::{DiskOptions, DoneReply, ReadInto};
use crate::error::ErrorKind;
use crate::format::header::{MAGIC_V2, RawHeader};
use crate::storage::mem::MemStorage;
use crate::storage::{FileId, Keep, Storage};
use crate::units::SectorCount;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

const CLUSTER: usize = 4096;

/// A file in memory that lends its bytes.
#[derive(Debug, Default)]
struct Lending {
    file: MemStorage,
    refuses: AtomicBool,
    lent: AtomicUsize,
    /// What every read and write fails with, if not 0.
    fails: AtomicI32,
}

impl Lending {
    fn check(&self, at: FileOffset) -> Result<()> {
        match self.fails.load(SeqCst) {
            0 => Ok(()),
            errno => Err(Error::errno(errno).at_offset(at)),
        }
    }
}

impl Storage for Lending {
    fn len(&self) -> Result<FileOffset> {
        self.file.len()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        self.check(at)?;
        self.file.read_at(at, buf)
    }

    fn read_now(&self, _: FileOffset, _: &mut [u8]) -> Result<usize> {
        Ok(0)
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        self.check(at)?;
        self.file.write_at(at, buf)
    }

    fn sync_data(&self) -> Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.file.set_len(len)
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        self.file.allocate(range)
    }

    fn zero(&self, range: Range<FileOffset>, keep: Keep) -> Result<()> {
        self.file.zero(range, keep)
    }

    fn copy_from(&self, _: FileOffset, _: &dyn Storage, _: Range<FileOffset>) -> Result<bool> {
        Ok(false)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        self.file.next_data(from)
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.file.allocated_bytes()
    }

    fn drop_cache(&self) -> Result<()> {
        self.file.drop_cache()
    }

    fn go_direct(&self) -> Result<u64> {
        Ok(512)
    }

    fn lend(&self, _: FileOffset, _: &[u8], _: Way) -> bool {
        let lends = !self.refuses.load(SeqCst);
        self.lent.fetch_add(usize::from(lends), SeqCst);
        lends
    }

    fn give_back(&self, _: FileOffset, _: usize, _: Way) {
        self.lent.fetch_sub(1, SeqCst);
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

enum Said {
    Started(Request, Moving),
    Done(Result<usize>, Vec<u8>),
}

/// A request whose transport takes whatever there is to move.
struct Request {
    bytes: Vec<u8>,
    said: Sender<Said>,
}

impl Request {
    fn end(self, result: Result<usize>) {
        let Self { bytes, said } = self;
        said.send(Said::Done(result, bytes)).unwrap();
    }

    fn keep(self, moving: Moving) {
        let said = self.said.clone();
        said.send(Said::Started(self, moving)).unwrap();
    }
}

impl ReadInto for Request {
    fn memory(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn done(self, result: Result<usize>) {
        self.end(result);
    }

    fn start(self, moving: Moving) -> std::result::Result<(), (Self, Moving)> {
        self.keep(moving);
        Ok(())
    }
}

impl DoneReply for Request {
    fn done(self, result: Result<()>) {
        let len = self.bytes.len();
        self.end(result.map(|()| len));
    }

    fn brought(&self) -> &[u8] {
        &self.bytes
    }

    fn start(self, moving: Moving) -> std::result::Result<(), (Self, Moving)> {
        self.keep(moving);
        Ok(())
    }
}

/// Ten clusters; the first two are in order in the file, then the sixth.
fn open() -> (Arc<Lending>, Arc<Disk>) {
    let raw = RawHeader {
        magic: MAGIC_V2,
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
    let mut bytes: Vec<u8> = (0..4 * CLUSTER).map(|at| (at / 512) as u8).collect();
    bytes[..CLUSTER].fill(0);
    bytes[..64].copy_from_slice(&raw.encode());
    for (index, entry) in [(0, 1_u32), (1, 2), (5, 3)] {
        bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
    }
    let storage = Arc::new(Lending {
        file: MemStorage::new(bytes),
        ..Lending::default()
    });
    let part = OpenedPart {
        start: SectorCount::new(0),
        end: None,
        blocksize: None,
        files: vec![OpenedFile {
            path: PathBuf::from("x.hds"),
            storage: Arc::clone(&storage) as SharedStorage,
            plain: Plain::No,
            guid: None,
        }],
    };
    let images = OpenedImages::from_parts(PathBuf::from("x.hds"), vec![part]);
    let options = DiskOptions {
        direct: true,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    };
    let (disk, _) = crate::disk::open(Arc::new(images), &options).unwrap();
    // The page of the map, and the mark in the file.
    disk.write_at(cluster(1), &[1; CLUSTER]).unwrap();
    disk.flush_now().unwrap();
    (storage, disk)
}

fn cluster(number: usize) -> DiskOffset {
    DiskOffset::new((number * CLUSTER) as u64)
}

fn read(disk: &Arc<Disk>, at: DiskOffset, len: usize) -> (Said, Receiver<Said>) {
    let (said, heard) = channel();
    let bytes = vec![0xee; len];
    disk.read_into(at, len, Request { bytes, said });
    (heard.recv().unwrap(), heard)
}

fn write(disk: &Arc<Disk>, at: DiskOffset, bytes: &[u8]) -> (Said, Receiver<Said>) {
    let (said, heard) = channel();
    let bytes = bytes.to_vec();
    disk.write_brought(at, Request { bytes, said });
    (heard.recv().unwrap(), heard)
}

fn started((said, heard): (Said, Receiver<Said>)) -> (Request, Moving, Receiver<Said>) {
    match said {
        Said::Started(request, moving) => (request, moving, heard),
        Said::Done(result, _) => panic!("it was not to be answered: {result:?}"),
    }
}

fn done(said: Said) -> (Result<usize>, Vec<u8>) {
    match said {
        Said::Done(result, bytes) => (result, bytes),
        Said::Started(_, moving) => panic!("the transport should not have it: {moving:?}"),
    }
}

#[test]
fn what_lies_in_one_piece_is_for_the_transport() {
    let (storage, disk) = open();
    let before = disk.stats();
    let (mut request, moving, heard) = started(read(&disk, DiskOffset::new(512), 7000));
    let place = (moving.way(), moving.at().get(), moving.bytes());
    assert_eq!(place, (Way::Read, 4096 + 512, 7000));
    let place = moving.at();
    storage.file.read_at(place, &mut request.bytes).unwrap();
    moving.came(Ok(7000), request);
    let (result, bytes) = done(heard.recv().unwrap());
    assert_eq!(result.unwrap(), 7000);
    assert!(bytes[..3584] == storage.file.to_vec()[4608..8192] && bytes[3584..] == [1; 3416]);
    let (request, moving, heard) = started(write(&disk, cluster(5), &[9; CLUSTER]));
    assert_eq!((moving.way(), moving.at().get()), (Way::Write, 3 * 4096));
    storage.file.write_at(moving.at(), &request.bytes).unwrap();
    moving.written(Ok(CLUSTER), request);
    assert_eq!(done(heard.recv().unwrap()).0.unwrap(), CLUSTER);
    let mut back = [0; CLUSTER];
    disk.read_at(cluster(5), &mut back).unwrap();
    assert_eq!(back, [9; CLUSTER]);
    let after = disk.stats();
    assert_eq!(after.ring_io_requests - before.ring_io_requests, 2);
    assert_eq!(after.pooled_requests, before.pooled_requests);
    assert_eq!((after.reads, after.read_bytes), (1, 7000));
    assert_eq!(after.writes - before.writes, 1);
    assert_eq!(after.written_bytes - before.written_bytes, 4096);
    assert_eq!(storage.lent.load(SeqCst), 0);
    disk.close().unwrap();
}

#[test]
fn all_else_is_not() {
    let (storage, disk) = open();
    // Holes, two pieces, and a hole beside a piece.
    assert_eq!(done(read(&disk, cluster(3), CLUSTER).0).1, [0; CLUSTER]);
    for first in [1, 4, 5] {
        let (result, bytes) = done(read(&disk, cluster(first), 2 * CLUSTER).0);
        assert_eq!(result.unwrap(), 2 * CLUSTER);
        let mut same = vec![0; 2 * CLUSTER];
        disk.read_at(cluster(first), &mut same).unwrap();
        assert!(bytes == same, "{first}");
    }
    for first in [2, 5] {
        done(write(&disk, cluster(first), &[3; 2 * CLUSTER]).0)
            .0
            .unwrap();
    }
    storage.refuses.store(true, SeqCst);
    done(read(&disk, cluster(0), CLUSTER).0).0.unwrap();
    done(write(&disk, cluster(0), &[4; CLUSTER]).0).0.unwrap();
    let mut back = [0; CLUSTER];
    disk.read_at(cluster(0), &mut back).unwrap();
    assert_eq!(back, [4; CLUSTER]);
    assert_eq!(disk.stats().ring_io_requests, 0);
    disk.close().unwrap();
    assert_eq!(storage.lent.load(SeqCst), 0);
}

#[test]
fn a_file_without_its_mark_is_not_for_the_transport_to_write() {
    let (_storage, disk) = open();
    disk.parts()[0].marked.close();
    // Writing sees to the mark first, which it has in truth.
    done(write(&disk, cluster(0), &[4; CLUSTER]).0).0.unwrap();
    drop(started(write(&disk, cluster(0), &[4; CLUSTER])));
    disk.close().unwrap();
}

#[test]
fn a_freed_cluster_stays_while_its_bytes_may_move() {
    for (way, drops) in [(Way::Read, false), (Way::Write, false), (Way::Read, true)] {
        let (storage, disk) = open();
        let (request, moving, heard) = started(match way {
            Way::Read => read(&disk, cluster(0), CLUSTER),
            Way::Write => write(&disk, cluster(0), &[5; CLUSTER]),
        });
        disk.zero_at(cluster(0), 4096).unwrap();
        for _ in 0..3 {
            disk.flush_now().unwrap();
        }
        assert_eq!(disk.stats().clusters_quarantined, 1, "{way:?}");
        let old = storage.file.to_vec()[CLUSTER..2 * CLUSTER].to_vec();
        disk.write_at(cluster(7), &[6; CLUSTER]).unwrap();
        let now = storage.file.to_vec()[CLUSTER..2 * CLUSTER].to_vec();
        assert!(old == now, "{way:?}: the place was given to another");
        match way {
            _ if drops => drop((request, moving)),
            Way::Read => moving.came(Ok(CLUSTER), request),
            Way::Write => moving.written(Ok(CLUSTER), request),
        }
        for _ in 0..3 {
            disk.flush_now().unwrap();
        }
        assert_eq!(disk.stats().clusters_quarantined, 0, "{way:?}");
        drop(heard);
        disk.close().unwrap();
    }
}

#[test]
fn the_disk_is_not_closed_before_all_has_moved() {
    for way in [Way::Read, Way::Write] {
        let (_storage, disk) = open();
        let (request, moving, heard) = started(match way {
            Way::Read => read(&disk, cluster(0), CLUSTER),
            Way::Write => write(&disk, cluster(0), &[5; CLUSTER]),
        });
        let (tell, closed) = channel();
        let closing = std::thread::spawn(move || tell.send(disk.close()).unwrap());
        let early = closed.recv_timeout(Duration::from_millis(200));
        assert!(early.is_err(), "closed at once: {early:?}");
        // In part only: the pool does the rest before the disk is closed.
        match way {
            Way::Read => moving.came(Ok(512), request),
            Way::Write => moving.written(Ok(512), request),
        }
        assert_eq!(done(heard.recv().unwrap()).0.unwrap(), CLUSTER);
        closed.recv().unwrap().unwrap();
        closing.join().unwrap();
    }
}

#[test]
fn a_write_is_unsynced_before_it_is_answered_and_not_before_its_bytes() {
    let (_storage, disk) = open();
    let dirty = |disk: &Disk| disk.parts()[0].data_dirty.is_noted();
    for result in [Ok(CLUSTER), Err(libc::EIO)] {
        let (request, moving, heard) = started(write(&disk, cluster(0), &[5; CLUSTER]));
        disk.flush_now().unwrap();
        assert!(!dirty(&disk));
        let result = result.map_err(io::Error::from_raw_os_error);
        let failed = result.is_err();
        moving.written(result, request);
        assert_eq!(done(heard.recv().unwrap()).0.is_err(), failed);
        assert!(dirty(&disk));
    }
}

#[test]
fn what_passes_is_tried_again_in_the_pool() {
    let (storage, disk) = open();
    let content = storage.file.to_vec()[CLUSTER..2 * CLUSTER].to_vec();
    let mut pooled = disk.stats().pooled_requests;
    for result in [
        Ok(0),
        Ok(512),
        Err(libc::EAGAIN),
        Err(libc::EINTR),
        Err(libc::ECANCELED),
    ] {
        let (request, moving, heard) = started(read(&disk, cluster(0), CLUSTER));
        moving.came(result.map_err(io::Error::from_raw_os_error), request);
        let (answer, bytes) = done(heard.recv().unwrap());
        assert_eq!(answer.unwrap(), CLUSTER);
        assert!(bytes == content, "{result:?}");
        pooled += 1;
        assert_eq!(disk.stats().pooled_requests, pooled, "{result:?}");
    }
    for (result, byte) in [
        (Ok(512), 10),
        (Err(libc::EAGAIN), 11),
        (Err(libc::ENOSPC), 12),
    ] {
        let (request, moving, heard) = started(write(&disk, cluster(0), &[byte; CLUSTER]));
        moving.written(result.map_err(io::Error::from_raw_os_error), request);
        assert_eq!(done(heard.recv().unwrap()).0.unwrap(), CLUSTER);
        let bytes = storage.file.to_vec();
        assert!(bytes[CLUSTER..2 * CLUSTER] == [byte; CLUSTER], "{result:?}");
    }
    assert_eq!(storage.lent.load(SeqCst), 0);
    disk.close().unwrap();
}

#[test]
fn errors_are_those_of_the_file() {
    let (storage, disk) = open();
    let failed = |request: (Request, Moving, Receiver<Said>)| {
        let (request, moving, heard) = request;
        let error = || Err(io::Error::from_raw_os_error(libc::EIO));
        match moving.way() {
            Way::Read => moving.came(error(), request),
            Way::Write => moving.written(error(), request),
        }
        done(heard.recv().unwrap()).0.unwrap_err()
    };
    let (reading, writing) = (
        failed(started(read(&disk, cluster(0), CLUSTER))),
        failed(started(write(&disk, cluster(0), &[1; CLUSTER]))),
    );
    storage.refuses.store(true, SeqCst);
    storage.fails.store(libc::EIO, SeqCst);
    let pool_reading = done(read(&disk, cluster(0), CLUSTER).0).0.unwrap_err();
    let pool_writing = done(write(&disk, cluster(0), &[1; CLUSTER]).0)
        .0
        .unwrap_err();
    storage.fails.store(0, SeqCst);
    for (ours, pools) in [(&reading, &pool_reading), (&writing, &pool_writing)] {
        assert_eq!(ours.kind(), ErrorKind::Io(libc::EIO));
        assert_eq!(ours.to_string(), pools.to_string());
        assert!(ours.to_string().contains("x.hds"), "{ours}");
    }
    assert_eq!(disk.stats().writes, 1, "a write that failed does not count");
    disk.close().unwrap();
}
