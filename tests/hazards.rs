//! Concurrency and lack of space against the public `Disk`: what no order of requests may break.
//!
//! Every sector that a test writes carries the number of its request. A sector read must hold what
//! some request put there that had begun by then and was not overwritten by a whole later one; no
//! other byte may ever show. After the run the same must hold for the disk, for the reader of the
//! forge on the closed files, and for a disk that was left without being closed after a flush.
//! A failing seed is tried again with `PLOOPFS_SEED=N` (threads take turns as they please), and
//! `PLOOPFS_TIMES=N` makes the runs so many times longer.

#[path = "../tools/forge/mod.rs"]
mod forge;

use forge::bundle::{BundleSpec, Style};
use forge::content::{Level, mix, splitmix};
use forge::image::{ImageSpec, Mapped};
use forge::reader;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, DoneReply, EnospcPolicy, ReadReply};
use ploopfs::error::{Error, Result};
use ploopfs::units::DiskOffset;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const SECTOR: u64 = 512;
/// The longest request, in sectors.
const LONGEST: u64 = 300;

struct Answer<T>(Sender<T>);

impl ReadReply for Answer<Result<Vec<u8>>> {
    fn done(self, result: Result<&[u8]>) {
        // Whoever gave up waiting has failed already.
        let _ = self.0.send(result.map(<[u8]>::to_vec));
    }
}

impl DoneReply for Answer<Result<()>> {
    fn done(self, result: Result<()>) {
        let _ = self.0.send(result);
    }
}

fn open(path: &Path, options: &DiskOptions) -> Arc<Disk> {
    let selection = Selection {
        write: !options.read_only,
        ..Selection::default()
    };
    let images = bundle::open(path, &selection).expect("the bundle opens");
    disk::open(Arc::new(images), options)
        .expect("the disk opens")
        .0
}

fn wait<T>(receiver: &Receiver<T>, what: &str) -> T {
    receiver
        .recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|_| panic!("{what}: no answer within a minute"))
}

fn start_write(disk: &Arc<Disk>, at: u64, data: &[u8]) -> Receiver<Result<()>> {
    let (sender, receiver) = channel();
    disk.write(DiskOffset::new(at), data, Answer(sender));
    receiver
}

fn write(disk: &Arc<Disk>, at: u64, data: &[u8]) -> Result<()> {
    wait(&start_write(disk, at, data), "write")
}

fn zero(disk: &Arc<Disk>, at: u64, len: u64) -> Result<()> {
    let (sender, receiver) = channel::<Result<()>>();
    disk.zero(DiskOffset::new(at), len, Answer(sender));
    wait(&receiver, "zero")
}

fn flush(disk: &Arc<Disk>) -> Result<()> {
    let (sender, receiver) = channel::<Result<()>>();
    disk.flush(Answer(sender));
    wait(&receiver, "flush")
}

fn read(disk: &Arc<Disk>, at: u64, len: u64, buf: &mut [u8]) -> Vec<u8> {
    let (sender, receiver) = channel();
    disk.read(DiskOffset::new(at), len as usize, buf, Answer(sender));
    let bytes = wait(&receiver, "read").expect("reads succeed");
    assert_eq!(bytes.len() as u64, len, "a short read");
    bytes
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seed() -> u64 {
    number("PLOOPFS_SEED").unwrap_or(27)
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Zeros,
    /// What the forge put there.
    Initial,
    Write(u64),
    /// Words of several: the host's page cache copies without a lock, so a read may meet a write
    /// half-way.
    Torn,
}

/// A request that changed sectors `start..end`, and when it was under way.
#[derive(Clone, Copy, Debug)]
struct Change {
    sectors: (u64, u64),
    time: (u64, u64),
    what: Seen,
}

struct Look {
    sector: u64,
    time: (u64, u64),
    seen: Seen,
    /// Where that is not said by `seen`.
    bytes: Option<Box<[u8]>>,
}

#[derive(Default)]
struct Log {
    /// When the last flush began that was answered.
    flushed: u64,
    changes: Vec<Change>,
    looks: Vec<Look>,
}

fn stamp(id: u64, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => id,
            1 => sector,
            _ => mix(&[id, sector, index as u64]),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn recognise(bytes: &[u8], sector: u64, initial: &[u8]) -> Seen {
    if bytes.iter().all(|byte| *byte == 0) {
        return Seen::Zeros;
    }
    let id = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    if bytes == stamp(id, sector) {
        return Seen::Write(id);
    }
    let at = (sector * SECTOR) as usize;
    if bytes == &initial[at..at + 512] {
        return Seen::Initial;
    }
    Seen::Torn
}

/// One disk under stress.
struct Stress<'a> {
    name: &'a str,
    disk: Arc<Disk>,
    initial: Vec<u8>,
    /// First sectors of the places that all threads fight for, and a cluster in sectors.
    hot: Vec<u64>,
    cluster: u64,
    clock: AtomicU64,
}

impl Stress<'_> {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn range(&self, dice: &mut u64) -> (u64, u64) {
        let mut below = |bound: u64| splitmix(dice) % bound;
        let base = self.hot[below(self.hot.len() as u64) as usize];
        let (start, len) = match below(10) {
            0..4 => (base + below(self.cluster), 1),
            4..6 => (base + below(self.cluster), 1 + below(self.cluster)),
            6..9 => (base, self.cluster * (1 + below(3))),
            _ => (base + below(self.cluster), 1 + below(LONGEST)),
        };
        let size = self.initial.len() as u64 / SECTOR;
        let start = start.min(size - 1);
        (start, (start + len.min(LONGEST)).min(size))
    }

    fn look(&self, log: &mut Log, sectors: (u64, u64), buf: &mut [u8]) {
        let begun = self.now();
        let (at, len) = (sectors.0 * SECTOR, (sectors.1 - sectors.0) * SECTOR);
        let bytes = read(&self.disk, at, len, buf);
        let time = (begun, self.now());
        for (sector, bytes) in (sectors.0..).zip(bytes.chunks_exact(512)) {
            log.looks.push(self.look_of(sector, bytes, time));
        }
    }

    fn look_of(&self, sector: u64, bytes: &[u8], time: (u64, u64)) -> Look {
        let seen = recognise(bytes, sector, &self.initial);
        Look {
            sector,
            time,
            seen,
            bytes: (seen == Seen::Torn).then(|| bytes.into()),
        }
    }

    /// A torn sector must be made of words that were written there, while one of them was.
    fn judge_torn(&self, look: &Look, bytes: &[u8], changes: &[Change]) {
        let is_met = |change: &&Change| change.time.0 < look.time.1;
        let during = changes
            .iter()
            .filter(is_met)
            .any(|change| change.time.1 > look.time.0);
        assert!(
            during,
            "{}: sector {} is torn for good",
            self.name, look.sector
        );
        let at = look.sector as usize * 512;
        let mut sources = vec![
            [0; 512],
            self.initial[at..at + 512].try_into().expect("512"),
        ];
        for change in changes.iter().filter(is_met) {
            if let Seen::Write(id) = change.what {
                sources.push(stamp(id, look.sector));
            }
        }
        for word in (0..512).step_by(8) {
            let word = word..word + 8;
            let is_known = sources
                .iter()
                .any(|s| s[word.clone()] == bytes[word.clone()]);
            let sector = look.sector;
            assert!(
                is_known,
                "{}: sector {sector} has what nobody wrote",
                self.name
            );
        }
    }

    fn worker(&self, thread: u64, steps: u64) -> Log {
        let mut dice = mix(&[seed(), thread, 3]);
        let mut log = Log::default();
        let mut buf = vec![0; 1 << 20];
        for step in 0..steps {
            let sectors = self.range(&mut dice);
            let (at, len) = (sectors.0 * SECTOR, (sectors.1 - sectors.0) * SECTOR);
            let begun = self.now();
            let what = match splitmix(&mut dice) % 100 {
                0 => {
                    flush(&self.disk).expect("flushes succeed");
                    log.flushed = begun;
                    continue;
                }
                1..30 => {
                    self.look(&mut log, sectors, &mut buf);
                    continue;
                }
                30..55 => {
                    zero(&self.disk, at, len).expect("zeroing succeeds");
                    Seen::Zeros
                }
                _ => {
                    let id = (thread + 1) << 32 | step;
                    let data: Vec<u8> = (sectors.0..sectors.1)
                        .flat_map(|sector| stamp(id, sector))
                        .collect();
                    write(&self.disk, at, &data).expect("writes succeed");
                    Seen::Write(id)
                }
            };
            let time = (begun, self.now());
            log.changes.push(Change {
                sectors,
                time,
                what,
            });
        }
        log
    }

    /// Lets `threads` of them work and collects what they say.
    fn work(&self, threads: u64, first: u64, steps: u64, log: &mut Log) {
        let logs: Vec<Log> = std::thread::scope(|scope| {
            let workers: Vec<_> = (first..first + threads)
                .map(|thread| scope.spawn(move || self.worker(thread, steps)))
                .collect();
            let joined = workers.into_iter().map(|worker| worker.join());
            joined.map(|log| log.expect("a worker")).collect()
        });
        for mut more in logs {
            log.flushed = log.flushed.max(more.flushed);
            log.changes.append(&mut more.changes);
            log.looks.append(&mut more.looks);
        }
    }

    /// Leaves the disk as a killed process does.
    fn abandon(&mut self) {
        let disk = std::mem::replace(&mut self.disk, open_other());
        let gone = Arc::downgrade(&disk);
        drop(disk);
        while gone.strong_count() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Every look must have seen a change that may have been the last one at that time.
    fn judge(&self, log: &Log) {
        let count = self.initial.len() / SECTOR as usize;
        let mut by_sector: Vec<Vec<Change>> = Vec::new();
        by_sector.resize_with(count, Vec::new);
        for change in &log.changes {
            for sector in change.sectors.0..change.sectors.1 {
                by_sector[sector as usize].push(*change);
            }
        }
        for changes in &mut by_sector {
            changes.sort_unstable_by_key(|change| change.time.1);
        }
        for look in &log.looks {
            let changes = &by_sector[look.sector as usize];
            if let Some(bytes) = &look.bytes {
                self.judge_torn(look, bytes, changes);
                continue;
            }
            let over = changes.partition_point(|change| change.time.1 < look.time.0);
            let settled = changes[..over].iter().map(|change| change.time.0).max();
            let at = look.sector as usize * 512;
            let was_zero = self.initial[at..at + 512].iter().all(|byte| *byte == 0);
            let from_start = look.seen == Seen::Initial || (look.seen == Seen::Zeros && was_zero);
            let fits = |change: &Change| {
                change.what == look.seen
                    && change.time.0 < look.time.1
                    && settled.is_none_or(|settled| change.time.1 >= settled)
            };
            let is_fine = (from_start && settled.is_none()) || changes.iter().any(fits);
            assert!(
                is_fine,
                "{}: sector {} showed {:?} at {:?}, which was over: {:?}, seed {}",
                self.name,
                look.sector,
                look.seen,
                look.time,
                &changes[over.saturating_sub(4)..over],
                seed()
            );
        }
    }

    fn look_at_all(&self, log: &mut Log, bytes: &[u8]) {
        let time = (self.now(), self.now());
        for (sector, bytes) in (0..).zip(bytes.chunks_exact(512)) {
            log.looks.push(self.look_of(sector, bytes, time));
        }
    }
}

fn read_all(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size_bytes() as usize];
    disk.read_at(DiskOffset::ZERO, &mut all)
        .expect("the disk reads");
    all
}

/// Memory where there is some: the point is the order of requests, not the medium.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a directory")
}

fn check_files(name: &str, spec: &BundleSpec, dir: &Path) {
    for part in 0..spec.parts.len() {
        let files = spec.files(dir, part);
        let top = files.last().expect("a top");
        let faults = reader::check(top).expect("the checker runs");
        assert!(faults.is_empty(), "{name}: {faults:?}");
    }
}

/// A forged disk, opened, with the places that are fought for.
fn prepare<'a>(name: &'a str, spec: &BundleSpec, dir: &Path, options: &DiskOptions) -> Stress<'a> {
    spec.write(dir).expect("the bundle is forged");
    let forged = spec.model();
    let initial = forged.read(0, forged.bytes() as usize);
    let size = initial.len() as u64 / SECTOR;
    let mut hot = vec![0, size.saturating_sub(70)];
    for part in &spec.parts {
        // Borders of parts, and of the first pages of the map.
        let Some(Level::Image(top)) = part.levels.last() else {
            panic!("a top with a table");
        };
        let cluster = u64::from(top.cluster_sectors);
        hot.push(part.start.saturating_sub(cluster));
        hot.push(part.start);
        for page in [1008, 2032] {
            let border = part.start + page * cluster;
            hot.extend(
                [border - cluster, border]
                    .iter()
                    .filter(|at| **at < part.end),
            );
        }
    }
    let Some(Level::Image(top)) = spec.parts[0].levels.last() else {
        panic!("a top with a table");
    };
    Stress {
        name,
        disk: open(dir, options),
        initial,
        hot,
        cluster: u64::from(top.cluster_sectors),
        clock: AtomicU64::new(1),
    }
}

fn run(name: &str, spec: &BundleSpec, options: &DiskOptions, threads: u64, steps: u64) {
    let begun = Instant::now();
    let steps = steps * number("PLOOPFS_TIMES").unwrap_or(1);
    let home = fast_dir();
    let dir = home.path().join("disk.hdd");
    let mut stress = prepare(name, spec, &dir, options);
    let size = stress.initial.len() as u64 / SECTOR;
    let mut log = Log::default();
    for round in 0..2 {
        stress.work(threads, 100 * round, steps, &mut log);
        let before = read_all(&stress.disk);
        if round == 0 {
            // Left without a close after a flush: nothing of it may be missing.
            flush(&stress.disk).expect("the flush succeeds");
            stress.abandon();
        } else {
            let disk = std::mem::replace(&mut stress.disk, open_other());
            disk.close().expect("the disk closes");
            check_files(name, spec, &dir);
            let flat = reader::Flat::open(&dir).expect("the reader opens");
            let bytes = flat.read(0, before.len()).expect("the reader reads");
            assert!(bytes == before, "{name}: the files say something else");
        }
        stress.disk = open(&dir, options);
        let after = read_all(&stress.disk);
        let differs = (0..size as usize)
            .find(|s| before[s * 512..s * 512 + 512] != after[s * 512..s * 512 + 512]);
        assert_eq!(differs, None, "{name}: round {round}, seed {}", seed());
        check_holes(&stress.disk, &after);
        stress.look_at_all(&mut log, &after);
    }
    stress.judge(&log);
    let stats = stress.disk.stats();
    assert_eq!(stats.latched, None);
    println!(
        "{name}: {} changes, {} looks in {:?}",
        log.changes.len(),
        log.looks.len(),
        begun.elapsed()
    );
}

/// A disk that is left in the middle of everything: each sector must hold what it held at the last
/// flush that was answered, or something later.
fn run_abandoned(name: &str, spec: &BundleSpec, options: &DiskOptions) {
    for round in 0..12 * number("PLOOPFS_TIMES").unwrap_or(1) {
        let home = fast_dir();
        let dir = home.path().join("disk.hdd");
        let mut stress = prepare(name, spec, &dir, options);
        let mut log = Log::default();
        stress.work(4, 10 * round, 150, &mut log);
        stress.judge(&log);
        stress.abandon();
        stress.disk = open(&dir, options);
        let bytes = read_all(&stress.disk);
        let time = (log.flushed, stress.now());
        let looks = (0..).zip(bytes.chunks_exact(512));
        log.looks = looks
            .map(|(s, bytes)| stress.look_of(s, bytes, time))
            .collect();
        assert!(
            log.looks.iter().all(|look| look.bytes.is_none()),
            "{name}: foreign bytes"
        );
        stress.judge(&log);
        let disk = std::mem::replace(&mut stress.disk, open_other());
        disk.close().expect("the disk closes");
        check_files(name, spec, &dir);
    }
}

#[test]
fn an_abandoned_disk_has_what_was_flushed() {
    let options = DiskOptions {
        flush_interval_ms: 0,
        ..tiny(2, 6)
    };
    run_abandoned("chain", &chain(), &options);
    run_abandoned("split", &split(), &options);
    let full = BundleSpec::new(Style::Parallels, vec![image(1, 8, 803, 100)]);
    run_abandoned("full", &full, &options);
    let roomy = DiskOptions {
        bat_cache: 1 << 20,
        ..options
    };
    let one = BundleSpec::new(Style::Ploop, vec![image(2, 8, 18_001, 20)]);
    run_abandoned("one", &one, &roomy);
}

/// What is told to be a hole must be zeros.
fn check_holes(disk: &Disk, bytes: &[u8]) {
    let mut at = 0;
    while at < disk.size_bytes() {
        let found = disk.seek_data(DiskOffset::new(at)).expect("seeks work");
        let data = found.map_or(disk.size_bytes(), DiskOffset::get);
        let hole = &bytes[at as usize..data as usize];
        assert!(
            hole.iter().all(|byte| *byte == 0),
            "data in a hole {at}..{data}"
        );
        if data == disk.size_bytes() {
            return;
        }
        at = disk
            .seek_hole(DiskOffset::new(data))
            .expect("seeks work")
            .get();
        assert!(at > data);
    }
}

/// Something to hold while a disk is exchanged.
fn open_other() -> Arc<Disk> {
    let home = fast_dir();
    let path = home.path().join("other.hds");
    ImageSpec::new(2, 8, 8).write(&path).expect("an image");
    let options = DiskOptions {
        read_only: true,
        pool_threads: 1,
        ..DiskOptions::default()
    };
    open(&path, &options)
}

fn image(version: u8, cluster: u32, sectors: u64, percent: u64) -> Level {
    let mapped = Mapped::Percent(percent);
    Level::Image(ImageSpec::new(version, cluster, sectors).mapping(mapped))
}

fn chain() -> BundleSpec {
    let sectors = 18_001;
    let plain = Level::Plain {
        seed: 3,
        level: 0,
        bytes: 4_134_567,
    };
    let levels = vec![
        plain,
        image(2, 8, sectors - 9000, 20),
        image(1, 8, sectors, 15),
        image(2, 8, sectors, 10),
    ];
    BundleSpec::new(Style::Ploop, levels)
}

fn split() -> BundleSpec {
    let mut spec = BundleSpec::new(Style::Parallels, vec![image(1, 8, 9001, 30)]);
    spec.push_part(vec![image(2, 16, 1003, 30)]);
    spec.push_part(vec![image(1, 8, 777, 50)]);
    spec
}

fn tiny(pool_threads: usize, inline_order: u32) -> DiskOptions {
    DiskOptions {
        bat_cache: 1,
        grow_step: 1,
        pool_threads,
        inline_order,
        flush_interval_ms: 1,
        ..DiskOptions::default()
    }
}

#[test]
fn one_image_keeps_every_sector_in_order() {
    let spec = BundleSpec::new(Style::Ploop, vec![image(2, 8, 18_001, 20)]);
    run("one page, one pool thread", &spec, &tiny(1, 6), 8, 300);
    let usual = DiskOptions {
        pool_threads: 3,
        flush_interval_ms: 1,
        ..DiskOptions::default()
    };
    run("usual", &spec, &usual, 6, 800);
    let full = BundleSpec::new(Style::Parallels, vec![image(1, 8, 803, 100)]);
    run("full, no room to grow", &full, &tiny(2, 6), 6, 400);
}

#[test]
fn a_chain_keeps_every_sector_in_order() {
    run(
        "chain, all pooled, one thread",
        &chain(),
        &tiny(1, 0),
        6,
        300,
    );
    let inline = DiskOptions {
        bat_cache: 64 << 10,
        ..tiny(2, 20)
    };
    run("chain, all tried inline", &chain(), &inline, 6, 600);
}

#[test]
fn a_split_disk_keeps_every_sector_in_order() {
    run("split", &split(), &tiny(2, 4), 6, 400);
}

/// A small file system of its own; unmounted when dropped.
struct Small(tempfile::TempDir);

impl Small {
    /// `None` where the test may not mount.
    fn mount(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let size = format!("size={bytes}");
        let flags = MsFlags::empty();
        let mounted = mount(
            Some("none"),
            dir.path(),
            Some("tmpfs"),
            flags,
            Some(size.as_str()),
        );
        match mounted {
            Ok(()) => Some(Self(dir)),
            Err(why) => {
                assert!(
                    std::env::var_os("CI").is_none(),
                    "cannot mount a tmpfs: {why}"
                );
                println!("skipped: cannot mount a tmpfs: {why}");
                None
            }
        }
    }

    fn image(&self, sectors: u64) -> PathBuf {
        let path = self.0.path().join("disk.hds");
        ImageSpec::new(2, 128, sectors)
            .write(&path)
            .expect("an image");
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn is_no_space(result: &Result<()>) -> bool {
    result.as_ref().is_err_and(Error::is_no_space)
}

const CLUSTER: u64 = 64 << 10;

/// Writes cluster after cluster until the host is full; returns how many were written.
fn fill(disk: &Arc<Disk>, from: u64) -> u64 {
    let mut number = from;
    loop {
        let data = vec![number as u8 | 1; CLUSTER as usize];
        let written = write(disk, number * CLUSTER, &data);
        if is_no_space(&written) {
            return number;
        }
        written.expect("no other error");
        number += 1;
    }
}

fn check_filled(bytes: &[u8], count: u64) {
    for (number, cluster) in (0..count).zip(bytes.chunks_exact(CLUSTER as usize)) {
        assert!(
            cluster.iter().all(|byte| *byte == number as u8 | 1),
            "cluster {number}"
        );
    }
}

#[test]
fn a_full_host_fails_writes_and_nothing_else() {
    let Some(small) = Small::mount(16 << 20) else {
        return;
    };
    let path = small.image(64 << 11);
    let options = DiskOptions {
        enospc: EnospcPolicy::Fail,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let count = fill(&disk, 0);
    assert!(
        count >= 240,
        "only {count} clusters of 16 MiB could be used"
    );
    flush(&disk).expect("the table has its place already");
    // What a discard frees is used again, without anybody asking for a flush.
    zero(&disk, 8 * CLUSTER, 4 * CLUSTER).expect("discards need no space");
    for number in 8..12_u64 {
        let data = vec![number as u8 | 1; CLUSTER as usize];
        write(&disk, number * CLUSTER, &data).expect("the freed space is found");
    }
    check_filled(&read_all(&disk), count);
    disk.close().expect("the disk closes");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    let flat = reader::Flat::open(&path).expect("the reader opens");
    check_filled(
        &flat.read(0, (count * CLUSTER) as usize).expect("reads"),
        count,
    );
}

#[test]
fn waiting_for_space_is_patient_and_ends_when_there_is_some() {
    let Some(small) = Small::mount(16 << 20) else {
        return;
    };
    let ballast = small.0.path().join("ballast");
    std::fs::write(&ballast, vec![1; 4 << 20]).expect("the ballast");
    let path = small.image(64 << 11);
    let options = DiskOptions {
        enospc: EnospcPolicy::Seconds(50),
        flush_interval_ms: 0,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let mut number = 0;
    let data = vec![7; CLUSTER as usize];
    let waiting = loop {
        let receiver = start_write(&disk, number * CLUSTER, &data);
        match receiver.recv_timeout(Duration::from_secs(2)) {
            Ok(result) => result.expect("no error while there is space"),
            Err(_) => break receiver,
        }
        number += 1;
    };
    let before = disk.stats().no_space_events;
    let mut buf = vec![0; 1 << 20];
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(read(&disk, 0, CLUSTER, &mut buf), data);
        std::thread::sleep(Duration::from_millis(20));
    }
    let tries = disk.stats().no_space_events - before;
    assert!(tries <= 10, "{tries} tries in three seconds");
    assert_eq!(disk.stats().waiting_for_space, 1);
    std::fs::remove_file(&ballast).expect("the ballast goes");
    wait(&waiting, "the waiting write").expect("there is space now");
    disk.close().expect("the disk closes");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
}

#[test]
fn writers_that_wait_for_space_end_with_the_disk() {
    let Some(small) = Small::mount(16 << 20) else {
        return;
    };
    let path = small.image(64 << 11);
    let options = DiskOptions {
        enospc: EnospcPolicy::Wait,
        pool_threads: 2,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let data = vec![7; CLUSTER as usize];
    let answers: Vec<_> = (0..400)
        .map(|number| start_write(&disk, number * CLUSTER, &data))
        .collect();
    let mut buf = vec![0; 1 << 20];
    assert_eq!(read(&disk, 0, CLUSTER, &mut buf), data);
    let begun = Instant::now();
    while disk.stats().waiting_for_space == 0 && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let begun = Instant::now();
    disk.close().expect("the disk closes");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let results: Vec<_> = answers.iter().map(|answer| wait(answer, "write")).collect();
    let good = results.iter().filter(|result| result.is_ok()).count();
    assert!(results.iter().all(|r| r.is_ok() || is_no_space(r)));
    assert!(good >= 240, "only {good} clusters of 16 MiB were used");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
}

#[test]
fn a_limit_on_the_file_size_is_used_up_and_then_an_error() {
    let me = std::env::current_exe().expect("a path");
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("disk.hds");
    ImageSpec::new(2, 128, 64 << 11)
        .write(&path)
        .expect("an image");
    let child = Command::new("bash")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 10240; exec \"$0\" --exact limited_child --ignored",
        ])
        .arg(me)
        .env("PLOOPFS_LIMITED", &path)
        .output()
        .expect("bash runs");
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stdout)
    );
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    let flat = reader::Flat::open(&path).expect("the reader opens");
    check_filled(&flat.read(0, (150 * CLUSTER) as usize).expect("reads"), 150);
}

#[test]
#[ignore = "the child of another test"]
fn limited_child() {
    let path = PathBuf::from(std::env::var_os("PLOOPFS_LIMITED").expect("a path"));
    let disk = open(&path, &DiskOptions::default());
    let mut count = 0;
    let error = loop {
        let data = vec![count as u8 | 1; CLUSTER as usize];
        match write(&disk, count * CLUSTER, &data) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ploopfs::error::ErrorKind::Io(27), "{error}");
    assert!(count >= 150, "only {count} clusters of 10 MiB were used");
    check_filled(&read_all(&disk), count);
    disk.close().expect("the disk closes");
}

#[test]
fn a_close_under_load_answers_everybody() {
    let home = fast_dir();
    for round in 0..10_u64 {
        let dir = home.path().join(format!("disk{round}.hdd"));
        let spec = chain();
        spec.write(&dir).expect("the bundle is forged");
        let disk = open(&dir, &tiny(1 + round as usize % 2, 0));
        let data = vec![9; 5000];
        let mut answers = Vec::new();
        for number in 0..200_u64 {
            let at = splitmix(&mut (number + round * 1000)) % (18_000 * SECTOR - 5000);
            answers.push(start_write(&disk, at, &data));
            let (sender, receiver) = channel();
            disk.zero(DiskOffset::new(at / 4096 * 4096), 4096, Answer(sender));
            answers.push(receiver);
        }
        disk.close().expect("the disk closes");
        for answer in &answers {
            wait(answer, "a request").expect("it was made before the close");
        }
        check_files("close", &spec, &dir);
    }
}

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
