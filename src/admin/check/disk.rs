//! What is wrong with a whole disk: every image, how they fit together, and what lies beside them.

mod around;

use super::say::{self, Said};
use super::{Checked, check_image_with};
use crate::admin::progress::Progress;
use crate::chain;
use crate::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain, Selection};
use crate::delta::image::{header_error, version_of};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::{Descriptor, ImageType, Oddity, Shot};
use crate::format::guid::Guid;
use crate::format::header::HeaderError;
use crate::format::oddities;
use crate::plan::repair::Severity;
use crate::storage::beside;
use crate::storage::file::FileStorage;
use crate::storage::host::Roots;
use crate::storage::lock::{self, Locked, Purpose};
use crate::storage::{FileId, SharedStorage, Storage};
use crate::units::SectorCount;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Version of the JSON document; grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;
/// Snapshots that no chain leads to, of which each is told.
const LOST_MAX: usize = 16;

/// A whole disk.
#[derive(Debug, Serialize)]
pub struct DiskCheck {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// As the user named it.
    pub image: String,
    /// `bundle` or `image`.
    pub kind: &'static str,
    /// `clean`, `leaks` or `corrupt`.
    pub state: &'static str,
    /// What concerns no file by itself.
    pub findings: Vec<Finding>,
    /// The files, base first within each part.
    pub files: Vec<FileCheck>,
}

/// Something about the disk, or about a file that is none of its images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `corrupt`, `leak` or `note`.
    pub severity: &'static str,
    /// The stable word of its kind.
    pub kind: &'static str,
    /// What it is.
    pub message: String,
}

/// One image file.
#[derive(Debug, Serialize)]
pub struct FileCheck {
    /// Where it is.
    pub path: String,
    /// Its snapshot.
    pub guid: Option<String>,
    /// `expanding` or `plain`.
    pub format: &'static str,
    /// `clean`, `leaks` or `corrupt`.
    pub state: &'static str,
    /// Size of the disk by its header.
    pub size_bytes: Option<u64>,
    /// Bytes in a cluster.
    pub cluster_bytes: Option<u64>,
    /// Entries that map a cluster.
    pub mapped_clusters: Option<u64>,
    /// Length of the file.
    pub file_bytes: u64,
    /// Ids of its sound dirty bitmaps.
    pub dirty_bitmaps: Vec<String>,
    /// What is wrong, the worst first.
    pub findings: Vec<Said>,
}

/// What is to be looked at, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directories outside the bundle that a descriptor may name files in.
    pub allow_outside: Vec<PathBuf>,
    /// Take no locks: what is found is then of one moment, and may be torn.
    pub no_lock: bool,
}

/// A file to be looked at.
struct Wanted {
    part: usize,
    guid: Option<Guid>,
    kind: ImageType,
    path: PathBuf,
    file: File,
}

struct Look<'a> {
    /// As the user named it.
    image: &'a Path,
    progress: &'a Progress,
    /// The image is no part of a bundle.
    is_alone: bool,
    options: &'a Options,
    worst: Option<Severity>,
    findings: Vec<Finding>,
    files: Vec<FileCheck>,
    /// By part and snapshot.
    opened: HashMap<(usize, Option<Guid>), OpenedFile>,
    seen: HashSet<FileId>,
}

/// Looks at a disk. Fails where IMAGE is not there, where the host fails, and where a file is
/// locked by a program that writes to it.
pub fn check(image: &Path, options: &Options) -> Result<DiskCheck> {
    check_with(image, options, &Progress::default())
}

/// The same, telling how far it is.
pub fn check_with(image: &Path, options: &Options, progress: &Progress) -> Result<DiskCheck> {
    let selection = Selection {
        allow_outside: options.allow_outside.clone(),
        no_lock: true,
        ..Selection::default()
    };
    let survey = OpenedImages::survey(image, &selection)?;
    let mut look = Look {
        image,
        progress,
        is_alone: false,
        options,
        worst: None,
        findings: Vec::new(),
        files: Vec::new(),
        opened: HashMap::new(),
        seen: HashSet::new(),
    };
    match survey.descriptor {
        Some((path, descriptor)) => look.bundle(&path, &descriptor)?,
        None => {
            for problem in survey.problems {
                look.found(Severity::Corrupt, "descriptor", problem);
            }
            for warning in survey.warnings {
                look.found(Severity::Note, "membership", warning);
            }
            for file in survey.parts.into_iter().flat_map(|part| part.files) {
                look.is_alone = !survey.is_bundle;
                look.image(Wanted {
                    part: 0,
                    guid: None,
                    kind: file.kind,
                    path: file.path,
                    file: file.file?,
                })?;
            }
        }
    }
    Ok(DiskCheck {
        schema_version: SCHEMA_VERSION,
        image: image.display().to_string(),
        kind: if survey.is_bundle { "bundle" } else { "image" },
        state: say::state(look.worst),
        findings: look.findings,
        files: look.files,
    })
}

impl Look<'_> {
    fn found(&mut self, severity: Severity, kind: &'static str, message: impl Into<String>) {
        if severity > Severity::Note {
            self.worst = self.worst.max(Some(severity));
        }
        self.findings.push(Finding {
            severity: severity.word(),
            kind,
            message: message.into(),
        });
    }

    fn bundle(&mut self, path: &Path, descriptor: &Descriptor) -> Result<()> {
        let home = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let is_going = |oddity: &&Oddity| match oddity {
            Oddity::Temporary(guid) => *guid != descriptor.top,
            _ => false,
        };
        for oddity in descriptor.oddities.iter().filter(|odd| !is_going(odd)) {
            let severity = if oddity.forbids_writing() {
                Severity::Corrupt
            } else {
                Severity::Note
            };
            self.found(severity, "descriptor", oddity.to_string());
        }
        let roots = Roots::open(home, &self.options.allow_outside)?;
        for (number, part) in descriptor.parts.iter().enumerate() {
            for image in &part.images {
                match roots.named(&image.file, false) {
                    Ok(named) => self.image(Wanted {
                        part: number,
                        guid: Some(image.guid),
                        kind: image.kind,
                        path: named.path,
                        file: named.file,
                    })?,
                    Err(e) => {
                        let text = format!("the image of snapshot {}: {e}", image.guid);
                        self.found(Severity::Corrupt, "image-file", text);
                    }
                }
            }
        }
        self.chains(descriptor);
        self.beside_descriptor(home, path, descriptor)
    }

    /// One image file.
    fn image(&mut self, wanted: Wanted) -> Result<()> {
        let Wanted {
            part,
            guid,
            kind,
            path,
            file,
        } = wanted;
        let storage = FileStorage::new(file).map_err(|e| e.in_file(&path))?;
        if storage.file_id().is_some_and(|id| !self.seen.insert(id)) {
            let text = format!(
                "{}: the same file is used twice in the disk",
                path.display()
            );
            self.found(Severity::Corrupt, "image-file", text);
            return Ok(());
        }
        if !self.options.no_lock {
            let deadline = Instant::now() + lock::PATIENCE;
            match lock::image(storage.file(), &path, Purpose::Read, deadline) {
                Ok(Locked::Yes | Locked::Unsupported) => {}
                Err(e) if e.kind() == ErrorKind::Locked => {
                    return Err(e.fix("to look all the same: --no-lock; it may then see changes"));
                }
                Err(e) => return Err(e),
            }
        }
        let home = beside::home(storage.file().as_fd(), &path);
        if let Some(home) = home.map_err(|e| Error::from(e).in_file(&path))? {
            self.beside_image(&home)?;
        }
        let storage: SharedStorage = Arc::new(storage);
        let is_plain = kind == ImageType::Plain && version_of(&storage)?.is_none();
        let (format, checked) = if is_plain {
            ("plain", None)
        } else {
            let checked = check_image_with(&*storage, self.progress);
            let checked = checked.map_err(|e| e.in_file(&path))?;
            // Nobody says that it is an image: then it is none, rather than a bad one.
            let is_other = checked.facts.normal == Err(HeaderError::Magic);
            if guid.is_none() && is_other {
                return Err(header_error(HeaderError::Magic).in_file(&path));
            }
            ("expanding", Some(checked))
        };
        self.add(&path, guid, format, &*storage, checked.as_ref())?;
        if let Some(Ok(normal)) = checked.as_ref().map(|checked| &checked.facts.normal) {
            for odd in oddities::of(&normal.header) {
                self.found(
                    Severity::Note,
                    "header",
                    format!("{}: {odd}", path.display()),
                );
            }
        }
        let plain = if is_plain { Plain::Yes } else { Plain::No };
        let opened = OpenedFile {
            path,
            storage,
            plain,
            guid: guid.map(|guid| guid.to_string()),
        };
        self.opened.insert((part, guid), opened);
        Ok(())
    }

    fn add(
        &mut self,
        path: &Path,
        guid: Option<Guid>,
        format: &'static str,
        storage: &dyn Storage,
        checked: Option<&Checked>,
    ) -> Result<()> {
        let worst = checked.and_then(|checked| checked.report.worst());
        self.worst = self.worst.max(worst);
        let header = checked.and_then(|checked| checked.facts.normal.as_ref().ok());
        let header = header.map(|normal| &normal.header);
        self.files.push(FileCheck {
            path: path.display().to_string(),
            guid: guid.map(|guid| guid.to_string()),
            format,
            state: say::state(worst),
            size_bytes: header.map(crate::format::header::Header::size_bytes),
            cluster_bytes: header.map(|header| header.layout().cluster().bytes()),
            mapped_clusters: checked
                .filter(|_| header.is_some())
                .map(|checked| checked.facts.table.mapped),
            file_bytes: storage.len()?.get(),
            dirty_bitmaps: checked.map_or_else(Vec::new, |checked| checked.bitmaps.clone()),
            findings: checked.map_or_else(Vec::new, say::findings),
        });
        Ok(())
    }

    /// Whether the images of every snapshot fit together.
    fn chains(&mut self, descriptor: &Descriptor) {
        let mut told = HashSet::new();
        let mut tell = |look: &mut Self, text: String| {
            if told.insert(text.clone()) {
                look.found(Severity::Corrupt, "chain", text);
            }
        };
        let mut reached: HashSet<Guid> = HashSet::new();
        let parents: HashSet<Option<Guid>> = descriptor
            .snapshots
            .iter()
            .map(|shot| shot.parent)
            .collect();
        for shot in &descriptor.snapshots {
            let guid = shot.guid;
            // What others stand on is looked at with them, unless they stand on themselves.
            if parents.contains(&Some(guid)) && guid != descriptor.top {
                continue;
            }
            let chain = match descriptor.chain(guid) {
                Ok(chain) => {
                    reached.extend(chain.iter().copied());
                    chain
                }
                Err(e) => {
                    tell(self, e.to_string());
                    continue;
                }
            };
            for number in 0..descriptor.parts.len() {
                let is_top = guid == descriptor.top;
                let mut warnings = Vec::new();
                if let Err(e) = self.chain(descriptor, number, &chain, is_top, &mut warnings) {
                    tell(self, e.to_string());
                }
                for warning in warnings {
                    // What is odd about a header has been told with its file.
                    if !self.findings.iter().any(|found| found.message == warning) {
                        self.found(Severity::Note, "chain", warning);
                    }
                }
            }
        }
        let lost = |shot: &&Shot| !reached.contains(&shot.guid);
        for shot in descriptor.snapshots.iter().filter(lost).take(LOST_MAX) {
            if let Err(e) = descriptor.chain(shot.guid) {
                tell(self, e.to_string());
            }
        }
    }

    fn chain(
        &self,
        descriptor: &Descriptor,
        number: usize,
        chain: &[Guid],
        is_top: bool,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let named = |e| Error::new(ErrorKind::Descriptor).because(e);
        descriptor.images(number, chain).map_err(named)?;
        let file = |guid: &Guid| self.opened.get(&(number, Some(*guid))).cloned();
        let files: Vec<OpenedFile> = chain.iter().filter_map(file).collect();
        let broken = |file: &OpenedFile| {
            let path = file.path.display().to_string();
            let mut checked = self.files.iter().filter(|checked| checked.path == path);
            checked.any(|checked| checked.format != "plain" && checked.size_bytes.is_none())
        };
        // What is missing or has no header has been told.
        if files.len() < chain.len() || files.iter().any(broken) {
            return Ok(());
        }
        let part = &descriptor.parts[number];
        let covers = descriptor.parts.len() > 1
            || (part.start == SectorCount::ZERO && part.end == descriptor.disk_size);
        let part = OpenedPart {
            start: if covers {
                part.start
            } else {
                SectorCount::ZERO
            },
            end: covers.then_some(part.end),
            blocksize: part.blocksize,
            files,
        };
        // Writing asks for more than reading; what else forbids it belongs to a file, and was told.
        match chain::open::chain(&part, is_top, warnings) {
            Err(e) if e.kind() == ErrorKind::Descriptor => Err(e),
            _ => Ok(()),
        }
    }
}

/// The directory that a path lies in.
#[must_use]
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
