//! The kernel's reply objects in the shape that the disk answers.
//!
//! Imports: `disk`, `error`, `fuse::errno`.
//! Never: answers fewer bytes than were asked for.
//!
//! Each wraps one of fuser's and can be moved to another thread. One that is dropped without an
//! answer says EIO to the kernel, so no request hangs.

use super::errno;
use crate::disk::{DoneReply, ReadReply};
use crate::error::{Error, ErrorKind, Result};
use fuser::{Errno, ReplyData, ReplyEmpty, ReplyWrite};

/// The answer to READ.
#[derive(Debug)]
pub(crate) struct ReadAnswer {
    pub(crate) reply: ReplyData,
    /// Bytes owed. A shorter answer would make the kernel believe that the file ends there.
    pub(crate) len: usize,
}

impl ReadReply for ReadAnswer {
    fn done(self, result: Result<&[u8]>) {
        match result {
            Ok(bytes) if bytes.len() == self.len => self.reply.data(bytes),
            Ok(bytes) => {
                let why = format!("{} bytes came where {} were owed", bytes.len(), self.len);
                self.reply.error(errno::answer(
                    "read",
                    &Error::why(ErrorKind::Truncated, why),
                ));
            }
            Err(e) => self.reply.error(errno::answer("read", &e)),
        }
    }
}

/// The answer to WRITE: all bytes, or an error.
#[derive(Debug)]
pub(crate) struct WriteAnswer {
    pub(crate) reply: ReplyWrite,
    pub(crate) len: u32,
}

impl DoneReply for WriteAnswer {
    fn done(self, result: Result<()>) {
        match result {
            Ok(()) => self.reply.written(self.len),
            Err(e) => self.reply.error(errno::answer("write", &e)),
        }
    }
}

/// The answer to verbs that return nothing.
#[derive(Debug)]
pub(crate) struct EmptyAnswer {
    pub(crate) reply: ReplyEmpty,
    pub(crate) verb: &'static str,
}

impl DoneReply for EmptyAnswer {
    fn done(self, result: Result<()>) {
        answer_empty(self.reply, result.map_err(|e| errno::answer(self.verb, &e)));
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

/// Answers a verb that returns nothing.
pub(crate) fn answer_empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}
