//! `map` and `measure`: against `qemu-img` on single images, against a dumb oracle on chains.

use crate::forge::content::{Level, Part};
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::kinds::{self, Made};
use crate::support::{Outcome, command, scratch};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

fn ours(verb: &[&str], path: &Path) -> Result<String> {
    command::ok(command::ploopfs(verb).arg(path))
}

fn map_of(path: &Path) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&ours(&["map", "--json"], path)?)?)
}

/// The members that QEMU has.
fn plain(map: &[Value]) -> Vec<Value> {
    let mut map = map.to_vec();
    for line in &mut map {
        line.as_object_mut().map(|line| line.remove("filename"));
    }
    map
}

pub(crate) fn map_agrees_with_qemu() -> Outcome {
    let dir = scratch()?;
    for Made { path, .. } in kinds::images(dir.path())? {
        let qemu = |output: &[&str]| {
            let mut map = command::new("qemu-img");
            command::ok(map.args(["map", "-f", "parallels"]).args(output).arg(&path))
        };
        let theirs: Vec<Value> = serde_json::from_str(&qemu(&["--output=json"])?)?;
        ensure!(plain(&map_of(&path)?) == theirs, "{}", path.display());
        ensure!(ours(&["map"], &path)? == qemu(&[])?, "{}", path.display());
    }
    let raw = dir.path().join("disk.raw");
    let file = File::create(&raw)?;
    for at in [0, 1 << 20, 5 << 20] {
        file.write_all_at(&[7; 4096], at)?;
    }
    file.set_len(8 << 20)?;
    let theirs = command::ok(
        command::new("qemu-img")
            .args(["map", "--output=json", "-f", "raw"])
            .arg(&raw),
    )?;
    let theirs: Vec<Value> = serde_json::from_str(&theirs)?;
    ensure!(plain(&map_of(&raw)?) == theirs, "raw");
    Ok(())
}

pub(crate) fn map_of_a_chain_agrees_with_qemu() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 8192).mapping(Mapped::Percent(30));
    let bundle = crate::forge::bundle::BundleSpec::chain(
        crate::forge::bundle::Style::Ploop,
        &like,
        4,
        |_, _| {},
    );
    let path = dir.path().join("chain.hdd");
    bundle.write(&path)?;
    let mut node = Value::Null;
    for file in bundle.files(&path, 0) {
        let mut over = json!({
            "driver": "parallels",
            "file": { "driver": "file", "filename": file },
        });
        if !node.is_null() {
            over["backing"] = node;
        }
        node = over;
    }
    let theirs = command::ok(
        command::new("qemu-img")
            .args(["map", "--output=json"])
            .arg(format!("json:{node}")),
    )?;
    let theirs: Vec<Value> = serde_json::from_str(&theirs)?;
    ensure!(plain(&map_of(&path)?) == theirs, "the chain's maps differ");
    Ok(())
}

pub(crate) fn deltas_named_by_hand_are_mapped() -> Outcome {
    let dir = scratch()?;
    let small = ImageSpec::new(2, 16, 8191).mapping(Mapped::Percent(40));
    let base = Level::Plain {
        seed: 1,
        level: 0,
        bytes: 8191 * 512,
    };
    for (base, format) in [(Level::Image(small.clone()), None), (base, Some("raw"))] {
        let levels = vec![base, Level::Image(small.clone())];
        let style = crate::forge::bundle::Style::Ploop;
        let bundle = crate::forge::bundle::BundleSpec::new(style, levels);
        let path = dir.path().join(format.unwrap_or("images"));
        bundle.write(&path)?;
        let files = bundle.files(&path, 0);
        let mut by_hand = command::ploopfs(&["map", "--json", "--lower"]);
        by_hand.arg(&files[0]);
        if let Some(format) = format {
            by_hand.args(["--format", format]);
        }
        let found = command::ok(by_hand.arg(&files[1]))?;
        ensure!(
            serde_json::from_str::<Vec<Value>>(&found)? == map_of(&path)?,
            "{format:?}"
        );
    }
    Ok(())
}

/// The level that answers for a byte of a part, top down; `None` for a hole.
fn level_of(part: &Part, local: u64) -> Option<usize> {
    let sector = local / 512;
    (0..part.levels.len())
        .rev()
        .find(|level| match &part.levels[*level] {
            Level::Plain { bytes, .. } => local < *bytes,
            Level::Image(spec) => {
                spec.maps(sector / u64::from(spec.cluster_sectors)) && sector < spec.disk_sectors
            }
        })
}

/// A level that is too short masks what is below it with zeros.
fn is_masked(part: &Part, local: u64) -> bool {
    let sector = local / 512;
    part.levels.iter().any(|level| match level {
        Level::Plain { .. } => false,
        Level::Image(spec) => {
            spec.maps(sector / u64::from(spec.cluster_sectors)) && sector >= spec.disk_sectors
        }
    })
}

fn number(line: &Value, name: &str) -> Result<u64> {
    line[name]
        .as_u64()
        .with_context(|| format!("{name} in {line}"))
}

pub(crate) fn map_of_chains_and_parts_agrees_with_the_model() -> Outcome {
    let dir = scratch()?;
    for Made { path, model } in kinds::bundles(dir.path())? {
        let mut at = 0;
        for line in map_of(&path)? {
            let (start, length) = (number(&line, "start")?, number(&line, "length")?);
            ensure!(start == at && length > 0, "{line} after {at}");
            at = start + length;
            let bytes = model.read(start, usize::try_from(length)?);
            if line["zero"] == true {
                ensure!(bytes.iter().all(|byte| *byte == 0), "{line}");
            } else {
                let name = line["filename"].as_str().context("a file name")?;
                let mut there = vec![0; bytes.len()];
                let read = File::open(name)?.read_at(&mut there, number(&line, "offset")?)?;
                ensure!(there == bytes && bytes.len() - read < 512, "{line}");
            }
            for sector in (start..at).step_by(512) {
                let holds = |part: &&Part| (part.start..part.end).contains(&(sector / 512));
                let part = model.parts.iter().find(holds).context("in no part")?;
                let local = sector - part.start * 512;
                if is_masked(part, local) {
                    continue;
                }
                let level = level_of(part, local);
                let depth = part.levels.len() - 1 - level.unwrap_or(0);
                ensure!(line["depth"] == depth, "{line} at {sector}: {depth}");
                let is_end = matches!(part.levels[0], Level::Plain { .. }) && level.is_none();
                ensure!(
                    is_end || line["present"] == level.is_some(),
                    "{line} at {sector}"
                );
            }
        }
        ensure!(at == model.bytes(), "{}: ends at {at}", path.display());
    }
    Ok(())
}

pub(crate) fn huge_disks_are_mapped_at_once() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("huge.hds");
    let (tib, mib) = (1_u64 << 40, 1_u64 << 20);
    let clusters = 16 * tib / mib;
    let mut spec = ImageSpec::new(2, 2048, 16 * tib / 512);
    spec.mapped = Mapped::List(vec![0, 5, clusters / 2, clusters - 1]);
    spec.no_data = true;
    spec.write(&path)?;
    let began = Instant::now();
    let map = map_of(&path)?;
    let starts = map.iter().filter(|line| line["data"] == true);
    let starts: Result<Vec<u64>> = starts.map(|line| number(line, "start")).collect();
    ensure!(starts? == [0, 5 * mib, 8 * tib, 16 * tib - mib]);
    let measured = ours(&["measure", "-O", "raw"], &path)?;
    ensure!(
        measured.contains(&format!("required size: {}", 16 * tib)),
        "{measured}"
    );
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(2), "both took {took:?}");
    Ok(())
}

pub(crate) fn measure_agrees_with_qemu() -> Outcome {
    let dir = scratch()?;
    let agree = |ours_of: &[&str], theirs_of: &[&str], path: Option<&Path>| -> Outcome {
        for target in ["raw", "qcow2"] {
            let mut mine = command::ploopfs(&["measure", "--json", "-O", target]);
            let mut theirs = command::new("qemu-img");
            theirs.args(["measure", "--output=json", "-O", target]);
            let (mine, theirs) = (
                mine.args(ours_of).args(path),
                theirs.args(theirs_of).args(path),
            );
            let mine: Value = serde_json::from_str(&command::ok(mine)?)?;
            let theirs: Value = serde_json::from_str(&command::ok(theirs)?)?;
            for member in ["required", "fully-allocated"] {
                ensure!(mine[member] == theirs[member], "{path:?}: {mine} {theirs}");
            }
        }
        Ok(())
    };
    for Made { path, .. } in kinds::images(dir.path())? {
        agree(&[], &["-f", "parallels"], Some(&path))?;
    }
    for size in ["512", "1M", "1G", "1T", "100T", "12345856", "549755814400"] {
        agree(&["--size", size], &["--size", size], None)?;
    }
    Ok(())
}

pub(crate) fn measure_counts_what_images_need() -> Outcome {
    let dir = scratch()?;
    for Made { path, model } in kinds::images(dir.path())? {
        let json = ours(
            &["measure", "--json", "-O", "hds", "--cluster-size", "64k"],
            &path,
        )?;
        let found: Value = serde_json::from_str(&json)?;
        let bytes = model.read(0, usize::try_from(model.bytes())?);
        let used = bytes
            .chunks(1 << 16)
            .filter(|c| c.iter().any(|byte| *byte != 0));
        // Header and table of so few clusters fit in one.
        let required = (1 + used.count() as u64) << 16;
        ensure!(found["required"] == required, "{}: {found}", path.display());
        let all = (1 + model.bytes().div_ceil(1 << 16)) << 16;
        ensure!(
            found["fully-allocated"] == all,
            "{}: {found}",
            path.display()
        );
    }
    Ok(())
}

/// Every other cluster is there, scattered over the file: what is done for each must not look at
/// those around it.
pub(crate) fn a_million_extents_are_no_trouble() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    let mut spec = ImageSpec::new(2, 128, 128 << 21).mapping(Mapped::Every { step: 2, phase: 0 });
    spec.no_data = true;
    spec.layout = Layout::Shuffled(3);
    spec.write(&path)?;
    for (verb, most) in [
        (&["map", "--json"][..], 20),
        (&["measure", "-O", "hds"], 20),
    ] {
        let started = Instant::now();
        let done = command::run(command::ploopfs(verb).arg(&path))?.expect_code(0)?;
        let took = started.elapsed();
        let told = done.stdout.iter().filter(|byte| **byte == b'\n').count();
        ensure!(verb[0] != "map" || told == 2 << 20, "{told} lines");
        ensure!(took.as_secs() < most, "{verb:?} took {took:?}");
        eprintln!("{verb:?}: {took:?}");
    }
    Ok(())
}
