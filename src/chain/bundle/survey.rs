//! A look at a disk that goes as far as it can: what cannot be opened is noted, not an end.
//!
//! Takes no locks and writes nothing; only for showing.

use super::find::{self, Found, Naming};
use super::{
    OpenedImages, Selection, SnapshotInfo, descriptor_error, encryption_text, read_descriptor,
    select, snapshot_infos, told,
};
use crate::error::Result;
use crate::format::descriptor::{Descriptor, Image, ImageType};
use crate::format::guid::Guid;
use crate::storage::host::Roots;
use crate::units::SectorCount;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// What was found.
#[derive(Debug, Default)]
pub struct Survey {
    /// The descriptor's path and contents, where there is one that can be read.
    pub descriptor: Option<(PathBuf, Descriptor)>,
    /// True for a bundle, even where its descriptor cannot be read.
    pub is_bundle: bool,
    /// The parts, with the chain of the selected snapshot; with every image, where no chain leads
    /// to it.
    pub parts: Vec<SurveyedPart>,
    /// Frozen snapshots, parents before children.
    pub snapshots: Vec<SnapshotInfo>,
    /// The selected snapshot.
    pub selected: Option<Guid>,
    /// How the contents are encrypted.
    pub encryption: Option<String>,
    /// What is odd.
    pub warnings: Vec<String>,
    /// What keeps the disk from being opened.
    pub problems: Vec<String>,
}

/// A part of the disk.
#[derive(Debug)]
pub struct SurveyedPart {
    /// First sector, and one past the last, as the descriptor says.
    pub bounds: Option<(SectorCount, SectorCount)>,
    /// `Blocksize`.
    pub blocksize: Option<u32>,
    /// Base first.
    pub files: Vec<SurveyedFile>,
}

/// A file that may not be there.
#[derive(Debug)]
pub struct SurveyedFile {
    /// Where it is or should be.
    pub path: PathBuf,
    /// Its snapshot.
    pub guid: Option<Guid>,
    /// What it is said to be.
    pub kind: ImageType,
    /// The open file, or why not.
    pub file: Result<File>,
}

impl OpenedImages {
    /// Looks at a disk without opening it for use. Fails only where IMAGE itself is not there, or
    /// not the snapshot that is asked for.
    pub fn survey(image: &Path, selection: &Selection) -> Result<Survey> {
        match find::find(image)? {
            Found::Image(path, naming) => {
                if let Some(snapshot) = &selection.snapshot {
                    return Err(find::no_snapshots(image, snapshot));
                }
                Ok(survey_by_hand(&path, naming, selection))
            }
            Found::Bundle {
                directory,
                descriptor,
                naming,
            } => {
                let roots = find::open_roots(&directory, naming, &selection.allow_outside)?;
                survey_bundle(&roots, &directory, &descriptor, selection)
            }
        }
    }
}

fn survey_by_hand(top: &Path, naming: Naming, selection: &Selection) -> Survey {
    let paths = selection.lower.iter().map(PathBuf::as_path).chain([top]);
    let files = paths.enumerate().map(|(level, path)| SurveyedFile {
        path: path.to_owned(),
        guid: None,
        kind: if selection.raw && level == 0 {
            ImageType::Plain
        } else {
            ImageType::Compressed
        },
        file: find::open_image(
            path,
            if level == selection.lower.len() {
                naming
            } else {
                Naming::User
            },
            false,
        ),
    });
    let part = SurveyedPart {
        bounds: None,
        blocksize: None,
        files: files.collect(),
    };
    let warnings = match find::membership(top) {
        Some(member) => vec![format!(
            "the image is {} of the bundle around it",
            member.role
        )],
        None => Vec::new(),
    };
    Survey {
        parts: vec![part],
        warnings,
        ..Survey::default()
    }
}

fn survey_bundle(
    roots: &Roots,
    directory: &Path,
    name: &str,
    selection: &Selection,
) -> Result<Survey> {
    let mut survey = Survey {
        is_bundle: true,
        ..Survey::default()
    };
    let descriptor = match read_descriptor(roots, name) {
        Ok(descriptor) => descriptor,
        Err(e) => {
            survey.problems.push(e.to_string());
            return Ok(survey);
        }
    };
    let names: HashMap<Guid, String> = find::snapshot_names(directory, name);
    survey.snapshots = snapshot_infos(&descriptor, &names);
    survey.encryption = encryption_text(&descriptor);
    survey.warnings = told(directory, name, &descriptor);
    let target = select(&descriptor, &names, selection.snapshot.as_deref())
        .map_err(|e| e.in_file(&directory.join(name)))?;
    survey.selected = Some(target);
    let chain = descriptor.chain(target).map_err(descriptor_error);
    let chain = chain.map_err(|e| survey.problems.push(e.to_string())).ok();
    let levels: Option<HashMap<Guid, usize>> = chain
        .as_ref()
        .map(|chain| chain.iter().copied().zip(0..).collect());
    for (number, part) in descriptor.parts.iter().enumerate() {
        let mut wanted: Vec<&Image> = part.images.iter().collect();
        if let (Some(chain), Some(levels)) = (&chain, &levels) {
            if let Err(e) = descriptor.images(number, chain) {
                survey.problems.push(e.to_string());
            }
            wanted.retain(|image| levels.contains_key(&image.guid));
            wanted.sort_by_key(|image| levels.get(&image.guid));
        }
        let files = wanted
            .into_iter()
            .map(|image| surveyed(roots, image))
            .collect();
        let bounds = Some((part.start, part.end));
        survey.parts.push(SurveyedPart {
            bounds,
            blocksize: part.blocksize,
            files,
        });
    }
    survey.descriptor = Some((directory.join(name), descriptor));
    Ok(survey)
}

fn surveyed(roots: &Roots, image: &Image) -> SurveyedFile {
    let (path, file) = match roots.named(&image.file, false) {
        Ok(found) => (found.path, Ok(found.file)),
        Err(e) => (roots.path().join(&image.file), Err(e)),
    };
    SurveyedFile {
        path,
        guid: Some(image.guid),
        kind: image.kind,
        file,
    }
}
