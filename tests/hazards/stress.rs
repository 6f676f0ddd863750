//! Many requests on the same clusters: every look must see what may have been there at that time.

use crate::caller::{
    check_files, fast_dir, flush, number, open, open_other, read, read_all, seed, write, zero,
};
use crate::forge::bundle::BundleSpec;
use crate::forge::content::{Level, mix, splitmix};
use crate::forge::reader;
use ploopfs::disk::{Disk, DiskOptions};
use ploopfs::units::DiskOffset;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SECTOR: u64 = 512;
/// The longest request, in sectors.
const LONGEST: u64 = 300;

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

pub(crate) fn run(name: &str, spec: &BundleSpec, options: &DiskOptions, threads: u64, steps: u64) {
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
pub(crate) fn run_abandoned(name: &str, spec: &BundleSpec, options: &DiskOptions) {
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
