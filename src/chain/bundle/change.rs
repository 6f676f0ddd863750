//! A bundle that will be changed, or copied as a whole: locked, and its files one by one.

use super::claim::{Held, Use};
use super::files::look_for_repair;
use super::find::{self, Found};
use super::{OpenedImages, select, told, with_hint};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::{Descriptor, Image};
use crate::format::guid::Guid;
use crate::format::{names, xml};
use crate::storage::directory::HostDirectory;
use crate::storage::file::FileStorage;
use crate::storage::host::Roots;
use crate::storage::lock::{self, Locked, Purpose};
use crate::storage::{Directory, SharedStorage, Storage};
use parking_lot::Mutex;
use std::collections::HashMap;
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
    purpose: Use,
    held: Option<Held>,
}

impl Changing {
    /// Finds the bundle that the user means, and keeps other programs from changing it.
    pub fn open(image: &Path, allow_outside: &[PathBuf]) -> Result<Self> {
        Self::lock(image, allow_outside, Use::Change)?.ok_or_else(|| {
            let why = "only a bundle has snapshots, and this is a single image";
            Error::why(ErrorKind::Unsupported, why).in_file(image)
        })
    }

    /// The same for reading: nobody changes it meanwhile, and others may read it too. `None` for a
    /// single image.
    pub fn hold_still(image: &Path) -> Result<Option<Self>> {
        Self::lock(image, &[], Use::Still)
    }

    fn lock(image: &Path, allow_outside: &[PathBuf], purpose: Use) -> Result<Option<Self>> {
        let Found::Bundle {
            directory,
            descriptor,
            naming,
        } = find::find(image)?
        else {
            return Ok(None);
        };
        let roots = find::open_roots(&directory, naming, allow_outside)?;
        let held = Held::take(&roots, &descriptor, purpose, &mut Vec::new())?;
        let directory = HostDirectory::behind(roots.home(), roots.path())?;
        Ok(Some(Self {
            roots,
            directory,
            descriptor,
            opened: Mutex::new(HashMap::new()),
            purpose,
            held,
        }))
    }

    /// To be called before the first change: keeps ploop out, which leaves a trace.
    pub fn claim(&self) -> Result<()> {
        self.held.as_ref().map_or(Ok(()), Held::claim)
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

    /// Those names that this program keeps, for writing them again. What is not understood is not
    /// for this program to replace.
    pub fn own_names(&self) -> Result<HashMap<Guid, String>> {
        let name = format!("{}{}", self.descriptor, names::OWN_END);
        let path = self.roots.path().join(&name);
        let read = || -> Result<HashMap<Guid, String>> {
            if let Err(error) = self.directory.open(&name, false) {
                return match error.kind() {
                    ErrorKind::Missing => Ok(HashMap::new()),
                    _ => Err(error),
                };
            }
            let bytes = self.roots.read(&name, xml::BYTES_MAX)?;
            names::parse_own_whole(&bytes).ok_or_else(|| {
                let why = "the file of the snapshots' names is not as this program writes it";
                Error::why(ErrorKind::Unsupported, why)
            })
        };
        read().map_err(|e| {
            e.in_file(&path).fix(
                "nothing was changed; move it away to begin with new names: GUIDs say the same",
            )
        })
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

    /// Opens and locks an image, which nobody else may use; or change, where nothing is changed.
    pub fn image(&self, image: &Image) -> Result<SharedStorage> {
        let mut opened = self.opened.lock();
        if let Some(storage) = opened.get(&image.file) {
            return Ok(Arc::clone(storage));
        }
        let write = self.purpose == Use::Change;
        let found = self.roots.named(&image.file, write);
        let found = found.map_err(|e| with_hint(e, write).in_file(&self.path_of(image)))?;
        let file = FileStorage::new(found.file).map_err(|e| e.in_file(&found.path))?;
        let id = file.file_id();
        if opened.values().any(|other| other.file_id() == id) {
            let why = "the same file is used twice in the disk";
            return Err(Error::why(ErrorKind::Descriptor, why).in_file(&found.path));
        }
        let deadline = Instant::now() + lock::PATIENCE;
        let purpose = if write { Purpose::Write } else { Purpose::Read };
        match lock::image(file.file(), &found.path, purpose, deadline)? {
            Locked::Yes => {}
            Locked::Unsupported if !write => {}
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

    /// To be called before the first change of a disk that is open for writing: keeps ploop out of
    /// its bundle, which leaves a trace.
    pub fn claim(&self) -> Result<()> {
        let held = self.bundle.as_ref().and_then(|bundle| bundle.held.as_ref());
        held.map_or(Ok(()), Held::claim)
    }
}
