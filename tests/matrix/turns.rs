//! ploop's offline verbs on disks of every kind, and ours on what they leave.
//!
//! Imports: `case`, `changing`, `disk`, `kinds`, `peers`.
//! Never: excuses ploop for anything but what it says itself.

use crate::case::{Case, Copy, Verdict, does};
use crate::changing::{NO_BUNDLE, NO_SNAPSHOTS, without};
use crate::disk::{self, Contents};
use crate::kinds::Form;
use crate::peers;
use crate::support::Outcome;
use anyhow::{Context, ensure};
use std::sync::Arc;

const SPLIT: &str = "ploop knows no disks in parts";
const MARKED: &str =
    "ploop takes Parallels Desktop's mark of a closed image for that of an open one";
const NEW: &str = "{0c2f3f0e-0007-4a55-8f2e-6a1f3d0b9c11}";
const OURS: &str = "{0c2f3f0e-0008-4a55-8f2e-6a1f3d0b9c11}";

/// Why ploop cannot do it with such a disk.
fn excuse(case: &Case, needs_snapshots: bool) -> Option<&'static str> {
    match case.kind.form {
        Form::Split => Some(SPLIT),
        Form::Bare | Form::Bitmap => Some(NO_BUNDLE),
        _ if needs_snapshots && !case.kind.has_snapshots() => Some(NO_SNAPSHOTS),
        _ => None,
    }
}

/// Our verbs go on from there: a snapshot more and less, and the size.
fn goes_on(case: &Case, copy: &Copy, wanted: &Contents) -> Outcome {
    case.expect(&copy.disk, wanted)
        .context("as ploop left it")?;
    does(
        &["snapshot", "create", "-q", "--uuid", OURS],
        &copy.disk,
        &[],
    )?;
    let top = disk::view(&copy.disk)?.top;
    disk::scribble(&disk::view(&copy.disk)?.top_file()?, 21, 30, 0)?;
    does(&["snapshot", "switch", "-qy"], &copy.disk, &[OURS])?;
    does(&["snapshot", "delete", "-qy"], &copy.disk, &[OURS])?;
    does(&["resize", "-q"], &copy.disk, &["+2M"])?;
    ensure!(
        disk::view(&copy.disk)?.top == top,
        "the top has another name"
    );
    case.expect(&copy.disk, wanted).context("after ours")
}

pub(crate) fn snapshot(case: &Case) -> Verdict {
    if let Some(why) = excuse(case, false) {
        return Ok(Some(why));
    }
    let copy = case.fresh()?;
    peers::ploop(&copy.disk, &["snapshot", "-u", NEW])?;
    let mut wanted = case.contents.clone();
    let now = wanted.remove(&case.view.top).context("the top")?;
    wanted.insert(NEW.to_owned(), Arc::clone(&now));
    wanted.insert(disk::view(&copy.disk)?.top, now);
    goes_on(case, &copy, &wanted)?;
    Ok(None)
}

pub(crate) fn snapshot_delete(case: &Case) -> Verdict {
    if let Some(why) = excuse(case, true) {
        return Ok(Some(why));
    }
    for shot in case.view.frozen() {
        // ploop has the top and what is below it alone in view.
        if case.view.children(&shot.guid).len() > 1 {
            continue;
        }
        let copy = case.fresh()?;
        peers::ploop(&copy.disk, &["snapshot-delete", "-u", &shot.guid])?;
        let left = without(&case.contents, &[&shot.guid]);
        let what = || format!("without {}", shot.guid);
        case.expect(&copy.disk, &left).with_context(what)?;
        if case.view.children(&shot.guid).is_empty() {
            goes_on(case, &copy, &left).with_context(what)?;
        }
    }
    Ok(None)
}

pub(crate) fn snapshot_merge(case: &Case) -> Verdict {
    if let Some(why) = excuse(case, true) {
        return Ok(Some(why));
    }
    let copy = case.fresh()?;
    peers::ploop(&copy.disk, &["snapshot-merge"])?;
    let below = case.view.shot(&case.view.top)?.parent.clone();
    let left = without(&case.contents, &[&below.context("a parent")?]);
    goes_on(case, &copy, &left)?;
    Ok(None)
}

pub(crate) fn snapshot_switch(case: &Case) -> Verdict {
    if let Some(why) = excuse(case, true) {
        return Ok(Some(why));
    }
    for shot in case.view.frozen() {
        let copy = case.fresh()?;
        peers::ploop(&copy.disk, &["snapshot-switch", "-u", &shot.guid])?;
        let mut wanted = without(&case.contents, &[&case.view.top]);
        let top = disk::view(&copy.disk)?.top;
        wanted.insert(top, case.contents[&shot.guid].clone());
        let what = || format!("to {}", shot.guid);
        case.expect(&copy.disk, &wanted).with_context(what)?;
        if case.view.children(&shot.guid).is_empty() {
            goes_on(case, &copy, &wanted).with_context(what)?;
        }
    }
    Ok(None)
}

pub(crate) fn grow(case: &Case) -> Verdict {
    if case.kind.form == Form::Single {
        return Ok(Some(MARKED));
    }
    if let Some(why) = excuse(case, false) {
        return Ok(Some(why));
    }
    let copy = case.fresh()?;
    let (old, size) = (case.top().len(), "24M");
    peers::ploop(&copy.disk, &["grow", "-s", size])?;
    let now = disk::contents(&copy.disk)?[&case.view.top].len();
    ensure!(now == 24 << 20 && now > old, "{now} bytes");
    goes_on(case, &copy, &case.contents)?;
    Ok(None)
}

/// Ours first, then ploop's on what we made, and ours again.
pub(crate) fn in_turn(case: &Case) -> Verdict {
    if case.kind.form == Form::Single {
        return Ok(Some(MARKED));
    }
    if let Some(why) = excuse(case, false) {
        return Ok(Some(why));
    }
    let copy = case.fresh()?;
    let disk = &copy.disk;
    does(&["snapshot", "create", "-q", "--uuid", OURS], disk, &[])?;
    disk::scribble(&disk::view(disk)?.top_file()?, 41, 30, 0)?;
    peers::ploop(disk, &["snapshot", "-u", NEW])?;
    disk::scribble(&disk::view(disk)?.top_file()?, 42, 30, 0)?;
    let mut wanted = disk::contents(disk)?;
    ensure!(
        wanted[OURS] == case.contents[&case.view.top],
        "changed by ploop"
    );
    case.expect(disk, &wanted)?;
    peers::ploop(disk, &["snapshot-delete", "-u", OURS])?;
    wanted.remove(OURS);
    case.expect(disk, &wanted).context("ploop deleted ours")?;
    does(&["snapshot", "delete", "-qy"], disk, &[NEW])?;
    wanted.remove(NEW);
    case.expect(disk, &wanted).context("we deleted theirs")?;
    does(&["resize", "-q"], disk, &["+2M"])?;
    peers::ploop(disk, &["grow", "-s", "24M"])?;
    case.expect(disk, &wanted).context("grown by both")?;
    does(&["compact", "-qy"], disk, &[])?;
    case.expect(disk, &wanted)?;
    Ok(None)
}
