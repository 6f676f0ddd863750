//! Rings of io_uring that carry FUSE requests, and the memory that they are in.
//!
//! A [`Slot`] is the right to one entry of a FUSE queue: while somebody has it, the kernel leaves
//! the memory alone; given to a ring, it is the kernel's until it comes back as an [`Event`]. It is
//! one box that never moves, whose address travels through the kernel as the `user_data` of the
//! commands, so nothing is allocated for a request.
//!
//! Layout (`fuse_uring_req_header` of linux/fuse.h): 128 bytes for the head of a request or an
//! answer, 128 for a request's fixed part, then flags, the number to commit by, and the length of
//! what is in the payload.

use io_uring::squeue::{Entry128, Flags, PushError};
use io_uring::{IoUring, cqueue, opcode, types};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a slot's header.
pub const HEADER_LEN: usize = 288;
/// Where the fixed part of a request begins in it.
pub const FIXED_AT: usize = 128;
/// Where the number is by which an answer is committed, 8 bytes.
const COMMIT_AT: usize = 264;
/// Where the length of what is in the payload is, 4 bytes.
const PAYLOAD_LEN_AT: usize = 272;
/// Bytes from one header to the next.
const HEADER_STRIDE: usize = 512;

const CMD_REGISTER: u32 = 1;
const CMD_COMMIT_AND_FETCH: u32 = 2;
/// `IORING_REGISTER_SEND_MSG_RING`: a message to a ring from a thread that has none.
const SEND_MSG_RING: libc::c_uint = 31;

// What came back, in the low bits of `user_data`, which an address leaves free.
const FETCHED: u64 = 0;
const SERVE: u64 = 1;
const ANSWER: u64 = 2;
const STOP: u64 = 3;
const BOUNCED_SERVE: u64 = 4;
const BOUNCED_ANSWER: u64 = 5;
const TAG_MASK: u64 = 7;

/// Memory of the process's own, in whole pages.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is only memory; who may touch which part of it is the slots' business.
#[allow(unsafe_code)]
unsafe impl Send for Memory {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place of the kernel's choice changes nothing that exists.
        #[allow(unsafe_code)]
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping of `new`, and all slots, which hold this, have gone.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[repr(align(8))]
struct Inner {
    header: NonNull<u8>,
    payload: NonNull<u8>,
    payload_len: usize,
    /// Both, as the kernel wants to be told of them.
    pieces: [libc::iovec; 2],
    queue: u16,
    home: usize,
    /// The kernel has put a request in it before.
    is_known: bool,
    /// Whatever the owner of the slot wants to remember.
    mark: bool,
    /// Keeps the two above mapped.
    _memory: Arc<Memory>,
}

/// One entry of a queue, and its memory.
pub struct Slot(Box<Inner>);

// SAFETY: the addresses in it are of memory that this slot alone may touch, and that lives as long.
#[allow(unsafe_code)]
unsafe impl Send for Slot {}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot of queue {}", self.0.queue)
    }
}

/// Makes slots of a queue that are at home in the ring of this number; each payload starts a page
/// and is so many bytes long, in whole pages.
pub fn slots(queue: u16, home: usize, count: usize, payload_len: usize) -> io::Result<Vec<Slot>> {
    let too_many = || io::Error::from(io::ErrorKind::InvalidInput);
    let payload_len = payload_len.next_multiple_of(4096);
    let headers = (HEADER_STRIDE * count).next_multiple_of(4096);
    let payloads = payload_len.checked_mul(count).ok_or_else(too_many)?;
    let memory = Arc::new(Memory::new(
        headers.checked_add(payloads).ok_or_else(too_many)?,
    )?);
    let slot = |number: usize| {
        // SAFETY: `headers + count * payload_len` bytes are mapped, `headers` has room for `count`
        // strides, and `number` is below `count`: both places and what follows them are inside, and
        // no two slots share a byte.
        #[allow(unsafe_code)]
        let (header, payload) = unsafe {
            let start = memory.start;
            let header = start.add(number * HEADER_STRIDE);
            (header, start.add(headers + number * payload_len))
        };
        let piece = |start: NonNull<u8>, len| libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: len,
        };
        Slot(Box::new(Inner {
            header,
            payload,
            payload_len,
            pieces: [piece(header, HEADER_LEN), piece(payload, payload_len)],
            queue,
            home,
            is_known: false,
            mark: false,
            _memory: Arc::clone(&memory),
        }))
    };
    Ok((0..count).map(slot).collect())
}

impl Slot {
    /// The queue that it belongs to.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.0.queue
    }

    /// The ring that it is at home in, by its owner's count.
    #[must_use]
    pub fn home(&self) -> usize {
        self.0.home
    }

    /// Whether a request was ever in it: the kernel knows it then.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.0.is_known
    }

    /// What [`Slot::set_mark`] was told last.
    #[must_use]
    pub fn mark(&self) -> bool {
        self.0.mark
    }

    /// Remembers something for its owner.
    pub fn set_mark(&mut self, mark: bool) {
        self.0.mark = mark;
    }

    /// The header of a request.
    #[must_use]
    pub fn header(&self) -> &[u8; HEADER_LEN] {
        // SAFETY: so many bytes are mapped there and live as long as the slot; who has the slot is
        // the only one to touch them, and mapped memory is always initialized.
        #[allow(unsafe_code)]
        unsafe {
            self.0.header.cast::<[u8; HEADER_LEN]>().as_ref()
        }
    }

    fn header_mut(&mut self) -> &mut [u8; HEADER_LEN] {
        // SAFETY: as for `header`, and the slot is borrowed for itself alone.
        #[allow(unsafe_code)]
        unsafe {
            self.0.header.cast::<[u8; HEADER_LEN]>().as_mut()
        }
    }

    /// All of the payload.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        // SAFETY: as for `header`.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.0.payload.as_ptr(), self.0.payload_len)
        }
    }

    /// All of the payload, to be written.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `header_mut`.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.0.payload.as_ptr(), self.0.payload_len)
        }
    }

    fn commit_number(&self) -> &[u8] {
        &self.header()[COMMIT_AT..COMMIT_AT + 8]
    }

    /// Bytes of the payload that belong to the request.
    #[must_use]
    pub fn filled(&self) -> usize {
        let len = u32::read_from_prefix(&self.header()[PAYLOAD_LEN_AT..]);
        let len = len.map_or(0, |(len, _)| len);
        usize::try_from(len).map_or(self.0.payload_len, |len| len.min(self.0.payload_len))
    }

    /// Makes it an answer: its head, and how many bytes of the payload belong to it.
    pub fn answer(&mut self, head: &[u8], filled: u32) {
        let header = self.header_mut();
        header[..head.len()].copy_from_slice(head);
        header[PAYLOAD_LEN_AT..PAYLOAD_LEN_AT + 4].copy_from_slice(filled.as_bytes());
    }

    /// The slot as a number, which [`Slot::from_data`] takes back.
    fn into_data(self, tag: u64) -> u64 {
        let address = Box::into_raw(self.0).expose_provenance();
        u64::try_from(address).unwrap_or(0) | tag
    }

    /// # Safety
    /// The number is of [`Slot::into_data`], with any tag, and comes back for the first time.
    #[allow(unsafe_code)]
    unsafe fn from_data(data: u64) -> Self {
        let address = usize::try_from(data & !TAG_MASK).unwrap_or(0);
        let inner = ptr::with_exposed_provenance_mut::<Inner>(address);
        // SAFETY: the caller vouches that this is the box that was given away, and nobody else's.
        Self(unsafe { Box::from_raw(inner) })
    }
}

/// What one thread asks another to do with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Serve the request in it.
    Serve,
    /// Give the answer in it to the kernel.
    Answer,
}

/// What comes out of a ring.
#[derive(Debug)]
pub enum Event {
    /// A request is in the slot.
    Request(Slot),
    /// The kernel has no more requests for the slot, with this errno.
    Ended(Slot, i32),
    /// Another thread handed the slot over.
    Message(Slot, Message),
    /// Another thread could not be reached.
    Bounced(Slot, Message),
    /// Somebody says that it is over.
    Stop,
}

/// The way to a ring for those who have it not.
#[derive(Debug)]
pub struct Mailbox(OwnedFd);

/// A message as the ring of its sender, or the call without one, wants it.
fn message(to: &Mailbox, data: u64) -> io_uring::squeue::Entry {
    opcode::MsgRingData::new(types::Fd(to.0.as_raw_fd()), 0, data, None).build()
}

impl Mailbox {
    /// Hands a slot to the thread of the ring, from any thread. It comes back if that failed.
    pub fn post(&self, slot: Slot, what: Message) -> Result<(), (io::Error, Slot)> {
        let data = slot.into_data(tag(what));
        self.send(data).map_err(|e| {
            // SAFETY: the number is of the line above, and nothing was sent.
            #[allow(unsafe_code)]
            let slot = unsafe { Slot::from_data(data) };
            (e, slot)
        })
    }

    /// Tells the thread of the ring that it is over.
    pub fn stop(&self) -> io::Result<()> {
        self.send(STOP)
    }

    fn send(&self, data: u64) -> io::Result<()> {
        let entry = message(self, data);
        // SAFETY: the kernel reads one submission entry, which is what lies there for the time of
        // the call; -1 stands for no ring of one's own.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                -1,
                SEND_MSG_RING,
                &raw const entry,
                1,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn tag(what: Message) -> u64 {
    match what {
        Message::Serve => SERVE,
        Message::Answer => ANSWER,
    }
}

/// One thread's ring.
pub struct Ring {
    ring: IoUring<Entry128, cqueue::Entry>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ring")
    }
}

impl Ring {
    /// A ring for commands to this device, with room for so many to be given and so many to come.
    pub fn new(device: BorrowedFd<'_>, entries: u32, events: u32) -> io::Result<Self> {
        let ring = IoUring::<Entry128, cqueue::Entry>::builder()
            .dontfork()
            .setup_clamp()
            .setup_cqsize(events)
            .build(entries)?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_skip_cqe_on_success() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        ring.submitter().register_files(&[device.as_raw_fd()])?;
        Ok(Self { ring })
    }

    /// The way to this ring for others.
    pub fn mailbox(&self) -> io::Result<Mailbox> {
        // SAFETY: the ring's descriptor is open as long as the ring, which is borrowed.
        #[allow(unsafe_code)]
        let fd = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        fd.try_clone_to_owned().map(Mailbox)
    }

    /// Tells the kernel of the slot, which then waits for its first request.
    pub fn register(&mut self, slot: Slot) -> io::Result<()> {
        let pieces = slot.0.pieces.as_ptr().expose_provenance();
        let pieces = u64::try_from(pieces).map_err(io::Error::other)?;
        self.command(slot, CMD_REGISTER, Some(pieces))
    }

    /// Gives the answer in the slot to the kernel, and waits for the next request in it.
    pub fn commit(&mut self, slot: Slot) -> io::Result<()> {
        self.command(slot, CMD_COMMIT_AND_FETCH, None)
    }

    fn command(&mut self, slot: Slot, number: u32, pieces: Option<u64>) -> io::Result<()> {
        // `fuse_uring_cmd_req`: flags, the number to commit by, the queue.
        let mut command = [0; 80];
        if pieces.is_none() {
            command[8..16].copy_from_slice(slot.commit_number());
        }
        command[16..18].copy_from_slice(slot.queue().as_bytes());
        let mut entry = opcode::UringCmd80::new(types::Fixed(0), number)
            .cmd(command)
            .addr(pieces)
            .build()
            .user_data(slot.into_data(FETCHED));
        if pieces.is_some() {
            // SAFETY: an entry is 128 bytes laid out as the kernel has them, its length at 24.
            #[allow(unsafe_code)]
            unsafe {
                (&raw mut entry)
                    .cast::<u8>()
                    .add(24)
                    .cast::<u32>()
                    .write_unaligned(2);
            }
        }
        self.push(&entry)
    }

    /// Hands a slot to another ring's thread, with the next [`Ring::submit`].
    pub fn pass(&mut self, to: &Mailbox, slot: Slot, what: Message) -> io::Result<()> {
        let data = slot.into_data(tag(what));
        let bounced = match what {
            Message::Serve => BOUNCED_SERVE,
            Message::Answer => BOUNCED_ANSWER,
        };
        let entry = message(to, data)
            .flags(Flags::SKIP_SUCCESS)
            .user_data(data & !TAG_MASK | bounced);
        self.push(&entry.into())
    }

    /// The kernel reads the entry at the next `submit`; what it points at belongs to a slot that
    /// has been given away, so nobody touches it before that.
    fn push(&mut self, entry: &Entry128) -> io::Result<()> {
        loop {
            // SAFETY: the entry's one address is of a slot's `pieces`, in a box that was given away
            // and so lives until the kernel has answered; the descriptor is registered, or of a
            // mailbox that lives as long as the ring's owner, who keeps both.
            #[allow(unsafe_code)]
            let pushed = unsafe { self.ring.submission().push(entry) };
            match pushed {
                Ok(()) => return Ok(()),
                Err(PushError { .. }) => self.submit(0)?,
            }
        }
    }

    /// Gives the kernel what was pushed, and waits for so many events.
    pub fn submit(&mut self, wait: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(wait) {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                // A signal, or too many events that nobody has taken yet: look first, then again.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(e),
            },
        }
    }

    /// The next event that has come.
    pub fn next_event(&mut self) -> Option<Event> {
        let event = self.ring.completion().next()?;
        let (data, result) = (event.user_data(), event.result());
        let tag = data & TAG_MASK;
        if tag == STOP {
            return Some(Event::Stop);
        }
        // SAFETY: all events but `STOP` carry the number of a slot, each of them once: a command
        // comes back when it is over, a message where it was sent, or to its sender if that failed.
        // No one but this process can send any, as no other has the ring.
        #[allow(unsafe_code)]
        let mut slot = unsafe { Slot::from_data(data) };
        Some(match tag {
            SERVE => Event::Message(slot, Message::Serve),
            ANSWER => Event::Message(slot, Message::Answer),
            BOUNCED_SERVE => Event::Bounced(slot, Message::Serve),
            BOUNCED_ANSWER => Event::Bounced(slot, Message::Answer),
            _ if result >= 0 => {
                slot.0.is_known = true;
                Event::Request(slot)
            }
            _ => Event::Ended(slot, -result),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn slots_share_nothing() {
        let mut slots = slots(3, 7, 5, 10_000).unwrap();
        for (number, slot) in (1..).zip(&mut slots) {
            assert_eq!((slot.queue(), slot.home(), slot.is_known()), (3, 7, false));
            assert_eq!(slot.payload().len(), 12_288);
            assert_eq!(slot.payload().as_ptr().addr() % 4096, 0);
            assert_eq!(slot.header().as_ptr().addr() % 8, 0);
            slot.payload_mut().fill(number);
            slot.answer(&[number; 16], u32::from(number));
        }
        // The first to go leaves the memory of the others alone.
        drop(slots.remove(0));
        for (number, slot) in (2..).zip(&slots) {
            assert!(slot.payload().iter().all(|byte| *byte == number));
            assert_eq!(slot.header()[..16], [number; 16]);
            assert_eq!(slot.filled(), usize::from(number));
        }
        // More than there is room for is never believed.
        slots[0].answer(&[], u32::MAX);
        assert_eq!(slots[0].filled(), 12_288);
    }

    /// Two rings, unless the host lets nobody have any.
    fn rings() -> Option<[Ring; 2]> {
        let null = File::open("/dev/zero").unwrap();
        match Ring::new(null.as_fd(), 8, 64) {
            Ok(one) => Some([one, Ring::new(null.as_fd(), 8, 64).unwrap()]),
            Err(e) => {
                assert!(std::env::var("CI").is_err(), "no io_uring: {e}");
                eprintln!("skipped: no io_uring: {e}");
                None
            }
        }
    }

    #[test]
    fn slots_travel_from_ring_to_ring_and_from_elsewhere() {
        let Some([mut one, mut two]) = rings() else {
            return;
        };
        let (to_one, to_two) = (one.mailbox().unwrap(), two.mailbox().unwrap());
        let mut slots = slots(0, 0, 2, 4096).unwrap();
        slots[0].payload_mut()[0] = 1;
        slots[1].payload_mut()[0] = 2;
        let second = slots.pop().unwrap();
        one.pass(&to_two, slots.pop().unwrap(), Message::Serve)
            .unwrap();
        one.submit(0).unwrap();
        two.submit(1).unwrap();
        match two.next_event() {
            Some(Event::Message(slot, Message::Serve)) => {
                assert_eq!(slot.payload()[0], 1);
                std::thread::scope(|scope| {
                    scope.spawn(|| to_one.post(slot, Message::Answer).unwrap());
                });
            }
            other => panic!("{other:?}"),
        }
        assert!(two.next_event().is_none());
        one.submit(1).unwrap();
        match one.next_event() {
            Some(Event::Message(slot, Message::Answer)) => assert_eq!(slot.payload()[0], 1),
            other => panic!("{other:?}"),
        }
        to_two.post(second, Message::Answer).unwrap();
        to_two.stop().unwrap();
        two.submit(2).unwrap();
        assert!(matches!(two.next_event(), Some(Event::Message(..))));
        assert!(matches!(two.next_event(), Some(Event::Stop)));
    }

    #[test]
    fn a_slot_that_cannot_be_sent_comes_back() {
        let Some([mut one, _]) = rings() else {
            return;
        };
        // A file that is no ring.
        let nobody = Mailbox(File::open("/dev/null").unwrap().into());
        let mut slots = slots(0, 0, 2, 4096).unwrap();
        let (_, slot) = nobody
            .post(slots.pop().unwrap(), Message::Answer)
            .unwrap_err();
        one.pass(&nobody, slot, Message::Serve).unwrap();
        one.submit(1).unwrap();
        match one.next_event() {
            Some(Event::Bounced(_, Message::Serve)) => {}
            other => panic!("{other:?}"),
        }
        // And /dev/zero takes no commands.
        one.register(slots.pop().unwrap()).unwrap();
        one.submit(1).unwrap();
        match one.next_event() {
            Some(Event::Ended(slot, errno)) => {
                assert!(!slot.is_known());
                assert_eq!(errno, libc::EOPNOTSUPP);
            }
            other => panic!("{other:?}"),
        }
    }
}
