//! What daemons tell of themselves: kept, told and taken away as promised.

use super::*;
use std::process::{Child, Command};

fn registry() -> (tempfile::TempDir, Registry) {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::at(directory.path().join("r")).unwrap();
    (directory, registry)
}

#[test]
fn records_come_back_with_any_path() {
    let (_directory, registry) = registry();
    let image = PathBuf::from(OsString::from_vec(b"/a,b \xff\"c.hdd".to_vec()));
    let mut record = Record::of_this_process(&image, true).unwrap();
    record.mountpoint = Some(RecordedPath(PathBuf::from("/mnt/x y")));
    registry.write(&record).unwrap();
    assert_eq!(registry.all().unwrap(), vec![record.clone()]);
    registry.remove(&record);
    assert!(registry.all().unwrap().is_empty());
}

#[test]
fn an_image_is_known_by_all_of_its_names() {
    let (_directory, registry) = registry();
    let machine = registry.directory.join("vm.pvm");
    let bundle = machine.join("disk.hdd");
    let descriptor = bundle.join("DiskDescriptor.xml");
    let link = machine.join("link");
    fs::create_dir_all(&bundle).unwrap();
    fs::write(&descriptor, "").unwrap();
    fs::write(bundle.join("root.hds"), "").unwrap();
    fs::hard_link(bundle.join("root.hds"), &link).unwrap();
    let record = |image: &Path| Record::of_this_process(image, true).unwrap();
    let names = [&machine, &bundle, &descriptor];
    for served in names {
        assert!(names.iter().all(|name| record(served).is_of(name)));
        assert!(!record(served).is_of(&link));
    }
    assert!(record(&bundle.join("root.hds")).is_of(&link));
    assert!(record(Path::new("/gone")).is_of(Path::new("/gone")));
    assert!(!record(Path::new("/gone")).is_of(Path::new("/gone too")));
}

#[test]
fn the_file_of_a_device_is_known_by_any_name() {
    for (image, backing, expected) in [
        (&b"/x/a.hds"[..], &b"/a.hds\n"[..], true),
        (b"/x/a.hds", b"/x/a.hds\n", false),
        (b"/x/a.hds ", b"/a.hds \n", true),
        (b"/x/a\n", b"/a\n\n", true),
        (b"/x/a.hds", b"/a.hds \n", false),
        (b"/x/\xfe.hds", "/\u{fffd}.hds\n".as_bytes(), true),
        (b"/", b"/\n", false),
    ] {
        let path = Path::new(OsStr::from_bytes(image));
        assert_eq!(is_shown_as(path, backing), expected, "{path:?}");
    }
}

#[test]
fn a_reused_process_id_is_not_mistaken_for_the_daemon() {
    let (_directory, registry) = registry();
    let mut record = Record::of_this_process(Path::new("/x"), false).unwrap();
    record.start += 1;
    registry.write(&record).unwrap();
    assert!(!record.is_alive());
    assert!(
        registry.all().unwrap().is_empty(),
        "stale records are removed"
    );
}

/// A process in a mount name space of its own, and that one's number.
fn another_space() -> Option<(Child, u64)> {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "not root");
        println!("skipped in part: not root");
        return None;
    }
    let mut command = Command::new("unshare");
    let mut child = command.args(["--mount", "sleep", "60"]).spawn().unwrap();
    let path = format!("/proc/{}/ns/mnt", child.id());
    for _ in 0..500 {
        let space = fs::metadata(&path).unwrap().ino();
        if Some(space) != mount_space() {
            return Some((child, space));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("no mount name space of its own");
}

#[test]
fn who_sees_other_mounts_takes_no_record_away() {
    let (_directory, registry) = registry();
    let mut dead = Record::of_this_process(Path::new("/x"), false).unwrap();
    (dead.start, dead.pid) = (0, i32::MAX);
    if let Some((mut other, space)) = another_space() {
        dead.mount_space = Some(space);
        registry.write(&dead).unwrap();
        assert!(registry.all().unwrap().is_empty());
        assert_eq!(registry.reread(&dead), Some(dead.clone()));
        other.kill().unwrap();
        other.wait().unwrap();
        // Nobody will ever see those mounts again, if all processes of the host can be asked.
        let is_known = mount_spaces().is_some();
        assert!(registry.all().unwrap().is_empty());
        assert_eq!(registry.reread(&dead).is_none(), is_known);
    }
    dead.mount_space = mount_space();
    registry.write(&dead).unwrap();
    assert!(registry.all().unwrap().is_empty());
    assert_eq!(registry.reread(&dead), None);
}

#[test]
fn what_nobody_can_see_any_more_is_lost() {
    let mut record = Record::of_this_process(Path::new("/x"), false).unwrap();
    record.mount_space = Some(7);
    assert!(record.is_lost(Some(&HashSet::from([8]))));
    assert!(!record.is_lost(Some(&HashSet::from([8, 7]))));
    assert!(!record.is_lost(None), "somebody may be there");
    record.mount_space = None;
    assert!(!record.is_lost(Some(&HashSet::from([8]))));
    // At least this very process is in one, where all can be asked.
    let spaces = mount_spaces();
    assert!(spaces.is_none_or(|spaces| mount_space().is_some_and(|own| spaces.contains(&own))));
}

#[test]
fn a_dead_daemon_has_no_claim_on_what_a_living_one_has() {
    let (_directory, registry) = registry();
    let mut living = Record::of_this_process(Path::new("/a/x"), false).unwrap();
    living.device = Some(RecordedPath("/dev/loop7".into()));
    living.mount_device = Some("0:39".into());
    let mut dead = living.clone();
    (dead.start, dead.pid) = (0, i32::MAX);
    assert!(dead.is_replaced_by(&living));
    (dead.device, dead.mount_device) = (None, None);
    living.mount_device = None;
    assert!(!dead.is_replaced_by(&living));
    registry.write(&dead).unwrap();
    assert!(registry.all().unwrap().is_empty());

    living.mount_device = Some("0:39".into());
    dead.mount_device = living.mount_device.clone();
    dead.start = living.start + 1;
    assert!(!dead.is_replaced_by(&living), "it is still closing");

    let entry = |fs_type: &str| MountEntry {
        id: 1,
        parent: 0,
        owner: None,
        device: "0:39".into(),
        mountpoint: "/mnt".into(),
        fs_type: fs_type.into(),
        source: "x".into(),
    };
    living.mount_device = Some("0:39".into());
    assert!(living.is_about(&entry("fuse.ploopfs")));
    assert!(!living.is_about(&entry("tmpfs")));
}

#[test]
fn what_a_daemon_left_is_told_to_the_one_who_waits() {
    let (_directory, registry) = registry();
    let mut record = Record::of_this_process(Path::new("/x"), false).unwrap();
    record.start += 1;
    wait_closed(&registry, &registry.watch(&record), None, || ()).unwrap();
    registry.write(&record).unwrap();
    let died = wait_closed(&registry, &registry.watch(&record), None, || ()).unwrap_err();
    assert_eq!(died.kind(), ErrorKind::InUse);
    record.error = Some("no space".into());
    registry.write(&record).unwrap();
    let error = wait_closed(&registry, &registry.watch(&record), None, || ()).unwrap_err();
    assert!(error.to_string().contains("no space"));
    assert!(registry.reread(&record).is_none());
}

#[test]
fn waiting_ends_after_the_time_allowed() {
    let (_directory, registry) = registry();
    let record = Record::of_this_process(Path::new("/x"), false).unwrap();
    let watched = registry.watch(&record);
    let error = wait_closed(&registry, &watched, Some(Duration::ZERO), || ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
}

#[test]
fn a_record_that_others_took_away_does_not_pass_for_a_closed_image() {
    let (_directory, registry) = registry();
    let mut record = Record::of_this_process(Path::new("/x"), false).unwrap();
    // Another process had this number before.
    record.start += 1;
    for closed in [true, false] {
        registry.write(&record).unwrap();
        let watched = registry.watch(&record);
        if closed {
            registry.closed(&record);
        }
        // Somebody lists what there is, and tidies up.
        assert!(registry.all().unwrap().is_empty());
        assert!(registry.reread(&record).is_none());
        let told = wait_closed(&registry, &watched, None, || ());
        assert_eq!(told.is_ok(), closed, "{told:?}");
    }
}

#[test]
fn an_emptied_record_is_tidied_up() {
    let (_directory, registry) = registry();
    fs::write(registry.directory.join("7.json"), b"").unwrap();
    assert!(registry.all().unwrap().is_empty());
    assert!(!registry.directory.join("7.json").exists());
}

#[test]
fn a_directory_open_to_others_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(Registry::at(directory.path().to_owned()).is_err());
}
