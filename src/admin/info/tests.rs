//! What is told of good disks, odd ones and broken ones.

use super::*;
use crate::format::header::{CLOSED_V21, MAGIC_V1, MAGIC_V2, TYPE};
use std::fs;
use std::path::PathBuf;

/// A disk of 10 MiB in 32 KiB clusters.
fn raw() -> RawHeader {
    RawHeader {
        magic: MAGIC_V2,
        disk_type: TYPE,
        heads: 16,
        cylinders: 40,
        cluster_sectors: 64,
        entry_count: 320,
        size_in_sectors: 20480,
        in_use: 0,
        first_block: 64,
        flags: 0,
        extension: 0,
    }
}

/// Writes an image whose entries from the first on are these, with `clusters` clusters in all.
fn image(path: &Path, raw: &RawHeader, entries: &[u32], clusters: usize) {
    let mut bytes = vec![0; clusters * 32768];
    bytes[..64].copy_from_slice(&raw.encode());
    for (index, entry) in entries.iter().enumerate() {
        bytes[64 + 4 * index..68 + 4 * index].copy_from_slice(&entry.to_le_bytes());
    }
    fs::write(path, bytes).unwrap();
}

fn dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.hds");
    (dir, path)
}

fn look(path: &Path) -> (DiskInfo, FileInfo) {
    let found = info(path, &Selection::default(), Tables::Count).unwrap();
    let file = found.parts[0].files[0].clone();
    let text = render(&found);
    assert!(text.lines().count() <= 24, "{text}");
    (found, file)
}

#[test]
fn a_bare_image_is_described() {
    let (_dir, path) = dir();
    image(&path, &raw(), &[1, 0, 2, 3, 9], 4);
    let (disk, file) = look(&path);
    assert_eq!((disk.kind, disk.size_bytes), ("image", Some(10 << 20)));
    assert_eq!((disk.file_bytes, disk.problems.len()), (4 * 32768, 0));
    assert_eq!((file.version, file.cluster_bytes), (Some(2), Some(32768)));
    assert_eq!((file.mapped_clusters, file.bad_entries), (Some(4), Some(1)));
    assert_eq!(
        (file.in_use, file.closed_mark, file.extension.is_none()),
        (false, None, true)
    );
    assert_eq!(file.holders, Some(vec![]));
    let json = serde_json::to_value(&disk).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert_eq!(json["parts"][0]["files"][0]["bat_entries"], 320);
}

#[test]
fn entries_behind_holes_of_the_table_are_counted() {
    let (_dir, path) = dir();
    let header = RawHeader {
        magic: MAGIC_V1,
        entry_count: 1_000_000,
        size_in_sectors: 64_000_000,
        first_block: 7872,
        ..raw()
    };
    let file = fs::File::create(&path).unwrap();
    file.set_len(7872 * 512 + 65536).unwrap();
    let storage = FileStorage::new(file).unwrap();
    storage
        .write_at(FileOffset::ZERO, &header.encode())
        .unwrap();
    for index in [0_u64, 70_000, 999_999] {
        let at = FileOffset::new(64 + 4 * index);
        storage.write_at(at, &7872_u32.to_le_bytes()).unwrap();
    }
    // The word after the last entry is none.
    storage
        .write_at(FileOffset::new(64 + 4_000_000), &[0xff; 4])
        .unwrap();
    let (_, file) = look(&path);
    assert_eq!((file.mapped_clusters, file.bad_entries), (Some(3), Some(0)));
}

#[test]
fn marks_and_extensions() {
    let (_dir, path) = dir();
    image(
        &path,
        &RawHeader {
            in_use: IN_USE,
            ..raw()
        },
        &[],
        1,
    );
    assert!(look(&path).1.in_use);
    image(
        &path,
        &RawHeader {
            in_use: 0x3731_6470,
            ..raw()
        },
        &[],
        1,
    );
    assert_eq!(look(&path).1.closed_mark.as_deref(), Some("pd17"));
    image(&path, &RawHeader { in_use: 1, ..raw() }, &[], 1);
    assert_eq!(look(&path).1.closed_mark.as_deref(), Some("0x1"));
    image(
        &path,
        &RawHeader {
            in_use: CLOSED_V21,
            extension: 64,
            ..raw()
        },
        &[],
        2,
    );
    let extension = look(&path).1.extension.unwrap();
    assert!(!extension.valid);
    assert!(extension.problem.unwrap().contains("magic"));
}

#[test]
fn broken_images_are_described_all_the_same() {
    let (dir, path) = dir();
    fs::write(&path, "short").unwrap();
    let (disk, file) = look(&path);
    assert_eq!((file.format, disk.problems.len()), ("unknown", 1));
    image(
        &path,
        &RawHeader {
            cluster_sectors: 0,
            ..raw()
        },
        &[],
        1,
    );
    assert!(look(&path).1.problem.unwrap().contains("cluster size"));
    image(
        &path,
        &RawHeader {
            entry_count: u32::MAX >> 3,
            ..raw()
        },
        &[],
        1,
    );
    assert!(look(&path).1.problem.unwrap().contains("BAT"));
    let bundle = dir.path().join("b.hdd");
    fs::create_dir(&bundle).unwrap();
    fs::write(bundle.join("DiskDescriptor.xml"), "<x>").unwrap();
    let disk = info(&bundle, &Selection::default(), Tables::Count).unwrap();
    assert_eq!(
        (disk.kind, disk.parts.len(), disk.problems.len()),
        ("bundle", 0, 1)
    );
    assert!(render(&disk).contains("problem"));
}

#[test]
fn missing_files_of_a_bundle_are_named() {
    let (dir, _) = dir();
    let guid = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
    let none = "{00000000-0000-0000-0000-000000000000}";
    fs::write(
        dir.path().join("DiskDescriptor.xml"),
        format!(
            "<Parallels_disk_image><Disk_Parameters><Disk_size>20480</Disk_size></Disk_Parameters>\
             <StorageData><Storage><Start>0</Start><End>20480</End><Blocksize>64</Blocksize><Image>\
             <GUID>{guid}</GUID><Type>Compressed</Type><File>gone.hds</File></Image></Storage>\
             </StorageData><Snapshots><Shot><GUID>{guid}</GUID><ParentGUID>{none}</ParentGUID>\
             </Shot></Snapshots></Parallels_disk_image>"
        ),
    )
    .unwrap();
    let (disk, file) = look(dir.path());
    assert_eq!(disk.size_bytes, Some(10 << 20));
    assert!(disk.problems[0].contains("gone.hds"), "{:?}", disk.problems);
    assert!(file.problem.is_some());
}
