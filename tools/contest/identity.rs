//! The classic ceiling: one file shown through FUSE as it is, one pread or pwrite a request.
//!
//! Imports: ploopfs's `fuse::mount`; `fuser`.
//! Never: looks anything up, counts, or hands a request to another thread.
//!
//! It runs on the same library, the same number of threads and the same INIT flags as ploopfs,
//! so that what lies between the two is what ploopfs itself costs. What the library and the kernel
//! cost is in both.

use anyhow::{Context, Result, bail};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal};
use ploopfs::fuse::mount::{self, MountOptions};
use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// With this variable in its environment the program is this server.
pub(crate) const AS_IDENTITY: &str = "PLOOPFS_BENCH_IDENTITY";

/// Name of the only file.
pub(crate) const FILE: &str = "disk.img";

const ROOT: INodeNo = INodeNo(1);
const DISK: INodeNo = INodeNo(2);
const BELIEVE: Duration = Duration::from_secs(1);
const ALIGN: usize = 4096;
const BUFFER: usize = (1 << 20) + ALIGN;

thread_local! {
    static BYTES: RefCell<Vec<u8>> = RefCell::new(vec![0xa5; BUFFER + ALIGN]);
}

/// How it is served, as words of a command line.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// The file behind it.
    pub(crate) file: PathBuf,
    /// Where it is mounted.
    pub(crate) mountpoint: PathBuf,
    /// Session threads.
    pub(crate) threads: usize,
    /// Past the kernel's page cache, as `ploopfs attach` serves its disk.
    pub(crate) for_loop: bool,
    /// The file is read and written with O_DIRECT.
    pub(crate) direct: bool,
}

impl Setup {
    /// The arguments that [`main`] takes.
    pub(crate) fn words(&self) -> Vec<std::ffi::OsString> {
        let flag = |set: bool| if set { "1" } else { "0" }.into();
        vec![
            self.file.clone().into(),
            self.mountpoint.clone().into(),
            self.threads.to_string().into(),
            flag(self.for_loop),
            flag(self.direct),
        ]
    }

    fn from_words() -> Result<Self> {
        let words: Vec<_> = std::env::args_os().skip(1).collect();
        let [file, mountpoint, threads, for_loop, direct] = words.as_slice() else {
            bail!("expects a file, a mountpoint, a number of threads and two flags");
        };
        Ok(Self {
            file: file.into(),
            mountpoint: mountpoint.into(),
            threads: threads.to_string_lossy().parse()?,
            for_loop: for_loop == "1",
            direct: direct == "1",
        })
    }
}

#[derive(Debug)]
struct Identity {
    file: File,
    size: u64,
    setup: Setup,
}

impl Identity {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let is_disk = ino == DISK;
        FileAttr {
            ino,
            size: if is_disk { self.size } else { 0 },
            blocks: if is_disk { self.size / 512 } else { 0 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_disk {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_disk { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// Runs `serve` with this thread's aligned buffer.
fn with_buffer<R>(serve: impl FnOnce(&mut [u8]) -> R) -> R {
    BYTES.with_borrow_mut(|bytes| {
        let skip = bytes.as_ptr().align_offset(ALIGN);
        serve(&mut bytes[skip..skip + BUFFER])
    })
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Filesystem for Identity {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // As in ploopfs's own; tools/bench is worth nothing when the two differ.
        for flag in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(64);
        let _ = config.set_congestion_threshold(64);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == ROOT && name == FILE {
            reply.entry(&BELIEVE, &self.attr(DISK), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&BELIEVE, &self.attr(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let how = if self.setup.for_loop {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        } else {
            FopenFlags::empty()
        };
        reply.opened(FileHandle(0), how);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = u64::from(size).min(self.size.saturating_sub(offset)) as usize;
        with_buffer(
            |buf| match self.file.read_exact_at(&mut buf[..len], offset) {
                Ok(()) => reply.data(&buf[..len]),
                Err(e) => reply.error(errno(&e)),
            },
        );
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = if self.setup.direct {
            // The library's payload is not aligned as O_DIRECT wants it.
            with_buffer(|buf| {
                buf[..data.len()].copy_from_slice(data);
                self.file.write_all_at(&buf[..data.len()], offset)
            })
        } else {
            self.file.write_all_at(data, offset)
        };
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.file.sync_data() {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (at, len) = (offset as i64, length as i64);
        let mode = FallocateFlags::from_bits_truncate(mode);
        match fallocate(&self.file, mode, at, len) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(Errno::from_i32(e as i32)),
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        reply.statfs(self.size / 4096, 0, 0, 2, 0, 1 << 20, 255, 4096);
    }
}

/// Ends the session on SIGTERM by taking the mount away.
fn unmount_on_signal(mountpoint: &Path) -> Result<()> {
    let set: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    set.thread_block()?;
    let mountpoint = mountpoint.to_owned();
    std::thread::spawn(move || {
        while set.wait().is_err() {}
        let _ = umount2(&mountpoint, MntFlags::MNT_DETACH);
    });
    Ok(())
}

/// Serves until it is unmounted.
pub(crate) fn main() -> Result<()> {
    let setup = Setup::from_words()?;
    unmount_on_signal(&setup.mountpoint)?;
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(if setup.direct { libc::O_DIRECT } else { 0 })
        .open(&setup.file)
        .with_context(|| format!("cannot open {}", setup.file.display()))?;
    let options = MountOptions {
        subtype: Some("identity".into()),
        ..MountOptions::default()
    };
    let (place, shape) = mount::examine(&setup.mountpoint, &options)?;
    let (fd, _mounted) = mount::mount(&setup.file, &place, shape, &options)?;
    let threads = setup.threads;
    let size = file.metadata()?.len();
    let identity = Identity { file, size, setup };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    Session::from_fd(identity, fd, SessionACL::All, config)?.run()?;
    Ok(())
}
