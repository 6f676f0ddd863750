//! Reading and writing past the page cache, for requests of any place and length.
//!
//! The host takes only whole blocks of the device, from memory that starts where the device can
//! begin. What is neither goes through a piece of [`aligned`] memory, and the neighbours of
//! bytes that are less than a block are read, and written again as they are.
//!
//! Everything of a file goes this way once it does, header and table too. One file through the
//! cache and past it at once is a trap: a page that is dirty for its own bytes is written as a
//! whole, and takes back what a direct write has put beside them meanwhile. So nobody but the host
//! itself has pages of the file, and the host waits for direct I/O where it makes some.
//!
//! Two writes in one block, at the same time:
//!
//! 1. a write that is less than a block reads the block, changes its part and writes the block.
//!    Between the two, nobody else may write into that block, or his bytes would be taken back: it
//!    has the stripe that the block is in for itself;
//! 2. a write of whole blocks shares its stripe with its like: they know nothing of their
//!    neighbours. What both write was never in an order.
//!
//! A piece of memory is taken before the stripe, so who waits for memory keeps nobody waiting.
//!
//! Whole blocks may be moved by somebody else ([`Direct::lend`]), who for a write is counted at the
//! stripes that it touches until it has ended. Nobody waits to be counted: where someone has a
//! stripe for himself, or is about to, there is no loan. Who wants one for himself takes its lock
//! first, so that no more are counted, and then waits for those that are. They end without needing
//! anything that he could have: the host moves their bytes whatever we do, and the thread that is
//! told of it, which never waits for a stripe, gives back what was lent before it does anything
//! else.

use super::Way;
use super::aligned::{self, Piece};
use crate::error::{Error, Result};
use crate::units::len_u64;
use parking_lot::{Condvar, Mutex, RwLock};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes that one lock stands for; a longer write takes one after the other.
const STRIPE: u64 = 1 << 20;
const STRIPES: usize = 64;

/// Who writes in one part of a file.
#[derive(Debug)]
struct Stripe {
    lock: RwLock<()>,
    /// Writes of whole blocks that somebody else carries out.
    lent: Mutex<usize>,
    /// There are none.
    returned: Condvar,
}

impl Stripe {
    const fn new() -> Self {
        Self {
            lock: RwLock::new(()),
            lent: Mutex::new(0),
            returned: Condvar::new(),
        }
    }

    fn lend(&self) -> bool {
        let shared = self.lock.try_read();
        *self.lent.lock() += usize::from(shared.is_some());
        shared.is_some()
    }

    fn give_back(&self) {
        let mut lent = self.lent.lock();
        *lent -= 1;
        if *lent == 0 {
            self.returned.notify_all();
        }
    }

    /// Waits until nothing is lent; the caller has the lock for himself.
    fn wait_for_all(&self) {
        let mut lent = self.lent.lock();
        while *lent > 0 {
            self.returned.wait(&mut lent);
        }
    }
}

/// How a file is read and written directly.
#[derive(Debug)]
pub(super) struct Direct {
    /// What addresses in memory are multiples of.
    memory: usize,
    /// What places and lengths are multiples of; a power of two.
    block: u64,
    stripes: [Stripe; STRIPES],
}

fn len_of(from: u64, to: u64) -> usize {
    usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX)
}

/// Reads as much as the file has, and tells how much that is.
fn read_up_to_end(file: &File, at: u64, buf: &mut [u8], block: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        let here = at.saturating_add(len_u64(done));
        match file.read_at(&mut buf[done..], here) {
            Ok(0) => break,
            Ok(came) => {
                done += came;
                if len_u64(came) % block != 0 {
                    // Only the end of the file does that.
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

impl Direct {
    pub(super) fn new(memory: usize, block: u64) -> Result<Self> {
        aligned::prepare()?;
        Ok(Self {
            memory: memory.max(1),
            block,
            stripes: [const { Stripe::new() }; STRIPES],
        })
    }

    /// What places and lengths are multiples of.
    pub(super) fn block(&self) -> u64 {
        self.block
    }

    fn down(&self, at: u64) -> u64 {
        at - at % self.block
    }

    fn up(&self, at: u64) -> u64 {
        at.next_multiple_of(self.block)
    }

    /// True for places and lengths that the device takes.
    pub(super) fn fits(&self, at: u64, len: usize) -> bool {
        at % self.block == 0 && len_u64(len) % self.block == 0
    }

    fn takes(&self, buf: &[u8]) -> bool {
        buf.as_ptr().addr() % self.memory == 0
    }

    fn stripe(&self, at: u64) -> &Stripe {
        let number = usize::try_from(at / STRIPE).unwrap_or(0);
        &self.stripes[number % STRIPES]
    }

    /// The stripes of a range, one after the other.
    fn stripes(&self, at: u64, len: usize) -> impl Iterator<Item = &Stripe> {
        let end = at.saturating_add(len_u64(len));
        let numbers = at / STRIPE..end.div_ceil(STRIPE);
        numbers.map(|number| self.stripe(number * STRIPE))
    }

    /// Lets somebody else move whole blocks, unless a neighbour in one of them is being written.
    pub(super) fn lend(&self, at: u64, memory: &[u8], way: Way) -> bool {
        if !self.fits(at, memory.len()) || !self.takes(memory) {
            return false;
        }
        if way == Way::Read {
            return true;
        }
        let taken = self.stripes(at, memory.len()).take_while(|s| s.lend());
        let (taken, all) = (taken.count(), self.stripes(at, memory.len()).count());
        if taken < all {
            let counted = self.stripes(at, memory.len()).take(taken);
            counted.for_each(Stripe::give_back);
        }
        taken == all
    }

    /// What was lent is not used any more.
    pub(super) fn give_back(&self, at: u64, len: usize, way: Way) {
        if way == Way::Write {
            self.stripes(at, len).for_each(Stripe::give_back);
        }
    }

    /// Fills `buf` from `at`, all of it.
    pub(super) fn read(&self, file: &File, at: u64, buf: &mut [u8]) -> Result<()> {
        if self.fits(at, buf.len()) && self.takes(buf) {
            return Ok(file.read_exact_at(buf, at)?);
        }
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let start = self.down(at);
            let all = self.up(at.saturating_add(len_u64(rest.len())));
            let mut piece = aligned::take(len_of(start, all))?;
            let len = len_of(start, all).min(piece.len());
            let came = read_up_to_end(file, start, &mut piece[..len], self.block)?;
            let skip = len_of(start, at);
            let now = came.saturating_sub(skip).min(rest.len());
            if now == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let (part, later) = rest.split_at_mut(now);
            part.copy_from_slice(&piece[skip..skip + now]);
            rest = later;
            at = at.saturating_add(len_u64(now));
        }
        Ok(())
    }

    /// Writes all of `buf` at `at`. Bytes that are less than a block lie within the file.
    pub(super) fn write(&self, file: &File, at: u64, buf: &[u8]) -> Result<()> {
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let left = len_of(at, (at / STRIPE + 1).saturating_mul(STRIPE));
            let mut now = left.min(rest.len());
            if self.fits(at, now) && self.takes(&rest[..now]) {
                let _shared = self.stripe(at).lock.read();
                file.write_all_at(&rest[..now], at)?;
            } else {
                let (start, end) = (self.down(at), self.up(at + len_u64(now)));
                let mut piece = aligned::take(len_of(start, end))?;
                let room = start.saturating_add(len_u64(piece.len()));
                let end = end.min(room);
                now = now.min(len_of(at, end));
                self.write_through(file, &mut piece, start..end, at, &rest[..now])?;
            }
            rest = &rest[now..];
            at = at.saturating_add(len_u64(now));
        }
        Ok(())
    }

    /// Writes whole blocks, which these bytes and what is around them are.
    fn write_through(
        &self,
        file: &File,
        piece: &mut Piece,
        blocks: Range<u64>,
        at: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let (skip, len) = (len_of(blocks.start, at), len_of(blocks.start, blocks.end));
        let is_whole = skip == 0 && len == bytes.len();
        let stripe = self.stripe(at);
        let _shared = is_whole.then(|| stripe.lock.read());
        let _alone = (!is_whole).then(|| stripe.lock.write());
        if !is_whole {
            stripe.wait_for_all();
            let block = len_of(0, self.block);
            let last = len - block;
            self.read_block(file, blocks.start, &mut piece[..block])?;
            if last > 0 {
                let at = blocks.end - self.block;
                self.read_block(file, at, &mut piece[last..len])?;
            }
        }
        piece[skip..skip + bytes.len()].copy_from_slice(bytes);
        Ok(file.write_all_at(&piece[..len], blocks.start)?)
    }

    /// Reads what is around bytes to be written.
    fn read_block(&self, file: &File, at: u64, block: &mut [u8]) -> Result<()> {
        let came = read_up_to_end(file, at, block, self.block)?;
        if came < block.len() {
            // Writing it would make the file longer, and its owner has not asked for that.
            return Err(Error::errno(libc::EINVAL));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
