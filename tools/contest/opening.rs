//! How long an image takes to open, and how much memory its daemon has then.
//!
//! Imports: `forge`, `host`, `contestants` (QEMU's command), `report`; ploopfs's `chain`, `disk`.
//! Never: opens an image in this process, whose memory and caches are warm.
//!
//! "open" is what the library takes from the path to a disk that can be served, in a process of its
//! own; "mount" is the whole command, with its start, the buffers, the threads and the mount.

use crate::Bounds;
use crate::contestants::{QEMU, qemu};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::image::{ImageSpec, Mapped};
use crate::host::{Ours, Server, has, resident_mib, said};
use crate::report::{Report, Unit};
use anyhow::{Context, Result};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, DiskOptions};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use tempfile::TempDir;

/// With this variable in its environment the program opens one image and tells how long it took.
pub(crate) const AS_OPENER: &str = "PLOOPFS_BENCH_OPENS";

const SCENE: &str = "open";
const CLUSTER_SECTORS: u32 = 2048;
/// Every cluster of these is mapped.
const SIZES: [(&str, u64); 3] = [("1 GiB", 1 << 30), ("1 TiB", 1 << 40), ("16 TiB", 16 << 40)];
/// Levels of the deep chain.
const DELTAS: usize = 512;

/// Opens the image that the command line names, for writing if a second word says so.
pub(crate) fn main() -> Result<()> {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let path = PathBuf::from(words.first().context("expects a path")?);
    let write = words.len() > 1;
    let begun = Instant::now();
    let selection = Selection {
        write,
        ..Selection::default()
    };
    let options = DiskOptions {
        read_only: !write,
        ..DiskOptions::default()
    };
    let images = Arc::new(bundle::open(&path, &selection)?);
    let (disk, _) = disk::open(images, &options)?;
    println!("{}", begun.elapsed().as_secs_f64() * 1e3);
    disk.close()?;
    Ok(())
}

fn write_image(dir: &Path, bytes: u64) -> Result<PathBuf> {
    let path = dir.join(format!("{bytes}.hds"));
    let mut spec = ImageSpec::new(2, CLUSTER_SECTORS, bytes / 512).mapping(Mapped::All);
    spec.no_data = true;
    spec.write(&path)?;
    Ok(path)
}

fn write_deltas(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("deltas.hdd");
    let like = ImageSpec::new(2, CLUSTER_SECTORS, (1 << 30) / 512);
    let spec = BundleSpec::chain(Style::Parallels, &like, DELTAS, |number, image| {
        image.no_data = true;
        image.mapped = Mapped::Every {
            step: DELTAS as u64,
            phase: number as u64,
        };
    });
    spec.write(&path)?;
    Ok(path)
}

fn ours(path: &Path, dir: &Path, write: bool) -> Result<[f64; 3]> {
    let mut opener = Command::new(std::env::current_exe()?);
    opener.env(AS_OPENER, "1").arg(path);
    if write {
        opener.arg("write");
    }
    let open = said(&mut opener)?.parse()?;
    let mountpoint = dir.join("m");
    fs::create_dir_all(&mountpoint)?;
    let options: &[String] = if write { &[] } else { &["-r".into()] };
    let begun = Instant::now();
    let mounted = Ours::mount(path, &mountpoint, options, dir)?;
    let mount = begun.elapsed().as_secs_f64() * 1e3;
    Ok([open, mount, resident_mib(mounted.pid)?])
}

fn qemus(path: &Path, dir: &Path) -> Result<[f64; 2]> {
    let export = dir.join("export");
    if !export.exists() {
        File::create_new(&export)?;
    }
    let begun = Instant::now();
    let server = Server::start(qemu(path, &export), &export, dir)?;
    let mount = begun.elapsed().as_secs_f64() * 1e3;
    Ok([mount, resident_mib(server.pid())?])
}

/// Measures all of it.
pub(crate) fn measure(
    place: &Path,
    rounds: usize,
    bounds: &Bounds,
    report: &mut Report,
) -> Result<()> {
    let holder = TempDir::with_prefix_in("open.", place)?;
    let dir = fs::canonicalize(holder.path())?;
    let mut images = Vec::new();
    for (name, bytes) in SIZES {
        // Some file systems end before 16 TiB.
        match write_image(&dir, bytes) {
            Ok(path) => images.push((name.to_owned(), path)),
            Err(error) => report.skip(format!("{SCENE}: {name}: {error:#}")),
        }
    }
    images.push((format!("{DELTAS} deltas"), write_deltas(&dir)?));
    // One that took too long once is not waited for again.
    let mut is_tried_in_vain = vec![false; images.len()];
    for round in 0..rounds {
        for ((name, path), in_vain) in images.iter().zip(&mut is_tried_in_vain) {
            if !bounds.allow()? {
                return Ok(());
            }
            for (contestant, write) in [("read-only", false), ("read-write", true)] {
                let units = [Unit::Milliseconds, Unit::Milliseconds, Unit::Mib];
                let values = ours(path, &dir, write)?.into_iter().zip(units);
                for ((value, unit), what) in values.zip(["open", "mount", "memory"]) {
                    let job = format!("{what}, {name}");
                    report.add((SCENE, &job, contestant), unit, round, value);
                }
            }
            // It knows no bundles.
            if has("qemu-storage-daemon") && path.is_file() && !*in_vain {
                let [mount, memory] = match qemus(path, &dir) {
                    Ok(values) => values,
                    Err(error) => {
                        *in_vain = true;
                        report.skip(format!("{SCENE}: {name}: {QEMU}: {error:#}"));
                        continue;
                    }
                };
                let job = format!("mount, {name}");
                report.add((SCENE, &job, QEMU), Unit::Milliseconds, round, mount);
                let job = format!("memory, {name}");
                report.add((SCENE, &job, QEMU), Unit::Mib, round, memory);
            }
        }
        eprintln!("{SCENE}: round {} of {rounds}", round + 1);
    }
    Ok(())
}
