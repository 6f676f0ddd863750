//! A disk over simulated files that is mounted in this process, several times: closed, killed, or
//! cut off, and mounted again.
//!
//! Imports: `clients`, the simulation, `support`; `ploopfs`.
//! Never: leaves a mount behind, or waits for ever for an answer: a mount that does not end in time
//! is aborted.

use crate::clients::Scene;
use crate::forge::content::splitmix;
use crate::sim::kinds::DiskKind;
use crate::sim::storage::{Event, Manners, World};
use crate::support::scratch;
use anyhow::{Context, Result, anyhow, ensure};
use nix::mount::{MntFlags, MsFlags, mount as mount_any, umount2};
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy};
use ploopfs::fuse::mount::{Access, MountOptions, Shape, mount};
use ploopfs::fuse::session::{self, Transport};
use ploopfs::fuse::{self, PloopFs, Settings};
use ploopfs::sys::mount::mount_table;
use ploopfs::units::DiskOffset;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// Times that the disk is mounted.
const LIVES: u64 = 3;
/// Longest that one life may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Threads of a door that has no queues.
const THREADS: usize = 4;

/// The number of the session of the mount at this place. Found while it is mounted: a mount that is
/// out of sight has no place any more, and may hang all the same.
fn number_of(at: &Path) -> Result<String> {
    let table = mount_table()?;
    let entry = table.iter().rev().find(|entry| entry.mountpoint == at);
    let device = &entry.context("the mount is not in the table")?.device;
    let number = device.strip_prefix("0:").context("a device of the host")?;
    Ok(number.to_owned())
}

/// Ends a session that hangs, so that whoever waits for an answer gets an error. The kernel's
/// switches for that are mounted for as long, as not every host has them.
fn abort(at: &Path, number: &str) -> Result<()> {
    eprintln!("watchdog: aborting the mount at {}", at.display());
    let (dir, kind) = (scratch()?, Some("fusectl"));
    mount_any(kind, dir.path(), kind, MsFlags::empty(), None::<&str>)?;
    let aborted = fs::write(dir.path().join(number).join("abort"), "1");
    umount2(dir.path(), MntFlags::MNT_DETACH)?;
    Ok(aborted?)
}

/// A mount in this process.
struct Mount {
    at: PathBuf,
    serving: Option<JoinHandle<ploopfs::error::Result<()>>>,
    /// The watchdog had to end it.
    is_overdue: Arc<AtomicBool>,
    /// Goes with this, and with it the one who would abort the mount.
    _watchdog: mpsc::Sender<()>,
}

impl Mount {
    fn new(disk: Arc<Disk>, at: &Path, transport: Transport) -> Result<Self> {
        let settings = Settings {
            flat: None,
            uid: 0,
            gid: 0,
            file_mask: 0o077,
            dir_mask: 0o077,
            mtime: SystemTime::now(),
            source: "simulated".to_owned(),
            disk_name: "disk.img".to_owned(),
            latest: None,
            partitions: false,
            info_json: "{}".to_owned(),
            // Two who read see the same; a page cache between would have to be asked as well.
            direct_io: true,
        };
        let none = Box::new(|_: &str| Err(ploopfs::error::Error::errno(libc::ENOENT)));
        let file_system = PloopFs::new(disk, fuse::Shape::Directory, settings, &[], none);
        let options = MountOptions::default();
        let (fd, mounted) = mount(Path::new("simulated"), at, Shape::Directory, &options)?;
        drop(mounted);
        let number = number_of(at)?;
        let (tell, is_ready) = mpsc::channel();
        let (watchdog, is_over) = mpsc::channel();
        let serving = thread::spawn(move || {
            let ready = || {
                // Who waits for it may have given up.
                let _ = tell.send(());
                Ok(())
            };
            let how = (transport, THREADS);
            session::serve(file_system, fd, Access::Owner, how, ready)
        });
        let place = at.to_path_buf();
        let is_overdue = Arc::new(AtomicBool::new(false));
        let overdue = Arc::clone(&is_overdue);
        thread::spawn(move || {
            if is_over.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                // Whoever waits for an answer may take the error for the end of a life.
                overdue.store(true, Ordering::SeqCst);
                if let Err(why) = abort(&place, &number) {
                    eprintln!("watchdog: {why:#}");
                }
            }
        });
        let mount = Self {
            at: at.to_path_buf(),
            serving: Some(serving),
            is_overdue,
            _watchdog: watchdog,
        };
        // The sender goes with the session if that fails.
        match is_ready.recv() {
            Ok(()) => Ok(mount),
            Err(_) => Err(mount.end().err().unwrap_or_else(|| anyhow!("no session"))),
        }
    }

    fn open(&self) -> Result<File> {
        let path = self.at.join("disk.img");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        file.context("the disk cannot be opened through the mount")
    }

    /// Unmounts, and waits until nobody serves any more.
    fn end(mut self) -> Result<()> {
        self.unmount();
        let serving = self.serving.take().context("it has ended")?;
        let served = serving.join();
        let is_overdue = self.is_overdue.load(Ordering::SeqCst);
        ensure!(!is_overdue, "a life took longer than {PATIENCE:?}");
        served
            .map_err(|_| anyhow!("the session panicked"))?
            .context("the session")
    }

    fn unmount(&self) {
        // It may have gone with its session.
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            self.unmount();
            let _ = serving.join();
        }
    }
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Close,
    Kill,
    Cut,
}

/// All lives of one disk.
pub(crate) struct Run<'a> {
    kind: &'a DiskKind,
    transport: Transport,
    world: Arc<World>,
    seed: u64,
    dir: TempDir,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        kind: &'a DiskKind,
        transport: Transport,
        seed: u64,
        manners: Manners,
    ) -> Result<Self> {
        Ok(Self {
            kind,
            transport,
            world: World::new(kind.files(), manners, true),
            seed,
            dir: scratch()?,
        })
    }

    /// What was done to the files, and what the clients were told.
    pub(crate) fn log(&self) -> Vec<Event> {
        self.world.log()
    }

    /// Lives all lives. What was wrong while they lasted comes back; an error says that the disk
    /// could not be worked on.
    pub(crate) fn live(&self) -> Result<Vec<String>> {
        let mut dice = self.seed;
        let mut complaints = Vec::new();
        let mut next = 1;
        for life in 0..LIVES {
            let end = match splitmix(&mut dice) % 4 {
                _ if life + 1 == LIVES => End::Close,
                0 => End::Close,
                1 => End::Kill,
                _ => End::Cut,
            };
            complaints.append(&mut self.life(end, &mut dice, &mut next)?);
            if !complaints.is_empty() {
                break;
            }
        }
        Ok(complaints)
    }

    fn options(dice: &mut u64) -> DiskOptions {
        let mut one_of = |all: [u64; 3]| all[(splitmix(dice) % 3) as usize];
        DiskOptions {
            inline_order: one_of([0, 3, 7]) as u32,
            bat_cache: one_of([1, 1 << 20, 1 << 20]),
            grow_step: one_of([1, 1 << 15, 1 << 20]),
            enospc: EnospcPolicy::Fail,
            flush_interval_ms: one_of([0, 5, 30]),
            pool_threads: 2,
            ..DiskOptions::default()
        }
    }

    fn life(&self, end: End, dice: &mut u64, next: &mut u64) -> Result<Vec<String>> {
        let world = &self.world;
        let process = world.process();
        let options = Self::options(dice);
        let (disk, _) = disk::open(self.kind.open(world), &options).context("it opens")?;
        let mut shows = vec![0; usize::try_from(disk.size_bytes())?];
        disk.read_at(DiskOffset::ZERO, &mut shows)?;
        let shows = Arc::new(shows);
        world.note(Event::Opened {
            shows: Arc::clone(&shows),
        });
        if end != End::Close {
            world.kill_after(50 + splitmix(dice) % 500);
        }
        let mount = Mount::new(Arc::clone(&disk), self.dir.path(), self.transport)?;
        let scene = Scene::new(world, mount.open()?, self.kind.windows(), shows, *next);
        let complaints = scene.work(dice, next);
        let ended = mount.end();
        let is_dead = world.is_dead(process);
        ended?;
        // A close that succeeds has made everything durable.
        let flush = *next;
        *next += 1;
        world.note(Event::FlushBegan { flush });
        let closed = disk.close();
        if !world.is_dead(process) {
            closed.context("it closes")?;
            world.note(Event::FlushDone { flush });
            ensure!(!is_dead, "nobody comes back from the dead");
            world.kill();
        }
        if end == End::Cut {
            world.cut(world.media().after_cut(dice).0);
        }
        Ok(complaints)
    }
}
