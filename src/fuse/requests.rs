//! One handler for each verb of the kernel.
//!
//! Imports: `disk`, `units`, all of `fuse`.
//! Never: holds more than the few lines that take a request apart and hand it on.
//!
//! fuser's default for a verb that is missing here is ENOSYS, after which the kernel does not ask
//! again. So every verb that means anything for a disk has a handler, and those that do not exist
//! are refused with an errno of their own. What a handler promises is written in [`super`].

use super::aside::Aside;
use super::buffer::Buffers;
use super::nodes::{Node, Sort};
use super::reply::{EmptyAnswer, NoAnswer, WriteAnswer, answer_empty};
use super::views::{Opened, View};
use super::{
    BACKGROUND_MAX, LIVE, PloopFs, SOURCE_XATTR, WRITE_MAX, answer_attr, answer_seek, answer_xattr,
    believe, is_for_writing, locks, look_for, rules,
};
use crate::units::len_u64;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FileType, Filesystem,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

/// More threads than there are beside those of the session: the disk's pool and flusher, signals...
const OTHER_THREADS: usize = 24;
/// Most bytes of one answer to READDIR, which fuser collects on the heap.
const LISTING_MAX: usize = 4096;
/// What the kernel's `fuse_dirent` has before the name.
const DIRENT_HEAD: usize = 24;

impl Filesystem for PloopFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut add = |flag| config.add_capabilities(flag).is_ok();
        if !add(InitFlags::FUSE_ASYNC_DIO) {
            log::warn!("this kernel sends direct I/O one request at a time; loop devices are slow");
        }
        // No set-user-ID bits or file capabilities exist here to be cleared by a write.
        self.has_xattrs = add(InitFlags::FUSE_HANDLE_KILLPRIV_V2);
        add(InitFlags::FUSE_PARALLEL_DIROPS);
        add(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP);
        // Each of these fails only for 0 and for more than fuser's own 16 MiB.
        let _ = config.set_max_write(WRITE_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX);
        let threads = self.views.settings.threads;
        if let Err(e) = locks::prepare(threads.saturating_add(OTHER_THREADS)) {
            log::warn!("locks may need memory later: {e}");
        }
        self.buffers = Buffers::new(threads);
        self.aside = Some(Aside::start()?);
        Ok(())
    }

    fn destroy(&mut self) {
        self.aside = None;
        if let Some(views) = Arc::get_mut(&mut self.views) {
            views.close_snapshots();
        }
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let child = self
            .node(parent)
            .ok()
            .and_then(|dir| self.views.tree.child(dir, name));
        let Some(node) = child else {
            return reply.error(Errno::ENOENT);
        };
        self.about(node, move |views| match views.attr(node) {
            Ok(attr) => reply.entry(&believe(node), &attr, Generation(0)),
            Err(errno) => reply.error(errno),
        });
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino) {
            Ok(node) => self.about(node, move |views| answer_attr(views, node, reply)),
            Err(errno) => reply.error(errno),
        }
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
        let node = match self.node(ino) {
            Ok(node) if self.views.is_writable(node) => node,
            Ok(_) => return reply.error(Errno::EROFS),
            Err(errno) => return reply.error(errno),
        };
        match self
            .views
            .present(node)
            .and_then(|present| rules::setattr(present, wanted))
        {
            Ok(()) => {
                match mtime {
                    Some(TimeOrNow::SpecificTime(time)) => self.views.changed(time),
                    Some(TimeOrNow::Now) => self.views.changed(SystemTime::now()),
                    None => {}
                }
                answer_attr(&self.views, node, reply);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match (self.node(ino), self.views.tree.newest()) {
            (Ok(Node::Latest), Some(name)) => reply.data(name.as_bytes()),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        let how = self.open_flags(node);
        if is_for_writing(flags) {
            if !self.views.is_writable(node) {
                return reply.error(Errno::EROFS);
            }
            self.views.writer_came();
        }
        if node == Node::Disk {
            return reply.opened(FileHandle(LIVE), how);
        }
        self.about(node, move |views| match views.open(node) {
            Ok(fh) => reply.opened(FileHandle(fh), how),
            Err(errno) => reply.error(errno),
        });
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
        if fh.0 == LIVE {
            return self.read_view(&self.views.live, offset, size, reply);
        }
        match self.views.opened(fh.0) {
            Some(Opened::View(view)) => self.read_view(&view, offset, size, reply),
            Some(Opened::Text(text)) => {
                let len = rules::read_len(offset, size, len_u64(text.len()));
                let start = usize::try_from(offset)
                    .unwrap_or(usize::MAX)
                    .min(text.len());
                reply.data(
                    text.get(start..)
                        .and_then(|rest| rest.get(..len))
                        .unwrap_or_default(),
                );
            }
            None => reply.error(Errno::EBADF),
        }
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
        if fh.0 != LIVE {
            return reply.error(Errno::EBADF);
        }
        let live = &self.views.live;
        match (
            rules::write(offset, data.len(), live.len),
            u32::try_from(data.len()),
        ) {
            (Ok(()), Ok(len)) => {
                self.views.changed(SystemTime::now());
                live.disk
                    .write(live.at(offset), data, WriteAnswer { reply, len });
            }
            (Err(errno), _) => reply.error(errno),
            (_, Err(_)) => reply.error(Errno::EINVAL),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // close(2) promises nothing; who wants durability asks by fsync.
        reply.ok();
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
        reply.ok();
        if fh.0 != LIVE {
            self.views.close(fh.0);
        } else if is_for_writing(flags) && self.views.writer_left() {
            self.views.live.disk.flush(NoAnswer);
        }
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // Asked of the disk even when it is read-only by now: it may be so after a lost write.
        match fh.0 {
            LIVE => self.views.live.disk.flush(EmptyAnswer {
                reply,
                verb: "fsync",
            }),
            _ => reply.ok(),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let dir = match self.node(ino) {
            Ok(dir) if dir.sort() == Sort::Directory => dir,
            Ok(_) => return reply.error(Errno::ENOTDIR),
            Err(errno) => return reply.error(errno),
        };
        self.about(dir, move |views| {
            let parts = match dir {
                Node::Root => views.partitions(),
                _ => Ok(Arc::default()),
            };
            let parts = match parts {
                Ok(parts) => parts,
                Err(errno) => return reply.error(errno),
            };
            let skip = usize::try_from(offset).unwrap_or(usize::MAX);
            let list = views.tree.list(dir, &parts).into_iter().flatten();
            let mut room = LISTING_MAX;
            for (next, (node, name)) in (1..).zip(list).skip(skip) {
                let kind = match node.sort() {
                    Sort::Directory => FileType::Directory,
                    Sort::File => FileType::RegularFile,
                    Sort::Link => FileType::Symlink,
                };
                let size = (DIRENT_HEAD + name.len()).next_multiple_of(8);
                // The kernel asks again for what did not fit.
                if size > room || reply.add(INodeNo(views.tree.ino(node)), next, kind, name) {
                    break;
                }
                room -= size;
            }
            reply.ok();
        });
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let View {
            disk, len: size, ..
        } = &self.views.live;
        let allocated = disk.allocated_bytes().unwrap_or(*size);
        let all = rules::Statfs::of(*size, disk.cluster_bytes(), allocated);
        let unit = rules::Statfs::UNIT;
        reply.statfs(all.blocks, all.free, all.free, 0, 0, all.bsize, 255, unit);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        answer_xattr(self.xattr(ino, name), size, reply);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = match self.xattr(ino, OsStr::new(SOURCE_XATTR)) {
            Ok(_) => Ok(concat!("user.ploopfs.source", "\0").as_bytes()),
            Err(Errno::NO_XATTR) => Ok(&b""[..]),
            Err(errno) => Err(errno),
        };
        answer_xattr(names, size, reply);
    }

    fn access(&self, _req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // Whose bits count is for the kernel to say (`default_permissions`); this says what no
        // owner can do.
        let answer = self.node(ino).and_then(|node| match node.sort() {
            Sort::File if mask.contains(AccessFlags::X_OK) => Err(Errno::EACCES),
            _ if mask.contains(AccessFlags::W_OK) && !self.views.is_writable(node) => {
                Err(Errno::EROFS)
            }
            _ => Ok(()),
        });
        answer_empty(reply, answer);
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
        if fh.0 != LIVE {
            return reply.error(Errno::EROFS);
        }
        let live = &self.views.live;
        match rules::fallocate(mode, offset, length, live.len) {
            Ok(Some((at, len))) => {
                self.views.changed(SystemTime::now());
                live.disk.zero(
                    live.at(at),
                    len,
                    EmptyAnswer {
                        reply,
                        verb: "fallocate",
                    },
                );
            }
            Ok(None) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
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
        let view = match (fh.0, self.views.opened(fh.0)) {
            (LIVE, _) => self.views.live.clone(),
            (_, Some(Opened::View(view))) => view,
            (_, Some(Opened::Text(text))) => {
                let len = len_u64(text.len());
                let found = rules::seek(offset, whence, len);
                let found = found.map(|(at, s)| if s == rules::Seek::Data { at } else { len });
                return answer_seek(found, reply);
            }
            (_, None) => return reply.error(Errno::EBADF),
        };
        match rules::seek(offset, whence, view.len) {
            Ok((at, s)) => self.run_aside(move |_| answer_seek(look_for(&view, at, s), reply)),
            Err(errno) => reply.error(errno),
        }
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
        // Not implemented, and the kernel copies by itself from then on without asking again.
        reply.error(Errno::ENOSYS);
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
        reply.error(Errno::ENOTTY);
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
        reply.error(Errno::EOPNOTSUPP);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }

    // The tree is fixed: nothing can be made, moved or removed. Links are refused by default.

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
        reply.error(Errno::EPERM);
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
        reply.error(Errno::EPERM);
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
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
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
        reply.error(Errno::EPERM);
    }
}
