//! `Disk` against a flat `Vec<u8>`: random operations on every kind of disk, with reopening.
//!
//! The disk must read like the vector after every operation, and after each close the files must
//! satisfy the strict checker, read the same through the independent reader of the forge, and have
//! left all lower deltas as they were. A failing seed repeats with `PLOOPFS_SEED=N`; the number of
//! operations is `PLOOPFS_OPERATIONS` (default one million over all disks).

#[path = "../tools/forge/mod.rs"]
mod forge;

use forge::bundle::{BundleSpec, Style};
use forge::content::{Level, splitmix};
use forge::image::{ImageSpec, Layout, Mapped};
use forge::reader;
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, DoneReply, ReadReply};
use ploopfs::error::{ErrorKind, Result};
use ploopfs::units::DiskOffset;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use tempfile::TempDir;

const OPERATIONS: u64 = 1_000_000;

/// The operations of one run; all randomness comes from here.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        splitmix(&mut self.0) % bound.max(1)
    }

    /// A range of the disk: often aligned, often small, sometimes large, sometimes at the end.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let unit = [1, 512, 4096, 32768][self.below(4) as usize];
        let longest = [4096, 16384, 70_000, 300_000][self.below(4) as usize];
        let len = (self.below(longest) / unit * unit).clamp(1, size);
        let start = match self.below(8) {
            0 => size - len,
            _ => self.below(size - len + 1) / unit * unit,
        };
        (start, len.min(size - start))
    }
}

struct Case {
    name: &'static str,
    spec: BundleSpec,
    options: DiskOptions,
}

fn image(version: u8, cluster: u32, sectors: u64, mapped: Mapped) -> ImageSpec {
    ImageSpec::new(version, cluster, sectors).mapping(mapped)
}

fn chain_over_plain() -> BundleSpec {
    let sectors = 4097;
    let plain = Level::Plain {
        seed: 3,
        level: 0,
        bytes: 1_234_567,
    };
    let mut levels = vec![plain];
    for percent in [20, 30, 10] {
        let mut level = image(
            2,
            64,
            sectors - 64 * (3 - levels.len() as u64),
            Mapped::Percent(percent),
        );
        level.garbage = true;
        level.seed = 40 + percent;
        levels.push(Level::Image(level));
    }
    levels.push(Level::Image(image(2, 64, sectors, Mapped::Nothing)));
    BundleSpec::new(Style::Ploop, levels)
}

fn split() -> BundleSpec {
    let first = image(1, 8, 1001, Mapped::Percent(40));
    let mut spec = BundleSpec::new(Style::Parallels, vec![Level::Image(first)]);
    spec.push_part(vec![Level::Image(image(
        2,
        64,
        2050,
        Mapped::Every { step: 3, phase: 1 },
    ))]);
    spec.push_part(vec![Level::Image(image(1, 128, 999, Mapped::All))]);
    spec
}

fn deep() -> BundleSpec {
    let like = image(1, 8, 3000, Mapped::Percent(6));
    BundleSpec::chain(Style::Parallels, &like, 40, |number, image| {
        image.seed = number as u64;
    })
}

fn cases() -> Vec<Case> {
    let usual = DiskOptions {
        pool_threads: 2,
        flush_interval_ms: 100,
        ..DiskOptions::default()
    };
    let tiny = DiskOptions {
        bat_cache: 1,
        grow_step: 1,
        ..usual.clone()
    };
    let pooled = DiskOptions {
        inline_order: 0,
        ..usual.clone()
    };
    let one = |image: ImageSpec| BundleSpec::new(Style::Ploop, vec![Level::Image(image)]);
    let case = |name, spec, options: &DiskOptions| Case {
        name,
        spec,
        options: options.clone(),
    };
    let mut gaps = image(2, 128, 4096, Mapped::Percent(50));
    gaps.layout = Layout::Gaps(2);
    let mut shuffled = image(1, 64, 4000, Mapped::All);
    shuffled.layout = Layout::Shuffled(5);
    let plain = Level::Plain {
        seed: 9,
        level: 0,
        bytes: 2_000_384,
    };
    vec![
        case("v2 empty", one(image(2, 64, 4096, Mapped::Nothing)), &usual),
        case(
            "v1 with odd size",
            one(image(1, 8, 8193, Mapped::Percent(50))),
            &usual,
        ),
        case(
            "v1 with one page of map",
            one(image(1, 8, 33_000, Mapped::Percent(3))),
            &tiny,
        ),
        case("v2 with gaps, all pooled", one(gaps), &pooled),
        case("v1 full and shuffled", one(shuffled), &usual),
        case("chain over a plain base", chain_over_plain(), &usual),
        case("chain with one page of map", chain_over_plain(), &tiny),
        case("forty deltas", deep(), &usual),
        case("split", split(), &usual),
        case(
            "split, all pooled, tiny",
            split(),
            &DiskOptions {
                inline_order: 0,
                ..tiny.clone()
            },
        ),
        case(
            "plain",
            BundleSpec::new(Style::Parallels, vec![plain]),
            &usual,
        ),
    ]
}

struct Answer<T>(Sender<T>);

impl ReadReply for Answer<Result<Vec<u8>>> {
    fn done(self, result: Result<&[u8]>) {
        self.0
            .send(result.map(<[u8]>::to_vec))
            .expect("the caller waits");
    }
}

impl DoneReply for Answer<Result<()>> {
    fn done(self, result: Result<()>) {
        self.0.send(result).expect("the caller waits");
    }
}

/// The disk under test, used as the transport uses it.
struct Tested {
    disk: Arc<Disk>,
    buf: Vec<u8>,
}

impl Tested {
    fn open(path: &Path, options: &DiskOptions) -> Self {
        let selection = Selection {
            write: !options.read_only,
            ..Selection::default()
        };
        let images = bundle::open(path, &selection).expect("the bundle opens");
        let (disk, _) = disk::open(Arc::new(images), options).expect("the disk opens");
        Self {
            disk,
            buf: vec![0; 1 << 20],
        }
    }

    fn read(&mut self, at: u64, len: u64) -> Vec<u8> {
        let (sender, receiver) = channel();
        let len = len as usize;
        self.disk
            .read(DiskOffset::new(at), len, &mut self.buf, Answer(sender));
        receiver.recv().expect("an answer").expect("reads succeed")
    }

    fn write(&self, at: u64, data: &[u8]) {
        let (sender, receiver) = channel::<Result<()>>();
        self.disk.write(DiskOffset::new(at), data, Answer(sender));
        receiver.recv().expect("an answer").expect("writes succeed");
    }

    fn zero(&self, at: u64, len: u64) {
        let (sender, receiver) = channel::<Result<()>>();
        self.disk.zero(DiskOffset::new(at), len, Answer(sender));
        receiver
            .recv()
            .expect("an answer")
            .expect("zeroing succeeds");
    }

    fn flush(&self) {
        let (sender, receiver) = channel::<Result<()>>();
        self.disk.flush(Answer(sender));
        receiver
            .recv()
            .expect("an answer")
            .expect("flushes succeed");
    }
}

fn lower_files(case: &Case, dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let parts = 0..case.spec.parts.len();
    let lower = parts.flat_map(|part| {
        let mut files = case.spec.files(dir, part);
        files.pop();
        files
    });
    lower
        .map(|path| (path.clone(), std::fs::read(path).expect("a lower file")))
        .collect()
}

fn check_files(case: &Case, dir: &Path, model: &[u8], lower: &[(PathBuf, Vec<u8>)], seed: u64) {
    let story = |what: &str| format!("{}: {what}, seed {seed}", case.name);
    for (path, before) in lower {
        assert!(
            std::fs::read(path).expect("a lower file") == *before,
            "{}",
            story("lower changed")
        );
    }
    for part in 0..case.spec.parts.len() {
        let files = case.spec.files(dir, part);
        let top = files.last().expect("a top");
        if matches!(
            case.spec.parts[part].levels.last(),
            Some(Level::Plain { .. })
        ) {
            continue;
        }
        let faults = reader::check(top).expect("the checker runs");
        assert!(faults.is_empty(), "{}: {faults:?}", story("strict check"));
    }
    let flat = reader::Flat::open(dir).expect("the reader opens");
    let bytes = flat.read(0, model.len()).expect("the reader reads");
    assert!(
        bytes == model,
        "{}",
        story("the independent reader sees something else")
    );
}

/// In memory where possible: this is about the answers, and there are many syncs.
fn memory() -> TempDir {
    let home = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    home.expect("a directory")
}

fn run(case: &Case, home: &TempDir, seed: u64, operations: u64) {
    let dir = home.path().join("disk.hdd");
    case.spec.write(&dir).expect("the bundle is forged");
    let lower = lower_files(case, &dir);
    let forged = case.spec.model();
    let mut model = forged.read(0, forged.bytes() as usize);
    let size = model.len() as u64;
    let mut dice = Dice(seed);
    let mut tested = Tested::open(&dir, &case.options);
    assert_eq!(tested.disk.size_bytes(), size, "{}", case.name);
    for step in 0..operations {
        let (at, len) = dice.range(size);
        let range = at as usize..(at + len) as usize;
        match dice.below(1000) {
            0 => {
                tested.disk.close().expect("the disk closes");
                check_files(case, &dir, &model, &lower, seed);
                tested = Tested::open(&dir, &case.options);
            }
            1..10 => tested.flush(),
            10..150 => {
                tested.zero(at, len);
                model[range].fill(0);
            }
            150..160 => {
                tested.write(at, &vec![0; len as usize]);
                model[range].fill(0);
            }
            160..600 => {
                let fill = (dice.below(255) + 1) as u8;
                model[range.clone()].fill(fill);
                let first = at as usize;
                model[first..first + 8.min(len as usize)]
                    .copy_from_slice(&step.to_le_bytes()[..8.min(len as usize)]);
                tested.write(at, &model[range]);
            }
            _ => {
                let found = tested.read(at, len);
                assert!(
                    found == model[range],
                    "{}: at {at}+{len}, step {step}, seed {seed}",
                    case.name
                );
            }
        }
    }
    let all = tested.read(0, size);
    let whole = all.len().min(model.len());
    assert!(
        all[..whole] == model[..whole],
        "{}: at the end, seed {seed}",
        case.name
    );
    tested.disk.close().expect("the disk closes");
    check_files(case, &dir, &model, &lower, seed);
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn every_kind_of_disk_reads_like_a_flat_vector() {
    let operations = number("PLOOPFS_OPERATIONS").unwrap_or(OPERATIONS);
    let seed = number("PLOOPFS_SEED").unwrap_or(20_240_601);
    let cases = cases();
    let each = operations.div_ceil(cases.len() as u64);
    for case in &cases {
        let begun = std::time::Instant::now();
        run(case, &memory(), seed, each);
        println!("{}: {each} operations in {:?}", case.name, begun.elapsed());
    }
}

/// Why a disk cannot go past the page cache on this host, if so.
fn refusal(case: &Case, home: &TempDir) -> Option<String> {
    let dir = home.path().join("disk.hdd");
    case.spec.write(&dir).expect("the bundle is forged");
    let selection = Selection {
        write: true,
        ..Selection::default()
    };
    let images = bundle::open(&dir, &selection).expect("the bundle opens");
    let error = disk::open(Arc::new(images), &case.options).err()?;
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", case.name);
    Some(error.to_string())
}

/// Where the files are in memory the host tells no size of blocks, and 4 KiB are what all devices
/// take; where they are not, blocks may be smaller.
#[test]
fn a_direct_disk_reads_like_a_flat_vector() {
    let seed = number("PLOOPFS_SEED").unwrap_or(20_240_602);
    let mut cases = cases();
    let options = cases[0].options.clone();
    let plain = Level::Plain {
        seed: 9,
        level: 0,
        bytes: 4096 * 500,
    };
    cases.push(Case {
        name: "plain, of whole blocks",
        spec: BundleSpec::new(Style::Parallels, vec![plain]),
        options,
    });
    for case in &mut cases {
        case.options.direct = true;
    }
    let disk = || tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut direct = 0;
    for (home, each) in [(&memory as &dyn Fn() -> TempDir, 4000), (&disk, 1000)] {
        let mut refused = Vec::new();
        for case in &cases {
            match refusal(case, &home()) {
                None => run(case, &home(), seed, each),
                Some(why) => {
                    println!("skipped: {}: {why}", case.name);
                    refused.push(why);
                }
            }
        }
        let went = cases.len() - refused.len();
        println!("{went} of {} were direct", cases.len());
        let none_can = refused
            .iter()
            .all(|why| why.contains("past the page cache"));
        assert!(
            went > 0 || none_can,
            "refused for other reasons: {refused:?}"
        );
        direct += went;
    }
    let must = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(direct > 0 || !must, "no disk was direct anywhere");
}
