//! Large reads whose bytes are in memory only in part.

use super::*;
use crate::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use crate::disk::{DiskOptions, InlineMax};
use crate::storage::mem::MemStorage;
use crate::storage::{FileId, Keep, Storage};
use crate::units::{FileOffset, SectorCount};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::thread::ThreadId;

const LEN: usize = 256 << 10;

/// A file of which only the first bytes are in memory.
#[derive(Debug)]
struct PartlyCached {
    file: MemStorage,
    cached: AtomicUsize,
}

impl Storage for PartlyCached {
    fn len(&self) -> Result<FileOffset> {
        self.file.len()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        self.file.read_at(at, buf)
    }

    fn read_now(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        let start = len_usize(at.get()).unwrap();
        let cached = self.cached.load(Ordering::SeqCst);
        let len = cached.saturating_sub(start).min(buf.len());
        self.file.read_at(at, &mut buf[..len])?;
        buf[len..].fill(0xee);
        Ok(len)
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
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

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// Tells where an answer was given, and what it was.
struct Told(Sender<(ThreadId, Vec<u8>)>);

impl ReadReply for Told {
    fn done(self, result: Result<&[u8]>) {
        let all = result.unwrap().to_vec();
        self.0.send((std::thread::current().id(), all)).unwrap();
    }
}

/// A request that brings its memory.
struct Brings(Vec<u8>, Told);

impl ReadInto for Brings {
    fn memory(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn done(self, result: Result<usize>) {
        let Self(bytes, told) = self;
        told.done(result.map(|len| &bytes[..len]));
    }
}

fn open(content: &[u8], large: usize) -> (Arc<PartlyCached>, Arc<Disk>) {
    let storage = Arc::new(PartlyCached {
        file: MemStorage::new(content.to_vec()),
        cached: AtomicUsize::new(0),
    });
    let part = OpenedPart {
        start: SectorCount::new(0),
        end: None,
        blocksize: None,
        files: vec![OpenedFile {
            path: PathBuf::from("x.raw"),
            storage: Arc::clone(&storage) as crate::storage::SharedStorage,
            plain: Plain::Yes,
            guid: None,
        }],
    };
    let images = OpenedImages::from_parts(PathBuf::from("x.raw"), vec![part]);
    let options = DiskOptions {
        read_only: true,
        inline_order: 4,
        large_inline: InlineMax {
            reads: large,
            writes: large,
        },
        ..DiskOptions::default()
    };
    let (disk, _) = crate::disk::open(Arc::new(images), &options).unwrap();
    (storage, disk)
}

#[test]
fn what_is_not_in_memory_is_read_elsewhere_and_the_rest_stays() {
    let content: Vec<u8> = (0..2 * LEN).map(|at| (at / 512 % 251) as u8).collect();
    let (storage, disk) = open(&content, 1);
    let start = DiskOffset::new(0);
    let mut buf = vec![0; LEN];
    // The page of the map.
    disk.read_at(start, &mut buf).unwrap();
    let here = std::thread::current().id();
    for cached in [0, 1, 512, 4096, 70_000, LEN - 1, LEN, 2 * LEN] {
        storage.cached.store(cached, Ordering::SeqCst);
        let (told, heard) = channel();
        disk.read(start, LEN, &mut buf, Told(told.clone()));
        let (place, bytes) = heard.recv().unwrap();
        assert_eq!(place == here, cached >= LEN, "{cached} cached");
        assert!(bytes == content[..LEN], "{cached} cached");
        disk.read_into(start, LEN, Brings(vec![0; LEN], Told(told)));
        let (place, bytes) = heard.recv().unwrap();
        assert_eq!(place == here, cached >= LEN, "{cached} cached");
        assert!(bytes == content[..LEN], "{cached} cached");
    }
}

#[test]
fn small_requests_are_served_where_they_arrive_as_before() {
    let (_, disk) = open(&[7; LEN], 1);
    let mut buf = [0; 4096];
    disk.read_at(DiskOffset::new(0), &mut buf).unwrap();
    let (told, heard) = channel();
    disk.read(DiskOffset::new(0), 4096, &mut buf, Told(told));
    let (place, bytes) = heard.recv().unwrap();
    assert_eq!(place, std::thread::current().id());
    assert!(bytes == [7; 4096]);
}
