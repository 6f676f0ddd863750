//! What other programs say of new disks: qemu-img, ploop, a reader of the format of our own.

use crate::forge::reader::{self, Flat};
use crate::support::harness::{self, trial};
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, scratch, scratch_tmpfs};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("every_kind_is_sound", &[], every_kind_is_sound),
        trial("qemu_agrees", &[Need::Qemu], qemu_agrees),
        trial("ploop_agrees", &[Need::Ploop], ploop_agrees),
        trial("ploop_minds_no_hole_on_ext4", &[Need::Ploop], ploop_on_ext4),
        trial("a_huge_disk_is_instant", &[], huge),
        trial("desktop_finds_what_it_writes_itself", &[], desktop),
    ]
}

/// Runs the command; it must succeed.
pub(crate) fn create(path: &Path, args: &[&str]) -> Result<String> {
    command::ok(command::ploopfs(&["create"]).args(args).arg(path))
}

/// Version, cluster size, size asked for, and the size that results.
const SHAPES: [(&str, &str, &str, u64); 8] = [
    ("2", "1M", "64M", 64 << 20),
    ("1", "1M", "3000K", 3 << 20),
    ("2", "64K", "10000001", 10_027_008),
    ("1", "64K", "1954s", 1_048_576),
    ("2", "32K", "40G", 40 << 30),
    ("1", "32K", "40G", 40 << 30),
    ("2", "64M", "128M", 128 << 20),
    ("2", "4M", "300M", 300 << 20),
];

fn shapes(dir: &Path, name: &str, format: &str) -> Result<Vec<(PathBuf, u64)>> {
    let mut made = Vec::new();
    for (number, (version, cluster, size, bytes)) in SHAPES.into_iter().enumerate() {
        if bytes > 1 << 30 && format == "preallocated" {
            continue;
        }
        let path = dir.join(format!("{format}{number}.{name}"));
        let args = ["--image-version", version, "--cluster-size", cluster];
        // A plain disk has no version.
        let args = &args[if format == "plain" { 2 } else { 0 }..];
        create(&path, &[args, &["-f", format, "-s", size]].concat())?;
        made.push((path, bytes));
    }
    Ok(made)
}

fn every_kind_is_sound() -> Outcome {
    let dir = scratch()?;
    for format in ["expanding", "preallocated", "plain"] {
        for name in ["hds", "hdd"] {
            if format == "plain" && name == "hds" {
                continue;
            }
            for (path, bytes) in shapes(dir.path(), name, format)? {
                command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
                let disk = Flat::open(&path)?;
                ensure!(
                    disk.bytes() == bytes,
                    "{}: {}",
                    path.display(),
                    disk.bytes()
                );
                let (first, last) = (disk.read(0, 4096)?, disk.read(bytes - 512, 512)?);
                ensure!(first == [0; 4096] && last == [0; 512]);
                if name == "hds" {
                    support::expect_clean(&path)?;
                }
                if bytes < 1 << 30 && format == "preallocated" {
                    let image = if name == "hds" {
                        path
                    } else {
                        path.join("root.hds")
                    };
                    ensure!(support::host_bytes(&image)? >= bytes, "it is not allocated");
                }
            }
        }
    }
    let names = fs::read_dir(dir.path())?.flatten();
    let odd = names.filter(|entry| entry.file_name().to_string_lossy().contains("creating"));
    ensure!(odd.count() == 0, "a temporary name is left");
    Ok(())
}

fn qemu(args: &[&str], path: &Path) -> Result<String> {
    command::ok(command::new("qemu-img").args(args).arg(path))
}

fn qemu_agrees() -> Outcome {
    let dir = scratch()?;
    for format in ["expanding", "preallocated"] {
        for (path, bytes) in shapes(dir.path(), "hds", format)? {
            qemu(&["check", "-q", "-f", "parallels"], &path)?;
            let said = qemu(&["info", "--output=json", "-f", "parallels"], &path)?;
            let said: serde_json::Value = serde_json::from_str(&said)?;
            ensure!(said["virtual-size"] == bytes, "{}: {said}", path.display());
            let zeros = dir.path().join("zeros");
            fs::File::create(&zeros)?.set_len(bytes)?;
            let args = ["compare", "-f", "parallels", "-F", "raw", "-q"];
            qemu(
                &[&args[..], &[support::guards::text(&path)]].concat(),
                &zeros,
            )?;
        }
    }
    Ok(())
}

/// ploop crashes in a small environment.
fn ploop(args: &[&str], path: &Path) -> Command {
    let mut command = command::new("ploop");
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("PLOOP_PADDING", "x".repeat(8192))
        .args(args)
        .arg(path);
    command
}

/// It writes even when asked not to, so the bytes are compared.
fn expect_ploop(image: &Path) -> Outcome {
    let before = support::sha256(image)?;
    let done = command::run(&mut ploop(&["check", "-f", "-c", "-r"], image))?;
    let done = done.expect_code(0)?;
    ensure!(before == support::sha256(image)?, "{}", done.story());
    Ok(())
}

fn ploop_agrees() -> Outcome {
    let dir = scratch_tmpfs()?;
    for format in ["expanding", "preallocated"] {
        for (path, _) in shapes(dir.path(), "hds", format)? {
            expect_ploop(&path)?;
        }
    }
    Ok(())
}

fn ploop_on_ext4() -> Outcome {
    let dir = scratch()?;
    let kind = command::ok(
        command::new("stat")
            .args(["-f", "-c", "%T"])
            .arg(dir.path()),
    )?;
    if !kind.contains("ext") {
        return Err(harness::skip_excused(format!("the tests run on {kind}")));
    }
    for (path, _) in shapes(dir.path(), "hds", "expanding")? {
        expect_ploop(&path)?;
    }
    // What a file system fills must be written whole too.
    let path = dir.path().join("fs.hds");
    create(&path, &["-s", "1G", "--mkfs", "ext4"])?;
    expect_ploop(&path)
}

fn huge() -> Outcome {
    let dir = scratch()?;
    for (name, size, bytes) in [("a.hds", "16T", 16_u64 << 40), ("b.hdd", "500T", 500 << 40)] {
        let path = dir.path().join(name);
        let started = Instant::now();
        let cluster = if bytes > 16 << 40 { "32M" } else { "1M" };
        create(&path, &["-s", size, "--cluster-size", cluster])?;
        let took = started.elapsed();
        ensure!(took < Duration::from_secs(10), "{name} took {took:?}");
        ensure!(Flat::open(&path)?.bytes() == bytes);
        let image = if name == "a.hds" {
            path
        } else {
            path.join("root.hds")
        };
        let on_host = support::host_bytes(&image)?;
        ensure!(on_host < 129 << 20, "{name}: {on_host} bytes");
    }
    // Its table alone has a gigabyte, most of which is a hole.
    let path = dir.path().join("c.hds");
    create(&path, &["-s", "16T", "--cluster-size", "64K"])?;
    ensure!(reader::check(&path)?.is_empty() && support::host_bytes(&path)? < 1 << 20);
    Ok(())
}

fn elements(descriptor: &str) -> Vec<String> {
    let starts = descriptor.split('<').skip(1);
    let names = starts.filter(|tag| !tag.starts_with(['/', '?']));
    names
        .filter_map(|tag| tag.split('>').next())
        .map(str::to_owned)
        .collect()
}

/// The same elements in the same order, and the same files, as in a bundle of its own.
fn desktop() -> Outcome {
    let theirs = support::samples_dir()?.join("parallels-desktop-17/expanding.hdd");
    let dir = scratch()?;
    let ours = dir.path().join("expanding.hdd");
    create(&ours, &["-s", "100M", "--for", "parallels-desktop"])?;
    let read = |path: &Path| -> Result<(String, Vec<String>)> {
        let names = fs::read_dir(path)?.flatten();
        let mut names: Vec<_> = names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .map(|name| name.trim_end_matches(".gz").to_owned())
            .collect();
        names.sort();
        let text = fs::read_to_string(path.join("DiskDescriptor.xml"));
        Ok((text.context("a descriptor")?, names))
    };
    let ((our_text, our_names), (their_text, their_names)) = (read(&ours)?, read(&theirs)?);
    ensure!(our_names == their_names, "{our_names:?}, {their_names:?}");
    ensure!(
        elements(&our_text) == elements(&their_text),
        "{our_text}\n{their_text}"
    );
    let different = our_text.lines().zip(their_text.lines());
    let different: Vec<_> = different.filter(|(our, their)| our != their).collect();
    ensure!(
        different.len() == 1 && different[0].0.contains("<UID>"),
        "{different:?}"
    );
    Ok(())
}
