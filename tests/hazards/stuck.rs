//! One request is stuck in the host: who has nothing to do with it goes on.

use crate::caller::{
    Answer, check_files, flush, image, open, read, read_all, start_write, tiny, wait, write,
};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::odd::OddDisk;
use ploopfs::disk::{Disk, DiskOptions};
use ploopfs::error::Result;
use ploopfs::units::DiskOffset;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

const CLUSTER: u64 = 4096;

/// A plain base under an image that maps nothing.
fn over_plain(clusters: u64) -> BundleSpec {
    let base = Level::Plain {
        seed: 5,
        level: 0,
        bytes: clusters * CLUSTER,
    };
    BundleSpec::new(Style::Ploop, vec![base, image(2, 8, clusters * 8, 0)])
}

/// No flush but those that are asked for.
fn quiet(pool_threads: usize) -> DiskOptions {
    DiskOptions {
        pool_threads,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    }
}

fn is_waiting<T>(answer: &Receiver<T>) -> bool {
    matches!(answer.try_recv(), Err(TryRecvError::Empty))
}

fn start_zero(disk: &Arc<Disk>, at: u64, len: u64) -> Receiver<Result<()>> {
    let (sender, receiver) = channel();
    disk.zero(DiskOffset::new(at), len, Answer(sender));
    receiver
}

/// Runs what a session thread does; it may not be held up there.
fn on_a_session_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(work()));
    wait(&receiver, "a session thread")
}

#[test]
fn a_stuck_copy_holds_up_only_who_writes_to_its_cluster() {
    let odd = OddDisk::new(&over_plain(1024), &quiet(2));
    let mut expected = odd.bytes.clone();
    write(&odd.disk, 0, &[1; 4096]).expect("the mark is set");
    expected[..4096].fill(1);
    odd.manner.copies.shut_after(0);
    let at = 7 * CLUSTER;
    let slow = start_write(&odd.disk, at + 512, &[2; 512]);
    odd.manner.copies.wait_for_one();
    let disk = Arc::clone(&odd.disk);
    let others: Vec<_> = on_a_session_thread(move || {
        let places = (0..8_u64).filter(|sector| *sector != 1);
        let first = places.map(|sector| start_write(&disk, at + sector * 512, &[3; 512]));
        // The eighth writes again what the slow one does.
        let eighth = start_write(&disk, at + 512, &[4; 512]);
        first.chain([eighth]).collect()
    });
    let disk = Arc::clone(&odd.disk);
    let (before, after) = on_a_session_thread(move || {
        let mut buf = vec![0; 1 << 20];
        for _ in 0..50 {
            read(&disk, 0, CLUSTER, &mut buf);
            read(&disk, at, CLUSTER, &mut buf);
            // Too large for the session thread: it needs one of the pool's two.
            read(&disk, 1 << 20, 1 << 20, &mut buf);
        }
        write(&disk, 0, &[5; 4096]).expect("it is in place");
        (
            read(&disk, at, CLUSTER, &mut buf),
            read(&disk, 0, CLUSTER, &mut buf),
        )
    });
    let at = at as usize;
    assert!(before == expected[at..at + 4096], "not the old content");
    assert_eq!(after, [5; 4096]);
    assert!(is_waiting(&slow) && others.iter().all(is_waiting));
    odd.manner.copies.open();
    wait(&slow, "the slow write").expect("it is written");
    for other in &others {
        wait(other, "a write behind it").expect("it is written");
    }
    expected[..4096].fill(5);
    expected[at..at + 4096].fill(3);
    let found = read_all(&odd.disk);
    let twice = found[at + 512];
    assert!(twice == 2 || twice == 4, "{twice}");
    expected[at + 512..at + 1024].fill(twice);
    assert!(found == expected, "something else was changed");
    odd.disk.close().expect("it closes");
}

#[test]
fn flushes_that_wait_leave_the_pool_to_others() {
    let odd = OddDisk::new(&over_plain(1024), &quiet(2));
    write(&odd.disk, 0, &[1; 4096]).expect("it is written");
    odd.manner.syncs.shut_after(0);
    let disk = Arc::clone(&odd.disk);
    let flushes: Vec<_> = on_a_session_thread(move || {
        let flush = |_| {
            let (sender, receiver) = channel::<Result<()>>();
            disk.flush(Answer(sender));
            receiver
        };
        (0..16).map(flush).collect()
    });
    odd.manner.syncs.wait_for_one();
    let (disk, expected) = (Arc::clone(&odd.disk), odd.bytes.clone());
    on_a_session_thread(move || {
        let mut buf = vec![0; 1 << 20];
        for round in 0..20 {
            let found = read(&disk, 1 << 20, 1 << 20, &mut buf);
            assert!(found == expected[1 << 20..2 << 20], "foreign bytes");
            // Clusters that are there, and new ones.
            write(&disk, round * CLUSTER, &[2; 4096]).expect("it is written");
        }
    });
    assert!(flushes.iter().all(is_waiting));
    odd.manner.syncs.open();
    for answer in &flushes {
        wait(answer, "a flush").expect("it is durable");
    }
    let rounds = odd.disk.stats().flush_rounds;
    assert!(rounds <= 3, "{rounds} rounds for flushes that came at once");
    odd.disk.close().expect("it closes");
}

#[test]
fn zeroing_a_large_range_takes_little_at_a_time() {
    const CLUSTERS: u64 = 4000;
    let odd = OddDisk::new(&over_plain(CLUSTERS + 300), &quiet(2));
    write(&odd.disk, 0, &[1; 4096]).expect("the mark is set");
    odd.manner.zeros.shut_after(800);
    let zeroed = start_zero(&odd.disk, 0, CLUSTERS * CLUSTER);
    odd.manner.zeros.wait_for_one();
    let disk = Arc::clone(&odd.disk);
    let (start, beyond) = (CLUSTERS * CLUSTER, CLUSTERS as usize * 4096);
    let expected = odd.bytes.clone();
    on_a_session_thread(move || {
        let mut buf = vec![0; 1 << 20];
        let found = read(&disk, start, 1 << 20, &mut buf);
        assert!(
            found == expected[beyond..beyond + (1 << 20)],
            "foreign bytes"
        );
        assert_eq!(read(&disk, 16 * CLUSTER, CLUSTER, &mut buf), [0; 4096]);
        write(&disk, start, &[6; 4096]).expect("behind the range");
        write(&disk, 512, &[0; 512]).expect("in what is done");
        // Nothing is taken yet of what comes much later.
        for ahead in [1200, 2000, CLUSTERS - 1] {
            write(&disk, ahead * CLUSTER + 512, &[7; 512]).expect("in what is yet to be done");
        }
        flush(&disk).expect("a flush goes through");
    });
    assert!(is_waiting(&zeroed));
    odd.manner.zeros.open();
    wait(&zeroed, "the range").expect("it is zeroed");
    let found = read_all(&odd.disk);
    let mut expected = odd.bytes.clone();
    expected[..beyond].fill(0);
    expected[beyond..beyond + 4096].fill(6);
    assert!(found == expected, "not zeros, or more than the range");
    odd.disk.close().expect("it closes");
    let again = open(&odd.dir, &quiet(1));
    assert!(read_all(&again) == expected, "the files say something else");
    again.close().expect("it closes");
}

#[test]
fn a_long_zero_range_lets_others_have_the_only_thread() {
    let odd = OddDisk::new(&over_plain(4000), &quiet(1));
    write(&odd.disk, 0, &[1; 4096]).expect("the mark is set");
    odd.manner.zeros.shut_after(0);
    let zeroed = start_zero(&odd.disk, 0, 4000 * CLUSTER);
    odd.manner.zeros.wait_for_one();
    // Handed in while the first step is under way, so it comes after that turn.
    let (sender, large) = channel();
    let mut buf = vec![0; 1 << 20];
    let (disk, at) = (Arc::clone(&odd.disk), DiskOffset::new(8 << 20));
    disk.read(at, 1 << 20, &mut buf, Answer(sender));
    let small = start_write(&odd.disk, 3900 * CLUSTER, &[9; 512]);
    // 64 steps of 8 clusters are a turn: in the second one it stops again.
    odd.manner.zeros.shut_after(700);
    wait(&large, "a read between two turns").expect("it is read");
    wait(&small, "a write between two turns").expect("it is written");
    assert!(is_waiting(&zeroed));
    odd.manner.zeros.open();
    wait(&zeroed, "the range").expect("it is zeroed");
    assert!(read_all(&odd.disk).iter().all(|byte| *byte == 0));
    odd.disk.close().expect("it closes");
}

/// Sixteen levels and three pages of the map, of which one may stay: requests that took each
/// other's pages away for ever would end the test by its patience.
#[test]
fn one_page_for_many_clients_and_levels_is_enough() {
    let levels = (0..16).map(|_| image(2, 8, 18_001, 8)).collect();
    let spec = BundleSpec::new(Style::Ploop, levels);
    crate::stress::run("sixteen levels, one page", &spec, &tiny(2, 6), 8, 60);
}

#[test]
fn files_of_a_stuck_disk_are_sound() {
    let spec = over_plain(64);
    let odd = OddDisk::new(&spec, &quiet(2));
    odd.manner.copies.shut_after(0);
    let stuck = start_write(&odd.disk, 512, &[2; 512]);
    odd.manner.copies.wait_for_one();
    // What is not published is in no flush.
    flush(&odd.disk).expect("a flush does not wait for it");
    let top = odd.files.last().expect("a top");
    let shows = crate::forge::reader::Flat::open(&odd.dir).expect("the reader opens");
    let bytes = shows.read(0, odd.bytes.len()).expect("the reader reads");
    assert!(
        bytes == odd.bytes,
        "{} shows a half-made cluster",
        top.display()
    );
    odd.manner.copies.open();
    wait(&stuck, "the write").expect("it is written");
    odd.disk.close().expect("it closes");
    check_files("stuck", &spec, &odd.dir);
}
