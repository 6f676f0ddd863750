//! Images by themselves, merged in memory and cut at every operation.

use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::net::{shown, sound};
use crate::sim::directory::{Names, SimDirectory};
use crate::sim::media::Media;
use crate::sim::storage::{Manners, SimStorage, World};
use crate::stopping::Stopping;
use ploopfs::admin::create::Ids;
use ploopfs::admin::merge::Merge;
use ploopfs::admin::merge::loose::{Wish, session};
use ploopfs::admin::progress::Progress;
use ploopfs::delta::image::Image;
use ploopfs::error::{ErrorKind, Result};
use ploopfs::format::guid::Guid;
use ploopfs::storage::{Directory, SharedStorage};
use ploopfs::units::ClusterSize;
use std::path::Path;
use std::sync::Arc;

const CLUSTER: usize = 4096;
const MARK: std::ops::Range<usize> = 0x2c..0x30;

/// Images, the lowest first.
struct Case {
    name: String,
    files: Vec<Vec<u8>>,
    /// What they show over one another.
    disk: Vec<u8>,
    /// What the lowest shows by itself.
    own: Vec<u8>,
    /// An image holds data behind the end of the disk, and that may go.
    force: bool,
}

fn is_plain(file: &[u8]) -> bool {
    !file.starts_with(b"Witho")
}

fn forged(spec: &ImageSpec) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    spec.write(&path).expect("an image");
    std::fs::read(path).expect("its bytes")
}

fn level(version: u8, level: u16, sectors: u64, percent: u64) -> Vec<u8> {
    let mut spec = ImageSpec::new(version, 8, sectors).mapping(Mapped::Percent(percent));
    spec.level = level;
    spec.seed = 7 + u64::from(level);
    spec.layout = Layout::Shuffled(3);
    spec.garbage = true;
    forged(&spec)
}

fn plain(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 512 % 251) as u8 + 1).collect()
}

/// All sizes and kinds that meet; ends are where they cut a cluster.
fn cases() -> Vec<Case> {
    let case = |name: &str, files: Vec<Vec<u8>>| Case {
        name: name.to_owned(),
        disk: flat(&files),
        own: flat(&files[..1]),
        files,
        force: false,
    };
    let losing = |name: &str, files| Case {
        force: true,
        ..case(name, files)
    };
    let mut cases = Vec::new();
    for (lower, upper) in [(1, 1), (2, 2), (1, 2), (2, 1)] {
        let name = format!("version {upper} into {lower}");
        let files = vec![level(lower, 0, 237, 50), level(upper, 1, 237, 60)];
        cases.push(case(&name, files));
    }
    let three = |sectors: [u64; 3]| {
        let numbers = sectors.into_iter().zip(0..);
        numbers
            .map(|(sectors, n)| level(2, n, sectors, 60))
            .collect::<Vec<_>>()
    };
    cases.extend([
        case("each larger", three([205, 222, 237])),
        case("larger by a table", three([205, 222, 8 * 1100])),
        case("a smaller one between", three([237, 205, 237])),
        // The cluster that the ends lie in comes from the first, the second or both.
        losing("a larger lower one", three([320, 203, 205])),
        losing(
            "a larger lower one, two ends in a cluster",
            three([207, 201, 205]),
        ),
        losing("a larger lower one, equal ends", three([320, 205, 205])),
        case("a larger lower one, empty behind the end", empty_behind()),
        case(
            "over a plain one",
            vec![plain(237 * 512), level(2, 1, 237, 60)],
        ),
        case(
            "over a plain one of odd length",
            vec![plain(50_001), level(2, 1, 237, 60)],
        ),
        losing(
            "two over a longer plain one",
            vec![plain(130_001), level(1, 1, 203, 70), level(1, 2, 205, 30)],
        ),
    ]);
    let ends = [level(2, 0, 320, 100), end(201), end(205)];
    cases.push(losing(
        "the upper of two has no end",
        vec![ends[0].clone(), ends[1].clone(), level(2, 2, 205, 0)],
    ));
    cases.push(losing("both have an end", ends.to_vec()));
    let mut zeros = plain(130_001);
    zeros[205 * 512..].fill(0);
    cases.push(case(
        "over a plain one with zeros behind the end",
        vec![zeros, level(1, 1, 205, 70)],
    ));
    cases
}

/// Only the cluster that the end of the disk lies in.
fn end(sectors: u64) -> Vec<u8> {
    let last = (sectors - 1) / 8;
    let mut spec = ImageSpec::new(2, 8, sectors).mapping(Mapped::List(vec![last]));
    spec.level = 1;
    spec.garbage = true;
    forged(&spec)
}

/// The lowest has clusters up to the last before the end, and that one is a hole.
fn empty_behind() -> Vec<Vec<u8>> {
    let mut spec = ImageSpec::new(2, 8, 320).mapping(Mapped::List((0..25).step_by(2).collect()));
    spec.layout = Layout::Shuffled(3);
    spec.garbage = true;
    vec![forged(&spec), level(2, 1, 203, 60), level(2, 2, 205, 60)]
}

fn images(files: &[Arc<SimStorage>]) -> Result<Vec<Image>> {
    let shared = files
        .iter()
        .map(|file| -> SharedStorage { Arc::<SimStorage>::clone(file) });
    shared.enumerate().map(|(n, file)| image(n, file)).collect()
}

fn image(number: usize, storage: SharedStorage) -> Result<Image> {
    let mut start = [0; 5];
    storage.read_at(ploopfs::units::FileOffset::ZERO, &mut start)?;
    let path = format!("{number}.hds");
    match &start {
        b"Witho" => Image::expanding(Path::new(&path), storage),
        _ => Image::plain(Path::new(&path), storage),
    }
}

fn run(lower: &Image, uppers: &[Image], force: bool, progress: &Progress) -> Result<()> {
    let is_large = uppers.iter().any(|image| image.disk_len() > 1 << 20);
    let merge = Merge {
        lower,
        uppers,
        cluster: ClusterSize::from_sectors(8).expect("a size"),
        window: if is_large { 500 } else { 5 },
        force_discard: force,
    };
    merge.examine()?;
    merge.carry_out(progress)
}

/// What images over one another show, as bytes.
fn flat(files: &[Vec<u8>]) -> Vec<u8> {
    if let [only] = files {
        if is_plain(only) {
            return only.clone();
        }
    }
    let disk = shown(files);
    let mut bytes = vec![0; disk.sectors as usize * 512];
    for (cluster, data) in disk.clusters {
        let at = cluster as usize * CLUSTER;
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    bytes
}

impl Case {
    fn open(&self, world: &Arc<World>) -> Vec<Arc<SimStorage>> {
        let all = 0..self.files.len();
        all.map(|number| world.open(number, number == 0)).collect()
    }

    /// Of a large disk, for which every look takes long, so many moments are one.
    fn stride(&self) -> usize {
        if self.disk.len() > 1 << 20 { 9 } else { 1 }
    }

    fn run(&self, world: &Arc<World>) -> Result<()> {
        let mut images = images(&self.open(world))?;
        let lower = images.remove(0);
        run(&lower, &images, self.force, &Progress::default())
    }

    /// What the lowest shows by itself in the end: the disk. A plain file that was longer ends with
    /// the disk's last cluster.
    fn wanted(&self) -> Vec<u8> {
        let mut disk = self.disk.clone();
        if is_plain(&self.files[0]) {
            let whole = disk.len().next_multiple_of(CLUSTER);
            disk.resize(self.own.len().clamp(disk.len(), whole), 0);
        }
        disk
    }

    fn judge(&self, files: &[Vec<u8>]) -> std::result::Result<(), String> {
        if files[1..] != self.files[1..] {
            return Err("an upper image was changed".into());
        }
        let lower = &files[0];
        if flat(files) != self.disk {
            return Err("the disk is another".into());
        }
        if !is_plain(lower) {
            sound(lower)?;
            let own = flat(&files[..1]);
            let is_closed = lower[MARK] == [0; 4] && lower[64..] != self.files[0][64..];
            // A longer table is a step of its own, after which the image is closed.
            let mut grown = self.own.clone();
            grown.resize(own.len(), 0);
            if is_closed && own != self.wanted() && own != grown {
                return Err("half merged, and not marked".into());
            }
        }
        let world = World::new(files.to_vec(), Manners::default(), false);
        self.run(&world).map_err(|e| format!("repeated: {e}"))?;
        self.is_merged(&world.files())
    }

    fn is_merged(&self, files: &[Vec<u8>]) -> std::result::Result<(), String> {
        let (own, wanted) = (flat(&files[..1]), self.wanted());
        if own != wanted {
            let at = own.iter().zip(&wanted).position(|(a, b)| a != b);
            let lens = (own.len(), wanted.len());
            return Err(format!(
                "merged, it shows something else at {at:?}, {lens:?}"
            ));
        }
        if !is_plain(&files[0]) {
            sound(&files[0])?;
            if files[0][MARK] != [0; 4] {
                return Err("merged, it is not closed".into());
            }
        }
        Ok(())
    }
}

pub(crate) fn every_byte_is_where_it_was() {
    for case in cases() {
        for poor_host in [false, true] {
            let manners = Manners {
                poor_host,
                ..Manners::default()
            };
            let world = World::new(case.files.clone(), manners, false);
            case.run(&world)
                .unwrap_or_else(|e| panic!("{}: {e}", case.name));
            let merged = case.is_merged(&world.files());
            merged.unwrap_or_else(|why| panic!("{}: {why}", case.name));
        }
    }
}

/// Nothing is lost without a word, however the images are merged; nothing is changed then.
pub(crate) fn nothing_behind_the_end_is_lost_unasked() {
    let mut refused = 0;
    for mut case in cases() {
        let loses = std::mem::take(&mut case.force);
        for is_new in [false, true] {
            let world = World::new(case.files.clone(), Manners::default(), true);
            let names = (0..case.files.len()).map(|n| (format!("{n}.hds"), n));
            world.set_names(names.collect());
            let done = match is_new {
                true => into_new(&case, &world),
                false => case.run(&world),
            };
            assert_eq!(done.is_err(), loses, "{}: {done:?}", case.name);
            let Err(error) = done else {
                continue;
            };
            refused += 1;
            assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
            let fix = error.fix_text().unwrap_or_default().to_owned();
            assert!(fix.contains("--force-discard"), "{error}: {fix}");
            assert!(world.log().is_empty(), "{}: something was done", case.name);
        }
    }
    assert_eq!(refused, 12);
}

/// A merge that may lose what is behind the end, repeated without that word after a power cut, is
/// completed, or refused and leaves all as it is; once the lowest is shorter, nothing refuses what
/// that held.
pub(crate) fn what_was_begun_by_force_needs_none() {
    let (mut completed, mut refused) = (0, 0);
    for mut case in cases().into_iter().filter(|case| case.force) {
        let world = World::new(case.files.clone(), Manners::default(), true);
        case.run(&world).expect("it may");
        case.force = false;
        let mut media = Media::new(&case.files, Names::new());
        let mut dice = 3;
        for event in &world.log() {
            if !media.take(event) {
                continue;
            }
            let (files, _) = media.after_cut(&mut dice);
            let world = World::new(files.clone(), Manners::default(), false);
            match case.run(&world) {
                Ok(()) => {
                    completed += 1;
                    let merged = case.is_merged(&world.files());
                    merged.unwrap_or_else(|why| panic!("{}: {why}", case.name));
                }
                Err(error) => {
                    refused += 1;
                    assert!(world.files() == files, "{}: {error}", case.name);
                    let lower = flat(&files[..1]).len();
                    let held = error.to_string().contains("0.hds");
                    assert!(!held || lower > case.disk.len(), "{}: {error}", case.name);
                }
            }
        }
    }
    assert!(completed > 100 && refused > 20, "{completed}, {refused}");
}

pub(crate) fn the_power_may_fail() {
    let mut states = 0;
    for case in cases() {
        let world = World::new(case.files.clone(), Manners::default(), true);
        case.run(&world)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let mut media = Media::new(&case.files, Names::new());
        let mut dice = 9;
        for (now, event) in world.log().iter().enumerate() {
            if !media.take(event) || now % case.stride() != 0 {
                continue;
            }
            let mut last = Vec::new();
            for _ in 0..2 {
                let (files, _) = media.after_cut(&mut dice);
                if files == last {
                    continue;
                }
                last.clone_from(&files);
                states += 1;
                case.judge(&files)
                    .unwrap_or_else(|why| panic!("{}: event {now}: {why}", case.name));
            }
        }
    }
    println!("{states} states");
    assert!(states > 200, "only {states} states");
}

/// With a descriptor around it the lower image is closed; by itself nothing but its mark tells
/// that it is half merged.
pub(crate) fn the_user_may_stop_it() {
    let mut stopped = 0;
    for case in cases() {
        for is_loose in [false, true] {
            // Of many, not each: what is between two looks at the wish is the same.
            for changes in (0..20).chain((20..10_000).step_by(7 * case.stride())) {
                let what = format!("{}, loose: {is_loose}, {changes}", case.name);
                match stop(&case, is_loose, changes, &what) {
                    true => stopped += 1,
                    false => break,
                }
            }
        }
    }
    assert!(stopped > 100, "{stopped}");
}

/// Whether it was stopped.
fn stop(case: &Case, is_loose: bool, changes: u64, what: &str) -> bool {
    let world = World::new(case.files.clone(), Manners::default(), false);
    let files = case.open(&world);
    let lowest = Stopping::new(files[0].clone(), changes);
    let progress = Arc::clone(&lowest.progress);
    let mut images = images(&files).expect("forged");
    images[0] = image(0, Arc::new(lowest)).expect("forged");
    let done = if is_loose {
        let wish = Wish {
            force_discard: case.force,
            ..Wish::default()
        };
        match session(&wish, images, Vec::new()) {
            Ok(session) => session.merge(&progress).map(drop),
            // A larger lower one is taken for the wrong order.
            Err(_) => return false,
        }
    } else {
        let lower = images.remove(0);
        run(&lower, &images, case.force, &progress)
    };
    let now = world.files();
    assert!(flat(&now) == case.disk, "{what}: another disk");
    if !is_plain(&now[0]) {
        let is_closed = now[0][MARK] == [0; 4];
        assert!(is_closed || is_loose, "{what}: not closed");
        let (own, mut old) = (flat(&now[..1]), case.own.clone());
        old.resize(own.len(), 0);
        let is_old = own == old;
        let is_half = done.is_err() && !is_old && own != case.wanted();
        assert!(
            !(is_half && is_closed && is_loose),
            "{what}: half merged, and closed"
        );
    }
    let Err(error) = done else {
        return false;
    };
    assert_eq!(error.kind(), ErrorKind::Interrupted, "{what}");
    let world = World::new(now, Manners::default(), false);
    case.run(&world).unwrap_or_else(|e| panic!("{what}: {e}"));
    let merged = case.is_merged(&world.files());
    merged.unwrap_or_else(|why| panic!("{what}: {why}"));
    true
}

/// Into a new file: the images stay as they are at any moment, and the new name leads to a whole
/// and closed image or to none.
pub(crate) fn new_files_are_whole_or_absent() {
    let mut states = 0;
    for case in cases() {
        let names = (0..case.files.len()).map(|n| (format!("{n}.hds"), n));
        let names: Names = names.collect();
        let world = World::new(case.files.clone(), Manners::default(), true);
        world.set_names(names.clone());
        into_new(&case, &world).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let disk = case.disk.clone();
        let count = case.files.len();
        let expect = |files: &[Vec<u8>], names: &Names, what: &str| {
            assert!(files[..count] == case.files, "{what}: an image was changed");
            let Some(new) = names.get("new.hds") else {
                return false;
            };
            let new = &files[*new];
            assert!(new[MARK] == [0; 4], "{what}: not closed");
            sound(new).unwrap_or_else(|why| panic!("{what}: {why}"));
            assert!(
                flat(std::slice::from_ref(new)) == disk,
                "{what}: another disk"
            );
            true
        };
        assert!(expect(&world.files(), &world.names(), &case.name));
        let mut media = Media::new(&case.files, names);
        let mut dice = 5;
        for (now, event) in world.log().iter().enumerate() {
            if !media.take(event) {
                continue;
            }
            if now % case.stride() != 0 {
                continue;
            }
            let what = format!("{}: event {now}", case.name);
            let (files, names) = media.after_cut(&mut dice);
            states += 1;
            if !expect(&files, &names, &what) {
                let world = World::new(files, Manners::default(), false);
                world.set_names(names);
                into_new(&case, &world).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(expect(&world.files(), &world.names(), &what));
            }
        }
    }
    assert!(states > 200, "{states}");
}

fn into_new(case: &Case, world: &Arc<World>) -> Result<()> {
    let directory = SimDirectory::new(world);
    let open = |n: usize| directory.open(&format!("{n}.hds"), false);
    let images = (0..case.files.len()).map(|n| image(n, open(n)?));
    let wish = Wish {
        into_new: Some("new.hds".into()),
        force_discard: case.force,
        ..Wish::default()
    };
    let session = session(&wish, images.collect::<Result<_>>()?, Vec::new())?;
    session.plan()?;
    let ids = Ids {
        // Of a cut attempt the temporary name is left.
        temporary: format!("{:08}", directory.entries()?.len()),
        uid: Guid::NONE,
    };
    session.into_new(&directory, "new.hds", &ids, &Progress::default())
}
