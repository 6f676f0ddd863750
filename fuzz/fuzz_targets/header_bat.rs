//! Any bytes as the start of an image: header, layout and BAT entries never panic, and what they
//! accept lies inside the file and outside the table.
//!
//! README.md says how to run it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ploopfs::format::header::{HEADER_LEN, Header, RawHeader};
use ploopfs::format::layout::Layout;
use ploopfs::units::{DiskCluster, FileOffset};

/// The input is a file of exactly these bytes, or, so that large files need no large inputs, one
/// that is longer by a power of two that its last byte gives.
fn file_len(data: &[u8]) -> FileOffset {
    let len = data.len() as u64;
    let extra = data.last().map_or(0, |byte| (1_u64 << (byte & 63)) >> 1);
    FileOffset::new(len.saturating_add(extra))
}

fn check_entry(layout: &Layout, entry: u32, len: FileOffset) {
    if entry == 0 || layout.check_entry(entry, len).is_err() {
        return;
    }
    let start = layout.entry_start(entry);
    assert!(start >= layout.table_end() && start >= layout.data_start());
    assert!(start.get() + layout.cluster().bytes() <= len.get());
    if let Ok(cluster) = layout.entry_cluster(entry) {
        assert_eq!(layout.entry_for(cluster), Some(entry));
        assert_eq!(layout.cluster().file_start(cluster), start);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some(bytes) = data.first_chunk::<HEADER_LEN>() else {
        return;
    };
    let raw = RawHeader::decode(bytes);
    assert_eq!(raw.encode(), *bytes);
    let len = file_len(data);
    let Ok(header) = Header::validate(&raw, len) else {
        return;
    };
    assert!(i64::try_from(header.size_bytes()).is_ok());
    let layout = header.layout();
    assert!(layout.table_end() <= len);
    if header.write_refusal().is_none() {
        let covered = u64::from(layout.entry_count()) * layout.cluster().sectors().get();
        assert!(layout.cluster().bytes() % 4096 == 0);
        assert!(covered >= header.size().get() && layout.data_start() >= layout.table_end());
    }
    for (i, word) in data[HEADER_LEN..].chunks_exact(4).enumerate() {
        let cluster = DiskCluster::new(i as u64);
        let (page, slot) = Layout::page_of(cluster);
        assert_eq!(Layout::cluster_of(page, slot), Some(cluster));
        let entry = u32::from_le_bytes(word.try_into().expect("chunks of four bytes"));
        check_entry(layout, entry, len);
    }
});
