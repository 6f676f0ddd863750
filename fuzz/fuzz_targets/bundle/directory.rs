//! The private directory of a run: the bundle, and what lies outside and is nobody's business.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Files up to this length are compared by content.
const WHOLE_MAX: u64 = 1 << 20;
/// What the files outside hold.
pub(crate) const SECRET: &[u8] = b"Nobody may read this through a disk. ";

/// Where a run takes place. Gone when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    root: PathBuf,
    /// The bundle's directory.
    pub(crate) bundle: PathBuf,
    /// A directory beside it.
    pub(crate) outside: PathBuf,
}

impl Place {
    /// Fresh directories, the one outside with a file.
    pub(crate) fn new() -> Self {
        let base = match Path::new("/dev/shm") {
            memory if std::env::var_os("TMPDIR").is_none() && memory.is_dir() => memory.to_owned(),
            _ => std::env::temp_dir(),
        };
        let root = base.join(format!("ploopfs-fuzz.{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let place = Self {
            bundle: root.join("disk.hdd"),
            outside: root.join("outside"),
            root,
        };
        fs::create_dir_all(&place.bundle).expect("a directory");
        fs::create_dir(&place.outside).expect("a directory");
        fs::write(place.outside.join("secret"), SECRET.repeat(2000)).expect("a file");
        place
    }

    /// Device and inode of all files that may be opened.
    pub(crate) fn files(&self, outside_too: bool) -> HashSet<(u64, u64)> {
        let mut found = HashSet::new();
        let dirs = [&self.bundle]
            .into_iter()
            .chain(outside_too.then_some(&self.outside));
        let mut pending: Vec<PathBuf> = dirs.cloned().collect();
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).expect("a directory").flatten() {
                let meta = entry.path().symlink_metadata().expect("an entry");
                if meta.is_dir() {
                    pending.push(entry.path());
                } else if meta.is_file() {
                    found.insert((meta.dev(), meta.ino()));
                }
            }
        }
        found
    }

    /// True when a path leads to the same file as one of the others, whatever its name.
    pub(crate) fn is_one_of(&self, path: &Path, others: &[PathBuf]) -> bool {
        let id = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        id(path).is_some_and(|own| others.iter().any(|other| id(other) == Some(own)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// What is in both directories.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tree(BTreeMap<PathBuf, Item>);

#[derive(Debug, PartialEq, Eq)]
struct Item {
    mode: u32,
    len: u64,
    blocks: u64,
    content: Vec<u8>,
}

impl Tree {
    /// As it is now. Links are not followed.
    pub(crate) fn of(place: &Place) -> Self {
        let mut items = BTreeMap::new();
        let mut pending = vec![place.root.clone()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).expect("a directory").flatten() {
                let path = entry.path();
                let meta = path.symlink_metadata().expect("an entry");
                let is_small = meta.is_file() && meta.len() <= WHOLE_MAX;
                let item = Item {
                    mode: meta.mode(),
                    len: if meta.is_file() { meta.len() } else { 0 },
                    blocks: if is_small || !meta.is_file() {
                        0
                    } else {
                        meta.blocks()
                    },
                    content: if is_small {
                        fs::read(&path).expect("a file")
                    } else {
                        Vec::new()
                    },
                };
                if meta.is_dir() {
                    pending.push(path.clone());
                }
                items.insert(path, item);
            }
        }
        Self(items)
    }

    /// The paths that are not the same in both.
    pub(crate) fn differences(&self, other: &Self) -> Vec<PathBuf> {
        let all = self.0.keys().chain(other.0.keys());
        let mut different: Vec<PathBuf> = all
            .filter(|path| self.0.get(*path) != other.0.get(*path))
            .cloned()
            .collect();
        different.dedup();
        different
    }
}
