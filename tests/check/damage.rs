//! Images, and ways to break them that together need every step of a repair.

use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use std::path::{Path, PathBuf};

/// Version of the image, and what is done to it.
pub(crate) type Set = (u8, &'static [&'static str]);

/// A hole's entry names the cluster that the file gets when it grows next, and another's a cluster
/// that has an owner, so that it must grow.
const NEXT: &str = "+next";

/// Damage that together needs every step of a repair.
pub(crate) const SETS: [Set; 14] = [
    (2, &["t-duplicate"]),
    (1, &["t-duplicate", "t-leak-tail"]),
    (2, &["t-duplicate", "t-odd-length", "h-in-use"]),
    (2, &["t-straddle", "t-slots-after-end", "h-in-use"]),
    (2, &["t-past-eof", "t-duplicate"]),
    (1, &["t-unaligned", "t-leak-tail"]),
    (2, &["t-leak-interior", "t-leak-tail"]),
    (2, &["h-first-small", "t-far"]),
    (2, &["h-type", "h-extension-stale"]),
    (1, &["h-type", "t-all-ones", "t-odd-length"]),
    (1, &["h-entries-few", "h-in-use"]),
    (2, &["h-extension-bad", "t-leak-interior"]),
    (2, &["t-duplicate", "t-straddle"]),
    (2, &[NEXT]),
];

/// An image of 30 clusters of 4 KiB, about half of them mapped, in shuffled order.
pub(crate) fn spec(version: u8) -> ImageSpec {
    let mut spec = ImageSpec::new(version, 8, 237).mapping(Mapped::Percent(50));
    spec.layout = Layout::Shuffled(3);
    spec
}

/// The image broken in these ways, one after the other, in a new file.
pub(crate) fn broken(dir: &Path, spec: &ImageSpec, names: &[&str]) -> std::io::Result<PathBuf> {
    let path = dir.join("x.hds");
    let _ = std::fs::remove_file(&path);
    spec.write(&path)?;
    for name in names.iter().filter(|name| **name != NEXT) {
        corrupt::apply(name, &path)?;
    }
    if names.contains(&NEXT) {
        let mut bytes = std::fs::read(&path)?;
        let next = u32::try_from(bytes.len() / 4096).expect("it is small");
        let table = &mut bytes[64..64 + 4 * 30];
        let taken = table.chunks_exact(4).find(|entry| **entry != [0; 4]);
        let taken = taken.expect("half of it is mapped").to_vec();
        let mut holes = table.chunks_exact_mut(4).filter(|entry| **entry == [0; 4]);
        for new in [&next.to_le_bytes(), &taken[..]] {
            let hole = holes.next().expect("half of it is holes");
            hole.copy_from_slice(new);
        }
        std::fs::write(&path, bytes)?;
    }
    Ok(path)
}

/// The bytes of such an image.
pub(crate) fn bytes_of((version, names): Set) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec(version), names).expect("the image is made");
    std::fs::read(path).expect("the image was made")
}
