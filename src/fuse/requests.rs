//! What each request means, whichever door it came in by.
//!
//! Imports: `disk`, `planted`, `units`, all of `fuse` but the doors.
//! Never: knows a door; holds more than the few lines that decide about a request and hand it on.
//!
//! The doors (`library.rs`, `device.rs`, `rings.rs`) take requests apart and call the verbs here;
//! what a verb promises is written in [`super`]. ENOSYS, after which the kernel does not ask again,
//! is said of what does not exist for a disk; everything that means anything for one has a verb, or
//! an errno of its own in [`Refused`].

use super::answer::{
    Attr, DoneAnswer, Entry, Line, Lines, NoAnswer, Opened, Position, Reading, Reply, Volume,
    Writing, Xattr,
};
use super::nodes::{Node, Sort};
use super::views::{self, View, Views};
use super::{LIVE, PloopFs, SOURCE_XATTR, believe, look_for, rules};
use crate::planted::{Bug, planted};
use crate::units::len_u64;
use fuser::{AccessFlags, Errno, FileType};
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::SystemTime;

/// Most bytes of one answer to READDIR, which is collected on the heap.
pub(crate) const LISTING_MAX: usize = 4096;
/// What the kernel's `fuse_dirent` has before the name.
pub(crate) const DIRENT_HEAD: usize = 24;

/// Verbs that are always refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Making, moving or removing names: the tree is fixed.
    Tree,
    /// Changing extended attributes.
    Xattr,
    /// Ioctls.
    Ioctl,
    /// Copying by the file system: the kernel copies by itself from then on, without asking again.
    Unknown,
}

impl Refused {
    /// What the kernel is told.
    pub(crate) fn errno(self) -> Errno {
        match self {
            Self::Tree => Errno::EPERM,
            Self::Xattr => Errno::EOPNOTSUPP,
            Self::Ioctl => Errno::ENOTTY,
            Self::Unknown => Errno::ENOSYS,
        }
    }
}

/// The attributes of a node, as an answer.
fn attr(views: &Views, node: Node) -> Result<Attr, Errno> {
    let attr = views.attr(node)?;
    Ok(Attr {
        attr,
        valid: believe(node),
    })
}

/// A value, or its length where nobody wants more.
fn value(value: &[u8], size: u32) -> Result<Xattr<'_>, Errno> {
    match u32::try_from(value.len()) {
        Ok(len) if size == 0 => Ok(Xattr::Len(len)),
        Ok(len) if len <= size => Ok(Xattr::Value(value)),
        _ => Err(Errno::ERANGE),
    }
}

impl PloopFs {
    pub(crate) fn lookup(&self, parent: u64, name: &OsStr, reply: impl Reply<Entry>) {
        let child = self
            .node(parent)
            .ok()
            .and_then(|dir| self.views.tree.child(dir, name));
        let Some(node) = child else {
            return reply.send(Err(Errno::ENOENT));
        };
        self.about(node, move |views| {
            let entry = attr(views, node).map(|Attr { attr, valid }| Entry { attr, valid });
            reply.send(entry);
        });
    }

    pub(crate) fn getattr(&self, ino: u64, reply: impl Reply<Attr>) {
        match self.node(ino) {
            Ok(node) => self.about(node, move |views| reply.send(attr(views, node))),
            Err(errno) => reply.send(Err(errno)),
        }
    }

    pub(crate) fn setattr(
        &self,
        ino: u64,
        wanted: rules::Wanted,
        mtime: Option<SystemTime>,
        reply: impl Reply<Attr>,
    ) {
        let taken = self.node(ino).and_then(|node| {
            if !self.views.is_writable(node) {
                return Err(Errno::EROFS);
            }
            rules::setattr(self.views.present(node)?, wanted)?;
            if let Some(time) = mtime {
                self.views.changed(time);
            }
            attr(&self.views, node)
        });
        reply.send(taken);
    }

    pub(crate) fn readlink(&self, ino: u64, reply: impl for<'a> Reply<&'a [u8]>) {
        reply.send(match (self.node(ino), self.views.tree.newest()) {
            (Ok(Node::Latest), Some(name)) => Ok(name.as_bytes()),
            _ => Err(Errno::EINVAL),
        });
    }

    pub(crate) fn open(&self, ino: u64, for_writing: bool, reply: impl Reply<Opened>) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(errno) => return reply.send(Err(errno)),
        };
        let flags = self.open_flags(node);
        if for_writing {
            if !self.views.is_writable(node) {
                return reply.send(Err(Errno::EROFS));
            }
            self.views.writer_came();
        }
        if node == Node::Disk {
            return reply.send(Ok(Opened { fh: LIVE, flags }));
        }
        self.about(node, move |views| {
            reply.send(views.open(node).map(|fh| Opened { fh, flags }));
        });
    }

    pub(crate) fn read(&self, fh: u64, offset: u64, size: u32, reading: impl Reading) {
        if fh == LIVE {
            return read_view(&self.views.live, offset, size, reading);
        }
        match self.views.opened(fh) {
            Some(views::Opened::View(view)) => read_view(&view, offset, size, reading),
            Some(views::Opened::Text(text)) => {
                let len = rules::read_len(offset, size, len_u64(text.len()));
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = text.get(start.min(text.len())..);
                reading.give(Ok(rest.and_then(|rest| rest.get(..len)).unwrap_or(&[])));
            }
            None => reading.give(Err(Errno::EBADF)),
        }
    }

    pub(crate) fn write(&self, fh: u64, offset: u64, writing: impl Writing) {
        if fh != LIVE {
            return writing.refuse(Errno::EBADF);
        }
        let live = &self.views.live;
        match rules::write(offset, writing.len(), live.len) {
            Ok(()) => {
                self.views.changed(SystemTime::now());
                writing.hand_over(&live.disk, live.at(offset));
            }
            Err(errno) => writing.refuse(errno),
        }
    }

    /// FLUSH, and what else is said at the end of something. close(2) promises nothing; who wants
    /// durability asks by fsync.
    pub(crate) fn nothing(&self, reply: impl Reply<()>) {
        reply.send(Ok(()));
    }

    pub(crate) fn release(&self, fh: u64, for_writing: bool, reply: impl Reply<()>) {
        reply.send(Ok(()));
        if fh != LIVE {
            self.views.close(fh);
        } else if for_writing && self.views.writer_left() {
            self.views.live.disk.flush(NoAnswer);
        }
    }

    pub(crate) fn fsync(&self, fh: u64, reply: impl Reply<()>) {
        let verb = "fsync";
        // Asked of the disk even when it is read-only by now: it may be so after a lost write.
        match fh {
            LIVE if planted(Bug::FsyncAnsweredEarly) => {
                reply.send(Ok(()));
                self.views.live.disk.flush(NoAnswer);
            }
            LIVE => self.views.live.disk.flush(DoneAnswer { reply, verb }),
            _ => reply.send(Ok(())),
        }
    }

    pub(crate) fn opendir(&self, reply: impl Reply<Opened>) {
        let flags = fuser::FopenFlags::empty();
        reply.send(Ok(Opened { fh: LIVE, flags }));
    }

    pub(crate) fn readdir(&self, ino: u64, offset: u64, mut lines: impl Lines) {
        let dir = match self.node(ino) {
            Ok(dir) if dir.sort() == Sort::Directory => dir,
            Ok(_) => return lines.send(Err(Errno::ENOTDIR)),
            Err(errno) => return lines.send(Err(errno)),
        };
        self.about(dir, move |views| {
            let listed = list(views, dir, offset, &mut lines);
            lines.send(listed);
        });
    }

    pub(crate) fn statfs(&self, reply: impl Reply<Volume>) {
        let View {
            disk, len: size, ..
        } = &self.views.live;
        let allocated = disk.allocated_bytes().unwrap_or(*size);
        let all = rules::Statfs::of(*size, disk.cluster_bytes(), allocated);
        reply.send(Ok(Volume(all)));
    }

    pub(crate) fn getxattr(
        &self,
        ino: u64,
        name: &OsStr,
        size: u32,
        reply: impl for<'a> Reply<Xattr<'a>>,
    ) {
        reply.send(self.xattr(ino, name).and_then(|bytes| value(bytes, size)));
    }

    pub(crate) fn listxattr(&self, ino: u64, size: u32, reply: impl for<'a> Reply<Xattr<'a>>) {
        let names = match self.xattr(ino, OsStr::new(SOURCE_XATTR)) {
            Ok(_) => Ok(concat!("user.ploopfs.source", "\0").as_bytes()),
            Err(Errno::NO_XATTR) => Ok(&b""[..]),
            Err(errno) => Err(errno),
        };
        reply.send(names.and_then(|names| value(names, size)));
    }

    pub(crate) fn access(&self, ino: u64, mask: AccessFlags, reply: impl Reply<()>) {
        // Whose bits count is for the kernel to say (`default_permissions`); this says what no
        // owner can do.
        reply.send(self.node(ino).and_then(|node| match node.sort() {
            Sort::File if mask.contains(AccessFlags::X_OK) => Err(Errno::EACCES),
            _ if mask.contains(AccessFlags::W_OK) && !self.views.is_writable(node) => {
                Err(Errno::EROFS)
            }
            _ => Ok(()),
        }));
    }

    pub(crate) fn fallocate(&self, fh: u64, at: u64, len: u64, mode: i32, reply: impl Reply<()>) {
        if fh != LIVE {
            return reply.send(Err(Errno::EROFS));
        }
        let live = &self.views.live;
        match rules::fallocate(mode, at, len, live.len) {
            Ok(Some((at, len))) => {
                self.views.changed(SystemTime::now());
                let verb = "fallocate";
                live.disk.zero(live.at(at), len, DoneAnswer { reply, verb });
            }
            Ok(None) => reply.send(Ok(())),
            Err(errno) => reply.send(Err(errno)),
        }
    }

    pub(crate) fn lseek(&self, fh: u64, offset: i64, whence: i32, reply: impl Reply<Position>) {
        let said = |result: Result<u64, Errno>| {
            let at = result.and_then(|at| i64::try_from(at).map_err(|_| Errno::EOVERFLOW));
            at.map(Position)
        };
        let view = match (fh, self.views.opened(fh)) {
            (LIVE, _) => self.views.live.clone(),
            (_, Some(views::Opened::View(view))) => view,
            (_, Some(views::Opened::Text(text))) => {
                let len = len_u64(text.len());
                let found = rules::seek(offset, whence, len);
                let found = found.map(|(at, s)| if s == rules::Seek::Data { at } else { len });
                return reply.send(said(found));
            }
            (_, None) => return reply.send(Err(Errno::EBADF)),
        };
        match rules::seek(offset, whence, view.len) {
            Ok((at, s)) => self.run_aside(move |_| reply.send(said(look_for(&view, at, s)))),
            Err(errno) => reply.send(Err(errno)),
        }
    }
}

fn read_view(view: &View, offset: u64, size: u32, reading: impl Reading) {
    match rules::read_len(offset, size, view.len) {
        0 => reading.give(Ok(&[])),
        len => reading.fill(&view.disk, view.at(offset), len),
    }
}

/// Adds the lines of a directory from a position on, as many as one answer takes.
fn list(views: &Views, dir: Node, offset: u64, lines: &mut impl Lines) -> Result<(), Errno> {
    let parts = match dir {
        Node::Root => views.partitions()?,
        _ => Arc::default(),
    };
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    let all = views.tree.list(dir, &parts).into_iter().flatten();
    let mut room = LISTING_MAX;
    for (next, (node, name)) in (1..).zip(all).skip(skip) {
        let kind = match node.sort() {
            Sort::Directory => FileType::Directory,
            Sort::File => FileType::RegularFile,
            Sort::Link => FileType::Symlink,
        };
        let size = (DIRENT_HEAD + name.len()).next_multiple_of(8);
        let line = Line {
            ino: views.tree.ino(node),
            next,
            kind,
            name: &name,
        };
        // The kernel asks again for what did not fit.
        if size > room || !lines.add(line) {
            break;
        }
        room -= size;
    }
    Ok(())
}
