//! From what the user named to open, locked files.
//!
//! 1. Find out what IMAGE is: a bare image, or a bundle's descriptor (`find`).
//! 2. Lock the bundle (`claim`), then read the descriptor: another order could read what an
//!    operation of ploop is about to replace.
//! 3. Open every file of the chosen chain in every part, the top last; refuse a file met twice,
//!    lock all, and only then look at the first bytes of each, and whether the undo file of an
//!    interrupted repair lies beside it (`files`).
//!
//! Lower deltas are never opened for writing. Everything stays locked as long as its storage lives,
//! the bundle as long as the [`OpenedImages`] or any clone of its [`BundleLock`].

mod change;
mod claim;
mod files;
mod find;
mod loose;
mod others;
mod survey;
mod unfinished;

pub use change::Changing;
pub use claim::NEW_LOCK;
pub use find::{Going, going, role_in_bundle, subject};
pub use loose::open_loose;
pub use others::{OtherDescriptor, other_descriptors};
pub use survey::{Survey, SurveyedFile, SurveyedPart};
pub use unfinished::{FLAT, unfinished, unfinished_name};

use crate::chain::bundle::claim::{Held, Use};
use crate::chain::bundle::files::{Opening, Registry, Wanted};
use crate::chain::bundle::find::{Found, Naming};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::{
    Descriptor, DescriptorError, Encryption, ImageType, Oddity, Part, Shot,
};
use crate::format::guid::Guid;
use crate::format::xml;
use crate::storage::SharedStorage;
use crate::storage::host::Roots;
use crate::sys::open as sys;
use crate::units::SectorCount;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the descriptor in a bundle.
pub const DESCRIPTOR: &str = "DiskDescriptor.xml";
/// What the list of files that come and go with a change is named, behind the descriptor's name.
pub const PENDING: &str = ".pending";
/// The word that selects the newest frozen snapshot.
pub const LATEST: &str = "latest";

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// GUID, name or `latest`; none for the top.
    pub snapshot: Option<String>,
    /// Deltas named by hand, base first; the top is the image itself.
    pub lower: Vec<PathBuf>,
    /// `--format raw`: a missing magic means a plain image.
    pub raw: bool,
    /// Open the top for writing.
    pub write: bool,
    /// Where the descriptor and the top's header differ about the size of the disk, the header is
    /// right.
    pub trust_header: bool,
    /// Take no locks (`info` only).
    pub no_lock: bool,
    /// Directories outside the bundle that a descriptor may name files in.
    pub allow_outside: Vec<PathBuf>,
    /// A repair or its undo that was interrupted is to be ended, so what it has left is no reason
    /// not to open the image (`repair` only).
    pub mending: bool,
}

/// All files of the disk, opened and locked.
#[derive(Debug)]
pub struct OpenedImages {
    /// The path as the user named it.
    pub named: PathBuf,
    /// Parts in disk order; one where the disk is not split.
    pub parts: Vec<OpenedPart>,
    /// Frozen snapshots of the bundle, oldest first; empty for a bare image.
    pub snapshots: Vec<SnapshotInfo>,
    /// The GUID that is open, as `{...}`, where the image is a bundle.
    pub selected: Option<String>,
    /// `Disk_size` of the descriptor, where the image is a bundle.
    pub disk_size: Option<SectorCount>,
    /// Things to tell the user.
    pub warnings: Vec<String>,
    bundle: Option<Arc<Bundle>>,
}

/// A frozen snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SnapshotInfo {
    /// `{...}`, lower case.
    pub guid: String,
    /// The snapshot below it.
    pub parent: Option<String>,
    /// What people called it, where known.
    pub name: Option<String>,
}

/// A part of the disk with its chain.
#[derive(Debug)]
pub struct OpenedPart {
    /// First sector of the disk in this part.
    pub start: SectorCount,
    /// One past the last sector, where a descriptor says so.
    pub end: Option<SectorCount>,
    /// `Blocksize` of the descriptor, sectors.
    pub blocksize: Option<u32>,
    /// Base first, top last.
    pub files: Vec<OpenedFile>,
}

/// An open file of a chain.
#[derive(Clone, Debug)]
pub struct OpenedFile {
    /// Where it is, as it is shown to people.
    pub path: PathBuf,
    /// The open file; its locks end when the last clone is dropped.
    pub storage: SharedStorage,
    /// Whether it is a plain image.
    pub plain: Plain,
    /// The snapshot that it belongs to, as `{...}`, where the image is a bundle.
    pub guid: Option<String>,
}

/// Whether a file is a plain (raw) image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plain {
    /// It starts with the format's magic.
    No,
    /// The descriptor or the user says that it is raw, and no magic contradicts that.
    Yes,
}

/// Keeps a bundle locked against ploop while any clone lives.
#[derive(Clone, Debug)]
pub struct BundleLock {
    _bundle: Option<Arc<Bundle>>,
}

/// What stays open of a bundle.
#[derive(Debug)]
struct Bundle {
    roots: Roots,
    /// Name of the descriptor.
    name: String,
    descriptor: Descriptor,
    names: HashMap<Guid, String>,
    files: Registry,
    no_lock: bool,
    mending: bool,
    trust_header: bool,
    held: Option<Held>,
}

/// Opens and locks.
pub fn open(image: &Path, selection: &Selection) -> Result<OpenedImages> {
    if let Err(e) = sys::raise_file_limit() {
        log::debug!("the limit of open files stays as it is: {e}");
    }
    match find::find(image)? {
        Found::Image(path, naming) => open_by_hand(image, &path, naming, selection),
        Found::Bundle {
            directory,
            descriptor,
            naming,
        } => {
            refuse_image_options(image, selection)?;
            let roots = find::open_roots(&directory, naming, &selection.allow_outside)?;
            open_bundle(image, roots, &descriptor, selection)
        }
    }
}

/// A bare image, or deltas named by hand.
fn open_by_hand(
    named: &Path,
    top: &Path,
    naming: Naming,
    selection: &Selection,
) -> Result<OpenedImages> {
    if let Some(snapshot) = &selection.snapshot {
        return Err(find::no_snapshots(named, snapshot));
    }
    let warning = match selection.lower.as_slice() {
        [] => find::check_membership(top, selection)?,
        _ => None,
    };
    let registry = Registry::default();
    let mut opening = Opening::new(selection.no_lock, selection.mending, &registry);
    let paths = selection.lower.iter().map(PathBuf::as_path).chain([top]);
    for (level, path) in paths.enumerate() {
        let is_top = level == selection.lower.len();
        let write = selection.write && is_top;
        let naming = if is_top { naming } else { Naming::User };
        opening.add(Wanted {
            part: 0,
            file: find::open_image(path, naming, write).map_err(|e| with_hint(e, write))?,
            path: path.to_owned(),
            guid: None,
            kind: if selection.raw && level == 0 {
                ImageType::Plain
            } else {
                ImageType::Compressed
            },
            write,
        })?;
    }
    let (mut chains, mut warnings) = opening.finish(1)?;
    warnings.extend(warning);
    let files = chains.pop().unwrap_or_default();
    let part = OpenedPart {
        start: SectorCount::ZERO,
        end: None,
        blocksize: None,
        files,
    };
    Ok(OpenedImages {
        named: named.to_owned(),
        parts: vec![part],
        snapshots: Vec::new(),
        selected: None,
        disk_size: None,
        warnings,
        bundle: None,
    })
}

fn refuse_image_options(named: &Path, selection: &Selection) -> Result<()> {
    for (given, option) in [
        (!selection.lower.is_empty(), "--lower"),
        (selection.raw, "--format"),
    ] {
        if given {
            let why = format!("{option} is for single images; a descriptor says this itself");
            return Err(Error::why(ErrorKind::Usage, why).in_file(named));
        }
    }
    Ok(())
}

fn open_bundle(
    named: &Path,
    roots: Roots,
    descriptor_name: &str,
    selection: &Selection,
) -> Result<OpenedImages> {
    let directory = roots.path().to_owned();
    let mut warnings = Vec::new();
    let purpose = if selection.write {
        Use::Change
    } else {
        Use::Reading
    };
    let lock = if selection.no_lock {
        None
    } else {
        Held::take(&roots, descriptor_name, purpose, &mut warnings)?
    };
    let path = directory.join(descriptor_name);
    let descriptor = read_descriptor(&roots, descriptor_name)?;
    let names = find::snapshot_names(&directory, descriptor_name);
    let target =
        select(&descriptor, &names, selection.snapshot.as_deref()).map_err(|e| e.in_file(&path))?;
    refuse_going(&descriptor, target).map_err(|e| e.in_file(&path))?;
    if selection.write || selection.mending {
        check_writable(&descriptor, target, selection.mending).map_err(|e| e.in_file(&path))?;
    }
    warnings.extend(told(&directory, descriptor_name, &descriptor));
    warnings.extend(encryption_text(&descriptor).map(|how| {
        format!("the disk is encrypted ({how}); its contents are passed on as they are stored")
    }));
    // A reader needs the lock no longer than its files take to open: then their own locks hold, and
    // reading a frozen snapshot must not keep others from using the top.
    let (kept, passing) = if selection.write {
        (lock, None)
    } else {
        (None, lock)
    };
    let bundle = Arc::new(Bundle {
        roots,
        name: descriptor_name.to_owned(),
        descriptor,
        names,
        files: Registry::default(),
        no_lock: selection.no_lock,
        mending: selection.mending,
        trust_header: selection.trust_header,
        held: kept,
    });
    let mut images = open_chain(&bundle, target, selection.write)?;
    if selection.write || selection.mending {
        files::refuse_shared_tops(&bundle.roots, &bundle.descriptor, &images)?;
    }
    drop(passing);
    named.clone_into(&mut images.named);
    warnings.append(&mut images.warnings);
    images.warnings = warnings;
    Ok(images)
}

/// What is odd about a bundle, for people.
fn told(directory: &Path, descriptor_name: &str, descriptor: &Descriptor) -> Vec<String> {
    // What goes away is told in other words, where there is something to be done about it.
    let going =
        |oddity: &&Oddity| matches!(oddity, Oddity::Temporary(guid) if *guid != descriptor.top);
    let oddities = descriptor.oddities.iter().filter(|oddity| !going(oddity));
    let mut told = find::few(oddities.map(ToString::to_string).collect());
    let going = find::going(directory, descriptor_name, descriptor).into_iter();
    let undone = going.filter(|going| !going.waits).map(|going| going.text);
    told.extend(find::few(undone.collect()));
    told.extend(find::few(find::leftovers(
        directory,
        descriptor_name,
        descriptor,
    )));
    told
}

/// What can be done where the host refuses to open a file.
fn with_hint(error: Error, write: bool) -> Error {
    match error.kind() {
        ErrorKind::Io(libc::EROFS) if write => error.fix("to read only: `ploopfs mount -r`"),
        ErrorKind::Io(libc::EACCES | libc::EPERM) if write => {
            error.fix("writing takes the owner or root; if you may read it: `ploopfs mount -r`")
        }
        ErrorKind::Io(libc::EACCES | libc::EPERM) => {
            error.fix("reading takes the permission of its owner, on it and on its directories")
        }
        ErrorKind::Io(libc::EMFILE | libc::ENFILE) => {
            error.fix("the disk has more files than may be open: raise the limit (ulimit -n)")
        }
        _ => error,
    }
}

fn read_descriptor(roots: &Roots, name: &str) -> Result<Descriptor> {
    let path = roots.path().join(name);
    let bytes = roots.read(name, xml::BYTES_MAX)?;
    Descriptor::parse(&bytes).map_err(|e| descriptor_error(e).in_file(&path))
}

fn descriptor_error(error: DescriptorError) -> Error {
    let (kind, fix) = match error {
        DescriptorError::NoSuchShot(_) => (
            ErrorKind::NoSuchSnapshot,
            "`ploopfs info` lists the snapshots",
        ),
        DescriptorError::ParentVolume { .. } => (
            ErrorKind::Unsupported,
            "such a linked clone cannot be read without that volume",
        ),
        _ => (
            ErrorKind::Descriptor,
            "correct the descriptor, or take it from a copy; a single image can be named by itself",
        ),
    };
    Error::new(kind).because(error).fix(fix)
}

fn encryption_text(descriptor: &Descriptor) -> Option<String> {
    Some(match descriptor.encryption.as_ref()? {
        Encryption::Key(key) => format!("key {key:?}"),
        Encryption::Engine(engine) => format!("engine {engine}"),
    })
}

/// Refuses a snapshot that is being deleted: it may be half of one state and half of another.
fn refuse_going(descriptor: &Descriptor, target: Guid) -> Result<()> {
    let mut shots = descriptor.snapshots.iter();
    if target == descriptor.top || !shots.any(|shot| shot.guid == target && shot.temporary) {
        return Ok(());
    }
    let why = format!("the snapshot {target} is being deleted");
    Err(Error::why(ErrorKind::NoSuchSnapshot, why)
        .fix("`ploopfs snapshot delete` with its name goes on with that"))
}

/// The snapshot that a word means.
fn select(
    descriptor: &Descriptor,
    names: &HashMap<Guid, String>,
    word: Option<&str>,
) -> Result<Guid> {
    let Some(word) = word else {
        return Ok(descriptor.top);
    };
    let exists = |guid: &Guid| descriptor.snapshots.iter().any(|shot| shot.guid == *guid);
    if word == LATEST {
        let top = descriptor
            .snapshots
            .iter()
            .find(|shot| shot.guid == descriptor.top);
        return top
            .and_then(|shot| shot.parent)
            .filter(exists)
            .ok_or_else(|| {
                Error::why(
                    ErrorKind::NoSuchSnapshot,
                    "the disk has no snapshot below its top",
                )
            });
    }
    if let Some(guid) = Guid::parse(word).filter(exists) {
        return Ok(guid);
    }
    let mut called = descriptor
        .snapshots
        .iter()
        .map(|shot| shot.guid)
        .filter(|guid| names.get(guid).is_some_and(|name| name == word));
    match (called.next(), called.next()) {
        (Some(guid), None) => Ok(guid),
        (Some(one), Some(two)) => {
            let why = format!("{word:?} names {one}, {two} and perhaps more");
            Err(Error::why(ErrorKind::NoSuchSnapshot, why).fix("name the GUID instead"))
        }
        (None, _) => {
            let list: Vec<String> = descriptor
                .frozen()
                .iter()
                .map(|shot| match names.get(&shot.guid) {
                    Some(name) => format!("{} {name:?}", shot.guid),
                    None => shot.guid.to_string(),
                })
                .collect();
            let fix = match list.len() {
                0 => "the disk has no snapshots".to_owned(),
                1..=20 => format!("there are: {}", list.join(", ")),
                n => format!("there are {n}; `ploopfs info` lists them"),
            };
            Err(Error::why(ErrorKind::NoSuchSnapshot, format!("{word:?}")).fix(fix))
        }
    }
}

fn check_writable(descriptor: &Descriptor, target: Guid, mending: bool) -> Result<()> {
    if target != descriptor.top {
        let why = format!("the snapshot {target} is frozen: only the top can be written to");
        return Err(Error::why(ErrorKind::ReadOnly, why).fix("to read it: `ploopfs mount -r`"));
    }
    match descriptor
        .oddities
        .iter()
        .find(|oddity| oddity.forbids_writing())
    {
        Some(oddity) => {
            let error = Error::why(ErrorKind::Unsupported, oddity.to_string());
            Err(error.fix(if mending {
                "correct the descriptor first"
            } else {
                "to read it: `ploopfs mount -r`"
            }))
        }
        None => Ok(()),
    }
}

/// Opens the chain of a snapshot in every part.
fn open_chain(bundle: &Arc<Bundle>, target: Guid, write: bool) -> Result<OpenedImages> {
    let Bundle {
        roots, descriptor, ..
    } = bundle.as_ref();
    let chain = descriptor.chain(target).map_err(descriptor_error)?;
    let mut opening = Opening::new(bundle.no_lock, bundle.mending, &bundle.files);
    let mut moved = 0;
    for part in 0..descriptor.parts.len() {
        let images = descriptor.images(part, &chain).map_err(descriptor_error)?;
        for image in &images {
            let write = write && image.guid == target;
            let found = roots
                .named(&image.file, write)
                .map_err(|e| match e.kind() {
                    ErrorKind::Missing => {
                        let why = format!("the image of snapshot {}", image.guid);
                        let error = Error::why(ErrorKind::Missing, why);
                        error
                            .in_file(&roots.path().join(&image.file))
                            .fix("put the file back where the descriptor names it")
                    }
                    _ => with_hint(e, write),
                })?;
            moved += u32::from(found.moved);
            opening.add(Wanted {
                part,
                file: found.file,
                path: found.path,
                guid: Some(image.guid),
                kind: image.kind,
                write,
            })?;
        }
    }
    let (chains, mut warnings) = opening.finish(descriptor.parts.len())?;
    if moved > 0 {
        warnings
            .push("the bundle was moved; its files were found beside the descriptor".to_owned());
    }
    // The bounds of an only part that does not cover the disk mean nothing.
    let whole = |part: &&Part| {
        let covers = part.start == SectorCount::ZERO && part.end == descriptor.disk_size;
        descriptor.parts.len() > 1 || (covers && !bundle.trust_header)
    };
    let parts = descriptor
        .parts
        .iter()
        .zip(chains)
        .map(|(part, files)| OpenedPart {
            start: Some(part)
                .filter(whole)
                .map_or(SectorCount::ZERO, |part| part.start),
            end: Some(part).filter(whole).map(|part| part.end),
            blocksize: part.blocksize,
            files,
        });
    Ok(OpenedImages {
        named: roots.path().to_owned(),
        parts: parts.collect(),
        snapshots: snapshot_infos(descriptor, &bundle.names),
        selected: Some(target.to_string()),
        disk_size: Some(descriptor.disk_size),
        warnings,
        bundle: Some(Arc::clone(bundle)),
    })
}

fn snapshot_infos(descriptor: &Descriptor, names: &HashMap<Guid, String>) -> Vec<SnapshotInfo> {
    let info = |shot: &Shot| SnapshotInfo {
        guid: shot.guid.to_string(),
        parent: shot.parent.map(|parent| parent.to_string()),
        name: names.get(&shot.guid).cloned(),
    };
    descriptor.frozen().into_iter().map(info).collect()
}

impl OpenedImages {
    /// A disk over storages that the caller has, whatever they are; nothing is locked.
    #[must_use]
    pub fn from_parts(named: PathBuf, parts: Vec<OpenedPart>) -> Self {
        Self {
            named,
            parts,
            snapshots: Vec::new(),
            selected: None,
            disk_size: None,
            warnings: Vec::new(),
            bundle: None,
        }
    }

    /// The same disk as of a snapshot (GUID, name or `latest`), read-only, sharing the files that
    /// are open already as long as their storages live; the others are opened and locked.
    pub fn open_snapshot(&self, snapshot: &str) -> Result<OpenedImages> {
        let Some(bundle) = &self.bundle else {
            let why = "only a bundle has snapshots, and this is a single image";
            return Err(Error::why(ErrorKind::NoSuchSnapshot, why).in_file(&self.named));
        };
        let target = select(&bundle.descriptor, &bundle.names, Some(snapshot))?;
        refuse_going(&bundle.descriptor, target)?;
        let mut images = open_chain(bundle, target, false)?;
        images.named.clone_from(&self.named);
        Ok(images)
    }

    /// GUID of the snapshot that `latest` means: the newest frozen state that the top stands on.
    #[must_use]
    pub fn latest(&self) -> Option<String> {
        let bundle = self.bundle.as_ref()?;
        select(&bundle.descriptor, &bundle.names, Some(LATEST))
            .ok()
            .map(|guid| guid.to_string())
    }

    /// Keeps the bundle locked for as long as the returned value lives, whatever becomes of this
    /// one.
    #[must_use]
    pub fn bundle_lock(&self) -> BundleLock {
        BundleLock {
            _bundle: self.bundle.clone(),
        }
    }

    /// The descriptor, where the image is a bundle.
    #[must_use]
    pub fn descriptor(&self) -> Option<&Descriptor> {
        self.bundle.as_deref().map(|bundle| &bundle.descriptor)
    }
}

#[cfg(test)]
mod tests;
