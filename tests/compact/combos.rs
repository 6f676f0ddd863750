//! Every combination of wishes, on disks of all shapes: what is announced is what is done.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, mix, splitmix};
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::forge::reader::{self, Flat};
use crate::support::{Outcome, fingerprint, scratch};
use anyhow::{Context, Result, ensure};
use ploopfs::admin::compact::Request;
use ploopfs::admin::compact::disk::{DiskCompact, open};
use ploopfs::admin::progress::Progress;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SEEDS: u64 = 40;

/// A number below `end`.
fn below(state: &mut u64, end: u64) -> u64 {
    splitmix(state) % end
}

fn image(state: &mut u64, level: usize, version: u8, sectors: u64) -> ImageSpec {
    let mut spec = ImageSpec::new(version, 64, sectors);
    spec.seed = splitmix(state);
    spec.level = u16::try_from(level).unwrap_or(0);
    spec.mapped = match below(state, 5) {
        0 => Mapped::Nothing,
        1 => Mapped::All,
        n => Mapped::Percent(15 * n),
    };
    spec.layout = match below(state, 5) {
        0 => Layout::Packed,
        1 => Layout::Gaps(1 + below(state, 3)),
        2 => Layout::Reversed,
        _ => Layout::Shuffled(splitmix(state)),
    };
    spec.tail = below(state, 4);
    spec.garbage = below(state, 2) == 0;
    spec
}

/// A chain, perhaps of two parts, perhaps over a plain base.
fn disk(state: &mut u64) -> BundleSpec {
    let chain = |state: &mut u64| {
        let version = 1 + below(state, 2) as u8;
        // The last cluster is whole, or is not.
        let sectors = 64 * 60 - below(state, 2) * 7;
        let depth = 1 + below(state, 3) as usize;
        let is_plain = below(state, 6) == 0;
        let level = |number, state: &mut u64| match number {
            0 if is_plain => Level::Plain {
                seed: splitmix(state),
                level: 0,
                bytes: sectors * 512,
            },
            _ => Level::Image(image(state, number, version, sectors)),
        };
        (0..depth)
            .map(|number| level(number, state))
            .collect::<Vec<_>>()
    };
    let first = chain(state);
    let depth = first.len();
    let mut spec = BundleSpec::new(Style::Parallels, first);
    if below(state, 3) == 0 {
        let mut second = chain(state);
        while second.len() != depth {
            second = chain(state);
        }
        spec.push_part(second);
    }
    spec
}

/// Makes zeros of some clusters of a top: written, or punched, or all but the last byte.
fn blank(spec: &ImageSpec, path: &Path, state: &mut u64) -> Outcome {
    let file = File::options().read(true).write(true).open(path)?;
    let size = spec.cluster_bytes();
    for (cluster, slot) in spec.slots() {
        let (at, kind) = (spec.slot_at(slot), below(state, 8));
        let end = (spec.disk_sectors * 512 - cluster * size).min(size) as usize;
        match kind {
            0 => file.write_all_at(&vec![0; end], at)?,
            1 => ploopfs::sys::file::punch_hole(file.as_fd(), at, at + size)?,
            2 => file.write_all_at(&vec![0; end - 1], at)?,
            _ => {}
        }
    }
    Ok(())
}

fn wishes(number: u64) -> Request {
    Request {
        zeroes: number & 1 != 0,
        defrag: number & 2 != 0,
        fill_holes: number & 4 != 0,
        ..Request::default()
    }
}

/// The document without what only the host can tell.
fn told(done: &DiskCompact) -> serde_json::Value {
    let mut value = serde_json::to_value(done).unwrap_or_default();
    for file in value["files"].as_array_mut().into_iter().flatten() {
        file["after_allocated"] = 0.into();
    }
    value
}

fn one(dir: &Path, seed: u64) -> Outcome {
    let mut state = mix(&[seed, 77]);
    let spec = disk(&mut state);
    let path = dir.join(format!("{seed}.hdd"));
    spec.write(&path)?;
    let mut tops = Vec::new();
    let mut frozen: Vec<PathBuf> = Vec::new();
    for (number, part) in spec.parts.iter().enumerate() {
        let mut files = spec.files(&path, number);
        let top = files.pop().context("a top")?;
        if let Some(Level::Image(image)) = part.levels.last() {
            blank(image, &top, &mut state)?;
        }
        tops.push(top);
        frozen.extend(files);
    }
    let wish = wishes(below(&mut state, 8));
    let shown = Flat::open(&path)?.sha256()?;
    let prints = |files: &[PathBuf]| -> Result<Vec<_>> {
        files.iter().map(|file| fingerprint(file)).collect()
    };
    let below = prints(&frozen)?;
    let before = fingerprint(&path)?;
    let progress = Progress::default();
    let planned = open(&path, &[], false)?.plan(&wish, &progress)?;
    ensure!(fingerprint(&path)? == before, "a plan changed something");
    let done = open(&path, &[], true)?.compact(&wish, &progress)?;
    ensure!(
        told(&planned) == told(&done),
        "{:#} and {:#}",
        told(&planned),
        told(&done)
    );
    for (file, top) in done.files.iter().zip(&tops) {
        let len = fs::metadata(top)?.len();
        ensure!(
            len == file.after_bytes,
            "{} is {len}: {file:?}",
            top.display()
        );
        if !file.plain {
            let wrong = reader::check(top)?;
            ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        }
    }
    ensure!(
        Flat::open(&path)?.sha256()? == shown,
        "the disk is another: {wish:?}"
    );
    ensure!(prints(&frozen)? == below, "a frozen image was changed");
    let again = open(&path, &[], false)?.plan(&wish, &progress)?;
    ensure!(again.files.iter().all(|file| file.is_done), "{again:?}");
    fs::remove_dir_all(&path)?;
    Ok(())
}

pub(crate) fn announced_is_done() -> Outcome {
    let dir = scratch()?;
    let named = std::env::var("PLOOPFS_SEED").ok();
    let seeds = match named.map(|seed| seed.parse()).transpose()? {
        Some(seed) => seed..seed + 1,
        None => 0..SEEDS,
    };
    for seed in seeds {
        one(dir.path(), seed).with_context(|| format!("PLOOPFS_SEED={seed}"))?;
    }
    Ok(())
}
