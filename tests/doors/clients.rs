//! Clients of a mounted disk, several at a time: what they ask for is noted before they ask, and
//! what they were told after.
//!
//! Imports: the simulation; std, `nix`.
//! Never: takes an error for an answer while the process that serves is alive.

use crate::forge::content::splitmix;
use crate::sim::model::{Model, SECTOR, Stamp};
use crate::sim::storage::{Event, World};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// Who asks at a time.
const CLIENTS: u64 = 4;
/// How often each of them asks.
const REQUESTS: u64 = 45;

/// What the clients of one life share.
pub(crate) struct Scene {
    world: Arc<World>,
    file: File,
    process: u64,
    windows: Vec<Range<u64>>,
    model: parking_lot::Mutex<Model>,
    complaints: parking_lot::Mutex<Vec<String>>,
    /// The number of the next request.
    next: AtomicU64,
}

/// What a client does to sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Write,
    Punch,
    Zero,
}

impl Scene {
    pub(crate) fn new(
        world: &Arc<World>,
        file: File,
        windows: Vec<Range<u64>>,
        shows: Arc<Vec<u8>>,
        next: u64,
    ) -> Self {
        Self {
            world: Arc::clone(world),
            file,
            process: world.process(),
            windows,
            model: parking_lot::Mutex::new(Model::new(shows)),
            complaints: parking_lot::Mutex::default(),
            next: AtomicU64::new(next),
        }
    }

    /// All clients at once; what was wrong comes back.
    pub(crate) fn work(self, dice: &mut u64, next: &mut u64) -> Vec<String> {
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                let mut dice = splitmix(dice);
                let scene = &self;
                scope.spawn(move || {
                    for _ in 0..REQUESTS {
                        scene.request(&mut dice);
                    }
                });
            }
        });
        *next = self.next.load(Ordering::SeqCst);
        self.complaints.into_inner()
    }

    fn complain(&self, why: String) {
        self.complaints.lock().push(why);
    }

    /// Nothing fails but what the dead are asked for.
    fn check(&self, what: &str, result: &io::Result<()>) -> bool {
        if let Err(error) = result {
            if !self.world.is_dead(self.process) {
                self.complain(format!("a {what} fails: {error}"));
            }
        }
        result.is_ok()
    }

    fn request(&self, dice: &mut u64) {
        let window = &self.windows[(splitmix(dice) % self.windows.len() as u64) as usize];
        // The largest are shared out among the threads of rings.
        let longest = [1, 8, 48, 300][(splitmix(dice) % 4) as usize];
        let mut len = 1 + splitmix(dice) % longest.min(window.end - window.start);
        let mut first = window.start + splitmix(dice) % (window.end - window.start - len + 1);
        if splitmix(dice) % 3 == 0 {
            first = first / 8 * 8;
            len = len.next_multiple_of(8).min(window.end - first);
        }
        match splitmix(dice) % 12 {
            0 => self.change(first, len, Stamp::ZERO, How::Punch),
            1 => self.change(first, len, Stamp::ZERO, How::Zero),
            2 => self.change(first, len, Stamp::ZERO, How::Write),
            3 | 4 => self.flush(splitmix(dice) % 2 == 0),
            5 | 6 => self.read(first, len),
            _ => {
                let stamp = Stamp(1 + splitmix(dice) % (1 << 31));
                self.change(first, len, stamp, How::Write);
            }
        }
    }

    fn change(&self, first: u64, len: u64, stamp: Stamp, how: How) {
        let sectors = first..first + len;
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let began = self.world.note(Event::Issued {
            id,
            sectors: sectors.clone(),
            stamp,
        });
        self.model.lock().issue(id, sectors.clone(), stamp, began);
        let (at, bytes) = (first * SECTOR, len * SECTOR);
        let result = match how {
            How::Write => self.file.write_all_at(&stamp.bytes(sectors.clone()), at),
            How::Punch => self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, bytes),
            How::Zero => self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, at, bytes),
        };
        let ok = self.check("change", &result);
        let ended = self.world.note(Event::Ended { id, ok });
        self.model.lock().end(id, sectors, ok, ended);
    }

    fn allocate(&self, mode: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, mode, at as i64, len as i64)?)
    }

    fn read(&self, first: u64, len: u64) {
        let began = self.world.time();
        let mut bytes = vec![0xee; (len * SECTOR) as usize];
        let result = self.file.read_exact_at(&mut bytes, first * SECTOR);
        if !self.check("read", &result) {
            return;
        }
        if let Some(why) = self.model.lock().complaint(first, &bytes, began) {
            self.complain(format!("a read: {why}"));
        }
    }

    fn flush(&self, all: bool) {
        let flush = self.next.fetch_add(1, Ordering::SeqCst);
        self.world.note(Event::FlushBegan { flush });
        let result = match all {
            true => self.file.sync_all(),
            false => self.file.sync_data(),
        };
        if self.check("flush", &result) {
            self.world.note(Event::FlushDone { flush });
        }
    }
}
