//! Devices in memory, with one mark after the other.

use super::*;

/// A device in memory: zeros, and these bytes at these places.
struct Memory {
    len: u64,
    written: Vec<(u64, Vec<u8>)>,
}

impl Memory {
    fn new(len: u64) -> Self {
        let written = Vec::new();
        Self { len, written }
    }

    fn with(mut self, at: u64, bytes: &[u8]) -> Self {
        self.written.push((at, bytes.to_vec()));
        self
    }
}

impl Bytes for Memory {
    fn size(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        for (start, bytes) in &self.written {
            for (place, byte) in (*start..).zip(bytes) {
                let index = place.checked_sub(at).and_then(|n| usize::try_from(n).ok());
                if let Some(to) = index.and_then(|index| buf.get_mut(index)) {
                    *to = *byte;
                }
            }
        }
        Ok(())
    }
}

const MIB: u64 = 1 << 20;

fn fit(memory: &Memory) -> Fit {
    look(memory, &[]).unwrap().remove(0).fit
}

fn is_in_use(fit: &Fit) -> bool {
    matches!(fit, Fit::InUse(_))
}

fn is_never(fit: &Fit) -> bool {
    matches!(fit, Fit::Never(_))
}

/// A closed ext4 at a place.
fn ext(memory: Memory, at: u64) -> Memory {
    memory.with(at + 0x438, &[0x53, 0xef, 1, 0])
}

#[test]
fn ext_says_that_it_was_unmounted() {
    let closed = || ext(Memory::new(64 * MIB), 0);
    assert_eq!(fit(&closed()), Fit::Closed);
    assert!(is_in_use(&fit(&closed().with(0x460, &[4]))), "a journal");
    assert!(is_in_use(&fit(&closed().with(0x43a, &[0]))), "mounted");
    assert!(is_in_use(&fit(&closed().with(0x43a, &[3]))), "errors");
    assert!(is_in_use(&fit(&closed().with(0x466, &[1]))), "orphans");
    assert!(is_in_use(&fit(&closed().with(0x4e8, &[9]))), "an orphan");
    assert!(
        is_never(&fit(&closed().with(0x460, &[8]))),
        "a journal only"
    );
}

/// A number as XFS writes it.
fn big(number: u32) -> [u8; 4] {
    let mut bytes = number.to_le_bytes();
    bytes.reverse();
    bytes
}

/// XFS with a log of 64 blocks of 4 KiB in its second group.
fn xfs() -> Memory {
    let mut block = [0; 128];
    block[..4].copy_from_slice(b"XFSB");
    block[48..56].copy_from_slice(&[big(0), big(1 << 13 | 5)].concat());
    block[84..88].copy_from_slice(&big(8000));
    block[96..100].copy_from_slice(&big(64));
    block[120] = 12;
    block[124] = 13;
    Memory::new(64 * MIB).with(0, &block)
}

/// A record of a log with 512-byte blocks, and its first operation.
fn record(memory: Memory, cycle: u32, block: u32, operations: u32, flags: u8) -> Memory {
    let mut header = [0; 512];
    header[..4].copy_from_slice(&[0xfe, 0xed, 0xba, 0xbe]);
    header[8..12].copy_from_slice(&big(2));
    header[16..20].copy_from_slice(&big(cycle));
    header[20..24].copy_from_slice(&big(block));
    header[40..44].copy_from_slice(&big(operations));
    header[320..324].copy_from_slice(&big(32 << 10));
    let at = (8000 + 5) * 4096 + u64::from(block) * 512;
    let body = (u64::from(block) + 1) % 512 * 512 + (8000 + 5) * 4096;
    memory
        .with(at, &header)
        .with(body, &[0, 0, 0, 1, 0, 0, 0, 8, 0xaa, flags])
}

#[test]
fn the_newest_record_of_xfs_counts() {
    assert!(is_in_use(&fit(&xfs())), "no record at all");
    let closed = || record(xfs(), 1, 0, 1, 0x20);
    assert_eq!(fit(&closed()), Fit::Closed);
    assert!(is_in_use(&fit(&record(closed(), 1, 2, 3, 0x20))), "mounted");
    let again = record(record(closed(), 1, 2, 3, 1), 2, 511, 1, 0x20);
    assert_eq!(
        fit(&again),
        Fit::Closed,
        "unmounted; the body is at the beginning"
    );
    assert!(
        is_in_use(&fit(&record(again, 3, 1, 1, 0))),
        "the next cycle"
    );
    let outside = xfs().with(48, &[big(1 << 8), big(0)].concat());
    assert!(is_in_use(&fit(&outside)) || is_never(&fit(&outside)));
    assert!(is_never(&fit(&xfs().with(48, &[0; 8]))), "a log elsewhere");
    for shift in [64, 255] {
        let absurd = xfs().with(120, &[shift]).with(124, &[shift]);
        assert!(is_in_use(&fit(&absurd)));
    }
}

#[test]
fn others_have_their_own_marks() {
    let fat = || Memory::new(MIB).with(0x52, b"FAT32");
    assert_eq!(fit(&fat()), Fit::Closed);
    assert!(is_in_use(&fit(&fat().with(0x41, &[1]))));
    let exfat = || Memory::new(MIB).with(3, b"EXFAT   ");
    assert_eq!(fit(&exfat()), Fit::Closed);
    assert!(is_in_use(&fit(&exfat().with(106, &[2]))));
    let btrfs = || {
        let memory = Memory::new(MIB).with(0x1_0040, b"_BHRfS_M");
        memory.with(0x1_0088, &[1])
    };
    assert_eq!(fit(&btrfs()), Fit::Closed);
    assert!(is_in_use(&fit(&btrfs().with(0x1_0060, &[1]))));
    assert!(is_never(&fit(&btrfs().with(0x1_0088, &[2]))));
    assert!(is_in_use(&fit(&Memory::new(MIB).with(3, b"NTFS    "))));
    for (at, bytes, name, class) in SIGNATURES {
        if class != Class::FileSystem {
            assert!(is_never(&fit(&Memory::new(MIB).with(at, bytes))), "{name}");
        }
    }
    assert!(is_never(&fit(&Memory::new(MIB))), "nothing");
    assert!(is_never(&fit(&Memory::new(0))), "not even room");
    assert!(
        is_never(&fit(&Memory::new(0x43a).with(0x438, &[0x53, 0xef]))),
        "cut off"
    );
}

#[test]
fn a_member_of_an_array_is_no_file_system() {
    let magic = 0xa92b_4efc_u32.to_le_bytes();
    for (len, at) in [
        (64 * MIB, 64 * MIB - 0x1_0000),
        (64 * MIB, 64 * MIB - 0x2000),
        (64 * MIB + 512 * 3, 64 * MIB - 0x2000),
    ] {
        let member = ext(Memory::new(len), 0).with(at, &magic);
        assert!(is_never(&fit(&member)), "{len} {at}");
    }
}

#[test]
fn a_suspended_machine_has_everything_on_the_disk() {
    let disk = |mark: &[u8]| {
        let disk = ext(Memory::new(64 * MIB), MIB);
        disk.with(32 * MIB + 0xff6, mark)
    };
    let places = [(1, MIB, 16 * MIB), (2, 32 * MIB, 16 * MIB)];
    let found = look(&disk(b"SWAPSPACE2"), &places).unwrap();
    assert_eq!(found[0].fit, Fit::Closed);
    assert!(is_never(&found[1].fit));
    let found = look(&disk(b"S1SUSPEND\0"), &places).unwrap();
    assert!(is_in_use(&found[0].fit), "{found:?}");
}

#[test]
fn what_contradicts_itself_is_not_touched() {
    let disk = || ext(Memory::new(64 * MIB), MIB);
    let two = [(1, MIB, 16 * MIB), (2, 8 * MIB, 16 * MIB)];
    let found = look(&disk(), &two).unwrap();
    assert!(found.iter().all(|one| is_never(&one.fit)), "{found:?}");
    let found = look(&ext(disk(), 0), &two[..1]).unwrap();
    assert!(is_in_use(&found[0].fit), "{found:?}");
    assert_eq!(
        found.len(),
        1,
        "the whole disk is none where there are partitions"
    );
}
