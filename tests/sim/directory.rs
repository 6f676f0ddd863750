//! A directory whose names a power cut may take back.
//!
//! What was created, renamed or removed is certain only after the directory itself was synced;
//! until then each of these may be lost, in any combination, whatever was synced of the files.

use super::storage::{Event, Kind, SimStorage, World};
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{Directory, SharedStorage};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Names, and the numbers of the files in the world.
pub(crate) type Names = BTreeMap<String, usize>;

/// One operation on names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
}

impl NameChange {
    pub(crate) fn apply(&self, names: &mut Names) {
        match self {
            Self::Create(name, file) => {
                names.insert(name.clone(), *file);
            }
            // What it renames may be a name whose creation was lost.
            Self::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            Self::Remove(name) => {
                names.remove(name);
            }
        }
    }
}

/// The directory of a world's files.
#[derive(Debug)]
pub(crate) struct SimDirectory {
    world: Arc<World>,
    process: u64,
}

impl SimDirectory {
    /// For the process that uses the files now.
    pub(crate) fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            process: world.process(),
        }
    }

    fn change(&self, kind: Kind, change: NameChange, needs: Option<&str>) -> Result<()> {
        self.world.operation(kind, self.process, |state| {
            if needs.is_some_and(|name| !state.names.contains_key(name)) {
                return Err(Error::new(ErrorKind::Missing));
            }
            change.apply(&mut state.names);
            state.log_event(Event::Named { change });
            Ok(())
        })
    }
}

impl Directory for SimDirectory {
    fn open(&self, name: &str, write: bool) -> Result<SharedStorage> {
        let file = self.world.operation(Kind::Open, self.process, |state| {
            let file = state.names.get(name).copied();
            file.ok_or_else(|| Error::new(ErrorKind::Missing))
        })?;
        Ok(self.world.open(file, write))
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        let file = self.world.operation(Kind::Create, self.process, |state| {
            if state.names.contains_key(name) {
                return Err(Error::errno(libc::EEXIST));
            }
            let file = state.add_file();
            let change = NameChange::Create(name.to_owned(), file);
            change.apply(&mut state.names);
            state.log_event(Event::Named { change });
            Ok(file)
        })?;
        let storage: Arc<SimStorage> = self.world.open(file, true);
        Ok(storage)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        self.change(Kind::Rename, change, Some(from))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let change = NameChange::Remove(name.to_owned());
        self.change(Kind::Remove, change, Some(name))
    }

    fn entries(&self) -> Result<Vec<String>> {
        self.world.operation(Kind::Open, self.process, |state| {
            Ok(state.names.keys().cloned().collect())
        })
    }

    fn sync(&self) -> Result<()> {
        self.world
            .operation(Kind::SyncNames, self.process, |state| {
                state.log_event(Event::NamesSynced);
                Ok(())
            })
    }
}
