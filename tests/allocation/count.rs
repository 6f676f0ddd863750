//! Small requests to mapped clusters and holes allocate nothing: on their thread, and anywhere.
//!
//! Each case runs alone in a process. The disk is used as the transport uses it, with replies that
//! do not allocate themselves. Before anything is counted, the map's pages are loaded, the in-use
//! mark is set and every thread has come to rest.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{self, Level};
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::heap::Counts;
use crate::support::harness::trial;
use crate::support::{Outcome, command, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, DoneReply, ReadReply};
use ploopfs::plan::INLINE_ORDER_DEFAULT;
use ploopfs::units::DiskOffset;
use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Names the case that a child process runs.
const CASE: &str = "PLOOPFS_COUNT_ALLOCATIONS";
/// Disks below a directory of this name are direct.
const DIRECT: &str = "direct";
/// Names the directory in which it may write.
const PLACE: &str = "PLOOPFS_COUNT_PLACE";

type Case = (&'static str, fn() -> Outcome, fn(&Path) -> Outcome);

const CASES: [Case; 9] = [
    (
        "the_heap_counts",
        || parent("the_heap_counts"),
        the_heap_counts,
    ),
    (
        "a_pooled_request_is_counted",
        || parent("a_pooled_request_is_counted"),
        a_pooled_request_is_counted,
    ),
    (
        "reads_of_one_image",
        || parent("reads_of_one_image"),
        |dir| reads(dir, &one(Mapped::Percent(60), 2, 2048)),
    ),
    (
        "reads_of_small_clusters",
        || parent("reads_of_small_clusters"),
        |dir| reads(dir, &one(Mapped::Percent(60), 1, 8)),
    ),
    (
        "reads_of_a_chain_of_four",
        || parent("reads_of_a_chain_of_four"),
        |dir| reads(dir, &chain(&Mapped::Percent(30))),
    ),
    (
        "reads_of_a_split_disk",
        || parent("reads_of_a_split_disk"),
        |dir| reads(dir, &split(&Mapped::Percent(50))),
    ),
    (
        "writes_to_one_image",
        || parent("writes_to_one_image"),
        |dir| {
            writes(&dir.join("a"), &one(Mapped::All, 2, 2048))?;
            writes(&dir.join("b"), &one(Mapped::All, 1, 8))
        },
    ),
    (
        "writes_to_a_chain_and_a_split_disk",
        || parent("writes_to_a_chain_and_a_split_disk"),
        |dir| {
            writes(&dir.join("a"), &chain(&Mapped::All))?;
            writes(&dir.join("b"), &split(&Mapped::All))
        },
    ),
    (
        "a_direct_disk",
        || parent("a_direct_disk"),
        |dir| {
            std::env::set_current_dir(dir)?;
            let (dir, spec) = (Path::new(DIRECT), one(Mapped::All, 2, 2048));
            reads(&dir.join("a"), &spec)?;
            writes(&dir.join("b"), &spec)
        },
    ),
];

pub(crate) fn trials() -> Vec<Trial> {
    let cases = CASES.iter();
    cases.map(|(name, run, _)| trial(name, &[], *run)).collect()
}

/// Runs a case in a process of its own.
fn parent(name: &str) -> Outcome {
    let dir = scratch()?;
    let program = std::env::current_exe()?;
    let mut again = command::new(&program.display().to_string());
    again.env(CASE, name).env(PLACE, dir.path());
    command::run(&mut again)?.expect_code(0)?;
    Ok(())
}

/// What this process is to do if it was started by [`parent`].
pub(crate) fn child() -> Option<ExitCode> {
    let name = std::env::var(CASE).ok()?;
    let dir = std::env::var_os(PLACE)?;
    let case = CASES.iter().find(|(known, ..)| *known == name);
    let done = case
        .context("no such case")
        .and_then(|(_, _, case)| case(Path::new(&dir)));
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn one(mapped: Mapped, version: u8, cluster: u32) -> BundleSpec {
    let mut image = ImageSpec::new(version, cluster, 16 * 2048 + 3).mapping(mapped);
    image.layout = Layout::Shuffled(4);
    BundleSpec::new(Style::Ploop, vec![Level::Image(image)])
}

/// Four deltas over one another; the top maps what is given.
fn chain(top: &Mapped) -> BundleSpec {
    let like = ImageSpec::new(2, 128, 8 * 2048).mapping(Mapped::Percent(30));
    BundleSpec::chain(Style::Parallels, &like, 4, |number, image| {
        image.seed = number as u64;
        if number == 3 {
            image.mapped = top.clone();
        }
    })
}

/// Three parts of different clusters.
fn split(mapped: &Mapped) -> BundleSpec {
    let image = |version, cluster, sectors| {
        vec![Level::Image(
            ImageSpec::new(version, cluster, sectors).mapping(mapped.clone()),
        )]
    };
    let mut spec = BundleSpec::new(Style::Parallels, image(1, 8, 1001));
    spec.push_part(image(2, 64, 5000));
    spec.push_part(image(1, 2048, 9000));
    spec
}

/// Sizes up to the largest that is served where it arrives.
fn sizes() -> [usize; 6] {
    let longest = 4096 << (INLINE_ORDER_DEFAULT.0 - 1);
    [512, 4096, 12 << 10, 64 << 10, longest - 512, longest]
}

/// How many replies came, and how many of them were errors.
#[derive(Default)]
struct Replies {
    good: AtomicUsize,
    bad: AtomicUsize,
}

static REPLIES: Replies = Replies {
    good: AtomicUsize::new(0),
    bad: AtomicUsize::new(0),
};

impl Replies {
    fn count(&self, is_good: bool) {
        let counter = if is_good { &self.good } else { &self.bad };
        counter.fetch_add(1, Ordering::SeqCst);
    }

    fn all(&self) -> usize {
        self.good.load(Ordering::SeqCst) + self.bad.load(Ordering::SeqCst)
    }
}

/// A reply that takes no memory.
struct Answer(&'static Replies);

impl ReadReply for Answer {
    fn done(self, result: ploopfs::error::Result<&[u8]>) {
        self.0.count(result.is_ok());
    }
}

impl DoneReply for Answer {
    fn done(self, result: ploopfs::error::Result<()>) {
        self.0.count(result.is_ok());
    }
}

/// Waits until as many replies came as requests were made, and none was an error.
fn all_answered(requests: usize) -> Outcome {
    command::eventually(Duration::from_secs(60), || {
        ensure!(
            REPLIES.all() >= requests,
            "{} of {requests} replies",
            REPLIES.all()
        );
        Ok(())
    })?;
    let bad = REPLIES.bad.load(Ordering::SeqCst);
    ensure!(bad == 0, "{bad} requests failed");
    Ok(())
}

fn open(dir: &Path, spec: &BundleSpec, write: bool) -> Result<Arc<Disk>> {
    let bundle = dir.join("disk.hdd");
    std::fs::create_dir_all(dir)?;
    spec.write(&bundle)?;
    let selection = Selection {
        write,
        ..Selection::default()
    };
    let options = DiskOptions {
        read_only: !write,
        pool_threads: 2,
        flush_interval_ms: 0,
        direct: dir.starts_with(DIRECT),
        ..DiskOptions::default()
    };
    let (disk, _) = disk::open(Arc::new(bundle::open(&bundle, &selection)?), &options)?;
    Ok(disk)
}

/// Loads the whole map, has every thread do something, and waits until none allocates any more.
fn warm_up(disk: &Arc<Disk>, buf: &mut [u8]) -> Outcome {
    let size = disk.size_bytes();
    let mut requests = REPLIES.all();
    let mut at = 0;
    while at < size {
        disk.read(DiskOffset::new(at), buf.len(), buf, Answer(&REPLIES));
        requests += 1;
        at += buf.len() as u64;
    }
    disk.flush(Answer(&REPLIES));
    all_answered(requests + 1)?;
    let mut before = Counts::now();
    loop {
        thread::sleep(Duration::from_millis(50));
        let now = Counts::now();
        if now.all == before.all {
            return Ok(());
        }
        before = now;
    }
}

fn the_heap_counts(_: &Path) -> Outcome {
    let before = Counts::now();
    drop(black_box(Box::new(7)));
    let one = Counts::since(before);
    ensure!(one == Counts { here: 1, all: 1 }, "a box was {one:?}");
    let before = Counts::now();
    thread::spawn(|| drop(black_box(vec![0; 100])))
        .join()
        .ok()
        .context("the thread panicked")?;
    let both = Counts::since(before);
    ensure!(both.all > both.here, "another thread's was {both:?}");
    let before = Counts::now();
    let quiet = Counts::since(before);
    ensure!(quiet == Counts { here: 0, all: 0 }, "nothing was {quiet:?}");
    Ok(())
}

fn a_pooled_request_is_counted(dir: &Path) -> Outcome {
    let disk = open(dir, &one(Mapped::All, 2, 2048), true)?;
    let mut buf = vec![0; 1 << 20];
    warm_up(&disk, &mut buf)?;
    let requests = REPLIES.all();
    let before = Counts::now();
    disk.read(DiskOffset::new(0), buf.len(), &mut buf, Answer(&REPLIES));
    let found = Counts::since(before);
    all_answered(requests + 1)?;
    ensure!(found.here > 0, "a request in the pool was {found:?}");
    disk.close()?;
    Ok(())
}

fn reads(dir: &Path, spec: &BundleSpec) -> Outcome {
    // The in-use mark and the flusher belong to the disk that is served, so it is writable.
    let disk = open(dir, spec, true)?;
    let model = spec.model();
    let mut buf = vec![0; 1 << 20];
    warm_up(&disk, &mut buf)?;
    let served_here = disk.stats().inline_requests;
    let mut requests = 0;
    for len in sizes() {
        // An odd step, so that requests begin anywhere in a cluster and cross into the next.
        let step = (len + 7 * 512) as u64;
        let mut at = 0;
        while at < disk.size_bytes() {
            let place = DiskOffset::new(at);
            let before = Counts::now();
            disk.read(place, len, &mut buf, Answer(&REPLIES));
            let found = Counts::since(before);
            ensure!(
                found == Counts { here: 0, all: 0 },
                "a read of {len} bytes at {at} was {found:?}"
            );
            requests += 1;
            let whole = len.min((disk.size_bytes() - at) as usize);
            let difference = content::first_difference(at, &model.read(at, whole), &buf[..whole]);
            ensure!(difference.is_none(), "{}", difference.unwrap_or_default());
            at += step;
        }
    }
    all_answered(0)?;
    let served_here = disk.stats().inline_requests - served_here;
    ensure!(
        served_here == requests,
        "{served_here} of {requests} served here"
    );
    disk.close()?;
    Ok(())
}

fn writes(dir: &Path, spec: &BundleSpec) -> Outcome {
    let disk = open(dir, spec, true)?;
    let size = disk.size_bytes();
    let mut buf = vec![0; 1 << 20];
    let mut model = spec.model().read(0, size as usize);
    // The first write to each part sets its mark, and waits for the host.
    for part in &spec.parts {
        let at = part.start * content::SECTOR;
        let first = at as usize..at as usize + 512;
        disk.write_at(DiskOffset::new(at), &model[first])?;
    }
    warm_up(&disk, &mut buf)?;
    let served_here = disk.stats().inline_requests;
    let mut requests = 0;
    for len in sizes() {
        let step = (len + 5 * 512) as u64;
        let mut at = 0;
        while at + len as u64 <= size {
            let range = at as usize..at as usize + len;
            requests += 1;
            let fill = (requests % 255 + 1) as u8;
            model[range.clone()].fill(fill);
            let before = Counts::now();
            disk.write(DiskOffset::new(at), &model[range], Answer(&REPLIES));
            let found = Counts::since(before);
            ensure!(
                found == Counts { here: 0, all: 0 },
                "a write of {len} bytes at {at} was {found:?}"
            );
            at += step;
        }
    }
    all_answered(0)?;
    let served_here = disk.stats().inline_requests - served_here;
    ensure!(
        served_here == requests,
        "{served_here} of {requests} served here"
    );
    for (number, expected) in model.chunks(buf.len()).enumerate() {
        let at = (number * buf.len()) as u64;
        disk.read_at(DiskOffset::new(at), &mut buf[..expected.len()])?;
        let difference = content::first_difference(at, expected, &buf[..expected.len()]);
        ensure!(difference.is_none(), "{}", difference.unwrap_or_default());
    }
    disk.close()?;
    Ok(())
}
