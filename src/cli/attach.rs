//! `ploopfs attach` and `ploopfs detach`.
//!
//! Imports: `error`, `fuse`.
//! Never: prints more than the device on stdout; touches a loop device that is not ours.

use super::args::{AttachArgs, DetachArgs};
use super::mount::{absolute_selection, orphaned};
use super::output::{Report, note, print, waiting};
use super::serve::{Plan, Target, absolute, launch};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::attach::{Attached, FileSystemTarget};
use crate::fuse::dead::{DeadLoop, make_way};
use crate::fuse::mount::{expect_free, shell_word, unmount_any, visible_mount};
use crate::fuse::registry::{Record, Registry, Watched, wait_closed};
use crate::fuse::session::expect_offered;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs `attach`.
pub fn attach(args: &AttachArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot attach {}", args.image.display());
    let plan = plan(args).map_err(|e| Report::refused(&what, &e))?;
    let Some(served) = launch(&plan)? else {
        return Ok(());
    };
    let Some(device) = &served.device else {
        return Ok(());
    };
    if json {
        print(&format!(
            "{}\n",
            serde_json::json!({ "schema_version": 1, "device": device })
        ));
    } else {
        print(&format!("{}\n", device.display()));
    }
    Ok(())
}

fn plan(args: &AttachArgs) -> Result<Plan> {
    let mut settings = args
        .serve
        .settings()
        .map_err(|why| Error::why(ErrorKind::Usage, why))?;
    if !nix::unistd::geteuid().is_root() {
        let image = shell_word(&args.image);
        return Err(Error::why(ErrorKind::Host, "only root can set up loop devices").fix(format!(
            "sudo ploopfs attach {image}\nor mount it and use: udisksctl loop-setup -f .../disk.img"
        )));
    }
    expect_offered(settings.transport)?;
    settings.expect_linear()?;
    absolute_selection(&mut settings)?;
    // Partitions are what a block device is wanted for.
    settings.partitions = true;
    let image = absolute(&args.image)?;
    let file_system = match &args.mount {
        None => None,
        Some(directory) => Some(FileSystemTarget {
            directory: find_directory(directory, settings.replace_dead)?,
            partition: args.partition,
        }),
    };
    let directory = file_system.as_ref().map(|target| &*target.directory);
    replace_dead_loops(&image, directory, settings.replace_dead)?;
    Ok(Plan {
        shown: args.image.display().to_string(),
        image,
        target: Target::Loop(file_system),
        settings,
        pid_file: args.serve.pid_file.as_deref().map(absolute).transpose()?,
        foreground: args.serve.foreground || args.serve.debug,
        debug: args.serve.debug,
    })
}

/// The directory for `-m`, in full, once nothing of ours is in the way.
fn find_directory(directory: &Path, replace: bool) -> Result<PathBuf> {
    for device in make_way(directory, replace)? {
        note(&orphaned(&device, directory));
    }
    let found = fs::canonicalize(directory).ok();
    let full = found.filter(|path| path.is_dir()).ok_or_else(|| {
        Error::why(ErrorKind::Mountpoint, "not a directory")
            .in_file(directory)
            .fix(format!("mkdir -p {}", shell_word(directory)))
    })?;
    expect_free(&full)?;
    Ok(full)
}

/// Clears away, or tells of, loop devices of this image whose daemon has died.
fn replace_dead_loops(image: &Path, directory: Option<&Path>, replace: bool) -> Result<()> {
    for dead in DeadLoop::all(image, directory) {
        let device = dead.path();
        let shown = device.display();
        if replace {
            dead.clear()?;
            note(&format!("{shown}, whose daemon has died, was detached"));
        } else if let Some(directory) = directory.filter(|directory| dead.covers(directory)) {
            let why = format!("{shown} is mounted there, whose daemon has died");
            return Err(Error::why(ErrorKind::Mountpoint, why)
                .in_file(directory)
                .fix(format!(
                    "add --replace-dead, or first: ploopfs detach {shown}"
                )));
        } else {
            note(&format!(
                "{shown} has the disk of a daemon that has died; add --replace-dead, or: \
                 ploopfs detach {shown}"
            ));
        }
    }
    Ok(())
}

/// Runs `detach`.
pub fn detach(args: &DetachArgs) -> Result<(), Box<Report>> {
    let shown = args.target.display();
    let failed = |e: Error| Report::new(&format!("cannot detach {shown}"), &e);
    let registry = Registry::open().map_err(failed)?;
    let watched = detach_now(&args.target, &registry, false).map_err(failed)?;
    let slow = || note(&waiting(watched.record().pid));
    wait_closed(
        &registry,
        &watched,
        args.timeout.map(Duration::from_millis),
        slow,
    )
    .map_err(|e| Report::new(&format!("{shown} is detached, but not closed"), &e))
}

fn detach_now(target: &Path, registry: &Registry, lazy: bool) -> Result<Watched> {
    let records = registry.all()?;
    let record = find(target, &records)?;
    let watched = registry.watch(record);
    let device = record.device.as_ref().filter(|_| record.is_attached());
    if let Some(device) = device.and_then(|path| Attached::find(&path.0)) {
        if let Some(place) = &record.file_system {
            unmount_file_system(&device, &place.0)?;
        }
        device.clear(lazy)?;
    }
    Ok(watched)
}

/// Lets go of a device, which goes with those who still look at it, and waits until its disk is
/// closed.
pub(super) fn detach_and_wait(device: &Path) -> Result<()> {
    let registry = Registry::open()?;
    let watched = detach_now(device, &registry, true)?;
    let slow = || note(&waiting(watched.record().pid));
    wait_closed(&registry, &watched, None, slow)
}

fn find<'a>(target: &Path, records: &'a [Record]) -> Result<&'a Record> {
    let full = fs::canonicalize(target).map_err(|e| Error::from(e).in_file(target))?;
    let is_device = |record: &&Record| record.device.as_ref().is_some_and(|path| path.0 == full);
    let fits =
        |record: &&Record| is_device(record) || record.device.is_some() && record.is_of(&full);
    let named: Vec<&Record> = records.iter().filter(fits).collect();
    let alive = |record: &&Record| record.is_alive();
    let mut living: Vec<&Record> = named.iter().copied().filter(alive).collect();
    if living.len() > 1 && living.iter().all(is_device) {
        living = vec![holder(&living)?];
    }
    match (living.as_slice(), named.as_slice()) {
        ([record], _) | ([], [.., record]) => Ok(record),
        ([], []) => {
            let why = "it was not attached by ploopfs";
            let fix = "ploopfs list shows what was; other loop devices: losetup -d";
            Err(Error::why(ErrorKind::Usage, why).fix(fix))
        }
        _ => {
            let why = "the image is attached more than once";
            Err(Error::why(ErrorKind::Usage, why).fix("name the device; ploopfs list shows them"))
        }
    }
}

/// Which of those that had a device has it now: the others have let go of it and still close their
/// disks.
fn holder<'a>(living: &[&'a Record]) -> Result<&'a Record> {
    let started = |record: &&&Record| record.start;
    let attached = living.iter().filter(|record| record.is_attached());
    attached
        .max_by_key(started)
        .or(living.iter().max_by_key(started))
        .copied()
        .ok_or_else(|| Error::errno(libc::ENXIO))
}

/// Unmounts what `attach -m` mounted, if it is still that.
fn unmount_file_system(device: &Attached, place: &Path) -> Result<()> {
    let Some(entry) = visible_mount(place)? else {
        return Ok(());
    };
    if !device.mounts()?.contains(&entry.mountpoint) {
        return Ok(());
    }
    unmount_any(place, false).map_err(|e| {
        let users = crate::fuse::holders::describe(place);
        let error = Error::from(e).in_file(place);
        if users.is_empty() {
            error
        } else {
            error.fix(format!("end what uses it: {users}"))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::registry::RecordedPath;

    #[test]
    fn the_last_who_got_a_device_has_it() {
        let device = Path::new("/dev/no such loop");
        let began = |start| {
            let mut record = Record::of_this_process(Path::new("/a.hds"), false).unwrap();
            record.device = Some(RecordedPath(device.to_owned()));
            record.start = start;
            record
        };
        let records = [began(5), began(9), began(7)];
        let living: Vec<&Record> = records.iter().collect();
        assert_eq!(holder(&living).unwrap().start, 9);
    }
}
