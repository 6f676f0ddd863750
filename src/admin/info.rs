//! What a disk is made of, told without touching it, and as far as possible when it is broken.
//!
//! Nothing is locked, written or repaired, and no file's contents are believed beyond what its
//! parser has checked. The BATs are streamed in pieces of bounded size, and pieces that the host
//! stores as holes are skipped, so that the memory used depends on no number in any file.

mod render;

pub use render::render;

use crate::chain::bundle::{OpenedImages, Selection, SnapshotInfo, Survey, SurveyedFile};
use crate::delta::{extension, walk};
use crate::error::{Error, Result};
use crate::format::descriptor::ImageType;
use crate::format::extension::Extension;
use crate::format::header::{HEADER_LEN, Header, IN_USE, RawHeader, Version};
use crate::storage::file::FileStorage;
use crate::storage::lock::{Holder, Users};
use crate::storage::{FileId, Storage};
use crate::units::{FileOffset, SECTOR, len_u64};
use serde::Serialize;
use std::collections::HashSet;
use std::path::Path;

/// Version of the JSON document; grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// A whole disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskInfo {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// As the user named it.
    pub image: String,
    /// `bundle` or `image`.
    pub kind: &'static str,
    /// Size of the flat disk in bytes, where it is known.
    pub size_bytes: Option<u64>,
    /// Lengths of all files together.
    pub file_bytes: u64,
    /// Host space of all files together.
    pub allocated_bytes: u64,
    /// The parts in disk order.
    pub parts: Vec<PartInfo>,
    /// GUID of the top.
    pub top: Option<String>,
    /// GUID of the state that the parts' files make up.
    pub selected: Option<String>,
    /// Frozen snapshots, parents before children.
    pub snapshots: Vec<SnapshotInfo>,
    /// How the contents are encrypted.
    pub encryption: Option<String>,
    /// What is odd.
    pub warnings: Vec<String>,
    /// What keeps the disk from being opened.
    pub problems: Vec<String>,
}

/// A part of the disk.
#[derive(Clone, Debug, Serialize)]
pub struct PartInfo {
    /// First sector, where a descriptor says so.
    pub start_sector: Option<u64>,
    /// One past the last sector, where a descriptor says so.
    pub end_sector: Option<u64>,
    /// `Blocksize` of the descriptor.
    pub blocksize_sectors: Option<u32>,
    /// Base first.
    pub files: Vec<FileInfo>,
}

/// A file of a chain.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FileInfo {
    /// Where it is.
    pub path: String,
    /// Its snapshot.
    pub guid: Option<String>,
    /// `expanding`, `plain` or `unknown`.
    pub format: &'static str,
    /// 1 or 2.
    pub version: Option<u8>,
    /// Bytes in a cluster.
    pub cluster_bytes: Option<u64>,
    /// Size of the disk that this file describes.
    pub size_bytes: Option<u64>,
    /// Entries of its BAT.
    pub bat_entries: Option<u32>,
    /// Entries that map a cluster.
    pub mapped_clusters: Option<u64>,
    /// Entries of those that point where no data can be.
    pub bad_entries: Option<u64>,
    /// Length of the file.
    pub file_bytes: Option<u64>,
    /// Host space of the file.
    pub allocated_bytes: Option<u64>,
    /// The in-use mark is set.
    pub in_use: bool,
    /// The mark, where it is neither 0 nor the in-use mark: `v2.1` and others.
    pub closed_mark: Option<String>,
    /// Flag bits.
    pub flags: Option<u32>,
    /// Why it could not be opened for writing.
    pub write_refusal: Option<String>,
    /// The format extension, where the header names one that counts.
    pub extension: Option<ExtensionInfo>,
    /// Who has locks on it; none known where it cannot be told.
    pub holders: Option<Vec<Holder>>,
    /// What keeps it from being used.
    pub problem: Option<String>,
}

/// A format extension.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ExtensionInfo {
    /// Where it is said to be.
    pub sector: u64,
    /// It passed all checks.
    pub valid: bool,
    /// Why not.
    pub problem: Option<String>,
    /// Its dirty bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
    /// Sections of a kind that is not known.
    pub unknown_sections: usize,
    /// File clusters that it occupies.
    pub clusters: usize,
}

/// A dirty bitmap.
#[derive(Clone, Debug, Serialize)]
pub struct BitmapInfo {
    /// Its id.
    pub id: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity_bytes: u64,
}

/// Whether entries are counted, which takes a walk over all tables: 64 MiB of a disk of 16 TiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// They are.
    Count,
    /// The numbers are left out.
    Leave,
}

/// Looks at a disk. Fails only where IMAGE itself is not there.
pub fn info(image: &Path, selection: &Selection, tables: Tables) -> Result<DiskInfo> {
    let survey = OpenedImages::survey(image, selection)?;
    let (mut seen, users) = (HashSet::new(), Users::default());
    let mut problems = survey.problems.clone();
    let parts: Vec<PartInfo> = survey
        .parts
        .iter()
        .map(|part| PartInfo {
            start_sector: part.bounds.map(|bounds| bounds.0.get()),
            end_sector: part.bounds.map(|bounds| bounds.1.get()),
            blocksize_sectors: part.blocksize,
            files: part
                .files
                .iter()
                .map(|file| look_at(file, tables, &mut seen, &users))
                .collect(),
        })
        .collect();
    for file in parts.iter().flat_map(|part| &part.files) {
        problems.extend(
            file.problem
                .as_ref()
                .map(|why| format!("{}: {why}", file.path)),
        );
    }
    let files = || parts.iter().flat_map(|part| &part.files);
    Ok(DiskInfo {
        schema_version: SCHEMA_VERSION,
        image: image.display().to_string(),
        kind: if survey.is_bundle { "bundle" } else { "image" },
        size_bytes: disk_size(&survey, &parts),
        file_bytes: files().filter_map(|file| file.file_bytes).sum(),
        allocated_bytes: files().filter_map(|file| file.allocated_bytes).sum(),
        top: survey
            .descriptor
            .as_ref()
            .map(|(_, descriptor)| descriptor.top.to_string()),
        selected: survey.selected.map(|guid| guid.to_string()),
        snapshots: survey.snapshots,
        encryption: survey.encryption,
        warnings: survey.warnings,
        problems,
        parts,
    })
}

/// The top's header says it; in a split disk the descriptor does.
fn disk_size(survey: &Survey, parts: &[PartInfo]) -> Option<u64> {
    let declared = survey
        .descriptor
        .as_ref()
        .and_then(|(_, found)| found.disk_size.bytes());
    match parts {
        [only] => only
            .files
            .last()
            .and_then(|top| top.size_bytes)
            .or(declared),
        _ => declared,
    }
}

fn look_at(
    surveyed: &SurveyedFile,
    tables: Tables,
    seen: &mut HashSet<FileId>,
    users: &Users,
) -> FileInfo {
    let mut info = FileInfo {
        path: surveyed.path.display().to_string(),
        guid: surveyed.guid.map(|guid| guid.to_string()),
        format: "unknown",
        ..FileInfo::default()
    };
    let opened = match &surveyed.file {
        Ok(file) => file
            .try_clone()
            .map_err(Into::into)
            .and_then(FileStorage::new),
        Err(e) => {
            // The path is shown beside it.
            info.problem = Some(match e.why_text() {
                Some(why) => why,
                None => Error::new(e.kind()).to_string(),
            });
            return info;
        }
    };
    let examined = opened.and_then(|storage| {
        if storage.file_id().is_some_and(|id| !seen.insert(id)) {
            info.problem = Some("the same file is used twice in the disk".to_owned());
        }
        info.holders = users.of(storage.file());
        examine(&storage, surveyed.kind, tables, &mut info)
    });
    if let Err(e) = examined {
        info.problem.get_or_insert(e.to_string());
    }
    info
}

fn examine(
    storage: &FileStorage,
    kind: ImageType,
    tables: Tables,
    info: &mut FileInfo,
) -> Result<()> {
    let len = storage.len()?;
    info.file_bytes = Some(len.get());
    info.allocated_bytes = Some(storage.allocated_bytes()?);
    let mut bytes = [0; HEADER_LEN];
    let has_header = len.get() >= len_u64(HEADER_LEN);
    if has_header {
        storage.read_at(FileOffset::ZERO, &mut bytes)?;
    }
    let raw = RawHeader::decode(&bytes);
    if Version::of(&raw.magic).is_none() {
        if kind == ImageType::Plain {
            info.format = "plain";
            info.size_bytes = Some(len.get());
        } else if has_header {
            info.problem = Some("neither magic of the format is there".to_owned());
        } else {
            info.problem = Some(format!("{len} bytes are fewer than the 64 of a header"));
        }
        return Ok(());
    }
    info.format = "expanding";
    info.version = Version::of(&raw.magic).map(Version::number);
    info.in_use = raw.in_use == IN_USE;
    info.closed_mark = mark(raw.in_use);
    info.flags = Some(raw.flags);
    info.bat_entries = Some(raw.entry_count);
    let header = match Header::validate(&raw, len) {
        Ok(header) => header,
        Err(e) => {
            info.problem = Some(e.to_string());
            return Ok(());
        }
    };
    info.cluster_bytes = Some(header.layout().cluster().bytes());
    info.size_bytes = Some(header.size_bytes());
    info.write_refusal = header.write_refusal().map(|why| why.to_string());
    info.extension = header.extension().map(|at| {
        let found = read_extension(storage, &header);
        describe(at.get(), found)
    });
    if tables == Tables::Count {
        let (mapped, bad) = count_entries(storage, &header, len)?;
        info.mapped_clusters = Some(mapped);
        info.bad_entries = Some(bad);
    }
    Ok(())
}

/// A closed mark in the letters that its writer meant.
fn mark(value: u32) -> Option<String> {
    if matches!(value, 0 | IN_USE) {
        return None;
    }
    let bytes = value.to_le_bytes();
    let printable = bytes.iter().all(u8::is_ascii_graphic);
    Some(if printable {
        bytes.iter().copied().map(char::from).collect()
    } else {
        format!("{value:#x}")
    })
}

fn read_extension(storage: &FileStorage, header: &Header) -> Result<Extension, String> {
    // Whether its clusters hold data of the disk as well is for a check to tell.
    let found = extension::read(storage, header, |_| false).map_err(|e| e.to_string())?;
    let found = found.map_err(|e| e.to_string())?;
    found.ok_or_else(|| "no extension is named".to_owned())
}

fn describe(sector: u64, found: Result<Extension, String>) -> ExtensionInfo {
    match found {
        Ok(found) => ExtensionInfo {
            sector,
            valid: true,
            problem: None,
            bitmaps: found
                .bitmaps
                .iter()
                .map(|bitmap| BitmapInfo {
                    id: bitmap.id.bare(),
                    granularity_bytes: bitmap.granularity.get().saturating_mul(SECTOR),
                })
                .collect(),
            unknown_sections: found.unknown.len(),
            clusters: found.clusters.len(),
        },
        Err(problem) => ExtensionInfo {
            sector,
            problem: Some(problem),
            ..Default::default()
        },
    }
}

/// Entries that are not zero, and those of them that point nowhere.
fn count_entries(storage: &FileStorage, header: &Header, len: FileOffset) -> Result<(u64, u64)> {
    let layout = header.layout();
    let good = layout.good_entries(len);
    let (mut mapped, mut bad) = (0_u64, 0_u64);
    walk::words(storage, layout.table_end(), |_, bytes| {
        for entry in bytes.chunks_exact(4).map(walk::word) {
            let is_mapped = entry != 0;
            mapped += u64::from(is_mapped);
            bad += u64::from(is_mapped && !good.contains(&u64::from(entry)));
        }
        Ok(())
    })?;
    Ok((mapped, bad))
}

#[cfg(test)]
mod tests;
