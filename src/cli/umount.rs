//! `ploopfs umount`.
//!
//! Imports: `error`, `fuse`.
//! Never: unmounts what is no mount of this program; returns success before the image is closed,
//! unless asked not to wait.

use super::args::UmountArgs;
use super::output::{Report, note, waiting};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::holders;
use crate::fuse::mount::{absolute, is_ours, shell_word, unmount_any, visible_mount};
use crate::fuse::registry::{Record, Registry, Watched, wait_closed};
use crate::sys::mount::{MountEntry, mount_table};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a mount may be in use before that is an error.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs the command.
pub fn run(args: &UmountArgs) -> Result<(), Box<Report>> {
    let timeout = args.timeout.map(Duration::from_millis);
    unmount(&args.target, args.lazy, timeout)
}

/// Unmounts by mountpoint or by image.
pub fn unmount(target: &Path, lazy: bool, timeout: Option<Duration>) -> Result<(), Box<Report>> {
    let shown = target.display();
    let registry = Registry::open();
    let watched = unmount_now(target, lazy, registry.as_ref().ok())
        .map_err(|e| Report::new(&format!("cannot unmount {shown}"), &e))?;
    let (Some(watched), Ok(registry)) = (watched, &registry) else {
        note("no record of a daemon for this mount was found, so nothing could be waited for");
        return Ok(());
    };
    if lazy {
        return Ok(());
    }
    let slow = || note(&waiting(watched.record().pid));
    wait_closed(registry, &watched, timeout, slow)
        .map_err(|e| Report::new(&format!("{shown} is unmounted, but not closed"), &e))
}

/// Ends the mount, and gives the record of the daemon that served it.
fn unmount_now(target: &Path, lazy: bool, registry: Option<&Registry>) -> Result<Option<Watched>> {
    let records = registry.map_or_else(|| Ok(Vec::new()), Registry::all)?;
    let (mountpoint, record) = find(target, &records)?;
    let watched = registry
        .zip(record)
        .map(|(registry, record)| registry.watch(record));
    if let Some(mountpoint) = mountpoint {
        // Without a record it may well be served, by another user's daemon for instance.
        let dead = record.is_some_and(|record| !record.is_alive());
        match unmount_patiently(&mountpoint, lazy) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && dead => {
                // Nobody serves it any more, so those who hold it only get errors.
                unmount_any(&mountpoint, true)?;
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(busy(&mountpoint)),
            other => other.map_err(|e| Error::from(e).in_file(&mountpoint))?,
        }
    }
    Ok(watched)
}

/// Tries for a moment while somebody uses the mount: those who only look (indexers, probes of new
/// devices, a program that is just being started) are gone at once.
fn unmount_patiently(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match unmount_any(mountpoint, lazy) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(PATIENCE / 40);
            }
            other => return other,
        }
    }
}

/// What to unmount, and the daemon to wait for. Nothing to unmount where the mount has gone from
/// sight already and its daemon is still draining, or has left an error.
fn find<'a>(target: &Path, records: &'a [Record]) -> Result<(Option<PathBuf>, Option<&'a Record>)> {
    let (full, gone) = match absolute(target) {
        Ok(full) => (full, None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => (gone_path(target)?, Some(e)),
        Err(e) => return Err(Error::from(e).in_file(target)),
    };
    let here = |record: &&Record| {
        record
            .mountpoint
            .as_ref()
            .is_some_and(|path| path.0 == full)
    };
    let visible = visible_mount(&full)?;
    if let Some(entry) = &visible {
        let is_it = |record: &&Record| record.is_about(entry);
        let record = records.iter().rev().filter(here).find(is_it);
        if record.is_some() || is_ours(entry) {
            return Ok((Some(full), record));
        }
    }
    let of_image = |record: &&Record| record.mountpoint.is_some() && record.is_of(&full);
    let named: Vec<&Record> = records.iter().filter(|r| of_image(r) || here(r)).collect();
    let living: Vec<&Record> = named
        .iter()
        .copied()
        .filter(|record| record.is_alive())
        .collect();
    match (living.as_slice(), named.as_slice()) {
        ([record], _) | ([], [.., record]) => {
            if let (Some(entry), true) = (covering(record)?, record.is_alive()) {
                let word = shell_word(&entry.mountpoint);
                let why = format!("another file system ({}) is mounted over it", entry.fs_type);
                let fix = format!("umount {word}      first, then this");
                return Err(Error::why(ErrorKind::Mountpoint, why).fix(fix));
            }
            let place = record.mountpoint.as_ref().filter(|_| record.is_mounted());
            Ok((place.map(|path| path.0.clone()), Some(record)))
        }
        ([], []) => {
            if let Some(e) = gone {
                return Err(Error::from(e).in_file(target));
            }
            let why = match visible {
                Some(entry) => format!("what is mounted there is of type {}", entry.fs_type),
                None => "nothing of ours is mounted there".to_owned(),
            };
            Err(Error::why(ErrorKind::Mountpoint, why).fix("ploopfs list shows what is"))
        }
        (many, _) => {
            let places = many.iter().filter_map(|record| record.mountpoint.as_ref());
            let places: Vec<String> = places.map(|path| shell_word(&path.0)).collect();
            let why = format!("it is mounted more than once: {}", places.join(", "));
            Err(Error::why(ErrorKind::Usage, why).fix("name the mountpoint"))
        }
    }
}

/// The full path of what is not there any more, from what is left of it: a record may still name a
/// mountpoint or an image that somebody has removed.
fn gone_path(target: &Path) -> Result<PathBuf> {
    let full = std::path::absolute(target).map_err(|e| Error::from(e).in_file(target))?;
    let left = full.ancestors().find_map(|parent| {
        let real = fs::canonicalize(parent).ok()?;
        Some(real.join(full.strip_prefix(parent).ok()?))
    });
    Ok(left.unwrap_or(full))
}

/// What hides a mount that is still there.
fn covering(record: &Record) -> Result<Option<MountEntry>> {
    let table = mount_table()?;
    let own = table.iter().any(|entry| record.is_about(entry));
    let Some(place) = record
        .mountpoint
        .as_ref()
        .filter(|_| own && !record.is_mounted())
    else {
        return Ok(None);
    };
    Ok(table
        .into_iter()
        .rev()
        .find(|entry| entry.mountpoint == place.0))
}

fn busy(mountpoint: &Path) -> Error {
    let loops = holders::loops(mountpoint);
    let users = holders::describe(mountpoint);
    let why = if users.is_empty() {
        "somebody uses it".to_owned()
    } else {
        format!("it is used by {users}")
    };
    let word = shell_word(mountpoint);
    let fix = match loops.first() {
        Some(device) => format!(
            "umount what lies on {device}, then: losetup -d {device}; ploopfs umount {word}",
            device = device.display()
        ),
        None => format!("end those programs, or: ploopfs umount --lazy {word}"),
    };
    Error::why(ErrorKind::Io(libc::EBUSY), why).fix(fix)
}
