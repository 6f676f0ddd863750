//! A tree of directories and files in memory that knows what a power cut would leave of it.
//!
//! What is written to a file is durable after a sync of the file, a name after a sync of its own
//! directory. Until then a power cut keeps any of the writes, torn at 512 bytes, and any of the
//! changes of names.

use crate::forge::content::splitmix;
use parking_lot::Mutex;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{Directory, FileId, Keep, SharedStorage, Storage};
use ploopfs::units::FileOffset;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

type Names = BTreeMap<String, usize>;

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
}

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
}

#[derive(Clone, Debug)]
enum Node {
    File {
        durable: Vec<u8>,
        cached: Vec<u8>,
        pending: Vec<Change>,
    },
    Directory {
        durable: Names,
        names: Names,
        pending: Vec<NameChange>,
    },
}

impl Node {
    fn file(bytes: Vec<u8>) -> Self {
        Self::File {
            durable: bytes.clone(),
            cached: bytes,
            pending: Vec::new(),
        }
    }

    fn directory(names: Names) -> Self {
        Self::Directory {
            durable: names.clone(),
            names,
            pending: Vec::new(),
        }
    }
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
            Self::SetLen(_) => {}
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Create(name, node) => {
                names.insert(name.clone(), *node);
            }
            Self::Rename(from, to) => {
                if let Some(node) = names.remove(from) {
                    names.insert(to.clone(), node);
                }
            }
            Self::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

/// Everything at one moment; the first node is the root.
#[derive(Clone, Debug)]
pub(crate) struct State {
    nodes: Vec<Node>,
}

impl State {
    /// What is left when the power comes back.
    pub(crate) fn after_cut(&self, dice: &mut u64) -> Self {
        let bias = splitmix(dice) % 5;
        let mut keep = || splitmix(dice) % 4 < bias;
        let left = |node: &Node| match node {
            Node::File {
                durable, pending, ..
            } => {
                let mut bytes = durable.clone();
                for change in pending {
                    change.apply(&mut bytes, &mut keep);
                }
                Node::file(bytes)
            }
            Node::Directory {
                durable, pending, ..
            } => {
                let mut names = durable.clone();
                for change in pending {
                    if keep() {
                        change.apply(&mut names);
                    }
                }
                Node::directory(names)
            }
        };
        Self {
            nodes: self.nodes.iter().map(left).collect(),
        }
    }

    fn names_of(&self, node: usize) -> &Names {
        match &self.nodes[node] {
            Node::Directory { names, .. } => names,
            Node::File { .. } => panic!("a file has no names in it"),
        }
    }

    /// All files and directories below the root, by path; directories have no bytes.
    pub(crate) fn tree(&self) -> BTreeMap<String, Option<Vec<u8>>> {
        let mut tree = BTreeMap::new();
        let mut left = vec![(String::new(), 0)];
        while let Some((path, node)) = left.pop() {
            match &self.nodes[node] {
                Node::File { cached, .. } => {
                    tree.insert(path, Some(cached.clone()));
                }
                Node::Directory { names, .. } => {
                    for (name, node) in names {
                        left.push((format!("{path}/{name}"), *node));
                    }
                    tree.insert(path, None);
                }
            }
        }
        tree.remove("");
        tree
    }
}

/// What the host does wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Manners {
    /// The operation with this number fails, with this errno.
    pub(crate) fails: Option<(u64, i32)>,
    /// Syncs of files say that they are done and do nothing.
    pub(crate) lying_syncs: bool,
    /// Syncs of directories do.
    pub(crate) lying_names: bool,
}

#[derive(Debug)]
struct Shared {
    manners: Manners,
    state: Mutex<State>,
    moments: Mutex<Vec<State>>,
    done: Mutex<u64>,
}

impl Shared {
    fn step<T>(&self, act: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let mut done = self.done.lock();
        let number = *done;
        *done += 1;
        if let Some((_, errno)) = self.manners.fails.filter(|(fails, _)| *fails == number) {
            return Err(Error::errno(errno));
        }
        let mut state = self.state.lock();
        let result = act(&mut state);
        self.moments.lock().push(state.clone());
        result
    }
}

/// A directory of the tree.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    shared: Arc<Shared>,
    node: usize,
}

#[derive(Debug)]
struct Open {
    shared: Arc<Shared>,
    node: usize,
}

impl Host {
    pub(crate) fn new(manners: Manners) -> Self {
        let state = State {
            nodes: vec![Node::directory(Names::new())],
        };
        let moments = Mutex::new(vec![state.clone()]);
        let shared = Shared {
            manners,
            state: Mutex::new(state),
            moments,
            done: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            node: 0,
        }
    }

    pub(crate) fn state(&self) -> State {
        self.shared.state.lock().clone()
    }

    /// The tree after each operation, and before the first.
    pub(crate) fn moments(&self) -> Vec<State> {
        self.shared.moments.lock().clone()
    }

    /// Changes a name; `free` must not be there, `needs` must be.
    fn change(&self, needs: Option<&str>, free: Option<&str>, change: NameChange) -> Result<()> {
        self.shared.step(|state| {
            let there = state.names_of(self.node);
            if needs.is_some_and(|name| !there.contains_key(name)) {
                return Err(Error::new(ErrorKind::Missing));
            }
            if free.is_some_and(|name| there.contains_key(name)) {
                return Err(Error::errno(libc::EEXIST));
            }
            if let Node::Directory { names, pending, .. } = &mut state.nodes[self.node] {
                change.apply(names);
                pending.push(change);
            }
            Ok(())
        })
    }

    fn create(&self, name: &str, node: Node) -> Result<usize> {
        let number = {
            let mut state = self.shared.state.lock();
            state.nodes.push(node);
            state.nodes.len() - 1
        };
        let change = NameChange::Create(name.to_owned(), number);
        self.change(None, Some(name), change)?;
        Ok(number)
    }

    fn opened(&self, node: usize) -> SharedStorage {
        let shared = Arc::clone(&self.shared);
        Arc::new(Open { shared, node })
    }
}

impl Directory for Host {
    fn open(&self, name: &str, _write: bool) -> Result<SharedStorage> {
        let found = self.state().names_of(self.node).get(name).copied();
        Ok(self.opened(found.ok_or_else(|| Error::new(ErrorKind::Missing))?))
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        let node = self.create(name, Node::file(Vec::new()))?;
        Ok(self.opened(node))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        self.change(Some(from), None, change)
    }

    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        self.change(Some(from), Some(to), change)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.change(Some(name), None, NameChange::Remove(name.to_owned()))
    }

    fn create_directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        let node = self.create(name, Node::directory(Names::new()))?;
        let shared = Arc::clone(&self.shared);
        Ok(Arc::new(Self { shared, node }))
    }

    fn remove_directory(&self, name: &str) -> Result<()> {
        let state = self.state();
        let node = state.names_of(self.node).get(name);
        if node.is_some_and(|node| !state.names_of(*node).is_empty()) {
            return Err(Error::errno(libc::ENOTEMPTY));
        }
        self.remove(name)
    }

    fn entries(&self) -> Result<Vec<String>> {
        Ok(self.state().names_of(self.node).keys().cloned().collect())
    }

    fn sync(&self) -> Result<()> {
        let lies = self.shared.manners.lying_names;
        self.shared.step(|state| {
            if let Node::Directory {
                durable,
                names,
                pending,
            } = &mut state.nodes[self.node]
            {
                if !lies {
                    durable.clone_from(names);
                    pending.clear();
                }
            }
            Ok(())
        })
    }
}

fn index(at: FileOffset) -> usize {
    usize::try_from(at.get()).expect("simulated files are small")
}

impl Open {
    fn read<T>(&self, look: impl FnOnce(&Vec<u8>) -> T) -> T {
        match &self.shared.state.lock().nodes[self.node] {
            Node::File { cached, .. } => look(cached),
            Node::Directory { .. } => panic!("a directory is not read"),
        }
    }

    fn change(&self, change: Change) -> Result<()> {
        self.shared.step(|state| {
            if let Node::File {
                cached, pending, ..
            } = &mut state.nodes[self.node]
            {
                change.apply(cached, &mut || true);
                pending.push(change);
            }
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
        let lies = self.shared.manners.lying_syncs;
        self.shared.step(|state| {
            if let Node::File {
                durable,
                cached,
                pending,
            } = &mut state.nodes[self.node]
            {
                if !lies {
                    durable.clone_from(cached);
                    pending.clear();
                }
            }
            Ok(())
        })
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.change(Change::SetLen(index(len)))
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        let len = self.read(Vec::len);
        self.change(Change::SetLen(index(range.end).max(len)))
    }

    fn zero(&self, _range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        Err(Error::errno(libc::EOPNOTSUPP))
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
