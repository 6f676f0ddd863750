//! A directory of files in memory that knows what a power cut would leave of it.
//!
//! What is written to a file is durable after a sync of the file, a name after a sync of the
//! directory. Until then a power cut keeps any of the un-synced writes, torn at 512 bytes, and any
//! of the un-synced changes of names.

use parking_lot::Mutex;
use ploopfs::admin::progress::Progress;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{Directory, FileId, Keep, SharedStorage, Storage};
use ploopfs::units::FileOffset;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::forge::content::splitmix;

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
    Zero(Range<usize>),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>, keep: &mut dyn FnMut() -> bool) {
        match self {
            Self::Write(at, data) => {
                let mut from = 0;
                while from < data.len() {
                    let to = ((at + from) / 512 * 512 + 512 - at).min(data.len());
                    if keep() {
                        bytes.resize(bytes.len().max(at + to), 0);
                        bytes[at + from..at + to].copy_from_slice(&data[from..to]);
                    }
                    from = to;
                }
            }
            Self::SetLen(len) if keep() => bytes.resize(*len, 0),
            Self::Zero(range) if keep() => {
                let end = range.end.min(bytes.len());
                bytes[range.start.min(end)..end].fill(0);
            }
            _ => {}
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Inode {
    durable: Vec<u8>,
    cached: Vec<u8>,
    pending: Vec<Change>,
}

type Names = BTreeMap<String, usize>;

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Create(name, inode) => {
                names.insert(name.clone(), *inode);
            }
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
            Self::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

/// Everything at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct State {
    inodes: Vec<Inode>,
    names: Names,
    durable_names: Names,
    pending_names: Vec<NameChange>,
}

impl State {
    /// What is left when the power comes back.
    pub(crate) fn after_cut(&self, dice: &mut u64) -> Self {
        let bias = splitmix(dice) % 5;
        let mut keep = || splitmix(dice) % 4 < bias;
        let inodes = self.inodes.iter().map(|inode| {
            let mut bytes = inode.durable.clone();
            for change in &inode.pending {
                change.apply(&mut bytes, &mut keep);
            }
            Inode {
                durable: bytes.clone(),
                cached: bytes,
                pending: Vec::new(),
            }
        });
        let inodes = inodes.collect();
        let mut names = self.durable_names.clone();
        for change in &self.pending_names {
            if splitmix(dice) % 2 == 0 {
                change.apply(&mut names);
            }
        }
        Self {
            inodes,
            durable_names: names.clone(),
            names,
            pending_names: Vec::new(),
        }
    }

    /// What reads of a file see.
    pub(crate) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let inode = self.names.get(name)?;
        Some(&self.inodes[*inode].cached)
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.names.keys().map(String::as_str).collect()
    }
}

/// How often something may still be done, and what fails then.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    moments: Mutex<Option<Vec<State>>>,
    /// The operation with this number, and all after it, fail.
    fails_from: Mutex<Option<u64>>,
    done: Mutex<u64>,
    /// The user asks to stop when so many operations have been done.
    cancels: Mutex<Option<(u64, Arc<Progress>)>>,
}

impl Shared {
    fn step<T>(&self, act: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut done = self.done.lock();
        if self.fails_from.lock().is_some_and(|from| *done >= from) {
            return Err(Error::errno(libc::EIO));
        }
        if let Some((from, progress)) = &*self.cancels.lock() {
            if *done >= *from {
                progress.cancel();
            }
        }
        *done += 1;
        let result = act(&mut self.state.lock());
        if let Some(moments) = self.moments.lock().as_mut() {
            moments.push(self.state.lock().clone());
        }
        result
    }
}

/// The directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Host(Arc<Shared>);

#[derive(Debug)]
struct Open {
    host: Host,
    inode: usize,
}

fn missing() -> Error {
    Error::new(ErrorKind::Missing)
}

impl Host {
    pub(crate) fn new(state: State) -> Self {
        let host = Self::default();
        *host.0.state.lock() = state;
        host
    }

    /// A directory with one durable file.
    pub(crate) fn with(name: &str, bytes: &[u8]) -> Self {
        let names = Names::from([(name.to_owned(), 0)]);
        let bytes = bytes.to_vec();
        let inode = Inode {
            durable: bytes.clone(),
            cached: bytes,
            pending: Vec::new(),
        };
        Self::new(State {
            inodes: vec![inode],
            durable_names: names.clone(),
            names,
            pending_names: Vec::new(),
        })
    }

    pub(crate) fn state(&self) -> State {
        self.0.state.lock().clone()
    }

    /// From now on every moment is kept.
    pub(crate) fn record(&self) {
        *self.0.moments.lock() = Some(vec![self.state()]);
    }

    pub(crate) fn moments(&self) -> Vec<State> {
        self.0.moments.lock().take().unwrap_or_default()
    }

    /// All operations fail once so many more have been done.
    pub(crate) fn fail_after(&self, more: u64) {
        *self.0.fails_from.lock() = Some(*self.0.done.lock() + more);
    }

    /// An operation asks to stop once so many more have been done.
    pub(crate) fn cancel_after(&self, more: u64, progress: &Arc<Progress>) {
        *self.0.cancels.lock() = Some((*self.0.done.lock() + more, Arc::clone(progress)));
    }

    /// Changes a name; `needs` must be there.
    fn name(&self, needs: Option<&str>, change: NameChange) -> Result<()> {
        self.0.step(|state| {
            if needs.is_some_and(|name| !state.names.contains_key(name)) {
                return Err(missing());
            }
            change.apply(&mut state.names);
            state.pending_names.push(change);
            Ok(())
        })
    }
}

impl Directory for Host {
    fn open(&self, name: &str, _write: bool) -> Result<SharedStorage> {
        let found = self.0.state.lock().names.get(name).copied();
        let (host, inode) = (self.clone(), found.ok_or_else(missing)?);
        Ok(Arc::new(Open { host, inode }))
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        if self.0.state.lock().names.contains_key(name) {
            return Err(Error::errno(libc::EEXIST));
        }
        let inode = self.0.state.lock().inodes.len();
        self.0.state.lock().inodes.push(Inode::default());
        self.name(None, NameChange::Create(name.to_owned(), inode))?;
        self.open(name, true)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        self.name(Some(from), change)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.name(Some(name), NameChange::Remove(name.to_owned()))
    }

    fn entries(&self) -> Result<Vec<String>> {
        Ok(self.0.state.lock().names.keys().cloned().collect())
    }

    fn sync(&self) -> Result<()> {
        self.0.step(|state| {
            state.durable_names = state.names.clone();
            state.pending_names.clear();
            Ok(())
        })
    }
}

fn index(at: FileOffset) -> usize {
    usize::try_from(at.get()).expect("simulated files are small")
}

impl Open {
    fn read<T>(&self, look: impl FnOnce(&Vec<u8>) -> T) -> T {
        look(&self.host.0.state.lock().inodes[self.inode].cached)
    }

    fn change(&self, change: Change) -> Result<()> {
        self.host.0.step(|state| {
            let inode = &mut state.inodes[self.inode];
            change.apply(&mut inode.cached, &mut || true);
            inode.pending.push(change);
            Ok(())
        })
    }
}

impl Storage for Open {
    fn len(&self) -> Result<FileOffset> {
        Ok(FileOffset::new(self.read(|bytes| bytes.len() as u64)))
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        self.read(|bytes| {
            let source = bytes.get(index(at)..index(at) + buf.len());
            buf.copy_from_slice(source.ok_or_else(|| Error::new(ErrorKind::Truncated))?);
            Ok(())
        })
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        self.change(Change::Write(index(at), buf.to_vec()))
    }

    fn sync_data(&self) -> Result<()> {
        self.host.0.step(|state| {
            let inode = &mut state.inodes[self.inode];
            inode.durable.clone_from(&inode.cached);
            inode.pending.clear();
            Ok(())
        })
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.change(Change::SetLen(index(len)))
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        let end = index(range.end);
        let len = self.read(Vec::len);
        self.change(Change::SetLen(end.max(len)))
    }

    fn zero(&self, range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        self.change(Change::Zero(index(range.start)..index(range.end)))
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
