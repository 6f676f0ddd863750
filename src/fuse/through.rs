//! What the kernel reads by itself, from a flat file, without asking us (FUSE passthrough).
//!
//! Imports: `disk`, `error`, `fuse::answer`.
//! Never: lets a mount begin whose files could not be opened later.
//!
//! OPEN is answered with a number by which the kernel knows the flat file: the same for all who
//! open the disk, and kept to the end of the session. Whether the kernel takes the file shows when
//! it has greeted us, before anybody is told of the mount.

use super::answer::{Opened, Reply};
use crate::disk::linear;
use crate::error::{Error, ErrorKind};
use fuser::{BackingId, Errno, FileHandle, ReplyOpen};
use parking_lot::Mutex;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the kernel reads the flat file by itself.
#[derive(Debug, Default)]
pub(crate) struct Through {
    /// The kernel can do that.
    granted: AtomicBool,
    /// What it knows the file by, once somebody has opened the disk.
    file: Mutex<Option<BackingId>>,
}

impl Through {
    /// Whether the kernel can; it says so when it greets us.
    pub(crate) fn set_granted(&self, granted: bool) {
        self.granted.store(granted, Ordering::Release);
    }

    /// Fails where the kernel, once it has greeted us, does not read a file by itself.
    pub(crate) fn expect(&self, device: &OwnedFd, file: &File) -> Result<(), Error> {
        let refused = |why: &str| Error::why(ErrorKind::Host, why).fix(linear::FIX);
        if !self.granted.load(Ordering::Acquire) {
            return Err(refused(
                "the kernel cannot read a file of ours by itself (FUSE passthrough: Linux 6.9 or \
                 newer, with CONFIG_FUSE_PASSTHROUGH)",
            ));
        }
        // What the kernel takes now it takes again. This one goes with the session.
        let tried = BackingId::create_raw(device, file);
        tried.map(drop).map_err(|e| {
            let why = match e.raw_os_error() {
                Some(libc::EPERM) => "FUSE passthrough needs CAP_SYS_ADMIN on the host",
                Some(libc::ELOOP) => {
                    "the image lies on a stacked file system (overlayfs), which FUSE passthrough \
                     does not reach through"
                }
                _ => "the kernel does not pass reads through to the flat clone",
            };
            refused(why).because(e)
        })
    }
}

/// The answer to OPEN of what the kernel may read by itself.
pub(crate) struct OpenReply {
    pub(crate) reply: ReplyOpen,
    pub(crate) through: Option<(Arc<File>, Arc<Through>)>,
}

impl Reply<Opened> for OpenReply {
    fn send(self, answer: Result<Opened, Errno>) {
        let Self { reply, through } = self;
        let (Opened { fh, flags }, (file, through)) = match (answer, through) {
            (Ok(opened), Some(through)) => (opened, through),
            (answer, _) => return reply.send(answer),
        };
        let mut known = through.file.lock();
        let id = match known.take().map_or_else(|| reply.open_backing(&*file), Ok) {
            Ok(id) => known.insert(id),
            Err(e) => {
                log::error!("the flat clone cannot be passed to the kernel: {e}");
                return reply.error(Errno::EIO);
            }
        };
        reply.opened_passthrough(FileHandle(fh), flags, id);
    }
}
