//! Images that lie about themselves.

use crate::caller::{fast_dir, number, seed};
use crate::forge::content::{mix, splitmix};
use crate::forge::image::{ImageSpec, Mapped};
use crate::forge::reader;
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, DiskOptions, EnospcPolicy};
use ploopfs::error::Result;
use ploopfs::units::DiskOffset;
use std::path::Path;
use std::sync::Arc;

/// Numbers at which arithmetic goes wrong, if it does.
const EDGES: [u64; 16] = [
    0,
    1,
    7,
    63,
    64,
    65,
    4096,
    131_072,
    131_080,
    4_186_127,
    (1 << 29) - 1,
    1 << 31,
    u32::MAX as u64 - 15,
    u32::MAX as u64,
    (1 << 54) - 1,
    u64::MAX,
];

/// Spoils an image: fields of the header, entries, the length.
fn spoil(path: &Path, dice: &mut u64) {
    use std::os::unix::fs::FileExt;
    let mut below = |bound: usize| (splitmix(dice) % bound as u64) as usize;
    let file = std::fs::File::options()
        .write(true)
        .open(path)
        .expect("the image opens");
    for _ in 0..1 + below(3) {
        let edge = EDGES[below(EDGES.len())]
            .wrapping_add(below(3) as u64)
            .wrapping_sub(1);
        let (at, width) = match below(9) {
            0 => (28, 4),
            1 => (32, 4),
            2 => (36, 8),
            3 => (44, 4),
            4 => (48, 4),
            5 => (52, 4),
            6 => (56, 8),
            _ => (64 + 4 * below(40) as u64, 4),
        };
        let bytes = match below(3) {
            0 => (below(200) as u64).to_le_bytes(),
            _ => edge.to_le_bytes(),
        };
        file.write_all_at(&bytes[..width], at).expect("a write");
    }
    let lengths = [
        0,
        1,
        63,
        64,
        65,
        4096,
        70_000,
        (1 << 32) + 5,
        1 << 40,
        (1 << 42) + 12345,
    ];
    if below(2) == 0 {
        file.set_len(lengths[below(lengths.len())])
            .expect("a length");
    }
}

/// Whatever an image says, its disk answers: bytes or an error, never a panic or a latch.
fn provoke(path: &Path, read_only: bool, dice: &mut u64) -> Result<()> {
    let selection = Selection {
        write: !read_only,
        ..Selection::default()
    };
    let options = DiskOptions {
        read_only,
        bat_cache: 1,
        pool_threads: 1,
        grow_step: 1,
        enospc: EnospcPolicy::Fail,
        ..DiskOptions::default()
    };
    let images = bundle::open(path, &selection)?;
    let (disk, _) = disk::open(Arc::new(images), &options)?;
    let size = disk.size_bytes();
    let cluster = disk.cluster_bytes();
    let mut buf = vec![0; 40_000];
    for _ in 0..12 {
        let len = (splitmix(dice) % buf.len() as u64).min(size);
        let at = match splitmix(dice) % 4 {
            0 => size - len,
            1 => splitmix(dice) % (size - len + 1),
            _ => (splitmix(dice) % 40 * cluster).min(size - len),
        };
        let at = DiskOffset::new(at);
        let bytes = &mut buf[..len as usize];
        match splitmix(dice) % 6 {
            0..3 => drop(disk.read_at(at, bytes)),
            3 => drop((disk.seek_data(at), disk.seek_hole(at))),
            4 => drop(disk.write_at(at, bytes)),
            _ => drop(disk.zero_at(at, (3 * cluster).min(size - at.get()).min(1 << 30))),
        }
        assert_eq!(disk.stats().latched, None);
    }
    disk.close()
}

#[test]
fn spoilt_images_are_answered_with_errors() {
    let home = fast_dir();
    let path = home.path().join("disk.hds");
    let (mut opened, mut written) = (0, 0);
    let times = 200 * number("PLOOPFS_TIMES").unwrap_or(1);
    for round in 0..times {
        let mut dice = mix(&[seed(), round, 8]);
        let version = 1 + (round % 2) as u8;
        let cluster = [8, 64, 63, 128][(splitmix(&mut dice) % 4) as usize];
        let percent = splitmix(&mut dice) % 101;
        let sectors = 1 + splitmix(&mut dice) % 3000;
        let _ = std::fs::remove_file(&path);
        ImageSpec::new(version, cluster, sectors)
            .mapping(Mapped::Percent(percent))
            .write(&path)
            .expect("an image");
        spoil(&path, &mut dice);
        let story = |what: &str| format!("{what} in round {round}, seed {}", seed());
        for read_only in [true, false] {
            let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                provoke(&path, read_only, &mut dice)
            }));
            let tried = tried.unwrap_or_else(|_| panic!("{}", story("a panic")));
            opened += u64::from(tried.is_ok());
            written += u64::from(tried.is_ok() && !read_only);
            if tried.is_ok() && !read_only {
                let mut faults = reader::check(&path).expect("runs");
                // Harmless, and left alone in an image that was closed.
                faults.retain(|fault| !fault.contains("after the last entry"));
                assert!(faults.is_empty(), "{}: {faults:?}", story("faults"));
            }
        }
    }
    println!(
        "{opened} of {} opens went through, {written} of them for writing",
        2 * times
    );
    assert!(opened > times / 10 && written > times / 20);
}
