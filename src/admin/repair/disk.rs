//! Repairs a whole disk: the top of each part. Frozen images are never touched, because other
//! chains may stand on them.

use super::undo::{self, saved_names, undo_image_after};
use super::{KeepOld, check_room, copied_bytes, is_clean, plan_image_with, repair_image_after};
use crate::admin::check::disk::{Finding, Options, parent_of};
use crate::admin::check::say::{self, Said};
use crate::admin::check::{self, check_image};
use crate::admin::progress::Progress;
use crate::chain::bundle::{self, OpenedImages, Plain, Selection};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{HEADER_LEN, RawHeader, Version};
use crate::journal::RUNNING;
use crate::plan::repair::{Fix, Policy, Severity};
use crate::storage::SharedStorage;
use crate::storage::beside;
use crate::storage::directory::HostDirectory;
use crate::units::{FileOffset, SectorCount, len_u64};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Version of the JSON document; grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// A disk whose images are open and locked for a repair, or for a look at what one would do.
#[derive(Debug)]
pub struct Session {
    /// As the user named it.
    image: PathBuf,
    images: OpenedImages,
    allow_outside: Vec<PathBuf>,
    progress: Arc<Progress>,
}

/// What a repair will do, or has done.
#[derive(Clone, Debug, Serialize)]
pub struct DiskRepair {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// As the user named it.
    pub image: String,
    /// `clean`, `leaks` or `corrupt`: before, where nothing was changed.
    pub state: &'static str,
    /// The images that can be written to, one for each part, and frozen ones with trouble.
    pub files: Vec<FileRepair>,
    /// What is wrong with a bundle besides: its descriptor, and how its images fit together.
    pub findings: Vec<Finding>,
}

/// What a repair does to one image.
#[derive(Clone, Debug, Serialize)]
pub struct FileRepair {
    /// Where it is.
    pub path: String,
    /// A level below the top, which is not touched.
    pub frozen: bool,
    /// `clean`, `leaks` or `corrupt`: afterwards, where it was changed.
    pub state: &'static str,
    /// What was found, the worst first.
    pub findings: Vec<Said>,
    /// The steps, in order.
    pub steps: Vec<&'static str>,
    /// The steps in words.
    #[serde(skip)]
    pub phrases: Vec<&'static str>,
    /// Sound dirty bitmaps are dropped: the next backup must be a full one.
    pub drops_bitmaps: bool,
    /// The most bytes that are copied: the host must have room for them.
    pub copied_bytes: u64,
    /// The undo file of a repair or an undo that was interrupted.
    pub unfinished: Option<String>,
    /// Where the old bytes are.
    pub undo: Option<String>,
}

/// Opens the images of a disk. Without `write` they are only read, and nothing can be carried out.
pub fn open(image: &Path, allow_outside: &[PathBuf], write: bool) -> Result<Session> {
    let selection = Selection {
        write,
        allow_outside: allow_outside.to_vec(),
        mending: true,
        ..Selection::default()
    };
    let images = bundle::open(image, &selection)?;
    Ok(Session {
        image: image.to_owned(),
        images,
        allow_outside: allow_outside.to_vec(),
        progress: Arc::default(),
    })
}

struct Target<'a> {
    path: &'a Path,
    storage: &'a SharedStorage,
    progress: &'a Progress,
}

impl Target<'_> {
    /// The directory that the image really lies in, and its name there: whoever opens it by
    /// another way must find the undo file too.
    fn home(&self) -> Result<(HostDirectory, String)> {
        let fd = self.storage.as_host_fd();
        let home = match fd {
            Some(fd) => beside::home(fd, self.path)?,
            None => None,
        };
        let home = home.ok_or_else(|| {
            let why = "it was moved or removed since it was opened";
            Error::why(ErrorKind::Missing, why).in_file(self.path)
        })?;
        let name = home.name.into_string().map_err(|_| {
            let why = "its name is not UTF-8, so that of its undo file cannot be made from it";
            let error = Error::why(ErrorKind::Usage, why).in_file(self.path);
            error.fix("give it another name for the repair; nothing was changed")
        })?;
        Ok((HostDirectory::open(&home.directory)?, name))
    }

    /// Refuses a file that has more names than one: what is changed here would change under all of
    /// them, and one may be that of a snapshot in a bundle that nobody has looked at.
    fn refuse_links(&self) -> Result<()> {
        let names = match self.storage.as_host_fd() {
            Some(fd) => beside::names(fd)?,
            None => 1,
        };
        if names <= 1 {
            return Ok(());
        }
        let why = format!("the file has {names} names (hard links), and would change under each");
        Err(Error::why(ErrorKind::Usage, why)
            .in_file(self.path)
            .fix("repair a copy (`cp --sparse=always`), or remove the others; nothing was changed"))
    }

    fn repair(&self, policy: &Policy, begin: &mut dyn FnMut() -> Result<()>) -> Result<FileRepair> {
        let (directory, name) = self.home()?;
        let keep = KeepOld::In {
            directory: &directory,
            image: &name,
        };
        let done = repair_image_after(&**self.storage, keep, policy, self.progress, begin)?;
        let undo = done.undo.map(|name| directory.path().join(name));
        Ok(FileRepair {
            path: self.path.display().to_string(),
            frozen: false,
            state: say::state(done.after.report.worst()),
            findings: say::findings(&done.before),
            steps: words(&done.fixes),
            phrases: phrases(&done.fixes),
            drops_bitmaps: say::has_bitmaps(&done.before) && !say::has_bitmaps(&done.after),
            copied_bytes: copied_bytes(&done.before.facts, &done.fixes),
            unfinished: None,
            undo: undo.map(|path| path.display().to_string()),
        })
    }

    fn plan(&self, policy: &Policy) -> Result<FileRepair> {
        let planned = plan_image_with(&**self.storage, policy, self.progress)?;
        let copied_bytes = copied_bytes(&planned.checked.facts, &planned.fixes);
        let (directory, name) = self.home()?;
        let keep = KeepOld::In {
            directory: &directory,
            image: &name,
        };
        let unfinished = undo::is_begun(keep)?.then(|| {
            let saved = directory.path().join(name.clone() + RUNNING);
            saved.display().to_string()
        });
        if unfinished.is_none() {
            check_room(keep, copied_bytes)?;
        }
        if !planned.fixes.is_empty() {
            self.refuse_links()?;
        }
        let marks = planned.fixes.contains(&Fix::Mark);
        Ok(FileRepair {
            path: self.path.display().to_string(),
            frozen: false,
            state: say::state(planned.checked.report.worst()),
            findings: say::findings(&planned.checked),
            steps: words(&planned.fixes),
            phrases: phrases(&planned.fixes),
            drops_bitmaps: marks && say::has_bitmaps(&planned.checked),
            copied_bytes,
            unfinished,
            undo: None,
        })
    }
}

fn contradicted(why: String) -> Error {
    let fix = "nothing is guessed, and nothing was changed: find out which is right first";
    Error::why(ErrorKind::Corrupt, why).fix(fix)
}

fn words(fixes: &[Fix]) -> Vec<&'static str> {
    fixes.iter().map(|fix| fix.word()).collect()
}

fn phrases(fixes: &[Fix]) -> Vec<&'static str> {
    fixes.iter().map(|fix| fix.phrase()).collect()
}

impl Session {
    fn targets(&self) -> impl Iterator<Item = Target<'_>> {
        let tops = self
            .images
            .parts
            .iter()
            .filter_map(|part| part.files.last());
        tops.filter(|top| top.plain == Plain::No).map(|top| Target {
            path: &top.path,
            storage: &top.storage,
            progress: &self.progress,
        })
    }

    fn each(&self, act: impl Fn(&Target<'_>) -> Result<FileRepair>) -> Result<DiskRepair> {
        self.fits()?;
        let mut files = Vec::new();
        for target in self.targets() {
            files.push(act(&target).map_err(|e| e.in_file(target.path))?);
        }
        self.frozen(&mut files)?;
        let (mut found, mut findings) = ("clean", Vec::new());
        if self.images.disk_size.is_some() {
            // The locks are held here, and are those that a check would wait for.
            let options = Options {
                allow_outside: self.allow_outside.clone(),
                no_lock: true,
            };
            let whole = check::disk::check(&self.image, &options)?;
            (found, findings) = (whole.state, whole.findings);
            findings.retain(|finding| finding.severity == Severity::Corrupt.word());
        }
        let states = ["corrupt", "leaks"];
        let worst = states
            .into_iter()
            .find(|state| found == *state || files.iter().any(|file| file.state == *state));
        Ok(DiskRepair {
            schema_version: SCHEMA_VERSION,
            image: self.image.display().to_string(),
            state: worst.unwrap_or("clean"),
            files,
            findings,
        })
    }

    /// Refuses a disk whose headers contradict its descriptor or each other: a repair would follow
    /// one of them, and cannot know which is right.
    fn fits(&self) -> Result<()> {
        for part in &self.images.parts {
            let mut cluster = part.blocksize.map(|sectors| (sectors, "the descriptor"));
            // An only part is the whole disk, whatever its bounds say.
            let whole = self
                .images
                .disk_size
                .filter(|_| self.images.parts.len() == 1);
            let bounds = part
                .end
                .map(|end| end.get().saturating_sub(part.start.get()));
            let sectors = whole.map(SectorCount::get).or(bounds);
            let top = part.files.len().saturating_sub(1);
            for (level, file) in part.files.iter().enumerate() {
                if file.plain != Plain::No || file.storage.len()?.get() < len_u64(HEADER_LEN) {
                    continue;
                }
                let mut bytes = [0; HEADER_LEN];
                file.storage.read_at(FileOffset::ZERO, &mut bytes)?;
                let raw = RawHeader::decode(&bytes);
                let Some(version) = Version::of(&raw.magic) else {
                    continue;
                };
                let (other, whose) = *cluster.get_or_insert((raw.cluster_sectors, "another image"));
                if other != raw.cluster_sectors {
                    let found = raw.cluster_sectors;
                    let why = format!("clusters of {found} sectors here, of {other} in {whose}");
                    return Err(contradicted(why).in_file(&file.path));
                }
                let size = match version {
                    Version::V1 => raw.size_in_sectors & u64::from(u32::MAX),
                    Version::V2 => raw.size_in_sectors,
                };
                if let Some(declared) = sectors.filter(|n| level == top && *n != size) {
                    let why = format!("{size} sectors here, {declared} in the descriptor");
                    return Err(contradicted(why).in_file(&file.path));
                }
            }
        }
        Ok(())
    }

    /// Adds the levels below the top that have trouble.
    fn frozen(&self, files: &mut Vec<FileRepair>) -> Result<()> {
        let lower = self.images.parts.iter().flat_map(|part| {
            let below = part.files.len().saturating_sub(1);
            part.files.iter().take(below)
        });
        for file in lower.filter(|file| file.plain == Plain::No) {
            let found = check_image(&*file.storage).map_err(|e| e.in_file(&file.path))?;
            if !is_clean(&found) {
                files.push(FileRepair {
                    path: file.path.display().to_string(),
                    frozen: true,
                    state: say::state(found.report.worst()),
                    findings: say::findings(&found),
                    steps: Vec::new(),
                    phrases: Vec::new(),
                    drops_bitmaps: false,
                    copied_bytes: 0,
                    unfinished: None,
                    undo: None,
                });
            }
        }
        Ok(())
    }

    /// Where it is told from now on how far the work is.
    pub fn show_on(&mut self, progress: &Arc<Progress>) {
        self.progress = Arc::clone(progress);
    }

    /// What a repair would do. Nothing is changed.
    pub fn plan(&self, policy: &Policy) -> Result<DiskRepair> {
        self.each(|target| target.plan(policy))
    }

    /// Repairs all images that can be written to.
    pub fn repair(&self, policy: &Policy) -> Result<DiskRepair> {
        self.each(|target| target.repair(policy, &mut || self.images.claim()))
    }

    /// Gives the image that an undo file belongs to its old bytes back. True where it then is
    /// clean.
    pub fn undo(&self, file: &Path) -> Result<bool> {
        let other = || {
            let why = "this undo file belongs to none of the disk's images: it lies beside its \
                       image, and its name begins with that of its image";
            Error::why(ErrorKind::Usage, why).in_file(file)
        };
        let name = file.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(other)?;
        let list = [name.to_owned()];
        for target in self.targets() {
            let (directory, own) = target.home()?;
            if saved_names(&own, &list).is_empty() || !is_in(file, &directory) {
                continue;
            }
            let begin = &mut || self.images.claim();
            undo_image_after(&**target.storage, &directory, name, begin)
                .map_err(|e| e.in_file(target.path))?;
            return Ok(is_clean(&check_image(&**target.storage)?));
        }
        Err(other())
    }
}

/// True where a file lies directly in a directory. An undo file elsewhere would not be seen by who
/// must not write while an undo runs.
fn is_in(file: &Path, directory: &HostDirectory) -> bool {
    let ids = |path: &Path| {
        let found = std::fs::metadata(path);
        found.map(|found| (found.dev(), found.ino())).ok()
    };
    ids(parent_of(file)).is_some_and(|there| ids(directory.path()) == Some(there))
}
