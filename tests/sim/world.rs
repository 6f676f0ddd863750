//! What all files and names of one run share: their contents, what was done to them, what fails.

use parking_lot::Mutex;
use ploopfs::admin::progress::Progress;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::sync;
use std::sync::Arc;

use super::directory::{NameChange, Names, Trees};
use super::event::{Change, Event, Kind};
use super::faults::{Failures, Fault, Nth, Request};
use super::heap::{self, Scarcity};
use super::media::{Media, ROOT};
use super::storage::SimStorage;

/// How the files behave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Manners {
    pub(crate) fault: Option<Fault>,
    /// An operation that fails, whatever its kind.
    pub(crate) nth: Option<Nth>,
    /// Syncs of files say that they are done and do nothing.
    pub(crate) lying_syncs: bool,
    /// Syncs of directories do.
    pub(crate) lying_names: bool,
    /// What the disk gets of memory after it has been opened.
    pub(crate) memory: Scarcity,
    /// The host cannot copy between files, reserve blocks or punch holes.
    pub(crate) poor_host: bool,
    /// It can let files share blocks.
    pub(crate) shares: bool,
}

/// What all files of a run share.
#[derive(Debug)]
pub(crate) struct World {
    pub(super) state: Mutex<State>,
}

/// The files and names as reads see them, and what was done to them.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(super) manners: Manners,
    /// What there was at first, where all that is done to it is logged.
    pub(super) first: Media,
    pub(super) files: Vec<Vec<u8>>,
    pub(crate) directories: Trees,
    /// Only what is logged can be replayed; states that are only looked at are not.
    pub(super) log: Option<Vec<Event>>,
    counts: [u64; Kind::ALL.len()],
    total: u64,
    /// Those of them that change something.
    changes: u64,
    /// Who is asked to stop, once so many changes have been made.
    cancels: Option<(u64, Arc<Progress>)>,
    /// The process that uses the files now; storages of an earlier one do nothing any more.
    process: u64,
    kill_at: Option<u64>,
    pub(super) failures: Failures,
}

impl World {
    /// Files with these contents.
    pub(crate) fn new(files: Vec<Vec<u8>>, manners: Manners, logs: bool) -> Arc<Self> {
        let first = match logs {
            true => Media::new(&files, Names::new()),
            false => Media::default(),
        };
        Self::with(
            first,
            files,
            Trees::from([(ROOT, Names::new())]),
            manners,
            logs,
        )
    }

    /// Goes on from what is on a medium and what reads see of it. All is logged.
    pub(crate) fn on(media: &Media, manners: Manners) -> Arc<Self> {
        let (files, directories) = (media.files(), media.trees());
        Self::with(media.clone(), files, directories, manners, true)
    }

    fn with(
        first: Media,
        files: Vec<Vec<u8>>,
        directories: Trees,
        manners: Manners,
        logs: bool,
    ) -> Arc<Self> {
        let state = State {
            manners,
            first,
            files,
            directories,
            log: logs.then(Vec::new),
            ..State::default()
        };
        Arc::new(Self {
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

    /// Looks at what there is, which is no operation.
    pub(crate) fn look<T>(&self, what: impl FnOnce(&State) -> T) -> T {
        what(&self.state.lock())
    }

    pub(super) fn is_poor(&self) -> bool {
        self.state.lock().manners.poor_host
    }

    pub(super) fn len_of(&self, file: usize) -> usize {
        self.state.lock().files[file].len()
    }

    /// Names for files, durable from the start.
    pub(crate) fn set_names(&self, names: Names) {
        let mut state = self.state.lock();
        state.first.set_names(names.clone());
        state.directories.insert(ROOT, names);
    }

    /// Names in the root as others see them.
    pub(crate) fn names(&self) -> Names {
        self.state.lock().directories[&ROOT].clone()
    }

    /// The medium at each moment: before the first operation, and after each that changes what a
    /// power cut could leave. All must have been logged.
    pub(crate) fn moments(&self) -> impl Iterator<Item = Media> + use<> {
        let state = self.state.lock();
        let log = state.log.clone().expect("what is done here is logged");
        let mut media = state.first.clone();
        let first = std::iter::once(media.clone());
        let later = log.into_iter().filter_map(move |event| {
            let changed = media.take(&event);
            changed.then(|| media.clone())
        });
        first.chain(later)
    }

    /// The medium now.
    pub(crate) fn media(&self) -> Media {
        let state = self.state.lock();
        let mut media = state.first.clone();
        for event in state.log.iter().flatten() {
            media.take(event);
        }
        media
    }

    /// All changes fail once so many more have been made.
    pub(crate) fn fail_after(&self, more: u64) {
        let mut state = self.state.lock();
        state.manners.nth = Some(Nth {
            nth: state.changes + more,
            errno: libc::EIO,
            for_ever: true,
            of_all: false,
        });
    }

    /// The user asks to stop once so many more changes have been made.
    pub(crate) fn cancel_after(&self, more: u64, progress: &Arc<Progress>) {
        let mut state = self.state.lock();
        state.cancels = Some((state.changes + more, Arc::clone(progress)));
    }

    /// How many operations there were that change something.
    pub(crate) fn changes(&self) -> u64 {
        self.state.lock().changes
    }

    /// Nothing fails any more.
    pub(crate) fn mend(&self) {
        let mut state = self.state.lock();
        state.manners.fault = None;
        state.manners.nth = None;
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
        Arc::new(SimStorage::new(self, file, writable))
    }
}

impl State {
    /// Operations of this kind so far.
    pub(super) fn count(&self, kind: Kind) -> u64 {
        self.counts[kind as usize]
    }

    /// Counts an operation; an error when it fails, or when its process is dead.
    pub(super) fn begin(&mut self, kind: Kind, process: u64) -> Result<(), Trouble> {
        if self.kill_at.is_some_and(|at| self.total >= at) {
            self.process += 1;
            self.kill_at = None;
        }
        if self.process != process {
            return Err(Trouble::Dead);
        }
        let change = kind.is_change().then_some(self.changes);
        let of_all = self.total;
        self.total += 1;
        self.changes += u64::from(change.is_some());
        let asks = self
            .cancels
            .as_ref()
            .filter(|(from, _)| change.is_some_and(|c| c >= *from));
        if let Some((_, progress)) = asks {
            progress.cancel();
        }
        let count = &mut self.counts[kind as usize];
        let number = *count;
        *count += 1;
        if let Some(nth) = self.manners.nth.filter(|nth| nth.is_hit(of_all, change)) {
            self.failures.count += 1;
            return Err(Trouble::Fault(nth.errno));
        }
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
    pub(super) fn is_mark_alone(&self, file: usize) -> bool {
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

    /// The names in a directory; none once it is gone.
    pub(crate) fn names(&self, directory: usize) -> &Names {
        static NONE: Names = Names::new();
        self.directories.get(&directory).unwrap_or(&NONE)
    }

    /// Changes the names in a directory.
    pub(crate) fn name(&mut self, directory: usize, change: NameChange) {
        if let Some(names) = self.directories.get_mut(&directory) {
            change.apply(names);
        }
        self.log_event(Event::Named { directory, change });
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_names(&mut self, directory: usize) {
        if !self.manners.lying_names {
            self.log_event(Event::NamesSynced { directory });
        }
    }

    pub(crate) fn log_event(&mut self, event: Event) {
        if let Some(log) = &mut self.log {
            log.push(event);
        }
    }

    /// Where the header and the table of a file end; 0 where it has none.
    pub(super) fn table_end(&self, file: usize) -> usize {
        let bytes = &self.files[file];
        if !bytes.starts_with(b"Witho") {
            return 0;
        }
        let word = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_le_bytes) as usize;
        64 + 4 * word(0x20)
    }

    pub(super) fn change(&mut self, file: usize, change: Change) {
        change.apply(&mut self.files[file], &mut || true);
        self.log_event(Event::Changed { file, change });
    }
}

pub(super) enum Trouble {
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
