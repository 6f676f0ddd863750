//! Copies a disk file by file: a bundle with all its snapshots, or a single image.
//!
//! The copy is made as [`create`] makes a new disk. Its files have the same names and bytes; holes
//! stay holes, and where the file system can, blocks are shared. Only what the descriptor names
//! goes with it, and what belongs to the descriptor, as the names of snapshots: images that nothing
//! names, undo files and lock files stay behind.
//!
//! 1. The bundle is locked, and then every image of it, shared: a branch that somebody writes to,
//!    or a lower image that was not closed, would be torn in the copy.
//! 2. What an interrupted change has left is looked for. Before the locks were taken, a change
//!    could have begun behind the look.
//! 3. The images are copied, and then the descriptor, unless it is another one by now.

use crate::admin::bundle::{BACKUP, NEW, PENDING, read_small};
use crate::admin::create::{self, Ids, Place, make_in};
use crate::admin::progress::Progress;
use crate::chain::bundle::{self, Changing, DESCRIPTOR, NEW_LOCK, Selection};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::Descriptor;
use crate::format::descriptor::edit::{Edit, edit, with_uid};
use crate::format::guid::Guid;
use crate::format::header::{HEADER_LEN, IN_USE, RawHeader, Version};
use crate::format::{names, xml};
use crate::journal::RUNNING;
use crate::storage::beside;
use crate::storage::{Directory, SharedStorage, Storage};
use crate::sys::random;
use crate::units::{FileOffset, len_u64, len_usize};
use std::collections::{BTreeMap, HashMap};
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

/// A bundle as it is found, every image of it open and locked.
struct Found<'a> {
    directory: &'a dyn Directory,
    /// The same for messages.
    path: &'a Path,
    /// The descriptor's name.
    descriptor: &'a str,
    /// The bundle's own name.
    name: String,
    text: Vec<u8>,
    images: BTreeMap<String, SharedStorage>,
    names: Vec<String>,
}

/// Copies a disk to a new name. With `new_guids` the snapshots and the disk itself get other ones.
pub fn copy(source: &Path, target: &Path, new_guids: bool, progress: &Progress) -> Result<Copied> {
    match Changing::hold_still(source)? {
        // It stays open, and with it the locks, until the end.
        Some(still) => copy_bundle(source, &still, target, new_guids, progress),
        None => copy_image(source, target, new_guids, progress),
    }
}

fn copy_image(
    source: &Path,
    target: &Path,
    new_guids: bool,
    progress: &Progress,
) -> Result<Copied> {
    let opened = bundle::open(source, &Selection::default())?;
    if new_guids {
        let why = "a single image has no GUIDs";
        return Err(Error::why(ErrorKind::Usage, why).in_file(source));
    }
    let (parent, name) = create::place_for(target)?;
    let files = opened.parts.iter().flat_map(|part| &part.files);
    let files: Vec<&Path> = files.map(|file| file.path.as_path()).collect();
    create::refuse_within(&parent, source, &files)?;
    let only = opened.parts.first().and_then(|part| part.files.last());
    let only = only.ok_or_else(|| Error::errno(libc::EIO))?;
    if let Some(file) = only.storage.as_host_fd() {
        let home = beside::home(file, &only.path);
        let home = home.map_err(|e| Error::from(e).in_file(&only.path))?;
        let left = home.map(|home| home.with(RUNNING));
        if let Some(left) = left.filter(|left| left.symlink_metadata().is_ok()) {
            // Its copy would be half mended, without its way back.
            return Err(left_over(&left.display().to_string(), &only.path));
        }
    }
    closed(&*only.storage).map_err(|e| e.in_file(&only.path))?;
    copy_image_in(&only.storage, (&parent, name), &Ids::new()?, progress)
}

/// Copies an image, which nobody else changes, to a new name in any directory.
pub fn copy_image_in(
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

fn copy_bundle(
    source: &Path,
    still: &Changing,
    target: &Path,
    new_guids: bool,
    progress: &Progress,
) -> Result<Copied> {
    let subject = bundle::subject(source)?;
    let found = Found::of(still, &subject)?;
    let (parent, name) = create::place_for(target)?;
    let ids = Ids::new()?;
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::from(e).in_file(path));
    if real(parent.path())?.starts_with(real(&subject)?) {
        let why = "the copy would lie in the disk itself";
        return Err(Error::why(ErrorKind::Usage, why).in_file(source));
    }
    make_copy(&found, source, (&parent, name), new_guids, &ids, progress)
}

/// A bundle in any directory, which nobody else changes.
#[derive(Clone, Copy, Debug)]
pub struct Original<'a> {
    /// The directory.
    pub directory: &'a dyn Directory,
    /// Its own name.
    pub name: &'a str,
    /// The same for messages.
    pub path: &'a Path,
}

/// Copies such a bundle to a new name in any directory.
pub fn copy_in(
    from: Original<'_>,
    target: (&dyn Directory, &str),
    new_guids: bool,
    ids: &Ids,
    progress: &Progress,
) -> Result<Copied> {
    let text = read_small(&*from.directory.open(DESCRIPTOR, false)?, xml::BYTES_MAX)?;
    let descriptor = Descriptor::parse(&text).map_err(|e| {
        Error::new(ErrorKind::Descriptor)
            .because(e)
            .in_file(from.path)
    })?;
    let mut images = BTreeMap::new();
    for image in descriptor.parts.iter().flat_map(|part| &part.images) {
        let storage = from.directory.open(&image.file, false)?;
        closed(&*storage)?;
        images.insert(image.file.clone(), storage);
    }
    let found = Found {
        directory: from.directory,
        path: from.path,
        descriptor: DESCRIPTOR,
        name: from.name.to_owned(),
        text,
        images,
        names: from.directory.entries()?,
    };
    found.settled(&found.names)?;
    make_copy(&found, from.path, target, new_guids, ids, progress)
}

fn make_copy(
    found: &Found<'_>,
    source: &Path,
    (parent, name): (&dyn Directory, &str),
    new_guids: bool,
    ids: &Ids,
    progress: &Progress,
) -> Result<Copied> {
    let (text, new) = if new_guids {
        renamed(&found.text, ids)?
    } else {
        (found.text.clone(), HashMap::new())
    };
    let people = found.people_names(&new)?;
    let mut bytes = 0_u64;
    for file in found.images.values() {
        bytes = bytes.saturating_add(file.len()?.get());
    }
    progress.step("copying", bytes);
    make_in(parent, name, true, ids, progress, |place| {
        let Place::Bundle(inner) = place else {
            return Err(Error::errno(libc::EIO));
        };
        for (image, file) in &found.images {
            copy_file(file, &inner.create_new(image)?, progress)?;
        }
        found.small_files(&**inner, name, new_guids, progress)?;
        if let Some(people) = &people {
            put(&**inner, &format!("{DESCRIPTOR}{}", names::OWN_END), people)?;
        }
        found.same_as_before(source)?;
        put(&**inner, DESCRIPTOR, &text)?;
        inner.sync()
    })?;
    let images = found.images.len();
    Ok(Copied { images, bytes })
}

fn left_over(what: &str, path: &Path) -> Error {
    let why = format!("{what} is left of a change that was interrupted");
    let fix = "repeat the command that was interrupted, or see what `ploopfs check` tells";
    Error::why(ErrorKind::InUse, why).in_file(path).fix(fix)
}

/// Refuses an image that was not closed: its copy would be no better. Nobody has it open, since it
/// is locked.
fn closed(storage: &dyn Storage) -> Result<()> {
    if storage.len()?.get() < len_u64(HEADER_LEN) {
        return Ok(());
    }
    let mut bytes = [0; HEADER_LEN];
    storage.read_at(FileOffset::ZERO, &mut bytes)?;
    if Version::of(&bytes).is_none() || RawHeader::decode(&bytes).in_use != IN_USE {
        return Ok(());
    }
    let why = "the in-use mark is set, and nobody has the image open";
    Err(Error::why(ErrorKind::InUse, why).fix(
        "`ploopfs check` tells how the disk is; `ploopfs repair`, or mounting it to be written to, \
         closes the top; what merely is to be kept as it is, can be copied with `cp -a`",
    ))
}

impl<'a> Found<'a> {
    /// Opens and locks every image that the descriptor names, also those that the disk does not
    /// show now, and refuses a bundle that cannot be copied file by file. What was left by an
    /// interrupted change is looked for behind the locks: whoever changes something has them.
    fn of(still: &'a Changing, subject: &Path) -> Result<Self> {
        let (directory, own) = (still.directory(), still.descriptor());
        let text = read_small(&*directory.open(own, false)?, xml::BYTES_MAX)?;
        let descriptor = Descriptor::parse(&text).map_err(|e| {
            let path = subject.join(own);
            Error::new(ErrorKind::Descriptor).because(e).in_file(&path)
        })?;
        let mut images = BTreeMap::new();
        for image in descriptor.parts.iter().flat_map(|part| &part.images) {
            let storage = still.image(image)?;
            closed(&*storage).map_err(|e| e.in_file(&still.path_of(image)))?;
            let is_in = still.own_name(image).as_ref() == Some(&image.file);
            // In the copy the descriptor has its usual name, by which it is found.
            let is_hidden = own != DESCRIPTOR && image.file.starts_with(DESCRIPTOR);
            if !is_in || is_hidden {
                let why = format!("its image {:?} is not in the bundle itself", image.file);
                let fix = "`ploopfs convert` makes a new disk of what it shows";
                return Err(Error::why(ErrorKind::Unsupported, why)
                    .in_file(subject)
                    .fix(fix));
            }
            images.insert(image.file.clone(), storage);
        }
        let full = std::fs::canonicalize(subject).map_err(|e| Error::from(e).in_file(subject))?;
        let name = full.file_name().map(|name| name.to_string_lossy());
        let found = Self {
            directory,
            path: directory.path(),
            descriptor: own,
            name: name.map(std::borrow::Cow::into_owned).unwrap_or_default(),
            text,
            images,
            names: directory.entries()?,
        };
        found.settled(&found.names)?;
        Ok(found)
    }

    /// Refuses what an interrupted change has left.
    fn settled(&self, names: &[String]) -> Result<()> {
        let own = std::iter::once(self.descriptor);
        for name in own.chain(self.images.keys().map(String::as_str)) {
            for end in [".tmp", ".idx", RUNNING, NEW, PENDING, NEW_LOCK] {
                let left = format!("{name}{end}");
                if names.contains(&left) && !self.images.contains_key(&left) {
                    return Err(left_over(&left, self.path));
                }
            }
        }
        Ok(())
    }

    /// Programs that know nothing of the locks may have been at work.
    fn same_as_before(&self, source: &Path) -> Result<()> {
        self.settled(&self.directory.entries()?)?;
        let now = self.directory.open(self.descriptor, false)?;
        if read_small(&*now, xml::BYTES_MAX)? != self.text {
            let why = "its descriptor was changed while it was copied";
            return Err(Error::why(ErrorKind::Locked, why).in_file(source));
        }
        Ok(())
    }

    /// What belongs to the descriptor: the one before it, and the empty file of the bundle's name.
    fn small_files(
        &self,
        inner: &dyn Directory,
        name: &str,
        new_guids: bool,
        progress: &Progress,
    ) -> Result<()> {
        let backup = format!("{}{BACKUP}", self.descriptor);
        // One with the old GUIDs would be none of the copy's.
        if self.names.contains(&backup) && !new_guids {
            let old = self.directory.open(&backup, false)?;
            let new = inner.create_new(&format!("{DESCRIPTOR}{BACKUP}"))?;
            copy_file(&old, &new, progress)?;
        }
        let is_image = |name: &str| self.images.contains_key(name);
        if self.names.contains(&self.name) && !is_image(&self.name) && !is_image(name) {
            let stub = self.directory.open(&self.name, false)?;
            if stub.is_empty()? {
                put(inner, name, b"")?;
            }
        }
        Ok(())
    }

    /// What people called the snapshots, by the GUIDs that they have in the copy.
    fn people_names(&self, new: &HashMap<Guid, Guid>) -> Result<Option<Vec<u8>>> {
        let own = format!("{}{}", self.descriptor, names::OWN_END);
        if !self.names.contains(&own) {
            return Ok(None);
        }
        let old = read_small(&*self.directory.open(&own, false)?, xml::BYTES_MAX)?;
        let known = names::parse_own_whole(&old);
        match known {
            _ if new.is_empty() && len_u64(old.len()) <= xml::BYTES_MAX => Ok(Some(old)),
            Some(known) => {
                let in_copy = |(guid, name)| (new.get(&guid).copied().unwrap_or(guid), name);
                let known = known.into_iter().map(in_copy).collect();
                Ok(Some(names::encode_own(&known)))
            }
            None => {
                let why = "the file of the snapshots' names is not as this program writes it";
                Err(Error::why(ErrorKind::Unsupported, why)
                    .in_file(&self.path.join(own))
                    .fix("move it away, or copy without --new-guids"))
            }
        }
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
    let text = with_uid(&text, ids.uid).map_err(|e| failed(e.into()))?;
    Ok((text.into_bytes(), new))
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
