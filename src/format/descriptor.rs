//! `DiskDescriptor.xml`: which files make up the disk, and which snapshot each of them is.
//!
//! The descriptor lists the parts of the disk (one, unless it is split), in each part the images by
//! GUID, and apart from them the tree of snapshots by GUID. A chain of images is what a walk from a
//! snapshot to its root meets. What other programs tolerate is tolerated with a [`Oddity`]; what
//! would decide over data by guessing is refused.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

pub mod edit;
mod errors;
pub mod write;

pub use errors::{DescriptorError, Oddity};

use crate::format::guid::Guid;
use crate::format::xml::{self, child, children, line};
use crate::units::{ClusterSize, SectorCount};
use roxmltree::Node;
use std::collections::{HashMap, HashSet};

/// Deepest nesting of elements; real descriptors have five.
const DEPTH_MAX: usize = 16;
/// The most bytes of a text that is only shown.
const TEXT_MAX: usize = 256;
/// The longest file name with its directories that the host takes.
const NAME_MAX: usize = 4095;
/// The most images, and the most snapshots.
pub const IMAGES_MAX: usize = 4096;

/// Name of the root element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// `Parallels_disk_image`, as all but newer Virtuozzo writes it.
    Parallels,
    /// `Virtuozzo_disk_image`.
    Virtuozzo,
    /// Something else, which the readers of other programs mostly do not mind.
    Other(String),
}

/// What an image's `Type` says. The magic in the file decides all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageType {
    /// With header and BAT. Other programs take every word but `Plain` for this.
    Compressed,
    /// The disk's bytes and nothing else.
    Plain,
}

/// How the disk's contents are encrypted; they are never decrypted here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// ploop's: the id of a key.
    Key(String),
    /// Parallels Desktop's: the GUID of an engine.
    Engine(String),
}

/// A file of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The snapshot that it belongs to.
    pub guid: Guid,
    /// What the descriptor says that it is.
    pub kind: ImageType,
    /// Its name as written: relative to the descriptor's directory, or absolute.
    pub file: String,
}

/// A consecutive piece of the disk with files of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// First sector of the disk in this part.
    pub start: SectorCount,
    /// One past its last sector.
    pub end: SectorCount,
    /// Cluster size of its images in sectors, where a usable one is given.
    pub blocksize: Option<u32>,
    /// Its images in the order of the file.
    pub images: Vec<Image>,
}

/// A node of the tree of snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shot {
    /// Its name.
    pub guid: Guid,
    /// The snapshot below it; none for a root.
    pub parent: Option<Guid>,
    /// Left by an operation of another program that is still running or was interrupted.
    pub temporary: bool,
}

/// A checked descriptor: parts without gaps (the bounds of an only part mean nothing, see
/// [`Oddity::Bounds`]), every GUID unique where it must be, a top that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The root element.
    pub root: Root,
    /// Size of the disk.
    pub disk_size: SectorCount,
    /// `Padding` is set: Parallels' own documents forbid others to open such a disk.
    pub padding: bool,
    /// Whether the contents are encrypted.
    pub encryption: Option<Encryption>,
    /// The parts in disk order.
    pub parts: Vec<Part>,
    /// The snapshots, the top included, in the order of the file.
    pub snapshots: Vec<Shot>,
    /// The snapshot that is written to.
    pub top: Guid,
    /// What is odd.
    pub oddities: Vec<Oddity>,
}

impl Descriptor {
    /// Reads and checks a descriptor.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let document = xml::parse(xml::text_of(bytes)?, DEPTH_MAX)?;
        let root = document.root_element();
        let mut oddities = Vec::new();
        let name = match root.tag_name().name() {
            "Parallels_disk_image" => Root::Parallels,
            "Virtuozzo_disk_image" => Root::Virtuozzo,
            other => {
                let other = xml::printable(other, TEXT_MAX);
                oddities.push(Oddity::RootName(other.clone()));
                Root::Other(other)
            }
        };
        let parameters = required(root, "Disk_Parameters")?;
        let disk_size = sectors(required(parameters, "Disk_size")?, "Disk_size")?;
        let padding = child(parameters, "Padding")
            .is_some_and(|node| !matches!(xml::text(node).trim(), "" | "0"));
        if padding {
            oddities.push(Oddity::Padding);
        }
        let storage_data = required(root, "StorageData")?;
        refuse_parent_volume(storage_data)?;
        let mut parts = parts(storage_data, disk_size, &mut oddities)?;
        check_bounds(&mut parts, disk_size, &mut oddities)?;
        let (snapshots, top) = snapshots(root, &parts, &mut oddities)?;
        let encryption = encryption(parameters);
        Ok(Self {
            root: name,
            disk_size,
            padding,
            encryption,
            parts,
            snapshots,
            top,
            oddities,
        })
    }

    /// The snapshots from a root up to this one, the root first.
    pub fn chain(&self, guid: Guid) -> Result<Vec<Guid>, DescriptorError> {
        let parents: HashMap<Guid, Option<Guid>> = self
            .snapshots
            .iter()
            .map(|shot| (shot.guid, shot.parent))
            .collect();
        let mut chain = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some(guid);
        while let Some(guid) = next {
            let Some(parent) = parents.get(&guid) else {
                return Err(match chain.last() {
                    Some(child) => DescriptorError::ParentMissing {
                        guid: *child,
                        parent: guid,
                    },
                    None => DescriptorError::NoSuchShot(guid),
                });
            };
            if !seen.insert(guid) {
                return Err(DescriptorError::Cycle(guid));
            }
            chain.push(guid);
            next = *parent;
        }
        chain.reverse();
        Ok(chain)
    }

    /// The images of these snapshots in a part, in the same order.
    pub fn images(&self, part: usize, chain: &[Guid]) -> Result<Vec<&Image>, DescriptorError> {
        let images = self.parts.get(part).map_or(&[][..], |part| &part.images);
        let by_guid: HashMap<Guid, &Image> =
            images.iter().map(|image| (image.guid, image)).collect();
        let find = |guid: &Guid| {
            let missing = DescriptorError::ImageMissing { guid: *guid, part };
            by_guid.get(guid).copied().ok_or(missing)
        };
        chain.iter().map(find).collect()
    }

    /// The frozen snapshots: all but the top, parents before children.
    #[must_use]
    pub fn frozen(&self) -> Vec<&Shot> {
        let mut below: HashMap<Option<Guid>, Vec<&Shot>> = HashMap::new();
        let known: HashSet<Guid> = self.snapshots.iter().map(|shot| shot.guid).collect();
        for shot in &self.snapshots {
            // One with a missing parent is listed all the same, as if it were a root.
            let parent = shot.parent.filter(|parent| known.contains(parent));
            below.entry(parent).or_default().push(shot);
        }
        let mut order = below.remove(&None).unwrap_or_default();
        let mut at = 0_usize;
        while let Some(shot) = order.get(at) {
            at = at.saturating_add(1);
            let children = below.remove(&Some(shot.guid)).unwrap_or_default();
            order.extend(children);
        }
        order.retain(|shot| shot.guid != self.top);
        order
    }
}

fn required<'a, 'i>(
    node: Node<'a, 'i>,
    element: &'static str,
) -> Result<Node<'a, 'i>, DescriptorError> {
    child(node, element).ok_or_else(|| DescriptorError::Missing {
        element,
        line: line(node),
    })
}

/// A number as other programs read it: decimal, or hexadecimal behind `0x`.
fn number(node: Node<'_, '_>) -> Option<u64> {
    let text = xml::text(node);
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        None if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

/// A number of sectors whose bytes fit a file size.
fn sectors(node: Node<'_, '_>, element: &'static str) -> Result<SectorCount, DescriptorError> {
    number(node)
        .map(SectorCount::new)
        .filter(|count| {
            count
                .bytes()
                .is_some_and(|bytes| i64::try_from(bytes).is_ok())
        })
        .ok_or_else(|| DescriptorError::Number {
            element,
            line: line(node),
        })
}

fn guid(node: Node<'_, '_>, element: &'static str) -> Result<Guid, DescriptorError> {
    Guid::parse(xml::text(node).trim()).ok_or_else(|| DescriptorError::Guid {
        element,
        line: line(node),
    })
}

fn encryption(parameters: Node<'_, '_>) -> Option<Encryption> {
    let node = child(parameters, "Encryption")?;
    let word = |name| {
        let text = child(node, name).map(xml::text)?;
        Some(xml::printable(text.trim(), TEXT_MAX)).filter(|text| !text.is_empty())
    };
    if let Some(key) = word("KeyId") {
        return Some(Encryption::Key(key));
    }
    let engine = word("Engine")?;
    (Guid::parse(&engine) != Some(Guid::NONE)).then_some(Encryption::Engine(engine))
}

fn refuse_parent_volume(storage_data: Node<'_, '_>) -> Result<(), DescriptorError> {
    let parent = child(storage_data, "Volume").and_then(|volume| child(volume, "Parent"));
    match parent {
        Some(node) if !xml::text(node).trim().is_empty() => {
            Err(DescriptorError::ParentVolume { line: line(node) })
        }
        _ => Ok(()),
    }
}

fn parts(
    storage_data: Node<'_, '_>,
    disk_size: SectorCount,
    oddities: &mut Vec<Oddity>,
) -> Result<Vec<Part>, DescriptorError> {
    let nodes: Vec<_> = children(storage_data, "Storage")
        .take(IMAGES_MAX + 1)
        .collect();
    if nodes.len() > IMAGES_MAX {
        return Err(DescriptorError::TooMany("parts"));
    }
    if nodes.is_empty() {
        return Err(DescriptorError::Missing {
            element: "Storage",
            line: line(storage_data),
        });
    }
    let mut images_left = IMAGES_MAX;
    let mut parts = Vec::with_capacity(nodes.len());
    for (number_of_part, node) in nodes.iter().enumerate() {
        let bound = |element, default: SectorCount| match child(*node, element) {
            Some(bound) => sectors(bound, element),
            // A disk of one part is clear without; Desktop and ploop always write it.
            None if nodes.len() == 1 => Ok(default),
            None => Err(DescriptorError::Missing {
                element,
                line: line(*node),
            }),
        };
        let (start, end) = (bound("Start", SectorCount::ZERO)?, bound("End", disk_size)?);
        let blocksize = child(*node, "Blocksize")
            .and_then(number)
            .and_then(|sectors| u32::try_from(sectors).ok())
            .filter(|sectors| ClusterSize::from_sectors(*sectors).is_some());
        if blocksize.is_none() {
            oddities.push(Oddity::Blocksize(number_of_part));
        }
        let images = images(*node, &mut images_left, oddities)?;
        if images.is_empty() {
            return Err(DescriptorError::NoImages(number_of_part));
        }
        parts.push(Part {
            start,
            end,
            blocksize,
            images,
        });
    }
    // Desktop writes the parts in order, but nothing says that it must.
    parts.sort_by_key(|part| part.start);
    Ok(parts)
}

fn images(
    storage: Node<'_, '_>,
    left: &mut usize,
    oddities: &mut Vec<Oddity>,
) -> Result<Vec<Image>, DescriptorError> {
    let mut images = Vec::new();
    let mut seen = HashSet::new();
    for node in children(storage, "Image") {
        *left = left
            .checked_sub(1)
            .ok_or(DescriptorError::TooMany("images"))?;
        let guid = guid(required(node, "GUID")?, "GUID")?;
        if !seen.insert(guid) {
            return Err(DescriptorError::DuplicateImage {
                guid,
                line: line(node),
            });
        }
        let word = child(node, "Type").map(xml::text).unwrap_or_default();
        let kind = match word.trim() {
            "Plain" => ImageType::Plain,
            "Compressed" => ImageType::Compressed,
            _ => {
                oddities.push(Oddity::ImageTypeWord(guid));
                ImageType::Compressed
            }
        };
        let file = required(node, "File")?;
        // Not trimmed: a blank may be part of a name, and other programs keep it.
        let name = xml::text(file);
        if name.is_empty() {
            return Err(DescriptorError::EmptyName { line: line(file) });
        }
        if name.len() > NAME_MAX {
            return Err(DescriptorError::LongName {
                line: line(file),
                len: name.len(),
            });
        }
        images.push(Image {
            guid,
            kind,
            file: name,
        });
    }
    Ok(images)
}

/// Parts of a split disk must join and make up the disk. The bounds of an only part decide nothing
/// that its file does not say itself, and other programs ignore them.
fn check_bounds(
    parts: &mut [Part],
    disk_size: SectorCount,
    oddities: &mut Vec<Oddity>,
) -> Result<(), DescriptorError> {
    if let [only] = parts {
        if only.start != SectorCount::ZERO || only.end != disk_size {
            let (start, end, disk_size) = (only.start.get(), only.end.get(), disk_size.get());
            oddities.push(Oddity::Bounds {
                start,
                end,
                disk_size,
            });
        }
        return Ok(());
    }
    let mut expected = SectorCount::ZERO;
    for (number, part) in parts.iter().enumerate() {
        if part.start != expected {
            let (start, expected) = (part.start.get(), expected.get());
            return Err(DescriptorError::Gap {
                part: number,
                start,
                expected,
            });
        }
        if part.end <= part.start {
            return Err(DescriptorError::EmptyPart {
                part: number,
                end: part.end.get(),
            });
        }
        expected = part.end;
    }
    if expected != disk_size {
        let (end, disk_size) = (expected.get(), disk_size.get());
        return Err(DescriptorError::WrongEnd { end, disk_size });
    }
    Ok(())
}

fn snapshots(
    root: Node<'_, '_>,
    parts: &[Part],
    oddities: &mut Vec<Oddity>,
) -> Result<(Vec<Shot>, Guid), DescriptorError> {
    let Some(node) = child(root, "Snapshots") else {
        return only_image(root, parts, oddities);
    };
    let mut shots = Vec::new();
    let mut seen = HashSet::new();
    for shot in children(node, "Shot") {
        if shots.len() >= IMAGES_MAX {
            return Err(DescriptorError::TooMany("snapshots"));
        }
        let own = guid(required(shot, "GUID")?, "GUID")?;
        let parent = guid(required(shot, "ParentGUID")?, "ParentGUID")?;
        if !seen.insert(own) {
            return Err(DescriptorError::DuplicateShot {
                guid: own,
                line: line(shot),
            });
        }
        let temporary = ["Temporary", "TemporaryZero", "TemporaryZeroSwap"]
            .iter()
            .any(|mark| child(shot, mark).is_some());
        if temporary {
            oddities.push(Oddity::Temporary(own));
        }
        shots.push(Shot {
            guid: own,
            parent: Some(parent).filter(|p| p.is_some()),
            temporary,
        });
    }
    let mut told = HashSet::new();
    for image in parts.iter().flat_map(|part| &part.images) {
        if !seen.contains(&image.guid) && told.insert(image.guid) {
            oddities.push(Oddity::ImageWithoutShot(image.guid));
        }
    }
    let named = child(node, "TopGUID").filter(|top| !xml::text(*top).trim().is_empty());
    let top = match named.map(|top| guid(top, "TopGUID")).transpose()? {
        Some(top) if seen.contains(&top) => top,
        Some(top) => return Err(DescriptorError::TopUnknown(top)),
        None if seen.contains(&Guid::TOP) => Guid::TOP,
        None => {
            let parents: HashSet<Guid> = shots.iter().filter_map(|shot| shot.parent).collect();
            let mut leaves = shots.iter().filter(|shot| !parents.contains(&shot.guid));
            match (leaves.next(), leaves.next()) {
                (Some(leaf), None) => {
                    oddities.push(Oddity::TopGuessed(leaf.guid));
                    leaf.guid
                }
                _ => return Err(DescriptorError::NoTop),
            }
        }
    };
    Ok((shots, top))
}

/// Without a tree there must be exactly one image (in every part the same), and it is the top.
fn only_image(
    root: Node<'_, '_>,
    parts: &[Part],
    oddities: &mut Vec<Oddity>,
) -> Result<(Vec<Shot>, Guid), DescriptorError> {
    let missing = DescriptorError::Missing {
        element: "Snapshots",
        line: line(root),
    };
    let mut top = None;
    for part in parts {
        match (part.images.as_slice(), top) {
            ([image], None) => top = Some(image.guid),
            ([image], Some(guid)) if image.guid == guid => {}
            _ => return Err(missing),
        }
    }
    let guid = top.ok_or(missing)?;
    oddities.push(Oddity::NoSnapshots);
    Ok((
        vec![Shot {
            guid,
            parent: None,
            temporary: false,
        }],
        guid,
    ))
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests;
