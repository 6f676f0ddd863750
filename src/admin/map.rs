//! Where the bytes of a disk are: its extents as people and programs read them.
//!
//! The JSON has the members of `qemu-img map --output=json`, and `filename`, because a chain and a
//! split disk have several files. The text has the columns of `qemu-img map`. Both come line by
//! line, so that a map of any length needs no memory.

use crate::admin::source::{Extent, Source, What};
use crate::error::Result;
use crate::units::{DiskOffset, FileOffset};
use serde::Serialize;
use std::path::PathBuf;

/// A line of the map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Levels above the one that has it.
    pub depth: usize,
    /// A level has it.
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// It may hold anything.
    pub data: bool,
    /// Never so in a format that this is told of.
    pub compressed: bool,
    /// Where it is in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
    /// The image does not say where it is.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub bad: bool,
}

/// Calls `each` with every line of a disk's map, neighbours merged.
pub fn map(source: &dyn Source, mut each: impl FnMut(Line) -> Result<()>) -> Result<()> {
    let mut held: Option<Extent> = None;
    for extent in source.extents(DiskOffset::ZERO) {
        let extent = extent?;
        match &mut held {
            Some(before) if continues(before, &extent) => before.range.end = extent.range.end,
            _ => {
                if let Some(before) = held.replace(extent) {
                    each(line(&before, source.files()))?;
                }
            }
        }
    }
    held.map_or(Ok(()), |last| each(line(&last, source.files())))
}

fn continues(before: &Extent, next: &Extent) -> bool {
    let len = before.range.end.get() - before.range.start.get();
    let place = before
        .place
        .map(|(file, at): (usize, FileOffset)| (file, at.saturating_add(len)));
    before.what == next.what && before.depth == next.depth && place == next.place
}

fn line(extent: &Extent, files: &[PathBuf]) -> Line {
    let (start, end) = (extent.range.start.get(), extent.range.end.get());
    let file = extent.place.and_then(|(file, _)| files.get(file));
    Line {
        start,
        length: end - start,
        depth: extent.depth,
        present: extent.what != What::Hole,
        zero: matches!(extent.what, What::Hole | What::Zeros),
        data: matches!(extent.what, What::Data | What::Bad),
        compressed: false,
        offset: extent.place.map(|(_, at)| at.get()),
        filename: file.map(|file| file.display().to_string()),
        bad: extent.what == What::Bad,
    }
}
