//! Every named way to break an image, through the library.

use crate::{broken, corrupt, forge, spec, spec_with_bitmap};
use forge::content::Model;
use ploopfs::admin::check::{Checked, check_image};
use ploopfs::admin::repair::{KeepOld, is_clean, repair_image};
use ploopfs::plan::repair::{Policy, Severity};
use ploopfs::storage::directory::HostDirectory;
use ploopfs::storage::file::FileStorage;
use std::fs::{File, OpenOptions};
use std::path::Path;

fn check(path: &Path) -> Checked {
    let file = File::open(path).expect("the image is there");
    let storage = FileStorage::new(file).expect("a plain file");
    check_image(&storage).expect("the host reads it")
}

/// Names whose damage leaves nothing to go by, so that they are not repaired.
const HOPELESS: [&str; 12] = [
    "h-empty",
    "h-short",
    "h-only",
    "h-magic",
    "h-cluster-0",
    "h-cluster-3",
    "h-cluster-huge",
    "h-cluster-absurd",
    "h-size-absurd",
    "h-size-max",
    "h-converting",
    "h-nothing",
];

/// Names that are no damage at all.
const HARMLESS: [&str; 11] = [
    "h-entries-many",
    "h-size-odd",
    "h-v1-upper",
    "h-mark-pd17",
    "h-mark-pd22",
    "h-mark-1",
    "h-mark-v21",
    "h-flag-empty",
    "h-flags-all",
    "e-necessary",
    "e-unknown",
];

#[test]
fn every_kind_of_damage_is_found_and_mended_or_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for corruption in corrupt::ALL {
        let name = corruption.name;
        for version in [1, 2] {
            let spec = match name.as_bytes()[0] {
                b'x' => continue,
                b'e' if version == 1 => continue,
                // These bytes are a part of the size in version 2.
                _ if name == "h-v1-upper" && version == 2 => continue,
                b'e' => spec_with_bitmap(),
                _ => spec(version),
            };
            let Ok(path) = broken(dir.path(), &spec, &[name]) else {
                continue;
            };
            let before = std::fs::read(&path).expect("the image was made");
            let found = check(&path);
            let what = format!("{name}, version {version}: {:?}", found.report.findings);
            let harmless = HARMLESS.contains(&name);
            assert_eq!(found.report.worst().is_none(), harmless, "{what}");
            assert!(
                std::fs::read(&path).expect("still there") == before,
                "{what}"
            );
            repair_one(&path, name, &what);
            let now = check(&path);
            if !HOPELESS.contains(&name) {
                assert!(is_clean(&now), "{what}: {:?}", now.report.findings);
                expect_content(&path, &spec, &before, &what);
            }
        }
    }
}

fn repair_one(path: &Path, name: &str, what: &str) {
    let file = OpenOptions::new().read(true).write(true).open(path);
    let storage = FileStorage::new(file.expect("there")).expect("a plain file");
    let parent = path.parent().expect("it is in a directory");
    let directory = HostDirectory::open(parent).expect("the directory is there");
    let keep = KeepOld::In {
        directory: &directory,
        image: "x.hds",
    };
    let done = repair_image(&storage, keep, &Policy::default());
    let clean_before = |worst: Option<Severity>| worst.is_none();
    match done {
        Ok(done) if HOPELESS.contains(&name) => {
            let worst = done.before.report.worst();
            assert!(clean_before(worst), "{what}: repaired, but why");
        }
        Ok(done) => {
            if let Some(undo) = done.undo {
                std::fs::remove_file(parent.join(undo)).expect("it was written");
            }
        }
        Err(e) => assert!(HOPELESS.contains(&name), "{what}: {e}"),
    }
}

/// All clusters that the damage has not touched read as before.
fn expect_content(path: &Path, spec: &forge::image::ImageSpec, before: &[u8], what: &str) {
    let model = Model::of(spec);
    let bytes = std::fs::read(path).expect("the image is there");
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(word) as usize
    };
    let unit = if spec.version == 1 { 512 } else { 4096 };
    let mut good = 0;
    for cluster in 0..spec.entries() as usize {
        let (old, new) = (
            word(before, 64 + 4 * cluster),
            word(&bytes, 64 + 4 * cluster),
        );
        let right = old == expected(spec, cluster as u64) as usize;
        let whole = old * unit + 4096 <= before.len();
        if old == 0 || !right || !whole {
            continue;
        }
        let len = (237 * 512 - 4096 * cluster).min(4096);
        let found = &bytes[new * unit..new * unit + len];
        assert!(
            found == model.read(4096 * cluster as u64, len),
            "{what}: {cluster}"
        );
        good += 1;
    }
    assert!(good > 5, "{what}: only {good} clusters were compared");
}

fn expected(spec: &forge::image::ImageSpec, cluster: u64) -> u32 {
    let slots = spec.slots();
    let slot = slots.iter().find(|(at, _)| *at == cluster);
    slot.map_or(0, |(_, slot)| spec.entry(*slot))
}
