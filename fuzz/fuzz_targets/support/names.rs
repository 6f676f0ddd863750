//! One directory of sparse files in memory.

use super::sparse::SparseFile;
use parking_lot::Mutex;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{Directory, SharedStorage, Storage};
use ploopfs::units::FileOffset;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The directory.
#[derive(Debug, Default)]
pub(crate) struct Names(Mutex<BTreeMap<String, Arc<SparseFile>>>);

fn missing() -> Error {
    Error::new(ErrorKind::Missing)
}

impl Names {
    /// A file with these bytes.
    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        let file = SparseFile::default();
        file.write_at(FileOffset::ZERO, bytes).expect("memory");
        self.0.lock().insert(name.to_owned(), Arc::new(file));
    }

    /// Changes one byte of a file.
    pub(crate) fn poke(&self, name: &str, at: u64, byte: u8) {
        if let Some(file) = self.0.lock().get(name) {
            file.write_at(FileOffset::new(at), &[byte]).expect("memory");
        }
    }
}

impl Directory for Names {
    fn open(&self, name: &str, _write: bool) -> Result<SharedStorage> {
        let found = self.0.lock().get(name).cloned();
        Ok(found.ok_or_else(missing)?)
    }

    fn create_new(&self, name: &str) -> Result<SharedStorage> {
        let mut names = self.0.lock();
        if names.contains_key(name) {
            return Err(Error::errno(libc::EEXIST));
        }
        let file = Arc::new(SparseFile::default());
        names.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut names = self.0.lock();
        let file = names.remove(from).ok_or_else(missing)?;
        names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        let removed = self.0.lock().remove(name);
        removed.map(drop).ok_or_else(missing)
    }

    fn entries(&self) -> Result<Vec<String>> {
        Ok(self.0.lock().keys().cloned().collect())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
