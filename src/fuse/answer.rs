//! Answers to requests, whichever door they go out by.
//!
//! Imports: `disk`, `error`, `fuse::{errno, rules}`.
//! Never: knows how an answer is written down; answers fewer bytes than were asked for.
//!
//! A verb takes a reply that can send one kind of answer, [`Reply<A>`]: what it may say is a matter
//! of types. A reply can be moved to another thread and is used up by its one answer; one that is
//! dropped without it says EIO to the kernel, so no request hangs. READ and WRITE have traits of
//! their own, since where their bytes are is for the door to say: in a buffer that is lent for the
//! time of the call, or in memory that goes where the request goes.

use super::errno;
use super::rules::Statfs;
use crate::disk::{Disk, DoneReply, ReadReply};
use crate::error::{Error, ErrorKind, Result};
use crate::units::DiskOffset;
use fuser::{Errno, FileAttr, FopenFlags};
use std::sync::Arc;
use std::time::Duration;

/// What can answer a request with an `A`, or with an error.
pub(crate) trait Reply<A>: Send + 'static {
    /// Answers.
    fn send(self, answer: Result<A, Errno>);
}

/// The answer to LOOKUP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) attr: FileAttr,
    /// How long name and attributes may be believed.
    pub(crate) valid: Duration,
}

/// The answer to GETATTR and SETATTR.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attr {
    pub(crate) attr: FileAttr,
    /// How long they may be believed.
    pub(crate) valid: Duration,
}

/// The answer to OPEN.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    pub(crate) fh: u64,
    pub(crate) flags: FopenFlags,
}

/// The answer to STATFS.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Volume(pub(crate) Statfs);

/// The answer to LSEEK.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position(pub(crate) i64);

/// The answer to GETXATTR and LISTXATTR.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Xattr<'a> {
    /// How many bytes there are.
    Len(u32),
    /// The bytes.
    Value(&'a [u8]),
}

/// One line of READDIR.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line<'a> {
    pub(crate) ino: u64,
    /// Where to go on after this line.
    pub(crate) next: u64,
    pub(crate) kind: fuser::FileType,
    pub(crate) name: &'a str,
}

/// What collects the lines of READDIR, and answers with them or with an error.
pub(crate) trait Lines: Reply<()> {
    /// Adds a line; false when there was no room for it.
    fn add(&mut self, line: Line<'_>) -> bool;
}

/// What READ is answered through.
pub(crate) trait Reading: Sized {
    /// Answers with bytes that are there already.
    fn give(self, answer: Result<&[u8], Errno>);

    /// Has the disk answer, with all of these bytes or an error.
    fn fill(self, disk: &Arc<Disk>, at: DiskOffset, len: usize);
}

/// What WRITE is answered through; it has the bytes, too.
pub(crate) trait Writing: Sized {
    /// Bytes to be written.
    fn len(&self) -> usize;

    /// Refuses them.
    fn refuse(self, errno: Errno);

    /// Has the disk take them, all or none, and answer.
    fn hand_over(self, disk: &Arc<Disk>, at: DiskOffset);
}

/// The answer of a disk to READ.
#[derive(Debug)]
pub(crate) struct ReadAnswer<R> {
    pub(crate) reply: R,
    /// Bytes owed. A shorter answer would make the kernel believe that the file ends there.
    pub(crate) len: usize,
}

impl<R: for<'a> Reply<&'a [u8]>> ReadReply for ReadAnswer<R> {
    fn done(self, result: Result<&[u8]>) {
        let answer = result.and_then(|bytes| owed(bytes.len(), self.len).map(|()| bytes));
        self.reply
            .send(answer.map_err(|e| errno::answer("read", &e)));
    }
}

/// Fails when other than the bytes owed came.
pub(crate) fn owed(came: usize, owed: usize) -> Result<()> {
    if came == owed {
        return Ok(());
    }
    let why = format!("{came} bytes came where {owed} were owed");
    Err(Error::why(ErrorKind::Truncated, why))
}

/// The answer of a disk to a verb that returns no bytes.
#[derive(Debug)]
pub(crate) struct DoneAnswer<R> {
    pub(crate) reply: R,
    pub(crate) verb: &'static str,
}

impl<R: Reply<()>> DoneReply for DoneAnswer<R> {
    fn done(self, result: Result<()>) {
        self.reply
            .send(result.map_err(|e| errno::answer(self.verb, &e)));
    }
}

/// Nobody asked: the flush after the last writer has closed. A failure is logged, and the disk
/// itself remembers it for the next who asks.
#[derive(Debug)]
pub(crate) struct NoAnswer;

impl DoneReply for NoAnswer {
    fn done(self, result: Result<()>) {
        if let Err(e) = result {
            let _ = errno::answer("flush after the last writer", &e);
        }
    }
}
