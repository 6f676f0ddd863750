//! Writes a whole bundle: parts, chains, file names and descriptor, in either product's style.
//!
//! Imports: `content`, `image`.
//! Never: reads anything back.
//!
//! Every part has the same number of levels, since a snapshot is one of the whole disk. The same
//! description gives the [`Model`] with which a test knows what must be read.

use super::content::{self, Level, Model, Part, SECTOR};
use super::image::{self, ImageSpec};
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// GUID of the top where a descriptor names none.
pub(crate) const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
/// Parent of the base.
pub(crate) const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

/// How files are named, and what else lies in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// `root.hds`, `root.hds.{guid}`; root element `Virtuozzo_disk_image`.
    Ploop,
    /// `name.hdd.k.{guid}.hds`, an empty `name.hdd`; root element with `Version="1.0"`.
    Parallels,
}

/// A bundle.
#[derive(Clone, Debug)]
pub(crate) struct BundleSpec {
    /// Names of the files.
    pub(crate) style: Style,
    /// Write `TopGUID`.
    pub(crate) top_guid: bool,
    /// The top's GUID is the predefined one (a must without `TopGUID`).
    pub(crate) top_predefined: bool,
    /// Seed of the GUIDs.
    pub(crate) seed: u64,
    /// The disk.
    pub(crate) parts: Vec<Part>,
}

/// The GUID of a level's snapshot.
pub(crate) fn guid(seed: u64, level: usize) -> String {
    let a = content::mix(&[seed, level as u64, 1]);
    let b = content::mix(&[seed, level as u64, 2]);
    format!(
        "{{{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}}}",
        a >> 32,
        a >> 16 & 0xffff,
        a & 0xfff,
        b >> 52,
        b & 0xffff_ffff_ffff
    )
}

impl BundleSpec {
    /// A bundle of one part with these levels, base first; they get their numbers here.
    pub(crate) fn new(style: Style, levels: Vec<Level>) -> Self {
        let mut spec = Self {
            style,
            top_guid: style == Style::Ploop,
            top_predefined: true,
            seed: 7,
            parts: Vec::new(),
        };
        spec.push_part(levels);
        spec
    }

    /// Adds a part after those there are; its size is that of its top.
    pub(crate) fn push_part(&mut self, mut levels: Vec<Level>) {
        let start = self.parts.last().map_or(0, |part| part.end);
        for (number, level) in levels.iter_mut().enumerate() {
            match level {
                Level::Plain { level, .. } => *level = number as u16,
                Level::Image(image) => {
                    image.level = number as u16;
                    image.disk_start = start;
                }
            }
        }
        let sectors = match levels.last() {
            Some(Level::Plain { bytes, .. }) => bytes / SECTOR,
            Some(Level::Image(image)) => image.disk_sectors,
            None => 0,
        };
        self.parts.push(Part {
            start,
            end: start + sectors,
            levels,
        });
    }

    /// A chain of images over one another, all alike but for what `each` changes.
    pub(crate) fn chain(
        style: Style,
        like: &ImageSpec,
        depth: usize,
        each: impl Fn(usize, &mut ImageSpec),
    ) -> Self {
        let levels = (0..depth).map(|number| {
            let mut image = like.clone();
            each(number, &mut image);
            Level::Image(image)
        });
        Self::new(style, levels.collect())
    }

    /// The bytes that the disk must show.
    pub(crate) fn model(&self) -> Model {
        Model {
            parts: self.parts.clone(),
        }
    }

    /// Levels of the chain.
    pub(crate) fn depth(&self) -> usize {
        self.parts.first().map_or(0, |part| part.levels.len())
    }

    /// GUID of a level.
    pub(crate) fn guid(&self, level: usize) -> String {
        if level + 1 == self.depth() && self.top_predefined {
            return TOP.to_string();
        }
        guid(self.seed, level)
    }

    /// File name of a level of a part; `name` is the bundle's own.
    pub(crate) fn file_name(&self, name: &str, part: usize, level: usize) -> String {
        match self.style {
            Style::Parallels => format!("{name}.{part}.{}.hds", self.guid(level)),
            Style::Ploop => {
                let root = if part == 0 {
                    "root.hds".into()
                } else {
                    format!("root.{part}.hds")
                };
                // The GUID in the name is the file's own and need not be the snapshot's.
                match level {
                    0 => root,
                    _ => format!("{root}.{}", guid(self.seed ^ 0xf11e, level)),
                }
            }
        }
    }

    /// Paths of the files of a part, base first.
    pub(crate) fn files(&self, dir: &Path, part: usize) -> Vec<PathBuf> {
        let name = base_name(dir);
        (0..self.depth())
            .map(|level| dir.join(self.file_name(&name, part, level)))
            .collect()
    }

    /// Writes the bundle as a new directory.
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let name = base_name(dir);
        for (number, part) in self.parts.iter().enumerate() {
            for (level, path) in part.levels.iter().zip(self.files(dir, number)) {
                match level {
                    Level::Plain { seed, level, bytes } => {
                        image::write_plain(&path, *seed, *level, part.start, *bytes)?;
                    }
                    Level::Image(image) => image.write(&path)?,
                }
            }
        }
        if self.style == Style::Parallels {
            fs::write(dir.join(&name), b"")?;
        }
        fs::write(dir.join("DiskDescriptor.xml"), self.descriptor(&name))
    }

    /// The text of the descriptor.
    pub(crate) fn descriptor(&self, name: &str) -> String {
        let (root, attribute) = match self.style {
            Style::Ploop => ("Virtuozzo_disk_image", ""),
            Style::Parallels => ("Parallels_disk_image", " Version=\"1.0\""),
        };
        let size = self.parts.last().map_or(0, |part| part.end);
        let mut xml = format!("<?xml version=\"1.0\"?>\n<{root}{attribute}>\n");
        let _ = writeln!(
            xml,
            "  <Disk_Parameters>\n    <Disk_size>{size}</Disk_size>"
        );
        let _ = writeln!(xml, "    <Cylinders>{}</Cylinders>", size / 512);
        xml.push_str("    <Heads>16</Heads>\n    <Sectors>32</Sectors>\n");
        if self.style == Style::Parallels {
            let zero = format!("<Engine>{NONE}</Engine><Data></Data><Salt></Salt>");
            let _ = writeln!(
                xml,
                "    <Encryption>{zero}</Encryption>\n    <Name>forged</Name>"
            );
        }
        xml.push_str("    <Padding>0</Padding>\n  </Disk_Parameters>\n  <StorageData>\n");
        for (number, part) in self.parts.iter().enumerate() {
            self.storage(&mut xml, name, number, part);
        }
        xml.push_str("  </StorageData>\n  <Snapshots>\n");
        let top = self.depth().saturating_sub(1);
        if self.top_guid {
            let _ = writeln!(xml, "    <TopGUID>{}</TopGUID>", self.guid(top));
        }
        for level in 0..self.depth() {
            let parent = level
                .checked_sub(1)
                .map_or(NONE.to_string(), |below| self.guid(below));
            let _ = writeln!(xml, "    <Shot>\n      <GUID>{}</GUID>", self.guid(level));
            let _ = writeln!(xml, "      <ParentGUID>{parent}</ParentGUID>\n    </Shot>");
        }
        let _ = writeln!(xml, "  </Snapshots>\n</{root}>");
        xml
    }

    fn storage(&self, xml: &mut String, name: &str, number: usize, part: &Part) {
        let images = part.levels.iter().rev();
        let blocksize = images
            .filter_map(|level| match level {
                Level::Image(image) => Some(image.cluster_sectors),
                Level::Plain { .. } => None,
            })
            .next()
            .unwrap_or(2048);
        let _ = writeln!(xml, "    <Storage>\n      <Start>{}</Start>", part.start);
        let _ = writeln!(xml, "      <End>{}</End>", part.end);
        let _ = writeln!(xml, "      <Blocksize>{blocksize}</Blocksize>");
        for (level, of) in part.levels.iter().enumerate() {
            let kind = if matches!(of, Level::Plain { .. }) {
                "Plain"
            } else {
                "Compressed"
            };
            let file = self.file_name(name, number, level);
            let _ = writeln!(
                xml,
                "      <Image>\n        <GUID>{}</GUID>",
                self.guid(level)
            );
            let _ = writeln!(
                xml,
                "        <Type>{kind}</Type>\n        <File>{file}</File>"
            );
            xml.push_str("      </Image>\n");
        }
        xml.push_str("    </Storage>\n");
    }
}

fn base_name(dir: &Path) -> String {
    dir.file_name().map_or_else(
        || "disk.hdd".into(),
        |name| name.to_string_lossy().into_owned(),
    )
}
