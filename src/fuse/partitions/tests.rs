//! Partition tables made by the crates, by hand, and by nobody.

use super::*;
use gpt::GptConfig;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types;
use proptest::prelude::*;

const MIB: usize = 1 << 20;

struct Image(Vec<u8>);

impl Bytes for Image {
    fn size(&self) -> u64 {
        crate::units::len_u64(self.0.len())
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        let bytes = self.0.get(at..at.saturating_add(buf.len()));
        buf.copy_from_slice(bytes.expect("reads stay inside the disk"));
        Ok(())
    }
}

/// Two partitions in a GPT, as the crate makes it.
fn gpt_image(block: LogicalBlockSize) -> Vec<u8> {
    let mut device = Cursor::new(vec![0; 8 * MIB]);
    ProtectiveMBR::with_lb_size(8 * 2048 - 1)
        .overwrite_lba0(&mut device)
        .unwrap();
    let mut table = GptConfig::new()
        .writable(true)
        .logical_block_size(block)
        .create_from_device(device, None)
        .unwrap();
    table
        .add_partition("one", MIB as u64, partition_types::LINUX_FS, 0, None)
        .unwrap();
    table
        .add_partition("two", MIB as u64, partition_types::EFI, 0, None)
        .unwrap();
    table.write().unwrap().into_inner()
}

fn check_gpt(found: &[Partition]) {
    let numbers: Vec<_> = found.iter().map(|p| (p.number, p.len)).collect();
    assert_eq!(numbers, [(1, MIB as u64), (2, MIB as u64)]);
    let Kind::Gpt { guid, name } = &found[0].kind else {
        panic!("{found:?}")
    };
    assert_eq!(
        (guid.as_str(), name.as_str()),
        ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", "one")
    );
    assert!(found[0].start + found[0].len <= found[1].start);
}

#[test]
fn gpt_partitions_are_found() {
    for block in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
        check_gpt(&scan(&Image(gpt_image(block))).unwrap());
    }
}

#[test]
fn a_damaged_gpt_is_read_from_its_backup() {
    let mut bytes = gpt_image(LogicalBlockSize::Lb512);
    bytes[512..1024].fill(0x5a);
    check_gpt(&scan(&Image(bytes.clone())).unwrap());
    let end = bytes.len();
    bytes[end - 512..].fill(0x5a);
    assert_eq!(scan(&Image(bytes)).unwrap(), []);
}

#[test]
fn a_gpt_without_its_guard_does_not_count() {
    let mut bytes = gpt_image(LogicalBlockSize::Lb512);
    bytes[..512].fill(0);
    assert_eq!(scan(&Image(bytes)).unwrap(), []);
}

/// CRC-32 as GPT has it, bit by bit.
fn sum(bytes: &[u8]) -> [u8; 4] {
    let mut sum = u32::MAX;
    for byte in bytes {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = (sum >> 1) ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    (!sum).to_le_bytes()
}

fn fix_header_sum(header: &mut [u8]) {
    header[16..20].fill(0);
    let sum = sum(&header[..92]);
    header[16..20].copy_from_slice(&sum);
}

#[test]
fn gpt_partitions_have_the_numbers_of_their_slots() {
    let mut bytes = gpt_image(LogicalBlockSize::Lb512);
    // The second entry moves to the last slot.
    let table = &mut bytes[1024..1024 + 128 * 128];
    table.copy_within(128..256, 127 * 128);
    table[128..256].fill(0);
    let table_sum = sum(table);
    bytes[512 + 88..512 + 92].copy_from_slice(&table_sum);
    fix_header_sum(&mut bytes[512..1024]);
    let numbers: Vec<_> = scan(&Image(bytes))
        .unwrap()
        .iter()
        .map(|p| p.number)
        .collect();
    assert_eq!(numbers, [1, 128]);
}

#[test]
fn gpt_headers_with_hostile_numbers_are_refused() {
    let good = gpt_image(LogicalBlockSize::Lb512);
    // Entries, their size, and where the table starts; sums are right, so only we can refuse.
    for (at, value) in [
        (80, u64::from(u32::MAX) | 128 << 32),
        (80, u64::from(u32::MAX) << 32 | 128),
        (80, 128 | 64 << 32),
        (80, 1025 | 128 << 32),
        (72, u64::MAX),
        (72, u64::MAX / 512),
        (72, 8 * 2048 - 1),
    ] {
        let mut bytes = good.clone();
        let end = bytes.len();
        bytes[end - 512..].fill(0);
        bytes[512 + at..512 + at + 8].copy_from_slice(&value.to_le_bytes());
        fix_header_sum(&mut bytes[512..1024]);
        assert_eq!(scan(&Image(bytes)).unwrap(), [], "{at} = {value:#x}");
    }
    let mut bytes = good;
    fix_header_sum(&mut bytes[512..1024]);
    check_gpt(&scan(&Image(bytes)).unwrap());
}

/// Writes entry `slot` of the table in `sector`, and the signature.
fn entry(bytes: &mut [u8], sector: usize, slot: usize, sys: u8, start: u32, len: u32) {
    let at = sector * 512 + 446 + slot * 16;
    bytes[at + 4] = sys;
    bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    bytes[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
    bytes[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

/// One primary partition and an extended one with two logical ones, an empty record between.
fn mbr_image() -> Vec<u8> {
    let mut bytes = vec![0; 4 * MIB];
    entry(&mut bytes, 0, 0, 0x83, 64, 100);
    entry(&mut bytes, 0, 2, 0x05, 1000, 4000);
    entry(&mut bytes, 1000, 0, 0x07, 8, 50);
    entry(&mut bytes, 1000, 1, 0x05, 500, 100);
    entry(&mut bytes, 1500, 1, 0x05, 700, 100);
    entry(&mut bytes, 1700, 0, 0x82, 2, 60);
    // Garbage in the entries that mean nothing.
    bytes[1700 * 512 + 478..1700 * 512 + 510].fill(0xff);
    bytes
}

fn places(found: &[Partition]) -> Vec<(u32, u64, u64)> {
    found
        .iter()
        .map(|p| (p.number, p.start / 512, p.len / 512))
        .collect()
}

#[test]
fn mbr_partitions_have_the_numbers_of_linux() {
    let found = scan(&Image(mbr_image())).unwrap();
    assert_eq!(places(&found), [(1, 64, 100), (5, 1008, 50), (6, 1702, 60)]);
    assert_eq!(found[1].kind, Kind::Mbr(7));
}

#[test]
fn chains_that_turn_back_or_leave_the_disk_end() {
    let mut bytes = mbr_image();
    entry(&mut bytes, 1700, 1, 0x05, 0, 100);
    assert_eq!(scan(&Image(bytes.clone())).unwrap().len(), 3);
    entry(&mut bytes, 1700, 1, 0x05, u32::MAX, u32::MAX);
    assert_eq!(scan(&Image(bytes.clone())).unwrap().len(), 3);
    entry(&mut bytes, 0, 2, 0x05, u32::MAX, u32::MAX);
    assert_eq!(scan(&Image(bytes)).unwrap().len(), 1);
}

#[test]
fn endless_chains_are_cut() {
    let mut bytes = vec![0; 4 * MIB];
    entry(&mut bytes, 0, 0, 0x0f, 100, 8000);
    for i in 0..8000_u32 {
        entry(&mut bytes, 100 + i as usize, 0, 0x83, 0, 1);
        entry(&mut bytes, 100 + i as usize, 1, 0x05, i + 1, 1);
    }
    assert_eq!(scan(&Image(bytes)).unwrap().len(), PARTITIONS_MAX);
}

#[test]
fn ranges_are_cut_at_the_end_of_the_disk() {
    let mut bytes = vec![0; MIB];
    entry(&mut bytes, 0, 0, 0x83, 2047, 2);
    entry(&mut bytes, 0, 1, 0x83, 2048, 1);
    entry(&mut bytes, 0, 2, 0x83, u32::MAX, u32::MAX);
    entry(&mut bytes, 0, 3, 0x83, 1, 0);
    assert_eq!(places(&scan(&Image(bytes)).unwrap()), [(1, 2047, 1)]);
}

#[test]
fn disks_without_a_table_have_no_partitions() {
    for len in [0, 1, 511, 512, 513, 1024, 4096, MIB] {
        for byte in [0, 0xff, 0x55] {
            assert_eq!(
                scan(&Image(vec![byte; len])).unwrap(),
                [],
                "{len} bytes of {byte:#x}"
            );
        }
    }
}

proptest! {
    #[test]
    fn garbage_never_panics(
        guard in any::<bool>(),
        sectors in 1_usize..64,
        seed in proptest::collection::vec(any::<u8>(), 512..4096),
        pokes in proptest::collection::vec(
            (0_usize..32, 0_usize..4, any::<u8>(), 0_u32..70, any::<u32>()),
            0..40,
        ),
    ) {
        let mut bytes: Vec<u8> = seed.iter().copied().cycle().take(sectors * 512).collect();
        for (sector, slot, sys, start, len) in pokes {
            let sector = sector % sectors;
            for each in 0..4 {
                bytes[sector * 512 + 446 + each * 16] &= 0x80;
            }
            entry(&mut bytes, sector, slot, sys, start, len);
        }
        if guard && sectors > 34 {
            entry(&mut bytes, 0, 0, GPT_GUARD, 1, 1);
            bytes[512..520].copy_from_slice(b"EFI PART");
            bytes[512 + 80..512 + 88].copy_from_slice(&[4, 0, 0, 0, 128, 0, 0, 0]);
            bytes[512 + 72..512 + 80].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
            fix_header_sum(&mut bytes[512..1024]);
        }
        let size = crate::units::len_u64(bytes.len());
        let found = scan(&Image(bytes)).unwrap();
        prop_assert!(found.len() <= PARTITIONS_MAX);
        for part in found {
            prop_assert!(part.len > 0 && part.start + part.len <= size);
        }
    }
}
