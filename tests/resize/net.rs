//! Cuts the power after every operation of a command on images, and judges what is left.

use crate::forge::image::ImageSpec;
use crate::sim::directory::Names;
use crate::sim::faults::Fault;
use crate::sim::media::Media;
use crate::sim::storage::{Event, Kind, Manners, SimStorage, World};
use ploopfs::admin::check::check_image;
use ploopfs::admin::progress::Progress;
use ploopfs::delta::image::Image;
use ploopfs::error::{ErrorKind, Result};
use ploopfs::plan::repair::Severity;
use ploopfs::storage::SharedStorage;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Where the in-use mark is in a header.
const MARK: std::ops::Range<usize> = 0x2c..0x30;

/// A disk: its size in sectors, and its clusters that are not all zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) sectors: u64,
    pub(crate) clusters: BTreeMap<u64, Vec<u8>>,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
    u64::from(u32::from_le_bytes(four.unwrap_or_default()))
}

/// Bytes of a disk cluster as one level has it, as far as it has it.
fn piece(file: &[u8], cluster: u64, size: u64) -> Option<Vec<u8>> {
    let (entry_unit, sectors) = match &file[..16] {
        b"WithoutFreeSpace" => (512, word(file, 36)),
        b"WithouFreSpacExt" => (size, word(file, 36) | word(file, 40) << 32),
        _ => {
            let start = (cluster * size).min(file.len() as u64);
            let end = (start + size).min(file.len() as u64);
            return (start < end).then(|| file[start as usize..end as usize].to_vec());
        }
    };
    let end = (sectors * 512).saturating_sub(cluster * size).min(size);
    if end == 0 {
        return None;
    }
    let entry = word(file, 64 + 4 * cluster as usize);
    let start = (entry * entry_unit) as usize;
    let mut bytes = vec![0; end as usize];
    if entry == 0 {
        return None;
    }
    // Past the end there is nothing; the check complains of such an entry.
    let there = file.get(start..).unwrap_or_default();
    let len = there.len().min(bytes.len());
    bytes[..len].copy_from_slice(&there[..len]);
    Some(bytes)
}

/// What a chain shows, base first.
pub(crate) fn shown(files: &[Vec<u8>]) -> Disk {
    let top = files.last().expect("a chain has files");
    let size = word(top, 28) * 512;
    let sectors = match &top[..16] {
        b"WithoutFreeSpace" => word(top, 36),
        _ => word(top, 36) | word(top, 40) << 32,
    };
    let mut disk = Disk {
        sectors,
        ..Disk::default()
    };
    for cluster in 0..(sectors * 512).div_ceil(size) {
        let whole = (sectors * 512 - cluster * size).min(size) as usize;
        let found = files
            .iter()
            .rev()
            .find_map(|file| piece(file, cluster, size));
        let mut bytes = found.unwrap_or_default();
        bytes.resize(whole, 0);
        if bytes.iter().any(|byte| *byte != 0) {
            disk.clusters.insert(cluster, bytes);
        }
    }
    disk
}

/// The bytes of a forged image.
pub(crate) fn forged(spec: &ImageSpec) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    spec.write(&path).expect("an image");
    std::fs::read(path).expect("its bytes")
}

/// The levels below the top.
pub(crate) fn levels(files: &[Arc<SimStorage>]) -> Result<Vec<Image>> {
    let below = &files[..files.len() - 1];
    let open = |file: &Arc<SimStorage>| {
        let storage: SharedStorage = Arc::<SimStorage>::clone(file);
        Image::expanding(Path::new("lower"), storage)
    };
    below.iter().map(open).collect()
}

/// What is done to the files of a chain, base first.
pub(crate) type Act = dyn Fn(&[Arc<SimStorage>]) -> Result<()> + Sync;

/// A chain, and what is done to its top.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) files: Vec<Vec<u8>>,
    /// Clusters from here on may be lost at any moment.
    pub(crate) spare: u64,
    pub(crate) act: Box<Act>,
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) states: u64,
    pub(crate) complaints: Vec<String>,
}

impl Case {
    fn run(&self, world: &Arc<World>) -> Result<()> {
        let last = self.files.len() - 1;
        let open = |number| world.open(number, number == last);
        let files: Vec<_> = (0..=last).map(open).collect();
        (self.act)(&files)
    }

    fn top(&self) -> &[u8] {
        self.files.last().expect("a chain has files")
    }

    /// Runs `act`, which was told to stop before it began: it must say so, and leave the disk as it
    /// was, closed and sound.
    pub(crate) fn stopped(&self, act: impl FnOnce(&[Arc<SimStorage>], &Progress) -> Result<()>) {
        let world = World::new(self.files.clone(), Manners::default(), false);
        let last = self.files.len() - 1;
        let files: Vec<_> = (0..=last).map(|n| world.open(n, n == last)).collect();
        let (name, progress) = (self.name, Progress::default());
        progress.cancel();
        let error = act(&files, &progress).expect_err("it was stopped");
        assert_eq!(error.kind(), ErrorKind::Interrupted, "{name}");
        let now = world.files();
        assert_eq!(now[last][MARK], [0; 4], "{name}: closed");
        assert_eq!(shown(&self.files), shown(&now), "{name}");
        sound(&now[last]).unwrap_or_else(|why| panic!("{name}: {why}"));
    }

    /// The files after an undisturbed run.
    pub(crate) fn good(&self) -> Vec<Vec<u8>> {
        let world = World::new(self.files.clone(), Manners::default(), false);
        self.run(&world)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name));
        world.files()
    }

    /// Cuts the power at every moment, so often each time.
    pub(crate) fn cuts(&self, states: u64, poor_host: bool) -> Found {
        let manners = Manners {
            poor_host,
            ..Manners::default()
        };
        let world = World::new(self.files.clone(), manners, true);
        let mut found = Found::default();
        if let Err(error) = self.run(&world) {
            found.complaints.push(format!("{}: {error}", self.name));
            return found;
        }
        self.replay(&world.log(), &world.files(), states, &mut found);
        found
    }

    fn replay(&self, log: &[Event], good: &[Vec<u8>], states: u64, found: &mut Found) {
        let mut media = Media::new(&self.files, Names::new());
        let mut dice = 5;
        for (now, event) in log.iter().enumerate() {
            if !media.take(event) {
                continue;
            }
            let mut last = Vec::new();
            for _ in 0..states {
                let (files, _) = media.after_cut(&mut dice);
                if files == last {
                    continue;
                }
                last.clone_from(&files);
                found.states += 1;
                if let Err(why) = self.judge(files, good) {
                    let name = self.name;
                    found.complaints.push(format!("{name}: event {now}: {why}"));
                }
            }
            if found.complaints.len() > 3 {
                return;
            }
        }
    }

    fn judge(&self, files: Vec<Vec<u8>>, good: &[Vec<u8>]) -> std::result::Result<(), String> {
        let top = files.last().expect("a chain has files");
        let done = good.last().expect("a chain has files");
        if top[MARK] == [0; 4] && top[64..] != self.top()[64..] && top[64..] != done[64..] {
            return Err("changed, and not marked as in use".to_owned());
        }
        sound(top)?;
        self.shows_one_of_two(&files, good)?;
        let world = World::new(files, Manners::default(), false);
        self.run(&world).map_err(|e| format!("repeated: {e}"))?;
        if world.files() != *good {
            return Err("repeated, it ends otherwise".to_owned());
        }
        Ok(())
    }

    fn shows_one_of_two(
        &self,
        files: &[Vec<u8>],
        good: &[Vec<u8>],
    ) -> std::result::Result<(), String> {
        let now = shown(files);
        let (before, after) = (shown(&self.files), shown(good));
        if now == after {
            return Ok(());
        }
        if now.sectors != before.sectors {
            return Err(format!("{} sectors: neither size", now.sectors));
        }
        for cluster in 0..self.spare.min(before.sectors) {
            if now.clusters.get(&cluster) != before.clusters.get(&cluster) {
                return Err(format!("cluster {cluster} is another"));
            }
        }
        let spare = now.clusters.range(self.spare..);
        for (cluster, bytes) in spare {
            // Discarded in part.
            let old = before.clusters.get(cluster);
            if old != Some(bytes) {
                return Err(format!("cluster {cluster} came up"));
            }
        }
        Ok(())
    }

    /// Lets each operation fail, and goes on from what is then there.
    pub(crate) fn faults(&self) -> Found {
        let good = self.good();
        let mut found = Found::default();
        let quiet = World::new(self.files.clone(), Manners::default(), true);
        self.run(&quiet).expect("nothing fails");
        let kinds = [
            Kind::Write,
            Kind::Sync,
            Kind::SetLen,
            Kind::Zero,
            Kind::Copy,
            Kind::Read,
        ];
        for (kind, count) in quiet.counts() {
            for nth in 0..count {
                if !kinds.contains(&kind) {
                    continue;
                }
                let fault = Fault {
                    kind,
                    nth,
                    errno: if kind == Kind::Sync {
                        libc::EIO
                    } else {
                        libc::ENOSPC
                    },
                    for_ever: false,
                };
                let manners = Manners {
                    fault: Some(fault),
                    ..Manners::default()
                };
                let world = World::new(self.files.clone(), manners, true);
                let what = format!("{}: {kind:?} {nth} fails", self.name);
                if self.run(&world).is_ok() && world.failures().count > 0 {
                    found.complaints.push(format!("{what}, and nobody says so"));
                }
                let mut media = Media::new(&self.files, Names::new());
                for event in &world.log() {
                    media.take(event);
                }
                let mut dice = nth + 1;
                for _ in 0..2 {
                    found.states += 1;
                    let (files, _) = media.after_cut(&mut dice);
                    if let Err(why) = self.judge(files, &good) {
                        found.complaints.push(format!("{what}: {why}"));
                    }
                }
            }
        }
        found
    }
}

/// Nothing is wrong with an image but its mark and wasted space, and as long as it has the mark,
/// the old entries behind those of a table that is becoming shorter.
pub(crate) fn sound(top: &[u8]) -> std::result::Result<(), String> {
    let world = World::new(vec![top.to_vec()], Manners::default(), false);
    let found = check_image(&*world.open(0, false)).map_err(|e| e.to_string())?;
    let allowed: &[&str] = match top[MARK] == [0; 4] {
        true => &[],
        false => &["in-use", "stray-slots"],
    };
    let bad = found.report.findings.iter().find(|finding| {
        finding.severity == Severity::Corrupt && !allowed.contains(&finding.trouble.word())
    });
    match bad {
        Some(finding) => Err(format!("a check finds {}", finding.trouble.word())),
        None => Ok(()),
    }
}
