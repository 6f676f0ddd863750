//! Check and repair: every way to break an image, power cuts at every operation, other programs.
//!
//! A repair is cut after each operation, with any of what was not durable kept or lost. What is
//! left must be mended by another repair to the very bytes that an undisturbed one leaves, and
//! until the repair is complete the undo file must give every old byte back.

#[path = "check/bundles.rs"]
mod bundles;
#[path = "check/cuts.rs"]
mod cuts;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "check/host.rs"]
mod host;
#[path = "check/interop.rs"]
mod interop;
#[path = "check/kills.rs"]
mod kills;
#[path = "check/kinds.rs"]
mod kinds;

use forge::corrupt;
use forge::extension::BitmapSpec;
use forge::image::{ImageSpec, Layout, Mapped, V21};
use std::path::{Path, PathBuf};

/// An image of 30 clusters of 4 KiB, about half of them mapped, in shuffled order.
fn spec(version: u8) -> ImageSpec {
    let mut spec = ImageSpec::new(version, 8, 237).mapping(Mapped::Percent(50));
    spec.layout = Layout::Shuffled(3);
    spec
}

/// The image broken in these ways, one after the other, in a new file.
fn broken(dir: &Path, spec: &ImageSpec, names: &[&str]) -> std::io::Result<PathBuf> {
    let path = dir.join("x.hds");
    let _ = std::fs::remove_file(&path);
    spec.write(&path)?;
    for name in names {
        corrupt::apply(name, &path)?;
    }
    Ok(path)
}

/// The same with a dirty bitmap, for the corruptions of extensions.
fn spec_with_bitmap() -> ImageSpec {
    let mut spec = spec(2);
    spec.mark = V21;
    spec.bitmap = Some(BitmapSpec::new(vec![0, 3, 40]));
    spec
}
