//! What commands leave alone, and what they say of things that are not as they should be.

use crate::commands::traces;
use crate::commands::{
    TOP, common, directory, does, fails, made, ploopfs, rows, shows, story, text,
};
use crate::forge::bundle::{BundleSpec, Style};
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

const LOCK: &str = "DiskDescriptor.xml.lck";
const NAMES: &str = "DiskDescriptor.xml.names";

fn chain(depth: usize) -> BundleSpec {
    BundleSpec::chain(Style::Ploop, &common(2), depth, |_, _| {})
}

fn base_of(path: &str) -> String {
    rows(path)[0]["guid"].as_str().expect("a GUID").to_owned()
}

#[test]
fn what_only_plans_or_is_refused_leaves_no_lock_file() {
    let dir = directory();
    let bundle = made(dir.path(), "a.hdd", &chain(3));
    let path = text(&bundle);
    let base = base_of(path);
    let before = traces(&bundle);
    for args in [
        &["snapshot", "switch", "-n", path, &base][..],
        &["snapshot", "delete", "-n", path, &base],
        &["merge", "-n", path],
        &["resize", "-n", path, "1G"],
        &["snapshot", "list", path],
        &["check", "-q", path],
    ] {
        does(args);
        assert!(traces(&bundle) == before, "{args:?}");
    }
    for args in [
        &["snapshot", "switch", path, &base][..],
        &["snapshot", "switch", "-y", path, TOP],
        &["snapshot", "switch", "-n", path, TOP],
        &["snapshot", "delete", "-y", path, TOP],
        &["snapshot", "delete", "-y", path, "none"],
        &["snapshot", "rename", path, &base, "latest"],
        &["snapshot", "create", "--uuid", TOP, path],
        &["merge", "-y", "--into-new", "root.hds", path],
        &["resize", path, "1M"],
    ] {
        fails(args);
        assert!(traces(&bundle) == before, "{args:?}");
    }
    does(&["snapshot", "delete", "-y", path, &base]);
    assert!(
        bundle.join(LOCK).exists(),
        "ploop is to be kept out of a change"
    );
}

/// A file of names that is not ours to replace, made at a path.
type Make = fn(&Path) -> std::io::Result<()>;

#[test]
fn a_file_of_names_that_is_not_understood_is_not_replaced() {
    let dir = directory();
    let makes: [(&str, Make); 5] = [
        ("garbage", |path| fs::write(path, "{ \"names\": ")),
        ("another version", |path| {
            fs::write(path, r#"{"schema_version":2,"names":{}}"#)
        }),
        ("a FIFO", |path| {
            Ok(nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU)?)
        }),
        ("a link", |path| symlink("elsewhere", path)),
        ("a directory", |path| fs::create_dir(path)),
    ];
    for (number, (what, make)) in makes.into_iter().enumerate() {
        let bundle = made(dir.path(), &format!("{number}.hdd"), &chain(3));
        let path = text(&bundle);
        let (base, file) = (base_of(path), bundle.join(NAMES));
        make(&file).expect("there is room");
        let kind = || {
            file.symlink_metadata()
                .map(|meta| (meta.file_type(), meta.len()))
        };
        let before = kind().expect("it is there");
        let listed = fs::read_dir(&bundle).expect("a directory").count();
        for args in [
            &["snapshot", "create", "--name", "x", path][..],
            &["snapshot", "rename", path, &base, "x"],
        ] {
            let said = fails(args);
            assert!(said.contains("move it away"), "{what}: {said}");
            assert!(said.contains(NAMES), "{what}: {said}");
        }
        assert_eq!(rows(path).len(), 3, "{what}");
        let left = fs::read_dir(&bundle).expect("a directory").count();
        assert_eq!(left, listed, "{what}: something was made");
        // Names are no reason not to do the rest.
        let output = ploopfs(&["snapshot", "delete", "-y", path, &base]);
        let said = story(&output);
        assert_eq!(output.status.code(), Some(0), "{what}: {said}");
        assert!(said.contains("does no harm"), "{what}: {said}");
        assert_eq!(kind().expect("it is there"), before, "{what}");
    }
}

/// Marks a snapshot as going away, as every deletion begins with.
fn mark(bundle: &Path, guid: &str) {
    let xml = bundle.join("DiskDescriptor.xml");
    let old = fs::read_to_string(&xml).expect("the descriptor");
    let tree = old.find("<Snapshots>").expect("a tree");
    let shot = tree
        + old[tree..]
            .find(&format!("<GUID>{guid}"))
            .expect("the snapshot");
    let end = shot + old[shot..].find("</Shot>").expect("its end");
    let new = format!("{}<Temporary/>{}", &old[..end], &old[end..]);
    fs::write(&xml, new).expect("there is room");
}

#[test]
fn an_interrupted_deletion_is_said_to_be_one() {
    let dir = directory();
    for is_ours in [true, false] {
        let bundle = made(dir.path(), &format!("{is_ours}.hdd"), &chain(3));
        let path = text(&bundle);
        let base = base_of(path);
        let shown = shows(path)[TOP].clone();
        mark(&bundle, &base);
        if is_ours {
            fs::write(bundle.join("DiskDescriptor.xml.pending"), "").expect("there is room");
        }
        for args in [
            &["snapshot", "list", path][..],
            &["snapshot", "tree", path],
            &["check", path],
        ] {
            let said = story(&ploopfs(args));
            assert!(said.contains("interrupted"), "{args:?}: {said}");
            assert_eq!(said.contains("its deletion by ploopfs"), is_ours, "{said}");
            assert!(!said.contains("operation of ploop"), "{args:?}: {said}");
        }
        does(&["snapshot", "delete", "-y", path, &base]);
        does(&["check", "-q", path]);
        assert_eq!(
            story(&ploopfs(&["snapshot", "list", path]))
                .matches("going")
                .count(),
            0
        );
        assert!(shows(path)[TOP] == shown);
    }
    // One that is to wait for its children is as it should be.
    let bundle = made(dir.path(), "waits.hdd", &chain(2));
    let path = text(&bundle);
    let base = base_of(path);
    does(&["snapshot", "switch", "-q", "--keep", path, &base]);
    does(&["snapshot", "delete", "-y", path, &base]);
    let output = ploopfs(&["snapshot", "list", path]);
    assert!(output.stderr.is_empty(), "{}", story(&output));
    let said = does(&["check", path]);
    assert!(said.contains("one of its 2 children"), "{said}");
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let dir = directory();
    let half = 50 * 32 * 1024;
    for keep in [1, 2] {
        // As other programs leave it, which cut off what snapshots show.
        let spec = BundleSpec::chain(Style::Ploop, &common(2), 3, |level, image| {
            if level == 2 {
                image.disk_sectors = half as u64 / 512;
            }
        });
        let bundle = made(dir.path(), &format!("{keep}.hdd"), &spec);
        let path = text(&bundle);
        let size = |path: &str| shows(path)[TOP].len();
        let old = shows(path)[TOP].clone();
        let whole = common(2).disk_sectors as usize * 512;
        assert_eq!((size(path), whole), (half, 2 * half));
        for number in 0..keep {
            let base = base_of(path);
            let mut args = vec!["snapshot", "delete", "-y", path, &base];
            // The top, which is next, is smaller.
            if number == 1 {
                let traced = traces(&bundle);
                let said = fails(&args);
                assert!(said.contains("--force-discard"), "{said}");
                assert!(traces(&bundle) == traced);
                args.push("--force-discard");
            }
            does(&args);
            assert_eq!(size(path), half);
            does(&["check", "-q", path]);
        }
        assert!(shows(path)[TOP] == old);
        if keep == 2 {
            does(&["resize", path, &format!("{whole}")]);
            let now = shows(path)[TOP].clone();
            assert!(now[..half] == old);
            assert!(now[half..].iter().all(|byte| *byte == 0), "it came back");
        }
    }
}

#[test]
fn a_change_waits_for_nobody_and_names_who_is_there() {
    use nix::fcntl::{Flock, FlockArg};
    let dir = directory();
    let bundle = made(dir.path(), "a.hdd", &chain(2));
    let path = text(&bundle);
    let before = traces(&bundle);
    let open = fs::File::open(&bundle).expect("it is there");
    let other = Flock::lock(open, FlockArg::LockExclusiveNonblock);
    let other = other.map_err(|(_, e)| e).expect("nobody else has it");
    for args in [&["snapshot", "create", path][..], &["merge", "-n", path]] {
        let said = fails(args);
        assert!(said.contains("working on the bundle"), "{said}");
        assert!(said.contains(&std::process::id().to_string()), "{said}");
    }
    assert!(traces(&bundle) == before);
    does(&["snapshot", "list", path]);
    drop(other);
    does(&["snapshot", "create", "-q", path]);
    let image = fs::OpenOptions::new()
        .write(true)
        .open(bundle.join("root.hds"));
    // What nobody closed.
    let marked = image
        .expect("it is there")
        .write_at(&0x746f_6e59_u32.to_le_bytes(), 44);
    marked.expect("there is room");
    does(&["snapshot", "create", "-q", path]);
}
