//! What is on the medium of each file and each directory, and what a power cut leaves of it.
//!
//! At each moment the medium has of a file what its last sync made durable, and of what was done
//! since any part: each operation, and each sector of a write, is kept or lost by itself. The same
//! holds for the names in a directory: each creation, renaming and removal since the directory was
//! synced, whatever was synced of the files and directories behind the names.

use super::directory::{NameChange, Names, Trees};
use super::event::{Change, Event};
use crate::forge::content::splitmix;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The number of the directory that all others are in.
pub(crate) const ROOT: usize = usize::MAX;

/// Where the in-use mark is in a header.
const MARK: std::ops::Range<usize> = 0x2c..0x30;
const HEADER_LEN: usize = 64;

/// One file on the medium.
#[derive(Clone, Debug)]
struct Medium {
    durable: Vec<u8>,
    /// What reads see.
    cached: Vec<u8>,
    pending: Vec<Change>,
    /// Contents without the header that it may have while the mark is not set: those that it had
    /// when it was last closed, and will have when it is closed the next time.
    closed: [Option<Vec<u8>>; 2],
}

impl Medium {
    fn new(bytes: &[u8]) -> Self {
        Self {
            durable: bytes.to_vec(),
            cached: bytes.to_vec(),
            pending: Vec::new(),
            closed: [
                Some(bytes.get(HEADER_LEN..).unwrap_or_default().to_vec()),
                None,
            ],
        }
    }

    fn change(&mut self, change: &Change) {
        if let Change::Write(0, data) = change {
            let unmarks = data.len() == HEADER_LEN && data[MARK] == [0; 4];
            if unmarks && self.cached.len() >= HEADER_LEN {
                let now = self.cached[HEADER_LEN..].to_vec();
                self.closed[1] = Some(now);
            }
        }
        change.apply(&mut self.cached, &mut || true);
        self.pending.push(change.clone());
    }

    fn sync(&mut self) {
        // Not what reads see: what an earlier sync has lost stays lost.
        for change in self.pending.drain(..) {
            change.apply(&mut self.durable, &mut || true);
        }
        if self.durable.get(MARK) == Some(&[0; 4]) && self.closed[1].is_some() {
            self.closed = [self.closed[1].take(), None];
        }
    }

    /// What reads see when nothing comes from the host's cache that is not yet to be written.
    fn uncached(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for change in &self.pending {
            change.apply(&mut bytes, &mut || true);
        }
        bytes
    }

    fn after_cut(&self, dice: &mut u64) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        // All kept, none kept, and everything between.
        let bias = splitmix(dice) % 5;
        for change in &self.pending {
            change.apply(&mut bytes, &mut || splitmix(dice) % 4 < bias);
        }
        bytes
    }

    /// A file without its mark must be as some close left it, or was about to.
    fn is_wrongly_unmarked(&self, bytes: &[u8]) -> bool {
        bytes.get(MARK) == Some(&[0; 4])
            && !self
                .closed
                .iter()
                .flatten()
                .any(|closed| *closed == bytes[HEADER_LEN..])
    }
}

/// The names in one directory on the medium.
#[derive(Clone, Debug, Default)]
struct Catalog {
    durable: Names,
    /// What others see.
    cached: Names,
    pending: Vec<NameChange>,
}

impl Catalog {
    fn new(names: Names) -> Self {
        Self {
            durable: names.clone(),
            cached: names,
            pending: Vec::new(),
        }
    }

    fn after_cut(&self, dice: &mut u64) -> Names {
        let mut names = self.durable.clone();
        let bias = splitmix(dice) % 5;
        for change in &self.pending {
            if splitmix(dice) % 4 < bias {
                change.apply(&mut names);
            }
        }
        names
    }
}

/// All files and directories as a log leaves them. A copy costs little: what did not change since
/// is shared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Media {
    /// A directory has a number among the files too, and there no bytes.
    files: Vec<Arc<Medium>>,
    directories: BTreeMap<usize, Catalog>,
}

impl Media {
    /// Files with these contents, and names for them.
    pub(crate) fn new(files: &[Vec<u8>], names: Names) -> Self {
        Self::of(files, Trees::from([(ROOT, names)]))
    }

    /// Files and directories, all of them durable.
    pub(crate) fn of(files: &[Vec<u8>], directories: Trees) -> Self {
        let catalogs = directories.into_iter();
        Self {
            files: files.iter().map(|b| Arc::new(Medium::new(b))).collect(),
            directories: catalogs.map(|(at, n)| (at, Catalog::new(n))).collect(),
        }
    }

    /// A directory with nothing in it.
    pub(crate) fn empty() -> Self {
        Self::new(&[], Names::new())
    }

    /// One directory with these files in it, all durable.
    pub(crate) fn with_files<N: Into<String>>(
        files: impl IntoIterator<Item = (N, Vec<u8>)>,
    ) -> Self {
        let (names, bytes): (Vec<String>, Vec<Vec<u8>>) =
            files.into_iter().map(|(n, b)| (n.into(), b)).unzip();
        Self::new(&bytes, names.into_iter().zip(0..).collect())
    }

    /// The same files in a directory of this name, which is the only one in the root.
    pub(crate) fn within(&self, name: &str) -> Self {
        let mut files = self.files();
        let node = files.len();
        files.push(Vec::new());
        let inner = self.trees().remove(&ROOT).unwrap_or_default();
        let root = Names::from([(name.to_owned(), node)]);
        Self::of(&files, Trees::from([(ROOT, root), (node, inner)]))
    }

    pub(crate) fn set_names(&mut self, names: Names) {
        self.directories.insert(ROOT, Catalog::new(names));
    }

    /// What a power cut now leaves: the files, and the names of the root.
    pub(crate) fn after_cut(&self, dice: &mut u64) -> (Vec<Vec<u8>>, Names) {
        let (files, mut directories) = self.left(dice);
        (files, directories.remove(&ROOT).unwrap_or_default())
    }

    /// The same with all directories, as what a new process finds.
    pub(crate) fn cut(&self, dice: &mut u64) -> Self {
        let (files, directories) = self.left(dice);
        Self::of(&files, directories)
    }

    fn left(&self, dice: &mut u64) -> (Vec<Vec<u8>>, Trees) {
        let directories = self.directories.iter();
        let directories = directories.map(|(at, names)| (*at, names.after_cut(dice)));
        let directories = directories.collect();
        let files = self.files.iter().map(|medium| medium.after_cut(dice));
        (files.collect(), directories)
    }

    /// Takes one event in. True when it changed what a power cut could leave.
    pub(crate) fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::Changed { file, change } => self.file(*file).change(change),
            Event::Synced { file } => self.file(*file).sync(),
            // The host gives up what it could not write, and calls it clean.
            Event::SyncFailed { file } => self.file(*file).pending.clear(),
            Event::CacheDropped { file } => {
                let medium = self.file(*file);
                medium.cached = medium.uncached();
            }
            Event::Cut { files } => {
                for (medium, bytes) in self.files.iter_mut().zip(files) {
                    let closed = medium.closed.clone();
                    let mut new = Medium::new(bytes);
                    if bytes.get(MARK) != Some(&[0; 4]) {
                        new.closed = closed;
                    }
                    *medium = Arc::new(new);
                }
            }
            Event::Named { directory, change } => self.name(*directory, change),
            Event::NamesSynced { directory } => {
                let catalog = self.directories.entry(*directory).or_default();
                for change in catalog.pending.drain(..) {
                    change.apply(&mut catalog.durable);
                }
            }
            _ => return false,
        }
        true
    }

    fn file(&mut self, number: usize) -> &mut Medium {
        Arc::make_mut(&mut self.files[number])
    }

    fn name(&mut self, directory: usize, change: &NameChange) {
        if let NameChange::Create(_, node) | NameChange::Make(_, node) = change {
            assert_eq!(*node, self.files.len(), "numbers follow the log");
            self.files.push(Arc::new(Medium::new(&[])));
        }
        if let NameChange::Make(_, node) = change {
            self.directories.insert(*node, Catalog::default());
        }
        let catalog = self.directories.entry(directory).or_default();
        change.apply(&mut catalog.cached);
        catalog.pending.push(change.clone());
    }

    /// A file as the medium has it, with all that is still to be written there.
    pub(crate) fn uncached(&self, file: usize) -> Vec<u8> {
        self.files[file].uncached()
    }

    /// True when a file with these bytes has no mark, and no close has left or will leave them.
    pub(crate) fn is_wrongly_unmarked(&self, file: usize, bytes: &[u8]) -> bool {
        self.files[file].is_wrongly_unmarked(bytes)
    }

    /// What reads see of all files.
    pub(crate) fn files(&self) -> Vec<Vec<u8>> {
        self.files.iter().map(|file| file.cached.clone()).collect()
    }

    /// All directories as others see them.
    pub(crate) fn trees(&self) -> Trees {
        let all = self.directories.iter();
        all.map(|(at, names)| (*at, names.cached.clone())).collect()
    }

    /// What reads see of a file in the root.
    pub(crate) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let file = self.directories.get(&ROOT)?.cached.get(name)?;
        Some(&self.files[*file].cached)
    }

    /// The names in the root as others see them.
    pub(crate) fn names(&self) -> Vec<&str> {
        let root = self.directories.get(&ROOT);
        let names = root.into_iter().flat_map(|names| names.cached.keys());
        names.map(String::as_str).collect()
    }

    /// All files and directories below the root, by path; directories have no bytes.
    pub(crate) fn tree(&self) -> BTreeMap<String, Option<Vec<u8>>> {
        let mut tree = BTreeMap::new();
        let mut left = vec![(String::new(), ROOT)];
        while let Some((path, node)) = left.pop() {
            let Some(names) = self.directories.get(&node) else {
                tree.insert(path, Some(self.files[node].cached.clone()));
                continue;
            };
            for (name, node) in &names.cached {
                left.push((format!("{path}/{name}"), *node));
            }
            if node != ROOT {
                tree.insert(path, None);
            }
        }
        tree
    }
}
