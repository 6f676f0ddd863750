//! The files of the chains: each once, locked, of the kind that the descriptor says, and not in the
//! middle of a repair.

use super::{OpenedFile, OpenedImages, Plain};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::{Descriptor, ImageType};
use crate::format::guid::Guid;
use crate::format::header::{HEADER_LEN, Version};
use crate::journal;
use crate::storage::beside;
use crate::storage::file::FileStorage;
use crate::storage::host::Roots;
use crate::storage::lock::{self, Locked, Purpose};
use crate::storage::{FileId, Storage};
use crate::units::{FileOffset, len_u64};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Instant;

/// The files of a bundle that are open, so that views of snapshots share them.
#[derive(Debug, Default)]
pub(super) struct Registry {
    open: Mutex<HashMap<FileId, Entry>>,
}

#[derive(Debug)]
struct Entry {
    storage: Weak<FileStorage>,
    write: bool,
}

/// A file that is open and nothing more.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Number of its part.
    pub part: usize,
    /// The open file.
    pub file: File,
    /// Where it is.
    pub path: PathBuf,
    /// Its snapshot.
    pub guid: Option<Guid>,
    /// What it is said to be.
    pub kind: ImageType,
    /// Opened for writing.
    pub write: bool,
}

struct Met {
    part: usize,
    storage: Arc<FileStorage>,
    path: PathBuf,
    guid: Option<Guid>,
    kind: ImageType,
    write: bool,
    /// Another view of the bundle has it open and locked.
    shared: bool,
}

/// The files of one disk, base first within each part.
pub(super) struct Opening<'a> {
    no_lock: bool,
    /// Whoever opens it wants to end what a repair has begun.
    mending: bool,
    registry: &'a Registry,
    met: Vec<Met>,
    seen: HashSet<FileId>,
}

impl<'a> Opening<'a> {
    pub(super) fn new(no_lock: bool, mending: bool, registry: &'a Registry) -> Self {
        Self {
            no_lock,
            mending,
            registry,
            met: Vec::new(),
            seen: HashSet::new(),
        }
    }

    /// Adds the next file. Whatever names it has, it may be there only once: two levels in one file
    /// would write over each other.
    pub(super) fn add(&mut self, wanted: Wanted) -> Result<()> {
        let Wanted {
            part,
            file,
            path,
            guid,
            kind,
            write,
        } = wanted;
        let fresh = FileStorage::new(file).map_err(|e| e.in_file(&path))?;
        let id = fresh.file_id().unwrap_or(FileId {
            device: 0,
            inode: 0,
        });
        if !self.seen.insert(id) {
            let why = "the same file is used twice in the disk";
            let error = Error::why(ErrorKind::Descriptor, why).in_file(&path);
            return Err(error.fix("two levels in one file would write over each other: name two"));
        }
        let open = self.registry.open.lock();
        let (storage, shared) = match open.get(&id).and_then(|e| Some((e.storage.upgrade()?, e))) {
            Some((_, entry)) if entry.write || write => {
                let why = "the file is open for writing as the top of the disk";
                return Err(Error::why(ErrorKind::Descriptor, why).in_file(&path));
            }
            Some((storage, _)) => (storage, true),
            None => (Arc::new(fresh), false),
        };
        drop(open);
        self.met.push(Met {
            part,
            storage,
            path,
            guid,
            kind,
            write,
            shared,
        });
        Ok(())
    }

    /// Locks all, then looks at their first bytes. Returns the chains by part, and warnings.
    pub(super) fn finish(self, parts: usize) -> Result<(Vec<Vec<OpenedFile>>, Vec<String>)> {
        let mut warnings = Vec::new();
        let unlocked = self.lock()?;
        if unlocked {
            warnings.push(
                "the host's file system has no locks: nothing keeps other programs from writing"
                    .to_owned(),
            );
        }
        let mut chains: Vec<Vec<OpenedFile>> = Vec::new();
        chains.resize_with(parts, Vec::new);
        let write = self.met.iter().any(|met| met.write);
        if !self.mending {
            for met in &self.met {
                // Behind the locks: a repair that runs holds them.
                let found = look_for_repair(met.storage.file(), &met.path, write)?;
                warnings.extend(found);
            }
        }
        let mut open = self.registry.open.lock();
        open.retain(|_, entry| entry.storage.strong_count() > 0);
        for met in self.met {
            let Some(chain) = chains.get_mut(met.part) else {
                continue;
            };
            let plain = classify(&met, chain.first(), write, &mut warnings)?;
            if let Some(id) = met.storage.file_id() {
                let storage = Arc::downgrade(&met.storage);
                open.entry(id).or_insert(Entry {
                    storage,
                    write: met.write,
                });
            }
            let guid = met.guid.map(|guid| guid.to_string());
            chain.push(OpenedFile {
                path: met.path,
                storage: met.storage,
                plain,
                guid,
            });
        }
        Ok((chains, warnings))
    }

    /// True where the host has no locks.
    fn lock(&self) -> Result<bool> {
        let mut unlocked = false;
        if self.no_lock {
            return Ok(unlocked);
        }
        let deadline = Instant::now() + lock::PATIENCE;
        for met in self.met.iter().filter(|met| !met.shared) {
            let purpose = if met.write {
                Purpose::Write
            } else {
                Purpose::Read
            };
            match lock::image(met.storage.file(), &met.path, purpose, deadline)? {
                Locked::Yes => {}
                Locked::Unsupported if met.write => {
                    let why = "the host's file system has no locks, so nothing would keep another \
                               program from writing to the image too";
                    let error = Error::why(ErrorKind::Host, why).in_file(&met.path);
                    return Err(error.fix("to read only: `ploopfs mount -r`"));
                }
                Locked::Unsupported => unlocked = true,
            }
        }
        Ok(unlocked)
    }
}

/// Refuses to write beside the undo file of a repair, or of its undo, that was interrupted: the
/// image is half of one state and half of another, and whatever were written to it, the end of the
/// repair or undo might take it back. Who only reads is told.
pub(super) fn look_for_repair(file: &File, path: &Path, write: bool) -> Result<Option<String>> {
    let home = beside::home(file.as_fd(), path);
    let home = home.map_err(|e| Error::from(e).in_file(path))?;
    let (at, path) = (path, path.display());
    let Some(home) = home else {
        return Ok(write.then(|| {
            format!("{path}: where it lies cannot be told, nor whether a repair was interrupted")
        }));
    };
    let saved = home.with(journal::RUNNING);
    if saved.symlink_metadata().is_err() {
        return Ok(None);
    }
    let why = format!("a repair or an undo was interrupted: {}", saved.display());
    if write {
        let error = Error::why(ErrorKind::Corrupt, why).in_file(at);
        return Err(error.fix("repeat `ploopfs repair`, or `ploopfs repair --undo` with that file"));
    }
    Ok(Some(format!("{path}: {why}; what is read may be wrong")))
}

/// Refuses to write to a top whose file is, by another name, that of a snapshot beside the chain.
pub(super) fn refuse_shared_tops(
    roots: &Roots,
    descriptor: &Descriptor,
    images: &OpenedImages,
) -> Result<()> {
    for (part, opened) in descriptor.parts.iter().zip(&images.parts) {
        let Some(top) = opened.files.last() else {
            continue;
        };
        let others = part.images.iter().filter(|image| {
            let guid = Some(image.guid.to_string());
            opened.files.iter().all(|file| file.guid != guid)
        });
        for image in others {
            // What cannot be opened is not written to.
            let file = roots.named(&image.file, false).map(|named| named.file);
            let file = file.and_then(FileStorage::new);
            if file.is_ok_and(|file| file.file_id() == top.storage.file_id()) {
                let why = format!("the snapshot {} has the same file", image.guid);
                return Err(Error::why(ErrorKind::Descriptor, why)
                    .in_file(&top.path)
                    .fix(
                        "what is written to the top would change the snapshot; to read it: \
                          `ploopfs mount -r`",
                    ));
            }
        }
    }
    Ok(())
}

/// The first bytes of a file, as many as a header has, and its length.
fn head(storage: &FileStorage) -> Result<(Vec<u8>, u64)> {
    let len = storage.len()?.get();
    let wanted = usize::try_from(len).unwrap_or(usize::MAX).min(HEADER_LEN);
    let mut bytes = vec![0; wanted];
    storage.read_at(FileOffset::ZERO, &mut bytes)?;
    Ok((bytes, len))
}

/// Holds what the file is said to be against its magic. The magic wins, and a contradiction forbids
/// writing; without one a file is plain only if that was said, and only as a base.
fn classify(
    met: &Met,
    base: Option<&OpenedFile>,
    write: bool,
    warnings: &mut Vec<String>,
) -> Result<Plain> {
    let (bytes, len) = head(&met.storage).map_err(|e| e.in_file(&met.path))?;
    let has_magic = Version::of(&bytes).is_some();
    match (met.kind, has_magic) {
        (ImageType::Compressed, true) => Ok(Plain::No),
        (ImageType::Compressed, false) => Err(no_magic(met, &bytes, len)),
        (ImageType::Plain, false) if base.is_some() => {
            let why = "a plain image can only be the lowest of its chain";
            let error = Error::why(ErrorKind::Unsupported, why).in_file(&met.path);
            Err(error.fix("correct <Type> and <File> in the descriptor"))
        }
        (ImageType::Plain, false) => Ok(Plain::Yes),
        // ploop types every image of a disk with a plain base so, and means the base only.
        (ImageType::Plain, true) if base.is_some_and(|base| base.plain == Plain::Yes) => {
            Ok(Plain::No)
        }
        // Not even above it: what is copied up from a base that was misread would stay wrong.
        (ImageType::Plain, true) if write => {
            let why = "the image is said to be plain but starts with the magic of an expanding one";
            let error = Error::why(ErrorKind::Unsupported, why).in_file(&met.path);
            Err(error.fix("to read it by its magic: `ploopfs mount -r`; nothing was changed"))
        }
        (ImageType::Plain, true) => {
            warnings.push(format!(
                "{} is said to be plain; read by its magic as an expanding image",
                met.path.display()
            ));
            Ok(Plain::No)
        }
    }
}

fn no_magic(met: &Met, bytes: &[u8], len: u64) -> Error {
    if len < len_u64(HEADER_LEN) {
        let why = format!("the file has {len} bytes, fewer than the 64 of a header");
        let error = Error::why(ErrorKind::Truncated, why).in_file(&met.path);
        return error.fix("the file was cut: take it from a copy");
    }
    let start: String = bytes
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let what = match bytes {
        [b'<', b'?', b'x', b'm', b'l', ..] => " (XML)",
        [b'Q', b'F', b'I', 0xfb, ..] => " (qcow2)",
        [b'K', b'D', b'M', b'V', ..] => " (VMDK)",
        _ => "",
    };
    let why = format!("it starts with {start}{what}, which is neither magic of the format");
    let error = Error::why(ErrorKind::NotAnImage, why).in_file(&met.path);
    match met.guid {
        None => error.fix("if it is a plain (raw) disk, say --format raw"),
        Some(_) => error.fix("the descriptor says that it is an expanding image (Compressed)"),
    }
}
