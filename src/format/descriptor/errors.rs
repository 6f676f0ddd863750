//! What a descriptor can get wrong, and what is merely odd.

use crate::format::guid::Guid;
use crate::format::xml::XmlError;
use thiserror::Error;

/// Something that was tolerated.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Oddity {
    /// A root element that no known program writes.
    #[error("unknown root element <{0}>")]
    RootName(String),
    /// Neither a `TopGUID` nor a snapshot of the default name.
    #[error("no TopGUID; {0} is the only snapshot without children, so it is taken as the top")]
    TopGuessed(Guid),
    /// No tree of snapshots; there is one image, so there is no question.
    #[error("no Snapshots; the only image is taken as the top")]
    NoSnapshots,
    /// An image that belongs to nothing.
    #[error("image {0} belongs to no snapshot and is ignored")]
    ImageWithoutShot(Guid),
    /// The only part does not cover the disk.
    #[error("the part covers sectors {start} to {end} of {disk_size}; the file's own size is used")]
    Bounds {
        /// `Start`.
        start: u64,
        /// `End`.
        end: u64,
        /// `Disk_size`.
        disk_size: u64,
    },
    /// No usable `Blocksize`.
    #[error("part {0} has no usable Blocksize; the files' own is used")]
    Blocksize(usize),
    /// `Padding` is set.
    #[error("Padding is set, and writing to such a disk is undocumented")]
    Padding,
    /// A `Type` that is neither of the two.
    #[error("image {0} has an unknown Type; taken as Compressed")]
    ImageTypeWord(Guid),
    /// An interrupted or running operation of another program.
    #[error(
        "snapshot {0} is marked temporary: another program's operation runs or was interrupted"
    )]
    Temporary(Guid),
}

impl Oddity {
    /// True where reading is safe and writing is not.
    #[must_use]
    pub fn forbids_writing(&self) -> bool {
        matches!(self, Self::Bounds { .. } | Self::Padding)
    }
}

/// Why a descriptor is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// Not XML, or more of it than is reasonable.
    #[error(transparent)]
    Xml(#[from] XmlError),
    /// An element that decides something is absent.
    #[error("line {line}: no <{element}> here")]
    Missing {
        /// What is absent.
        element: &'static str,
        /// Line of the element that should contain it.
        line: usize,
    },
    /// Not a number, or one that cannot be.
    #[error("line {line}: <{element}> is no possible number")]
    Number {
        /// The element.
        element: &'static str,
        /// Its line.
        line: usize,
    },
    /// Not a GUID.
    #[error("line {line}: <{element}> is no GUID")]
    Guid {
        /// The element.
        element: &'static str,
        /// Its line.
        line: usize,
    },
    /// An image without a file name.
    #[error("line {line}: <File> is empty")]
    EmptyName {
        /// Its line.
        line: usize,
    },
    /// A file name that no host takes, and that would only fill a log.
    #[error("line {line}: a <File> of {len} bytes is longer than any name can be")]
    LongName {
        /// Its line.
        line: usize,
        /// Its length.
        len: usize,
    },
    /// More than [`super::IMAGES_MAX`].
    #[error("more than 4096 {0}")]
    TooMany(&'static str),
    /// A part without images.
    #[error("part {0} has no images")]
    NoImages(usize),
    /// Two snapshots of one name.
    #[error("line {line}: the snapshot {guid} is there twice")]
    DuplicateShot {
        /// The name.
        guid: Guid,
        /// Line of the second one.
        line: usize,
    },
    /// Two images of one snapshot in one part.
    #[error("line {line}: the snapshot {guid} has two images in one part")]
    DuplicateImage {
        /// The name.
        guid: Guid,
        /// Line of the second one.
        line: usize,
    },
    /// Split parts that do not join.
    #[error("part {part} starts at sector {start} instead of {expected}")]
    Gap {
        /// Number of the part, from 0.
        part: usize,
        /// Its `Start`.
        start: u64,
        /// Where the part before it ends.
        expected: u64,
    },
    /// A part that ends before it starts, or at its start.
    #[error("part {part} is empty: it ends at sector {end}")]
    EmptyPart {
        /// Number of the part, from 0.
        part: usize,
        /// Its `End`.
        end: u64,
    },
    /// Split parts that do not make up the disk.
    #[error("the parts end at sector {end}, the disk at {disk_size}")]
    WrongEnd {
        /// `End` of the last part.
        end: u64,
        /// `Disk_size`.
        disk_size: u64,
    },
    /// `TopGUID` names nothing.
    #[error("the top {0} is no snapshot of this disk")]
    TopUnknown(Guid),
    /// No `TopGUID`, and nothing that could only be the top.
    #[error("no TopGUID, and it is not clear which snapshot is the top")]
    NoTop,
    /// The lower files are in another bundle.
    #[error("line {line}: the disk continues in the parent volume that <Parent> names")]
    ParentVolume {
        /// Line of the element.
        line: usize,
    },
    /// Asked for a snapshot that does not exist.
    #[error("there is no snapshot {0}")]
    NoSuchShot(Guid),
    /// A snapshot whose parent does not exist.
    #[error("the parent {parent} of snapshot {guid} does not exist")]
    ParentMissing {
        /// The snapshot.
        guid: Guid,
        /// What it names as its parent.
        parent: Guid,
    },
    /// A snapshot that is below itself.
    #[error("the snapshot {0} is its own ancestor")]
    Cycle(Guid),
    /// A snapshot of the chain that a part has no file for.
    #[error("part {part} has no image for snapshot {guid}")]
    ImageMissing {
        /// The snapshot.
        guid: Guid,
        /// Number of the part, from 0.
        part: usize,
    },
}
