//! The door of our own on /dev/fuse: the greeting, and requests read one by one.
//!
//! Imports: `disk`, `error`, `units`, `fuse::{answer, buffer, dispatch, requests, wire}`.
//! Never: decides anything; allocates for a READ or a WRITE.
//!
//! Where requests come through rings, what the kernel does not send there comes here still:
//! FORGET, INTERRUPT, and the end. And should the rings fail after the greeting, the kernel sends
//! everything here, so this door serves every request.
//!
//! A request is read in two pieces, so that the bytes of a WRITE start a page: [`WRITE_HEAD_LEN`]
//! bytes, and what follows. Answers are written with their head before them. The buffer belongs to
//! the thread and is lent to the disk for the time of a call.
//!
//! Beside rings the readers can be told to stop. Each would else wait in the kernel, which keeps
//! the descriptor open: a session that cannot go on could not end its mount, and who waits for an
//! answer would wait for ever. The descriptor does not block then, and they wait for it and for the
//! word to stop together.

use super::answer::{DoneAnswer, ReadAnswer, Reading, Reply, Writing};
use super::buffer::Buffers;
use super::dispatch::{After, Answering, Guard, Request, serve};
use super::wire::{self, Encode, HEAD_LEN, Head, NAMES_MAX, Offer, WRITE_HEAD_LEN, Written};
use super::{BACKGROUND_MAX, PloopFs, WANTED, WRITE_MAX};
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::units::DiskOffset;
use fuser::{Errno, InitFlags};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::{readv, writev};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

/// What every mount is asked for, as fuser does by itself.
const ALWAYS: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_BIG_WRITES)
    .union(InitFlags::FUSE_MAX_PAGES);

/// The word to stop: one end is shut down, which all see who look at the other.
#[derive(Debug)]
struct Stop {
    is_said: AtomicBool,
    speaker: UnixStream,
    listener: UnixStream,
}

/// The descriptor of a mount.
#[derive(Debug)]
pub(crate) struct Device {
    fd: OwnedFd,
    stop: Option<Stop>,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Device {
    pub(crate) fn new(fd: OwnedFd) -> Arc<Self> {
        Arc::new(Self { fd, stop: None })
    }

    /// One whose readers [`Device::stop`] ends. If that cannot be, the descriptor comes back.
    pub(crate) fn stoppable(fd: OwnedFd) -> std::result::Result<Arc<Self>, (io::Error, OwnedFd)> {
        let made = UnixStream::pair().and_then(|pair| {
            set_blocking(fd.as_fd(), false)?;
            Ok(pair)
        });
        match made {
            Ok((speaker, listener)) => Ok(Arc::new(Self {
                fd,
                stop: Some(Stop {
                    is_said: AtomicBool::new(false),
                    speaker,
                    listener,
                }),
            })),
            Err(e) => Err((e, fd)),
        }
    }

    /// Ends all readers, those that wait and those that come.
    pub(crate) fn stop(&self) {
        if let Some(stop) = &self.stop {
            stop.is_said.store(true, Ordering::Release);
            // It fails only if it was shut down before.
            let _ = stop.speaker.shutdown(Shutdown::Both);
        }
    }

    /// True when the mount has gone.
    pub(crate) fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
            && fds[0].revents().is_some_and(|seen| seen.intersects(gone))
    }

    /// Waits until there is something to read, or the word to stop.
    fn wait(&self) -> io::Result<()> {
        let Some(stop) = &self.stop else {
            return Ok(());
        };
        let mut fds = [
            PollFd::new(self.fd.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn is_stopped(&self) -> bool {
        let stop = self.stop.as_ref();
        stop.is_some_and(|stop| stop.is_said.load(Ordering::Acquire))
    }

    /// Reads one request; `None` when the mount has gone, or on the word to stop.
    fn read(&self, head: &mut [u8], rest: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if self.is_stopped() {
                return Ok(None);
            }
            let mut pieces = [IoSliceMut::new(head), IoSliceMut::new(rest)];
            match readv(&self.fd, &mut pieces) {
                Ok(len) => return Ok(Some(len)),
                Err(nix::Error::EAGAIN) => self.wait()?,
                // ENOENT: the request was taken back while it was read.
                Err(nix::Error::EINTR | nix::Error::ENOENT) => {}
                Err(nix::Error::ENODEV | nix::Error::ECONNABORTED) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send(&self, unique: u64, answer: std::result::Result<&[u8], Errno>) -> io::Result<()> {
        let (error, body) = match answer {
            Ok(body) => (None, body),
            Err(errno) => (Some(errno), &[][..]),
        };
        let head = wire::out_head(unique, error, body.len());
        loop {
            match writev(&self.fd, &[IoSlice::new(&head), IoSlice::new(body)]) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn set_blocking(fd: BorrowedFd<'_>, blocks: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, !blocks);
    fcntl(fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// The answer to one request that was read from the device.
#[derive(Debug)]
pub(crate) struct DeviceAnswer {
    device: Arc<Device>,
    unique: u64,
    is_sent: bool,
}

impl Answering for DeviceAnswer {
    fn send_bytes(mut self, answer: std::result::Result<&[u8], Errno>) {
        self.is_sent = true;
        // Who asked may be gone, or the mount.
        if let Err(e) = self.device.send(self.unique, answer) {
            log::debug!("an answer was not taken: {e}");
        }
    }
}

impl Drop for DeviceAnswer {
    fn drop(&mut self) {
        if !self.is_sent {
            let _ = self.device.send(self.unique, Err(Errno::EIO));
        }
    }
}

impl Reply<&[u8]> for DeviceAnswer {
    fn send(self, answer: std::result::Result<&[u8], Errno>) {
        self.send_bytes(answer);
    }
}

/// A request and the thread's buffer, which holds the bytes of a WRITE.
struct DeviceRequest<'a> {
    answer: DeviceAnswer,
    buf: &'a mut [u8],
    /// Bytes of the buffer that were read.
    filled: usize,
}

impl Request for DeviceRequest<'_> {
    type Answer = DeviceAnswer;

    fn answer(self) -> DeviceAnswer {
        self.answer
    }

    fn reading(self) -> impl Reading {
        self
    }

    fn writing(self, len: usize) -> std::result::Result<impl Writing, DeviceAnswer> {
        if len > self.filled {
            return Err(self.answer);
        }
        let Self { answer, buf, .. } = self;
        Ok(DeviceWrite {
            data: &buf[..len],
            answer,
        })
    }
}

impl Reading for DeviceRequest<'_> {
    fn give(self, answer: std::result::Result<&[u8], Errno>) {
        self.answer.send_bytes(answer);
    }

    fn fill(self, disk: &Arc<Disk>, at: DiskOffset, len: usize) {
        let reply = self.answer;
        // A buffer that is too short, which the kernel's limit rules out, fails the request.
        disk.read(at, len, self.buf, ReadAnswer { reply, len });
    }
}

/// A WRITE whose bytes are in the thread's buffer.
struct DeviceWrite<'a> {
    data: &'a [u8],
    answer: DeviceAnswer,
}

/// All bytes were taken, or not.
pub(crate) struct Taken<S> {
    pub(crate) sender: S,
    pub(crate) len: usize,
}

impl<S: Answering> Reply<()> for Taken<S> {
    fn send(self, answer: std::result::Result<(), Errno>) {
        let written = u32::try_from(self.len).map_err(|_| Errno::EINVAL);
        match answer.and(written) {
            Ok(len) => Written(len).encode(|bytes| self.sender.send_bytes(Ok(bytes))),
            Err(errno) => self.sender.send_bytes(Err(errno)),
        }
    }
}

impl Writing for DeviceWrite<'_> {
    fn len(&self) -> usize {
        self.data.len()
    }

    fn refuse(self, errno: Errno) {
        self.answer.send_bytes(Err(errno));
    }

    fn hand_over(self, disk: &Arc<Disk>, at: DiskOffset) {
        let (sender, len) = (self.answer, self.data.len());
        let (reply, verb) = (Taken { sender, len }, "write");
        disk.write(at, self.data, DoneAnswer { reply, verb });
    }
}

/// Answers INIT. True if the kernel was told that requests go through rings, which it is if `rings`
/// are there and it offers them.
pub(crate) fn greet(
    device: &Device,
    fs: &mut PloopFs,
    threads: usize,
    rings: bool,
) -> Result<bool> {
    let failed = |why: &str| {
        Error::why(
            ErrorKind::Host,
            format!("the kernel did not greet us: {why}"),
        )
    };
    let mut message = vec![0; HEAD_LEN + NAMES_MAX + super::buffer::SIZE];
    loop {
        let (first, rest) = message.split_at_mut(WRITE_HEAD_LEN);
        let len = device.read(first, rest)?;
        let len = len.ok_or_else(|| failed("the mount has gone"))?;
        let Some(head) = Head::parse(&message[..len]) else {
            return Err(failed("its request is too short"));
        };
        let offer = Offer::parse(&message[HEAD_LEN.min(len)..len]);
        let offer = match offer {
            Ok(offer) if head.opcode == wire::INIT => offer,
            _ => {
                let _ = device.send(head.unique, Err(Errno::EIO));
                return Err(failed("it began with something else"));
            }
        };
        if offer.is_too_new() {
            device.send(head.unique, Ok(&Offer::version_only()))?;
            continue;
        }
        if offer.is_too_old() {
            let _ = device.send(head.unique, Err(Errno::EPROTO));
            return Err(failed("its protocol is too old"));
        }
        let wanted = WANTED.into_iter().collect::<InitFlags>();
        let rings = rings && offer.flags.contains(InitFlags::FUSE_OVER_IO_URING);
        if let Err(e) = fs.start(offer.flags & wanted, threads) {
            let _ = device.send(head.unique, Err(Errno::EIO));
            return Err(e.into());
        }
        let mut flags = ALWAYS | wanted;
        flags.set(InitFlags::FUSE_OVER_IO_URING, rings);
        let accepted = offer.accept(flags, WRITE_MAX, BACKGROUND_MAX);
        device.send(head.unique, Ok(accepted.as_ref()))?;
        return Ok(rings);
    }
}

/// What a thread needs to begin.
#[derive(Clone)]
pub(crate) struct Start {
    pub(crate) fs: Arc<PloopFs>,
    pub(crate) device: Arc<Device>,
    pub(crate) guard: Guard,
}

/// Serves what comes from the device, on this thread, until the mount has gone or it is stopped.
pub(crate) fn read_on(start: Start, buffers: &Buffers) -> io::Result<()> {
    let Start { fs, device, guard } = start;
    let served = catch_unwind(AssertUnwindSafe(|| {
        buffers.with(|buf| run(&fs, &device, guard, buf))
    }));
    match served {
        Ok(Some(served)) => served,
        Ok(None) => Err(io::ErrorKind::OutOfMemory.into()),
        Err(_) => Err(io::Error::other("a session thread panicked")),
    }
}

/// Starts threads that serve what comes from the device, and then tell how it went. Returns how
/// many there are, which is not none.
pub(crate) fn start(
    start: &Start,
    threads: usize,
    tell: impl Fn(io::Result<()>) + Clone + Send + 'static,
) -> io::Result<usize> {
    let buffers = Arc::new(Buffers::new(threads));
    for number in 0..threads {
        let (start, buffers, tell) = (start.clone(), Arc::clone(&buffers), tell.clone());
        // What the thread has of the file system goes before it is told.
        let run = move || tell(read_on(start, &buffers));
        let builder = thread::Builder::new().name(format!("device-{number}"));
        match builder.spawn(run) {
            Ok(_) => {}
            // Those that there are serve all.
            Err(e) if number > 0 => {
                log::warn!("{number} session threads, and no more: {e}");
                return Ok(number);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(threads)
}

/// Serves with so many threads until the mount has gone.
pub(crate) fn serve_alone(
    fs: &Arc<PloopFs>,
    device: &Arc<Device>,
    guard: Guard,
    threads: usize,
) -> io::Result<()> {
    let (tell, told) = mpsc::channel();
    let (fs, device) = (Arc::clone(fs), Arc::clone(device));
    let all = Start { fs, device, guard };
    let threads = start(&all, threads, move |result| {
        let _ = tell.send(result);
    })?;
    drop(all);
    told.iter().take(threads).fold(Ok(()), io::Result::and)
}

fn run(fs: &PloopFs, device: &Arc<Device>, guard: Guard, buf: &mut [u8]) -> io::Result<()> {
    let mut first = [0; WRITE_HEAD_LEN];
    let mut small = vec![0; HEAD_LEN + NAMES_MAX];
    while let Some(len) = device.read(&mut first, buf)? {
        let Some(head) = Head::parse(&first[..len.min(WRITE_HEAD_LEN)]) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        if head.wants_no_answer() {
            continue;
        }
        let filled = len.saturating_sub(WRITE_HEAD_LEN);
        // The fixed part and the names in one piece; the bytes of a WRITE stay where they are.
        let names = if head.opcode == wire::WRITE {
            0
        } else {
            filled
        };
        let end = small.len().min(WRITE_HEAD_LEN + names).min(len);
        let in_first = end.min(WRITE_HEAD_LEN);
        small[..in_first].copy_from_slice(&first[..in_first]);
        small[in_first..end].copy_from_slice(&buf[..end - in_first]);
        let body = &small[HEAD_LEN.min(end)..end];
        let (fixed, names) = body.split_at(wire::fixed_len(head.opcode).min(body.len()));
        let answer = DeviceAnswer {
            device: Arc::clone(device),
            unique: head.unique,
            is_sent: false,
        };
        let request = DeviceRequest {
            answer,
            buf: &mut *buf,
            filled,
        };
        if serve(fs, guard, (&head, fixed, names), request) == After::Over {
            break;
        }
    }
    Ok(())
}
