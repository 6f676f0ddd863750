//! What IMAGE is, and what lies beside it.

use super::{DESCRIPTOR, PENDING, Selection, unfinished};
use crate::error::{Error, ErrorKind, Result, Shown};
use crate::format::descriptor::{Descriptor, Image};
use crate::format::guid::Guid;
use crate::format::{names, xml};
use crate::storage::host::{self, Roots};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The most entries of a directory that are looked at for an error's text.
const LISTED_MAX: usize = 10_000;
/// The most oddities of a descriptor that people are told.
const TOLD_MAX: usize = 20;

/// What an IMAGE turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A single image file.
    Image(PathBuf, Naming),
    /// A descriptor in a directory.
    Bundle {
        directory: PathBuf,
        descriptor: String,
        naming: Naming,
    },
}

/// Who chose the name of what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// The user: wherever it leads is meant.
    User,
    /// Whoever made the directory that the user named and that it lies in: it must not be a link,
    /// and must not become one between this look at it and its opening.
    Directory,
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|e| e.eq_ignore_ascii_case(wanted))
}

/// Looks at names and kinds of files only; what is in them is read when they are locked.
pub(super) fn find(image: &Path) -> Result<Found> {
    let meta = match fs::metadata(image) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(nothing(image)),
        Err(e) => return Err(Error::from(e).in_file(image)),
    };
    if meta.is_dir() {
        return find_in_directory(image, Naming::User);
    }
    match image.file_name().and_then(OsStr::to_str) {
        Some(name) if has_extension(image, "xml") => {
            let directory = match image.parent() {
                Some(parent) if parent != Path::new("") => parent,
                _ => Path::new("."),
            };
            Ok(Found::Bundle {
                directory: directory.to_owned(),
                descriptor: name.to_owned(),
                naming: Naming::User,
            })
        }
        _ => Ok(Found::Image(image.to_owned(), Naming::User)),
    }
}

/// There is nothing of the name, but perhaps what an interrupted command has left of its making.
fn nothing(image: &Path) -> Error {
    let error = Error::why(ErrorKind::Missing, "nothing has this name").in_file(image);
    let parent = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let name = image.file_name().map(OsStr::to_string_lossy);
    let left = left_unfinished(parent, name.as_deref());
    match left.is_empty() {
        true => error,
        false => error.fix(format!(
            "its making was interrupted, or goes on: {}; making it again clears that away",
            shown(&left)
        )),
    }
}

/// What disks are called until they are whole, in a directory.
fn left_unfinished(directory: &Path, disk: Option<&str>) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let names = listing
        .flatten()
        .take(LISTED_MAX)
        .map(|entry| entry.file_name());
    let mut names: Vec<String> = names.filter_map(|name| name.into_string().ok()).collect();
    names.sort();
    let left = unfinished(&names, disk).into_iter();
    left.map(|name| directory.join(name)).collect()
}

/// The error for a snapshot of what has none.
pub(super) fn no_snapshots(named: &Path, asked: &str) -> Error {
    let why = format!("{asked:?}: only a bundle has snapshots, and this is a single image");
    Error::why(ErrorKind::NoSuchSnapshot, why).in_file(named)
}

/// The file or the directory that an IMAGE stands for, whichever of its names was given.
pub fn subject(image: &Path) -> Result<PathBuf> {
    Ok(match find(image)? {
        Found::Image(file, _) => file,
        Found::Bundle { directory, .. } => directory,
    })
}

fn find_in_directory(directory: &Path, naming: Naming) -> Result<Found> {
    if directory.join(DESCRIPTOR).symlink_metadata().is_ok() {
        let (directory, descriptor) = (directory.to_owned(), DESCRIPTOR.to_owned());
        return Ok(Found::Bundle {
            directory,
            descriptor,
            naming,
        });
    }
    let disks = entries(directory, "hdd");
    if has_extension(directory, "pvm") {
        return match disks.as_slice() {
            // Said here in so many words; what counts is that the opening follows no link.
            [only] if only.is_symlink() => {
                let only = only.display().to_string();
                let why = format!("{} is a symbolic link", Shown(&only));
                let fix = format!("if it leads where you want: name {} itself", Shown(&only));
                Err(Error::why(ErrorKind::OutsideBundle, why)
                    .in_file(directory)
                    .fix(fix))
            }
            [only] if only.is_dir() && !has_extension(only, "pvm") => {
                find_in_directory(only, Naming::Directory)
            }
            // Very old versions have a single file under that name.
            [only] => Ok(Found::Image(only.clone(), Naming::Directory)),
            [] => {
                let why = "the virtual machine has no .hdd";
                Err(Error::why(ErrorKind::Missing, why).in_file(directory))
            }
            several => {
                let why = format!("the virtual machine has {} disks", several.len());
                let fix = format!("name one of them: {}", shown(several));
                Err(Error::why(ErrorKind::Usage, why)
                    .in_file(directory)
                    .fix(fix))
            }
        };
    }
    let error = Error::why(
        ErrorKind::Missing,
        format!("the directory has no {DESCRIPTOR}"),
    );
    let images = entries(directory, "hds");
    let fix = if !images.is_empty() {
        format!(
            "it has these images, each of which can be named by itself: {}",
            shown(&images)
        )
    } else if !disks.is_empty() {
        format!("perhaps one of these is meant: {}", shown(&disks))
    } else {
        let left = left_unfinished(directory, None);
        let left = match left.is_empty() {
            true => String::new(),
            false => format!(", but what is left of the making of some: {}", shown(&left)),
        };
        format!(
            "name a .hds file, a .hdd bundle, its DiskDescriptor.xml or a .pvm; this directory \
             has no image in it{left}"
        )
    };
    Err(error.in_file(directory).fix(fix))
}

/// The entries with this extension, sorted. Images of ploop have a GUID behind theirs.
fn entries(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(listing) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let with_guid = format!(".{extension}.{{");
    let mut found: Vec<PathBuf> = listing
        .flatten()
        .take(LISTED_MAX)
        .map(|entry| entry.path())
        .filter(|path| {
            has_extension(path, extension) || path.to_string_lossy().contains(&with_guid)
        })
        .collect();
    found.sort();
    found
}

fn shown(paths: &[PathBuf]) -> String {
    const SHOWN: usize = 10;
    let mut names: Vec<String> = paths
        .iter()
        .take(SHOWN)
        .map(|path| Shown(&path.display().to_string()).to_string())
        .collect();
    if paths.len() > SHOWN {
        names.push(format!("and {} more", paths.len() - SHOWN));
    }
    names.join(", ")
}

/// Opens an image that [`find`] has found.
pub(super) fn open_image(path: &Path, naming: Naming, write: bool) -> Result<File> {
    match naming {
        Naming::User => host::by_user(path, write),
        Naming::Directory => host::in_directory(path, write),
    }
}

/// Opens the directory of a bundle that [`find`] has found.
pub(super) fn open_roots(directory: &Path, naming: Naming, allowed: &[PathBuf]) -> Result<Roots> {
    match naming {
        Naming::User => Roots::open(directory, allowed),
        Naming::Directory => Roots::open_inside(directory, allowed),
    }
}

/// What interrupted operations of ploop have left beside the files of a disk.
pub(super) fn leftovers(directory: &Path, name: &str, descriptor: &Descriptor) -> Vec<String> {
    let is_there = |name: &str| directory.join(name).symlink_metadata().is_ok();
    let mut told = Vec::new();
    let new_descriptor = format!("{name}.tmp");
    if is_there(&new_descriptor) {
        told.push(format!(
            "{new_descriptor} is there: an operation of ploop runs or was interrupted"
        ));
    }
    let images = descriptor.parts.iter().flat_map(|part| &part.images);
    // Names that lead elsewhere are not followed for this.
    for image in images.filter(|image| !image.file.contains('/')) {
        let index = format!("{}.idx", image.file);
        if is_there(&index) {
            told.push(format!(
                "{index} is there: ploop was converting the image and was interrupted; ploop can \
                 take that back"
            ));
        }
    }
    told
}

/// A snapshot that is marked as going away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Going {
    /// It is needed by several children, and goes when one of them is left: nothing is to be done.
    pub waits: bool,
    /// What it is about.
    pub text: String,
}

/// The snapshots that are marked as going away, and what ends that.
#[must_use]
pub fn going(directory: &Path, name: &str, descriptor: &Descriptor) -> Vec<Going> {
    let shots = &descriptor.snapshots;
    let list = directory.join(format!("{name}{PENDING}"));
    let is_ours = list.symlink_metadata().is_ok();
    let marked = shots
        .iter()
        .filter(|shot| shot.temporary && shot.guid != descriptor.top);
    let going = marked.map(|shot| {
        let guid = shot.guid;
        let children = shots.iter().filter(|other| other.parent == Some(guid));
        let count = children.count();
        let end = "`ploopfs snapshot delete` with its name ends that";
        let text = if count > 1 {
            format!(
                "the snapshot {guid} is deleted, and goes when one of its {count} children is left"
            )
        } else if is_ours {
            format!(
                "the snapshot {guid} is marked temporary: its deletion by ploopfs runs or was \
                 interrupted; repeating the command ends that"
            )
        } else {
            format!(
                "the snapshot {guid} is marked temporary: its deletion was interrupted, or another \
                 program needs it for a while; {end}"
            )
        };
        Going {
            waits: count > 1,
            text,
        }
    });
    going.collect()
}

/// The first of a list that whoever wrote the descriptor may have made as long as he liked.
pub(super) fn few(told: Vec<String>) -> Vec<String> {
    let more = told.len().saturating_sub(TOLD_MAX);
    let mut few: Vec<String> = told.into_iter().take(TOLD_MAX).collect();
    if more > 0 {
        few.push(format!("and {more} more of the kind"));
    }
    few
}

/// What people called the snapshots, where the virtual machine's directory says so.
pub(super) fn snapshot_names(directory: &Path, descriptor: &str) -> HashMap<Guid, String> {
    let mut found = names_of_machine(directory);
    let own = format!("{descriptor}{}", names::OWN_END);
    if let Some(bytes) = host::read_optional(directory, &own, xml::BYTES_MAX) {
        found.extend(names::parse_own(&bytes));
    }
    found
}

fn names_of_machine(directory: &Path) -> HashMap<Guid, String> {
    // By way of the real path: a bundle may be named through a link, or as ".".
    let Ok(real) = fs::canonicalize(directory) else {
        return HashMap::new();
    };
    let parse = |bytes: Vec<u8>| match names::parse(&bytes) {
        Ok(names) => Some(names),
        Err(e) => {
            log::debug!("{} is left alone: {e}", names::FILE_NAME);
            None
        }
    };
    real.parent()
        .and_then(|parent| host::read_optional(parent, names::FILE_NAME, xml::BYTES_MAX))
        .and_then(parse)
        .unwrap_or_default()
}

/// An image of a bundle that was named by itself: a warning, or a refusal where writing to it alone
/// would damage the disk.
pub(super) fn check_membership(image: &Path, selection: &Selection) -> Result<Option<String>> {
    let Some(member) = membership(image) else {
        return Ok(None);
    };
    let what = format!("the image is {} of the bundle around it", member.role);
    if (selection.write || selection.mending) && member.entangled {
        let why = format!("{what}, and writing to it alone would damage the disk");
        let error = Error::why(ErrorKind::ReadOnly, why).in_file(image);
        return Err(error.fix(if selection.mending {
            "name the bundle, of which the top is repaired; a frozen image is not repaired in its \
             place: copy it out of the bundle, and repair the copy"
        } else {
            "name the bundle to write to the disk; to read this image alone: `ploopfs mount -r`"
        }));
    }
    Ok(Some(format!("{what}; name the bundle to use the disk")))
}

/// What a single image is to the bundle around it.
pub(super) struct Membership {
    /// In words.
    pub role: &'static str,
    /// Other images of its part depend on it or it on them, so that writing to it alone damages the
    /// disk: a frozen one changes under those above, a top covers what it does not see below.
    pub entangled: bool,
}

/// True where a descriptor names this file: by its name, or by another one of the same file.
fn is_named(image: &Image, directory: &Path, real: &Path, own: &Metadata) -> bool {
    let Some(name) = Path::new(&image.file).file_name() else {
        return false;
    };
    let other = directory.join(name).symlink_metadata();
    let same = |other: Metadata| (other.dev(), other.ino()) == (own.dev(), own.ino());
    real.file_name() == Some(name) || other.is_ok_and(same)
}

/// Looks for a descriptor beside an image that was named by itself.
pub(super) fn membership(image: &Path) -> Option<Membership> {
    let real = fs::canonicalize(image).ok()?;
    let bytes = host::read_optional(real.parent()?, DESCRIPTOR, xml::BYTES_MAX)?;
    let descriptor = Descriptor::parse(&bytes).ok()?;
    let (directory, own) = (real.parent()?, real.metadata().ok()?);
    let mut guids = Vec::new();
    for image in descriptor.parts.iter().flat_map(|part| &part.images) {
        if is_named(image, directory, &real, &own) {
            guids.push(image.guid);
        }
    }
    let guid = *guids.first()?;
    if guids.iter().any(|guid| *guid != descriptor.top) {
        return Some(Membership {
            role: "a frozen snapshot",
            entangled: true,
        });
    }
    let alone = descriptor.chain(guid).is_ok_and(|chain| chain.len() == 1);
    let role = if alone {
        "the top"
    } else {
        "the top, and only part,"
    };
    Some(Membership {
        role,
        entangled: !alone,
    })
}

/// What a single image is to the bundle around it, in words; none where there is no such bundle.
#[must_use]
pub fn role_in_bundle(image: &Path) -> Option<&'static str> {
    membership(image).map(|member| member.role)
}
