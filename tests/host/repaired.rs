//! What other programs say of an image that was repaired.

use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need::{Ploop, Qemu};
use crate::support::{Outcome, command, scratch_tmpfs};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("qemu_is_content_with_repairs", &[Qemu], qemu_is_content),
        trial("ploop_is_content_with_repairs", &[Ploop], ploop_is_content),
    ]
}

const DAMAGE: [&[&str]; 8] = [
    &["t-past-eof", "h-in-use"],
    &["t-all-ones", "t-slots-after-end"],
    &["t-duplicate", "t-leak-tail"],
    &["t-leak-interior", "t-odd-length"],
    &["t-straddle", "h-in-use"],
    &["h-type", "h-extension-stale"],
    &["h-first-small", "t-far"],
    &["h-entries-few"],
];

/// Repairs every sort of damage and has each result judged.
fn each_repaired(judge: fn(&Path) -> Outcome) -> Outcome {
    // ploop 1.15 minds on ext4 that clusters are sparse.
    let dir = scratch_tmpfs()?;
    for version in [1, 2] {
        for names in DAMAGE {
            let what = || format!("{names:?}, version {version}");
            let path = repaired(dir.path(), version, names).with_context(what)?;
            judge(&path).with_context(what)?;
        }
    }
    Ok(())
}

/// An image that the other programs can read (clusters of 32 KiB), broken and repaired.
fn repaired(dir: &Path, version: u8, names: &[&str]) -> Result<PathBuf> {
    let path = dir.join("x.hds");
    let mut spec = ImageSpec::new(version, 64, 6400).mapping(Mapped::Percent(50));
    spec.layout = Layout::Shuffled(3);
    if path.exists() {
        fs::remove_file(&path)?;
    }
    spec.write(&path)?;
    for name in names {
        corrupt::apply(name, &path)?;
    }
    let found = command::run(&mut command::ploopfs(&["check", text(&path)]))?;
    ensure!([2, 3].contains(&found.code()), "{}", found.story());
    for line in [["repair", "--yes"], ["check", "-q"]] {
        command::run(command::ploopfs(&line).arg(&path))?.expect_code(0)?;
    }
    Ok(path)
}

fn qemu_is_content() -> Outcome {
    each_repaired(|path| {
        let mut check = command::new("qemu-img");
        check.args(["check", "-f", "parallels"]).arg(path);
        command::run(&mut check)?.expect_code(0).map(drop)
    })
}

fn ploop_is_content() -> Outcome {
    each_repaired(|path| {
        let copy = path.with_extension("copy");
        fs::copy(path, &copy)?;
        let mut check = command::new("ploop");
        check.args(["check", "-f", "-c", "-r"]).arg(&copy);
        command::run(&mut check)?.expect_code(0)?;
        ensure!(
            fs::read(path)? == fs::read(&copy)?,
            "ploop had something to mend"
        );
        Ok(())
    })
}
