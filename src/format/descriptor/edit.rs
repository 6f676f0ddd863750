//! Changes to a descriptor that leave every byte alone that they do not mean.
//!
//! An edit is a list of splices into the text, found by the byte ranges of its elements: what is
//! not understood, attributes, comments, order, indentation, line ends and a byte order mark
//! survive as they are. New elements are laid out as their neighbours are.
//!
//! The same edits are also carried out on the parsed [`Descriptor`]. The new text is parsed, and
//! given away only if it means that.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

mod value;

pub use value::with_uid;

use super::{DEPTH_MAX, Descriptor, DescriptorError, Image, ImageType, Oddity, Shot, sectors};
use crate::format::guid::Guid;
use crate::format::xml::{self, child, children};
use crate::units::SectorCount;
use roxmltree::{Document, Node};
use std::ops::Range;
use thiserror::Error;

/// The elements that mark a snapshot as one of an operation.
const MARKS: [&str; 3] = ["Temporary", "TemporaryZero", "TemporaryZeroSwap"];

/// One change. All changes of a list speak of the descriptor as it was before the first of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// The disk has this size, and so its last part another end; the cylinders follow.
    DiskSize(SectorCount),
    /// The images of one snapshot, in every part, are those of another.
    RenameImages {
        /// What they are named now.
        from: Guid,
        /// What they are named then.
        to: Guid,
    },
    /// A snapshot has another name, for itself and for its children.
    RenameShot {
        /// What it is named now.
        from: Guid,
        /// What it is named then.
        to: Guid,
    },
    /// A part has one image more, behind all others.
    AddImage {
        /// Number of the part in disk order.
        part: usize,
        /// The image.
        image: Image,
    },
    /// The images of a snapshot, in every part, are gone.
    RemoveImages(Guid),
    /// There is one snapshot more, behind all others.
    AddShot {
        /// Its name.
        guid: Guid,
        /// What it was made from.
        parent: Option<Guid>,
    },
    /// A snapshot is gone.
    RemoveShot(Guid),
    /// A snapshot has another parent.
    SetParent {
        /// The snapshot.
        guid: Guid,
        /// Its parent; none for a root.
        parent: Option<Guid>,
    },
    /// A snapshot is marked as one that is going away.
    Mark(Guid),
}

/// Why a descriptor is not changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EditError {
    /// It cannot be read, before or after the change.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// What a change speaks of is not there.
    #[error("there is no {0} to be changed")]
    Absent(&'static str),
    /// The text is written in a way that cannot be changed in place.
    #[error("the descriptor is written in a way that cannot be changed without damage")]
    Layout,
}

impl Descriptor {
    /// What the descriptor means after these changes.
    #[must_use]
    pub fn edited(&self, edits: &[Edit]) -> Self {
        let mut new = self.clone();
        for edit in edits {
            edit.remove(&mut new);
        }
        for edit in edits {
            edit.change(self, &mut new);
        }
        for edit in edits {
            edit.add(&mut new);
        }
        new.guess_top();
        new
    }

    /// Where no element names the top, the tree does.
    fn guess_top(&mut self) {
        let guessed = |odd: &Oddity| matches!(odd, Oddity::TopGuessed(_) | Oddity::NoSnapshots);
        if !self.oddities.iter().any(guessed) {
            return;
        }
        let shots = self.snapshots.iter();
        let is_parent = |guid: Guid| self.snapshots.iter().any(|shot| shot.parent == Some(guid));
        let predefined = shots.clone().find(|shot| shot.guid == Guid::TOP);
        let mut leaves = shots.filter(|shot| !is_parent(shot.guid));
        if let Some(top) = predefined.or_else(|| leaves.next()) {
            self.top = top.guid;
        }
    }

    fn means_the_same(&self, other: &Self) -> bool {
        // What is odd about it may differ: an image without a snapshot may have got one.
        Self {
            oddities: Vec::new(),
            ..self.clone()
        } == Self {
            oddities: Vec::new(),
            ..other.clone()
        }
    }
}

impl Edit {
    fn remove(&self, new: &mut Descriptor) {
        match self {
            Self::RemoveImages(guid) => {
                for part in &mut new.parts {
                    part.images.retain(|image| image.guid != *guid);
                }
            }
            Self::RemoveShot(guid) => new.snapshots.retain(|shot| shot.guid != *guid),
            _ => {}
        }
    }

    fn change(&self, old: &Descriptor, new: &mut Descriptor) {
        match self {
            Self::DiskSize(size) => {
                new.disk_size = *size;
                if let Some(last) = new.parts.last_mut() {
                    last.end = *size;
                }
            }
            Self::RenameImages { from, to } => {
                for (part, old) in new.parts.iter_mut().zip(&old.parts) {
                    // By its file: another image may have been given the name meanwhile.
                    let Some(old) = old.images.iter().find(|image| image.guid == *from) else {
                        continue;
                    };
                    for image in part.images.iter_mut().filter(|i| i.file == old.file) {
                        image.guid = *to;
                    }
                }
            }
            Self::RenameShot { from, to } => {
                for shot in &mut new.snapshots {
                    if shot.guid == *from {
                        shot.guid = *to;
                    }
                    if shot.parent == Some(*from) {
                        shot.parent = Some(*to);
                    }
                }
            }
            Self::SetParent { guid, parent } => {
                for shot in new.snapshots.iter_mut().filter(|shot| shot.guid == *guid) {
                    shot.parent = *parent;
                }
            }
            Self::Mark(guid) => {
                for shot in new.snapshots.iter_mut().filter(|shot| shot.guid == *guid) {
                    shot.temporary = true;
                }
            }
            _ => {}
        }
    }

    fn add(&self, new: &mut Descriptor) {
        match self {
            Self::AddImage { part, image } => {
                if let Some(part) = new.parts.get_mut(*part) {
                    part.images.push(image.clone());
                }
            }
            Self::AddShot { guid, parent } => new.snapshots.push(Shot {
                guid: *guid,
                parent: *parent,
                temporary: false,
            }),
            _ => {}
        }
    }
}

/// The text with these changes made.
pub fn edit(bytes: &[u8], edits: &[Edit]) -> Result<Vec<u8>, EditError> {
    let old = Descriptor::parse(bytes)?;
    let text = xml::text_of(bytes).map_err(DescriptorError::from)?;
    let body = bytes.len().saturating_sub(text.len());
    let mark = bytes.get(..body).unwrap_or_default();
    let whole = with_snapshots(text, &old, edits)?;
    let new = splice(&whole, edits)?;
    let mut result = Vec::with_capacity(mark.len().saturating_add(new.len()));
    result.extend_from_slice(mark);
    result.extend_from_slice(new.as_bytes());
    let meant = old.edited(edits);
    if !Descriptor::parse(&result)?.means_the_same(&meant) {
        return Err(EditError::Layout);
    }
    Ok(result)
}

/// The text with a tree of snapshots, where it has none and the changes need one.
fn with_snapshots(text: &str, old: &Descriptor, edits: &[Edit]) -> Result<String, EditError> {
    let document = xml::parse(text, DEPTH_MAX).map_err(DescriptorError::from)?;
    let root = document.root_element();
    let about_size = |edit: &Edit| matches!(edit, Edit::DiskSize(_));
    if child(root, "Snapshots").is_some() || edits.iter().all(about_size) {
        return Ok(text.to_owned());
    }
    let last = root.children().rfind(Node::is_element);
    let last = last.ok_or(EditError::Layout)?;
    let gap = gap_before(text, last.range().start);
    let mut tree = String::from("<Snapshots>");
    for shot in &old.snapshots {
        tree.push_str(&element(
            "Shot",
            &shot_fields(shot.guid, shot.parent),
            gap,
            gap,
        ));
    }
    let tree = format!("{gap}{tree}{gap}</Snapshots>");
    apply(text, vec![(last.range().end..last.range().end, tree)])
}

fn shot_fields(guid: Guid, parent: Option<Guid>) -> [(&'static str, String); 2] {
    [
        ("GUID", guid.to_string()),
        ("ParentGUID", parent.unwrap_or(Guid::NONE).to_string()),
    ]
}

type Splice = (Range<usize>, String);

/// Carries splices out; they must not overlap.
fn apply(text: &str, mut splices: Vec<Splice>) -> Result<String, EditError> {
    splices.sort_by_key(|(range, _)| (range.start, range.end));
    let mut new = String::with_capacity(text.len());
    let mut at = 0;
    for (range, with) in splices {
        let kept = text.get(at..range.start).ok_or(EditError::Layout)?;
        new.push_str(kept);
        new.push_str(&with);
        at = range.end;
    }
    new.push_str(text.get(at..).ok_or(EditError::Layout)?);
    Ok(new)
}

fn splice(text: &str, edits: &[Edit]) -> Result<String, EditError> {
    let document = xml::parse(text, DEPTH_MAX).map_err(DescriptorError::from)?;
    let mut work = Work {
        text,
        splices: Vec::new(),
        storages: storages(&document)?,
        root: document.root_element(),
    };
    for edit in edits {
        work.one(edit)?;
    }
    apply(text, work.splices)
}

/// The parts in disk order.
fn storages<'a, 'i>(document: &'a Document<'i>) -> Result<Vec<Node<'a, 'i>>, EditError> {
    let data = child(document.root_element(), "StorageData");
    let data = data.ok_or(EditError::Absent("<StorageData>"))?;
    let mut found = Vec::new();
    for node in children(data, "Storage") {
        let start = match child(node, "Start") {
            Some(start) => sectors(start, "Start")?,
            None => SectorCount::ZERO,
        };
        found.push((start, node));
    }
    found.sort_by_key(|(start, _)| *start);
    Ok(found.into_iter().map(|(_, node)| node).collect())
}

struct Work<'a, 'i> {
    text: &'a str,
    splices: Vec<Splice>,
    storages: Vec<Node<'a, 'i>>,
    root: Node<'a, 'i>,
}

/// The GUID in a child of this name.
fn named(node: Node<'_, '_>, field: &'static str) -> Option<Guid> {
    Guid::parse(xml::text(child(node, field)?).trim())
}

impl<'a, 'i> Work<'a, 'i> {
    fn shots(&self) -> Vec<Node<'a, 'i>> {
        let tree = child(self.root, "Snapshots");
        let shots = tree.map(|tree| children(tree, "Shot").collect());
        shots.unwrap_or_default()
    }

    fn shot(&self, guid: Guid) -> Result<Node<'a, 'i>, EditError> {
        let mut shots = self.shots().into_iter();
        let found = shots.find(|shot| named(*shot, "GUID") == Some(guid));
        found.ok_or(EditError::Absent("such snapshot"))
    }

    /// The images of a snapshot in all parts.
    fn images(&self, guid: Guid) -> Result<Vec<Node<'a, 'i>>, EditError> {
        let all = self
            .storages
            .iter()
            .flat_map(|node| children(*node, "Image"));
        let found: Vec<_> = all
            .filter(|image| named(*image, "GUID") == Some(guid))
            .collect();
        if found.is_empty() {
            return Err(EditError::Absent("image of the snapshot"));
        }
        Ok(found)
    }

    fn one(&mut self, edit: &Edit) -> Result<(), EditError> {
        match edit {
            Edit::DiskSize(size) => self.disk_size(*size),
            Edit::RenameImages { from, to } => {
                for image in self.images(*from)? {
                    self.set(image, "GUID", &to.to_string())?;
                }
                Ok(())
            }
            Edit::RenameShot { from, to } => {
                let shot = self.shot(*from)?;
                self.set(shot, "GUID", &to.to_string())?;
                for shot in self.shots() {
                    if named(shot, "ParentGUID") == Some(*from) {
                        self.set(shot, "ParentGUID", &to.to_string())?;
                    }
                }
                Ok(())
            }
            Edit::AddImage { part, image } => self.add_image(*part, image),
            Edit::RemoveImages(guid) => {
                for image in self.images(*guid)? {
                    self.remove(image);
                }
                Ok(())
            }
            Edit::AddShot { guid, parent } => {
                let last = self.shots().into_iter().next_back();
                let last = last.ok_or(EditError::Absent("<Shot>"))?;
                self.insert_after(last, "Shot", &shot_fields(*guid, *parent));
                Ok(())
            }
            Edit::RemoveShot(guid) => {
                let shot = self.shot(*guid)?;
                self.remove(shot);
                Ok(())
            }
            Edit::SetParent { guid, parent } => {
                let shot = self.shot(*guid)?;
                let parent = parent.unwrap_or(Guid::NONE).to_string();
                self.set(shot, "ParentGUID", &parent)
            }
            Edit::Mark(guid) => self.mark(*guid),
        }
    }

    fn mark(&mut self, guid: Guid) -> Result<(), EditError> {
        let shot = self.shot(guid)?;
        if MARKS.iter().any(|mark| child(shot, mark).is_some()) {
            return Ok(());
        }
        let last = shot.children().rfind(Node::is_element);
        let last = last.ok_or(EditError::Layout)?.range();
        let gap = gap_before(self.text, last.start);
        let mark = format!("{gap}<Temporary/>");
        self.splices.push((last.end..last.end, mark));
        Ok(())
    }

    fn disk_size(&mut self, size: SectorCount) -> Result<(), EditError> {
        let parameters = child(self.root, "Disk_Parameters");
        let parameters = parameters.ok_or(EditError::Absent("<Disk_Parameters>"))?;
        self.set(parameters, "Disk_size", &size.to_string())?;
        let number = |name| {
            let text = child(parameters, name).map(xml::text)?;
            text.trim().parse::<u64>().ok()
        };
        let track = number("Heads").zip(number("Sectors"));
        let track = track.and_then(|(heads, sectors)| heads.checked_mul(sectors));
        let cylinders = track.and_then(|track| size.get().checked_div(track));
        if let (Some(cylinders), true) = (cylinders, number("Cylinders").is_some()) {
            self.set(parameters, "Cylinders", &cylinders.to_string())?;
        }
        match self.storages.last().copied() {
            Some(last) if child(last, "End").is_some() => self.set(last, "End", &size.to_string()),
            _ => Ok(()),
        }
    }

    fn add_image(&mut self, part: usize, image: &Image) -> Result<(), EditError> {
        let storage = self.storages.get(part).copied();
        let storage = storage.ok_or(EditError::Absent("such part"))?;
        let last = children(storage, "Image").last();
        let last = last.ok_or(EditError::Absent("<Image>"))?;
        let kind = match image.kind {
            ImageType::Compressed => "Compressed",
            ImageType::Plain => "Plain",
        };
        let fields = [
            ("GUID", image.guid.to_string()),
            ("Type", kind.to_owned()),
            ("File", escaped(&image.file)),
        ];
        self.insert_after(last, "Image", &fields);
        Ok(())
    }

    /// Replaces the text of a child, and leaves blanks around it and comments alone.
    fn set(&mut self, node: Node<'_, '_>, field: &'static str, to: &str) -> Result<(), EditError> {
        let node = child(node, field).ok_or(EditError::Absent("element"))?;
        let splices = value::exchange(self.text, node, to).ok_or(EditError::Layout)?;
        self.splices.extend(splices);
        Ok(())
    }

    /// Removes an element with the blanks before it.
    fn remove(&mut self, node: Node<'_, '_>) {
        let range = node.range();
        let gap = gap_before(self.text, range.start).len();
        let start = range.start.saturating_sub(gap);
        self.splices.push((start..range.end, String::new()));
    }

    /// Puts an element behind one of its kind, laid out as that is.
    fn insert_after(&mut self, model: Node<'_, '_>, name: &str, fields: &[(&str, String)]) {
        let range = model.range();
        let outer = gap_before(self.text, range.start);
        let first = model.children().find(Node::is_element);
        let inner = first.map_or("", |first| gap_before(self.text, first.range().start));
        let new = element(name, fields, outer, inner);
        self.splices.push((range.end..range.end, new));
    }
}

/// An element with these children, each after the blanks `inner`, and itself after `outer`.
fn element(name: &str, fields: &[(&str, String)], outer: &str, inner: &str) -> String {
    let mut text = format!("{outer}<{name}>");
    for (field, value) in fields {
        text.push_str(&format!("{inner}<{field}>{value}</{field}>"));
    }
    // What has its children on one line has its end there too.
    let end = if inner.contains('\n') { outer } else { "" };
    text.push_str(&format!("{end}</{name}>"));
    text
}

/// The blanks before a place.
fn gap_before(text: &str, at: usize) -> &str {
    let before = text.get(..at).unwrap_or_default();
    let kept = before.trim_end_matches([' ', '\t', '\r', '\n']).len();
    before.get(kept..).unwrap_or_default()
}

/// A text as it must stand between tags.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            // A bare one would be read as a line feed.
            '\r' => out.push_str("&#13;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests;
