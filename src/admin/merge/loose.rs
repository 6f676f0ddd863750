//! Merges images that no descriptor holds together: the user says which lies over which.
//!
//! Into the lowest image, in the order that [`crate::admin::merge`] has. The upper ones are only
//! read and stay, because nobody but the user knows who else needs them: until the merge is
//! complete, the disk is what they show over the lowest, and afterwards they show nothing else.
//!
//! Or into a new file, and then every one of them is only read. The new one is made under a
//! temporary name, as any new disk ([`crate::admin::create`]).
//!
//! Nothing says in which order the images belong, so what speaks against the one that was given
//! refuses: a name that ends as that of a delta over another one, a disk that becomes smaller with
//! time (unless it was said that what is behind its end may go), a plain file above another.

use super::{Amount, Discard, Merge, WINDOW, examine_new, refuse_bitmaps};
use crate::admin::create::{Ids, Place, make_in, place_for};
use crate::admin::progress::Progress;
use crate::chain::bundle::{Plain, open_loose};
use crate::delta::create::{NewImage, Shape};
use crate::delta::image::{Image, header_error};
use crate::error::{Error, ErrorKind, REPAIR_HINT, Result};
use crate::format::guid::Guid;
use crate::format::header::IN_USE;
use crate::format::layout::Layout;
use crate::storage::directory::take_after;
use crate::storage::{Directory, SharedStorage};
use crate::units::{ClusterSize, SECTOR, SectorCount};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// The images, the uppermost first, the lowest last.
    pub files: Vec<PathBuf>,
    /// The lowest is a plain file.
    pub is_plain: bool,
    /// The result is a new file of this name.
    pub into_new: Option<PathBuf>,
    /// Dirty bitmaps may be lost.
    pub drop_bitmaps: bool,
    /// What lower images hold behind the end of the uppermost one may be lost.
    pub force_discard: bool,
}

/// What a merge does, or has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The file that takes the content.
    pub into: PathBuf,
    /// Those that are only read, the uppermost first.
    pub from: Vec<PathBuf>,
    /// What moves.
    pub amount: Amount,
    /// Bytes of the disk.
    pub disk_len: u64,
    /// The largest disk of an image, where that is more: its end is left out.
    pub clipped: Option<u64>,
    /// What is lost with that end.
    pub discards: Vec<Discard>,
}

/// Images that nobody else changes.
#[derive(Debug)]
pub struct Session {
    wish: Wish,
    /// The lowest first.
    images: Vec<Image>,
    cluster: ClusterSize,
    /// What is odd about the files.
    pub warnings: Vec<String>,
}

fn usage(why: impl Into<String>) -> Error {
    Error::why(ErrorKind::Usage, why)
}

/// Opens the images, for a look at what a merge would do or for carrying it out.
pub fn open(wish: &Wish, write: bool) -> Result<Session> {
    if wish.files.len() < 2 {
        let fix = "name the images from the top to the bottom: `ploopfs merge UPPER LOWER`";
        return Err(usage("a single image has nothing below it to merge into").fix(fix));
    }
    let paths: Vec<PathBuf> = wish.files.iter().rev().cloned().collect();
    let in_place = wish.into_new.is_none();
    let (files, warnings) = open_loose(&paths, wish.is_plain, in_place && write)?;
    let mut images = Vec::with_capacity(files.len());
    for file in files {
        images.push(match file.plain {
            Plain::Yes => Image::plain(&file.path, file.storage)?,
            Plain::No => Image::expanding(&file.path, file.storage)?,
        });
    }
    session(wish, images, warnings)
}

/// The same over images that the caller has, the lowest first.
pub fn session(wish: &Wish, images: Vec<Image>, warnings: Vec<String>) -> Result<Session> {
    let top = images.last().and_then(Image::layout).map(Layout::cluster);
    let cluster = top.ok_or_else(|| usage("a plain file can only be the lowest image"))?;
    let session = Session {
        wish: wish.clone(),
        images,
        cluster,
        warnings,
    };
    session.check_order()?;
    for image in &session.images {
        if !wish.drop_bitmaps {
            refuse_bitmaps(image)?;
        }
    }
    session.uppers().iter().try_for_each(closed)?;
    Ok(session)
}

/// Refuses an upper image that was not closed. The lowest may be left so by a merge that was
/// interrupted, and is looked at entry by entry.
fn closed(image: &Image) -> Result<()> {
    let Some(header) = image.header() else {
        return Ok(());
    };
    if header.raw().in_use == IN_USE {
        let why = "the in-use mark is set: the image was not closed";
        return Err(Error::why(ErrorKind::InUse, why)
            .in_file(image.path())
            .fix(REPAIR_HINT));
    }
    match header.write_refusal() {
        Some(refusal) => Err(header_error(refusal).in_file(image.path())),
        None => Ok(()),
    }
}

/// A file's name, and how its first part ends where the last part is a GUID.
fn named(image: &Image) -> Option<(&str, Option<(&str, Guid)>)> {
    let name = image.path().file_name()?.to_str()?;
    let bare = name.strip_suffix(".hds").unwrap_or(name);
    let with_guid = bare.rsplit_once('.').and_then(|(start, end)| {
        let guid = Guid::parse(end).filter(|_| end.starts_with('{'))?;
        Some((start, guid))
    });
    Some((name, with_guid))
}

/// The names say that `one` is a delta over `other`, or over what `other` is the base of.
fn is_over(one: &Image, other: &Image) -> bool {
    let (Some((_, Some((stem, guid)))), Some((base, end))) = (named(one), named(other)) else {
        return false;
    };
    match end {
        // Parallels Desktop gives a base this name.
        Some((other_stem, other_guid)) => {
            stem == other_stem && other_guid == Guid::TOP && guid != Guid::TOP && is_desktop(base)
        }
        // ploop puts a GUID behind the name of the base.
        None => stem == base,
    }
}

fn is_desktop(name: &str) -> bool {
    name.ends_with(".hds")
}

impl Session {
    fn uppers(&self) -> &[Image] {
        self.images.get(1..).unwrap_or_default()
    }

    fn lowest(&self) -> Result<&Image> {
        let none = || usage("there is no image");
        self.images.first().ok_or_else(none)
    }

    fn check_order(&self) -> Result<()> {
        let wrong = |above: &Image, below: &Image, why: String| {
            let (above, below) = (above.path().display(), below.path().display());
            let why = format!("{above} is said to lie over {below}, but {why}");
            Err(usage(why).fix("the uppermost image comes first, the lowest last"))
        };
        for (number, above) in self.images.iter().enumerate() {
            for below in self.images.iter().take(number) {
                if is_over(below, above) {
                    return wrong(above, below, "the names say the opposite".into());
                }
            }
        }
        for pair in self.images.windows(2) {
            let (below, above) = (&pair[0], &pair[1]);
            let (own, other) = (above.disk_len(), below.disk_len());
            // Even where nothing is behind the end: it is rather two words that were exchanged.
            let is_meant = self.wish.into_new.is_some() || self.wish.force_discard;
            if own < other && !is_meant {
                let why = format!("has a disk of {own} bytes, and the lower one of {other}");
                let wrong = wrong(above, below, why);
                return wrong.map_err(|e| {
                    e.fix(
                        "the uppermost image comes first, the lowest last; if that is how they \
                         are: --into-new FILE, which changes neither, or --force-discard, which \
                         loses what the lower one holds behind the end",
                    )
                });
            }
        }
        Ok(())
    }

    fn shape(&self) -> Result<(Shape, Layout)> {
        let top = self.images.last();
        let header = top.and_then(Image::header);
        let header = header.ok_or_else(|| usage("a plain file can only be the lowest image"))?;
        let shape = Shape {
            version: header.version(),
            cluster: self.cluster,
            size: SectorCount::new(header.size_bytes() / SECTOR),
        };
        let layout = shape.layout_of_any_cluster()?;
        Ok((shape, layout))
    }

    fn merge_into<'a>(&self, lower: &'a Image, uppers: &'a [Image]) -> Merge<'a> {
        Merge {
            lower,
            uppers,
            cluster: self.cluster,
            window: WINDOW,
            force_discard: self.wish.force_discard,
        }
    }

    /// What the merge will do. Changes nothing.
    pub fn plan(&self) -> Result<Merged> {
        let disk_len = self.images.last().map_or(0, Image::disk_len);
        let largest = self.images.iter().map(Image::disk_len).max();
        let mut from = self.wish.files.clone();
        let (into, examined) = match &self.wish.into_new {
            Some(path) => {
                place_for(path)?;
                let ((_, layout), force) = (self.shape()?, self.wish.force_discard);
                let examined = examine_new(&self.images, self.cluster, &layout, force)?;
                (path.clone(), examined)
            }
            None => {
                let merge = self.merge_into(self.lowest()?, self.uppers());
                (from.pop().unwrap_or_default(), merge.examine()?)
            }
        };
        Ok(Merged {
            into,
            from,
            amount: examined.amount,
            disk_len,
            clipped: largest.filter(|len| *len > disk_len),
            discards: examined.discards,
        })
    }

    /// Merges.
    pub fn merge(&self, progress: &Progress) -> Result<Merged> {
        let told = self.plan()?;
        progress.step("merging", told.amount.bytes);
        match &self.wish.into_new {
            Some(path) => {
                let (parent, name) = place_for(path)?;
                self.into_new(&parent, name, &Ids::new()?, progress)?;
            }
            None => {
                let merge = self.merge_into(self.lowest()?, self.uppers());
                merge.carry_out_marked(progress)?;
            }
        }
        Ok(told)
    }

    /// Makes the new file in a directory.
    pub fn into_new(
        &self,
        parent: &dyn Directory,
        name: &str,
        ids: &Ids,
        progress: &Progress,
    ) -> Result<()> {
        make_in(parent, name, false, ids, progress, |place| {
            let Place::Image(file) = place else {
                return Err(Error::errno(libc::EISDIR));
            };
            self.fill(file, Path::new(name), progress)
        })
    }

    fn fill(&self, file: &SharedStorage, path: &Path, progress: &Progress) -> Result<()> {
        let (shape, _) = self.shape()?;
        if let Some(top) = self.images.last() {
            take_after(&**file, &**top.storage())?;
        }
        NewImage::over_others(Arc::clone(file), &shape)?.finish()?;
        let new = Image::expanding(path, Arc::clone(file))?;
        self.merge_into(&new, &self.images).carry_out(progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::mem::MemStorage;

    #[test]
    fn names_tell_what_lies_over_what() {
        let image = |name: &str| {
            let storage: SharedStorage = Arc::new(MemStorage::new(Vec::new()));
            Image::plain(Path::new(name), storage).unwrap()
        };
        let other = Guid::from_bytes([0x11; 16]);
        let (ploop, top) = (
            format!("root.hds.{other}"),
            format!("root.hds.{}", Guid::TOP),
        );
        let (desktop, base) = (format!("a.{other}.hds"), format!("a.{}.hds", Guid::TOP));
        for (one, below, expected) in [
            (&*ploop, "dir/root.hds", true),
            ("root.hds", &*ploop, false),
            (&*ploop, &*top, false),
            (&*top, &*ploop, false),
            (&*desktop, &*base, true),
            (&*base, &*desktop, false),
            (&*desktop, "a", true),
            ("root.hds", "root.hds", false),
            ("b.hds", "a.hds", false),
            (&*ploop, "other.hds", false),
        ] {
            let found = is_over(&image(one), &image(below));
            assert_eq!(found, expected, "{one} over {below}");
        }
    }
}
