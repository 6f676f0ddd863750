//! Files in memory that log what is done to them, and fail when they are told to.
//!
//! A file is what reads see (the host's cache); what a power cut would leave of it is worked out
//! from the log, by [`super::replay`]. All files of one run share a [`World`].

use parking_lot::Mutex;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{FileId, Keep, Storage};
use ploopfs::sync::{self, Rank};
use ploopfs::units::FileOffset;
use std::ops::Range;
use std::sync::Arc;

use super::directory::Names;
pub(crate) use super::event::{Change, Event, Kind};
use super::faults::{Failures, Fault, Request};
use super::heap::{self, Scarcity};
use super::replay::uncached;

/// How the files behave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Manners {
    pub(crate) fault: Option<Fault>,
    /// Syncs say that they are done and do nothing.
    pub(crate) lying_syncs: bool,
    /// What the disk gets of memory after it has been opened.
    pub(crate) memory: Scarcity,
    /// The host cannot copy between files, reserve blocks or punch holes.
    pub(crate) poor_host: bool,
}

/// What all files of a run share.
#[derive(Debug)]
pub(crate) struct World {
    first: Vec<Vec<u8>>,
    state: Mutex<State>,
}

/// The files and names as reads see them, and what was done to them.
#[derive(Debug, Default)]
pub(crate) struct State {
    manners: Manners,
    files: Vec<Vec<u8>>,
    pub(crate) names: Names,
    /// Only what is logged can be replayed; states that are only looked at are not.
    log: Option<Vec<Event>>,
    counts: [u64; Kind::ALL.len()],
    total: u64,
    /// The process that uses the files now; storages of an earlier one do nothing any more.
    process: u64,
    kill_at: Option<u64>,
    failures: Failures,
}

impl World {
    /// Files with these contents.
    pub(crate) fn new(files: Vec<Vec<u8>>, manners: Manners, logs: bool) -> Arc<Self> {
        let first = if logs { files.clone() } else { Vec::new() };
        let state = State {
            manners,
            files,
            log: logs.then(Vec::new),
            ..State::default()
        };
        Arc::new(Self {
            first,
            state: Mutex::new(state),
        })
    }

    /// One operation of a process on names.
    pub(crate) fn operation<T>(
        &self,
        kind: Kind,
        process: u64,
        what: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        heap::with(None, || {
            sync::step();
            let done = {
                let mut state = self.state.lock();
                let begun = state.begin(kind, process);
                begun.map_err(Error::from).and_then(|()| what(&mut state))
            };
            sync::step();
            done
        })
    }

    fn is_poor(&self) -> bool {
        self.state.lock().manners.poor_host
    }

    fn len_of(&self, file: usize) -> usize {
        self.state.lock().files[file].len()
    }

    /// What the files held at first.
    pub(crate) fn first(&self) -> &[Vec<u8>] {
        &self.first
    }

    /// Names for files, durable from the start.
    pub(crate) fn set_names(&self, names: Names) {
        self.state.lock().names = names;
    }

    /// Names as others see them.
    pub(crate) fn names(&self) -> Names {
        self.state.lock().names.clone()
    }

    /// Nothing fails any more.
    pub(crate) fn mend(&self) {
        let mut state = self.state.lock();
        state.manners.fault = None;
        state.failures = Failures::default();
    }

    /// Notes something that is no operation on a file. Returns its time.
    pub(crate) fn note(&self, event: Event) -> u64 {
        let mut state = self.state.lock();
        let log = state.log.get_or_insert_default();
        log.push(event);
        log.len() as u64 - 1
    }

    /// Position in the log: the time as the model counts it.
    pub(crate) fn time(&self) -> u64 {
        self.state
            .lock()
            .log
            .as_ref()
            .map_or(0, |log| log.len() as u64)
    }

    /// A copy of the log, or its end from a position on.
    pub(crate) fn log(&self) -> Vec<Event> {
        self.state.lock().log.clone().unwrap_or_default()
    }

    /// Contents as reads see them.
    pub(crate) fn files(&self) -> Vec<Vec<u8>> {
        self.state.lock().files.clone()
    }

    /// How many operations of each kind there were.
    pub(crate) fn counts(&self) -> Vec<(Kind, u64)> {
        let counts = self.state.lock().counts;
        Kind::ALL.into_iter().zip(counts).collect()
    }

    /// Operations so far.
    pub(crate) fn total(&self) -> u64 {
        self.state.lock().total
    }

    /// What has failed so far.
    pub(crate) fn failures(&self) -> Failures {
        self.state.lock().failures
    }

    /// True when a request of a process, begun when `before` had failed, may be told this error.
    pub(crate) fn explains(
        &self,
        request: Request,
        error: &Error,
        process: u64,
        before: Failures,
        patient: bool,
    ) -> bool {
        let state = self.state.lock();
        let fault = state.manners.fault;
        let now = state.failures;
        if state.process != process {
            let errno = fault.map_or(libc::EIO, |fault| fault.errno);
            let kinds = [
                ErrorKind::Io(libc::EIO),
                ErrorKind::Io(errno),
                ErrorKind::Latched,
            ];
            return kinds.contains(&error.kind());
        }
        fault.is_some_and(|fault| fault.explains(request, error, (before, now), patient))
    }

    /// The process is killed when so many operations more have been made.
    pub(crate) fn kill_after(&self, operations: u64) {
        let mut state = self.state.lock();
        state.kill_at = Some(state.total + operations);
    }

    /// The process is killed now.
    pub(crate) fn kill(&self) {
        let mut state = self.state.lock();
        state.process += 1;
        state.kill_at = None;
    }

    /// True when the process that `storage` belongs to has been killed.
    pub(crate) fn is_dead(&self, process: u64) -> bool {
        self.state.lock().process != process
    }

    /// The process that uses the files now.
    pub(crate) fn process(&self) -> u64 {
        self.state.lock().process
    }

    /// The power was cut, and this is what was left.
    pub(crate) fn cut(&self, files: Vec<Vec<u8>>) {
        let mut state = self.state.lock();
        state.log_event(Event::Cut {
            files: files.clone(),
        });
        state.files = files;
        state.process += 1;
        state.kill_at = None;
    }

    /// Opens a file for the process that uses the files now.
    pub(crate) fn open(self: &Arc<Self>, file: usize, writable: bool) -> Arc<SimStorage> {
        Arc::new(SimStorage {
            world: Arc::clone(self),
            file,
            writable,
            process: self.process(),
        })
    }
}

impl State {
    /// Counts an operation; an error when it fails, or when its process is dead.
    fn begin(&mut self, kind: Kind, process: u64) -> Result<(), Trouble> {
        if self.kill_at.is_some_and(|at| self.total >= at) {
            self.process += 1;
            self.kill_at = None;
        }
        if self.process != process {
            return Err(Trouble::Dead);
        }
        self.total += 1;
        let count = &mut self.counts[kind as usize];
        let number = *count;
        *count += 1;
        match self.manners.fault {
            Some(fault)
                if fault.kind == kind
                    && (number == fault.nth || fault.for_ever && number > fault.nth) =>
            {
                self.failures.count += 1;
                Err(Trouble::Fault(fault.errno))
            }
            _ => Ok(()),
        }
    }

    /// True when nothing but a header was written since the last sync: then the in-use mark is
    /// tried again as a whole, and nothing is in the file that could be lost.
    fn is_mark_alone(&self, file: usize) -> bool {
        let events = self.log.iter().flatten().rev();
        events
            .take_while(|event| **event != Event::Synced { file })
            .all(|event| match event {
                Event::Changed {
                    file: other,
                    change,
                } if *other == file => {
                    matches!(change, Change::Write(0, data) if data.len() == 64)
                }
                _ => true,
            })
            && self
                .manners
                .fault
                .is_some_and(|fault| fault.errno == libc::ENOSPC)
    }

    /// A new file with nothing in it.
    pub(crate) fn add_file(&mut self) -> usize {
        self.files.push(Vec::new());
        self.files.len() - 1
    }

    pub(crate) fn log_event(&mut self, event: Event) {
        if let Some(log) = &mut self.log {
            log.push(event);
        }
    }

    /// Where the header and the table of a file end; 0 where it has none.
    fn table_end(&self, file: usize) -> usize {
        let bytes = &self.files[file];
        if !bytes.starts_with(b"Witho") {
            return 0;
        }
        let word = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_le_bytes) as usize;
        64 + 4 * word(0x20)
    }

    fn change(&mut self, file: usize, change: Change) {
        change.apply(&mut self.files[file], &mut || true);
        self.log_event(Event::Changed { file, change });
    }
}

enum Trouble {
    Dead,
    Fault(i32),
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        Self::errno(match trouble {
            Trouble::Dead => libc::EIO,
            Trouble::Fault(errno) => errno,
        })
    }
}

/// One open file.
#[derive(Debug)]
pub(crate) struct SimStorage {
    world: Arc<World>,
    file: usize,
    writable: bool,
    process: u64,
}

fn index(at: FileOffset) -> usize {
    usize::try_from(at.get()).expect("simulated files are small")
}

impl SimStorage {
    /// One operation: `what` does it, `partly` does the part of it that a failing host has done.
    fn operation<T>(
        &self,
        kind: Kind,
        what: impl FnOnce(&mut State) -> Result<T>,
        partly: impl FnOnce(&mut State),
    ) -> Result<T> {
        assert!(!Rank::Table.is_held(), "a call under a table's lock");
        heap::with(None, || {
            sync::step();
            let done = {
                let mut state = self.world.state.lock();
                match state.begin(kind, self.process) {
                    Ok(()) => what(&mut state),
                    Err(trouble) => {
                        if matches!(trouble, Trouble::Fault(_)) {
                            partly(&mut state);
                        }
                        Err(trouble.into())
                    }
                }
            };
            // What was done and what the caller does next are two moments.
            sync::step();
            done
        })
    }

    fn modify(&self, kind: Kind, change: Change, partly: impl FnOnce(&mut State)) -> Result<()> {
        assert!(self.writable, "a lower delta is never written");
        let file = self.file;
        self.operation(
            kind,
            |state| {
                state.change(file, change);
                Ok(())
            },
            partly,
        )
    }

    /// A change of which a failing host has done a part.
    fn modify_partly(&self, kind: Kind, change: Change, part: Option<Change>) -> Result<()> {
        let file = self.file;
        self.modify(kind, change, |state| {
            if let Some(part) = part {
                state.change(file, part);
            }
        })
    }
}

impl Storage for SimStorage {
    fn len(&self) -> Result<FileOffset> {
        let file = self.file;
        let len = |state: &mut State| Ok(FileOffset::new(state.files[file].len() as u64));
        self.operation(Kind::Len, len, |_| {})
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let file = self.file;
        let read = |state: &mut State| {
            let source = state.files[file].get(index(at)..index(at) + buf.len());
            buf.copy_from_slice(source.ok_or_else(|| Error::new(ErrorKind::Truncated))?);
            Ok(())
        };
        self.operation(Kind::Read, read, |_| {})
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        // Hosts stop between sectors, not within one.
        let half = buf.len() / 2 / 512 * 512;
        heap::with(None, || {
            let at = index(at);
            let change = Change::Write(at, buf.to_vec());
            let file = self.file;
            self.modify(Kind::Write, change, |state| {
                state.failures.may_latch |= at < state.table_end(file);
                if half > 0 {
                    state.change(file, Change::Write(at, buf[..half].to_vec()));
                }
            })
        })
    }

    fn sync_data(&self) -> Result<()> {
        let file = self.file;
        let sync = |state: &mut State| {
            let lying = state.manners.lying_syncs;
            if let Some(log) = state.log.as_mut().filter(|_| !lying) {
                log.push(Event::Synced { file });
            }
            Ok(())
        };
        let lose = |state: &mut State| {
            state.failures.lost_sync |= !state.is_mark_alone(file);
            state.failures.may_latch = true;
            state.log_event(Event::SyncFailed { file });
        };
        self.operation(Kind::Sync, sync, lose)
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.modify(Kind::SetLen, Change::SetLen(index(len)), |_| {})
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        // A host that runs out of space midway leaves the file longer by any amount; one that
        // cannot reserve blocks lengthens it in one step.
        let odd = (index(range.start) + index(range.end)) / 2 + 100;
        let odd = Change::Allocate(odd.min(index(range.end)));
        self.modify_partly(
            Kind::Allocate,
            Change::Allocate(index(range.end)),
            (!self.world.is_poor()).then_some(odd),
        )
    }

    fn zero(&self, range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        let range = index(range.start)..index(range.end);
        if self.world.is_poor() && range.start < range.end {
            return heap::with(None, || {
                let len = self.world.len_of(self.file);
                let zeros = vec![0; range.end.min(len).saturating_sub(range.start)];
                let half = zeros[..zeros.len() / 2 / 512 * 512].to_vec();
                let partly = Some(Change::Write(range.start, half));
                self.modify_partly(Kind::Zero, Change::Write(range.start, zeros), partly)
            });
        }
        let half = range.start..range.start + (range.end - range.start) / 1024 * 512;
        self.modify_partly(Kind::Zero, Change::Zero(range), Some(Change::Zero(half)))
    }

    fn copy_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        if self.world.is_poor() {
            return Ok(false);
        }
        heap::with(None, || {
            let mut data = vec![0; index(from.end) - index(from.start)];
            source.read_at(from.start, &mut data)?;
            let half = data[..data.len() / 2 / 512 * 512].to_vec();
            let partly = Change::Write(index(at), half);
            self.modify_partly(Kind::Copy, Change::Write(index(at), data), Some(partly))?;
            Ok(true)
        })
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let file = self.file;
        let next = |state: &mut State| {
            let bytes = &state.files[file];
            let is_hole = |at: usize| {
                let end = (at / 4096 * 4096 + 4096).min(bytes.len());
                bytes[at..end].iter().all(|byte| *byte == 0)
            };
            // Blocks of zeros are holes, but where the host does not know of holes.
            let poor = state.manners.poor_host;
            let mut start = index(from);
            while start < bytes.len() && !poor && is_hole(start) {
                start = start / 4096 * 4096 + 4096;
            }
            let mut end = start;
            while end < bytes.len() && (poor || !is_hole(end)) {
                end = end / 4096 * 4096 + 4096;
            }
            let end = end.min(bytes.len());
            let range = FileOffset::new(start as u64)..FileOffset::new(end as u64);
            Ok((start < bytes.len()).then_some(range))
        };
        self.operation(Kind::NextData, next, |_| {})
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.len()?.get())
    }

    fn drop_cache(&self) -> Result<()> {
        heap::with(None, || {
            let mut state = self.world.state.lock();
            let file = self.file;
            if let Some(log) = &mut state.log {
                let bytes = uncached(log, &self.world.first, file);
                log.push(Event::CacheDropped { file });
                state.files[file] = bytes;
            }
            Ok(())
        })
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
