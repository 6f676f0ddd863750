//! Rings of io_uring that carry FUSE requests, and the memory that they are in.
//!
//! A [`Slot`] is the right to one entry of a FUSE queue: while somebody has it, the kernel leaves
//! the memory alone; given to a ring, it is the kernel's until it comes back as an [`Event`]. It is
//! one box that never moves, whose address travels through the kernel as the `user_data` of the
//! commands, so nothing is allocated for a request.

mod slot;

use io_uring::squeue::{Entry128, Flags, PushError};
use io_uring::{IoUring, cqueue, opcode, types};
pub use slot::{FIXED_AT, HEADER_LEN, Slot, slots};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;
use zerocopy::IntoBytes;

const CMD_REGISTER: u32 = 1;
const CMD_COMMIT_AND_FETCH: u32 = 2;
/// `IORING_REGISTER_SEND_MSG_RING`: a message to a ring from a thread that has none.
const SEND_MSG_RING: libc::c_uint = 31;

// What came back, in the low bits of `user_data`, which an address leaves free.
const FETCHED: u64 = 0;
const ANSWER: u64 = 1;
const STOP: u64 = 2;
const BOUNCED: u64 = 3;
const ECHO: u64 = 4;
const MOVED: u64 = 5;
const TAG_MASK: u64 = 7;

/// How often, a millisecond apart, the kernel may lack what it needs before that is an error.
pub const TROUBLES_MAX: u32 = 60_000;

/// True for what the kernel lacks for a moment only: memory, or room for events. FUSE says none of
/// these of an answer that it has looked at.
#[must_use]
pub fn is_passing(errno: i32) -> bool {
    matches!(
        errno,
        libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM
    )
}

/// Waits for what [`is_passing`].
pub fn wait_a_moment() {
    thread::sleep(Duration::from_millis(1));
}

/// What comes out of a ring.
#[derive(Debug)]
pub enum Event {
    /// A request is in the slot.
    Request(Slot),
    /// The kernel has no more requests for the slot, with this errno.
    Ended(Slot, i32),
    /// Another thread made the answer in the slot, which is to be given to the kernel here.
    Answer(Slot),
    /// Another thread could not be reached with the slot's answer.
    Bounced(Slot),
    /// A file's bytes came to the slot's payload or went from there: how many, or an errno below 0.
    Moved(Slot, i32),
    /// Somebody says that it is over.
    Stop,
    /// A sign of life that was asked for, or another thread's call.
    Echo,
}

/// The way to a ring for those who have it not.
#[derive(Debug)]
pub struct Mailbox(OwnedFd);

/// A message as the ring of its sender, or the call without one, wants it.
fn message(to: &Mailbox, data: u64) -> io_uring::squeue::Entry {
    opcode::MsgRingData::new(types::Fd(to.0.as_raw_fd()), 0, data, None).build()
}

impl Mailbox {
    /// Hands a slot to the thread of the ring, from any thread, which is to give the answer in it
    /// to the kernel. It comes back if that failed.
    pub fn post(&self, slot: Slot) -> Result<(), (io::Error, Slot)> {
        let data = slot.into_data(ANSWER);
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

    /// Sends an [`Event::Echo`].
    pub fn echo(&self) -> io::Result<()> {
        self.send(ECHO)
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

/// One thread's ring.
pub struct Ring {
    ring: IoUring<Entry128, cqueue::Entry>,
    /// How often in a row the kernel lacked something.
    troubles: u32,
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
            // What comes need not interrupt the thread: it is never long without a system call.
            .setup_coop_taskrun()
            .build(entries)?;
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_skip_cqe_on_success() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        ring.submitter().register_files(&[device.as_raw_fd()])?;
        Ok(Self { ring, troubles: 0 })
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
        let pieces = slot.pieces().expose_provenance();
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

    /// As [`Mailbox::post`], with the next [`Ring::submit`]; an [`Event::Bounced`] if it failed.
    pub fn pass(&mut self, to: &Mailbox, slot: Slot) -> io::Result<()> {
        let data = slot.into_data(ANSWER);
        let entry = message(to, data)
            .flags(Flags::SKIP_SUCCESS)
            .user_data(data & !TAG_MASK | BOUNCED);
        self.push(&entry.into())
    }

    /// Wakes another ring's thread with the next [`Ring::submit`].
    pub fn call(&mut self, to: &Mailbox) -> io::Result<()> {
        let entry = message(to, ECHO).flags(Flags::SKIP_SUCCESS);
        self.push(&entry.user_data(ECHO).into())
    }

    /// Has the kernel fill the first bytes of the slot's payload from the file, with the next
    /// [`Ring::submit`]; an [`Event::Moved`] comes then. Whoever waits for it keeps the file open.
    pub fn read(
        &mut self,
        mut slot: Slot,
        file: BorrowedFd<'_>,
        at: u64,
        len: usize,
    ) -> io::Result<()> {
        let memory = slot.payload_mut();
        let len = u32::try_from(len.min(memory.len())).unwrap_or(0);
        let file = types::Fd(file.as_raw_fd());
        let entry = opcode::Read::new(file, memory.as_mut_ptr(), len).offset(at);
        let entry = entry.build().user_data(slot.into_data(MOVED));
        self.push(&entry.into())
    }

    /// As [`Ring::read`], from the payload to the file.
    pub fn write(
        &mut self,
        slot: Slot,
        file: BorrowedFd<'_>,
        at: u64,
        len: usize,
    ) -> io::Result<()> {
        let memory = slot.payload();
        let len = u32::try_from(len.min(memory.len())).unwrap_or(0);
        let file = types::Fd(file.as_raw_fd());
        let entry = opcode::Write::new(file, memory.as_ptr(), len).offset(at);
        let entry = entry.build().user_data(slot.into_data(MOVED));
        self.push(&entry.into())
    }

    /// The kernel reads the entry at the next `submit`; what it points at belongs to a slot that
    /// has been given away, so nobody touches it before that.
    fn push(&mut self, entry: &Entry128) -> io::Result<()> {
        loop {
            // SAFETY: the entry's one address is of the pieces or the payload of a slot. That was
            // given away, so both live, and nobody touches them, until the kernel has answered, as
            // its number comes back with the entry's one event. The descriptor is registered, or of
            // a mailbox that lives as long as the ring's owner, who keeps both, or of a file that
            // the owner keeps open until then; were it another's by then, bytes would go astray,
            // within the payload.
            #[allow(unsafe_code)]
            let pushed = unsafe { self.ring.submission().push(entry) };
            match pushed {
                Ok(()) => return Ok(()),
                Err(PushError { .. }) => self.submit(0)?,
            }
        }
    }

    /// Has the kernel send an [`Event::Echo`].
    pub fn echo(&mut self) -> io::Result<()> {
        let entry = opcode::Nop::new().build().user_data(ECHO);
        self.push(&entry.into())
    }

    /// Lets go of the device. Whoever can still send to the ring keeps it, and what it has, alive.
    pub fn let_go(&self) -> io::Result<()> {
        self.ring.submitter().unregister_files()
    }

    /// Gives the kernel what was pushed, and waits for so many events. It may come back with less
    /// than that: who needs more looks at the events first, and asks again.
    pub fn submit(&mut self, wait: usize) -> io::Result<()> {
        let Err(e) = self.ring.submit_and_wait(wait) else {
            self.troubles = 0;
            return Ok(());
        };
        match e.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            Some(errno) if is_passing(errno) && self.troubles < TROUBLES_MAX => {
                self.troubles += 1;
                wait_a_moment();
                Ok(())
            }
            _ => Err(e),
        }
    }

    /// The next event that has come.
    pub fn next_event(&mut self) -> Option<Event> {
        let event = self.ring.completion().next()?;
        let (data, result) = (event.user_data(), event.result());
        let tag = data & TAG_MASK;
        match tag {
            STOP => return Some(Event::Stop),
            ECHO => return Some(Event::Echo),
            _ => {}
        }
        // SAFETY: all events but these two carry the number of a slot, each of them once: a command
        // comes back when it is over, a message where it was sent, or to its sender if that failed.
        // No one but this process can send any, as no other has the ring.
        #[allow(unsafe_code)]
        let mut slot = unsafe { Slot::from_data(data) };
        Some(match tag {
            ANSWER => Event::Answer(slot),
            BOUNCED => Event::Bounced(slot),
            MOVED => Event::Moved(slot, result),
            _ if result >= 0 => {
                slot.set_known();
                Event::Request(slot)
            }
            _ => Event::Ended(slot, -result),
        })
    }
}

#[cfg(test)]
mod tests;
