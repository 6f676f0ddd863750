//! Snapshots that are merged, in every part of the disk, and the descriptor that says so.
//!
//! The order, each step durable before the next begins:
//!
//! 1. Everything is examined, in every part, and nothing is changed that could be refused.
//! 2. The list of the files that will go ([`Bundle::announce`]).
//! 3. The descriptor marks the snapshots whose content will change. Later, and somebody could go
//!    back to a state that is half of one and half of another.
//! 4. The content moves down, part by part ([`crate::admin::merge`]).
//! 5. The descriptor names the lower files in place of the upper ones.
//! 6. The upper files are removed.

use super::{
    Opened, changeable, check_size, children, closed, descriptor_error, is_marked, left_over, new,
    open, parent, part_len,
};
use crate::admin::bundle::{Bundle, Failure};
use crate::admin::merge::{self, Amount, Discard, Examined, Merge, WINDOW};
use crate::admin::progress::Progress;
use crate::admin::resize::data_in;
use crate::delta::image::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::edit::Edit;
use crate::format::descriptor::{self, Descriptor, ImageType};
use crate::format::guid::Guid;
use crate::format::header::Version;
use crate::sys::random;
use crate::units::ClusterSize;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// Cluster size of a disk that only plain files make up: 1 MiB.
const CLUSTER_SECTORS: u32 = 2048;

/// What a merge does, or has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// The snapshots whose names go, the lowest first.
    pub gone: Vec<Guid>,
    /// The one that has their content.
    pub survivor: Guid,
    /// What moves.
    pub amount: Amount,
    /// The files that go.
    pub files: Vec<String>,
    /// The new files.
    pub made: Vec<String>,
    /// What is lost, because the disk of the survivor ends before it.
    pub discards: Vec<Discard>,
}

/// What may be lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Dirty bitmaps of the top.
    pub drop_bitmaps: bool,
    /// What is merged holds data behind the end of the uppermost disk.
    pub force_discard: bool,
}

/// What is merged into what.
#[derive(Clone, Debug, Default)]
pub struct Upper {
    /// This snapshot goes into its parent; the top where none is given.
    pub snapshot: Option<Guid>,
    /// All below it too, into the base.
    pub all: bool,
    /// The result is a new file of this name.
    pub into_new: Option<String>,
    /// What may be lost.
    pub losses: Losses,
}

/// What a merge would do. Changes nothing.
pub fn plan_merge(bundle: &Bundle<'_>, upper: &Upper) -> Result<Merged> {
    Ok(Job::of(bundle, upper)?.told())
}

/// Merges a snapshot, or the top, into the one below it, or all of its chain into the base. The
/// name of the upper one stays. With it, what could not be done after the change was made.
pub fn merge(
    bundle: &mut Bundle<'_>,
    upper: &Upper,
    progress: &Progress,
) -> Result<(Merged, Vec<String>)> {
    let job = Job::of(bundle, upper)?;
    let told = job.told();
    let warnings = carry_out(bundle, &job, progress)?;
    Ok((told, warnings))
}

/// A merge in every part of the disk.
pub(super) struct Job {
    /// The snapshots, the lowest first; the last one keeps its name.
    chain: Vec<Guid>,
    /// The same in each part: the lowest first.
    parts: Vec<Vec<Opened>>,
    clusters: Vec<ClusterSize>,
    files: Vec<String>,
    amount: Amount,
    discards: Vec<Discard>,
    losses: Losses,
    into_new: Vec<new::NewImage>,
    /// What these are named until they are whole: nobody else would have such a name, so that what
    /// is left of them can be removed.
    temporary: Vec<String>,
}

/// Every snapshot but the last of a chain must have no child but the next one.
fn unbranched(descriptor: &Descriptor, chain: &[Guid]) -> Result<()> {
    for guid in chain.iter().take(chain.len().saturating_sub(1)) {
        let count = children(descriptor, *guid).len();
        if count > 1 {
            let why = format!("{guid} has {count} children, and all of them need it");
            return Err(Error::why(ErrorKind::Usage, why)
                .fix("delete the other children first; `ploopfs snapshot tree` shows them"));
        }
    }
    Ok(())
}

impl Job {
    fn of(bundle: &Bundle<'_>, upper: &Upper) -> Result<Self> {
        let descriptor = bundle.descriptor();
        changeable(bundle)?;
        let last = upper.snapshot.unwrap_or(descriptor.top);
        let mut chain = descriptor.chain(last).map_err(descriptor_error)?;
        if !upper.all {
            chain.drain(..chain.len().saturating_sub(2));
        }
        if chain.len() < 2 {
            let why = format!("{last} is the base: there is nothing below it to merge into");
            return Err(Error::why(ErrorKind::Usage, why));
        }
        Self::new(bundle, chain, upper.into_new.as_deref(), upper.losses)
    }

    pub(super) fn new(
        bundle: &Bundle<'_>,
        chain: Vec<Guid>,
        into_new: Option<&str>,
        losses: Losses,
    ) -> Result<Self> {
        let descriptor = bundle.descriptor();
        unbranched(descriptor, &chain)?;
        let mut job = Self {
            chain,
            parts: Vec::new(),
            clusters: Vec::new(),
            files: Vec::new(),
            amount: Amount::default(),
            discards: Vec::new(),
            losses,
            into_new: Vec::new(),
            temporary: Vec::new(),
        };
        for part in 0..descriptor.parts.len() {
            job.part(bundle, part)?;
        }
        for part in 0..descriptor.parts.len() {
            match into_new {
                Some(name) => job.new_image(bundle, part, name)?,
                None => job.examine(bundle, part)?,
            }
            // A file that takes the content stays.
            let stay = usize::from(into_new.is_none());
            for opened in job.parts[part].iter().skip(stay) {
                job.files.extend(bundle.files().own_name(&opened.entry));
            }
        }
        bundle.try_edits(&job.edits(descriptor))?;
        Ok(job)
    }

    fn survivor(&self) -> Guid {
        self.chain.last().copied().unwrap_or(Guid::NONE)
    }

    pub(super) fn told(&self) -> Merged {
        let gone = self.chain.iter().take(self.chain.len().saturating_sub(1));
        Merged {
            gone: gone.copied().collect(),
            survivor: self.survivor(),
            amount: self.amount,
            files: self.files.clone(),
            made: self.into_new.iter().map(|new| new.name.clone()).collect(),
            discards: self.discards.clone(),
        }
    }

    /// Opens the images of a part.
    fn part(&mut self, bundle: &Bundle<'_>, part: usize) -> Result<()> {
        let descriptor = bundle.descriptor();
        let mut opened = Vec::new();
        for guid in &self.chain {
            let one = open(bundle, part, *guid)?;
            if *guid == descriptor.top {
                closed(&one)?;
                check_size(&one, part_len(descriptor, part)?)?;
                if !self.losses.drop_bitmaps {
                    merge::refuse_bitmaps(&one.image)?;
                }
            }
            // A frozen image that was not closed is looked at entry by entry all the same.
            opened.push(one);
        }
        let said = descriptor.parts.get(part).and_then(|part| part.blocksize);
        let own = opened.iter().find_map(|one| one.image.layout());
        let cluster = own
            .map(crate::format::layout::Layout::cluster)
            .or_else(|| ClusterSize::from_sectors(said.unwrap_or(CLUSTER_SECTORS)));
        self.clusters
            .push(cluster.ok_or_else(|| Error::errno(libc::EINVAL))?);
        self.parts.push(opened);
        Ok(())
    }

    fn examine(&mut self, bundle: &Bundle<'_>, part: usize) -> Result<()> {
        // What no word can give up comes first.
        self.nothing_shows_through(bundle, part)?;
        let (lower, uppers) = self.images(part)?;
        let examined = self.merge_of(part, &lower, &uppers).examine()?;
        self.add(examined);
        Ok(())
    }

    fn merge_of<'a>(&self, part: usize, lower: &'a Image, uppers: &'a [Image]) -> Merge<'a> {
        Merge {
            lower,
            uppers,
            cluster: self.clusters[part],
            window: WINDOW,
            force_discard: self.losses.force_discard,
        }
    }

    /// The survivor keeps its size, and what lies behind its end goes. Refuses where that is more
    /// than the snapshots that go: a larger disk that stands on the survivor would show it.
    fn nothing_shows_through(&self, bundle: &Bundle<'_>, part: usize) -> Result<()> {
        let images: Vec<&Image> = self.parts[part].iter().map(|one| &one.image).collect();
        let end = images.last().map_or(0, |image| image.disk_len());
        if images.iter().all(|image| image.disk_len() <= end) {
            return Ok(());
        }
        let (descriptor, survivor) = (bundle.descriptor(), self.survivor());
        let mut longest = end;
        for guid in standing_on(descriptor, survivor) {
            longest = longest.max(match guid == descriptor.top {
                // It may be one that is still to be made.
                true => part_len(descriptor, part)?,
                false => open(bundle, part, guid)?.image.disk_len(),
            });
        }
        for image in images {
            let found = data_in(&**image.storage(), image.header(), end..longest.max(end));
            if let Some(byte) = found.map_err(|e| e.in_file(image.path()))? {
                let why = format!(
                    "{survivor} is smaller than what is below it, and a larger disk that stands on \
                     it shows data from there, at byte {byte}"
                );
                return Err(Error::why(ErrorKind::Unsupported, why)
                    .in_file(image.path())
                    .fix("delete what stands on it first, or convert the disk to a new one"));
            }
        }
        Ok(())
    }

    fn add(&mut self, examined: Examined) {
        let amount = examined.amount;
        self.discards.extend(examined.discards);
        self.amount.clusters += amount.clusters;
        self.amount.fresh += amount.fresh;
        self.amount.bytes += amount.bytes;
    }

    /// The images of a part: the lowest, and those above it.
    fn images(&self, part: usize) -> Result<(Image, Vec<Image>)> {
        let mut images = Vec::new();
        for opened in &self.parts[part] {
            images.push(again(&opened.image)?);
        }
        let lower = images.remove(0);
        Ok((lower, images))
    }

    /// A new image that the whole chain of a part goes to.
    fn new_image(&mut self, bundle: &Bundle<'_>, part: usize, name: &str) -> Result<()> {
        let taken = |why: &str| Err(Error::why(ErrorKind::Usage, why).in_file(Path::new(name)));
        let is_plain = Path::new(name).file_name().and_then(|n| n.to_str()) == Some(name);
        if !is_plain || name.starts_with(bundle.name()) {
            return taken("the new file is made in the bundle: give a plain name");
        }
        let name = &part_name(name, part, self.parts.len());
        if bundle.taken()?.contains(name) {
            return taken("a file of this name is there already");
        }
        let (lower, uppers) = self.images(part)?;
        let top = uppers.last().unwrap_or(&lower);
        let version = top.header().map_or(Version::V2, |header| header.version());
        let len = if self.survivor() == bundle.descriptor().top {
            part_len(bundle.descriptor(), part)?
        } else {
            top.disk_len()
        };
        if len != top.disk_len() && top.header().is_some() {
            return taken("the image's header and the descriptor differ in the size of the disk");
        }
        self.nothing_shows_through(bundle, part)?;
        let image = new::NewImage::empty(name.clone(), version, self.clusters[part], len)?;
        let mut sources = vec![lower];
        sources.extend(uppers);
        let (cluster, force) = (self.clusters[part], self.losses.force_discard);
        self.add(merge::examine_new(
            &sources,
            cluster,
            &image.layout()?,
            force,
        )?);
        self.into_new.push(image);
        let digits = Guid::random(random::sixteen()?);
        self.temporary.push(format!("merging.{digits}"));
        Ok(())
    }

    /// The change of the descriptor in the end.
    fn edits(&self, descriptor: &Descriptor) -> Vec<Edit> {
        let (lowest, survivor) = (self.chain[0], self.survivor());
        let mut edits = Vec::new();
        for guid in self.chain.iter().skip(1) {
            edits.push(Edit::RemoveImages(*guid));
        }
        if self.into_new.is_empty() {
            edits.push(Edit::RenameImages {
                from: lowest,
                to: survivor,
            });
        } else {
            edits.push(Edit::RemoveImages(lowest));
        }
        for (part, image) in self.into_new.iter().enumerate() {
            edits.push(Edit::AddImage {
                part,
                image: descriptor::Image {
                    guid: survivor,
                    kind: ImageType::Compressed,
                    file: image.name.clone(),
                },
            });
        }
        for guid in self.chain.iter().take(self.chain.len() - 1) {
            edits.push(Edit::RemoveShot(*guid));
        }
        edits.push(Edit::SetParent {
            guid: survivor,
            parent: parent(descriptor, lowest),
        });
        edits
    }
}

/// All that was made from a snapshot, and from that, and so on.
fn standing_on(descriptor: &Descriptor, guid: Guid) -> HashSet<Guid> {
    let mut made: HashMap<Guid, Vec<Guid>> = HashMap::new();
    for shot in &descriptor.snapshots {
        made.entry(shot.parent.unwrap_or(Guid::NONE))
            .or_default()
            .push(shot.guid);
    }
    let mut found = HashSet::new();
    let mut open = vec![guid];
    while let Some(next) = open.pop() {
        let children = made.remove(&next).unwrap_or_default();
        found.extend(children.iter().copied());
        open.extend(children);
    }
    found
}

/// The same image as it is now.
fn again(image: &Image) -> Result<Image> {
    let storage = image.storage().clone();
    match image.header() {
        Some(_) => Image::expanding(image.path(), storage),
        None => Image::plain(image.path(), storage),
    }
}

/// The name of a part's new file: a split disk has one for each.
fn part_name(name: &str, part: usize, parts: usize) -> String {
    match name.strip_suffix(".hds") {
        _ if parts < 2 => name.to_owned(),
        Some(stem) => format!("{stem}.{part}.hds"),
        None => format!("{name}.{part}"),
    }
}

/// Steps 2 to 6.
pub(super) fn carry_out(
    bundle: &mut Bundle<'_>,
    job: &Job,
    progress: &Progress,
) -> Result<Vec<String>> {
    let edits = job.edits(bundle.descriptor());
    bundle.settle()?;
    let mut names = job.files.clone();
    names.extend(job.temporary.iter().cloned());
    bundle.announce(&names)?;
    progress.step("merging", job.amount.bytes);
    if job.into_new.is_empty() {
        let going = job.chain.iter().take(job.chain.len() - 1);
        let marks: Vec<Edit> = going
            .filter(|guid| !is_marked(bundle.descriptor(), **guid))
            .map(|guid| Edit::Mark(*guid))
            .collect();
        if !marks.is_empty() {
            bundle.replace(&marks)?;
        }
    }
    let merged = job.merge(bundle, progress).and_then(|()| {
        let new = job.into_new.iter().map(|image| image.name.as_str());
        let pairs: Vec<_> = job.temporary.iter().map(String::as_str).zip(new).collect();
        bundle.name_new(&names, &pairs)
    });
    if let Err(error) = merged {
        if !job.into_new.is_empty() {
            // The old images are as they were.
            let _ = bundle.settle();
            return Err(error);
        }
        return Err(half_way(error));
    }
    finish(bundle, &edits)
}

fn half_way(error: Error) -> Error {
    if error.fix_text().is_some() {
        return error;
    }
    error.fix("the disk can be used as it is; to go on, repeat the command")
}

impl Job {
    fn merge(&self, bundle: &Bundle<'_>, progress: &Progress) -> Result<()> {
        for part in 0..self.parts.len() {
            let (mut lower, mut uppers) = self.images(part)?;
            if let Some(image) = self.into_new.get(part) {
                let name = &self.temporary[part];
                image.make_as(name, bundle.directory(), &**lower.storage())?;
                let storage = bundle.directory().open(name, true)?;
                uppers.insert(0, lower);
                lower = Image::expanding(Path::new(&image.name), storage)?;
            }
            let merge = self.merge_of(part, &lower, &uppers);
            merge.carry_out(progress)?;
        }
        Ok(())
    }
}

/// The descriptor, and then the files that it does not name: what of them stays is told.
pub(super) fn finish(bundle: &mut Bundle<'_>, edits: &[Edit]) -> Result<Vec<String>> {
    match bundle.replace(edits) {
        Ok(()) => Ok(bundle.settle().err().iter().map(left_over).collect()),
        Err(Failure::Before(error)) => Err(half_way(error)),
        Err(unsure) => Err(unsure.into()),
    }
}
