//! Directories whose names a power cut may take back.
//!
//! What was created, renamed or removed is certain only after the directory itself was synced;
//! until then each of these may be lost, in any combination, whatever was synced of the files.

use super::media::{Media, ROOT};
use super::storage::{Kind, Manners, SimStorage, State, World};
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{Directory, SharedStorage};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names, and the numbers of the files and directories in the world.
pub(crate) type Names = BTreeMap<String, usize>;
/// The names in each directory.
pub(crate) type Trees = BTreeMap<usize, Names>;

/// One operation on names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NameChange {
    Create(String, usize),
    /// The same for a directory.
    Make(String, usize),
    Rename(String, String),
    Remove(String),
}

impl NameChange {
    pub(crate) fn apply(&self, names: &mut Names) {
        match self {
            Self::Create(name, node) | Self::Make(name, node) => {
                names.insert(name.clone(), *node);
            }
            // What it renames may be a name whose creation was lost.
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

/// A directory of a world.
#[derive(Clone, Debug)]
pub(crate) struct SimDirectory {
    world: Arc<World>,
    process: u64,
    node: usize,
}

fn missing() -> Error {
    Error::new(ErrorKind::Missing)
}

impl SimDirectory {
    /// The root, for the process that uses the files now.
    pub(crate) fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            process: world.process(),
            node: ROOT,
        }
    }

    /// The root of a new world that goes on from what is on a medium.
    pub(crate) fn on(media: &Media) -> Self {
        Self::with(media, Manners::default())
    }

    /// The same where the host has these manners.
    pub(crate) fn with(media: &Media, manners: Manners) -> Self {
        Self::new(&World::on(media, manners))
    }

    pub(crate) fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// All that is on the medium now.
    pub(crate) fn media(&self) -> Media {
        self.world.media()
    }

    /// A directory in this one.
    pub(crate) fn inner(&self, name: &str) -> Option<Self> {
        let node = self.look(|state| state.names(self.node).get(name).copied())?;
        let is_there = self.look(|state| state.directories.contains_key(&node));
        is_there.then(|| Self {
            node,
            ..self.clone()
        })
    }

    fn look<T>(&self, what: impl FnOnce(&State) -> T) -> T {
        self.world.look(what)
    }

    /// Changes a name; `needs` must be there, `free` must not.
    fn change(
        &self,
        kind: Kind,
        change: NameChange,
        needs: Option<&str>,
        free: Option<&str>,
    ) -> Result<()> {
        self.world.operation(kind, self.process, |state| {
            let names = state.names(self.node);
            if needs.is_some_and(|name| !names.contains_key(name)) {
                return Err(missing());
            }
            if free.is_some_and(|name| names.contains_key(name)) {
                return Err(Error::errno(libc::EEXIST));
            }
            state.name(self.node, change);
            Ok(())
        })
    }

    fn create(
        &self,
        name: &str,
        change: impl FnOnce(String, usize) -> NameChange,
    ) -> Result<usize> {
        self.world.operation(Kind::Create, self.process, |state| {
            if state.names(self.node).contains_key(name) {
                return Err(Error::errno(libc::EEXIST));
            }
            let node = state.add_file();
            let change = change(name.to_owned(), node);
            if let NameChange::Make(..) = change {
                state.directories.insert(node, Names::new());
            }
            state.name(self.node, change);
            Ok(node)
        })
    }
}

impl Directory for SimDirectory {
    fn open(&self, name: &str, write: bool) -> Result<SharedStorage> {
        let file = self.world.operation(Kind::Open, self.process, |state| {
            let node = state.names(self.node).get(name).copied();
            let node = node.ok_or_else(missing)?;
            match state.directories.contains_key(&node) {
                true => Err(Error::new(ErrorKind::OutsideBundle)),
                false => Ok(node),
            }
        })?;
        Ok(self.world.open(file, write))
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        let file = self.create(name, NameChange::Create)?;
        let storage: Arc<SimStorage> = self.world.open(file, true);
        Ok(storage)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        self.change(Kind::Rename, change, Some(from), None)
    }

    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        self.change(Kind::Rename, change, Some(from), Some(to))
    }

    fn remove(&self, name: &str) -> Result<()> {
        if self.inner(name).is_some() {
            return Err(Error::errno(libc::EISDIR));
        }
        let change = NameChange::Remove(name.to_owned());
        self.change(Kind::Remove, change, Some(name), None)
    }

    fn create_directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        let node = self.create(name, NameChange::Make)?;
        Ok(Arc::new(Self {
            node,
            ..self.clone()
        }))
    }

    fn open_directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        let found = self.world.operation(Kind::Open, self.process, |state| {
            let node = state.names(self.node).get(name).copied();
            let node = node.ok_or_else(missing)?;
            let is_one = state.directories.contains_key(&node);
            is_one
                .then_some(node)
                .ok_or_else(|| Error::errno(libc::ENOTDIR))
        });
        Ok(Arc::new(Self {
            node: found?,
            ..self.clone()
        }))
    }

    fn remove_directory(&self, name: &str) -> Result<()> {
        let is_there = self.look(|state| state.names(self.node).contains_key(name));
        match self.inner(name) {
            None if is_there => return Err(Error::errno(libc::ENOTDIR)),
            Some(inner) if !self.look(|state| state.names(inner.node).is_empty()) => {
                return Err(Error::errno(libc::ENOTEMPTY));
            }
            _ => {}
        }
        let change = NameChange::Remove(name.to_owned());
        self.change(Kind::Remove, change, Some(name), None)
    }

    fn entries(&self) -> Result<Vec<String>> {
        self.world.operation(Kind::Open, self.process, |state| {
            Ok(state.names(self.node).keys().cloned().collect())
        })
    }

    fn sync(&self) -> Result<()> {
        self.world
            .operation(Kind::SyncNames, self.process, |state| {
                state.sync_names(self.node);
                Ok(())
            })
    }
}
