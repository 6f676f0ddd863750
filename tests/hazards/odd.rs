//! Files that stop, or fail, where a test wants it: what a slow or full host does, on demand.

use crate::caller::fast_dir;
use crate::forge::bundle::BundleSpec;
use ploopfs::chain::bundle::{self, OpenedImages, Selection};
use ploopfs::disk::{self, Disk, DiskOptions};
use ploopfs::error::{Error, Result};
use ploopfs::storage::{FileId, Keep, SharedStorage, Storage};
use ploopfs::units::FileOffset;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[derive(Debug, Default)]
struct Passing {
    /// How many may pass before the gate is shut; `None` for all.
    left: Option<u64>,
    stuck: u64,
}

/// What some calls must pass.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    passing: Mutex<Passing>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut passing = self.passing.lock().expect("nobody panics here");
        if passing.left == Some(0) {
            passing.stuck += 1;
            self.changed.notify_all();
            while passing.left == Some(0) {
                passing = self.changed.wait(passing).expect("nobody panics here");
            }
            passing.stuck -= 1;
        }
        if let Some(left) = passing.left.as_mut() {
            *left -= 1;
        }
    }

    /// Lets so many more pass, and then nobody.
    pub(crate) fn shut_after(&self, count: u64) {
        self.passing.lock().expect("nobody panics here").left = Some(count);
        self.changed.notify_all();
    }

    pub(crate) fn open(&self) {
        self.passing.lock().expect("nobody panics here").left = None;
        self.changed.notify_all();
    }

    /// Waits until somebody stands before the gate.
    pub(crate) fn wait_for_one(&self) {
        let passing = self.passing.lock().expect("nobody panics here");
        let patience = Duration::from_secs(60);
        let nobody = |passing: &mut Passing| passing.stuck == 0;
        let waited = self.changed.wait_timeout_while(passing, patience, nobody);
        let timed_out = waited.expect("nobody panics here").1.timed_out();
        assert!(!timed_out, "nobody came to the gate");
    }
}

/// Writes that fail for lack of space: so many of those that begin in the range.
#[derive(Debug, Default)]
pub(crate) struct Full {
    pub(crate) range: Range<u64>,
    pub(crate) times: u64,
}

/// What the files of one disk do.
#[derive(Debug, Default)]
pub(crate) struct Manner {
    /// Copies from one file to the top.
    pub(crate) copies: Gate,
    /// Syncs.
    pub(crate) syncs: Gate,
    /// Ranges that are zeroed.
    pub(crate) zeros: Gate,
    pub(crate) full: Mutex<Full>,
}

impl Manner {
    pub(crate) fn fill(&self, range: Range<u64>, times: u64) {
        *self.full.lock().expect("nobody panics here") = Full { range, times };
    }

    pub(crate) fn left_to_fail(&self) -> u64 {
        self.full.lock().expect("nobody panics here").times
    }
}

/// A real file with manners.
#[derive(Debug)]
struct Odd {
    real: SharedStorage,
    manner: Arc<Manner>,
}

impl Storage for Odd {
    fn len(&self) -> Result<FileOffset> {
        self.real.len()
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        self.real.read_at(at, buf)
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        {
            let mut full = self.manner.full.lock().expect("nobody panics here");
            if full.times > 0 && full.range.contains(&at.get()) {
                full.times -= 1;
                return Err(Error::errno(libc::ENOSPC));
            }
        }
        self.real.write_at(at, buf)
    }

    fn sync_data(&self) -> Result<()> {
        self.manner.syncs.pass();
        self.real.sync_data()
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.real.set_len(len)
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        self.real.allocate(range)
    }

    fn zero(&self, range: Range<FileOffset>, keep: Keep) -> Result<()> {
        self.manner.zeros.pass();
        self.real.zero(range, keep)
    }

    fn copy_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        self.manner.copies.pass();
        self.real.copy_from(at, source, from)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        self.real.next_data(from)
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.real.allocated_bytes()
    }

    fn drop_cache(&self) -> Result<()> {
        self.real.drop_cache()
    }

    fn file_id(&self) -> Option<FileId> {
        self.real.file_id()
    }

    fn as_host_fd(&self) -> Option<BorrowedFd<'_>> {
        self.real.as_host_fd()
    }
}

/// A disk over files with manners, and where they are.
pub(crate) struct OddDisk {
    pub(crate) disk: Arc<Disk>,
    pub(crate) manner: Arc<Manner>,
    pub(crate) dir: PathBuf,
    pub(crate) files: Vec<PathBuf>,
    /// What the disk shows at first.
    pub(crate) bytes: Vec<u8>,
    _home: tempfile::TempDir,
}

impl OddDisk {
    /// Forges a bundle of one part and opens it.
    pub(crate) fn new(spec: &BundleSpec, options: &DiskOptions) -> Self {
        let home = fast_dir();
        let dir = home.path().join("disk.hdd");
        spec.write(&dir).expect("the bundle is forged");
        let model = spec.model();
        let bytes = model.read(0, model.bytes() as usize);
        let selection = Selection {
            write: !options.read_only,
            ..Selection::default()
        };
        let mut images: OpenedImages = bundle::open(&dir, &selection).expect("it opens");
        let manner = Arc::new(Manner::default());
        for file in images.parts.iter_mut().flat_map(|part| &mut part.files) {
            file.storage = Arc::new(Odd {
                real: Arc::clone(&file.storage),
                manner: Arc::clone(&manner),
            });
        }
        let (disk, _) = disk::open(Arc::new(images), options).expect("the disk opens");
        Self {
            disk,
            manner,
            files: spec.files(&dir, 0),
            dir,
            bytes,
            _home: home,
        }
    }

    /// Cuts one of its files behind its back.
    pub(crate) fn cut(&self, level: usize, len: u64) {
        let file = std::fs::File::options()
            .write(true)
            .open(&self.files[level]);
        let cut = file.and_then(|file| file.set_len(len));
        cut.expect("the file is cut");
    }
}
