//! `ploopfs compact --trim`: lets the file systems on a disk discard what they do not use.
//!
//! Imports: `error`, `chain`, `disk`, `fuse`, `admin`.
//! Never: shows a mount to anybody, or leaves one behind; touches a file system that somebody may
//! still have, but where that is wanted.
//!
//! 1. The daemon of `attach` is started, bound to this process: it opens and locks the disk, tells
//!    what lies on it, and puts a loop device over it. It goes on serving until that has gone, and
//!    then closes the disk; it lets go of the device by itself when this process ends.
//! 2. Here, in the process of the command, each file system is mounted without a place in the file
//!    tree and trimmed. The mount is a descriptor. Killed at any moment, the process loses it, the
//!    kernel unmounts while the daemon still serves, and the file system is left clean.
//! 3. The device is let go, and the daemon waited for: only then the image is free to be compacted.
//!
//! Were the file systems mounted by the daemon itself, killing that one process would take away
//! what an unmount writes to.

use super::args::CompactArgs;
use super::attach::detach_and_wait;
use super::options::Settings;
use super::output::Report;
use super::progress;
use super::serve::{Plan, Served, Target, absolute, launch};
use crate::chain::bundle::{self, Selection};
use crate::disk::{self, DiskOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::attach::Attached;
use crate::fuse::mount::shell_word;
use crate::fuse::partitions;
use crate::fuse::registry::Registry;
use crate::fuse::trim::{self, Outcome};
use crate::fuse::volumes::{self, Fit, Volume};
use serde::Serialize;
use std::fmt::Write;
use std::fs;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest that threads of this process may take to end.
const SETTLED: Duration = Duration::from_secs(5);

/// What was done to a file system, or would be.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Trimmed {
    /// The partition's number; none where the disk has no partitions.
    pub(super) partition: Option<u32>,
    /// What it is, where that is known.
    pub(super) kind: Option<String>,
    /// Bytes that it discarded, by its own account.
    pub(super) discarded_bytes: Option<u64>,
    /// Why nothing was done to it.
    pub(super) skipped: Option<String>,
    #[serde(skip)]
    name: String,
}

impl Trimmed {
    fn new(volume: &Volume) -> Self {
        Self {
            partition: volume.partition,
            kind: (!volume.kind.is_empty()).then(|| volume.kind.clone()),
            discarded_bytes: None,
            skipped: None,
            name: volume.name(),
        }
    }
}

/// Why a volume is left alone.
fn reason(volume: &Volume, force: bool) -> Option<String> {
    match &volume.fit {
        Fit::Closed => None,
        Fit::InUse(_) if force => None,
        Fit::InUse(why) => Some(format!("{why} (--force trims it all the same)")),
        Fit::Never(why) => Some(why.clone()),
    }
}

/// Says what there is to trim, without touching anything.
pub(super) fn look(args: &CompactArgs) -> Result<Vec<Trimmed>> {
    let selection = Selection {
        write: false,
        allow_outside: args.allow_outside.clone(),
        ..Selection::default()
    };
    let options = DiskOptions {
        read_only: true,
        ..DiskOptions::default()
    };
    let images = Arc::new(bundle::open(&args.image, &selection)?);
    let (disk, _) = disk::open(images, &options)?;
    let found = partitions::list(&disk).and_then(|list| volumes::examine(&disk, &list));
    disk.close()?;
    let told = |volume: &Volume| Trimmed {
        skipped: reason(volume, args.force),
        ..Trimmed::new(volume)
    };
    Ok(found?.iter().map(told).collect())
}

/// Fails where trimming is out of reach, before anything is looked at.
pub(super) fn expect_means(args: &CompactArgs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        let image = shell_word(&args.image);
        return Err(
            Error::why(ErrorKind::Host, "only root can mount what is on a disk").fix(format!(
                "sudo ploopfs compact --trim {image}\n\
                 or run fstrim where the disk is in use, then: ploopfs compact {image}"
            )),
        );
    }
    // By it the end of the daemon is waited for.
    Registry::open().map(|_| ())
}

/// Trims what can be trimmed. `held` is what the tops of the disk map.
pub(super) fn run(
    args: &CompactArgs,
    held: &[Range<u64>],
    what: &str,
) -> Result<Vec<Trimmed>, Box<Report>> {
    let failed = |e: &Error| Report::new(what, e);
    let mut settings = Settings::default();
    settings
        .selection
        .allow_outside
        .clone_from(&args.allow_outside);
    settings.disk.drop_bitmaps = args.drop_bitmaps;
    super::mount::absolute_selection(&mut settings).map_err(|e| failed(&e))?;
    let plan = Plan {
        shown: args.image.display().to_string(),
        image: absolute(&args.image).map_err(|e| failed(&e))?,
        target: Target::Private,
        settings,
        pid_file: None,
        foreground: false,
        debug: false,
    };
    settle();
    let served = launch(&plan)?.unwrap_or_default();
    let shown = progress::Shown::start(args.quiet);
    let done = each(&served, args.force, held, shown.progress());
    drop(shown);
    let closed = match &served.device {
        Some(device) => detach_and_wait(device),
        None => Ok(()),
    };
    let done = done.map_err(|e| {
        let mut report = failed(&e);
        report.data = Some("the files on the disk are what they were".into());
        report
    })?;
    closed.map_err(|e| failed(&e))?;
    Ok(done)
}

/// The threads of a disk that was only looked at end by themselves, a moment after it was closed;
/// while there are any, nothing can be forked.
fn settle() {
    let deadline = Instant::now() + SETTLED;
    let is_alone = || fs::read_dir("/proc/self/task").map_or(true, |tasks| tasks.count() <= 1);
    while !is_alone() && Instant::now() < deadline {
        std::thread::sleep(SETTLED / 1000);
    }
}

fn each(
    served: &Served,
    force: bool,
    held: &[Range<u64>],
    progress: &crate::admin::progress::Progress,
) -> Result<Vec<Trimmed>> {
    let device = served.device.as_deref().and_then(Attached::find);
    let device = device.ok_or_else(|| Error::why(ErrorKind::Host, "the loop device has gone"))?;
    let wanted = served
        .volumes
        .iter()
        .filter(|one| reason(one, force).is_none());
    progress.step("trimming", wanted.map(|one| trim::amount(one, held)).sum());
    let mut all = Vec::new();
    for volume in &served.volumes {
        let mut told = Trimmed::new(volume);
        told.skipped = reason(volume, force);
        if told.skipped.is_none() {
            let path = volume
                .partition
                .map_or_else(|| device.path(), |number| device.partition(number));
            let outcome = trim::trim(&path, volume, held, &mut |bytes| {
                progress.add(bytes);
                progress.check()
            })?;
            match outcome {
                Outcome::Trimmed(bytes) => told.discarded_bytes = Some(bytes),
                Outcome::Skipped(why) => told.skipped = Some(why),
            }
        }
        all.push(told);
    }
    Ok(all)
}

/// Tells people of it.
pub(super) fn text(all: &[Trimmed], out: &mut String) {
    for one in all {
        let kind = one.kind.as_deref().map(|kind| format!(" ({kind})"));
        let what = match (&one.skipped, one.discarded_bytes) {
            (Some(why), _) => format!("is left alone: {why}"),
            (None, Some(_)) => "trimmed".to_owned(),
            (None, None) => "is trimmed; what that frees is seen only then".to_owned(),
        };
        let _ = writeln!(out, "{}{}: {what}", one.name, kind.unwrap_or_default());
    }
}
