//! Snapshots that go: dropped, merged into a neighbour, or marked until that is possible.
//!
//! What was marked because it had several children goes with the last but one of them, so that one
//! deletion may bring another: a leaf is dropped, and what it stood on has a single child now and
//! is merged into that. All of it is planned, and whatever could refuse it is found, before
//! anything is changed.
//!
//! The order, each step durable before the next begins:
//!
//! 1. The descriptor without what is dropped, or with the mark. What is merged next would change
//!    under it otherwise.
//! 2. The merge ([`super::job`]). It is repeated by the name of what it was to take away.

use super::job::{Job, Losses, Merged, carry_out, finish};
use super::{changeable, children, descriptor_error, is_marked, parent};
use crate::admin::bundle::Bundle;
use crate::admin::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::edit::Edit;
use crate::format::descriptor::{self, Descriptor};
use crate::format::guid::Guid;
use std::path::Path;

/// What becomes of a snapshot that is deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// The snapshot and its files are gone: it had no children.
    Dropped {
        /// It, and what was marked and had no child but this.
        gone: Vec<Guid>,
        /// The files.
        files: Vec<String>,
    },
    /// Its content is in its only child now.
    Merged(Merged),
    /// It has several children: it goes with the last but one of them.
    Marked {
        /// Their number.
        children: usize,
    },
}

/// What a deletion does, or has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// What becomes of the snapshot itself.
    pub what: Deleted,
    /// What goes after it: snapshots that were marked, and that a single child needs now.
    pub then: Option<Merged>,
}

/// The name in the bundle's directory of a snapshot's file, if it is there.
pub(super) fn file_of(bundle: &Bundle<'_>, part: usize, guid: Guid) -> Result<Option<String>> {
    let images = bundle.descriptor().images(part, &[guid]);
    let images = images.map_err(descriptor_error)?;
    let Some(entry) = images.first() else {
        return Ok(None);
    };
    // Opened so that it is nobody else's.
    match bundle.files().image(entry) {
        Ok(_) => Ok(bundle.files().own_name(entry)),
        Err(e) if e.kind() == ErrorKind::Missing => Ok(None),
        Err(e) => Err(e.in_file(Path::new(&entry.file))),
    }
}

/// The snapshots right below this one that are marked and have no child but the next of them, the
/// lowest first.
fn waiting(descriptor: &Descriptor, guid: Guid) -> Vec<Guid> {
    let mut found = Vec::new();
    let mut next = parent(descriptor, guid);
    while let Some(below) = next.filter(|below| is_going(descriptor, *below)) {
        // As long as all there are, it would be a ring.
        if children(descriptor, below).len() != 1 || found.len() > descriptor.snapshots.len() {
            break;
        }
        found.push(below);
        next = parent(descriptor, below);
    }
    found.reverse();
    found
}

fn is_going(descriptor: &Descriptor, guid: Guid) -> bool {
    is_marked(descriptor, guid) && guid != descriptor.top
}

/// A deletion, with all that it takes.
struct Plan {
    told: Deletion,
    /// The first change of the descriptor; none where the merge is all.
    edits: Vec<Edit>,
    job: Option<Job>,
}

impl Plan {
    fn new(bundle: &Bundle<'_>, target: Guid, losses: Losses) -> Result<Self> {
        let descriptor = bundle.descriptor();
        changeable(bundle)?;
        if target == descriptor.top {
            let why = "the top is the disk itself, and no snapshot";
            return Err(Error::why(ErrorKind::Usage, why)
                .fix("to drop what was written since a snapshot: `ploopfs snapshot switch`"));
        }
        if !descriptor.snapshots.iter().any(|shot| shot.guid == target) {
            let error = descriptor::DescriptorError::NoSuchShot(target);
            return Err(Error::new(ErrorKind::NoSuchSnapshot).because(error));
        }
        match children(descriptor, target).as_slice() {
            [] => Self::drop_leaf(bundle, target, losses),
            [child] => Self::merge(bundle, target, *child, losses),
            several => Self::mark(bundle, target, several.len(), losses),
        }
    }

    fn merge(bundle: &Bundle<'_>, target: Guid, child: Guid, losses: Losses) -> Result<Self> {
        let mut chain = waiting(bundle.descriptor(), target);
        chain.extend([target, child]);
        let job = Job::new(bundle, chain, None, losses)?;
        Ok(Self {
            told: Deletion {
                what: Deleted::Merged(job.told()),
                then: None,
            },
            edits: Vec::new(),
            job: Some(job),
        })
    }

    fn mark(bundle: &Bundle<'_>, target: Guid, count: usize, losses: Losses) -> Result<Self> {
        let descriptor = bundle.descriptor();
        let mut edits = vec![Edit::Mark(target)];
        edits.retain(|_| !is_marked(descriptor, target));
        bundle.try_edits(&edits)?;
        let mut chain = waiting(descriptor, target);
        let job = match chain.is_empty() {
            true => None,
            false => {
                let going = chain[0];
                chain.push(target);
                let job = Job::new(bundle, chain, None, losses);
                Some(job.map_err(|error| going_too(going, &error))?)
            }
        };
        Ok(Self {
            told: Deletion {
                what: Deleted::Marked { children: count },
                then: job.as_ref().map(Job::told),
            },
            edits,
            job,
        })
    }

    fn drop_leaf(bundle: &Bundle<'_>, target: Guid, losses: Losses) -> Result<Self> {
        let descriptor = bundle.descriptor();
        let mut gone = waiting(descriptor, target);
        gone.push(target);
        let (mut edits, mut files) = (Vec::new(), Vec::new());
        for guid in &gone {
            let mut has_images = false;
            for (number, part) in descriptor.parts.iter().enumerate() {
                // A snapshot whose image is not even named can go all the same.
                if part.images.iter().any(|image| image.guid == *guid) {
                    has_images = true;
                    files.extend(file_of(bundle, number, *guid)?);
                }
            }
            edits.push(Edit::RemoveShot(*guid));
            if has_images {
                edits.push(Edit::RemoveImages(*guid));
            }
        }
        let left = bundle.preview(&edits)?;
        let below = gone.first().and_then(|guid| parent(descriptor, *guid));
        let below = below.filter(|below| is_going(descriptor, *below));
        let after = |below: Guid| match children(left.descriptor(), below).as_slice() {
            [child] => {
                let merge = Self::merge(&left, below, *child, losses);
                Some(merge.map_err(|error| going_too(below, &error)))
            }
            _ => None,
        };
        let job = below.and_then(after).transpose()?.and_then(|plan| plan.job);
        Ok(Self {
            told: Deletion {
                what: Deleted::Dropped { gone, files },
                then: job.as_ref().map(Job::told),
            },
            edits,
            job,
        })
    }

    /// An error of the merge that came after the first change.
    fn late(&self, target: Guid, error: Error) -> Error {
        let what = match &self.told.what {
            Deleted::Merged(_) => return error,
            Deleted::Dropped { .. } => "gone",
            Deleted::Marked { .. } => "marked",
        };
        let then = self.told.then.iter().flat_map(|merged| merged.gone.last());
        let then: String = then.map(Guid::to_string).collect();
        let why = format!("{target} is {what}, but {then}, which was to go with it, is not");
        Error::why(error.kind(), format!("{why}: {error}"))
            .fix("`ploopfs snapshot delete` with its name goes on with that")
    }
}

/// An error of what goes with the snapshot that was named.
fn going_too(guid: Guid, error: &Error) -> Error {
    let (kind, place) = (error.kind(), error.place());
    let why = error.why_text().unwrap_or_else(|| kind.phrase().to_owned());
    let why = format!("{guid}, which was marked, is to go with it, and cannot: {why}");
    let mut new = Error::why(kind, why);
    if let Some(path) = &place.path {
        new = new.in_file(path);
    }
    if let Some(cluster) = place.cluster {
        new = new.at_cluster(cluster);
    }
    match error.fix_text() {
        Some(fix) => new.fix(fix),
        None => new,
    }
}

/// What a deletion would do. Changes nothing.
pub fn plan_delete(bundle: &Bundle<'_>, target: Guid, losses: Losses) -> Result<Deletion> {
    Ok(Plan::new(bundle, target, losses)?.told)
}

/// A snapshot goes; its name is no more, and all others show what they did. With it, what could not
/// be done after the change was made, which takes nothing of it back.
pub fn delete(
    bundle: &mut Bundle<'_>,
    target: Guid,
    losses: Losses,
    progress: &Progress,
) -> Result<(Deletion, Vec<String>)> {
    let plan = Plan::new(bundle, target, losses)?;
    let mut warnings = match &plan.told.what {
        Deleted::Dropped { files, .. } => {
            bundle.settle()?;
            bundle.announce(files)?;
            finish(bundle, &plan.edits)?
        }
        Deleted::Merged(_) => Vec::new(),
        Deleted::Marked { .. } => {
            // Marked already, it may be only until a power cut.
            bundle.settle()?;
            if !plan.edits.is_empty() {
                bundle.replace(&plan.edits)?;
            }
            Vec::new()
        }
    };
    if let Some(job) = &plan.job {
        let more = carry_out(bundle, job, progress);
        warnings.extend(more.map_err(|error| plan.late(target, error))?);
    }
    Ok((plan.told, warnings))
}

/// What becomes of a snapshot with what stood on it, which is gone: it goes too where it was marked
/// because it had several children, and one or none is left.
pub(super) fn collapses(descriptor: &Descriptor, guid: Guid) -> bool {
    is_going(descriptor, guid) && children(descriptor, guid).len() < 2
}
