//! From a parsed command to a daemon that serves a disk: common to `mount` and `attach`.
//!
//! Imports: `error`, `chain`, `disk`, `fuse`, `sys`.
//! Never: opens an image, takes a lock or starts a thread before the fork.
//!
//! [`launch`] forks; what runs in the child (or, with `-f`, in the only process there is) is
//! `cli/child.rs`. The parent gets one frame from it: what is served now, or the report of what
//! went wrong.

use super::child::{Answer, Daemon};
use super::exit;
use super::filesystem::Opened;
use super::options::Settings;
use super::output::Report;
use crate::error::{Error, Result};
use crate::fuse::attach::FileSystemTarget;
use crate::fuse::daemon::{self, Outcome, Reporter, Side};
use crate::fuse::logging;
use crate::fuse::mount::Shape;
use crate::fuse::volumes::Volume;
use crate::sys::process;
use log::LevelFilter;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the disk is to appear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// In the file tree.
    Mountpoint(PathBuf, Shape),
    /// As a loop device; perhaps with a file system of it mounted.
    Loop(Option<FileSystemTarget>),
    /// As a loop device for this process alone, which goes when this process ends.
    Private,
}

/// All that a daemon needs to know; every path in it is absolute.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image as the user named it, for messages.
    pub shown: String,
    /// The image.
    pub image: PathBuf,
    /// Where to.
    pub target: Target,
    /// How.
    pub settings: Settings,
    /// Where the process id goes.
    pub pid_file: Option<PathBuf>,
    /// No fork.
    pub foreground: bool,
    /// Log everything.
    pub debug: bool,
}

/// What the parent is told when the disk is served.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Served {
    /// Bytes of the disk.
    pub size: u64,
    /// Nobody can write.
    pub read_only: bool,
    /// The numbers of its partitions.
    pub partitions: Vec<u32>,
    /// How many snapshots are shown.
    pub snapshots: usize,
    /// The loop device.
    pub device: Option<PathBuf>,
    /// What lies on the disk, where it is served to this process alone.
    pub volumes: Vec<Volume>,
}

/// Makes a path absolute before the daemon changes its directory.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::from(e).in_file(path))
}

/// Starts the daemon and returns when it serves; in the foreground, when it has ended.
pub fn launch(plan: &Plan) -> Result<Option<Served>, Box<Report>> {
    let what = what(plan);
    let level = match (plan.debug, plan.foreground) {
        (true, _) => LevelFilter::Debug,
        (false, _) => LevelFilter::Info,
    };
    if plan.foreground {
        let answer = Answer::new(Reporter::foreground());
        logging::start(level, true);
        return Daemon { plan, answer }.run().map(|()| None);
    }
    let selection = &plan.settings.selection;
    let named = selection
        .lower
        .iter()
        .chain([&plan.image])
        .map(PathBuf::as_path);
    let keep = daemon::named_descriptors(named);
    match daemon::fork(&keep).map_err(|e| Report::refused(&what, &e))? {
        Side::Child(reporter) => {
            logging::start(level, false);
            if plan.target == Target::Private {
                // Before the parent is watched: who dies later than now is noticed by one of both.
                let _ = process::end_with_parent();
            }
            let answer = Answer::new(reporter);
            let daemon = Daemon {
                plan,
                answer: Arc::clone(&answer),
            };
            let status = match daemon.run() {
                Ok(()) => 0,
                Err(report) => {
                    answer.failed(&report);
                    i32::from(report.status)
                }
            };
            std::process::exit(status)
        }
        Side::Parent(waiter) => match waiter.wait().map_err(|e| Report::new(&what, &e))? {
            Outcome::Ready(payload) => Ok(serde_json::from_slice(&payload).ok()),
            Outcome::Failed(payload) => Err(serde_json::from_slice(&payload)
                .unwrap_or_else(|e| Report::new(&what, &Error::from(std::io::Error::from(e))))),
        },
    }
}

/// The beginning of every message about the plan.
pub(super) fn what(plan: &Plan) -> String {
    match plan.target {
        Target::Mountpoint(..) => format!("cannot mount {}", plan.shown),
        Target::Loop(_) => format!("cannot attach {}", plan.shown),
        Target::Private => format!("cannot trim {}", plan.shown),
    }
}

/// What there is to tell about a disk that was opened.
pub(super) fn served(opened: &Opened, plan: &Plan) -> Served {
    Served {
        size: opened.disk.size_bytes(),
        read_only: plan.settings.disk.read_only,
        partitions: opened
            .partitions
            .iter()
            .map(|partition| partition.number)
            .collect(),
        snapshots: opened.images.snapshots.len(),
        device: None,
        volumes: Vec::new(),
    }
}

/// Size, mode and so on, in a few words.
#[must_use]
pub fn describe(served: &Served) -> String {
    let mut words = vec![super::size::show_size(served.size)];
    words.push(
        if served.read_only {
            "read-only"
        } else {
            "read-write"
        }
        .to_owned(),
    );
    for (count, name) in [
        (served.partitions.len(), "partition"),
        (served.snapshots, "snapshot"),
    ] {
        match count {
            0 => {}
            1 => words.push(format!("1 {name}")),
            _ => words.push(format!("{count} {name}s")),
        }
    }
    words.join(", ")
}

/// The status of a report, as the program ends with it.
#[must_use]
pub fn exit_status(result: &Result<(), Box<Report>>) -> u8 {
    result
        .as_ref()
        .map_or_else(|report| report.status.max(exit::FAILED), |()| 0)
}
