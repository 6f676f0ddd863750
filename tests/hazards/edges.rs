//! Files cut behind the disk's back, holes in lower files, full hosts and the last cluster that an
//! entry can name.

use crate::caller::{
    Answer, chain, fast_dir, flush, image, open, read, read_all, start_write, tiny, wait, write,
};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::{ImageSpec, Mapped};
use crate::odd::OddDisk;
use ploopfs::disk::{Disk, DiskOptions, EnospcPolicy};
use ploopfs::error::{ErrorKind, Result};
use ploopfs::units::DiskOffset;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const CLUSTER: u64 = 4096;

fn quiet(enospc: EnospcPolicy) -> DiskOptions {
    DiskOptions {
        pool_threads: 2,
        flush_interval_ms: 0,
        enospc,
        ..DiskOptions::default()
    }
}

/// A read as the kernel's, which may fail.
fn try_read(disk: &Arc<Disk>, at: u64, len: usize) -> Result<Vec<u8>> {
    let (sender, receiver) = channel();
    let mut buf = vec![0; len];
    disk.read(DiskOffset::new(at), len, &mut buf, Answer(sender));
    wait(&receiver, "read")
}

fn plain(bytes: u64) -> Level {
    Level::Plain {
        seed: 5,
        level: 0,
        bytes,
    }
}

#[test]
fn a_base_that_is_cut_while_it_is_served_is_an_error_and_not_zeros() {
    const CLUSTERS: u64 = 600;
    let spec = BundleSpec::new(
        Style::Ploop,
        vec![plain(CLUSTERS * CLUSTER), image(2, 8, CLUSTERS * 8, 0)],
    );
    let odd = OddDisk::new(&spec, &quiet(EnospcPolicy::Fail));
    write(&odd.disk, 500 * CLUSTER, &[1; 4096]).expect("it is written");
    let end = 300 * CLUSTER + 1000;
    odd.cut(0, end);
    let before = try_read(&odd.disk, 0, 300 * 4096).expect("it is there yet");
    assert!(before == odd.bytes[..300 * 4096]);
    // Small and large, across the end and behind it.
    for (at, len) in [
        (300 * CLUSTER, 4096),
        (299 * CLUSTER, 3 * 4096),
        (400 * CLUSTER, 512),
        (100 * CLUSTER, 400 * 4096),
    ] {
        let error = try_read(&odd.disk, at, len).expect_err("bytes are missing");
        assert_eq!(error.kind(), ErrorKind::Truncated, "{at}: {error}");
    }
    // A copy of what is missing would be zeros for ever.
    for at in [300 * CLUSTER + 2048, 400 * CLUSTER + 512] {
        let error = write(&odd.disk, at, &[2; 512]).expect_err("there is nothing to copy");
        assert_eq!(error.kind(), ErrorKind::Truncated, "{at}: {error}");
        try_read(&odd.disk, at / CLUSTER * CLUSTER, 4096).expect_err("nothing was published");
    }
    // What needs nothing of it goes on.
    write(&odd.disk, 400 * CLUSTER, &[3; 4096]).expect("a whole cluster");
    assert_eq!(
        try_read(&odd.disk, 400 * CLUSTER, 4096).expect("it reads"),
        [3; 4096]
    );
    assert_eq!(
        try_read(&odd.disk, 500 * CLUSTER, 4096).expect("it reads"),
        [1; 4096]
    );
    flush(&odd.disk).expect("it is durable");
    assert_eq!(odd.disk.stats().latched, None);
    odd.disk.close().expect("it closes");
}

#[test]
fn a_base_of_odd_length_ends_in_zeros() {
    let len = 299 * CLUSTER + 1000;
    let spec = BundleSpec::new(Style::Ploop, vec![plain(len), image(2, 8, 2401, 0)]);
    let odd = OddDisk::new(&spec, &quiet(EnospcPolicy::Fail));
    let mut expected = odd.bytes.clone();
    assert!(expected[len as usize..].iter().all(|byte| *byte == 0));
    assert!(read_all(&odd.disk) == expected);
    // Of the last cluster of the base, a part is copied, and the rest is zeros.
    for at in [299 * CLUSTER + 2048, 300 * CLUSTER] {
        write(&odd.disk, at, &[4; 512]).expect("it is written");
        expected[at as usize..at as usize + 512].fill(4);
    }
    assert!(read_all(&odd.disk) == expected, "the copy differs");
    odd.disk.close().expect("it closes");
}

/// A cluster that a level maps hides what is below it, also where its file has a hole.
#[test]
fn a_hole_in_a_lower_file_is_zeros_and_stays_zeros() {
    const CLUSTERS: u64 = 200;
    let mut sparse =
        ImageSpec::new(2, 8, CLUSTERS * 8).mapping(Mapped::Every { step: 2, phase: 0 });
    sparse.no_data = true;
    let levels = vec![
        plain(CLUSTERS * CLUSTER),
        Level::Image(sparse),
        image(2, 8, CLUSTERS * 8, 0),
    ];
    let odd = OddDisk::new(&BundleSpec::new(Style::Ploop, levels), &tiny(1, 6));
    // One of them holds a sector, so that data and holes are next to each other.
    let file = std::fs::File::options().write(true).open(&odd.files[1]);
    let file = file.expect("the lower file opens");
    let tail = file.metadata().expect("it is there").len() - CLUSTER;
    file.write_all_at(&[8; 512], tail + 1024)
        .expect("it is written");
    let mut expected = odd.bytes.clone();
    for cluster in (0..CLUSTERS as usize).step_by(2) {
        expected[cluster * 4096..][..4096].fill(0);
    }
    let last = (CLUSTERS as usize - 2) * 4096;
    expected[last + 1024..][..512].fill(8);
    assert!(
        read_all(&odd.disk) == expected,
        "a hole shows what is below it"
    );
    for cluster in [0, 1, 2, 99, 100, CLUSTERS - 2] {
        let at = cluster * CLUSTER + 3072;
        write(&odd.disk, at, &[9; 512]).expect("it is written");
        expected[at as usize..][..512].fill(9);
    }
    assert!(
        read_all(&odd.disk) == expected,
        "a copy shows what is below"
    );
    odd.disk.close().expect("it closes");
    let again = open(&odd.dir, &tiny(1, 6));
    assert!(read_all(&again) == expected, "the files say something else");
    again.close().expect("it closes");
}

fn two_clusters() -> BundleSpec {
    let top = ImageSpec::new(2, 8, 512).mapping(Mapped::List(vec![0, 1]));
    BundleSpec::new(Style::Parallels, vec![Level::Image(top)])
}

/// Copy-on-write hosts, holes and shared blocks: a write to what the image has already needs space.
#[test]
fn a_write_in_place_without_space_fails_or_waits_and_latches_nothing() {
    let odd = OddDisk::new(&two_clusters(), &quiet(EnospcPolicy::Fail));
    write(&odd.disk, CLUSTER, &[1; 512]).expect("the mark is set");
    // Tried where it arrives, and again in the pool.
    odd.manner.fill(CLUSTER..u64::MAX, 2);
    let error = write(&odd.disk, 0, &[2; 4096]).expect_err("the host is full");
    assert!(error.is_no_space(), "{error}");
    assert_eq!(
        (odd.manner.left_to_fail(), odd.disk.stats().latched),
        (0, None)
    );
    assert_eq!(
        read_all(&odd.disk)[..4096],
        odd.bytes[..4096],
        "half a write"
    );
    write(&odd.disk, 0, &[3; 4096]).expect("there is space again");
    flush(&odd.disk).expect("it is durable");
    odd.disk.close().expect("it closes");

    let odd = OddDisk::new(&two_clusters(), &quiet(EnospcPolicy::Seconds(50)));
    write(&odd.disk, CLUSTER, &[1; 512]).expect("the mark is set");
    odd.manner.fill(CLUSTER..u64::MAX, 3);
    let waiting = start_write(&odd.disk, 0, &[2; 4096]);
    let mut buf = [0; 4096];
    assert_eq!(
        read(&odd.disk, CLUSTER, 512, &mut buf),
        [1; 512],
        "reads go on"
    );
    wait(&waiting, "the write").expect("it waits until there is space");
    assert_eq!(odd.manner.left_to_fail(), 0);
    assert_eq!(read(&odd.disk, 0, CLUSTER, &mut buf), [2; 4096]);
    assert_eq!(
        (odd.disk.stats().latched, odd.disk.stats().waiting_for_space),
        (None, 0)
    );
    odd.disk.close().expect("it closes");
}

#[test]
fn a_page_of_the_table_without_space_is_written_again() {
    let odd = OddDisk::new(&two_clusters(), &quiet(EnospcPolicy::Seconds(50)));
    write(&odd.disk, 5 * CLUSTER, &[5; 4096]).expect("it is written");
    odd.manner.fill(0..CLUSTER, 2);
    flush(&odd.disk).expect("the page is written in the end");
    assert_eq!(
        (odd.manner.left_to_fail(), odd.disk.stats().latched),
        (0, None)
    );
    write(&odd.disk, 6 * CLUSTER, &[6; 4096]).expect("it is written");
    odd.disk.close().expect("it closes");
    let again = open(&odd.dir, &tiny(1, 6));
    let bytes = read_all(&again);
    assert!(bytes[5 * 4096..6 * 4096].iter().all(|byte| *byte == 5));
    assert!(bytes[6 * 4096..7 * 4096].iter().all(|byte| *byte == 6));
    again.close().expect("it closes");
}

/// Bytes, or an error that says that the file is not what it was.
fn expect_told(result: &Result<Vec<u8>>, expected: &[u8], changed: Option<u8>) -> bool {
    let kinds = [ErrorKind::Truncated, ErrorKind::Corrupt];
    match result {
        Ok(bytes) => {
            let is_known = |(found, old): (&u8, &u8)| found == old || Some(*found) == changed;
            assert!(bytes.iter().zip(expected).all(is_known), "foreign bytes");
            true
        }
        Err(error) => {
            assert!(kinds.contains(&error.kind()), "{error}");
            false
        }
    }
}

#[test]
fn a_top_that_is_cut_under_load_gives_errors_and_no_zeros() {
    let top = ImageSpec::new(2, 8, 18_001).mapping(Mapped::All);
    let spec = BundleSpec::new(Style::Ploop, vec![Level::Image(top)]);
    let odd = OddDisk::new(&spec, &tiny(2, 6));
    let clusters = odd.disk.size_bytes() / CLUSTER;
    let stop = Arc::new(AtomicBool::new(false));
    let failed = Arc::new(AtomicU64::new(0));
    let work = |worker: u64| {
        let (disk, bytes) = (Arc::clone(&odd.disk), odd.bytes.clone());
        let (stop, failed) = (Arc::clone(&stop), Arc::clone(&failed));
        std::thread::spawn(move || {
            let mut step = worker * 601;
            while !stop.load(Ordering::SeqCst) {
                step += 7;
                let at = step % clusters * CLUSTER;
                let found = try_read(&disk, at, 4096);
                let expected = &bytes[at as usize..][..4096];
                let is_told = !expect_told(&found, expected, Some(0xee));
                failed.fetch_add(u64::from(is_told), Ordering::SeqCst);
                // A write behind the end would make the file longer again.
                let low = step % 300 * CLUSTER;
                write(&disk, low, &[0xee; 512]).expect("it is still there");
            }
        })
    };
    let workers: Vec<_> = (0..4).map(work).collect();
    std::thread::sleep(Duration::from_millis(50));
    odd.cut(0, 400 * CLUSTER);
    let begun = Instant::now();
    while failed.load(Ordering::SeqCst) <= 100 && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    stop.store(true, Ordering::SeqCst);
    for worker in workers {
        worker.join().expect("no panic");
    }
    let failed = failed.load(Ordering::SeqCst);
    assert!(failed > 100, "{failed} reads noticed");
    // A page that is loaded now is held against the length that the file has now.
    let last = try_read(&odd.disk, (clusters - 1) * CLUSTER, 4096);
    last.expect_err("the file ends long before it");
    flush(&odd.disk).expect("nothing of it was lost");
    assert_eq!(odd.disk.stats().latched, None);
    odd.disk.close().expect("it ends");
}

/// Entries of version 1 are sectors of 32 bits: no cluster begins at 2 TiB or later.
#[test]
fn the_last_cluster_of_two_tebibytes_is_used_and_the_next_is_none() {
    const BIG: u64 = 1 << 20;
    const ALL: u64 = 1 << 21;
    let home = fast_dir();
    let path = home.path().join("disk.hds");
    let mut spec = ImageSpec::new(1, 2048, u64::from(u32::MAX));
    spec.no_data = true;
    // The table takes 9 clusters, so 9 disk clusters can have no place; one place is left.
    spec.mapped = Mapped::List((0..ALL - 10).collect());
    if let Err(why) = spec.write(&path) {
        assert!(std::env::var_os("CI").is_none(), "no file of 2 TiB: {why}");
        println!("skipped: no file of 2 TiB here: {why}");
        return;
    }
    let disk = open(&path, &quiet(EnospcPolicy::Fail));
    let at = (ALL - 10) * BIG;
    write(&disk, at + 512, &[7; 512]).expect("the last cluster");
    for cluster in [ALL - 9, ALL - 1, ALL - 9] {
        let error = write(&disk, cluster * BIG, &[8; 512]).expect_err("no entry can name it");
        assert!(error.is_no_space(), "{error}");
    }
    flush(&disk).expect("it is durable");
    assert_eq!(disk.stats().latched, None);
    disk.close().expect("it closes");
    let len = std::fs::metadata(&path).expect("it is there").len();
    assert_eq!(len, 1 << 41);
    let mut entry = [0; 4];
    let file = std::fs::File::open(&path).expect("it opens");
    file.read_exact_at(&mut entry, 64 + 4 * (ALL - 10))
        .expect("the entry");
    assert_eq!(u64::from(u32::from_le_bytes(entry)), (1 << 32) - 2048);
    let disk = open(&path, &quiet(EnospcPolicy::Fail));
    let mut buf = [0; 2048];
    let found = read(&disk, at, 1536, &mut buf);
    assert_eq!(found[512..1024], [7; 512]);
    assert!(
        found[..512]
            .iter()
            .chain(&found[1024..])
            .all(|byte| *byte == 0)
    );
    assert_eq!(
        read(&disk, 0, 1024, &mut buf),
        [0; 1024],
        "the header was written over"
    );
    assert_eq!(read(&disk, (ALL - 9) * BIG, 1024, &mut buf), [0; 1024]);
    disk.close().expect("it closes");
}

/// A chain of several levels is cut in the middle of it: only what lies there is gone.
#[test]
fn a_lower_image_that_is_cut_is_an_error_where_it_is_needed() {
    let spec = chain();
    let odd = OddDisk::new(&spec, &tiny(1, 6));
    let len = std::fs::metadata(&odd.files[1]).expect("it is there").len();
    odd.cut(1, len / 2);
    let mut failed = 0;
    for (number, expected) in (0..).zip(odd.bytes.chunks(4096)) {
        let found = try_read(&odd.disk, number * CLUSTER, expected.len());
        failed += u64::from(!expect_told(&found, expected, None));
    }
    assert!(failed > 50, "only {failed} clusters are gone");
    odd.disk.close().expect("nothing was written");
}
