//! Headers that hold together, headers that do not, and those in between.

use super::*;

/// A 10 MiB disk of 32 KiB clusters: 320 entries, table and header in one cluster.
fn good() -> RawHeader {
    RawHeader {
        magic: MAGIC_V2,
        disk_type: 2,
        heads: 16,
        cylinders: 40,
        cluster_sectors: 64,
        entry_count: 320,
        size_in_sectors: 20480,
        in_use: 0,
        first_block: 64,
        flags: 1,
        extension: 0,
    }
}

const LEN: FileOffset = FileOffset::new(32768);

fn refused(change: impl FnOnce(&mut RawHeader)) -> HeaderError {
    let mut raw = good();
    change(&mut raw);
    Header::validate(&raw, LEN).unwrap_err()
}

fn read_only(change: impl FnOnce(&mut RawHeader)) -> Option<HeaderError> {
    let mut raw = good();
    change(&mut raw);
    Header::validate(&raw, LEN).unwrap().write_refusal()
}

#[test]
fn fields_keep_their_places() {
    let bytes: [u8; HEADER_LEN] = std::array::from_fn(|i| u8::try_from(i).unwrap());
    let raw = RawHeader::decode(&bytes);
    assert_eq!(raw.disk_type, 0x1312_1110);
    assert_eq!(raw.cluster_sectors, 0x1f1e_1d1c);
    assert_eq!(raw.size_in_sectors, 0x2b2a_2928_2726_2524);
    assert_eq!(raw.in_use, 0x2f2e_2d2c);
    assert_eq!(raw.extension, 0x3f3e_3d3c_3b3a_3938);
    assert_eq!(raw.encode(), bytes);
}

#[test]
fn a_good_header_is_writable() {
    let header = Header::validate(&good(), LEN).unwrap();
    assert_eq!(header.write_refusal(), None);
    assert_eq!(header.size_bytes(), 10 << 20);
    assert_eq!(header.version(), Version::V2);
}

#[test]
fn impossible_headers_are_refused() {
    assert_eq!(refused(|h| h.magic[3] = 0), HeaderError::Magic);
    assert_eq!(refused(|h| h.disk_type = 3), HeaderError::Type(3));
    assert_eq!(
        refused(|h| h.cluster_sectors = 0),
        HeaderError::ClusterSize(0)
    );
    assert_eq!(
        refused(|h| h.cluster_sectors = 4_186_128),
        HeaderError::ClusterSize(4_186_128)
    );
    assert_eq!(
        refused(|h| h.entry_count = 1 << 29),
        HeaderError::EntryCount(1 << 29)
    );
    assert_eq!(
        refused(|h| h.entry_count = 0),
        HeaderError::NoEntries(20480)
    );
    assert_eq!(
        refused(|h| h.size_in_sectors = 1 << 60),
        HeaderError::DiskSize(1 << 60)
    );
    assert_eq!(
        refused(|h| h.entry_count = 8177),
        HeaderError::TableTruncated {
            table_end: 64 + 4 * 8177,
            len: 32768
        }
    );
    // 160 of the 320 entries would do to read half of the disk.
    assert_eq!(
        refused(|h| h.entry_count = 159),
        HeaderError::TooFewEntries {
            entries: 159,
            sectors: 20480
        }
    );
    assert_eq!(
        refused(|h| {
            h.in_use = IN_USE;
            h.flags = FLAG_CONVERTING;
        }),
        HeaderError::Converting
    );
}

#[test]
fn odd_headers_are_read_only() {
    assert_eq!(
        read_only(|h| h.cluster_sectors = 63),
        Some(HeaderError::ClusterSizeReadOnly(63))
    );
    assert_eq!(
        read_only(|h| h.entry_count = 319),
        Some(HeaderError::TooFewEntries {
            entries: 319,
            sectors: 20480
        })
    );
    assert_eq!(
        read_only(|h| h.first_block = 2),
        Some(HeaderError::FirstBlockInTable {
            first: 2,
            minimum: 3
        })
    );
    assert_eq!(
        read_only(|h| h.first_block = 65),
        Some(HeaderError::FirstBlockUnaligned {
            first: 65,
            cluster: 64
        })
    );
    assert_eq!(
        read_only(|h| h.first_block = 128),
        Some(HeaderError::FirstBlockPastEnd { first: 128 })
    );
    assert_eq!(
        read_only(|h| {
            h.magic = MAGIC_V1;
            h.first_block = 0;
        }),
        Some(HeaderError::FirstBlockMissing { first: 3 })
    );
    assert_eq!(
        read_only(|h| {
            h.entry_count = 0;
            h.size_in_sectors = 0;
        }),
        Some(HeaderError::Empty)
    );
}

#[test]
fn version_1_ignores_the_upper_half_of_its_size() {
    let mut raw = good();
    raw.magic = MAGIC_V1;
    raw.size_in_sectors |= 0xdead_beef << 32;
    let header = Header::validate(&raw, LEN).unwrap();
    assert_eq!(header.size().get(), 20480);
}

#[test]
fn only_the_in_use_value_is_in_use_and_only_v21_has_an_extension() {
    for (mark, in_use, extension) in [
        (0, false, false),
        (IN_USE, true, false),
        (CLOSED_V21, false, true),
        (0x3731_6470, false, false),
        (0x3232_6470, false, false),
        (1, false, false),
    ] {
        let mut raw = good();
        raw.in_use = mark;
        raw.extension = 64;
        let header = Header::validate(&raw, LEN).unwrap();
        assert_eq!(header.is_in_use(), in_use, "{mark:#x}");
        assert_eq!(header.extension().is_some(), extension, "{mark:#x}");
    }
}
