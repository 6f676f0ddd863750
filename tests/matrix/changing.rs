//! Commands that change a disk: every snapshot that should still be there shows what it did.
//!
//! Imports: `case`, `disk`, `forge`, `kinds`, `support`.
//! Never: lets a snapshot go unread that the command had no business with.

use crate::case::{Case, Copy, Verdict, does, run};
use crate::disk::{self, Contents};
use crate::forge::corrupt;
use crate::kinds::{Form, Maker};
use crate::peers;
use crate::support::guards::text;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) const NO_SNAPSHOTS: &str = "there are no snapshots";
pub(crate) const NO_BUNDLE: &str = "an image by itself has no snapshots (refused, nothing touched)";
const PLAIN: &str = "a plain file is left as it is";
const NEW: &str = "{0c2f3f0e-0009-4a55-8f2e-6a1f3d0b9c11}";

pub(crate) fn snapshot_create(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    if !case.kind.is_bundle() {
        case.refuses(&copy, &["snapshot", "create"], &[])?;
        return Ok(Some(NO_BUNDLE));
    }
    let args = ["snapshot", "create", "--name", "a name", "--uuid", NEW];
    let said = does(&args, &copy.disk, &[])?;
    ensure!(said.trim() == NEW, "{said}");
    let mut wanted = case.contents.clone();
    let top = disk::view(&copy.disk)?.top;
    let now = wanted.remove(&case.view.top).context("the top")?;
    wanted.insert(NEW.to_owned(), Arc::clone(&now));
    wanted.insert(top, now);
    case.expect(&copy.disk, &wanted)?;
    // What is written from now on is the top's alone.
    disk::scribble(&disk::view(&copy.disk)?.top_file()?, 12, 30, 0)?;
    let top = disk::view(&copy.disk)?.top;
    wanted.insert(top.clone(), disk::contents(&copy.disk)?[&top].clone());
    case.expect(&copy.disk, &wanted)?;
    Ok(None)
}

pub(crate) fn snapshot_rename(case: &Case) -> Verdict {
    if !case.kind.has_snapshots() {
        return Ok(Some(NO_SNAPSHOTS));
    }
    let copy = case.fresh()?;
    for (number, shot) in case.view.frozen().into_iter().enumerate() {
        let name = format!("name {number}");
        does(
            &["snapshot", "rename", "-q"],
            &copy.disk,
            &[&shot.guid, &name],
        )?;
    }
    let list = does(&["snapshot", "list"], &copy.disk, &[])?;
    ensure!(
        list.contains("\"name 0\"") && list.contains("\"name 3\""),
        "{list}"
    );
    case.expect(&copy.disk, &case.contents)?;
    Ok(None)
}

fn switch(case: &Case, keep: bool) -> Verdict {
    if !case.kind.has_snapshots() {
        return Ok(Some(NO_SNAPSHOTS));
    }
    for shot in case.view.frozen() {
        let copy = case.fresh()?;
        let guid = shot.guid.as_str();
        let how = if keep { "--keep" } else { "-y" };
        does(&["snapshot", "switch", "-q", how], &copy.disk, &[guid])?;
        let (mut wanted, view) = (case.contents.clone(), disk::view(&copy.disk)?);
        let old = wanted.remove(&case.view.top).context("the top")?;
        let new: Vec<_> = view.frozen().into_iter().collect();
        let kept = new
            .into_iter()
            .find(|shot| !case.contents.contains_key(&shot.guid));
        ensure!(kept.is_some() == keep, "{kept:?}");
        if let Some(kept) = kept {
            wanted.insert(kept.guid.clone(), old);
        }
        wanted.insert(view.top.clone(), case.contents[guid].clone());
        case.expect(&copy.disk, &wanted)
            .with_context(|| format!("to {guid}"))?;
    }
    Ok(None)
}

pub(crate) fn snapshot_switch(case: &Case) -> Verdict {
    switch(case, false)
}

pub(crate) fn snapshot_switch_keep(case: &Case) -> Verdict {
    switch(case, true)
}

pub(crate) fn without(contents: &Contents, guids: &[&str]) -> Contents {
    let mut left = contents.clone();
    left.retain(|guid, _| !guids.contains(&guid.as_str()));
    left
}

pub(crate) fn snapshot_delete(case: &Case) -> Verdict {
    if !case.kind.has_snapshots() {
        return Ok(Some(NO_SNAPSHOTS));
    }
    for shot in case.view.frozen() {
        let copy = case.fresh()?;
        let guid = shot.guid.as_str();
        let several = case.view.children(guid).len() > 1;
        does(&["snapshot", "delete", "-qy"], &copy.disk, &[guid])?;
        let list = does(&["snapshot", "list", "--json"], &copy.disk, &[])?;
        ensure!(list.contains("\"is_going\": true") == several, "{list}");
        let left = if several {
            case.contents.clone()
        } else {
            without(&case.contents, &[guid])
        };
        case.expect(&copy.disk, &left)
            .with_context(|| format!("without {guid}"))?;
    }
    // All of them, one after the other, until the top is by itself.
    let copy = case.fresh()?;
    let mut left = case.contents.clone();
    for shot in case.view.frozen().into_iter().rev() {
        does(&["snapshot", "delete", "-qy"], &copy.disk, &[&shot.guid])?;
        left.remove(&shot.guid);
        case.expect(&copy.disk, &left)
            .with_context(|| format!("then without {}", shot.guid))?;
    }
    Ok(None)
}

/// The chain alone, without what is beside it.
fn chain_only(case: &Case) -> Result<(Copy, Contents)> {
    let copy = case.fresh()?;
    let chain = case.view.chain(&case.view.top)?;
    let mut left = case.contents.clone();
    for shot in case.view.frozen() {
        if !chain.contains(&shot) {
            does(&["snapshot", "delete", "-qy"], &copy.disk, &[&shot.guid])?;
            left.remove(&shot.guid);
        }
    }
    Ok((copy, left))
}

/// The top or a snapshot goes into what is below it.
fn merge_one(case: &Case, extra: &[&str]) -> Verdict {
    if !case.kind.has_snapshots() {
        return Ok(Some(NO_SNAPSHOTS));
    }
    let args = [&["merge", "-qy"], extra].concat();
    let chain = case.view.chain(&case.view.top)?;
    for upper in &chain[1..] {
        let copy = case.fresh()?;
        let lower = upper.parent.as_deref().context("a parent")?;
        let is_top = upper.guid == case.view.top;
        let named = if is_top {
            &[][..]
        } else {
            &[upper.guid.as_str()]
        };
        if case.view.children(lower).len() > 1 {
            case.refuses(&copy, &args, named)?;
            continue;
        }
        does(&args, &copy.disk, named)?;
        let left = without(&case.contents, &[lower]);
        case.expect(&copy.disk, &left)
            .with_context(|| format!("{} merged", upper.guid))?;
    }
    Ok(None)
}

pub(crate) fn merge(case: &Case) -> Verdict {
    merge_one(case, &[])
}

pub(crate) fn merge_into_new(case: &Case) -> Verdict {
    merge_one(case, &["--into-new", "new.hds"])
}

fn merge_whole(case: &Case, extra: &[&str]) -> Verdict {
    if !case.kind.has_snapshots() {
        return Ok(Some(NO_SNAPSHOTS));
    }
    let (copy, mut left) = chain_only(case)?;
    does(
        &[&["merge", "-qy", "--all"], extra].concat(),
        &copy.disk,
        &[],
    )?;
    left.retain(|guid, _| *guid == case.view.top);
    case.expect(&copy.disk, &left)?;
    Ok(None)
}

pub(crate) fn merge_all(case: &Case) -> Verdict {
    merge_whole(case, &[])
}

pub(crate) fn merge_all_into_new(case: &Case) -> Verdict {
    merge_whole(case, &["--into-new", "new.hds"])
}

fn resized(copy: &Copy, top: &str) -> Result<usize> {
    Ok(disk::contents(&copy.disk)?[top].len())
}

pub(crate) fn resize_grow(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let old = case.top().len();
    let args = [&["resize", "-qy"], case.drops()].concat();
    for _ in 0..2 {
        does(&args, &copy.disk, &["+4M"])?;
    }
    ensure!(resized(&copy, &case.view.top)? == old + (8 << 20));
    case.expect(&copy.disk, &case.contents)?;
    // With clusters of 64 KiB the table needs more of them now, and data gives way.
    does(&args, &copy.disk, &["3G"])?;
    does(&["check"], &copy.disk, &[])?;
    for (guid, bytes) in case.contents.iter().filter(|_| copy.disk.is_dir()) {
        let found = disk::start_of(&copy.disk, guid, bytes.len())?;
        disk::expect_same(guid, bytes, &found)?;
    }
    let image = disk::view(&copy.disk)?.top_file()?;
    if case.kind.form != Form::Plain {
        peers::qemu_check(&image)?;
        peers::ploop_check(&image, copy.dir(), false)?;
    }
    Ok(None)
}

pub(crate) fn resize_shrink(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let drops = case.drops();
    let old = case.top().len();
    does(&[&["resize", "-qy"], drops].concat(), &copy.disk, &["+24M"])?;
    case.refuses(&copy, &[&["resize"], drops].concat(), &["-8M"])?;
    let args = [&["resize", "-qy", "--shrink"], drops].concat();
    for less in ["-8M".to_owned(), old.to_string()] {
        does(&args, &copy.disk, &[&less])?;
    }
    ensure!(resized(&copy, &case.view.top)? == old);
    case.expect(&copy.disk, &case.contents)?;
    // What has data in it stays, unless it may be lost.
    case.refuses(&copy, &args, &["2M"])?;
    Ok(None)
}

fn compacted(case: &Case, mode: &[&str]) -> Verdict {
    let copy = case.fresh()?;
    let args = [&["compact", "-qy"], case.drops(), mode].concat();
    if case.kind.form == Form::Plain {
        case.looks(&copy, &args, &[])?;
        return Ok(Some(PLAIN));
    }
    // Something to move: clusters that nothing names, in the file that is written.
    let file = disk::view(&copy.disk)?.top_file()?;
    let len = |file: &Path| fs::metadata(file).map(|meta| meta.len());
    let as_made = len(&file)?;
    if case.kind.form != Form::Bitmap {
        disk::scribble(&file, 31, 60, 1)?;
    }
    let wanted = disk::contents(&copy.disk)?;
    let others = case.view.frozen().into_iter();
    ensure!(
        others
            .into_iter()
            .all(|shot| wanted[&shot.guid] == case.contents[&shot.guid])
    );
    let before = len(&file)?;
    // What is full already has no room for gaps: what is preallocated, and what qemu-img made of
    // data in each large cluster.
    let has_gaps = before > as_made;
    let is_full = matches!(case.kind.form, Form::Preallocated | Form::Bitmap)
        || (case.kind.maker, case.kind.cluster) == (Maker::Qemu, 1024);
    ensure!(has_gaps != is_full, "{as_made} bytes, then {before}");
    does(&args, &copy.disk, &[])?;
    let after = len(&file)?;
    let is_less = if has_gaps {
        after < before
    } else {
        after <= before
    };
    ensure!(is_less, "{before} bytes become {after}");
    case.expect(&copy.disk, &wanted)?;
    // There is nothing left to do.
    let before = disk::traces(&copy.disk)?;
    does(&args, &copy.disk, &[])?;
    let now = disk::traces(&copy.disk)?;
    let files = |traces: &[disk::Trace]| traces.iter().map(|t| t.path.clone()).collect::<Vec<_>>();
    ensure!(files(&before) == files(&now), "other files than before");
    ensure!(
        disk::contents(&copy.disk)? == wanted,
        "done twice, it is another disk"
    );
    Ok(None)
}

pub(crate) fn compact(case: &Case) -> Verdict {
    compacted(case, &[])
}

pub(crate) fn compact_zeroes(case: &Case) -> Verdict {
    compacted(case, &["--zeroes"])
}

pub(crate) fn compact_defrag(case: &Case) -> Verdict {
    compacted(case, &["--defrag"])
}

pub(crate) fn compact_fill_holes(case: &Case) -> Verdict {
    compacted(case, &["--fill-holes"])
}

/// Damage that loses nothing is mended, and the way back is left beside the image.
pub(crate) fn repair(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    case.looks(&copy, &["repair", "-y"], &[])
        .context("nothing to do")?;
    if matches!(case.kind.form, Form::Plain | Form::Bitmap) {
        return Ok(None);
    }
    let file = disk::view(&copy.disk)?.top_file()?;
    corrupt::apply("t-leak-tail", &file)?;
    corrupt::apply("h-in-use", &file)?;
    let bytes = fs::read(&file)?;
    let broken = disk::traces(&copy.disk)?;
    run(&["repair", "--dry-run"], &copy.disk, &[])?.expect_code(2)?;
    run(&["check", "-q"], &copy.disk, &[])?.expect_code(2)?;
    disk::expect_untouched(&broken, &copy.disk, "repair --dry-run")?;
    does(&["repair", "-qy"], &copy.disk, &[])?;
    let undo = PathBuf::from(format!("{}.undo", text(&file)));
    ensure!(undo.exists(), "no way back");
    // An undo file lies beside its image; for the judges it must not be there.
    let aside = copy.beside("undo");
    fs::rename(&undo, &aside)?;
    case.expect(&copy.disk, &case.contents)?;
    fs::rename(&aside, &undo)?;
    does(&["repair", "-qy", "--undo", text(&undo)], &copy.disk, &[])?;
    ensure!(fs::read(&file)? == bytes, "not as it was before");
    Ok(None)
}
