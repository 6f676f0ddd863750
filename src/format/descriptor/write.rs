//! The text of a new descriptor: one part, one image, no snapshot.
//!
//! Programs differ in what they can read. The root's name and its attribute decide for libphdi and
//! libvirt, which know only Parallels' own; `TopGUID` is an error for libphdi, and every program
//! takes the predefined GUID for the top without it. ploop reads both.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use super::ImageType;
use crate::format::chs::Chs;
use crate::format::guid::Guid;
use crate::format::xml;
use crate::units::SectorCount;
use std::fmt::Write;

/// Whose descriptor it is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// What all programs can read, and nothing else.
    Common,
    /// As Parallels Desktop writes it.
    Desktop,
    /// As ploop writes it.
    Virtuozzo,
}

/// What a new descriptor says.
#[derive(Clone, Copy, Debug)]
pub struct NewDescriptor<'a> {
    /// Whose it is like.
    pub style: Style,
    /// Size of the disk.
    pub size: SectorCount,
    /// Sectors of a cluster.
    pub blocksize: u32,
    /// What the image is.
    pub kind: ImageType,
    /// Every cluster has its place from the start.
    pub preallocated: bool,
    /// The image's file.
    pub file: &'a str,
    /// The disk's own GUID, which Parallels Desktop writes.
    pub uid: Guid,
    /// The disk's name, which Parallels Desktop writes.
    pub name: &'a str,
}

/// Writes elements at their depth.
struct Writer {
    text: String,
    open: Vec<&'static str>,
}

impl Writer {
    fn indent(&mut self) {
        for _ in 0..self.open.len() {
            self.text.push_str("    ");
        }
    }

    fn begin(&mut self, element: &'static str) {
        self.indent();
        let _ = writeln!(self.text, "<{element}>");
        // What follows a blank are attributes.
        self.open.push(element.split(' ').next().unwrap_or(element));
    }

    fn end(&mut self) {
        if let Some(element) = self.open.pop() {
            self.indent();
            let _ = writeln!(self.text, "</{element}>");
        }
    }

    fn put(&mut self, element: &str, value: impl std::fmt::Display) {
        self.indent();
        let value = escape(&value.to_string());
        let _ = writeln!(self.text, "<{element}>{value}</{element}>");
    }
}

/// Text as it stands between two tags. What XML cannot hold becomes a question mark, so that the
/// document is one in any case: who writes such a name has to refuse it before.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            // A reader would turn it into a line feed.
            '\r' => out.push_str("&#13;"),
            other if xml::can_hold(other) => out.push(other),
            _ => out.push('?'),
        }
    }
    out
}

/// The counters that Parallels Desktop keeps.
const MISCELLANEOUS: [&str; 12] = [
    "SuspendState",
    "ChangeState",
    "DupBlocksCnt",
    "CorruptBlocksCnt",
    "UnrefBlocksCnt",
    "OutOfDiskBlocksCnt",
    "BatOverlapBlocksCnt",
    "BlocksCnt",
    "TruncatedBlocksCnt",
    "ReferencedBlocksCnt",
    "Bootable",
    "ShutdownState",
];

/// The text.
#[must_use]
pub fn text(new: &NewDescriptor<'_>) -> String {
    let mut out = Writer {
        text: "<?xml version='1.0' encoding='UTF-8'?>\n".to_owned(),
        open: Vec::new(),
    };
    out.begin(match new.style {
        Style::Common | Style::Desktop => "Parallels_disk_image Version=\"1.0\"",
        Style::Virtuozzo => "Virtuozzo_disk_image",
    });
    parameters(new, &mut out);
    storage(new, &mut out);
    out.begin("Snapshots");
    if new.style == Style::Virtuozzo {
        out.put("TopGUID", Guid::TOP);
    }
    out.begin("Shot");
    out.put("GUID", Guid::TOP);
    out.put("ParentGUID", Guid::NONE);
    out.end();
    out.end();
    out.end();
    out.text
}

fn parameters(new: &NewDescriptor<'_>, out: &mut Writer) {
    let chs = Chs::of(new.size);
    out.begin("Disk_Parameters");
    out.put("Disk_size", new.size);
    out.put("Cylinders", chs.cylinders);
    if new.style == Style::Desktop {
        out.put("PhysicalSectorSize", 4096);
        out.put("LogicSectorSize", 512);
    }
    out.put("Heads", chs.heads);
    out.put("Sectors", chs.sectors);
    out.put("Padding", 0);
    if new.style == Style::Desktop {
        out.begin("Encryption");
        out.put("Engine", Guid::NONE);
        out.put("Data", "");
        out.put("Salt", "");
        out.end();
        out.put("UID", new.uid);
        out.put("Name", new.name);
        out.begin("Miscellaneous");
        out.put("CompatLevel", "level2");
        for counter in MISCELLANEOUS {
            out.put(counter, 0);
        }
        out.end();
    }
    out.end();
}

fn storage(new: &NewDescriptor<'_>, out: &mut Writer) {
    out.begin("StorageData");
    out.begin("Storage");
    out.put("Start", 0);
    out.put("End", new.size);
    out.put("Blocksize", new.blocksize);
    if new.preallocated && new.style == Style::Virtuozzo {
        out.put("Preallocated", 1);
    }
    out.begin("Image");
    out.put("GUID", Guid::TOP);
    out.put(
        "Type",
        match new.kind {
            ImageType::Compressed => "Compressed",
            ImageType::Plain => "Plain",
        },
    );
    out.put("File", new.file);
    out.end();
    out.end();
    out.end();
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::format::descriptor::{Descriptor, Root};

    fn new(style: Style, file: &str) -> NewDescriptor<'_> {
        NewDescriptor {
            style,
            size: SectorCount::new(204_800),
            blocksize: 2048,
            kind: ImageType::Compressed,
            preallocated: true,
            file,
            uid: Guid::random([7; 16]),
            name: "a <b> & c",
        }
    }

    #[test]
    fn every_style_reads_back_without_oddities() {
        for (style, root) in [
            (Style::Common, Root::Parallels),
            (Style::Desktop, Root::Parallels),
            (Style::Virtuozzo, Root::Virtuozzo),
        ] {
            for file in ["root.hds", "a&b<c>\u{e9} \"'\r\n\t\u{7f}\u{9f}.hds", " x "] {
                let text = text(&new(style, file));
                let read = Descriptor::parse(text.as_bytes()).unwrap();
                assert!(read.oddities.is_empty(), "{:?}", read.oddities);
                assert_eq!((&read.root, read.top), (&root, Guid::TOP));
                assert_eq!(read.disk_size.get(), 204_800);
                assert_eq!(read.parts.len(), 1);
                assert_eq!(read.parts[0].blocksize, Some(2048));
                assert_eq!(read.parts[0].images[0].file, file);
                assert_eq!(read.chain(read.top).unwrap(), [Guid::TOP]);
                assert_eq!(
                    text.contains("TopGUID") || text.contains("Preallocated"),
                    style == Style::Virtuozzo
                );
            }
        }
    }

    /// The order of Parallels Desktop 17's own elements.
    #[test]
    fn what_desktop_expects_is_there() {
        let text = text(&new(Style::Desktop, "x.hds"));
        let mut at = 0;
        for element in [
            "<Parallels_disk_image Version=\"1.0\">",
            "<Disk_size>204800<",
            "<Cylinders>400<",
            "<PhysicalSectorSize>4096<",
            "<LogicSectorSize>512<",
            "<Heads>16<",
            "<Sectors>32<",
            "<Padding>0<",
            "<Engine>{00000000-0000-0000-0000-000000000000}<",
            "<UID>{07070707-0707-4707-8707-070707070707}<",
            "<Name>a &lt;b&gt; &amp; c<",
            "<CompatLevel>level2<",
            "<ShutdownState>0<",
            "<Blocksize>2048<",
            "<Type>Compressed<",
            "<ParentGUID>{00000000",
        ] {
            let found = text[at..].find(element);
            at += found.unwrap_or_else(|| panic!("{element} is missing or too early"));
        }
    }
}
