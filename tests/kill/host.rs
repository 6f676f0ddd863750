//! A host file that fails as disks do: served by this process, with faults and power cuts on order.
//!
//! Imports: `support`; std, `anyhow`, `fuser`, `nix`.
//! Never: touches a mount that it did not make.
//!
//! What was written is there at once; it is durable when a sync returned 0. A failed sync may lose
//! what it should have made durable, while whoever reads through the page cache still sees it: the
//! kernel keeps those pages, and the next sync says ok. That is what a failing medium looks like.

use crate::forge::content::splitmix;
use crate::support::PLOOPFS;
use crate::support::guards::is_mounted;
use crate::support::harness::skip;
use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyOpen,
    ReplyWrite, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use nix::fcntl::FallocateFlags;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// What goes wrong, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// All is well.
    None,
    /// So many syncs go well, then one fails, and what it covered is lost.
    Sync(u32),
    /// One write that touches these bytes fails.
    Write(Range<u64>),
    /// So many operations that change or sync the file are carried out; at the next one the caller
    /// is killed, before it is carried out or after that.
    Kill(u32, When),
}

/// See [`Fault::Kill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// The operation does not happen.
    Before,
    /// It happens.
    After,
}

/// The file.
#[derive(Debug)]
pub(crate) struct State {
    now: Vec<u8>,
    durable: Vec<u8>,
    fault: Fault,
    /// Faults that have happened.
    failed: u32,
    /// Operations that change or sync the file.
    operations: u32,
    written_mark: u32,
}

impl State {
    /// One more operation of this caller; false when it is not to be carried out.
    fn admit(&mut self, caller: u32) -> bool {
        self.operations += 1;
        let Fault::Kill(left, when) = &mut self.fault else {
            return true;
        };
        if *left > 0 {
            *left -= 1;
            return true;
        }
        let when = *when;
        self.failed += 1;
        // Whatever else the dying process has under way is still carried out.
        self.fault = Fault::None;
        let exe = fs::read_link(format!("/proc/{caller}/exe")).unwrap_or_default();
        if exe.to_string_lossy().starts_with(PLOOPFS) {
            let _ = kill(Pid::from_raw(caller as i32), Signal::SIGKILL);
        }
        when == When::After
    }

    fn sync(&mut self) -> Result<(), Errno> {
        match &mut self.fault {
            Fault::Sync(0) => {
                self.fault = Fault::None;
                self.failed += 1;
                self.now = self.durable.clone();
                return Err(Errno::EIO);
            }
            Fault::Sync(left) => *left -= 1,
            _ => {}
        }
        self.durable.clone_from(&self.now);
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let end = at + bytes.len() as u64;
        if let Fault::Write(range) = &self.fault {
            if at < range.end && end > range.start {
                self.fault = Fault::None;
                self.failed += 1;
                return Err(Errno::EIO);
            }
        }
        if self.now.len() < end as usize {
            self.now.resize(end as usize, 0);
        }
        self.now[at as usize..end as usize].copy_from_slice(bytes);
        if at == 0 {
            self.written_mark = mark_of(&self.now);
        }
        Ok(())
    }

    fn allocate(&mut self, at: u64, len: u64, mode: i32) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits_truncate(mode);
        let end = (at + len) as usize;
        let keep = mode.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE);
        if !keep && end > self.now.len() {
            self.now.resize(end, 0);
        }
        let zeroing = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE;
        if mode.intersects(zeroing) {
            let end = end.min(self.now.len());
            if let Some(range) = self.now.get_mut(at as usize..end) {
                range.fill(0);
            }
        }
        Ok(())
    }

    /// Of what was not synced, each sector is kept or lost, and the length is either.
    fn cut(&mut self, dice: &mut u64) {
        let mut left = self.durable.clone();
        if splitmix(dice) % 2 == 0 || self.now.len() < left.len() {
            left.resize(self.now.len(), 0);
        }
        let pairs = left.chunks_mut(512).zip(self.now.chunks(512));
        for (old, new) in pairs {
            if splitmix(dice) % 2 == 0 && old.len() == new.len() {
                old.copy_from_slice(new);
            }
        }
        self.now.clone_from(&left);
        self.durable = left;
    }
}

/// The host's file system: its root is the file.
struct Served {
    state: Arc<Mutex<State>>,
}

fn mark_of(bytes: &[u8]) -> u32 {
    let bytes = bytes.get(44..48).unwrap_or_default();
    let bytes = bytes.iter().rev();
    bytes.fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Served {
    fn attr(&self) -> FileAttr {
        let size = lock(&self.state).now.len() as u64;
        // A time that stands still: pages stay in the cache until somebody drops them.
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: INodeNo::ROOT,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

fn answer(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Served {
    fn getattr(&self, _: &Request, _: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &self.attr());
    }

    fn setattr(
        &self,
        request: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size {
            let mut state = lock(&self.state);
            if state.admit(request.pid()) {
                state.now.resize(size as usize, 0);
            }
        }
        reply.attr(&Duration::ZERO, &self.attr());
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = lock(&self.state);
        let len = state.now.len();
        let start = (offset as usize).min(len);
        reply.data(&state.now[start..(start + size as usize).min(len)]);
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = lock(&self.state);
        if !state.admit(request.pid()) {
            return reply.error(Errno::EIO);
        }
        match state.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(&self, request: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = lock(&self.state);
        let result = match state.admit(request.pid()) {
            true => state.sync(),
            false => Err(Errno::EIO),
        };
        answer(result, reply);
    }

    fn fallocate(
        &self,
        request: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mut state = lock(&self.state);
        let result = match state.admit(request.pid()) {
            true => state.allocate(offset, length, mode),
            false => Err(Errno::EIO),
        };
        answer(result, reply);
    }
}

/// The file with its mount.
#[derive(Debug)]
pub(crate) struct Host {
    state: Arc<Mutex<State>>,
    at: PathBuf,
    session: Option<BackgroundSession>,
}

impl Host {
    /// Serves the bytes of a file in its own place.
    pub(crate) fn over(at: &Path) -> Result<Self> {
        let bytes = fs::read(at)?;
        let state = State {
            durable: bytes.clone(),
            now: bytes,
            fault: Fault::None,
            failed: 0,
            operations: 0,
            written_mark: 0,
        };
        let mut host = Self {
            state: Arc::new(Mutex::new(state)),
            at: at.to_path_buf(),
            session: None,
        };
        host.start()?;
        Ok(host)
    }

    fn start(&mut self) -> Result<()> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let fd = OwnedFd::from(device?);
        let user = nix::unistd::geteuid();
        let data = format!(
            "fd={},rootmode=100000,user_id={user},group_id={}",
            fd.as_raw_fd(),
            nix::unistd::getegid()
        );
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        let mounted = mount(
            Some("failing"),
            &self.at,
            Some("fuse"),
            flags,
            Some(data.as_str()),
        );
        mounted.map_err(|errno| skip(format!("mount(2) of a FUSE file: {errno}")))?;
        let served = Served {
            state: Arc::clone(&self.state),
        };
        let mut config = Config::default();
        config.n_threads = Some(2);
        let session = Session::from_fd(served, fd, SessionACL::All, config);
        self.session = Some(session?.spawn()?);
        Ok(())
    }

    fn stop(&mut self) {
        if is_mounted(&self.at) {
            let _ = umount2(&self.at, MntFlags::MNT_DETACH);
        }
        // With its last user gone the kernel ends the session.
        if let Some(session) = self.session.take() {
            let _ = session.join();
        }
    }

    /// What to do wrong from now on.
    pub(crate) fn arm(&self, fault: Fault) {
        lock(&self.state).fault = fault;
    }

    /// Operations that have changed or synced the file.
    pub(crate) fn operations(&self) -> u32 {
        lock(&self.state).operations
    }

    /// Faults that have happened.
    pub(crate) fn failed(&self) -> u32 {
        lock(&self.state).failed
    }

    /// The in-use mark as a power cut would leave it now.
    pub(crate) fn durable_mark(&self) -> u32 {
        mark_of(&lock(&self.state).durable)
    }

    /// The in-use mark as it was written last, whether it is durable or not.
    pub(crate) fn written_mark(&self) -> u32 {
        lock(&self.state).written_mark
    }

    /// The power fails: with it goes every cache. Nobody may have the file open any more.
    pub(crate) fn cut(&mut self, dice: &mut u64) -> Result<()> {
        self.stop();
        lock(&self.state).cut(dice);
        self.start().context("after a power cut")
    }

    /// The host goes on: what was written becomes durable in time.
    pub(crate) fn survive(&self) {
        let mut state = lock(&self.state);
        state.durable = state.now.clone();
    }

    /// Writes what is durable to a file.
    pub(crate) fn save(&self, to: &Path) -> Result<()> {
        Ok(fs::write(to, &lock(&self.state).durable)?)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}
