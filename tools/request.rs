//! What a request costs inside the program: pin, look-up, plan, count, reply, without a kernel.
//!
//! `cargo bench --bench request`. A read of a hole is all of that and a `memset` of 512 bytes. A
//! read of 4 KiB that is mapped has a pread(2) of the page cache besides, which is measured alone
//! for comparison: the difference is what the program itself costs. The transport's part, from the
//! kernel's bytes to the call and from the answer to the kernel's bytes, is not in it.
//!
//! What counts is the processor time of the thread: what else runs on the machine does not.

// The images are made by the same code that serves the tests.
#[path = "forge/mod.rs"]
mod forge;

use criterion::Criterion;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use forge::bundle::{BundleSpec, Style};
use forge::content::splitmix;
use forge::image::{ImageSpec, Mapped};
use nix::time::{ClockId, clock_gettime};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, DoneReply, ReadReply};
use ploopfs::units::DiskOffset;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the disks: what the processor's caches and page tables do not hold.
const SIZE: u64 = 64 << 20;
const CLUSTER_SECTORS: u32 = 2048;

/// Processor time of the calling thread.
struct ThreadTime;

static WALL_TIME: WallTime = WallTime;

impl Measurement for ThreadTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
            .expect("every thread has this clock")
            .into()
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        value.as_nanos() as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WALL_TIME.formatter()
    }
}

/// A reply that goes nowhere.
struct Nobody;

impl ReadReply for Nobody {
    fn done(self, result: ploopfs::error::Result<&[u8]>) {
        let len = result.expect("the images are sound").len();
        black_box(len);
    }
}

impl DoneReply for Nobody {
    fn done(self, result: ploopfs::error::Result<()>) {
        result.expect("the images are sound");
    }
}

/// A disk whose base has all of its clusters, under so many levels.
fn open(dir: &Path, depth: usize, mapped: &Mapped) -> Arc<Disk> {
    let like = ImageSpec::new(2, CLUSTER_SECTORS, SIZE / 512);
    let spec = BundleSpec::chain(Style::Parallels, &like, depth, |number, image| {
        if number == 0 {
            image.mapped = mapped.clone();
        }
    });
    spec.write(dir).expect("an image can be written");
    let write = depth == 1;
    let selection = Selection {
        write,
        ..Selection::default()
    };
    let options = DiskOptions {
        read_only: !write,
        ..DiskOptions::default()
    };
    let images = bundle::open(dir, &selection).expect("the image opens");
    let (disk, _) = disk::open(Arc::new(images), &options).expect("the disk opens");
    // Loads the map.
    let mut buf = vec![0; 4096];
    for at in (0..SIZE).step_by(1 << 20) {
        disk.read_at(DiskOffset::new(at), &mut buf)
            .expect("the disk reads");
    }
    disk
}

/// Places of the disk in an order that no cache foresees.
fn places() -> impl FnMut() -> u64 {
    let mut state = 1;
    move || splitmix(&mut state) % (SIZE / 4096) * 4096
}

fn measure(criterion: &mut Criterion<ThreadTime>, dir: &Path) {
    let raw = dir.join("raw");
    std::fs::write(&raw, vec![0x5a; 64 << 20]).expect("a file can be written");
    let raw = File::options()
        .read(true)
        .write(true)
        .open(&raw)
        .expect("the file opens");
    let holes = open(&dir.join("a.hdd"), 1, &Mapped::Nothing);
    let one = open(&dir.join("b.hdd"), 1, &Mapped::All);
    let chain = open(&dir.join("c.hdd"), 4, &Mapped::All);
    let mut buf = vec![0; 4096];
    // Sets the in-use mark.
    one.write_at(DiskOffset::new(0), &buf)
        .expect("the disk writes");

    let mut group = criterion.benchmark_group("request");
    for (name, disk, len) in [
        ("hole", &holes, 512),
        ("read", &one, 4096),
        ("read_4_levels", &chain, 4096),
    ] {
        let mut place = places();
        group.bench_function(name, |bencher| {
            bencher.iter(|| disk.read(DiskOffset::new(place()), len, &mut buf, Nobody));
        });
    }
    let mut place = places();
    group.bench_function("pread", |bencher| {
        bencher.iter(|| raw.read_exact_at(black_box(&mut buf), place()));
    });
    let mut place = places();
    group.bench_function("write", |bencher| {
        bencher.iter(|| one.write(DiskOffset::new(place()), &buf, Nobody));
    });
    let mut place = places();
    group.bench_function("pwrite", |bencher| {
        bencher.iter(|| raw.write_all_at(black_box(&buf), place()));
    });
    group.finish();

    for disk in [holes, one, chain] {
        let pooled = disk.stats().pooled_requests;
        assert_eq!(pooled, 0, "requests left the thread that is measured");
        disk.close().expect("the disk closes");
    }
}

fn main() {
    let place = if Path::new("/dev/shm").is_dir() {
        Path::new("/dev/shm").to_owned()
    } else {
        std::env::temp_dir()
    };
    let dir = tempfile::TempDir::with_prefix_in("ploopfs-request", place)
        .expect("a directory can be made");
    let mut criterion = Criterion::default()
        .with_measurement(ThreadTime)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    measure(&mut criterion, dir.path());
    criterion.final_summary();
}
