//! Bundles and images of every kind, opened and refused.
use super::*;
use crate::format::header::{FLAG_EMPTY, MAGIC_V2, RawHeader, TYPE};
use crate::units::FileOffset;
use std::fs;
use std::os::unix::fs::symlink;

const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

fn guid(n: u32) -> String {
    format!("{{{n:08x}-0000-4000-8000-000000000000}}")
}

/// An empty image of 10 MiB in 32 KiB clusters.
fn image(path: &Path) {
    let raw = RawHeader {
        magic: MAGIC_V2,
        disk_type: TYPE,
        heads: 16,
        cylinders: 40,
        cluster_sectors: 64,
        entry_count: 320,
        size_in_sectors: 20480,
        in_use: 0,
        first_block: 64,
        flags: FLAG_EMPTY,
        extension: 0,
    };
    let rest = vec![0; 32768 - 64];
    fs::write(path, [&raw.encode()[..], &rest].concat()).unwrap();
}

/// What a descriptor says of one image.
struct Line {
    guid: String,
    parent: String,
    kind: &'static str,
    file: String,
}

/// A chain of images `0.hds`, `1.hds` ... of the snapshots `guid(1)`, `guid(2)` ...
fn lines(depth: u32) -> Vec<Line> {
    (0..depth)
        .map(|n| Line {
            guid: guid(n + 1),
            parent: if n == 0 { NONE.to_owned() } else { guid(n) },
            kind: "Compressed",
            file: format!("{n}.hds"),
        })
        .collect()
}

fn descriptor(lines: &[Line], extra: &str) -> String {
    let images: String = lines
        .iter()
        .map(|l| {
            format!(
                "<Image><GUID>{}</GUID><Type>{}</Type><File>{}</File></Image>\n",
                l.guid, l.kind, l.file
            )
        })
        .collect();
    let shots: String = lines
        .iter()
        .map(|l| {
            format!(
                "<Shot><GUID>{}</GUID><ParentGUID>{}</ParentGUID></Shot>\n",
                l.guid, l.parent
            )
        })
        .collect();
    let top = &lines.last().unwrap().guid;
    format!(
        "<Parallels_disk_image><Disk_Parameters><Disk_size>20480</Disk_size>{extra}\
         </Disk_Parameters><StorageData><Storage><Start>0</Start><End>20480</End>\
         <Blocksize>64</Blocksize>{images}</Storage></StorageData>\
         <Snapshots><TopGUID>{top}</TopGUID>{shots}</Snapshots></Parallels_disk_image>"
    )
}

struct House {
    _dir: tempfile::TempDir,
    bundle: PathBuf,
}

impl House {
    fn of(lines: &[Line], extra: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("vm.pvm/disk.hdd");
        fs::create_dir_all(&bundle).unwrap();
        for line in lines
            .iter()
            .filter(|line| !line.file.starts_with(['.', '/']))
        {
            image(&bundle.join(&line.file));
        }
        fs::write(bundle.join(DESCRIPTOR), descriptor(lines, extra)).unwrap();
        Self { _dir: dir, bundle }
    }

    fn chain(depth: u32) -> Self {
        Self::of(&lines(depth), "")
    }

    fn open(&self, selection: &Selection) -> Result<OpenedImages> {
        open(&self.bundle, selection)
    }

    fn refused(&self, selection: &Selection) -> ErrorKind {
        self.open(selection).unwrap_err().kind()
    }
}

fn read() -> Selection {
    Selection::default()
}

fn write() -> Selection {
    Selection {
        write: true,
        ..Selection::default()
    }
}

fn at(snapshot: &str) -> Selection {
    Selection {
        snapshot: Some(snapshot.to_owned()),
        ..Selection::default()
    }
}

fn file_names(images: &OpenedImages) -> Vec<String> {
    let files = images.parts.iter().flat_map(|part| &part.files);
    files
        .map(|f| f.path.file_name().unwrap().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn a_bundle_opens_under_each_of_its_names() {
    let house = House::chain(3);
    let machine = house.bundle.parent().unwrap();
    for name in [&house.bundle, &house.bundle.join(DESCRIPTOR), machine] {
        let images = open(name, &read()).unwrap();
        assert_eq!(images.named, name);
        assert_eq!(file_names(&images), ["0.hds", "1.hds", "2.hds"]);
        assert_eq!(images.selected, Some(guid(3)));
        assert_eq!(images.warnings, Vec::<String>::new());
        let guids: Vec<_> = images
            .snapshots
            .iter()
            .map(|shot| shot.guid.clone())
            .collect();
        assert_eq!(guids, [guid(1), guid(2)]);
        let part = &images.parts[0];
        assert_eq!(
            (part.start.get(), part.end, part.blocksize),
            (0, Some(SectorCount::new(20480)), Some(64))
        );
        assert!(part.files.iter().all(|file| file.plain == Plain::No));
    }
    // Reading makes no file.
    assert!(!house.bundle.join("DiskDescriptor.xml.lck").exists());
    fs::create_dir(machine.join("second.hdd")).unwrap();
    let error = open(machine, &read()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.fix_text().unwrap().contains("second.hdd"));
}

#[test]
fn directories_without_a_descriptor_list_their_images() {
    let house = House::chain(2);
    fs::remove_file(house.bundle.join(DESCRIPTOR)).unwrap();
    let error = house.open(&read()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Missing);
    assert!(
        error.fix_text().unwrap().contains("1.hds"),
        "{:?}",
        error.fix_text()
    );
    assert_eq!(
        open(Path::new("/nowhere.hdd"), &read()).unwrap_err().kind(),
        ErrorKind::Missing
    );
}

#[test]
fn only_the_top_is_open_for_writing_and_all_are_locked() {
    let house = House::chain(3);
    let images = house.open(&write()).unwrap();
    let files = &images.parts[0].files;
    for file in &files[..2] {
        assert!(file.storage.write_at(FileOffset::ZERO, b"x").is_err());
    }
    files[2]
        .storage
        .write_at(FileOffset::new(20000), b"x")
        .unwrap();
    // A second open of the bundle, of a member, of a member by another name.
    assert_eq!(house.refused(&write()), ErrorKind::Locked);
    assert_eq!(house.refused(&read()), ErrorKind::Locked);
    let link = house.bundle.join("hard.hds");
    fs::hard_link(house.bundle.join("2.hds"), &link).unwrap();
    assert_eq!(open(&link, &read()).unwrap_err().kind(), ErrorKind::Locked);
    let lower = house.bundle.join("0.hds");
    assert!(open(&lower, &read()).is_ok());
    let copy = house.bundle.join("../0.hds");
    fs::hard_link(&lower, &copy).unwrap();
    assert_eq!(open(&copy, &write()).unwrap_err().kind(), ErrorKind::Locked);
    let unlocked = Selection {
        no_lock: true,
        ..read()
    };
    assert!(house.open(&unlocked).is_ok());
    // Frozen snapshots can be read meanwhile.
    assert!(house.open(&at(&guid(2))).is_ok());
    drop(images);
    assert!(house.open(&write()).is_ok());
}

#[test]
fn the_bundle_lock_outlives_the_files() {
    let house = House::chain(1);
    let images = house.open(&write()).unwrap();
    let lock = images.bundle_lock();
    drop(images);
    assert_eq!(house.refused(&write()), ErrorKind::Locked);
    drop(lock);
    assert!(house.open(&write()).is_ok());
}

#[test]
fn readers_share() {
    let house = House::chain(2);
    let first = house.open(&read()).unwrap();
    let second = house.open(&read()).unwrap();
    assert_eq!(house.refused(&write()), ErrorKind::Locked);
    drop((first, second));
    assert!(house.open(&write()).is_ok());
}

#[test]
fn snapshots_are_found_by_guid_name_and_latest() {
    let house = House::chain(3);
    let names = format!(
        "<ParallelsSavedStates><SavedStateItem guid=''><SavedStateItem guid='{}'><Name>clean\
         </Name></SavedStateItem></SavedStateItem></ParallelsSavedStates>",
        guid(1)
    );
    fs::write(house.bundle.parent().unwrap().join("Snapshots.xml"), names).unwrap();
    let bare = guid(2)[1..37].to_uppercase();
    for (word, files) in [
        ("clean", 1),
        (guid(1).as_str(), 1),
        ("latest", 2),
        (&bare, 2),
    ] {
        let images = house.open(&at(word)).unwrap();
        assert_eq!(file_names(&images).len(), files, "{word}");
        // Reading a frozen snapshot does not keep others from writing to the top.
        assert!(house.open(&write()).is_ok());
        let refused = house
            .open(&Selection {
                write: true,
                ..at(word)
            })
            .unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        assert!(refused.fix_text().unwrap().contains("-r"));
    }
    assert_eq!(
        house.open(&read()).unwrap().snapshots[0].name.as_deref(),
        Some("clean")
    );
    let error = house.open(&at("unknown")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSuchSnapshot);
    assert!(error.fix_text().unwrap().contains("clean"));
    assert_eq!(house.refused(&at(&guid(9))), ErrorKind::NoSuchSnapshot);
    // The top by its GUID is the top.
    assert!(
        house
            .open(&Selection {
                write: true,
                ..at(&guid(3))
            })
            .is_ok()
    );
    assert_eq!(
        House::chain(1).refused(&at("latest")),
        ErrorKind::NoSuchSnapshot
    );
}

#[test]
fn views_of_snapshots_share_open_files() {
    let house = House::chain(3);
    let images = house.open(&write()).unwrap();
    let view = images.open_snapshot("latest").unwrap();
    assert_eq!(view.selected, Some(guid(2)));
    let (files, shared) = (&images.parts[0].files, &view.parts[0].files);
    assert_eq!(shared.len(), 2);
    for (file, shared) in files.iter().zip(shared) {
        assert!(Arc::ptr_eq(&file.storage, &shared.storage));
    }
    assert_eq!(
        images.open_snapshot("x").unwrap_err().kind(),
        ErrorKind::NoSuchSnapshot
    );
    // A view opened from a view that has outlived the disk shares with it too.
    drop(images);
    let lower = view.open_snapshot(&guid(1)).unwrap();
    assert!(Arc::ptr_eq(
        &lower.parts[0].files[0].storage,
        &view.parts[0].files[0].storage
    ));
}

#[test]
fn a_view_of_another_branch_opens_and_locks_its_own_files() {
    let mut lines = lines(3);
    lines[1].parent = guid(1);
    lines[2].parent = guid(1);
    let house = House::of(&lines, "");
    let images = house.open(&write()).unwrap();
    assert_eq!(file_names(&images), ["0.hds", "2.hds"]);
    let view = images.open_snapshot(&guid(2)).unwrap();
    assert_eq!(file_names(&view), ["0.hds", "1.hds"]);
    let member = house.bundle.join("../1.hds");
    fs::hard_link(house.bundle.join("1.hds"), &member).unwrap();
    assert_eq!(
        open(&member, &write()).unwrap_err().kind(),
        ErrorKind::Locked
    );
    drop(view);
    assert!(open(&member, &write()).is_ok());
}

#[test]
fn the_same_file_twice_is_refused_whatever_it_is_called() {
    for make in [
        |a: &Path, b: &Path| fs::hard_link(a, b),
        |a: &Path, b: &Path| symlink(a, b),
    ] {
        let house = House::chain(2);
        let (base, top) = (house.bundle.join("0.hds"), house.bundle.join("1.hds"));
        fs::remove_file(&top).unwrap();
        make(&base, &top).unwrap();
        for selection in [read(), write()] {
            assert_eq!(house.refused(&selection), ErrorKind::Descriptor);
        }
    }
}

#[test]
fn a_missing_file_is_named_with_its_snapshot() {
    let house = House::chain(2);
    fs::remove_file(house.bundle.join("0.hds")).unwrap();
    let error = house.open(&read()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Missing);
    assert!(error.to_string().contains(&guid(1)), "{error}");
    assert!(error.to_string().contains("0.hds"), "{error}");
}

#[test]
fn files_outside_the_bundle_must_be_allowed() {
    let mut lines = lines(2);
    lines[0].file = "../base.hds".to_owned();
    let house = House::of(&lines, "");
    image(&house.bundle.join("../base.hds"));
    assert_eq!(house.refused(&read()), ErrorKind::OutsideBundle);
    let outside = vec![house.bundle.parent().unwrap().to_owned()];
    let allowed = Selection {
        allow_outside: outside,
        ..read()
    };
    assert_eq!(file_names(&house.open(&allowed).unwrap()).len(), 2);
}

#[test]
fn a_moved_bundle_says_so() {
    let mut lines = lines(2);
    lines[0].file = "/nowhere/disk.hdd/0.hds".to_owned();
    let house = House::of(&lines, "");
    image(&house.bundle.join("0.hds"));
    let images = house.open(&write()).unwrap();
    assert!(
        images.warnings[0].contains("moved"),
        "{:?}",
        images.warnings
    );
}

#[test]
fn types_and_magics() {
    let house = |base: &'static str, base_magic: bool, top: &'static str, top_magic: bool| {
        let mut lines = lines(2);
        lines[0].kind = base;
        lines[1].kind = top;
        let house = House::of(&lines, "");
        for (file, magic) in [("0.hds", base_magic), ("1.hds", top_magic)] {
            if !magic {
                fs::write(house.bundle.join(file), vec![0; 4096]).unwrap();
            }
        }
        house
    };
    let kinds = |house: &House, selection: &Selection| -> Result<Vec<Plain>> {
        Ok(house.open(selection)?.parts[0]
            .files
            .iter()
            .map(|file| file.plain)
            .collect())
    };
    let plain_base = [Plain::Yes, Plain::No];
    assert_eq!(
        kinds(&house("Plain", false, "Compressed", true), &write()).unwrap(),
        plain_base
    );
    // As ploop types a disk with a plain base.
    assert_eq!(
        kinds(&house("Plain", false, "Plain", true), &write()).unwrap(),
        plain_base
    );
    let contradiction = house("Plain", true, "Compressed", true);
    let images = contradiction.open(&read()).unwrap();
    assert_eq!(images.parts[0].files[0].plain, Plain::No);
    assert!(images.warnings[0].contains("magic"));
    let top = house("Compressed", true, "Plain", true);
    assert_eq!(top.refused(&write()), ErrorKind::Unsupported);
    assert!(top.open(&read()).is_ok());
    let above = house("Compressed", true, "Plain", false);
    assert_eq!(above.refused(&read()), ErrorKind::Unsupported);
    assert_eq!(
        house("Compressed", false, "Compressed", true).refused(&read()),
        ErrorKind::NotAnImage
    );
}

#[test]
fn bare_images_and_deltas_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["base", "middle", "top"] {
        image(&path(name));
    }
    fs::write(path("raw"), vec![0; 100_000]).unwrap();
    let selection = Selection {
        lower: vec![path("base"), path("middle")],
        write: true,
        ..Selection::default()
    };
    let images = open(&path("top"), &selection).unwrap();
    assert_eq!(file_names(&images), ["base", "middle", "top"]);
    assert!(images.snapshots.is_empty() && images.selected.is_none());
    assert_eq!(
        images.open_snapshot("latest").unwrap_err().kind(),
        ErrorKind::NoSuchSnapshot
    );
    drop(images);
    // Raw is never guessed.
    let error = open(&path("raw"), &read()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAnImage);
    assert!(error.fix_text().unwrap().contains("--format raw"));
    let raw = Selection {
        raw: true,
        ..read()
    };
    assert_eq!(
        open(&path("raw"), &raw).unwrap().parts[0].files[0].plain,
        Plain::Yes
    );
    let over_raw = Selection {
        raw: true,
        lower: vec![path("raw")],
        ..write()
    };
    let images = open(&path("top"), &over_raw).unwrap();
    let kinds: Vec<_> = images.parts[0]
        .files
        .iter()
        .map(|file| file.plain)
        .collect();
    assert_eq!(kinds, [Plain::Yes, Plain::No]);
    // Links are fine where the user names them.
    symlink("base", path("link")).unwrap();
    assert!(open(&path("link"), &write()).is_ok());
    let twice = Selection {
        lower: vec![path("link")],
        ..read()
    };
    assert_eq!(
        open(&path("base"), &twice).unwrap_err().kind(),
        ErrorKind::Descriptor
    );
}

#[test]
fn one_image_of_a_chain_is_not_written_to_alone() {
    let house = House::chain(2);
    for name in ["0.hds", "1.hds"] {
        let path = house.bundle.join(name);
        let error = open(&path, &write()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(error.fix_text().unwrap().contains("bundle"));
        assert_eq!(open(&path, &read()).unwrap().warnings.len(), 1);
    }
    let by_hand = Selection {
        lower: vec![house.bundle.join("0.hds")],
        ..write()
    };
    assert!(open(&house.bundle.join("1.hds"), &by_hand).is_ok());
    let single = House::chain(1);
    assert_eq!(
        open(&single.bundle.join("0.hds"), &write())
            .unwrap()
            .warnings
            .len(),
        1
    );
}

#[test]
fn odd_descriptors_are_read_only() {
    let house = House::of(&lines(1), "<Padding>1</Padding>");
    assert_eq!(house.refused(&write()), ErrorKind::Unsupported);
    assert_eq!(house.open(&read()).unwrap().warnings.len(), 1);
    let encrypted = House::of(&lines(1), "<Encryption><KeyId>k</KeyId></Encryption>");
    assert!(encrypted.open(&write()).unwrap().warnings[0].contains("encrypted"));
    fs::write(
        encrypted.bundle.join(DESCRIPTOR),
        "<Parallels_disk_image>\n<x>",
    )
    .unwrap();
    assert_eq!(encrypted.refused(&read()), ErrorKind::Descriptor);
    fs::write(encrypted.bundle.join(DESCRIPTOR), vec![b' '; 2 << 20]).unwrap();
    assert_eq!(encrypted.refused(&read()), ErrorKind::Descriptor);
}

#[test]
fn split_disks_have_a_chain_a_part() {
    let house = House::chain(2);
    let path = house.bundle.join(DESCRIPTOR);
    let text = fs::read_to_string(&path).unwrap();
    let (from, to) = (
        text.find("<Storage>").unwrap(),
        text.find("</StorageData>").unwrap(),
    );
    let first = text[from..to].replace("<End>20480", "<End>8192");
    let second = text[from..to]
        .replace("<Start>0", "<Start>8192")
        .replace(".hds", ".1.hds");
    for name in ["0.1.hds", "1.1.hds"] {
        image(&house.bundle.join(name));
    }
    fs::write(
        &path,
        format!("{}{first}{second}{}", &text[..from], &text[to..]),
    )
    .unwrap();
    let images = house.open(&write()).unwrap();
    assert_eq!(
        file_names(&images),
        ["0.hds", "1.hds", "0.1.hds", "1.1.hds"]
    );
    let bounds: Vec<_> = images
        .parts
        .iter()
        .map(|p| (p.start.get(), p.end))
        .collect();
    let sectors = |n| Some(SectorCount::new(n));
    assert_eq!(bounds, [(0, sectors(8192)), (8192, sectors(20480))]);
    assert_eq!(images.disk_size, sectors(20480));
    for part in &images.parts {
        let top = &part.files[1].storage;
        assert!(
            part.files[0]
                .storage
                .write_at(FileOffset::ZERO, b"x")
                .is_err()
        );
        top.write_at(FileOffset::new(20000), b"x").unwrap();
    }
    drop(images);
    // The same file in two parts.
    fs::remove_file(house.bundle.join("1.1.hds")).unwrap();
    fs::hard_link(house.bundle.join("1.hds"), house.bundle.join("1.1.hds")).unwrap();
    assert_eq!(house.refused(&read()), ErrorKind::Descriptor);
}

#[test]
fn deep_chains_open() {
    let house = House::chain(253);
    let images = house.open(&write()).unwrap();
    assert_eq!(images.parts[0].files.len(), 253);
    let view = images.open_snapshot(&guid(200)).unwrap();
    assert_eq!(view.parts[0].files.len(), 200);
}
