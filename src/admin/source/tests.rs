//! What needs no disk; disks of every kind are read by the tests beside the program.

use super::*;

fn extent(start: u64, end: u64, what: What) -> Result<Extent> {
    Ok(Extent {
        range: DiskOffset::new(start)..DiskOffset::new(end),
        what,
        depth: 0,
        place: None,
    })
}

fn data_in(extents: Vec<Result<Extent>>) -> Vec<(u64, u64)> {
    let ranges = Data::of(extents.into_iter()).map(Result::unwrap);
    ranges
        .map(|range| (range.start.get(), range.end.get()))
        .collect()
}

#[test]
fn data_is_merged_and_holes_are_passed_over() {
    let extents = || {
        vec![
            extent(0, 10, What::Hole),
            extent(10, 20, What::Data),
            extent(20, 30, What::Bad),
            extent(30, 40, What::Zeros),
            extent(40, 50, What::Data),
        ]
    };
    assert_eq!(data_in(extents()), [(10, 30), (40, 50)]);
    assert_eq!(data_in(extents().split_off(2)), [(20, 30), (40, 50)]);
    assert_eq!(data_in(vec![extent(0, 9, What::Zeros)]), []);
    assert_eq!(data_in(Vec::new()), []);
}

#[test]
fn data_is_told_in_bounded_pieces() {
    let end = 5 + 2 * DATA_MAX + 7;
    let long = vec![
        extent(5, end - 6, What::Data),
        extent(end - 6, end, What::Data),
    ];
    let cuts = [5, 5 + DATA_MAX, 5 + 2 * DATA_MAX, end];
    let pieces: Vec<_> = cuts.windows(2).map(|cut| (cut[0], cut[1])).collect();
    assert_eq!(data_in(long), pieces);
    let failing = vec![extent(0, 1, What::Data), Err(Error::errno(libc::EIO))];
    let mut failing = Data::of(failing.into_iter());
    assert!(failing.next().unwrap().is_err() && failing.next().is_none());
}

#[test]
fn kinds_are_told_by_their_magic() {
    let dir = tempfile::tempdir().unwrap();
    let told = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        magic::recognise(&path, &Selection::default()).map_err(|e| e.kind())
    };
    let mut vdi = vec![0; 512];
    vdi[0x40..0x44].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    let mut fixed = vec![7; 1536];
    fixed[1024..1032].copy_from_slice(b"conectix");
    for (bytes, format) in [
        (&b"WithoutFreeSpace...."[..], Format::Ours),
        (b"WithouFreSpacExt", Format::Ours),
        (b"QFI\xfb\0\0\0\x03", Format::Qcow2),
        (b"KDMV", Format::Vmdk),
        (b"# Disk DescriptorFile\nversion=1", Format::Vmdk),
        (b"vhdxfile", Format::Vhdx),
        (b"conectix", Format::Vpc),
        (&vdi, Format::Vdi),
        (&fixed, Format::Raw),
        (b"", Format::Raw),
        (b"QFI", Format::Raw),
    ] {
        assert_eq!(told("disk", bytes), Ok(format), "{format}");
    }
    assert_eq!(told("disk.vhd", &fixed), Ok(Format::Vpc));
    // A name that promises a raw disk is not overruled by what was written to the disk.
    for name in ["a.img", "b.RAW", "c.dd"] {
        assert_eq!(told(name, &fixed), Ok(Format::Raw), "{name}");
        assert_eq!(told(name, b"KDMV"), Err(ErrorKind::NotAnImage), "{name}");
        assert_eq!(told(name, b"WithoutFreeSpace"), Ok(Format::Ours), "{name}");
    }
    // A name that promises an image of ours is held to it.
    for name in ["a.hds", "b.HDD", "root.hds.{5fbaabe3}"] {
        assert_eq!(told(name, b"zeros"), Err(ErrorKind::NotAnImage), "{name}");
    }
    let none = magic::recognise(&dir.path().join("none"), &Selection::default());
    assert_eq!(none.unwrap_err().kind(), ErrorKind::Missing);
    let directory = magic::recognise(dir.path(), &Selection::default());
    assert_eq!(directory.unwrap(), Format::Ours);
}
