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
use crate::fuse::registry::{Record, Registry, wait_closed};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs the command.
pub fn run(args: &UmountArgs) -> Result<(), Box<Report>> {
    let timeout = args.timeout.map(Duration::from_millis);
    unmount(&args.target, args.lazy, timeout)
}

/// Unmounts by mountpoint or by image.
pub fn unmount(target: &Path, lazy: bool, timeout: Option<Duration>) -> Result<(), Box<Report>> {
    let shown = target.display();
    let registry = Registry::open();
    let record = unmount_now(target, lazy, registry.as_ref().ok())
        .map_err(|e| Report::new(&format!("cannot unmount {shown}"), &e))?;
    let (Some(record), Ok(registry)) = (record, &registry) else {
        note("no record of a daemon for this mount was found, so nothing could be waited for");
        return Ok(());
    };
    if lazy {
        return Ok(());
    }
    let slow = || note(&waiting(record.pid));
    wait_closed(registry, &record, timeout, slow)
        .map_err(|e| Report::new(&format!("{shown} is unmounted, but not closed"), &e))
}

/// Ends the mount, and gives the record of the daemon that served it.
fn unmount_now(target: &Path, lazy: bool, registry: Option<&Registry>) -> Result<Option<Record>> {
    let records = registry.map_or_else(|| Ok(Vec::new()), Registry::all)?;
    let (mountpoint, record) = find(target, &records)?;
    let dead = record.is_none_or(|record| !record.is_alive());
    if visible_mount(&mountpoint)?.is_some() {
        match unmount_any(&mountpoint, lazy) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && dead => {
                // Nobody serves it any more, so those who hold it only get errors.
                unmount_any(&mountpoint, true)?;
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(busy(&mountpoint)),
            other => other.map_err(|e| Error::from(e).in_file(&mountpoint))?,
        }
    }
    Ok(record.cloned())
}

fn find<'a>(target: &Path, records: &'a [Record]) -> Result<(PathBuf, Option<&'a Record>)> {
    let full = absolute(target).map_err(|e| Error::from(e).in_file(target))?;
    let at = |place: &Path| {
        let mut here = records.iter().rev().filter(|record| {
            record
                .mountpoint
                .as_ref()
                .is_some_and(|mountpoint| mountpoint.0 == place)
        });
        // The newest comes first; older ones at the place are detached and still draining.
        here.clone()
            .find(|record| record.is_alive())
            .or_else(|| here.next())
    };
    let visible = visible_mount(&full)?;
    if let Some(entry) = &visible {
        let record = at(&full);
        if is_ours(entry) || (record.is_some() && entry.fs_type.starts_with("fuse")) {
            return Ok((full, record));
        }
    }
    let of_image: Vec<&Record> = records
        .iter()
        .filter(|record| record.image.0 == full && record.mountpoint.is_some())
        .collect();
    match of_image.as_slice() {
        [record] => {
            let mountpoint = record.mountpoint.as_ref().map(|path| path.0.clone());
            Ok((mountpoint.unwrap_or_default(), Some(record)))
        }
        [] => match at(&full) {
            Some(record) => Ok((full, Some(record))),
            None => {
                let why = match visible {
                    Some(entry) => format!("what is mounted there is of type {}", entry.fs_type),
                    None => "nothing of ours is mounted there".to_owned(),
                };
                Err(Error::why(ErrorKind::Mountpoint, why).fix("ploopfs list shows what is"))
            }
        },
        many => {
            let places = many.iter().filter_map(|record| record.mountpoint.as_ref());
            let places = places
                .map(|path| shell_word(&path.0))
                .collect::<Vec<_>>()
                .join(", ");
            Err(Error::why(
                ErrorKind::Usage,
                format!("it is mounted more than once: {places}"),
            )
            .fix("name the mountpoint"))
        }
    }
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
