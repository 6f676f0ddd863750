//! Any bytes as the start or the end of a disk: its partition table is read without a panic or an
//! endless walk, and every partition that is told of lies on the disk.
//!
//! README.md says how to run it.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::disk;
use ploopfs::fuse::partitions::{self, PARTITIONS_MAX};
use ploopfs::units::SectorCount;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use support::sparse::SparseFile;

/// Bytes of the input that say how long the disk is, and what is done to its bytes.
const CONTROL: usize = 4;

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, step)
}

/// Gives the header of a GPT at `at` the checksums that it should have, as far as it lies in the
/// disk: the fuzzer would not find them.
fn bless_gpt(file: &SparseFile, at: u64, block: u64) {
    let Some(mut header) = file.get(at, 92) else {
        return;
    };
    let le = |from: usize, len: usize| {
        let bytes = header[from..from + len].iter().rev();
        bytes.fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let len = le(80, 4).saturating_mul(le(84, 4)).min(1 << 17) as usize;
    let entries = le(72, 8)
        .checked_mul(block)
        .and_then(|at| file.get(at, len));
    if let Some(entries) = entries {
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    }
    header[16..20].fill(0);
    let own = crc32(&header);
    header[16..20].copy_from_slice(&own.to_le_bytes());
    file.put(at, &header);
}

fn check(file: SparseFile) {
    let size = file.size();
    let opened = OpenedFile {
        path: PathBuf::from("plain"),
        storage: Arc::new(file),
        plain: Plain::Yes,
        guid: None,
    };
    let part = OpenedPart {
        start: SectorCount::ZERO,
        end: None,
        blocksize: None,
        files: vec![opened],
    };
    let images = OpenedImages::from_parts(PathBuf::from("plain"), vec![part]);
    let options = support::options(true);
    let opened = disk::open_with(Arc::new(images), &options, support::resources());
    // Bytes that start with the magic of an image are taken for one, and refused.
    let Ok((disk, _)) = opened else { return };
    let found = partitions::list(&disk).expect("the disk can be read");
    assert!(found.len() <= PARTITIONS_MAX);
    let numbers: BTreeSet<u32> = found.iter().map(|partition| partition.number).collect();
    assert_eq!(
        numbers.len(),
        found.len(),
        "every partition has its own number"
    );
    for partition in &found {
        let end = partition.start.checked_add(partition.len);
        assert!(partition.len > 0 && end.is_some_and(|end| end <= size.next_multiple_of(512)));
    }
    disk.close().expect("nothing to do");
}

fuzz_target!(|data: &[u8]| {
    let Some((control, bytes)) = data.split_at_checked(CONTROL) else {
        return;
    };
    let len = (u64::from(control[0]) + 1) << (9 + control[1] % 40);
    let len = len + u64::from(control[2]);
    let file = SparseFile::new(bytes, len);
    let at_end = (bytes.len() as u64).min(len);
    if control[3] & 1 != 0 {
        file.put(len - at_end, &bytes[..at_end as usize]);
    }
    if control[3] & 2 != 0 && len >= 512 {
        file.put(510, &[0x55, 0xaa]);
    }
    for block in [512, 4096] {
        if control[3] & 4 != 0 {
            bless_gpt(&file, block, block);
        }
        if control[3] & 8 != 0 {
            bless_gpt(&file, (len / block).saturating_sub(1) * block, block);
        }
    }
    support::alone::run(|| check(file));
});
