//! Any bytes as a format extension behind a good header: no panic, and every cluster that an
//! accepted one occupies is a whole data cluster of the file, named once.
//!
//! README.md says how to run it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ploopfs::format::extension;
use ploopfs::format::header::{CLOSED_V21, Header, MAGIC_V2, RawHeader, TYPE};
use ploopfs::units::FileOffset;
use std::collections::BTreeSet;

/// Bytes of the checksum, which covers everything behind it.
const CHECKSUM: std::ops::Range<usize> = 8..24;

/// A 16 MiB disk of 4 KiB clusters whose extension is the file's last cluster.
fn header(file_clusters: u64) -> Option<Header> {
    let raw = RawHeader {
        magic: MAGIC_V2,
        disk_type: TYPE,
        heads: 16,
        cylinders: 64,
        cluster_sectors: 8,
        entry_count: 4096,
        size_in_sectors: 32768,
        in_use: CLOSED_V21,
        first_block: 40,
        flags: 0,
        extension: (file_clusters - 1) * 8,
    };
    Header::validate(&raw, FileOffset::new(file_clusters * 4096)).ok()
}

fuzz_target!(|data: &[u8]| {
    let file_clusters = 40;
    let len = FileOffset::new(file_clusters * 4096);
    let header = header(file_clusters).expect("the numbers above fit together");
    assert_eq!(
        extension::locate(&header, len),
        Ok(Some(FileOffset::new((file_clusters - 1) * 4096)))
    );
    let mut cluster = vec![0; 4096];
    for (to, from) in cluster.iter_mut().zip(data) {
        *to = *from;
    }
    // A right checksum, or nothing behind it would ever be read.
    let checksum = md5::compute(&cluster[CHECKSUM.end..]).0;
    cluster[CHECKSUM].copy_from_slice(&checksum);
    if let Ok(found) = extension::parse(&cluster, &header, len) {
        let places: BTreeSet<u64> = found.clusters.iter().map(|at| at.get()).collect();
        assert_eq!(places.len(), found.clusters.len());
        assert!(
            places
                .iter()
                .all(|at| at % 8 == 0 && (40..40 * 8).contains(at))
        );
    }
});
