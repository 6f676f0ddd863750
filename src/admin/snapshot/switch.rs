//! The disk goes back to a snapshot.
//!
//! Images over the snapshot are made, and the descriptor that names them leaves out the old top, or
//! has it as a snapshot. What was marked and is needed by one child only, now that the old top is
//! gone, is merged after that: the disk is what it is to be by then, so that what fails is told and
//! takes nothing back.

use super::delete::{collapses, delete, file_of, plan_delete};
use super::{
    Created, Deletion, Losses, NewImage, Opened, add_images, changeable, check_name, closed,
    descriptor_error, empty_over, is_marked, open, parent, settle, too_deep, top_name, with_new,
};
use crate::admin::bundle::Bundle;
use crate::admin::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::edit::Edit;
use crate::format::guid::Guid;

/// What may go with the old top is lost: it is empty there.
const LOSSES: Losses = Losses {
    drop_bitmaps: true,
    force_discard: false,
};

/// What a switch does besides, or has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switched {
    /// What goes with the old top: it was marked, and waited for that.
    pub then: Option<Deletion>,
    /// What cannot go with it, and why.
    pub warnings: Vec<String>,
}

/// All that a switch takes.
struct Plan {
    /// The images of the snapshot.
    below: Vec<Opened>,
    /// Those of the top, where it becomes a snapshot.
    kept: Vec<Opened>,
    /// The files of the top, where it is dropped.
    gone: Vec<String>,
    /// The new ones.
    images: Vec<NewImage>,
    edits: Vec<Edit>,
}

impl Plan {
    fn new(bundle: &Bundle<'_>, target: Guid, file: Guid, keep: Option<Guid>) -> Result<Self> {
        changeable(bundle)?;
        let descriptor = bundle.descriptor();
        let (old, top) = (descriptor.top, top_name(descriptor));
        if target == old {
            let why = "the disk is at its top: there is nothing to go back to";
            return Err(Error::why(ErrorKind::Usage, why));
        }
        if is_marked(descriptor, target) {
            return Err(being_deleted(target));
        }
        let chain = descriptor.chain(target).map_err(descriptor_error)?;
        too_deep(chain.len())?;
        let (mut below, mut kept, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for part in 0..descriptor.parts.len() {
            below.push(open(bundle, part, target)?);
            match keep {
                Some(_) => kept.push(open(bundle, part, old)?),
                None => gone.extend(file_of(bundle, part, old)?),
            }
        }
        kept.iter().try_for_each(closed)?;
        if let Some(keep) = keep {
            check_name(descriptor, keep)?;
        }
        let images = empty_over(bundle, &below, file)?;
        let mut edits = match keep {
            Some(to) => vec![
                Edit::RenameImages { from: old, to },
                Edit::RenameShot { from: old, to },
            ],
            None => vec![Edit::RemoveImages(old), Edit::RemoveShot(old)],
        };
        add_images(&mut edits, &images, top);
        edits.push(Edit::AddShot {
            guid: top,
            parent: Some(target),
        });
        Ok(Self {
            below,
            kept,
            gone,
            images,
            edits,
        })
    }
}

/// What a switch would do. Refuses what [`switch`] would refuse, and changes nothing.
pub fn plan_switch(
    bundle: &Bundle<'_>,
    target: Guid,
    file: Guid,
    keep: Option<Guid>,
) -> Result<Switched> {
    let plan = Plan::new(bundle, target, file, keep)?;
    let after = bundle.preview(&plan.edits)?;
    let mut told = Switched::default();
    if let Some(left) = goes_with_top(bundle, &after, keep) {
        match plan_delete(&after, left, LOSSES) {
            Ok(deletion) => told.then = Some(deletion),
            Err(error) => told.warnings.push(stays(left, "will still be", &error)),
        }
    }
    Ok(told)
}

/// What has waited for the old top, which is gone, and goes now.
fn goes_with_top(before: &Bundle<'_>, after: &Bundle<'_>, keep: Option<Guid>) -> Option<Guid> {
    let left = parent(before.descriptor(), before.descriptor().top);
    left.filter(|left| keep.is_none() && collapses(after.descriptor(), *left))
}

fn stays(left: Guid, what: &str, error: &Error) -> String {
    let fix = error.fix_text().map(|fix| format!(" ({fix})"));
    let fix = fix.unwrap_or_default();
    format!(
        "{left} was to go with what is dropped, and {what} there: {error}{fix}; `ploopfs snapshot \
         delete` with its name goes on with that"
    )
}

/// The disk becomes what it was in a snapshot. What was written since is dropped, or becomes the
/// snapshot `keep`.
pub fn switch(
    bundle: &mut Bundle<'_>,
    target: Guid,
    file: Guid,
    keep: Option<Guid>,
    progress: &Progress,
) -> Result<Created> {
    let plan = Plan::new(bundle, target, file, keep)?;
    let left = goes_with_top(bundle, &bundle.preview(&plan.edits)?, keep);
    settle(&plan.kept)?;
    let mut warnings = with_new(bundle, &plan.images, &plan.below, plan.gone, &plan.edits)?;
    let mut then = None;
    if let Some(left) = left {
        match delete(bundle, left, LOSSES, progress) {
            Ok((deletion, more)) => {
                then = Some(deletion);
                warnings.extend(more);
            }
            Err(error) => warnings.push(stays(left, "is still", &error)),
        }
    }
    let images = plan.images.into_iter();
    Ok(Created {
        guid: target,
        files: images.map(|image| image.name).collect(),
        then,
        warnings,
    })
}

fn being_deleted(guid: Guid) -> Error {
    let why = format!("the snapshot {guid} is being deleted");
    Error::why(ErrorKind::NoSuchSnapshot, why)
        .fix("`ploopfs snapshot delete` with its name goes on with that")
}
