//! Slots of FUSE queues, and the memory that they are in.
//!
//! Layout (`fuse_uring_req_header` of linux/fuse.h): 128 bytes for the head of a request or an
//! answer, 128 for a request's fixed part, then flags, the number to commit by, and the length of
//! what is in the payload.

use super::TAG_MASK;
use std::fmt;
use std::io;
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
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // Large pages would make all of it resident when the first bytes are touched. A kernel that
        // has none refuses, which is as good.
        // SAFETY: this is the mapping of the line above, and its content stays what it is.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::madvise(start.as_ptr().cast(), len, libc::MADV_NOHUGEPAGE) };
        Ok(Self { start, len })
    }

    /// Has the host put memory behind a range, whose content stays as it is.
    fn back(&self, at: usize, len: usize) -> io::Result<()> {
        if len == 0 || at.checked_add(len).is_none_or(|end| end > self.len) {
            return Ok(());
        }
        // SAFETY: the range is inside the mapping, and what is in it does not change.
        #[allow(unsafe_code)]
        let result = unsafe {
            let start = self.start.as_ptr().add(at);
            libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE)
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
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
/// and is so many bytes long, in whole pages. So many of them have memory behind them then.
pub fn slots(
    queue: u16,
    home: usize,
    count: usize,
    payload_len: usize,
    backed: usize,
) -> io::Result<Vec<Slot>> {
    let too_many = || io::Error::from(io::ErrorKind::InvalidInput);
    let payload_len = payload_len.next_multiple_of(4096);
    let backed = backed.min(payload_len).next_multiple_of(4096);
    let headers = (HEADER_STRIDE * count).next_multiple_of(4096);
    let payloads = payload_len.checked_mul(count).ok_or_else(too_many)?;
    let memory = Arc::new(Memory::new(
        headers.checked_add(payloads).ok_or_else(too_many)?,
    )?);
    memory.back(0, headers)?;
    for number in 0..count {
        memory.back(headers + number * payload_len, backed)?;
    }
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

    /// Tells it from all others that there are; it stays the same, wherever the slot is.
    #[must_use]
    pub fn number(&self) -> usize {
        ptr::from_ref(&*self.0).addr()
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

    /// Where the kernel finds header and payload, as two `iovec`.
    pub(super) fn pieces(&self) -> *const libc::iovec {
        self.0.pieces.as_ptr()
    }

    /// The kernel has put a request in it.
    pub(super) fn set_known(&mut self) {
        self.0.is_known = true;
    }

    /// The number by which the kernel knows the request.
    pub(super) fn commit_number(&self) -> &[u8] {
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
    pub(super) fn into_data(self, tag: u64) -> u64 {
        let address = Box::into_raw(self.0).expose_provenance();
        u64::try_from(address).unwrap_or(0) | tag
    }

    /// # Safety
    /// The number is of [`Slot::into_data`], with any tag, and comes back for the first time.
    #[allow(unsafe_code)]
    pub(super) unsafe fn from_data(data: u64) -> Self {
        let address = usize::try_from(data & !TAG_MASK).unwrap_or(0);
        let inner = ptr::with_exposed_provenance_mut::<Inner>(address);
        // SAFETY: the caller vouches that this is the box that was given away, and nobody else's.
        Self(unsafe { Box::from_raw(inner) })
    }
}
