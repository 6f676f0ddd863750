//! What runs in the daemon: open, mount, serve, close.
//!
//! Imports: `error`, `disk`, `fuse`.
//! Never: ends without closing the disk that it opened; tells its parent more than one thing.

use super::filesystem::{DISK_NAME, Opened, View, build_filesystem, open_disk};
use super::output::Report;
use super::outside::{self, Job, Manner, Order, Outside};
use super::serve::{Plan, Served, Target, describe, served, what};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::attach::{Attached, FileSystemTarget, Slice};
use crate::fuse::daemon::{self, Reporter};
use crate::fuse::mount::{self, Mounted, Shape, shell_word};
use crate::fuse::registry::{Record, RecordedPath, Registry};
use crate::fuse::signals::Signals;
use crate::fuse::{holders, session, volumes};
use parking_lot::Mutex;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The one answer that the parent gets.
pub(super) struct Answer {
    reporter: Mutex<Option<Reporter>>,
    /// What a process beside this one says of its failure, in its own words.
    said: Mutex<Option<Box<Report>>>,
}

impl Answer {
    pub(super) fn new(reporter: Reporter) -> Arc<Self> {
        Arc::new(Self {
            reporter: Mutex::new(Some(reporter)),
            said: Mutex::default(),
        })
    }

    fn ready(&self, served: &Served, status: &str) -> Result<()> {
        let Some(reporter) = self.reporter.lock().take() else {
            return Ok(());
        };
        let payload = serde_json::to_vec(served).map_err(std::io::Error::from)?;
        reporter.ready(&payload, status)
    }

    fn is_given(&self) -> bool {
        self.reporter.lock().is_none()
    }

    /// After the answer was given, only the log is left.
    pub(super) fn failed(&self, report: &Report) {
        match (self.reporter.lock().take(), serde_json::to_vec(report)) {
            (Some(reporter), Ok(payload)) => reporter.failed(&payload),
            _ => log::error!("{}", report.text().trim_end()),
        }
    }

    fn watch_parent(&self) -> Result<()> {
        self.reporter
            .lock()
            .as_ref()
            .map_or(Ok(()), Reporter::watch_parent)
    }
}

/// A file that holds the process id while the process lives.
struct PidFile(PathBuf);

impl PidFile {
    /// A link is not followed: in a directory that others may write to it would choose the file
    /// that root overwrites, and what gets removed in the end is the link.
    fn write(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        options
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .and_then(|mut file| writeln!(file, "{}", std::process::id()))
            .map_err(|e| Error::from(e).in_file(path))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.0) {
            log::debug!("cannot remove {}: {e}", self.0.display());
        }
    }
}

/// The registry's entry of this daemon; without a registry all goes on, less comfortably.
struct Entry {
    registry: Option<Registry>,
    record: Record,
}

impl Entry {
    fn new(plan: &Plan) -> Result<Self> {
        let registry = Registry::open();
        if let Err(e) = &registry {
            log::warn!("umount and list will not find this mount: {e}");
        }
        let image = fs::canonicalize(&plan.image).unwrap_or_else(|_| plan.image.clone());
        let mut record = Record::of_this_process(&image, plan.settings.disk.read_only)?;
        if let Target::Mountpoint(mountpoint, _) = &plan.target {
            record.mountpoint = Some(RecordedPath(mountpoint.clone()));
        }
        Ok(Self {
            registry: registry.ok(),
            record,
        })
    }

    fn write(&self) {
        if let Some(Err(e)) = self
            .registry
            .as_ref()
            .map(|registry| registry.write(&self.record))
        {
            log::warn!("umount and list will not find this mount: {e}");
        }
    }

    fn finish(mut self, error: Option<&Error>) {
        match (error, &self.registry) {
            (Some(error), _) => {
                self.record.error = Some(error.to_string());
                self.write();
            }
            (None, Some(registry)) => registry.closed(&self.record),
            (None, None) => {}
        }
    }
}

/// A daemon at work.
pub(super) struct Daemon<'a> {
    pub(super) plan: &'a Plan,
    pub(super) answer: Arc<Answer>,
}

impl Daemon<'_> {
    /// Serves until the last user is gone, and closes the disk.
    pub(super) fn run(&self) -> Result<(), Box<Report>> {
        let what = what(self.plan);
        daemon::prepare_process();
        if self.plan.settings.lock_memory {
            daemon::lock_memory().map_err(|e| Report::refused(&what, &e))?;
        }
        let signals = Signals::start().map_err(|e| Report::new(&what, &e.into()))?;
        self.answer
            .watch_parent()
            .map_err(|e| Report::new(&what, &e))?;
        let opened = open_disk(self.plan).map_err(|e| refused(&what, &e))?;
        let disk = Arc::clone(&opened.disk);
        let served = self.serve(opened, &signals);
        signals.ending();
        // Whatever happened, the disk is open and must be closed.
        let stats = serde_json::to_string(&disk.stats()).unwrap_or_default();
        let closed = disk.close();
        log::info!("{} closed: {stats}", self.plan.shown);
        let (served, entry) = match served {
            Ok(entry) => (Ok(()), Some(entry)),
            Err((e, entry)) => (Err(e), entry),
        };
        if let Some(entry) = entry {
            // Before the answer, the parent hears of it and nobody else waits.
            entry.finish(closed.as_ref().err().filter(|_| self.answer.is_given()));
        }
        closed.and(served).map_err(|e| {
            let said = self.answer.said.lock().take();
            said.unwrap_or_else(|| Report::new(&what, &e))
        })
    }

    /// Serves until the session ends. The entry comes back to be finished after the close.
    #[allow(clippy::result_large_err)]
    fn serve(
        &self,
        opened: Opened,
        signals: &Arc<Signals>,
    ) -> Result<Entry, (Error, Option<Entry>)> {
        let entry = Entry::new(self.plan).map_err(|e| (e, None))?;
        let pid_file = self
            .plan
            .pid_file
            .as_deref()
            .map(PidFile::write)
            .transpose();
        let _pid_file = pid_file.map_err(|e| (e, None))?;
        let entry = Arc::new(Mutex::new(Some(entry)));
        let served = match &self.plan.target {
            Target::Mountpoint(mountpoint, shape) => {
                self.serve_mount(opened, signals, mountpoint, *shape, &entry)
            }
            Target::Loop(file_system) => {
                self.serve_loop(opened, signals, file_system.as_ref(), &entry)
            }
            Target::Private => self.serve_loop(opened, signals, None, &entry),
        };
        let entry = entry.lock().take();
        match (served, entry) {
            (Ok(()), Some(entry)) => Ok(entry),
            (Err(e), entry) => Err((e, entry)),
            (Ok(()), None) => unreachable!("the entry is taken here only"),
        }
    }

    fn watch_statistics(&self, signals: &Signals, disk: &Arc<Disk>) {
        // A weak hold: signals must not keep the disk from being closed.
        let (disk, shown) = (Arc::downgrade(disk), self.plan.shown.clone());
        signals.on_statistics(Box::new(move || {
            if let Some(disk) = disk.upgrade() {
                let stats = serde_json::to_string(&disk.stats()).unwrap_or_default();
                log::info!("{shown}: {stats}");
            }
        }));
    }

    fn serve_mount(
        &self,
        opened: Opened,
        signals: &Arc<Signals>,
        mountpoint: &Path,
        shape: Shape,
        entry: &Mutex<Option<Entry>>,
    ) -> Result<()> {
        let plan = self.plan;
        let view = match shape {
            Shape::Directory => View::Directory,
            Shape::File => View::File,
        };
        let filesystem = build_filesystem(&opened, &view, plan)?;
        self.watch_statistics(signals, &opened.disk);
        let served = served(&opened, plan);
        // The disk belongs to the file system now; it lets go when the session has ended.
        drop(opened);
        let (fd, mounted) = signals.serving(|| {
            let options = &plan.settings.mount;
            let (fd, mounted) = mount::mount(&plan.image, mountpoint, shape, options)?;
            let mounted = Arc::new(mounted);
            let drained = Arc::clone(&mounted);
            Ok::<_, Error>(((fd, mounted), Box::new(move || drain(&drained)) as Box<_>))
        })?;
        let on_ready = || {
            if let Some(entry) = entry.lock().as_mut() {
                entry.record.mount_device = mounted.device().map(str::to_owned);
                entry.write();
            }
            let status = format!("{} mounted at {}", plan.shown, mountpoint.display());
            self.answer.ready(&served, &status)?;
            log::info!("{status} ({})", describe(&served));
            Ok(())
        };
        let settings = &plan.settings;
        let (access, how) = (
            settings.mount.access,
            (settings.transport, settings.threads),
        );
        let result = session::serve(filesystem, fd, access, how, on_ready);
        // A session that failed, or was aborted, leaves a dead mount behind.
        if mounted.is_visible() {
            if let Err(e) = mounted.unmount(true) {
                log::warn!("{} is still mounted, dead: {e}", mountpoint.display());
            }
        }
        result
    }

    fn serve_loop(
        &self,
        opened: Opened,
        signals: &Arc<Signals>,
        file_system: Option<&FileSystemTarget>,
        entry: &Arc<Mutex<Option<Entry>>>,
    ) -> Result<()> {
        let plan = self.plan;
        let name = plan
            .image
            .file_name()
            .map_or(DISK_NAME.into(), |name| name.to_string_lossy())
            .into_owned();
        let filesystem = build_filesystem(&opened, &View::Named(name.clone()), plan)?;
        self.watch_statistics(signals, &opened.disk);
        let read_only = plan.settings.disk.read_only;
        let mut served = served(&opened, plan);
        if plan.target == Target::Private {
            served.volumes = volumes::examine(&opened.disk, &opened.partitions)?;
        }
        let job = LoopJob {
            shown: plan.shown.clone(),
            image: plan.image.display().to_string(),
            job: device_job(plan, &opened, name, file_system),
            manner: Manner {
                foreground: plan.foreground,
                debug: plan.debug,
            },
            served,
            state: Arc::new(Mutex::new(LoopState::default())),
            entry: Arc::clone(entry),
            answer: Arc::clone(&self.answer),
        };
        drop(opened);
        let (state, manner) = (Arc::clone(&job.state), job.manner);
        let (fd, mount) = signals.serving(|| {
            let made = mount::mount_nowhere(&plan.image, read_only)?;
            let state = Arc::clone(&state);
            Ok::<_, Error>((made, Box::new(move || drain_loop(&state, manner)) as Box<_>))
        })?;
        let mut thread = None;
        let on_ready = || {
            // Opening the file in the mount needs the session threads, which start after this.
            let run = move || job.run(mount);
            thread = Some(
                std::thread::Builder::new()
                    .name("attach".into())
                    .spawn(run)?,
            );
            Ok(())
        };
        let settings = &plan.settings;
        let (access, how) = (
            settings.mount.access,
            (settings.transport, settings.threads),
        );
        let result = session::serve(filesystem, fd, access, how, on_ready);
        let attached = thread.map_or(Ok(()), |thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(Error::errno(libc::EIO)))
        });
        if result.is_err() {
            // Nobody serves the device any more.
            drain_loop(&state, manner);
        }
        result.and(attached)
    }
}

/// What is to be done for a loop device.
fn device_job(
    plan: &Plan,
    opened: &Opened,
    name: String,
    file_system: Option<&FileSystemTarget>,
) -> Job {
    let recorded = |target: &FileSystemTarget| {
        let directory = RecordedPath(target.directory.clone());
        (directory, target.partition)
    };
    Job {
        what: what(plan),
        name,
        read_only: plan.settings.disk.read_only,
        slices: opened.partitions.iter().map(Slice::from).collect(),
        file_system: file_system.map(recorded),
    }
}

/// Ends the mount for newcomers and leaves those who use it in peace. False when it stays.
fn drain(mounted: &Mounted) -> bool {
    let place = mounted.mountpoint().display();
    match mounted.unmount(false) {
        Ok(()) => return true,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let users = holders::describe(mounted.mountpoint());
            let users = if users.is_empty() {
                "somebody".to_owned()
            } else {
                users
            };
            log::warn!("{place} is in use by {users}: serving until they are done");
        }
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            log::warn!("another file system is mounted over {place}: serving on");
            return false;
        }
        Err(e) => log::warn!("cannot unmount {place}: {e}"),
    }
    let detached = mounted.unmount(true);
    if let Err(e) = &detached {
        log::warn!("cannot detach {place}: {e}; serving on");
    }
    detached.is_ok()
}

#[derive(Debug, Default)]
struct LoopState {
    device: Option<Attached>,
    stopping: bool,
}

/// The device goes at once, or with its last user.
fn drain_loop(state: &Mutex<LoopState>, manner: Manner) -> bool {
    let device = {
        let mut state = state.lock();
        state.stopping = true;
        state.device.clone()
    };
    // Without a device yet, the one who makes it sees the flag.
    let Some(device) = device else {
        return true;
    };
    let cleared = outside::clear(&device, None, manner);
    if let Err(e) = &cleared {
        log::warn!("cannot detach {}: {e}", device.path().display());
    }
    cleared.is_ok()
}

/// Has the loop device set up while the session threads serve it.
struct LoopJob {
    shown: String,
    image: String,
    job: Job,
    manner: Manner,
    served: Served,
    state: Arc<Mutex<LoopState>>,
    entry: Arc<Mutex<Option<Entry>>>,
    answer: Arc<Answer>,
}

impl LoopJob {
    fn run(mut self, mount: OwnedFd) -> Result<()> {
        let order = Order::Attach(self.job.clone());
        let mut outside = Outside::start(&self.image, mount.into(), order, self.manner)?;
        let told = outside.wait(
            |device| self.state.lock().device = Some(device),
            |report| *self.answer.said.lock() = Some(report),
        );
        let result = told.and_then(|()| self.finish());
        let kept = result.is_ok() && !self.state.lock().stopping;
        let was_killed = outside.end(kept);
        if was_killed && !kept {
            // It has undone nothing.
            let device = self.state.lock().device.clone();
            if let Some(device) = device {
                outside::clear(&device, self.place(), self.manner)?;
            }
        }
        result
    }

    /// Where a file system of the disk goes.
    fn place(&self) -> Option<RecordedPath> {
        let (place, _) = self.job.file_system.as_ref()?;
        Some(place.clone())
    }

    fn finish(&mut self) -> Result<()> {
        let device = self.state.lock().device.clone();
        let device = device.ok_or_else(|| Error::errno(libc::ENXIO))?.path();
        let place = self.place();
        if let Some(entry) = self.entry.lock().as_mut() {
            entry.record.device = Some(RecordedPath(device.clone()));
            entry.record.file_system = place;
            entry.write();
        }
        let status = format!("{} attached to {}", self.shown, device.display());
        self.served.device = Some(device);
        self.answer.ready(&self.served, &status)?;
        log::info!("{status} ({})", describe(&self.served));
        Ok(())
    }
}

/// The report of an image that could not be opened. Who holds a locked one can often be found.
fn refused(what: &str, error: &Error) -> Box<Report> {
    let mut report = Report::refused(what, error);
    let Some(path) = error
        .place()
        .path
        .as_deref()
        .filter(|_| error.kind() == ErrorKind::Locked)
    else {
        return report;
    };
    let holders = holders::of_file(path);
    let Some((pid, name)) = holders.first() else {
        return report;
    };
    let records = Registry::open()
        .and_then(|registry| registry.all())
        .unwrap_or_default();
    let record = records.iter().find(|record| record.pid == *pid);
    let mounted = record.and_then(|record| Some((&record.mountpoint.as_ref()?.0, "umount", "at")));
    let attached = record.and_then(|record| Some((&record.device.as_ref()?.0, "detach", "as")));
    let mut held = format!("{name} (pid {pid}) has it open");
    if let Some((place, verb, at)) = mounted.or(attached) {
        let word = shell_word(place);
        held = format!("ploopfs (pid {pid}) serves it {at} {word}");
        report.hint = Some(format!("ploopfs {verb} {word}"));
    }
    report.why = Some(match report.why.take() {
        Some(why) => format!("{why}; {held}"),
        None => held,
    });
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_is_no_way_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("pid"), directory.path().join("other"));
        drop(PidFile::write(&path).unwrap());
        assert!(!path.exists());
        fs::write(&other, "precious").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(PidFile::write(&path).is_err());
        assert_eq!(fs::read(&other).unwrap(), b"precious");
    }
}
