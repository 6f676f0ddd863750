//! Between the bytes of the protocol and the verbs of the file system, for the doors of our own.
//!
//! Imports: `disk`, `fuse::{answer, mount, requests, wire}`.
//! Never: knows where a request's bytes are; leaves a request without an answer.
//!
//! A door gives each request as a [`Request`]: something that can answer, and that can find the
//! bytes of a READ or a WRITE. [`serve`] takes it apart and calls the verb. What is malformed is
//! answered with EIO, and a panic drops the request, which says EIO as well.

use super::PloopFs;
use super::answer::{Line, Lines, Reading, Reply, Writing};
use super::mount::Access;
use super::requests::LISTING_MAX;
use super::wire::{self, Encode, Head, Verb};
use fuser::Errno;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Sends the bytes of one answer. Dropped unused, it says EIO.
pub(crate) trait Answering: Send + Sized + 'static {
    /// Answers.
    fn send_bytes(self, answer: Result<&[u8], Errno>);
}

/// One request of a door.
pub(crate) trait Request: Sized {
    /// What answers it.
    type Answer: Answering;

    /// For an answer whose bytes are made here.
    fn answer(self) -> Self::Answer;

    /// For a READ.
    fn reading(self) -> impl Reading;

    /// For a WRITE of so many bytes; an error if the request has fewer.
    fn writing(self, len: usize) -> Result<impl Writing, Self::Answer>;
}

/// Any answer, written down.
struct Coded<S>(S);

impl<A: Encode, S: Answering> Reply<A> for Coded<S> {
    fn send(self, answer: Result<A, Errno>) {
        match answer {
            Ok(answer) => answer.encode(|bytes| self.0.send_bytes(Ok(bytes))),
            Err(errno) => self.0.send_bytes(Err(errno)),
        }
    }
}

/// Lines of READDIR.
struct Listing<S> {
    answer: S,
    bytes: Vec<u8>,
    max: usize,
}

impl<S: Answering> Reply<()> for Listing<S> {
    fn send(self, answer: Result<(), Errno>) {
        self.answer.send_bytes(answer.map(|()| &*self.bytes));
    }
}

impl<S: Answering> Lines for Listing<S> {
    fn add(&mut self, line: Line<'_>) -> bool {
        wire::add_line(&mut self.bytes, line, self.max)
    }
}

/// Who may ask. The kernel sees to it ([`Access`] went into the mount), but for access by root
/// only, which it does not know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guard {
    access: Access,
    owner: u32,
}

impl Guard {
    /// For a mount of this user's.
    pub(crate) fn new(access: Access) -> Self {
        let owner = nix::unistd::geteuid().as_raw();
        Self { access, owner }
    }

    fn admits(self, head: &Head) -> bool {
        self.access != Access::Root
            || head.uid == self.owner
            || head.uid == 0
            || head.is_of_the_kernel()
    }
}

/// How it goes on after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Next,
    /// The kernel said goodbye.
    Over,
}

/// Serves one request: its head, its fixed part, the names after it, and the door's own.
pub(crate) fn serve(
    fs: &PloopFs,
    guard: Guard,
    (head, fixed, names): (&Head, &[u8], &[u8]),
    request: impl Request,
) -> After {
    let served = AssertUnwindSafe(|| {
        if !guard.admits(head) {
            request.answer().send_bytes(Err(Errno::EACCES));
            return After::Next;
        }
        match wire::decode(head, fixed, names) {
            Ok(Verb::Destroy) => {
                fs.nothing(Coded(request.answer()));
                After::Over
            }
            Ok(verb) => {
                call(fs, head.nodeid, verb, request);
                After::Next
            }
            Err(wire::TooShort) => {
                log::error!("a request {} is too short", head.opcode);
                request.answer().send_bytes(Err(Errno::EIO));
                After::Next
            }
        }
    });
    catch_unwind(served).unwrap_or_else(|_| {
        log::error!("a request {} panicked", head.opcode);
        After::Next
    })
}

fn call(fs: &PloopFs, ino: u64, verb: Verb<'_>, request: impl Request) {
    let coded = |request: _| Coded(Request::answer(request));
    match verb {
        Verb::Lookup { name } => fs.lookup(ino, name, coded(request)),
        Verb::Getattr => fs.getattr(ino, coded(request)),
        Verb::Setattr { wanted, mtime } => fs.setattr(ino, wanted, mtime, coded(request)),
        Verb::Readlink => fs.readlink(ino, coded(request)),
        Verb::Open { for_writing } => fs.open(ino, for_writing, coded(request)),
        Verb::Read { fh, offset, size } => fs.read(fh, offset, size, request.reading()),
        Verb::Write { fh, offset, size } => {
            match request.writing(usize::try_from(size).unwrap_or(usize::MAX)) {
                Ok(writing) => fs.write(fh, offset, writing),
                Err(answer) => answer.send_bytes(Err(Errno::EIO)),
            }
        }
        Verb::Statfs => fs.statfs(coded(request)),
        Verb::Release { fh, for_writing } => fs.release(fh, for_writing, coded(request)),
        Verb::Fsync { fh } => fs.fsync(fh, coded(request)),
        Verb::Getxattr { name, size } => fs.getxattr(ino, name, size, coded(request)),
        Verb::Listxattr { size } => fs.listxattr(ino, size, coded(request)),
        Verb::Nothing => fs.nothing(coded(request)),
        Verb::Opendir => fs.opendir(coded(request)),
        Verb::Readdir { offset, size } => {
            let max = usize::try_from(size).unwrap_or(LISTING_MAX);
            let lines = Listing {
                answer: request.answer(),
                bytes: Vec::new(),
                max: max.min(LISTING_MAX),
            };
            fs.readdir(ino, offset, lines);
        }
        Verb::Access { mask } => fs.access(ino, mask, coded(request)),
        Verb::Fallocate {
            fh,
            offset,
            length,
            mode,
        } => fs.fallocate(fh, offset, length, mode, coded(request)),
        Verb::Lseek { fh, offset, whence } => fs.lseek(fh, offset, whence, coded(request)),
        Verb::Refused(refused) => request.answer().send_bytes(Err(refused.errno())),
        // Of these two nothing reaches this.
        Verb::Forget | Verb::Destroy => fs.nothing(coded(request)),
    }
}
