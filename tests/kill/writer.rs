//! A load that knows what it wrote: threads that write, discard, zero, flush and read at random.
//!
//! Imports: `ledger`, `support` (blkdiscard); std, `anyhow`, `nix`, `libc` (flags).
//! Never: takes an error for normal before it was told that the daemon dies.

use super::ledger::{Content, Ledger};
use crate::forge::content::{mix, splitmix};
use crate::support::command;
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// Longest that a request may take, even on a busy host.
const PATIENCE: Duration = Duration::from_secs(100);
/// Most sectors of one request.
const LONGEST: u64 = 2048;

/// What the load is like.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// Threads.
    pub(crate) threads: u64,
    /// Sectors that it uses.
    pub(crate) region: Range<u64>,
    /// Sectors of a cluster.
    pub(crate) cluster: u64,
    /// Sectors that every request is a multiple of.
    pub(crate) grain: u64,
    /// Past the page cache.
    pub(crate) direct: bool,
    /// It is a block device, not a file.
    pub(crate) device: bool,
    /// Requests may find the host full.
    pub(crate) full: bool,
    /// Of a hundred requests so many are flushes, discards and zeros, reads; the rest writes.
    pub(crate) flushes: u64,
    /// See above.
    pub(crate) zeros: u64,
    /// See above.
    pub(crate) reads: u64,
}

/// Flags that the threads look at.
#[derive(Debug, Default)]
struct Flags {
    stop: AtomicBool,
    dying: AtomicBool,
    /// Requests that found the host full.
    full: AtomicU64,
}

/// A running load.
#[derive(Debug)]
pub(crate) struct Writer {
    flags: Arc<Flags>,
    ends: Vec<Receiver<Result<()>>>,
}

impl Writer {
    /// Starts the threads.
    pub(crate) fn start(path: &Path, ledger: &Arc<Ledger>, load: &Load, seed: u64) -> Self {
        let flags = Arc::new(Flags::default());
        let ends = (0..load.threads).map(|number| {
            let (sender, receiver) = channel();
            let (path, ledger) = (path.to_path_buf(), Arc::clone(ledger));
            let (load, flags) = (load.clone(), Arc::clone(&flags));
            std::thread::spawn(move || {
                let dice = mix(&[seed, number, 31]);
                let result = serve(path, &ledger, load, &flags, dice);
                let _ = sender.send(result);
            });
            receiver
        });
        let ends = ends.collect();
        Self { flags, ends }
    }

    /// From now on requests may fail.
    pub(crate) fn expect_death(&self) {
        self.flags.dying.store(true, Ordering::SeqCst);
    }

    /// Lets every thread finish its request. Gives the first failure, or how many requests found
    /// the host full.
    pub(crate) fn stop(self) -> Result<u64> {
        self.flags.stop.store(true, Ordering::SeqCst);
        let mut result = Ok(());
        for end in self.ends {
            let ended = end
                .recv_timeout(PATIENCE)
                .map_err(|_| anyhow!("a request hangs for {} s", PATIENCE.as_secs()));
            result = result.and(ended.and_then(|ended| ended));
        }
        result.map(|()| self.flags.full.load(Ordering::SeqCst))
    }
}

/// Opens the disk for such a load.
pub(crate) fn open(path: &Path, direct: bool) -> io::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

/// Memory that direct I/O accepts.
#[derive(Debug)]
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
}

impl Aligned {
    /// Room for the longest request.
    pub(crate) fn new() -> Self {
        let bytes = vec![0; LONGEST as usize * 512 + 4096];
        let skip = bytes.as_ptr().align_offset(4096);
        Self { bytes, skip }
    }

    /// So many bytes of it.
    pub(crate) fn take(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + len]
    }
}

/// Reads a whole disk in pieces of the longest request.
pub(crate) fn read_all(
    file: &File,
    sectors: Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = Aligned::new();
    let mut first = sectors.start;
    while first < sectors.end {
        let count = LONGEST.min(sectors.end - first);
        let bytes = buffer.take(count as usize * 512);
        file.read_exact_at(bytes, first * 512)
            .with_context(|| format!("reading {count} sectors at {first}"))?;
        each(first, bytes)?;
        first += count;
    }
    Ok(())
}

struct Thread<'a> {
    path: PathBuf,
    file: File,
    ledger: &'a Ledger,
    load: Load,
    dice: u64,
    buffer: Aligned,
}

fn serve(path: PathBuf, ledger: &Ledger, load: Load, flags: &Flags, dice: u64) -> Result<()> {
    let dying = || flags.dying.load(Ordering::SeqCst);
    let file = match open(&path, load.direct) {
        Ok(file) => file,
        Err(_) if dying() => return Ok(()),
        Err(error) => return Err(error).context("opening the disk"),
    };
    let mut thread = Thread {
        path,
        file,
        ledger,
        load,
        dice,
        buffer: Aligned::new(),
    };
    while !flags.stop.load(Ordering::SeqCst) && !dying() {
        match thread.step() {
            Ok(()) => {}
            // A wrong byte is wrong at any time.
            Err(Failure::Judged(error)) => return Err(error),
            Err(Failure::Io(_)) if dying() => return Ok(()),
            Err(Failure::Io(error)) if thread.load.full && is_no_space(&error) => {
                flags.full.fetch_add(1, Ordering::SeqCst);
            }
            Err(Failure::Io(error)) => return Err(error),
        }
    }
    Ok(())
}

fn is_no_space(error: &anyhow::Error) -> bool {
    let of_io = error.downcast_ref::<io::Error>();
    let of_call = error.downcast_ref::<Errno>();
    of_io.is_some_and(|e| e.raw_os_error() == Some(libc::ENOSPC))
        || of_call.is_some_and(|e| *e == Errno::ENOSPC)
}

enum Failure {
    Io(anyhow::Error),
    Judged(anyhow::Error),
}

impl Thread<'_> {
    fn below(&mut self, bound: u64) -> u64 {
        splitmix(&mut self.dice) % bound
    }

    fn step(&mut self) -> Result<(), Failure> {
        let (flushes, zeros, reads) = (self.load.flushes, self.load.zeros, self.load.reads);
        let roll = self.below(100);
        if roll < flushes {
            self.flush().map_err(Failure::Io)
        } else if roll < flushes + zeros {
            self.zero().map_err(Failure::Io)
        } else if roll < flushes + zeros + reads {
            self.read()
        } else {
            self.write().map_err(Failure::Io)
        }
    }

    /// Random sectors: whole clusters or any; half of the time in the first few clusters, so that
    /// requests meet.
    fn place(&mut self, len: u64, aligned: bool) -> Range<u64> {
        let region = self.load.region.clone();
        let unit = if aligned {
            self.load.cluster
        } else {
            self.load.grain
        };
        let room = region.end - region.start;
        let hot = room.min(self.load.cluster * 24);
        let room = if self.below(2) == 0 { hot } else { room };
        let at = region.start + self.below(room / unit) * unit;
        let len = len.next_multiple_of(self.load.grain).max(self.load.grain);
        at..(at + len).min(region.end)
    }

    fn write(&mut self) -> Result<()> {
        let cluster = self.load.cluster;
        let (len, aligned) = match self.below(20) {
            0..=8 => (1 + self.below(8), false),
            9..=13 => (8, false),
            14..=16 => (1 + self.below(256), false),
            17 | 18 => (cluster * (1 + self.below(4)), true),
            _ => (LONGEST, false),
        };
        let range = self.place(len.min(LONGEST), aligned);
        let number = self.ledger.issue(Content::Stamp, range.clone());
        let bytes = self.buffer.take((range.end - range.start) as usize * 512);
        self.ledger.fill(number, range.start, bytes);
        let written = self.file.write_all_at(bytes, range.start * 512);
        self.close(number, written.map_err(Into::into), "writing", &range)
    }

    fn zero(&mut self) -> Result<()> {
        let cluster = self.load.cluster;
        let (len, aligned) = match self.below(8) {
            0 | 1 => (1 + self.below(cluster), false),
            2..=5 => (cluster * (1 + self.below(4)), true),
            _ => (cluster * (1 + self.below(40)), self.below(2) == 0),
        };
        let range = self.place(len, aligned);
        let number = self.ledger.issue(Content::Zeros, range.clone());
        let (at, len) = (range.start * 512, (range.end - range.start) * 512);
        if self.load.device && self.below(8) == 0 {
            // A discard may leave parts out, so what it returns proves nothing.
            let text = [at, len].map(|number| number.to_string());
            let [at, len] = [text[0].as_str(), text[1].as_str()];
            let mut tool = command::new("blkdiscard");
            let done = command::ok(tool.args(["-f", "-o", at, "-l", len]).arg(&self.path));
            self.ledger.failed(number);
            return done.map(drop);
        }
        let way = match self.below(2) {
            0 => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            _ => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let mode = way | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zeroed = fallocate(&self.file, mode, at as i64, len as i64);
        self.close(number, zeroed.map_err(Into::into), "zeroing", &range)
    }

    fn close(&self, number: u32, result: Result<()>, what: &str, range: &Range<u64>) -> Result<()> {
        match result {
            Ok(()) => self.ledger.done(number),
            Err(_) => self.ledger.failed(number),
        }
        result.with_context(|| format!("{what} sectors {range:?}"))
    }

    fn flush(&mut self) -> Result<()> {
        let begun = self.ledger.flush();
        match self.below(2) {
            0 => self.file.sync_all().context("fsync")?,
            _ => self.file.sync_data().context("fdatasync")?,
        }
        self.ledger.flushed(begun);
        Ok(())
    }

    fn read(&mut self) -> Result<(), Failure> {
        let len = match self.below(3) {
            0 => 1 + self.below(16),
            1 => 1 + self.below(256),
            _ => self.load.cluster.min(LONGEST),
        };
        let range = self.place(len, false);
        let bytes = self.buffer.take((range.end - range.start) as usize * 512);
        let begun = self.ledger.read();
        if let Err(error) = self.file.read_exact_at(bytes, range.start * 512) {
            self.ledger.not_read(begun);
            let error = anyhow!(error).context(format!("reading sectors {range:?}"));
            return Err(Failure::Io(error));
        }
        let seen = self.ledger.seen(begun, range.start, bytes);
        seen.context("a read while running")
            .map_err(Failure::Judged)
    }
}

/// What the host says about the device's sectors, in sectors of 512 bytes.
pub(crate) fn grain_of(bytes: &str) -> Result<u64> {
    match bytes.parse::<u64>()? / 512 {
        0 => bail!("sectors of {bytes} bytes"),
        grain => Ok(grain),
    }
}
