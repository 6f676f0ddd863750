//! Commands that only read, and those that are refused: right answers, and nothing is touched.
//!
//! Imports: `case`, `disk`, `kinds`, `support`.
//! Never: changes a disk.

use crate::case::{Case, Verdict, run};
use crate::disk;
use crate::kinds::Form;
use crate::support::guards::text;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;

const BUNDLES_ONLY: &str = "an image by itself has no snapshots (refused, nothing touched)";

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("no JSON: {text}"))
}

pub(crate) fn info(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    ensure!(!case.reads(&copy, &["info"], &[])?.is_empty());
    let said = json(&case.reads(&copy, &["info", "--json"], &[])?)?;
    ensure!(said["size_bytes"] == case.top().len(), "{said}");
    let parts = said["parts"].as_array().context("parts")?;
    let depth = parts[0]["files"].as_array().map(Vec::len);
    ensure!(
        depth == Some(case.view.chain(&case.view.top)?.len()),
        "{said}"
    );
    for shot in case.view.frozen() {
        case.reads(&copy, &["info", "--snapshot", &shot.guid], &[])?;
    }
    Ok(None)
}

/// The extents of a map cover the disk, and those without data read as zeros.
fn expect_map(map: &Value, bytes: &[u8]) -> Result<()> {
    let mut at = 0;
    for extent in map.as_array().context("a list")? {
        let number = |name: &str| extent[name].as_u64().with_context(|| name.to_owned());
        let (start, len) = (number("start")?, number("length")?);
        ensure!(start == at, "a gap or an overlap at {at}: {extent}");
        at += len;
        let range = &bytes[start as usize..at as usize];
        let is_zero = range.iter().all(|byte| *byte == 0);
        ensure!(is_zero || extent["zero"] == false, "no zeros: {extent}");
    }
    ensure!(at as usize == bytes.len(), "it ends at {at}");
    Ok(())
}

pub(crate) fn map(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    case.reads(&copy, &["map"], &[])?;
    let said = json(&case.reads(&copy, &["map", "--json"], &[])?)?;
    expect_map(&said, case.top())?;
    for shot in case.view.frozen() {
        let args = ["map", "--json", "--snapshot", &shot.guid];
        let said = json(&case.reads(&copy, &args, &[])?)?;
        expect_map(&said, &case.contents[&shot.guid]).with_context(|| shot.guid.clone())?;
    }
    Ok(None)
}

pub(crate) fn compare(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let raw = case.raw(&case.view.top);
    case.reads(&copy, &["compare", "-q"], &[text(&raw)])?;
    for shot in case.view.frozen() {
        let args = ["compare", "-q", "--snapshot", &shot.guid];
        case.reads(&copy, &args, &[text(&case.raw(&shot.guid))])?;
        let done = run(
            &["compare", "-q"],
            &copy.disk,
            &[text(&case.raw(&shot.guid))],
        )?;
        done.expect_code(1).context("another snapshot")?;
    }
    let other = copy.beside("other.raw");
    let mut bytes = case.top().to_vec();
    let at = bytes.len() / 3;
    bytes[at] ^= 1;
    fs::write(&other, bytes)?;
    let done = run(&["compare", "--json"], &copy.disk, &[text(&other)])?.expect_code(1)?;
    let found = &json(&done.text())?["first_difference"];
    ensure!(*found == at, "{found} instead of {at}");
    Ok(None)
}

pub(crate) fn checksum(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let sums = case.reads(&copy, &["checksum"], &[])?;
    let manifest = copy.beside("sums");
    fs::write(&manifest, sums)?;
    let verify = ["checksum", "-q", "--verify", text(&manifest)];
    case.reads(&copy, &verify, &[])?;
    run(&verify, &case.raw(&case.view.top), &[])?.expect_code(0)?;
    for shot in case.view.frozen() {
        run(&verify, &case.raw(&shot.guid), &[])?.expect_code(1)?;
    }
    Ok(None)
}

pub(crate) fn measure(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    for (to, name) in [("raw", "m.raw"), ("hds", "m.hds"), ("qcow2", "m.qcow2")] {
        let said = json(&case.reads(&copy, &["measure", "--json", "-O", to], &[])?)?;
        let required = said["required"].as_u64().context("required")?;
        ensure!(required <= said["fully-allocated"].as_u64().unwrap_or(0));
        let target = copy.beside(name);
        run(&["convert", "-q"], &copy.disk, &[text(&target)])?.expect_code(0)?;
        let len = fs::metadata(&target)?.len();
        ensure!(len <= required, "{to}: {len} bytes, {required} promised");
    }
    case.reads(&copy, &["measure", "-O", "hdd"], &[])?;
    Ok(None)
}

pub(crate) fn check(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let said = json(&case.reads(&copy, &["check", "--json"], &[])?)?;
    ensure!(said["state"] == "clean", "{said}");
    ensure!(case.reads(&copy, &["check", "-q"], &[])?.is_empty());
    Ok(None)
}

pub(crate) fn repair_dry_run(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    case.reads(&copy, &["repair", "--dry-run"], &[])?;
    case.reads(&copy, &["repair", "--dry-run", "--leaks-only"], &[])?;
    Ok(None)
}

pub(crate) fn list(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    if !case.kind.is_bundle() {
        case.refuses(&copy, &["snapshot", "list"], &[])?;
        return Ok(Some(BUNDLES_ONLY));
    }
    let text = case.reads(&copy, &["snapshot", "list"], &[])?;
    let said = json(&case.reads(&copy, &["snapshot", "list", "--json"], &[])?)?;
    let rows = said["snapshots"].as_array().context("snapshots")?;
    ensure!(rows.len() == case.view.shots.len(), "{said}");
    for row in rows {
        let guid = row["guid"].as_str().context("a GUID")?;
        let shot = case.view.shot(guid)?;
        ensure!(row["parent"].as_str() == shot.parent.as_deref(), "{row}");
        ensure!(row["is_top"] == (guid == case.view.top), "{row}");
        ensure!(text.contains(guid), "{text}");
        let files = row["files"].as_array().context("files")?.iter();
        let files = files.map(|file| copy.disk.join(file.as_str().unwrap_or_default()));
        let wanted = shot.files.iter().map(|file| file.file_name());
        ensure!(
            files
                .map(|f| f.file_name().map(ToOwned::to_owned))
                .collect::<Vec<_>>()
                == wanted.map(|f| f.map(ToOwned::to_owned)).collect::<Vec<_>>(),
            "{row}"
        );
    }
    Ok(None)
}

pub(crate) fn tree(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    if !case.kind.is_bundle() {
        case.refuses(&copy, &["snapshot", "tree"], &[])?;
        return Ok(Some(BUNDLES_ONLY));
    }
    let said = case.reads(&copy, &["snapshot", "tree"], &[])?;
    ensure!(said.lines().count() >= case.view.shots.len(), "{said}");
    Ok(None)
}

pub(crate) fn dry_runs(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let drops = case.drops();
    let grown = format!("{}", case.top().len() + (8 << 20));
    case.looks(&copy, &[&["resize", "-n"], drops].concat(), &[&grown])?;
    if case.kind.form != Form::Plain {
        for mode in [&[][..], &["--zeroes"], &["--defrag"], &["--fill-holes"]] {
            case.looks(&copy, &[&["compact", "-n"], drops, mode].concat(), &[])?;
        }
    }
    if !case.kind.has_snapshots() {
        return Ok(None);
    }
    for shot in case.view.frozen() {
        let id = [shot.guid.as_str()];
        case.looks(&copy, &["snapshot", "delete", "-n"], &id)?;
        case.looks(&copy, &["snapshot", "switch", "-n"], &id)?;
    }
    case.looks(&copy, &["merge", "-n"], &[])?;
    if case.kind.form != Form::Split {
        case.looks(&copy, &["merge", "-n", "--into-new", "n.hds"], &[])?;
    }
    Ok(None)
}

/// Each of them says why, and touches nothing.
pub(crate) fn refusals(case: &Case) -> Verdict {
    let copy = case.fresh()?;
    let there = copy.beside("there.hds");
    fs::write(&there, "somebody's")?;
    let there = text(&there).to_owned();
    let own = text(&copy.disk).to_owned();
    case.refuses(&copy, &["create", "-s", "8M"], &[])?;
    for target in [&there, &own] {
        case.refuses(&copy, &["convert"], &[target])?;
        case.refuses(&copy, &["copy"], &[target])?;
    }
    case.refuses(&copy, &["convert"], &["/nonexistent/x.hds"])?;
    case.refuses(&copy, &["convert", "--snapshot", "none"], &["x.raw"])?;
    case.refuses(&copy, &["resize"], &["1M"])?;
    case.refuses(&copy, &["resize", "--shrink", "-y"], &["1M"])?;
    case.refuses(&copy, &["resize", "--shrink"], &["1M"])?;
    case.refuses(&copy, &["map", "--snapshot", "none"], &[])?;
    case.refuses(&copy, &["compare"], &["/nonexistent"])?;
    case.refuses(&copy, &["checksum", "--verify", "/nonexistent"], &[])?;
    case.refuses(&copy, &["repair", "--undo", &there], &[])?;
    for verb in ["delete", "switch"] {
        case.refuses(&copy, &["snapshot", verb, "-y"], &["none"])?;
    }
    case.refuses(&copy, &["snapshot", "rename"], &["none", "new"])?;
    case.refuses(&copy, &["snapshot", "create", "--uuid", "no-guid"], &[])?;
    if !case.kind.is_bundle() {
        case.refuses(&copy, &["snapshot", "create"], &[])?;
    }
    if !case.kind.has_snapshots() {
        case.refuses(&copy, &["merge", "-y"], &[])?;
        return Ok(None);
    }
    // Nobody is there to say yes.
    let top = case.view.shot(&case.view.top)?;
    let below = top.parent.clone().context("a parent")?;
    case.refuses(&copy, &["snapshot", "delete"], &[&below])?;
    case.refuses(&copy, &["snapshot", "switch"], &[&below])?;
    case.refuses(&copy, &["snapshot", "delete", "-y"], &[&case.view.top])?;
    case.refuses(&copy, &["snapshot", "create", "--uuid", &below], &[])?;
    case.refuses(&copy, &["merge"], &[])?;
    // Snapshots that others were made from stay where they are.
    case.refuses(&copy, &["merge", "-y", "--all"], &[])?;
    let image = case.view.top_file()?;
    let name = image.file_name().context("a name")?.to_string_lossy();
    if case.kind.form != Form::Split {
        // Of parts, each gets a name of its own after this one.
        case.refuses(&copy, &["merge", "-y", "--into-new", &name], &[])?;
    }
    case.refuses(&copy, &["merge", "-y", "--into-new", "../n.hds"], &[])?;
    disk::contents(&copy.disk).map(|_| None)
}
