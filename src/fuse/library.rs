//! The door that fuser keeps: its callbacks become calls of the file system.
//!
//! Imports: `disk`, `error`, `units`, all of `fuse` but the other doors.
//! Never: decides anything; allocates for a READ or a WRITE.
//!
//! fuser reads requests on several session threads, each into a buffer of its own, and lends what
//! it read for the time of a call. So READ and WRITE lend their bytes to the disk in turn, READ in
//! a buffer that the session thread keeps ([`super::buffer`]).

use super::answer::{
    Attr, DoneAnswer, Entry, Line, Lines, Opened, Position, ReadAnswer, Reading, Reply, Volume,
    Writing, Xattr,
};
use super::buffer::{self, Buffers};
use super::requests::Refused;
use super::through::{OpenReply, Through};
use super::{BACKGROUND_MAX, PloopFs, WANTED, WRITE_MAX, rules};
use crate::disk::{Disk, ReadReply};
use crate::error::Error;
use crate::units::DiskOffset;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

/// What fuser serves.
#[derive(Debug)]
pub(crate) struct Library {
    fs: PloopFs,
    threads: usize,
    buffers: Buffers,
    through: Arc<Through>,
}

impl Library {
    /// The door to a file system, with so many threads behind it.
    pub(crate) fn new(fs: PloopFs, threads: usize) -> Self {
        Self {
            fs,
            threads,
            buffers: Buffers::new(0),
            through: Arc::default(),
        }
    }

    /// How the kernel reads by itself.
    pub(crate) fn through(&self) -> Arc<Through> {
        Arc::clone(&self.through)
    }
}

impl Reply<()> for ReplyEmpty {
    fn send(self, answer: Result<(), Errno>) {
        match answer {
            Ok(()) => self.ok(),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<()> for WrittenReply {
    fn send(self, answer: Result<(), Errno>) {
        match answer {
            Ok(()) => self.reply.written(self.len),
            Err(errno) => self.reply.error(errno),
        }
    }
}

impl Reply<Entry> for ReplyEntry {
    fn send(self, answer: Result<Entry, Errno>) {
        match answer {
            Ok(Entry { attr, valid }) => self.entry(&valid, &attr, Generation(0)),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<Attr> for ReplyAttr {
    fn send(self, answer: Result<Attr, Errno>) {
        match answer {
            Ok(Attr { attr, valid }) => self.attr(&valid, &attr),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<Opened> for ReplyOpen {
    fn send(self, answer: Result<Opened, Errno>) {
        match answer {
            Ok(Opened { fh, flags }) => self.opened(FileHandle(fh), flags),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<&[u8]> for ReplyData {
    fn send(self, answer: Result<&[u8], Errno>) {
        match answer {
            Ok(bytes) => self.data(bytes),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<Xattr<'_>> for ReplyXattr {
    fn send(self, answer: Result<Xattr<'_>, Errno>) {
        match answer {
            Ok(Xattr::Len(len)) => self.size(len),
            Ok(Xattr::Value(value)) => self.data(value),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<Position> for ReplyLseek {
    fn send(self, answer: Result<Position, Errno>) {
        match answer {
            Ok(Position(at)) => self.offset(at),
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<Volume> for ReplyStatfs {
    fn send(self, answer: Result<Volume, Errno>) {
        match answer {
            Ok(Volume(all)) => {
                let (free, unit) = (all.free, rules::Statfs::UNIT);
                self.statfs(all.blocks, free, free, 0, 0, all.bsize, 255, unit);
            }
            Err(errno) => self.error(errno),
        }
    }
}

impl Reply<()> for ReplyDirectory {
    fn send(self, answer: Result<(), Errno>) {
        match answer {
            Ok(()) => self.ok(),
            Err(errno) => self.error(errno),
        }
    }
}

impl Lines for ReplyDirectory {
    fn add(&mut self, line: Line<'_>) -> bool {
        let is_full = Self::add(self, INodeNo(line.ino), line.next, line.kind, line.name);
        !is_full
    }
}

/// What a WRITE is answered through: all bytes, or an error.
#[derive(Debug)]
struct WrittenReply {
    reply: ReplyWrite,
    len: u32,
}

/// A READ in the session thread's buffer.
struct Lent<'a> {
    door: &'a Library,
    reply: ReplyData,
}

impl Reading for Lent<'_> {
    fn give(self, answer: Result<&[u8], Errno>) {
        self.reply.send(answer);
    }

    fn fill(self, disk: &Arc<Disk>, at: DiskOffset, len: usize) {
        let Self { door, reply } = self;
        let answer = ReadAnswer { reply, len };
        if len > buffer::SIZE {
            return read_huge(&door.fs, disk, at, answer);
        }
        // Without a buffer the answer is dropped unsent, which says EIO.
        let _ = door.buffers.with(|buf| disk.read(at, len, buf, answer));
    }
}

/// A read larger than the kernel's own limit, should there ever be one: in one piece all the same,
/// since a short answer would end the file.
fn read_huge(fs: &PloopFs, disk: &Arc<Disk>, at: DiskOffset, answer: ReadAnswer<ReplyData>) {
    let disk = Arc::clone(disk);
    fs.run_aside(move |_| {
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(answer.len).is_err() {
            return answer.done(Err(Error::errno(libc::ENOMEM)));
        }
        bytes.resize(answer.len, 0);
        let result = disk.read_at(at, &mut bytes);
        answer.done(result.map(|()| bytes.as_slice()));
    });
}

/// A WRITE whose bytes fuser lends.
struct LentWrite<'a> {
    data: &'a [u8],
    reply: ReplyWrite,
}

impl Writing for LentWrite<'_> {
    fn len(&self) -> usize {
        self.data.len()
    }

    fn refuse(self, errno: Errno) {
        self.reply.error(errno);
    }

    fn hand_over(self, disk: &Arc<Disk>, at: DiskOffset) {
        let Self { data, reply } = self;
        let Ok(len) = u32::try_from(data.len()) else {
            return reply.error(Errno::EINVAL);
        };
        let reply = WrittenReply { reply, len };
        let verb = "write";
        disk.write(at, data, DoneAnswer { reply, verb });
    }
}

fn is_for_writing(flags: OpenFlags) -> bool {
    flags.acc_mode() != OpenAccMode::O_RDONLY
}

impl Filesystem for Library {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut granted = InitFlags::empty();
        for flag in WANTED {
            granted.set(flag, config.add_capabilities(flag).is_ok());
        }
        if self.fs.has_flat() {
            let through = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(1).is_ok();
            self.through.set_granted(through);
        }
        // Each of these fails only for 0 and for more than fuser's own 16 MiB.
        let _ = config.set_max_write(WRITE_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX);
        self.buffers = Buffers::new(self.threads);
        self.fs.start(granted, self.threads)
    }

    fn destroy(&mut self) {
        self.fs.end();
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.fs.lookup(parent.0, name, reply);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.fs.getattr(ino.0, reply);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let wanted = rules::Wanted {
            mode,
            uid,
            gid,
            size,
        };
        let mtime = mtime.map(|time| match time {
            TimeOrNow::SpecificTime(time) => time,
            TimeOrNow::Now => SystemTime::now(),
        });
        self.fs.setattr(ino.0, wanted, mtime, reply);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.fs.readlink(ino.0, reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let flat = self.fs.flat(ino.0);
        let through = flat.map(|flat| (Arc::clone(flat), self.through()));
        let reply = OpenReply { reply, through };
        self.fs.open(ino.0, is_for_writing(flags), reply);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let door = self;
        self.fs.read(fh.0, offset, size, Lent { door, reply });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.fs.write(fh.0, offset, LentWrite { data, reply });
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.fs.nothing(reply);
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.fs.release(fh.0, is_for_writing(flags), reply);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.fs.fsync(fh.0, reply);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.fs.opendir(reply);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.fs.readdir(ino.0, offset, reply);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.fs.nothing(reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.fs.statfs(reply);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.fs.getxattr(ino.0, name, size, reply);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.fs.listxattr(ino.0, size, reply);
    }

    fn access(&self, _req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        self.fs.access(ino.0, mask, reply);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.fs.fallocate(fh.0, offset, length, mode, reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.fs.lseek(fh.0, offset, whence, reply);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Refused::Unknown.errno());
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Refused::Ioctl.errno());
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Refused::Xattr.errno());
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Refused::Xattr.errno());
    }

    // Links are refused so by default.

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Refused::Tree.errno());
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Refused::Tree.errno());
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Refused::Tree.errno());
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Refused::Tree.errno());
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Refused::Tree.errno());
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Refused::Tree.errno());
    }
}
