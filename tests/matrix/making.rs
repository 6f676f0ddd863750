//! Commands that make a disk of another: the new one is right, and the old one is not touched.
//!
//! Imports: `case`, `disk`, `kinds`, `support`.
//! Never: takes a copy's word for it.

use crate::case::{Case, Verdict, does};
use crate::disk::{self, Contents};
use crate::forge::reader;
use crate::kinds::{Form, Kind, Maker};
use crate::peers;
use crate::support::Outcome;
use crate::support::command;
use crate::support::guards::text;
use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// An empty disk of the same shape.
pub(crate) fn create(case: &Case) -> Verdict {
    let Kind {
        form,
        version,
        cluster,
        maker,
    } = case.kind;
    if form == Form::Split {
        return Ok(Some("disks in parts are made by Parallels Desktop only"));
    }
    let copy = case.fresh()?;
    let disk = copy.beside(if case.kind.is_bundle() {
        "new.hdd"
    } else {
        "new.hds"
    });
    let size = format!("{}K", case.kind.size() >> 10);
    let mut args = vec!["create", "-q", "-s", &size];
    let (version_text, cluster_text) = (version.to_string(), format!("{cluster}K"));
    match form {
        Form::Plain | Form::OverPlain => args.extend(["-f", "plain"]),
        Form::Preallocated => args.extend(["-f", "preallocated"]),
        _ => {}
    }
    match maker {
        Maker::Parallels if case.kind.is_bundle() && (version, cluster) == (1, 1024) => {
            args.extend(["--for", "parallels-desktop"]);
        }
        Maker::Ploop => args.extend(["--for", "virtuozzo"]),
        _ => {}
    }
    if !matches!(form, Form::Plain | Form::OverPlain) {
        args.extend(["--image-version", &version_text]);
        args.extend(["--cluster-size", &cluster_text]);
    }
    does(&args, &disk, &[])?;
    let bytes = usize::try_from(case.kind.size())?;
    let zeros: Contents = [(disk::view(&disk)?.top, Arc::new(vec![0; bytes]))].into();
    case.expect(&disk, &zeros)?;
    if !matches!(form, Form::Plain | Form::OverPlain) {
        let image = disk::view(&disk)?.top_file()?;
        let fields = reader::fields(&File::open(image)?)?.context("an image")?;
        ensure!((fields.version, fields.cluster) == (version, cluster * 2));
    }
    Ok(None)
}

/// A new disk shows the same as the top, and a judge of its format agrees.
fn expect_flat(case: &Case, made: &Path) -> Outcome {
    let raw = case.raw(&case.view.top);
    if made.extension().is_some_and(|end| end == "qcow2") {
        let qemu = |args: &[&str]| command::ok(command::new("qemu-img").args(args));
        qemu(&["check", "-q", text(made)])?;
        let args = ["compare", "-q", "-f", "qcow2", "-F", "raw"];
        qemu(&[&args[..], &[text(made), text(&raw)]].concat())?;
        return Ok(());
    }
    let found = disk::contents(made)?;
    let view = disk::view(made)?;
    ensure!(found.len() == 1, "a flat disk has no snapshots");
    disk::expect_same("converted", case.top(), &found[&view.top])?;
    let image = view.top_file()?;
    if reader::fields(&File::open(&image)?)?.is_none() {
        return Ok(());
    }
    does(&["check", "-q"], made, &[])?;
    peers::qemu_check(&image)?;
    peers::qemu_compare(&view, &view.top, &raw)?;
    peers::ploop_check(&image, made.parent().context("a directory")?)?;
    if made.is_dir() {
        peers::ploop_list(made, &view)?;
    }
    Ok(())
}

/// To another format, and from there to the format that the disk had.
fn there_and_back(case: &Case, name: &str) -> Verdict {
    let copy = case.fresh()?;
    let there = copy.beside(name);
    case_convert(case, &copy.disk, &there, &[])?;
    expect_flat(case, &there)?;
    let before = disk::traces(&there)?;
    let back = copy.beside(if case.kind.is_bundle() {
        "back.hdd"
    } else {
        "back.hds"
    });
    let (version, cluster) = (
        case.kind.version.to_string(),
        format!("{}K", case.kind.cluster),
    );
    let shape = ["--image-version", &version, "--cluster-size", &cluster];
    case_convert(case, &there, &back, &shape)?;
    disk::expect_untouched(&before, &there, "converting back")?;
    expect_flat(case, &back)?;
    Ok(None)
}

fn case_convert(case: &Case, from: &Path, to: &Path, args: &[&str]) -> Outcome {
    let before = disk::traces(from)?;
    does(&[&["convert", "-q"], args].concat(), from, &[text(to)])?;
    disk::expect_untouched(&before, from, "convert")?;
    ensure!(case.stock.exists());
    Ok(())
}

pub(crate) fn convert_raw(case: &Case) -> Verdict {
    there_and_back(case, "x.raw")
}

pub(crate) fn convert_hds(case: &Case) -> Verdict {
    there_and_back(case, "x.hds")
}

pub(crate) fn convert_hdd(case: &Case) -> Verdict {
    there_and_back(case, "x.hdd")
}

pub(crate) fn convert_qcow2(case: &Case) -> Verdict {
    there_and_back(case, "x.qcow2")
}

pub(crate) fn convert_snapshot(case: &Case) -> Verdict {
    if !case.kind.has_snapshots() {
        return Ok(Some("there are no snapshots"));
    }
    let copy = case.fresh()?;
    for (number, shot) in case.view.frozen().into_iter().enumerate() {
        let to = copy.beside(&format!("{number}.raw"));
        case_convert(case, &copy.disk, &to, &["--snapshot", &shot.guid])?;
        let same = std::fs::read(&to)? == *case.contents[&shot.guid];
        ensure!(same, "{} is another in a plain file", shot.guid);
    }
    Ok(None)
}

pub(crate) fn copy(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let to = copy.beside("to");
    std::fs::create_dir(&to)?;
    let clone = to.join(case.kind.file_name());
    let before = disk::traces(&copy.disk)?;
    does(&["copy", "-q"], &copy.disk, &[text(&clone)])?;
    disk::expect_untouched(&before, &copy.disk, "copy")?;
    if case.kind.form == Form::Bitmap {
        ensure!(std::fs::read(&clone)? == std::fs::read(&case.stock)?);
        return Ok(None);
    }
    case.expect(&clone, &case.contents)?;
    Ok(None)
}

pub(crate) fn copy_new_guids(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let clone = copy.beside(if case.kind.is_bundle() {
        "n.hdd"
    } else {
        "n.hds"
    });
    if !case.kind.is_bundle() {
        case.refuses(&copy, &["copy", "--new-guids"], &[text(&clone)])?;
        return Ok(Some(
            "an image by itself has no GUIDs (refused, nothing touched)",
        ));
    }
    let before = disk::traces(&copy.disk)?;
    does(&["copy", "-q", "--new-guids"], &copy.disk, &[text(&clone)])?;
    disk::expect_untouched(&before, &copy.disk, "copy --new-guids")?;
    let view = disk::view(&clone)?;
    ensure!(view.shots.len() == case.view.shots.len());
    // The snapshots stand in the same order.
    let pairs = case.view.shots.iter().zip(&view.shots);
    let names: BTreeMap<_, _> = pairs.map(|(old, new)| (&old.guid, &new.guid)).collect();
    let mut wanted = Contents::new();
    for (old, new) in names {
        ensure!((old == new) == (*old == case.view.top), "{old}, {new}");
        wanted.insert(new.clone(), case.contents[old].clone());
    }
    case.expect(&clone, &wanted)?;
    Ok(None)
}
