//! The disk as its callers use it: requests with answers that are waited for, and disks to try.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::{ImageSpec, Mapped};
use crate::forge::reader;
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, DoneReply, ReadReply};
use ploopfs::error::Result;
use ploopfs::units::DiskOffset;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

pub(crate) struct Answer<T>(pub(crate) Sender<T>);

impl ReadReply for Answer<Result<Vec<u8>>> {
    fn done(self, result: Result<&[u8]>) {
        // Whoever gave up waiting has failed already.
        let _ = self.0.send(result.map(<[u8]>::to_vec));
    }
}

impl DoneReply for Answer<Result<()>> {
    fn done(self, result: Result<()>) {
        let _ = self.0.send(result);
    }
}

pub(crate) fn open(path: &Path, options: &DiskOptions) -> Arc<Disk> {
    let selection = Selection {
        write: !options.read_only,
        ..Selection::default()
    };
    let images = bundle::open(path, &selection).expect("the bundle opens");
    disk::open(Arc::new(images), options)
        .expect("the disk opens")
        .0
}

pub(crate) fn wait<T>(receiver: &Receiver<T>, what: &str) -> T {
    receiver
        .recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|_| panic!("{what}: no answer within a minute"))
}

pub(crate) fn start_write(disk: &Arc<Disk>, at: u64, data: &[u8]) -> Receiver<Result<()>> {
    let (sender, receiver) = channel();
    disk.write(DiskOffset::new(at), data, Answer(sender));
    receiver
}

pub(crate) fn write(disk: &Arc<Disk>, at: u64, data: &[u8]) -> Result<()> {
    wait(&start_write(disk, at, data), "write")
}

pub(crate) fn zero(disk: &Arc<Disk>, at: u64, len: u64) -> Result<()> {
    let (sender, receiver) = channel::<Result<()>>();
    disk.zero(DiskOffset::new(at), len, Answer(sender));
    wait(&receiver, "zero")
}

pub(crate) fn flush(disk: &Arc<Disk>) -> Result<()> {
    let (sender, receiver) = channel::<Result<()>>();
    disk.flush(Answer(sender));
    wait(&receiver, "flush")
}

pub(crate) fn read(disk: &Arc<Disk>, at: u64, len: u64, buf: &mut [u8]) -> Vec<u8> {
    let (sender, receiver) = channel();
    disk.read(DiskOffset::new(at), len as usize, buf, Answer(sender));
    let bytes = wait(&receiver, "read").expect("reads succeed");
    assert_eq!(bytes.len() as u64, len, "a short read");
    bytes
}

pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

pub(crate) fn seed() -> u64 {
    number("PLOOPFS_SEED").unwrap_or(27)
}

pub(crate) fn read_all(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size_bytes() as usize];
    disk.read_at(DiskOffset::ZERO, &mut all)
        .expect("the disk reads");
    all
}

/// Memory where there is some: the point is the order of requests, not the medium.
pub(crate) fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a directory")
}

pub(crate) fn check_files(name: &str, spec: &BundleSpec, dir: &Path) {
    for part in 0..spec.parts.len() {
        let files = spec.files(dir, part);
        let top = files.last().expect("a top");
        let faults = reader::check(top).expect("the checker runs");
        assert!(faults.is_empty(), "{name}: {faults:?}");
    }
}

/// Something to hold while a disk is exchanged.
pub(crate) fn open_other() -> Arc<Disk> {
    let home = fast_dir();
    let path = home.path().join("other.hds");
    ImageSpec::new(2, 8, 8).write(&path).expect("an image");
    let options = DiskOptions {
        read_only: true,
        pool_threads: 1,
        ..DiskOptions::default()
    };
    open(&path, &options)
}

pub(crate) fn image(version: u8, cluster: u32, sectors: u64, percent: u64) -> Level {
    let mapped = Mapped::Percent(percent);
    Level::Image(ImageSpec::new(version, cluster, sectors).mapping(mapped))
}

pub(crate) fn chain() -> BundleSpec {
    let sectors = 18_001;
    let plain = Level::Plain {
        seed: 3,
        level: 0,
        bytes: 4_134_567,
    };
    let levels = vec![
        plain,
        image(2, 8, sectors - 9000, 20),
        image(1, 8, sectors, 15),
        image(2, 8, sectors, 10),
    ];
    BundleSpec::new(Style::Ploop, levels)
}

pub(crate) fn split() -> BundleSpec {
    let mut spec = BundleSpec::new(Style::Parallels, vec![image(1, 8, 9001, 30)]);
    spec.push_part(vec![image(2, 16, 1003, 30)]);
    spec.push_part(vec![image(1, 8, 777, 50)]);
    spec
}

pub(crate) fn tiny(pool_threads: usize, inline_order: u32) -> DiskOptions {
    DiskOptions {
        bat_cache: 1,
        grow_step: 1,
        pool_threads,
        inline_order,
        flush_interval_ms: 1,
        ..DiskOptions::default()
    }
}
