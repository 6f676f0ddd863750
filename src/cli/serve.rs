//! From a parsed command to a daemon that serves a disk: common to `mount` and `attach`.
//!
//! Imports: `error`, `chain`, `disk`, `fuse`.
//! Never: opens an image, takes a lock or starts a thread before the fork; ends without closing the
//! disk that it opened.
//!
//! The parent gets one frame: what is served now, or the report of what went wrong. Everything in
//! [`Daemon::serve`] runs in the child (or, with `-f`, in the only process there is).

use super::exit;
use super::options::Settings;
use super::output::Report;
use crate::admin;
use crate::chain::bundle::{self, OpenedImages, Selection};
use crate::disk::{self, Disk};
use crate::error::{Error, Result};
use crate::fuse::attach::{self, Attached, FileSystemTarget};
use crate::fuse::daemon::{self, Outcome, Reporter, Side};
use crate::fuse::mount::{self, Mounted, Shape};
use crate::fuse::partitions::{self, Partition};
use crate::fuse::registry::{Record, RecordedPath, Registry};
use crate::fuse::signals::Signals;
use crate::fuse::{self, PloopFs};
use crate::fuse::{holders, logging, session};
use log::LevelFilter;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// Name of the disk in a mount that is a directory.
const DISK_NAME: &str = "disk.img";

/// Where the disk is to appear.
#[derive(Clone, Debug)]
pub enum Target {
    /// In the file tree.
    Mountpoint(PathBuf, Shape),
    /// As a loop device; perhaps with a file system of it mounted.
    Loop(Option<FileSystemTarget>),
}

/// How the root of the file system looks.
#[derive(Clone, Debug)]
pub enum View {
    /// A directory with `disk.img` and what goes with it.
    Directory,
    /// The disk itself.
    File,
    /// A directory with nothing but the disk under this name.
    Named(String),
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
}

/// A disk that is open, with what else there is to show.
struct Opened {
    disk: Arc<Disk>,
    images: Arc<OpenedImages>,
    partitions: Vec<Partition>,
}

/// Makes a path absolute before the daemon changes its directory.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::from(e).in_file(path))
}

/// Opens and locks the image.
fn open_disk(plan: &Plan) -> Result<Opened> {
    let images = Arc::new(bundle::open(&plan.image, &plan.settings.selection)?);
    let (disk, notes) = disk::open(Arc::clone(&images), &plan.settings.disk)?;
    notes.iter().for_each(|note| log::warn!("{note}"));
    let partitions = if plan.settings.partitions {
        partitions::list(&disk).unwrap_or_else(|e| {
            log::warn!("no partitions are shown: {e}");
            Vec::new()
        })
    } else {
        Vec::new()
    };
    Ok(Opened {
        disk,
        images,
        partitions,
    })
}

/// The file system over the open disk.
fn build_filesystem(opened: &Opened, view: &View, plan: &Plan) -> Result<PloopFs> {
    let (shape, disk_name) = match view {
        View::Directory => (fuse::Shape::Directory, DISK_NAME.to_owned()),
        View::File => (fuse::Shape::File, DISK_NAME.to_owned()),
        View::Named(name) => (fuse::Shape::Directory, name.clone()),
    };
    let ownership = &plan.settings.ownership;
    let snapshots = opened.images.snapshots.clone();
    let settings = fuse::Settings {
        uid: ownership.uid,
        gid: ownership.gid,
        file_mask: ownership.file_mask,
        dir_mask: ownership.dir_mask,
        mtime: modified(&plan.image),
        source: plan.image.display().to_string(),
        disk_name,
        latest: opened.images.latest(),
        partitions: plan.settings.partitions,
        info_json: info_json(plan)?,
        direct_io: matches!(view, View::Named(_)),
        threads: plan.settings.threads,
    };
    let (disk, images) = (Arc::downgrade(&opened.disk), Arc::clone(&opened.images));
    let opener = move |guid: &str| {
        let disk = disk.upgrade().ok_or_else(|| Error::errno(libc::ENODEV))?;
        disk::open_view(&disk, images.open_snapshot(guid)?)
    };
    let disk = Arc::clone(&opened.disk);
    Ok(PloopFs::new(
        disk,
        shape,
        settings,
        &snapshots,
        Box::new(opener),
    ))
}

fn modified(image: &Path) -> SystemTime {
    fs::metadata(image)
        .and_then(|meta| meta.modified())
        .unwrap_or_else(|_| SystemTime::now())
}

/// What `info --json` says of the image, with what only the daemon knows.
fn info_json(plan: &Plan) -> Result<String> {
    let selection = Selection {
        no_lock: true,
        write: false,
        ..plan.settings.selection.clone()
    };
    let info = admin::info::info(&plan.image, &selection)?;
    let mut document = serde_json::to_value(info).map_err(std::io::Error::from)?;
    document["mount"] = serde_json::json!({
        "layout": 1,
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "read_only": plan.settings.disk.read_only,
        "options": {
            "inline_order": plan.settings.disk.inline_order,
            "bat_cache": plan.settings.disk.bat_cache,
            "grow_step": plan.settings.disk.grow_step,
            "threads": plan.settings.threads,
        },
    });
    Ok(format!("{document:#}\n"))
}

/// Starts the daemon and returns when it serves; in the foreground, when it has ended.
pub fn launch(plan: &Plan) -> Result<Option<Served>, Box<Report>> {
    let what = what(plan);
    let level = match (plan.debug, plan.foreground) {
        (true, _) => LevelFilter::Debug,
        (false, _) => LevelFilter::Info,
    };
    if plan.foreground {
        let answer = Arc::new(Answer(Mutex::new(Some(Reporter::foreground()))));
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
            let answer = Arc::new(Answer(Mutex::new(Some(reporter))));
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

fn what(plan: &Plan) -> String {
    match plan.target {
        Target::Mountpoint(..) => format!("cannot mount {}", plan.shown),
        Target::Loop(_) => format!("cannot attach {}", plan.shown),
    }
}

/// The one answer that the parent gets.
struct Answer(Mutex<Option<Reporter>>);

impl Answer {
    fn ready(&self, served: &Served, status: &str) -> Result<()> {
        let Some(reporter) = self.0.lock().take() else {
            return Ok(());
        };
        let payload = serde_json::to_vec(served).map_err(std::io::Error::from)?;
        reporter.ready(&payload, status)
    }

    fn is_given(&self) -> bool {
        self.0.lock().is_none()
    }

    /// After the answer was given, only the log is left.
    fn failed(&self, report: &Report) {
        match (self.0.lock().take(), serde_json::to_vec(report)) {
            (Some(reporter), Ok(payload)) => reporter.failed(&payload),
            _ => log::error!("{}", report.text().trim_end()),
        }
    }

    fn watch_parent(&self) -> Result<()> {
        self.0
            .lock()
            .as_ref()
            .map_or(Ok(()), Reporter::watch_parent)
    }
}

/// A file that holds the process id while the process lives.
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &Path) -> Result<Self> {
        fs::write(path, format!("{}\n", std::process::id()))
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
            (None, Some(registry)) => registry.remove(&self.record),
            (None, None) => {}
        }
    }
}

struct Daemon<'a> {
    plan: &'a Plan,
    answer: Arc<Answer>,
}

impl Daemon<'_> {
    fn run(&self) -> Result<(), Box<Report>> {
        let what = what(self.plan);
        daemon::prepare_process();
        let signals = Signals::start().map_err(|e| Report::new(&what, &e.into()))?;
        self.answer
            .watch_parent()
            .map_err(|e| Report::new(&what, &e))?;
        let opened = open_disk(self.plan).map_err(|e| Report::refused(&what, &e))?;
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
        closed.and(served).map_err(|e| Report::new(&what, &e))
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
            if let Some(entry) = entry.lock().as_ref() {
                entry.write();
            }
            let status = format!("{} mounted at {}", plan.shown, mountpoint.display());
            self.answer.ready(&served, &status)?;
            log::info!("{status} ({})", describe(&served));
            Ok(())
        };
        let settings = &plan.settings;
        let (access, threads) = (settings.mount.access, settings.threads);
        let result = session::serve(filesystem, fd, access, threads, on_ready);
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
        let job = LoopJob {
            shown: plan.shown.clone(),
            name: PathBuf::from(name),
            read_only,
            partitions: opened.partitions.clone(),
            file_system: file_system.cloned(),
            served: served(&opened, plan),
            state: Arc::new(Mutex::new(LoopState::default())),
            entry: Arc::clone(entry),
            answer: Arc::clone(&self.answer),
        };
        drop(opened);
        let state = Arc::clone(&job.state);
        let (fd, mount) = signals.serving(|| {
            let made = mount::mount_nowhere(&plan.image, read_only)?;
            let state = Arc::clone(&state);
            Ok::<_, Error>((made, Box::new(move || drain_loop(&state)) as Box<_>))
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
        let (access, threads) = (plan.settings.mount.access, plan.settings.threads);
        let result = session::serve(filesystem, fd, access, threads, on_ready);
        let attached = thread.map_or(Ok(()), |thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(Error::errno(libc::EIO)))
        });
        result.and(attached)
    }
}

fn served(opened: &Opened, plan: &Plan) -> Served {
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

/// Ends the mount for newcomers and leaves those who use it in peace.
fn drain(mounted: &Mounted) {
    let place = mounted.mountpoint();
    match mounted.unmount(false) {
        Ok(()) => return,
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let users = holders::describe(place);
            let users = if users.is_empty() {
                "somebody".to_owned()
            } else {
                users
            };
            log::warn!(
                "{} is in use by {users}: serving until they are done",
                place.display()
            );
        }
        Err(e) => log::warn!("cannot unmount {}: {e}", place.display()),
    }
    if let Err(e) = mounted.unmount(true) {
        log::warn!("cannot detach {}: {e}", place.display());
    }
}

#[derive(Debug, Default)]
struct LoopState {
    device: Option<Attached>,
    stopping: bool,
}

/// The device goes at once, or with its last user.
fn drain_loop(state: &Mutex<LoopState>) {
    let mut state = state.lock();
    state.stopping = true;
    if let Some(device) = &state.device {
        if let Err(e) = device.clear(true) {
            log::warn!("cannot detach {}: {e}", device.path().display());
        }
    }
}

/// Sets the loop device up while the session threads serve it.
struct LoopJob {
    shown: String,
    name: PathBuf,
    read_only: bool,
    partitions: Vec<Partition>,
    file_system: Option<FileSystemTarget>,
    served: Served,
    state: Arc<Mutex<LoopState>>,
    entry: Arc<Mutex<Option<Entry>>>,
    answer: Arc<Answer>,
}

impl LoopJob {
    fn run(mut self, mount: OwnedFd) -> Result<()> {
        let device = attach::attach(&mount, &self.name, self.read_only);
        // From here on the device alone keeps the session alive; without one it ends now.
        drop(mount);
        let device = device?;
        self.state.lock().device = Some(device.clone());
        let result = self.finish(&device);
        if result.is_err() || self.state.lock().stopping {
            if let Err(e) = device.clear(true) {
                log::warn!("cannot detach {}: {e}", device.path().display());
            }
        }
        result
    }

    fn finish(&mut self, device: &Attached) -> Result<()> {
        device.tune();
        device.add_partitions(&self.partitions)?;
        if let Some(target) = &self.file_system {
            device.mount_file_system(target, self.read_only)?;
        }
        if let Some(entry) = self.entry.lock().as_mut() {
            entry.record.device = Some(RecordedPath(device.path()));
            let target = self.file_system.as_ref();
            entry.record.file_system = target.map(|target| RecordedPath(target.directory.clone()));
            entry.write();
        }
        self.served.device = Some(device.path());
        let status = format!("{} attached to {}", self.shown, device.path().display());
        if let Err(e) = self.answer.ready(&self.served, &status) {
            if let Some(target) = &self.file_system {
                let _ = mount::unmount_any(&target.directory, true);
            }
            return Err(e);
        }
        log::info!("{status} ({})", describe(&self.served));
        Ok(())
    }
}

/// The status of a report, as the program ends with it.
#[must_use]
pub fn exit_status(result: &Result<(), Box<Report>>) -> u8 {
    result
        .as_ref()
        .map_or_else(|report| report.status.max(exit::FAILED), |()| 0)
}
