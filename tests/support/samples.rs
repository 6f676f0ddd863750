//! The sample disks, unpacked into a scratch directory.
//!
//! Imports: `command`.
//! Never: writes to the folder of the samples.

use super::command;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

/// One sample disk.
#[derive(Debug)]
pub(crate) struct Sample {
    /// The unpacked bundle or image.
    pub(crate) path: PathBuf,
    /// Size of the disk.
    pub(crate) bytes: u64,
    /// sha256 of the flat disk; `None`: all zeros, and too large to hash.
    pub(crate) sha256: Option<&'static str>,
}

const FILLED: &str = "7906281f7a25f13df78c907d7bc4e9313d9a26fa86386c6e2a737a784fe80b8f";
const SPLIT: &str = "035f643ace2bbca90762a1318e865ec456c44cfd578e65ed32a9363d6348efa1";
const QEMU: &str = "15faf41ebc93b5f734341cb7a2d909001e3f7306960f9d8bc63894f2a8e5bc45";

/// Unpacks all of them; skips the test where there are none.
pub(crate) fn unpack(to: &Path) -> Result<Vec<Sample>> {
    let from = super::samples_dir()?;
    let mut samples = Vec::new();
    let bundles = [
        ("plain", 100_u64 << 20, FILLED),
        ("expanding", 100 << 20, FILLED),
    ];
    for (name, bytes, sha256) in bundles.into_iter().chain([("split", 10 << 30, SPLIT)]) {
        let path = to.join(format!("{name}.hdd"));
        fs::create_dir(&path)?;
        for entry in fs::read_dir(
            from.join("parallels-desktop-17")
                .join(format!("{name}.hdd")),
        )? {
            let entry = entry?;
            let file = entry.file_name().to_string_lossy().into_owned();
            match file.strip_suffix(".gz") {
                Some(plain) => inflate("gzip", &entry.path(), &path.join(plain))?,
                None => fs::write(path.join(file), fs::read(entry.path())?)?,
            }
        }
        samples.push(Sample {
            path,
            bytes,
            sha256: Some(sha256),
        });
    }
    for (name, bytes, sha256) in [
        ("parallels-v1", 2_u64 << 20, Some(QEMU)),
        ("parallels-v2", 2 << 20, Some(QEMU)),
        ("parallels-with-bitmap", 64 << 30, None),
    ] {
        let path = to.join(format!("{name}.hds"));
        inflate(
            "bzip2",
            &from.join("qemu-iotests").join(format!("{name}.bz2")),
            &path,
        )?;
        samples.push(Sample {
            path,
            bytes,
            sha256,
        });
    }
    Ok(samples)
}

fn inflate(tool: &str, from: &Path, to: &Path) -> Result<()> {
    let out = fs::File::create_new(to)?;
    let status = command::new(tool)
        .arg("-dc")
        .arg(from)
        .stdout(out)
        .status()?;
    anyhow::ensure!(
        status.success(),
        "{tool} could not unpack {}",
        from.display()
    );
    Ok(())
}
