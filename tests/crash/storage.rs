//! Files in memory that know what a power cut would leave of them.

use forge_splitmix as splitmix;
use parking_lot::Mutex;
use ploopfs::error::{Error, Result};
use ploopfs::storage::{FileId, Keep, Storage};
use ploopfs::units::FileOffset;
use std::ops::Range;
use std::sync::Arc;

use super::forge::content::splitmix as forge_splitmix;

/// A way in which the files are worse than they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    SyncsDoNothing,
    EverySecondSyncDoesNothing,
}

/// What all files of a disk share: the count of syncs, and the moments at which the power may go.
#[derive(Debug)]
pub(crate) struct World {
    flaw: Flaw,
    state: Mutex<Events>,
}

#[derive(Debug, Default)]
struct Events {
    syncs: u64,
    fail_at: Option<u64>,
    recording: bool,
    /// For each moment, every file's content and un-synced operations.
    moments: Vec<Vec<(usize, FileState)>>,
    files: Vec<std::sync::Weak<SimFile>>,
}

impl World {
    pub(crate) fn new(flaw: Flaw) -> Arc<Self> {
        Arc::new(Self {
            flaw,
            state: Mutex::default(),
        })
    }

    pub(crate) fn record(&self, on: bool) {
        self.state.lock().recording = on;
    }

    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// The sync with this number fails once; what it should have written is lost.
    pub(crate) fn fail_sync(&self, number: u64) {
        self.state.lock().fail_at = Some(number);
    }

    /// The recorded moments as files, in the shape of `like`.
    pub(crate) fn take_moments(&self, like: &[Vec<Arc<SimFile>>]) -> Vec<Vec<Vec<Arc<SimFile>>>> {
        let moments = std::mem::take(&mut self.state.lock().moments);
        let quiet = Self::new(Flaw::None);
        let shape = |moment: Vec<(usize, FileState)>| {
            let mut states = moment.into_iter();
            let files = like.iter().map(|files| {
                let one = |file: &Arc<SimFile>| {
                    let (_, state) = states.next().expect("a state for each file");
                    SimFile::of_state(&quiet, state, file.writable)
                };
                files.iter().map(one).collect()
            });
            files.collect()
        };
        moments.into_iter().map(shape).collect()
    }

    /// Called after each operation, without the file's lock.
    fn moment(&self) {
        let mut events = self.state.lock();
        if !events.recording {
            return;
        }
        let files: Vec<_> = events
            .files
            .iter()
            .filter_map(std::sync::Weak::upgrade)
            .collect();
        let states = files
            .iter()
            .enumerate()
            .map(|(n, file)| (n, file.state.lock().clone()));
        let states = states.collect();
        events.moments.push(states);
    }
}

/// One operation that has not been synced.
#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
    Zero(Range<usize>),
}

#[derive(Clone, Debug)]
struct FileState {
    /// What is on the medium for certain.
    durable: Vec<u8>,
    /// What reads see.
    cached: Vec<u8>,
    changes: Vec<Change>,
}

/// One file.
#[derive(Debug)]
pub(crate) struct SimFile {
    world: Arc<World>,
    writable: bool,
    state: Mutex<FileState>,
}

fn apply(bytes: &mut Vec<u8>, change: &Change, keep: &mut dyn FnMut() -> bool) {
    match change {
        Change::Write(at, data) => {
            // A sector is atomic, a write is not.
            let mut from = 0;
            while from < data.len() {
                let to = ((at + from) / 512 * 512 + 512 - at).min(data.len());
                if keep() {
                    let end = at + to;
                    if bytes.len() < end {
                        bytes.resize(end, 0);
                    }
                    bytes[at + from..end].copy_from_slice(&data[from..to]);
                }
                from = to;
            }
        }
        Change::SetLen(len) if keep() => bytes.resize(*len, 0),
        Change::Zero(range) if keep() => {
            let end = range.end.min(bytes.len());
            if range.start < end {
                bytes[range.start..end].fill(0);
            }
        }
        _ => {}
    }
}

impl SimFile {
    pub(crate) fn new(world: &Arc<World>, bytes: Vec<u8>, writable: bool) -> Arc<Self> {
        let state = FileState {
            durable: bytes.clone(),
            cached: bytes,
            changes: Vec::new(),
        };
        let file = Self::of_state(world, state, writable);
        world.state.lock().files.push(Arc::downgrade(&file));
        file
    }

    fn of_state(world: &Arc<World>, state: FileState, writable: bool) -> Arc<Self> {
        Arc::new(Self {
            world: Arc::clone(world),
            writable,
            state: Mutex::new(state),
        })
    }

    /// The file as it is when the power comes back: each un-synced operation kept or not.
    pub(crate) fn after_cut(&self, world: &Arc<World>, dice: &mut u64) -> Arc<Self> {
        let state = self.state.lock();
        let mut bytes = state.durable.clone();
        // All kept, none kept, and everything between.
        let bias = splitmix(dice) % 5;
        for change in &state.changes {
            apply(&mut bytes, change, &mut || splitmix(dice) % 4 < bias);
        }
        Self::new(world, bytes, self.writable)
    }

    fn change(&self, change: Change) {
        assert!(self.writable, "a lower delta is never written");
        {
            let mut state = self.state.lock();
            apply(&mut state.cached, &change, &mut || true);
            state.changes.push(change);
        }
        self.world.moment();
    }
}

fn index(at: FileOffset) -> usize {
    usize::try_from(at.get()).expect("simulated files are small")
}

impl Storage for SimFile {
    fn len(&self) -> Result<FileOffset> {
        Ok(FileOffset::new(self.state.lock().cached.len() as u64))
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let state = self.state.lock();
        let source = state.cached.get(index(at)..index(at) + buf.len());
        buf.copy_from_slice(source.ok_or_else(|| Error::errno(libc::EIO))?);
        Ok(())
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        self.change(Change::Write(index(at), buf.to_vec()));
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        let (number, fails) = {
            let mut events = self.world.state.lock();
            events.syncs += 1;
            (events.syncs, events.fail_at == Some(events.syncs))
        };
        if fails {
            // What the host does: the bytes are lost, reads still see them, the next sync says ok.
            self.state.lock().changes.clear();
            return Err(Error::errno(libc::EIO));
        }
        let is_honest = match self.world.flaw {
            Flaw::None => true,
            Flaw::SyncsDoNothing => false,
            Flaw::EverySecondSyncDoesNothing => number % 2 == 0,
        };
        if is_honest {
            let mut state = self.state.lock();
            state.durable = state.cached.clone();
            state.changes.clear();
        }
        self.world.moment();
        Ok(())
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.change(Change::SetLen(index(len)));
        Ok(())
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        if self.len()? < range.end {
            self.change(Change::SetLen(index(range.end)));
        }
        Ok(())
    }

    fn zero(&self, range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        self.change(Change::Zero(index(range.start)..index(range.end)));
        Ok(())
    }

    fn copy_from(&self, _: FileOffset, _: &dyn Storage, _: Range<FileOffset>) -> Result<bool> {
        Ok(false)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let len = self.len()?;
        Ok((from < len).then_some(from..len))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.len()?.get())
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
