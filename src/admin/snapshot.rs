//! Snapshots of a bundle: made, gone back to, deleted, and what a tree they are.
//!
//! A snapshot is a state of the disk, with an image in each part that holds what was written since
//! its parent. The top is the one that is written to. Whatever is done to the tree is one change of
//! the bundle ([`crate::admin::bundle`]): either the old tree is there or the new one, and every
//! file that either needs.
//!
//! [`create`] freezes the top under a new name and puts an empty image over it, which takes the
//! top's name. [`switch()`] puts an empty image over an older snapshot, and drops the top, or keeps
//! it as a snapshot. [`delete()`] drops what has no children, and merges what has one
//! ([`crate::admin::merge`]): the child keeps its name, and the content goes into the file of what
//! is deleted. What has several children is marked as going away, and goes with the last but one
//! of them.

mod delete;
mod job;
pub mod list;
mod new;
pub mod session;
mod switch;

pub use delete::{Deleted, Deletion, delete, plan_delete};
pub use job::{Losses, Merged, Upper, merge, plan_merge};
pub use switch::{Switched, plan_switch, switch};

use crate::admin::bundle::{Bundle, Failure};
use crate::admin::snapshot::new::NewImage;
use crate::delta::image::{Image, header_error};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::edit::Edit;
use crate::format::descriptor::{self, Descriptor, ImageType, Oddity};
use crate::format::guid::Guid;
use crate::format::header::{HEADER_LEN, IN_USE, Version};
use crate::storage::Storage;
use crate::units::{ClusterSize, FileOffset, SectorCount, len_u64};
use std::path::Path;

/// The most images of a chain that ploop takes.
pub const CHAIN_MAX: usize = 127;
/// Virtuozzo's backup has a snapshot of this name, which must never be the top.
const BACKUP: [u8; 16] = [
    0x70, 0x47, 0x18, 0xe1, 0x23, 0x14, 0x44, 0xc8, 0x90, 0x87, 0xd7, 0x8e, 0xd3, 0x6b, 0x0f, 0x4e,
];

/// Names for what is new.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Of the snapshot that the top becomes.
    pub snapshot: Guid,
    /// In the names of new files.
    pub file: Guid,
}

/// A snapshot that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// What the frozen state is named.
    pub guid: Guid,
    /// The new top's files.
    pub files: Vec<String>,
    /// What went with the old top: it was marked, and waited for that.
    pub then: Option<Deletion>,
    /// What could not be done after the change was made; it takes nothing of it back.
    pub warnings: Vec<String>,
}

/// An image of the bundle, open.
#[derive(Debug)]
struct Opened {
    entry: descriptor::Image,
    image: Image,
}

fn descriptor_error(error: descriptor::DescriptorError) -> Error {
    Error::new(ErrorKind::Descriptor).because(error)
}

/// Refuses a disk that may only be read.
fn changeable(bundle: &Bundle<'_>) -> Result<()> {
    let descriptor = bundle.descriptor();
    if bundle.is_being_exchanged() {
        let why = "an operation of ploop that exchanges the base and the top was interrupted";
        return Err(Error::why(ErrorKind::Unsupported, why)
            .fix("let ploop end it: it does so when it mounts the disk"));
    }
    let mut oddities = descriptor.oddities.iter();
    if let Some(oddity) = oddities.find(|oddity| oddity.forbids_writing()) {
        return Err(Error::why(ErrorKind::Unsupported, oddity.to_string()));
    }
    let top = descriptor.snapshots.iter();
    let mut top = top.filter(|shot| shot.guid == descriptor.top);
    if top.any(|shot| shot.temporary) {
        let why = "the top is marked temporary: another program's operation was interrupted";
        return Err(Error::why(ErrorKind::Unsupported, why)
            .fix("end that operation with the program that began it"));
    }
    Ok(())
}

/// What the top is named after a change.
fn top_name(descriptor: &Descriptor) -> Guid {
    let is_guess = |oddity: &Oddity| matches!(oddity, Oddity::TopGuessed(_));
    if descriptor.oddities.iter().any(is_guess) {
        // A second leaf would leave nothing to guess by.
        return Guid::TOP;
    }
    descriptor.top
}

/// Refuses a name that cannot be one.
fn check_name(descriptor: &Descriptor, guid: Guid) -> Result<()> {
    let is_there = descriptor.snapshots.iter().any(|shot| shot.guid == guid);
    let images = descriptor.parts.iter().flat_map(|part| &part.images);
    let is_used = is_there || images.into_iter().any(|image| image.guid == guid);
    let reserved = [Guid::NONE, Guid::TOP, Guid::from_bytes(BACKUP)].contains(&guid);
    if is_used || reserved {
        let why = format!("{guid} cannot be a new snapshot's name: it has a meaning already");
        return Err(Error::why(ErrorKind::Usage, why));
    }
    Ok(())
}

fn children(descriptor: &Descriptor, guid: Guid) -> Vec<Guid> {
    let shots = descriptor.snapshots.iter();
    let below = shots.filter(|shot| shot.parent == Some(guid));
    below.map(|shot| shot.guid).collect()
}

fn parent(descriptor: &Descriptor, guid: Guid) -> Option<Guid> {
    let mut shots = descriptor.snapshots.iter();
    shots.find(|shot| shot.guid == guid)?.parent
}

fn is_marked(descriptor: &Descriptor, guid: Guid) -> bool {
    let mut shots = descriptor.snapshots.iter();
    shots.any(|shot| shot.guid == guid && shot.temporary)
}

/// Bytes of a part of the disk.
fn part_len(descriptor: &Descriptor, part: usize) -> Result<u64> {
    let sectors = match descriptor.parts.get(part) {
        Some(part) if descriptor.parts.len() > 1 => part.end.get().saturating_sub(part.start.get()),
        _ => descriptor.disk_size.get(),
    };
    let bytes = SectorCount::new(sectors).bytes();
    bytes.ok_or_else(|| Error::why(ErrorKind::Descriptor, "the disk is larger than any file"))
}

/// Opens the image of a snapshot in a part, and holds it against what is said of it.
fn open(bundle: &Bundle<'_>, part: usize, guid: Guid) -> Result<Opened> {
    let descriptor = bundle.descriptor();
    let images = descriptor.images(part, &[guid]).map_err(descriptor_error)?;
    let entry = match images.first() {
        Some(image) => (*image).clone(),
        None => return Err(Error::new(ErrorKind::Descriptor)),
    };
    let path = Path::new(&entry.file);
    let storage = bundle.files().image(&entry).map_err(|e| e.in_file(path))?;
    let has_magic = magic(&*storage).map_err(|e| e.in_file(path))?.is_some();
    let is_root = parent(descriptor, guid).is_none();
    let image = match (entry.kind, has_magic) {
        (ImageType::Plain, false) if is_root => Image::plain(path, storage)?,
        (ImageType::Plain, true) if is_root => {
            let why = "the image is said to be plain but starts with the magic of an expanding one";
            return Err(Error::why(ErrorKind::Unsupported, why).in_file(path));
        }
        _ => Image::expanding(path, storage)?,
    };
    let declared = descriptor.parts.get(part).and_then(|part| part.blocksize);
    let declared = declared.and_then(ClusterSize::from_sectors);
    if let (Some(layout), Some(declared)) = (image.layout(), declared) {
        if layout.cluster() != declared {
            let (own, said) = (layout.cluster().bytes(), declared.bytes());
            let why = format!("clusters of {own} bytes here, of {said} bytes in the descriptor");
            return Err(Error::why(ErrorKind::Descriptor, why).in_file(path));
        }
    }
    Ok(Opened { entry, image })
}

fn magic(storage: &dyn Storage) -> Result<Option<Version>> {
    if storage.len()?.get() < len_u64(HEADER_LEN) {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_LEN];
    storage.read_at(FileOffset::ZERO, &mut bytes)?;
    Ok(Version::of(&bytes))
}

/// Refuses a top that was not closed, or is half repaired: what it holds is not sure.
fn closed(opened: &Opened) -> Result<()> {
    let path = opened.image.path();
    if let Some(header) = opened.image.header() {
        if header.raw().in_use == IN_USE {
            let why = "the in-use mark is set, and nobody has the image open";
            return Err(Error::why(ErrorKind::InUse, why).in_file(path).fix(
                "`ploopfs check` tells how the image is; `ploopfs repair`, or mounting it to be \
                 written to, closes it",
            ));
        }
        if let Some(refusal) = header.write_refusal() {
            return Err(header_error(refusal).in_file(path));
        }
    }
    Ok(())
}

fn check_size(opened: &Opened, len: u64) -> Result<()> {
    match opened.image.header() {
        Some(header) if header.size_bytes() != len => {
            let own = header.size_bytes();
            let why = format!("the descriptor says {len} bytes, the image's header {own}");
            Err(Error::why(ErrorKind::Descriptor, why)
                .in_file(opened.image.path())
                .fix("make them agree first: `ploopfs resize` to the size of the header"))
        }
        _ => Ok(()),
    }
}

/// New, empty images over those of a snapshot, one for each part.
fn empty_over(bundle: &Bundle<'_>, below: &[Opened], file: Guid) -> Result<Vec<NewImage>> {
    let descriptor = bundle.descriptor();
    let mut images = Vec::with_capacity(below.len());
    for (part, opened) in below.iter().enumerate() {
        let len = part_len(descriptor, part)?;
        let blocksize = descriptor.parts.get(part).and_then(|part| part.blocksize);
        images.push(NewImage::over(opened, blocksize, len, file)?);
    }
    let there = bundle.taken()?;
    for (number, image) in images.iter().enumerate() {
        let again = images
            .iter()
            .take(number)
            .any(|other| other.name == image.name);
        if again || there.contains(&image.name) {
            let why = "a file of this name is there already";
            return Err(Error::why(ErrorKind::Usage, why).in_file(Path::new(&image.name)));
        }
    }
    Ok(images)
}

fn add_images(edits: &mut Vec<Edit>, images: &[NewImage], guid: Guid) {
    for (part, image) in images.iter().enumerate() {
        edits.push(Edit::AddImage {
            part,
            image: descriptor::Image {
                guid,
                kind: ImageType::Compressed,
                file: image.name.clone(),
            },
        });
    }
}

/// Makes new images and then the change that names them; removes them if it is not made. Returns
/// what failed after it was made.
fn with_new(
    bundle: &mut Bundle<'_>,
    images: &[NewImage],
    below: &[Opened],
    gone: Vec<String>,
    edits: &[Edit],
) -> Result<Vec<String>> {
    bundle.try_edits(edits)?;
    bundle.settle()?;
    let mut names: Vec<String> = images.iter().map(|image| image.name.clone()).collect();
    names.extend(gone);
    bundle.announce(&names)?;
    let mut make = || -> Result<(), Failure> {
        for (image, below) in images.iter().zip(below) {
            let made = image.make(bundle.directory(), &**below.image.storage());
            made.map_err(Failure::Before)?;
        }
        bundle.replace(edits)
    };
    match make() {
        Ok(()) => Ok(bundle.settle().err().iter().map(left_over).collect()),
        Err(Failure::Before(error)) => {
            // Whatever stays is found by the next change.
            let _ = bundle.settle();
            Err(error)
        }
        Err(unsure) => Err(unsure.into()),
    }
}

fn left_over(error: &Error) -> String {
    format!("files that nothing needs any more stay until the next change: {error}")
}

/// The state of the disk becomes a snapshot.
pub fn create(bundle: &mut Bundle<'_>, names: Names) -> Result<Created> {
    let descriptor = bundle.descriptor();
    changeable(bundle)?;
    check_name(descriptor, names.snapshot)?;
    let (old, top) = (descriptor.top, top_name(descriptor));
    let chain = descriptor.chain(old).map_err(descriptor_error)?;
    too_deep(chain.len())?;
    let mut below = Vec::new();
    for part in 0..descriptor.parts.len() {
        let opened = open(bundle, part, old)?;
        closed(&opened)?;
        check_size(&opened, part_len(descriptor, part)?)?;
        below.push(opened);
    }
    let images = empty_over(bundle, &below, names.file)?;
    settle(&below)?;
    let mut edits = vec![
        Edit::RenameImages {
            from: old,
            to: names.snapshot,
        },
        Edit::RenameShot {
            from: old,
            to: names.snapshot,
        },
    ];
    add_images(&mut edits, &images, top);
    edits.push(Edit::AddShot {
        guid: top,
        parent: Some(names.snapshot),
    });
    let warnings = with_new(bundle, &images, &below, Vec::new(), &edits)?;
    Ok(Created {
        guid: names.snapshot,
        files: images.into_iter().map(|image| image.name).collect(),
        then: None,
        warnings,
    })
}

/// Before images become a snapshot: what they show must be what they will show after a power cut.
fn settle(frozen: &[Opened]) -> Result<()> {
    let mut frozen = frozen.iter();
    frozen.try_for_each(|opened| opened.image.settled().map(drop))
}

fn too_deep(depth: usize) -> Result<()> {
    if depth >= CHAIN_MAX {
        let why = format!("the disk has {depth} images over one another, and ploop takes no more");
        return Err(Error::why(ErrorKind::Unsupported, why)
            .fix("delete a snapshot first: its content goes into its neighbour"));
    }
    Ok(())
}
