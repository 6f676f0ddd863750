//! The scenes: who meets where, in which order, how often.
//!
//! Imports: `contestants`, `jobs`, `opening`, `report`, `stage`.
//! Never: gives one contestant a place in the order that the others do not get as often.

use crate::contestants::{Contestant, Subject, all_up};
use crate::host::{self, Xfs};
use crate::jobs::{self, Job, Walk};
use crate::opening;
use crate::report::{Report, Unit};
use crate::stage::{Content, Stage, View, shuffle};
use crate::{Bounds, Cli};
use anyhow::{Context, Result};
use std::path::Path;

/// Depths of the chains that are read.
const DEPTHS: [usize; 4] = [1, 8, 64, 253];
/// Bytes of the disks that are made anew for each sample.
const ONCE_BYTES: u64 = 128 << 20;
/// Clusters that are written and synced one by one.
const SYNCS: u64 = 64;

/// Clusters that are copied up, with shared blocks or without.
const REFLINKS: u64 = 4096;

/// A scene as `--scenes` names it.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// All are up together, and every job goes over them in turn.
    Race {
        view: View,
        on_disk: bool,
        is_cold: bool,
        direct: bool,
    },
    /// Each sample has a contestant and a disk of its own.
    Once(&'static [Once]),
    Depth,
    Reflink,
    Open,
}

/// A walk over a new disk.
#[derive(Debug)]
struct Once {
    job: &'static str,
    walk: Walk,
    content: Content,
    on_disk: bool,
}

const fn race(view: View, on_disk: bool, is_cold: bool, direct: bool) -> Kind {
    Kind::Race {
        view,
        on_disk,
        is_cold,
        direct,
    }
}

const fn once(job: &'static str, walk: Walk, content: Content, on_disk: bool) -> Once {
    Once {
        job,
        walk,
        content,
        on_disk,
    }
}

/// All scenes.
pub(crate) const ALL: [Scene; 10] = [
    Scene {
        name: "loop",
        title: "loop device with direct I/O, image cached",
        kind: race(View::Loop, false, false, false),
    },
    Scene {
        name: "file",
        title: "the file itself with O_DIRECT, image cached",
        kind: race(View::File, false, false, false),
    },
    Scene {
        name: "cold",
        title: "loop device, image on disk and not cached",
        kind: race(View::Loop, true, true, false),
    },
    Scene {
        name: "direct",
        title: "loop device, image on disk and opened with O_DIRECT",
        kind: race(View::Loop, true, false, true),
    },
    Scene {
        name: "fresh",
        title: "clusters that get a place, and that lose it",
        kind: Kind::Once(&[
            once(
                "fill, 1 MiB writes, QD 4",
                Walk::Fill,
                Content::Empty,
                false,
            ),
            once(
                "4 KiB into each new cluster",
                Walk::Write,
                Content::Empty,
                false,
            ),
            once(
                "discard of each cluster",
                Walk::Discard,
                Content::Full,
                false,
            ),
        ]),
    },
    Scene {
        name: "sync",
        title: "4 KiB and fsync, image on disk",
        kind: Kind::Once(&[
            once("on mapped clusters", Walk::WriteSync, Content::Full, true),
            once("on new clusters", Walk::WriteSync, Content::Empty, true),
        ]),
    },
    Scene {
        name: "cow",
        title: "4 KiB into each cluster of a lower image",
        kind: Kind::Once(&[once("copy up", Walk::Write, Content::Covered, false)]),
    },
    Scene {
        name: "reflink",
        title: "copy-up of clusters of 1 MiB on one XFS, all of them together",
        kind: Kind::Reflink,
    },
    Scene {
        name: "depth",
        title: "reads of a chain, spread over its levels",
        kind: Kind::Depth,
    },
    Scene {
        name: "open",
        title: "opening",
        kind: Kind::Open,
    },
];

/// True for what the servers of another scene's races cost.
pub(crate) fn is_work(name: &str) -> bool {
    name.ends_with(WORK)
}

/// What follows a scene's name in that of what its servers' requests cost.
const WORK: &str = ", work";

/// What people read of a scene.
pub(crate) fn title(name: &str) -> String {
    let (name, more) = match name.strip_suffix(WORK) {
        Some(name) => (name, "; processor time of the server for a request"),
        None => (name, ""),
    };
    let known = ALL.iter().find(|scene| scene.name == name);
    format!("{}{more}", known.map_or(name, |scene| scene.title))
}

/// One run.
pub(crate) struct Run<'a> {
    pub(crate) cli: &'a Cli,
    pub(crate) bounds: &'a Bounds,
    pub(crate) report: &'a mut Report,
    pub(crate) contestants: Vec<Contestant>,
    /// State of the random numbers.
    pub(crate) random: u64,
    pub(crate) image_dir: &'a Path,
    pub(crate) disk_dir: &'a Path,
}

impl Run<'_> {
    /// Plays a scene.
    pub(crate) fn play(&mut self, scene: &Scene) -> Result<()> {
        eprintln!("== {}: {}", scene.name, scene.title);
        let played = match scene.kind {
            Kind::Race {
                view,
                on_disk,
                is_cold,
                direct,
            } => {
                let stage = Stage {
                    view,
                    direct,
                    ..self.stage(on_disk, Content::Full, self.cli.size << 20)
                };
                self.race(scene.name, &stage, is_cold)
            }
            Kind::Once(list) => self.once(scene.name, list),
            Kind::Depth => self.depth(scene.name),
            Kind::Reflink => self.reflink(scene.name),
            Kind::Open => {
                let rounds = self.rounds(true);
                opening::measure(self.image_dir, rounds, self.bounds, self.report)
            }
        };
        played.with_context(|| format!("scene {}", scene.name))
    }

    /// Samples of a cell; a quick run makes fewer of what is made anew each time.
    fn rounds(&self, is_remade: bool) -> usize {
        if is_remade && self.cli.quick {
            2
        } else {
            self.cli.rounds()
        }
    }

    fn stage(&self, on_disk: bool, content: Content, bytes: u64) -> Stage {
        let dir = if on_disk {
            self.disk_dir
        } else {
            self.image_dir
        };
        Stage {
            dir: dir.to_owned(),
            view: View::Loop,
            content,
            direct: false,
            bytes,
            cluster_sectors: self.cli.cluster,
        }
    }

    /// The contestants that can take part; the report says why others do not.
    fn able(&mut self, scene: &str, stage: &Stage) -> Vec<Contestant> {
        let mut able = Vec::new();
        for contestant in &self.contestants {
            match contestant.obstacle(stage) {
                None => able.push(contestant.clone()),
                Some(why) => self
                    .report
                    .skip(format!("{scene}: {}: {why}", contestant.name)),
            }
        }
        able
    }

    /// The jobs of a race that are wanted.
    fn jobs(&self, is_cold: bool) -> Vec<&'static Job> {
        let wanted = &self.cli.jobs;
        jobs::ALL
            .iter()
            .filter(|job| wanted.is_empty() || wanted.iter().any(|name| name == job.name))
            .filter(|job| !self.cli.quick || job.quick || !wanted.is_empty())
            .filter(|job| !is_cold || job.only_reads())
            .collect()
    }

    fn race(&mut self, scene: &str, stage: &Stage, is_cold: bool) -> Result<()> {
        let jobs = self.jobs(is_cold);
        if jobs.is_empty() {
            return Ok(());
        }
        let able = self.able(scene, stage);
        let both: Vec<_> = able.iter().map(|contestant| (contestant, stage)).collect();
        let subjects = all_up(&both, &mut self.random)?;
        self.rounds_over(scene, &subjects, &jobs, is_cold)
    }

    fn rounds_over(
        &mut self,
        scene: &str,
        subjects: &[Subject],
        jobs: &[&'static Job],
        is_cold: bool,
    ) -> Result<()> {
        let seconds = self.cli.seconds();
        for round in 0..self.rounds(false) {
            let mut jobs = jobs.to_vec();
            shuffle(&mut jobs, &mut self.random);
            for job in jobs {
                let mut order: Vec<&Subject> = subjects.iter().collect();
                shuffle(&mut order, &mut self.random);
                for subject in order {
                    if !self.bounds.allow()? {
                        eprintln!("out of time in round {}", round + 1);
                        return Ok(());
                    }
                    if is_cold {
                        subject.forget()?;
                    }
                    let before = subject.spent()?;
                    let value = job.run(&subject.target, seconds, is_cold)?;
                    let after = subject.spent()?;
                    if !job.only_reads() {
                        subject.settle()?;
                    }
                    let key = (scene, job.name, subject.name.as_str());
                    self.report.add(key, job.unit, round, value);
                    let spent = before.zip(after);
                    self.add_work((scene, job, &subject.name), spent, round);
                }
            }
            eprintln!("{scene}: round {} of {}", round + 1, self.rounds(false));
        }
        Ok(())
    }

    /// Notes what the server's part of the job has cost. The work of others on the machine changes
    /// how many requests there are in a second, and hardly what each of them costs.
    fn add_work(
        &mut self,
        (scene, job, contestant): (&str, &Job, &str),
        spent: Option<((u64, u64), (u64, u64))>,
        round: usize,
    ) {
        let Some((before, after)) = spent else {
            return;
        };
        let requests = after.1.saturating_sub(before.1);
        if requests > 0 {
            let microseconds = after.0.saturating_sub(before.0) as f64 / 1e3 / requests as f64;
            let scene = format!("{scene}{WORK}");
            let key = (scene.as_str(), job.name, contestant);
            self.report
                .add(key, Unit::Microseconds, round, microseconds);
        }
    }

    fn once(&mut self, scene: &str, list: &[Once]) -> Result<()> {
        for round in 0..self.rounds(true) {
            let mut list: Vec<&Once> = list.iter().collect();
            shuffle(&mut list, &mut self.random);
            for what in list {
                let stage = self.stage(what.on_disk, what.content, ONCE_BYTES);
                let mut able = self.able(&format!("{scene}, {}", what.job), &stage);
                shuffle(&mut able, &mut self.random);
                let clusters = ONCE_BYTES / stage.cluster();
                let (count, unit, scale) = match what.walk {
                    Walk::Fill => (
                        clusters,
                        Unit::MibPerSecond,
                        stage.cluster() as f64 / 1048576.0,
                    ),
                    Walk::WriteSync => (clusters.min(SYNCS), Unit::Iops, 1.0),
                    _ => (clusters, Unit::Iops, 1.0),
                };
                for contestant in able {
                    if !self.bounds.allow()? {
                        return Ok(());
                    }
                    let subject = contestant.up(&stage, &mut self.random)?;
                    subject.settle()?;
                    // Not everybody can do everything: QEMU discards nothing of such an image.
                    match what.walk.run(&subject.target, stage.cluster(), count) {
                        Ok(value) => {
                            let key = (scene, what.job, contestant.name.as_str());
                            self.report.add(key, unit, round, value * scale);
                        }
                        Err(error) => self.report.skip(format!(
                            "{scene}, {}: {}: {error:#}",
                            what.job, contestant.name
                        )),
                    }
                }
            }
            eprintln!("{scene}: round {} of {}", round + 1, self.rounds(true));
        }
        Ok(())
    }

    /// Once with shared blocks and once with copies, each with an XFS of its own: there is room for
    /// one copy only.
    fn reflink(&mut self, scene: &str) -> Result<()> {
        let clusters = if self.cli.quick { 256 } else { REFLINKS };
        if !host::has("mkfs.xfs") {
            self.report
                .skip(format!("{scene}: mkfs.xfs is not installed"));
            return Ok(());
        }
        for round in 0..self.rounds(true).min(3) {
            let mut ways = [("shared", &[][..]), ("copied", &["--no-reflink"])];
            shuffle(&mut ways, &mut self.random);
            for (name, options) in ways {
                if !self.bounds.allow()? {
                    return Ok(());
                }
                let xfs = Xfs::new(self.disk_dir, 3 * clusters)?;
                let stage = Stage {
                    dir: xfs.mountpoint().to_owned(),
                    cluster_sectors: 2048,
                    ..self.stage(true, Content::Covered, clusters << 20)
                };
                let contestant = Contestant::ploopfs_with(name, options);
                let subject = contestant.up(&stage, &mut self.random)?;
                xfs.settle()?;
                let rate = Walk::Write.run(&subject.target, stage.cluster(), clusters)?;
                let seconds = clusters as f64 / rate;
                let key = (scene, "copy up", name);
                self.report
                    .add(key, Unit::Milliseconds, round, seconds * 1e3);
            }
            eprintln!("{scene}: round {}", round + 1);
        }
        Ok(())
    }

    fn depth(&mut self, scene: &str) -> Result<()> {
        let levels: Vec<(Contestant, Stage)> = DEPTHS
            .iter()
            .map(|depth| {
                let contestant = Contestant::ploopfs_with(&format!("depth {depth}"), &["-r"]);
                // Two clusters a level at the least.
                let stage = self.stage(false, Content::Chain(*depth), 512 << 20);
                (contestant, stage)
            })
            .collect();
        let both: Vec<_> = levels.iter().map(|(who, stage)| (who, stage)).collect();
        let subjects = all_up(&both, &mut self.random)?;
        let jobs: Vec<_> = self.jobs(true);
        self.rounds_over(scene, &subjects, &jobs, false)
    }
}
