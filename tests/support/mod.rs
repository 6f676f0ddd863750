//! What the tests with a real mount share: capabilities, guards that clean up, checked commands.
//!
//! Imports: std, `anyhow`, `libtest-mimic`, `nix`, `tempfile`; nothing of ploopfs.
//! Never: passes a test that could not run; it is ignored with its reason, or fails where CI asks.
//!
//! Every guard ([`guards::Mounted`], [`guards::Loop`], [`guards::FsMount`]) undoes its own work
//! when dropped, and [`harness::main`] fails the run if anything of ours is left over.

// Each test that includes this uses a part of it.
#![allow(dead_code)]

pub(crate) mod command;
pub(crate) mod guards;
pub(crate) mod harness;
pub(crate) mod heap;
pub(crate) mod probe;
pub(crate) mod rings;
pub(crate) mod samples;

use crate::forge::content::{self, Model};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a test returns.
pub(crate) type Outcome = Result<()>;

/// The program under test.
pub(crate) const PLOOPFS: &str = env!("CARGO_BIN_EXE_ploopfs");

/// One mebibyte.
pub(crate) const MIB: u64 = 1 << 20;

/// A directory that goes away with the test; on a real disk, where mounts of ours are looked for.
pub(crate) fn scratch() -> Result<tempfile::TempDir> {
    let root = harness::root();
    fs::create_dir_all(&root)?;
    tempfile::Builder::new()
        .prefix("t")
        .tempdir_in(root)
        .context("no scratch directory")
}

/// A directory in memory, where the host has one.
pub(crate) fn scratch_tmpfs() -> Result<tempfile::TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("ploopfs-test")
        .tempdir_in("/dev/shm");
    dir.map_err(|error| harness::skip(format!("no tmpfs at /dev/shm: {error}")))
}

/// sha256 of a file, by the host's own tool.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let text = command::ok(command::new("sha256sum").arg(path))?;
    // sha256sum marks a line with a backslash where the name needs escapes.
    let word = text.split_whitespace().next().unwrap_or_default();
    Ok(word.trim_start_matches('\\').to_string())
}

/// sha256 and modification time of every file in a directory (or of one file): equal before and
/// after means that nothing was written.
pub(crate) fn fingerprint(path: &Path) -> Result<Vec<(PathBuf, String, i64, i64)>> {
    let mut found = Vec::new();
    let mut files = vec![path.to_path_buf()];
    while let Some(file) = files.pop() {
        let meta = fs::symlink_metadata(&file)?;
        if meta.is_dir() {
            for entry in fs::read_dir(&file)? {
                files.push(entry?.path());
            }
        } else if meta.is_file() {
            found.push((
                file.clone(),
                sha256(&file)?,
                meta.mtime(),
                meta.mtime_nsec(),
            ));
        }
    }
    found.sort();
    Ok(found)
}

/// Bytes at a place of a file.
pub(crate) fn read_at(path: &Path, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let file = File::open(path).with_context(|| path.display().to_string())?;
    file.read_exact_at(&mut bytes, at)
        .with_context(|| format!("reading {len} bytes at {at} of {}", path.display()))?;
    Ok(bytes)
}

/// A range of a flat file must hold what the model says.
pub(crate) fn expect_range(flat: &Path, model: &Model, at: u64, len: usize) -> Outcome {
    let found = read_at(flat, at, len)?;
    match content::first_difference(at, &model.read(at, len), &found) {
        Some(text) => bail!("{}: {text}", flat.display()),
        None => Ok(()),
    }
}

/// A flat file must hold what the model says, all of it and no more.
pub(crate) fn expect_flat(flat: &Path, model: &Model) -> Outcome {
    let len = fs::metadata(flat)?.len();
    ensure!(
        len == model.bytes(),
        "{}: {len} bytes, not {}",
        flat.display(),
        model.bytes()
    );
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(MIB);
        expect_range(flat, model, at, piece as usize)?;
        at += piece;
    }
    Ok(())
}

/// An image that was closed must be strictly right.
pub(crate) fn expect_clean(image: &Path) -> Outcome {
    let wrong = crate::forge::reader::check(image)?;
    ensure!(
        wrong.is_empty(),
        "{}: {}",
        image.display(),
        wrong.join("; ")
    );
    Ok(())
}

/// `m_DiskInUse` of an image.
pub(crate) fn mark_of(image: &Path) -> Result<u32> {
    let bytes = read_at(image, 44, 4)?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Bytes that a file takes on the host.
pub(crate) fn host_bytes(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// Disks that other programs made. They are not of this repository: `PLOOPFS_SAMPLES` names their
/// directory, else they may be in `shared/samples` beside the checkout. Without them the tests that
/// ask for them are skipped; named and not there is an error.
pub(crate) fn samples_dir() -> Result<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/samples");
    let Some(named) = std::env::var_os("PLOOPFS_SAMPLES") else {
        let none = "no sample disks (PLOOPFS_SAMPLES names their directory)";
        return beside
            .is_dir()
            .then_some(beside)
            .ok_or_else(|| harness::skip_excused(none));
    };
    let dir = PathBuf::from(named);
    ensure!(
        dir.is_dir(),
        "PLOOPFS_SAMPLES: {} is no directory",
        dir.display()
    );
    Ok(dir)
}
