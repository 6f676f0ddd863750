//! Power cuts at every operation, and syncs that fail: what may be on the medium, and what must.
//!
//! The disk runs over files in memory that know which bytes have been synced. After every operation
//! on them the power is cut, on copies: each un-synced operation is kept or lost at random, writes
//! torn at 512 bytes. From each such state the disk is opened anew and read as a whole, and every
//! sector must hold what the last flush that returned made durable, or something issued since.
//! Now and then several clients work at the same time; then a seed fixes what they do, but not how
//! they interleave.
//!
//! A failing seed repeats with `PLOOPFS_SEED=N`; `PLOOPFS_SEEDS=N` runs that many.

#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "crash/model.rs"]
mod model;
#[path = "crash/storage.rs"]
mod storage;

use forge::content::splitmix;
use forge::image::{ImageSpec, Mapped};
use model::{Model, SECTOR, Stamp};
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy, Resources};
use ploopfs::error::ErrorKind;
use ploopfs::units::{DiskOffset, SectorCount};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use storage::{Flaw, SimFile, World};

/// Operations of one workload.
const STEPS: u64 = 60;
/// States tried for one cut.
const STATES: u64 = 3;
const SEEDS: u64 = 25;
/// Clients at work at the same time, where there are several.
const CLIENTS: u64 = 3;

/// One file of a part: its bytes, and whether it is plain.
type Level = (Vec<u8>, Plain);
/// The parts of a disk, with their lengths in sectors.
type Parts = Vec<(u64, Vec<Level>)>;

fn options() -> DiskOptions {
    DiskOptions {
        bat_cache: 1,
        grow_step: 1 << 15,
        enospc: EnospcPolicy::Fail,
        pool_threads: 1,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    }
}

/// Threads and buffers of all disks here, of which there are thousands.
fn resources() -> Resources {
    static SHARED: OnceLock<Resources> = OnceLock::new();
    SHARED
        .get_or_init(|| Resources::new(1).expect("threads and memory"))
        .clone()
}

/// The bytes of a forged image.
fn forged(spec: &ImageSpec) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    spec.write(&path).expect("an image");
    std::fs::read(path).expect("its bytes")
}

fn image(version: u8, cluster: u32, sectors: u64, mapped: Mapped) -> Level {
    let spec = ImageSpec::new(version, cluster, sectors).mapping(mapped);
    (forged(&spec), Plain::No)
}

/// A disk of every kind, small enough for thousands of whole reads.
fn kinds() -> Vec<(&'static str, Parts)> {
    let plain = |sectors: usize| (vec![0x11; sectors * 512], Plain::Yes);
    let chain = vec![
        plain(300),
        image(2, 8, 320, Mapped::Percent(30)),
        image(2, 8, 320, Mapped::Nothing),
    ];
    let split = vec![
        (160, vec![image(1, 8, 160, Mapped::Percent(50))]),
        (161, vec![plain(150), image(2, 16, 161, Mapped::Nothing)]),
    ];
    vec![
        ("v2", vec![(320, vec![image(2, 8, 320, Mapped::Nothing)])]),
        (
            "v1, odd size",
            vec![(317, vec![image(1, 16, 317, Mapped::Percent(60))])],
        ),
        ("chain over a plain base", vec![(320, chain)]),
        ("split", split),
    ]
}

/// A disk over simulated files.
struct Bench {
    world: Arc<World>,
    files: Vec<Vec<Arc<SimFile>>>,
    lens: Vec<u64>,
}

impl Bench {
    fn new(parts: &Parts, flaw: Flaw) -> Self {
        let world = World::new(flaw);
        let files = parts.iter().map(|(_, levels)| {
            let top = levels.len() - 1;
            let levels = levels.iter().enumerate();
            levels
                .map(|(n, (bytes, _))| SimFile::new(&world, bytes.clone(), n == top))
                .collect()
        });
        let files = files.collect();
        Self {
            world,
            files,
            lens: parts.iter().map(|(sectors, _)| *sectors).collect(),
        }
    }

    fn open(&self, parts: &Parts) -> ploopfs::error::Result<Arc<Disk>> {
        let mut start = 0;
        let mut opened = Vec::new();
        for ((files, (_, levels)), sectors) in self.files.iter().zip(parts).zip(&self.lens) {
            let files = files
                .iter()
                .zip(levels)
                .map(|(file, (_, plain))| OpenedFile {
                    path: PathBuf::from("simulated"),
                    storage: Arc::clone(file) as Arc<dyn ploopfs::storage::Storage>,
                    plain: *plain,
                    guid: None,
                });
            opened.push(OpenedPart {
                start: SectorCount::new(start),
                end: Some(SectorCount::new(start + sectors)),
                blocksize: None,
                files: files.collect(),
            });
            start += sectors;
        }
        let images = Arc::new(OpenedImages::from_parts(PathBuf::from("simulated"), opened));
        disk::open_with(images, &options(), resources()).map(|(disk, _)| disk)
    }

    /// The same files as a power cut leaves them.
    fn cut(&self, dice: &mut u64) -> Self {
        let world = World::new(Flaw::None);
        let files = self.files.iter().map(|files| {
            files
                .iter()
                .map(|file| file.after_cut(&world, dice))
                .collect()
        });
        Self {
            files: files.collect(),
            lens: self.lens.clone(),
            world,
        }
    }
}

/// What one workload found.
#[derive(Debug, Default)]
struct Found {
    states: u64,
    violations: Vec<String>,
}

/// Opens a state that a power cut left and holds it against the model.
fn judge(bench: &Bench, parts: &Parts, model: &Model, story: &str, found: &mut Found) {
    found.states += 1;
    let disk = match bench.open(parts) {
        Ok(disk) => disk,
        Err(error) => {
            return found
                .violations
                .push(format!("{story}: cannot be opened: {error}"));
        }
    };
    let mut bytes = vec![0; model.bytes()];
    match disk.read_at(DiskOffset::ZERO, &mut bytes) {
        Ok(()) => found
            .violations
            .extend(model.complaint(&bytes).map(|why| format!("{story}: {why}"))),
        Err(error) => found
            .violations
            .push(format!("{story}: cannot be read: {error}")),
    }
    if let Err(error) = disk.close() {
        found
            .violations
            .push(format!("{story}: cannot be closed: {error}"));
    }
}

/// All bytes of a disk that is well.
fn whole(disk: &Disk, model: &Model) -> Vec<u8> {
    let mut bytes = vec![0; model.bytes()];
    disk.read_at(DiskOffset::ZERO, &mut bytes)
        .expect("the disk reads");
    bytes
}

/// One operation of the workload; the model hears of it before it begins.
fn step(disk: &Arc<Disk>, model: &mut Model, dice: &mut u64) {
    let sectors = model.sectors();
    let longest = [1, 4, 20, 64][(splitmix(dice) % 4) as usize];
    let len = 1 + splitmix(dice) % longest;
    let first = splitmix(dice) % (sectors - len + 1);
    let range = first..first + len;
    let at = DiskOffset::new(first * SECTOR);
    let done = match splitmix(dice) % 10 {
        0 | 1 => {
            model.issue(range.clone(), Stamp::ZERO);
            disk.zero_at(at, len * SECTOR)
        }
        2 => {
            model.issue(range.clone(), Stamp::ZERO);
            disk.write_at(at, &vec![0; (len * SECTOR) as usize])
        }
        3 | 4 => {
            let covered = model.all_issued();
            let flushed = disk.flush_now();
            if flushed.is_ok() {
                model.durable(covered);
            }
            flushed
        }
        _ => {
            let stamp = model.next_stamp();
            model.issue(range.clone(), stamp);
            disk.write_at(at, &stamp.bytes(range))
        }
    };
    if let Err(error) = done {
        assert_eq!(
            error.kind(),
            ErrorKind::Latched,
            "only a latched disk refuses: {error}"
        );
    }
}

/// What one of several clients does at the same time as the others.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Write(u64, Stamp),
    Zero(u64),
    Flush,
}

/// Several clients at once. Each has sectors of its own, but they share clusters, so that they meet
/// wherever a cluster gets a place, is copied up or loses its entry. The model hears of everything
/// before it begins, and their flushes promise nothing here.
fn together(disk: &Arc<Disk>, model: &mut Model, dice: &mut u64) {
    let deeds = |client: u64| {
        let deed = |_| {
            let sector = splitmix(dice) % (model.sectors() / CLIENTS) * CLIENTS + client;
            match splitmix(dice) % 8 {
                0 => Deed::Flush,
                1 | 2 => {
                    model.issue(sector..sector + 1, Stamp::ZERO);
                    Deed::Zero(sector)
                }
                _ => {
                    let stamp = model.next_stamp();
                    model.issue(sector..sector + 1, stamp);
                    Deed::Write(sector, stamp)
                }
            }
        };
        (0..4).map(deed).collect::<Vec<_>>()
    };
    let clients: Vec<_> = (0..CLIENTS).map(deeds).collect();
    std::thread::scope(|scope| {
        for deeds in &clients {
            scope.spawn(move || {
                for deed in deeds {
                    let done = match *deed {
                        Deed::Write(sector, stamp) => {
                            let at = DiskOffset::new(sector * SECTOR);
                            disk.write_at(at, &stamp.bytes(sector..sector + 1))
                        }
                        Deed::Zero(sector) => {
                            disk.zero_at(DiskOffset::new(sector * SECTOR), SECTOR)
                        }
                        Deed::Flush => disk.flush_now(),
                    };
                    done.expect("nothing fails here");
                }
            });
        }
    });
}

/// Runs a workload; after every operation on the files the power is cut, on copies.
fn run(parts: &Parts, seed: u64, flaw: Flaw) -> Found {
    let mut dice = seed;
    let bench = Arc::new(Bench::new(parts, flaw));
    let mut disk = bench.open(parts).expect("the disk opens");
    let mut first = vec![0; bench.lens.iter().sum::<u64>() as usize * SECTOR as usize];
    disk.read_at(DiskOffset::ZERO, &mut first)
        .expect("the disk reads");
    let mut model = Model::new(&first);
    let mut found = Found::default();
    for number in 0..STEPS {
        let mut cuts = splitmix(&mut dice);
        // The cuts within the step are taken while it runs, and judged by what holds at its end:
        // all that was issued by then may be there, what was durable before it must.
        let floor = model.clone();
        bench.world.record(true);
        match splitmix(&mut dice) % 20 {
            0 => {
                disk.close().expect("the disk closes");
                bench.world.record(false);
                model.durable(model.all_issued());
                disk = bench.open(parts).expect("the disk opens again");
            }
            // The process is killed: what it wrote is still there for the next one to see, but not
            // on the medium; and the next one goes on before the power is cut.
            1 => {
                disk = bench.open(parts).expect("the disk opens after a kill");
                let seen = whole(&disk, &model);
                found.violations.extend(model.complaint(&seen));
                // What the open has seen it has made durable first.
                model.saw(&seen);
            }
            2..5 => together(&disk, &mut model, &mut dice),
            _ => step(&disk, &mut model, &mut dice),
        }
        bench.world.record(false);
        let during = floor.with_issued_of(&model);
        for (moment, files) in bench
            .world
            .take_moments(&bench.files)
            .into_iter()
            .enumerate()
        {
            let cut_bench = Bench {
                files,
                lens: bench.lens.clone(),
                world: World::new(Flaw::None),
            };
            for _ in 0..STATES {
                let state = cut_bench.cut(&mut cuts);
                let story = format!("seed {seed}, step {number}, cut {moment}");
                judge(&state, parts, &during, &story, &mut found);
            }
        }
        if found.violations.len() > 3 {
            break;
        }
    }
    let state = bench.cut(&mut dice);
    judge(
        &state,
        parts,
        &model,
        &format!("seed {seed}, at the end"),
        &mut found,
    );
    found
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    let seeds = match number("PLOOPFS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..1 + number("PLOOPFS_SEEDS").unwrap_or(SEEDS),
    };
    for (name, parts) in kinds() {
        let mut states = 0;
        for seed in seeds.clone() {
            let found = run(&parts, seed, Flaw::None);
            assert!(
                found.violations.is_empty(),
                "{name}: {:#?}",
                found.violations
            );
            states += found.states;
        }
        println!("{name}: {states} states after power cuts, none wrong");
    }
}

/// The net must catch what it is there for: files whose syncs do less than they say.
#[test]
fn missing_syncs_are_found() {
    for flaw in [Flaw::SyncsDoNothing, Flaw::EverySecondSyncDoesNothing] {
        let caught = kinds()
            .iter()
            .any(|(_, parts)| (1..20).any(|seed| !run(parts, seed, flaw).violations.is_empty()));
        assert!(caught, "{flaw:?} went unnoticed");
    }
}

/// After a failed sync no later flush may report success, the disk takes no more writes, and what
/// was durable before stays.
#[test]
fn a_failed_sync_is_never_forgotten() {
    for (name, parts) in kinds() {
        for fail_at in 1..12 {
            let bench = Bench::new(&parts, Flaw::None);
            let disk = bench.open(&parts).expect("the disk opens");
            let syncs = bench.world.syncs();
            bench.world.fail_sync(syncs + fail_at);
            let mut failed = false;
            for turn in 0..16_u64 {
                let data = [turn as u8 + 1; 4096];
                let written = disk.write_at(DiskOffset::new(turn % 8 * 8192), &data);
                let flushed = written.and_then(|()| disk.flush_now());
                if failed {
                    let error = flushed.expect_err("a latched disk refuses");
                    assert_eq!(error.kind(), ErrorKind::Latched, "{name}, sync {fail_at}");
                } else {
                    failed = flushed.is_err();
                }
            }
            assert!(failed, "{name}: sync {fail_at} was never reached");
            assert!(disk.stats().latched.is_some());
            disk.close()
                .expect_err("a latched disk does not close clean");
            // Nothing was mended or released behind the failure: the image opens, marked in use.
            let again = bench.open(&parts).expect("it opens");
            let mut bytes = vec![0; again.size_bytes() as usize];
            again
                .read_at(DiskOffset::ZERO, &mut bytes)
                .expect("it reads");
        }
    }
}
