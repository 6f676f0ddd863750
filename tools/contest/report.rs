//! What was measured: samples in cells, medians, ratios, and the document that keeps them.
//!
//! Imports: `serde`.
//! Never: leaves out a sample that it was given.
//!
//! Samples of one round were taken one right after the other, so contestants are compared round by
//! round, and the ratio told is the median of the rounds' ratios: what the rest of the machine did
//! meanwhile hit both sides alike.

use serde::{Deserialize, Serialize};

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Unit {
    /// Requests in a second.
    #[serde(rename = "IOPS")]
    Iops,
    #[serde(rename = "MiB/s")]
    MibPerSecond,
    #[serde(rename = "ms")]
    Milliseconds,
    #[serde(rename = "us")]
    Microseconds,
    #[serde(rename = "ns")]
    Nanoseconds,
    #[serde(rename = "MiB")]
    Mib,
}

impl Unit {
    /// How people write it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::MibPerSecond => "MiB/s",
            Self::Milliseconds => "ms",
            Self::Microseconds => "us",
            Self::Nanoseconds => "ns",
            Self::Mib => "MiB",
        }
    }

    /// True where a larger number is the better one.
    pub(crate) fn is_more_better(self) -> bool {
        matches!(self, Self::Iops | Self::MibPerSecond)
    }
}

/// One number, and the round that it was taken in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) round: usize,
    pub(crate) value: f64,
}

/// All samples of one contestant in one job of one scene.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) scene: String,
    pub(crate) job: String,
    pub(crate) contestant: String,
    pub(crate) unit: Unit,
    pub(crate) median: f64,
    /// Half of what lies between the least and the most, in percent of the median.
    pub(crate) spread_percent: f64,
    pub(crate) samples: Vec<Sample>,
}

/// The median; of an even number, the mean of the middle two.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 0 => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
        _ => Some(sorted[middle]),
    }
}

impl Cell {
    fn settle(&mut self) {
        let values = || self.samples.iter().map(|sample| sample.value);
        let least = values().fold(f64::INFINITY, f64::min);
        let most = values().fold(0.0, f64::max);
        self.median = median(values()).unwrap_or(0.0);
        self.spread_percent = (most - least) / 2.0 / self.median * 100.0;
    }

    fn at(&self, round: usize) -> Option<f64> {
        let sample = self.samples.iter().find(|sample| sample.round == round)?;
        Some(sample.value)
    }

    /// How many times as good as `base` this is: the median of the rounds, their worst and best.
    pub(crate) fn ratio_to(&self, base: &Self) -> Option<Ratio> {
        let ratios: Vec<f64> = self
            .samples
            .iter()
            .filter_map(|sample| {
                let other = base.at(sample.round)?;
                let ratio = sample.value / other;
                Some(if self.unit.is_more_better() {
                    ratio
                } else {
                    ratio.recip()
                })
            })
            .collect();
        Some(Ratio {
            median: median(ratios.iter().copied())?,
            worst: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            best: ratios.iter().copied().fold(0.0, f64::max),
        })
    }
}

/// A comparison over the rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) worst: f64,
    pub(crate) best: f64,
}

/// Where and how a run was made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) version: String,
    pub(crate) date: String,
    pub(crate) kernel: String,
    pub(crate) cpus: usize,
    pub(crate) command: String,
    pub(crate) seed: u64,
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) size_mib: u64,
    pub(crate) image_fs: String,
    pub(crate) disk_fs: String,
    /// What else the machine was doing: the load averages before and after.
    pub(crate) load: Vec<String>,
}

/// A target and what became of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) what: String,
    pub(crate) target: String,
    pub(crate) measured: String,
    /// Absent where nothing was measured.
    pub(crate) met: Option<bool>,
}

/// A run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) schema_version: u32,
    pub(crate) about: About,
    pub(crate) cells: Vec<Cell>,
    /// What was left out, and why.
    pub(crate) skipped: Vec<String>,
    pub(crate) verdicts: Vec<Verdict>,
}

/// The distinct values of a list, in the order of their first appearance.
pub(crate) fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in all {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

impl Report {
    /// Adds a sample.
    pub(crate) fn add(
        &mut self,
        (scene, job, contestant): (&str, &str, &str),
        unit: Unit,
        round: usize,
        value: f64,
    ) {
        let sample = Sample { round, value };
        let is_it = |cell: &&mut Cell| {
            cell.scene == scene && cell.job == job && cell.contestant == contestant
        };
        let cell = match self.cells.iter_mut().find(is_it) {
            Some(cell) => cell,
            None => {
                self.cells.push(Cell {
                    scene: scene.to_owned(),
                    job: job.to_owned(),
                    contestant: contestant.to_owned(),
                    unit,
                    median: 0.0,
                    spread_percent: 0.0,
                    samples: Vec::new(),
                });
                self.cells.last_mut().expect("a cell was pushed")
            }
        };
        cell.samples.push(sample);
        cell.settle();
    }

    /// Notes that something was left out.
    pub(crate) fn skip(&mut self, what: String) {
        if !self.skipped.contains(&what) {
            eprintln!("skipped: {what}");
            self.skipped.push(what);
        }
    }

    /// One cell.
    pub(crate) fn cell(&self, scene: &str, job: &str, contestant: &str) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.scene == scene && cell.job == job && cell.contestant == contestant)
    }

    /// The scenes, in the order in which they were measured.
    pub(crate) fn scenes(&self) -> Vec<&str> {
        distinct(self.cells.iter().map(|cell| cell.scene.as_str()))
    }

    /// The jobs of a scene, by name: they were run in shuffled order.
    pub(crate) fn jobs(&self, scene: &str) -> Vec<&str> {
        let mut jobs = distinct(self.of(scene).map(|cell| cell.job.as_str()));
        jobs.sort_by_key(|job| (crate::jobs::rank(job), *job));
        jobs
    }

    /// The contestants of a scene, in the order of the table of contestants.
    pub(crate) fn contestants(&self, scene: &str) -> Vec<&str> {
        let mut names = distinct(self.of(scene).map(|cell| cell.contestant.as_str()));
        names.sort_by_key(|name| crate::contestants::rank(name));
        names
    }

    fn of(&self, scene: &str) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(move |cell| cell.scene == scene)
    }
}
