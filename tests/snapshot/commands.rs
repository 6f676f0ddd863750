//! The commands on real files, and what other programs make of the result.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::image::{ImageSpec, Mapped};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub(crate) const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";

fn run(program: &str, args: &[&str]) -> std::io::Result<Output> {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
}

pub(crate) fn ploopfs(args: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_ploopfs"), args).expect("the program was built for this test")
}

pub(crate) fn story(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

/// What a command says that must work.
pub(crate) fn does(args: &[&str]) -> String {
    let output = ploopfs(args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{args:?}: {}",
        story(&output)
    );
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

pub(crate) fn fails(args: &[&str]) -> String {
    let output = ploopfs(args);
    assert_eq!(
        output.status.code(),
        Some(1),
        "{args:?}: {}",
        story(&output)
    );
    story(&output)
}

/// A directory on a file system that calls no hole of a file sparse: ploop 1.15 minds on ext4.
pub(crate) fn directory() -> tempfile::TempDir {
    let dir = tempfile::Builder::new()
        .prefix("snapshot")
        .tempdir_in("/dev/shm");
    dir.or_else(|_| tempfile::tempdir())
        .expect("a temporary directory")
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary names are UTF-8")
}

/// What every program here can read: clusters of 32 KiB, whole.
pub(crate) fn common(version: u8) -> ImageSpec {
    ImageSpec::new(version, 64, 6400).mapping(Mapped::Percent(40))
}

pub(crate) fn made(dir: &Path, name: &str, spec: &BundleSpec) -> PathBuf {
    let path = dir.join(name);
    spec.write(&path).expect("the bundle is made");
    path
}

fn listed(path: &str) -> Value {
    let text = does(&["snapshot", "list", "--json", path]);
    serde_json::from_str(&text).expect("one JSON document")
}

pub(crate) fn rows(path: &str) -> Vec<Value> {
    listed(path)["snapshots"]
        .as_array()
        .expect("a list of snapshots")
        .clone()
}

/// The bytes that each snapshot shows, read by this program; the top under its own name.
pub(crate) fn shows(path: &str) -> BTreeMap<String, Vec<u8>> {
    use ploopfs::chain::bundle::Selection;
    use ploopfs::disk::{self, DiskOptions};
    use ploopfs::units::DiskOffset;
    let mut shown = BTreeMap::new();
    for row in rows(path) {
        let guid = row["guid"].as_str().expect("a GUID").to_owned();
        if row["is_going"] == true {
            continue;
        }
        let selection = Selection {
            snapshot: Some(guid.clone()).filter(|guid| guid != TOP),
            ..Selection::default()
        };
        let images = ploopfs::chain::bundle::open(Path::new(path), &selection);
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        let opened = disk::open(images.expect("it opens").into(), &options);
        let (disk, _) = opened.expect("it opens");
        let mut bytes = vec![0; usize::try_from(disk.size_bytes()).expect("small")];
        disk.read_at(DiskOffset::new(0), &mut bytes)
            .expect("it reads");
        disk.close().expect("it closes");
        shown.insert(guid, bytes);
    }
    shown
}

/// Names, bytes and times of all files, and the time of the directory.
pub(crate) fn traces(path: &Path) -> Vec<(String, Vec<u8>, i64, i64)> {
    let mut found: Vec<_> = fs::read_dir(path)
        .expect("a directory")
        .flatten()
        .map(|entry| {
            let meta = entry.metadata().expect("a file");
            let name = entry.file_name().to_string_lossy().into_owned();
            let bytes = fs::read(entry.path()).expect("a file");
            (name, bytes, meta.mtime(), meta.mtime_nsec())
        })
        .collect();
    let meta = fs::metadata(path).expect("a directory");
    found.push((String::new(), Vec::new(), meta.mtime(), meta.mtime_nsec()));
    found.sort();
    found
}

#[test]
fn a_life_of_a_disk_with_snapshots() {
    let dir = directory();
    let spec = BundleSpec::chain(Style::Parallels, &common(1), 1, |_, _| {});
    let bundle = made(dir.path(), "a.hdd", &spec);
    let path = text(&bundle);
    let now = shows(path)[TOP].clone();
    let first = does(&["snapshot", "create", "--name", "first one", path]);
    let first = first.trim().to_owned();
    let second = does(&["snapshot", "create", "-q", path]);
    assert!(second.is_empty());
    let tree = does(&["snapshot", "tree", path]);
    assert_eq!(tree.lines().count(), 3, "{tree}");
    assert!(tree.contains(&format!("   `- {TOP}")), "{tree}");
    let list = does(&["snapshot", "list", path]);
    assert!(
        list.contains("\"first one\"") && list.contains("top"),
        "{list}"
    );
    for bytes in shows(path).values() {
        assert!(*bytes == now);
    }
    does(&["snapshot", "rename", path, "latest", "second"]);
    assert!(fails(&["snapshot", "rename", path, "second", "first one"]).contains("another"));
    assert!(fails(&["snapshot", "rename", path, "second", "latest"]).contains("name"));
    let info = does(&["info", path]);
    assert!(info.contains("second"), "{info}");
    // Nobody says yes.
    let before = traces(&bundle);
    fails(&["snapshot", "switch", path, "first one"]);
    fails(&["snapshot", "delete", path, "second"]);
    fails(&["merge", path]);
    does(&["snapshot", "switch", "-n", path, "first one"]);
    does(&["snapshot", "delete", "-n", path, "second"]);
    does(&["merge", "-n", "--all", path]);
    assert!(traces(&bundle) == before, "something was changed");
    let kept = does(&["snapshot", "switch", "--json", "--keep", path, "first one"]);
    let kept: Value = serde_json::from_str(&kept).expect("one JSON document");
    assert!(kept["kept"].is_string());
    assert_eq!(rows(path).len(), 4);
    does(&["snapshot", "delete", "-y", path, &first]);
    assert_eq!(rows(path)[0]["is_going"], true, "it has two children");
    let mountpoint = dir.path().join("mountpoint");
    fs::create_dir(&mountpoint).expect("there is room");
    let gone = fails(&["mount", "--snapshot", "first one", path, text(&mountpoint)]);
    assert!(gone.contains("being deleted"), "{gone}");
    let kept = kept["kept"].as_str().expect("a GUID").to_owned();
    does(&["snapshot", "delete", "-y", path, &kept]);
    does(&["snapshot", "delete", "-y", path, "second"]);
    let left = rows(path);
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(shows(path)[TOP] == now);
    let names: Vec<String> = traces(&bundle).into_iter().map(|found| found.0).collect();
    // The directory itself, the descriptor, its names, the image, and ploop's lock file.
    assert_eq!(names.len(), 5, "{names:?}");
    does(&["check", path]);
}

#[test]
fn owner_and_mode_stay_and_the_backup_follows() {
    let dir = directory();
    let spec = BundleSpec::chain(Style::Parallels, &common(1), 1, |_, _| {});
    let bundle = made(dir.path(), "a.hdd", &spec);
    let descriptor = bundle.join("DiskDescriptor.xml");
    let backup = bundle.join("DiskDescriptor.xml.Backup");
    let image = fs::read_dir(&bundle).expect("a directory").flatten();
    let image = image
        .map(|entry| entry.path())
        .find(|path| text(path).ends_with(".hds"));
    for (path, mode) in [(&descriptor, 0o640), (&image.expect("an image"), 0o604)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
    }
    fs::write(&backup, "older").expect("there is room");
    let is_root = std::os::unix::fs::chown(&descriptor, Some(12), Some(34)).is_ok();
    let old = fs::read(&descriptor).expect("the descriptor");
    does(&["snapshot", "create", text(&bundle)]);
    let meta = fs::metadata(&descriptor).expect("the descriptor");
    assert_eq!(meta.mode() & 0o777, 0o640);
    if is_root {
        assert_eq!((meta.uid(), meta.gid()), (12, 34));
    } else {
        assert!(std::env::var_os("CI").is_none(), "not root");
        eprintln!("skipped: only root can give files away");
    }
    assert!(fs::read(&backup).expect("the backup") == old);
    let images = fs::read_dir(&bundle).expect("a directory").flatten();
    let images = images.filter(|entry| text(&entry.path()).ends_with(".hds"));
    for entry in images {
        assert_eq!(entry.metadata().expect("a file").mode() & 0o777, 0o604);
    }
}

#[test]
fn a_disk_in_use_is_left_alone() {
    use ploopfs::storage::lock::{self, Locked, Purpose};
    let dir = directory();
    let spec = BundleSpec::chain(Style::Ploop, &common(2), 3, |_, _| {});
    let bundle = made(dir.path(), "a.hdd", &spec);
    let path = text(&bundle);
    let latest = rows(path)[1]["guid"].as_str().expect("a GUID").to_owned();
    let before = traces(&bundle);
    for image in spec.files(&bundle, 0).iter().skip(1) {
        let file = fs::OpenOptions::new().read(true).write(true).open(image);
        let file = file.expect("the image is there");
        let locked = lock::image(&file, image, Purpose::Read, std::time::Instant::now());
        assert!(matches!(locked, Ok(Locked::Yes)));
        let refused = fails(&["snapshot", "delete", "-y", path, &latest]);
        assert!(refused.contains("locked"), "{refused}");
        assert!(refused.contains("nothing was changed"), "{refused}");
        fails(&["merge", "-y", path]);
        does(&["snapshot", "list", path]);
    }
    assert!(traces(&bundle) == before);
    fails(&["snapshot", "create", text(&spec.files(&bundle, 0)[0])]);
    does(&["snapshot", "delete", "-y", path, &latest]);
}

#[test]
fn a_change_that_was_made_is_not_said_to_have_changed_nothing() {
    let dir = directory();
    for is_switch in [true, false] {
        let spec = BundleSpec::chain(Style::Ploop, &common(2), 2, |_, _| {});
        let bundle = made(dir.path(), &format!("{is_switch}.hdd"), &spec);
        let path = text(&bundle);
        let rows_of = |guid: &str| rows(path).into_iter().find(|row| row["guid"] == guid);
        let base = rows(path)[0]["guid"].as_str().expect("a GUID").to_owned();
        let kept = does(&["snapshot", "switch", "--json", "--keep", path, &base]);
        let kept: Value = serde_json::from_str(&kept).expect("one JSON document");
        let kept = kept["kept"].as_str().expect("a GUID").to_owned();
        does(&["snapshot", "delete", "-y", path, &base]);
        // The base goes with the next of its children, but cannot be merged.
        let image = &spec.files(&bundle, 0)[0];
        let good = fs::read(image).expect("the image");
        let mut bad = good.clone();
        bad[64..68].fill(0xfe);
        fs::write(image, &bad).expect("there is room");
        if is_switch {
            let output = ploopfs(&["snapshot", "switch", "-y", path, &kept]);
            let said = story(&output);
            assert_eq!(output.status.code(), Some(0), "{said}");
            assert!(said.contains("the disk is that of"), "{said}");
            assert!(said.contains("is still there"), "{said}");
            let top = rows_of(TOP).expect("the top");
            assert_eq!(top["parent"], kept.as_str());
        } else {
            // What could refuse is found before anything is changed.
            let before = traces(&bundle);
            for more in ["-y", "-n"] {
                let said = fails(&["snapshot", "delete", more, path, &kept]);
                assert!(said.contains("nothing was changed"), "{said}");
                assert!(said.contains(text(image.file_name().expect("it").as_ref())));
            }
            assert!(traces(&bundle) == before);
        }
        assert_eq!(rows_of(&base).expect("it is there")["is_going"], true);
        fs::write(image, &good).expect("there is room");
        let rest = if is_switch { &base } else { &kept };
        let said = does(&["snapshot", "delete", "--json", "-y", path, rest]);
        let said: Value = serde_json::from_str(&said).expect("one JSON document");
        assert_eq!(said["action"], "deleted", "{said}");
        if !is_switch {
            assert_eq!(said["gone"], serde_json::json!([kept]), "{said}");
            assert_eq!(said["then"]["gone"], serde_json::json!([base]), "{said}");
            assert_eq!(said["then"]["survivor"], TOP, "{said}");
        }
        assert!(rows_of(&base).is_none() && rows_of(rest).is_none());
        does(&["check", "-q", path]);
    }
}
