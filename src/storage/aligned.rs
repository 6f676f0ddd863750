//! Memory that direct I/O can use, and what there is of it for those whose own memory does not fit.
//!
//! So many pieces are made, and touched, when the first file goes direct: one set for the process.
//! Who needs one has no other, and holds no lock meanwhile that others need who have one; so who
//! waits for a piece gets it after somebody else's call to the host.

use crate::error::{Error, Result};
use parking_lot::{Condvar, Mutex};
use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

/// Memory starts at a multiple of this, a page, which fits every device.
pub const ALIGN: usize = 4096;
/// Pieces for small requests, and for large ones.
const SIZES: [(usize, usize); 2] = [(64 << 10, 24), (1 << 20, 12)];

/// Bytes whose first one is at a multiple of [`ALIGN`].
#[derive(Debug, Default)]
pub struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Aligned {
    /// So many bytes, with memory behind them from the start.
    pub fn new(len: usize) -> Result<Self> {
        let no_memory = || Error::errno(libc::ENOMEM);
        let mut bytes = Vec::new();
        let all = len.checked_add(ALIGN).ok_or_else(no_memory)?;
        bytes.try_reserve_exact(all).map_err(|_| no_memory())?;
        // Any value but 0 makes the host back the pages now.
        bytes.resize(all, 1);
        let skip = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        Ok(Self { bytes, skip, len })
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.skip..self.skip + self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + self.len]
    }
}

/// The pieces that nobody has: small ones, large ones.
#[derive(Debug)]
struct Spare {
    free: Mutex<[Vec<Aligned>; 2]>,
    returned: Condvar,
}

static SPARE: OnceLock<Spare> = OnceLock::new();

/// Sets the pieces aside, once.
pub(super) fn prepare() -> Result<()> {
    if SPARE.get().is_none() {
        let set = |(len, count): (usize, usize)| -> Result<Vec<Aligned>> {
            (0..count).map(|_| Aligned::new(len)).collect()
        };
        let [small, large] = SIZES;
        // Two at once: one of them was in vain.
        let _ = SPARE.set(Spare {
            free: Mutex::new([set(small)?, set(large)?]),
            returned: Condvar::new(),
        });
    }
    Ok(())
}

/// A piece of it; goes back when dropped.
#[derive(Debug)]
pub(super) struct Piece {
    memory: Aligned,
    class: usize,
}

/// A piece of `len` bytes or, if that is all there is, of fewer: at least of the small size. Waits
/// until there is one.
pub(super) fn take(len: usize) -> Result<Piece> {
    let spare = SPARE.get().ok_or_else(|| Error::errno(libc::ENOMEM))?;
    let wanted = usize::from(len > SIZES[0].0);
    let mut free = spare.free.lock();
    loop {
        for class in [wanted, 1 - wanted] {
            if let Some(memory) = free[class].pop() {
                return Ok(Piece { memory, class });
            }
        }
        spare.returned.wait(&mut free);
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(spare) = SPARE.get() {
            let memory = std::mem::take(&mut self.memory);
            // There is room: the list was made for all of its pieces.
            spare.free.lock()[self.class].push(memory);
            spare.returned.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_start_pages_and_come_back() {
        prepare().unwrap();
        for _ in 0..100 {
            let (small, large) = (take(512).unwrap(), take(1 << 20).unwrap());
            for piece in [&small, &large] {
                assert_eq!(piece.as_ptr().addr() % ALIGN, 0);
                assert!(piece.len() >= SIZES[0].0);
            }
        }
        assert_eq!(Aligned::new(5).unwrap().len(), 5);
    }

    #[test]
    fn who_finds_none_waits_for_one() {
        prepare().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| {
                    let piece = take(1 << 20).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    drop(piece);
                });
            }
        });
    }
}
