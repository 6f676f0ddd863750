//! A bundle that will be changed: locked against everybody else, its files one by one.

use super::files::look_for_repair;
use super::find::{self, Found};
use super::{OpenedImages, Selection, select, told, with_hint};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::{Descriptor, Image};
use crate::format::guid::Guid;
use crate::format::{names, xml};
use crate::storage::directory::HostDirectory;
use crate::storage::file::FileStorage;
use crate::storage::host::Roots;
use crate::storage::lock::{self, Locked, Purpose};
use crate::storage::{Directory, SharedStorage, Storage};
use crate::sys::open;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// A locked bundle.
#[derive(Debug)]
pub struct Changing {
    roots: Roots,
    directory: HostDirectory,
    descriptor: String,
    opened: Mutex<HashMap<String, SharedStorage>>,
    _lock: Option<File>,
}

impl Changing {
    /// Finds the bundle that the user means, and keeps other programs from changing it.
    pub fn open(image: &Path, allow_outside: &[PathBuf]) -> Result<Self> {
        let Found::Bundle {
            directory,
            descriptor,
            naming,
        } = find::find(image)?
        else {
            let why = "only a bundle has snapshots, and this is a single image";
            return Err(Error::why(ErrorKind::Unsupported, why).in_file(image));
        };
        let roots = find::open_roots(&directory, naming, allow_outside)?;
        let selection = Selection {
            write: true,
            ..Selection::default()
        };
        let lock = lock_bundle(&roots, &descriptor, &selection, &mut Vec::new())?;
        let directory = HostDirectory::behind(roots.home(), roots.path())?;
        Ok(Self {
            roots,
            directory,
            descriptor,
            opened: Mutex::new(HashMap::new()),
            _lock: lock,
        })
    }

    /// The bundle's directory.
    #[must_use]
    pub fn directory(&self) -> &HostDirectory {
        &self.directory
    }

    /// The descriptor's name in it.
    #[must_use]
    pub fn descriptor(&self) -> &str {
        &self.descriptor
    }

    /// Where an image is, for people.
    #[must_use]
    pub fn path_of(&self, image: &Image) -> PathBuf {
        self.roots.path().join(&image.file)
    }

    /// What people called the snapshots.
    #[must_use]
    pub fn names(&self) -> HashMap<Guid, String> {
        find::snapshot_names(self.roots.path(), &self.descriptor)
    }

    /// Those names that this program keeps.
    #[must_use]
    pub fn own_names(&self) -> HashMap<Guid, String> {
        let name = format!("{}{}", self.descriptor, names::OWN_END);
        let bytes = self.roots.read(&name, xml::BYTES_MAX);
        bytes
            .map(|bytes| names::parse_own(&bytes))
            .unwrap_or_default()
    }

    /// The snapshot that a word means: GUID, name or `latest`.
    pub fn select(&self, descriptor: &Descriptor, word: &str) -> Result<Guid> {
        select(descriptor, &self.names(), Some(word))
    }

    /// What is odd about the bundle, for people.
    #[must_use]
    pub fn told(&self, descriptor: &Descriptor) -> Vec<String> {
        told(self.roots.path(), &self.descriptor, descriptor)
    }

    /// Opens and locks an image, which nobody else may use.
    pub fn image(&self, image: &Image) -> Result<SharedStorage> {
        let mut opened = self.opened.lock();
        if let Some(storage) = opened.get(&image.file) {
            return Ok(Arc::clone(storage));
        }
        let found = self.roots.named(&image.file, true);
        let found = found.map_err(|e| with_hint(e, true).in_file(&self.path_of(image)))?;
        let file = FileStorage::new(found.file).map_err(|e| e.in_file(&found.path))?;
        let id = file.file_id();
        if opened.values().any(|other| other.file_id() == id) {
            let why = "the same file is used twice in the disk";
            return Err(Error::why(ErrorKind::Descriptor, why).in_file(&found.path));
        }
        let deadline = Instant::now() + lock::PATIENCE;
        match lock::image(file.file(), &found.path, Purpose::Write, deadline)? {
            Locked::Yes => {}
            Locked::Unsupported => {
                let why = "the host's file system has no locks, so nothing would keep another \
                           program from using the image";
                return Err(Error::why(ErrorKind::Host, why).in_file(&found.path));
            }
        }
        look_for_repair(file.file(), &found.path, true)?;
        let storage: SharedStorage = Arc::new(file);
        opened.insert(image.file.clone(), Arc::clone(&storage));
        Ok(storage)
    }

    /// The name that an opened image has directly in the bundle's directory, if it is there.
    #[must_use]
    pub fn own_name(&self, image: &Image) -> Option<String> {
        let id = self.opened.lock().get(&image.file)?.file_id()?;
        let name = Path::new(&image.file).file_name()?.to_str()?;
        let there = self.directory.open(name, false).ok()?;
        (there.file_id() == Some(id)).then(|| name.to_owned())
    }
}

impl OpenedImages {
    /// The directory of a bundle that is open, and the name of the descriptor in it.
    pub fn home(&self) -> Result<Option<(HostDirectory, &str)>> {
        let Some(bundle) = &self.bundle else {
            return Ok(None);
        };
        let directory = HostDirectory::behind(bundle.roots.home(), bundle.roots.path())?;
        Ok(Some((directory, &bundle.name)))
    }
}

/// Takes ploop's lock, shared for reading. Reading makes no file and does not insist.
pub(super) fn lock_bundle(
    roots: &Roots,
    descriptor_name: &str,
    selection: &Selection,
    warnings: &mut Vec<String>,
) -> Result<Option<File>> {
    if selection.no_lock {
        return Ok(None);
    }
    let name = format!("{descriptor_name}.lck");
    let path = roots.path().join(&name);
    let file = match open::lock_file(roots.home(), Path::new(&name), selection.write) {
        Ok(file) => file,
        Err(_) if !selection.write => return Ok(None),
        Err(e) => return Err(no_lock_file(e, &path)),
    };
    let deadline = Instant::now() + lock::PATIENCE;
    match lock::bundle(&file, selection.write, deadline) {
        Ok(true) => Ok(Some(file)),
        Ok(false) if selection.write => Err(lock::bundle_refusal(&file, &path)),
        Ok(false) => {
            warnings.push("another program is working on the bundle".to_owned());
            Ok(None)
        }
        Err(_) if !selection.write => Ok(None),
        Err(e) => Err(e.in_file(&path)),
    }
}

fn no_lock_file(error: std::io::Error, path: &Path) -> Error {
    let kind = match error.raw_os_error() {
        // A link, or what `lock_file` has found to be no plain file.
        Some(libc::ELOOP | libc::ENXIO | libc::ENODEV | libc::EISDIR) | None => {
            let why = "ploop's lock file is not a plain file, so it was not made by ploop";
            let error = Error::why(ErrorKind::OutsideBundle, why).in_file(path);
            return error.fix("see what it is, and remove it");
        }
        Some(errno) => ErrorKind::Io(errno),
    };
    let why = "cannot take ploop's lock on the bundle";
    with_hint(Error::why(kind, why).because(error).in_file(path), true)
}
