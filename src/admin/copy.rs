//! Copies a disk file by file: a bundle with all its snapshots, or a single image.
//!
//! The copy is made as [`create`] makes a new disk. Its files have the same names and bytes; holes
//! stay holes, and where the file system can, blocks are shared. Only what the descriptor names
//! goes with it, and what belongs to the descriptor, as the names of snapshots: images that nothing
//! names, undo files and lock files stay behind.

use crate::admin::bundle::{BACKUP, NEW, PENDING, read_small};
use crate::admin::create::{self, Ids, Place, make_in};
use crate::admin::progress::Progress;
use crate::chain::bundle::{self, DESCRIPTOR, OpenedFile, Selection};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::edit::{Edit, edit};
use crate::format::descriptor::{Descriptor, write};
use crate::format::guid::Guid;
use crate::format::{names, xml};
use crate::journal;
use crate::storage::beside;
use crate::storage::directory::HostDirectory;
use crate::storage::{Directory, SharedStorage, Storage};
use crate::sys::random;
use crate::units::{FileOffset, len_usize};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// Bytes that the host copies at a time.
const PIECE: u64 = 16 << 20;
/// Bytes that are copied by hand at a time, where the host cannot.
const BY_HAND: u64 = 1 << 20;

/// What was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Images.
    pub images: usize,
    /// Bytes that they have.
    pub bytes: u64,
}

/// A bundle that is copied.
#[derive(Clone, Copy, Debug)]
pub struct Original<'a> {
    /// Its directory.
    pub directory: &'a dyn Directory,
    /// The directory's own name.
    pub name: &'a str,
    /// The same for messages.
    pub path: &'a Path,
}

/// A bundle as it is found.
struct Found<'a> {
    from: Original<'a>,
    text: Vec<u8>,
    images: Vec<String>,
    names: Vec<String>,
}

/// Copies a disk to a new name. With `new_guids` the snapshots and the disk itself get other ones.
pub fn copy(source: &Path, target: &Path, new_guids: bool, progress: &Progress) -> Result<Copied> {
    let selection = Selection::default();
    // It stays open, and with it the locks, until the end.
    let opened = bundle::open(source, &selection)?;
    let subject = bundle::subject(source)?;
    let (parent, name) = create::place_for(target)?;
    let ids = Ids::new()?;
    if opened.descriptor().is_none() {
        if new_guids {
            let why = "a single image has no GUIDs";
            return Err(Error::why(ErrorKind::Usage, why).in_file(source));
        }
        let only = opened.parts.first().and_then(|part| part.files.last());
        let only = only.ok_or_else(|| Error::errno(libc::EIO))?;
        refuse_half_mended(only)?;
        return copy_image(&only.storage, (&parent, name), &ids, progress);
    }
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::from(e).in_file(path));
    let full = real(&subject)?;
    if real(parent.path())?.starts_with(&full) {
        let why = "the copy would lie in the disk itself";
        return Err(Error::why(ErrorKind::Usage, why).in_file(source));
    }
    let own_name = full.file_name().map(|name| name.to_string_lossy());
    let from = Original {
        directory: &HostDirectory::open(&subject)?,
        name: &own_name.unwrap_or_default(),
        path: &subject,
    };
    copy_bundle(from, (&parent, name), new_guids, &ids, progress)
}

/// Copies a bundle to a new name in a directory. Nobody else may change it meanwhile.
pub fn copy_bundle(
    from: Original<'_>,
    (parent, name): (&dyn Directory, &str),
    new_guids: bool,
    ids: &Ids,
    progress: &Progress,
) -> Result<Copied> {
    let found = find(from)?;
    let (text, new) = if new_guids {
        renamed(&found.text, ids)?
    } else {
        (found.text.clone(), HashMap::new())
    };
    let mut files = Vec::new();
    let mut bytes = 0_u64;
    for image in &found.images {
        let file = from.directory.open(image, false)?;
        bytes = bytes.saturating_add(file.len()?.get());
        files.push((image, file));
    }
    progress.step("copying", bytes);
    make_in(parent, name, true, ids, progress, |place| {
        let Place::Bundle(inner) = place else {
            return Err(Error::errno(libc::EIO));
        };
        for (image, file) in &files {
            copy_file(file, &inner.create_new(image)?, progress)?;
        }
        found.small_files(&**inner, name, new_guids)?;
        found.people_names(&**inner, &new)?;
        if read_small(&*from.directory.open(DESCRIPTOR, false)?, xml::BYTES_MAX)? != found.text {
            let why = "its descriptor was changed while it was copied";
            return Err(Error::why(ErrorKind::Locked, why).in_file(from.path));
        }
        put(&**inner, DESCRIPTOR, &text)?;
        inner.sync()
    })?;
    let images = files.len();
    Ok(Copied { images, bytes })
}

/// Copies an image to a new name in a directory. Nobody else may change it meanwhile.
pub fn copy_image(
    image: &SharedStorage,
    (parent, name): (&dyn Directory, &str),
    ids: &Ids,
    progress: &Progress,
) -> Result<Copied> {
    let bytes = image.len()?.get();
    progress.step("copying", bytes);
    make_in(parent, name, false, ids, progress, |place| match place {
        Place::Image(file) => copy_file(image, file, progress),
        Place::Bundle(_) => Err(Error::errno(libc::EIO)),
    })?;
    Ok(Copied { images: 1, bytes })
}

/// The copy of an image whose repair was interrupted would be half mended, without its way back.
fn refuse_half_mended(image: &OpenedFile) -> Result<()> {
    let Some(file) = image.storage.as_host_fd() else {
        return Ok(());
    };
    let home = beside::home(file, &image.path).map_err(|e| Error::from(e).in_file(&image.path))?;
    let left = home.map(|home| home.with(journal::RUNNING));
    match left.filter(|left| left.symlink_metadata().is_ok()) {
        None => Ok(()),
        Some(left) => {
            let why = format!(
                "{} is left of a repair that was interrupted",
                left.display()
            );
            let fix = "`ploopfs check` tells what is to be done first";
            Err(Error::why(ErrorKind::InUse, why)
                .in_file(&image.path)
                .fix(fix))
        }
    }
}

/// Looks at a bundle, and refuses one that cannot be copied file by file.
fn find(from: Original<'_>) -> Result<Found<'_>> {
    let (directory, subject) = (from.directory, from.path);
    let names = directory.entries()?;
    let text = read_small(&*directory.open(DESCRIPTOR, false)?, xml::BYTES_MAX)?;
    let path = subject.join(DESCRIPTOR);
    let descriptor = Descriptor::parse(&text)
        .map_err(|e| Error::new(ErrorKind::Descriptor).because(e).in_file(&path))?;
    let images: BTreeSet<String> = descriptor
        .parts
        .iter()
        .flat_map(|part| part.images.iter().map(|image| image.file.clone()))
        .collect();
    for image in &images {
        if !names.contains(image) {
            let why = format!("its image {image:?} is not in the bundle itself");
            let fix = "`ploopfs convert` makes a new disk of what it shows";
            return Err(Error::why(ErrorKind::Unsupported, why)
                .in_file(subject)
                .fix(fix));
        }
    }
    let own = std::iter::once(DESCRIPTOR.to_owned()).chain(images.iter().cloned());
    for name in own {
        for end in [".tmp", ".idx", ".repair", NEW, PENDING] {
            let left = format!("{name}{end}");
            if names.contains(&left) && !images.contains(&left) {
                let why = format!("{left} is left of a change that was interrupted");
                let fix = "`ploopfs check` tells what is to be done first";
                return Err(Error::why(ErrorKind::InUse, why).in_file(subject).fix(fix));
            }
        }
    }
    Ok(Found {
        from,
        text,
        images: images.into_iter().collect(),
        names,
    })
}

impl Found<'_> {
    /// What belongs to the descriptor: the one before it, and the empty file of the bundle's name.
    fn small_files(&self, inner: &dyn Directory, name: &str, new_guids: bool) -> Result<()> {
        let backup = format!("{DESCRIPTOR}{BACKUP}");
        // One with the old GUIDs would be none of the copy's.
        if self.names.contains(&backup) && !new_guids {
            let old = read_small(&*self.from.directory.open(&backup, false)?, xml::BYTES_MAX)?;
            put(inner, &backup, &old)?;
        }
        let own = self.from.name;
        let is_image = |name: &str| self.images.iter().any(|image| image == name);
        if self.names.iter().any(|there| there == own) && !is_image(own) && !is_image(name) {
            let stub = self.from.directory.open(own, false)?;
            if stub.is_empty()? {
                put(inner, name, b"")?;
            }
        }
        Ok(())
    }
}

impl Found<'_> {
    /// What people called the snapshots, by the GUIDs that they have in the copy.
    fn people_names(&self, inner: &dyn Directory, new: &HashMap<Guid, Guid>) -> Result<()> {
        let own = format!("{DESCRIPTOR}{}", names::OWN_END);
        if !self.names.contains(&own) {
            return Ok(());
        }
        let old = read_small(&*self.from.directory.open(&own, false)?, xml::BYTES_MAX)?;
        let in_copy = |(guid, name)| (new.get(&guid).copied().unwrap_or(guid), name);
        let kept = names::parse_own(&old).into_iter().map(in_copy).collect();
        put(inner, &own, &names::encode_own(&kept))
    }
}

fn put(inner: &dyn Directory, name: &str, bytes: &[u8]) -> Result<()> {
    let file = inner.create_new(name)?;
    file.write_at(FileOffset::ZERO, bytes)?;
    file.sync_data()
}

/// The descriptor with other GUIDs for its frozen snapshots and the disk itself, and those GUIDs.
/// The top keeps its own, which is the same in most bundles.
fn renamed(text: &[u8], ids: &Ids) -> Result<(Vec<u8>, HashMap<Guid, Guid>)> {
    let failed =
        |e: Box<dyn std::error::Error + Send + Sync>| Error::new(ErrorKind::Descriptor).because(e);
    let descriptor = Descriptor::parse(text).map_err(|e| failed(e.into()))?;
    let mut edits = Vec::new();
    let mut new = HashMap::new();
    for shot in descriptor.frozen() {
        let (from, to) = (shot.guid, Guid::random(random::sixteen()?));
        edits.push(Edit::RenameImages { from, to });
        edits.push(Edit::RenameShot { from, to });
        new.insert(from, to);
    }
    let text = edit(text, &edits).map_err(|e| failed(e.into()))?;
    let text = String::from_utf8(text).map_err(|e| failed(e.into()))?;
    Ok((write::with_uid(&text, ids.uid).into_bytes(), new))
}

/// Copies a file's bytes and holes, and syncs the copy.
fn copy_file(source: &SharedStorage, target: &SharedStorage, progress: &Progress) -> Result<()> {
    let len = source.len()?;
    let shared = len > FileOffset::ZERO
        && target.share_from(FileOffset::ZERO, &**source, FileOffset::ZERO..len)?;
    if shared {
        progress.add(len.get());
    } else {
        target.set_len(len)?;
        copy_data(&**source, &**target, len, progress)?;
    }
    target.sync_data()
}

fn copy_data(
    source: &dyn Storage,
    target: &dyn Storage,
    len: FileOffset,
    progress: &Progress,
) -> Result<()> {
    let mut bytes = Vec::new();
    let mut done = FileOffset::ZERO;
    while let Some(data) = source.next_data(done)? {
        let mut at = data.start;
        while at < data.end.min(len) {
            progress.check()?;
            let piece = at..at.saturating_add(PIECE).min(data.end).min(len);
            if !target.copy_from(at, source, piece.clone())? {
                by_hand(source, target, piece.start, piece.end, &mut bytes)?;
            }
            progress.add(piece.end.get() - done.get());
            (at, done) = (piece.end, piece.end);
        }
        if data.end >= len {
            break;
        }
        done = data.end;
    }
    Ok(())
}

fn by_hand(
    source: &dyn Storage,
    target: &dyn Storage,
    start: FileOffset,
    end: FileOffset,
    bytes: &mut Vec<u8>,
) -> Result<()> {
    let mut at = start;
    while at < end {
        let piece = BY_HAND.min(end.get() - at.get());
        bytes.resize(len_usize(piece).unwrap_or(0), 0);
        source.read_at(at, bytes)?;
        target.write_at(at, bytes)?;
        at = at.saturating_add(piece);
    }
    Ok(())
}
