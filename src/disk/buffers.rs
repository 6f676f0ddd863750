//! Memory for requests that leave the thread they arrived on.
//!
//! All of it is set aside, and touched, when the disk is opened: in a short time of memory nothing
//! has to be asked of the host. When it is used up, the thread that a request arrived on serves it
//! alone with the buffer that every such thread owns, so there is always progress.

use crate::error::{Error, Result};
use crate::storage::aligned::Aligned;
use crate::sync::Mutex;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// What the heap gives without being asked twice.
const HEAP_MAX: usize = 4096;
const SMALL_LEN: usize = 64 << 10;
const SMALL_COUNT: usize = 64;
const LARGE_LEN: usize = 1 << 20;
const LARGE_COUNT: usize = 12;

/// Requests longer than this never leave their thread in one piece.
pub const BUFFER_MAX: usize = LARGE_LEN;

/// What goes to the medium without a copy, if it is to go there directly.
#[derive(Debug)]
enum Memory {
    Heap(Box<[u8]>),
    Set(Aligned),
}

impl Default for Memory {
    fn default() -> Self {
        Self::Heap(Box::default())
    }
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Set(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Set(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Class {
    len: usize,
    /// So many at most.
    count: usize,
    free: Mutex<Vec<Memory>>,
}

impl Class {
    fn new(len: usize, count: usize) -> Result<Self> {
        let class = Self {
            len,
            count,
            free: Mutex::new(Vec::with_capacity(count)),
        };
        class.fill()?;
        Ok(class)
    }

    /// Sets aside as many as are missing.
    fn fill(&self) -> Result<()> {
        let mut free = self.free.lock();
        while free.len() < self.count {
            free.push(Memory::Set(Aligned::new(self.len)?));
        }
        Ok(())
    }
}

/// The buffers of one disk.
#[derive(Debug)]
pub struct Buffers {
    classes: [Class; 2],
}

/// A buffer of exactly the length that was asked for; goes back where it came from when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    len: usize,
    home: Option<(Arc<Buffers>, usize)>,
}

impl Buffers {
    /// Sets all buffers aside.
    pub fn new() -> Result<Arc<Self>> {
        let classes = [
            Class::new(SMALL_LEN, SMALL_COUNT)?,
            Class::new(LARGE_LEN, LARGE_COUNT)?,
        ];
        Ok(Arc::new(Self { classes }))
    }

    /// No buffers but what the heap gives without being asked twice.
    #[must_use]
    pub fn none() -> Arc<Self> {
        let none = |len| Class {
            len,
            count: 0,
            free: Mutex::default(),
        };
        Arc::new(Self {
            classes: [none(SMALL_LEN), none(LARGE_LEN)],
        })
    }

    /// Gives the host the large buffers back that nobody has.
    pub fn release(&self) {
        self.classes[1].free.lock().clear();
    }

    /// Sets large buffers aside again. On an error there are as many as the host has given.
    pub fn restore(&self) -> Result<()> {
        self.classes[1].fill()
    }

    /// A buffer of `len` bytes of any content, or `None` while there is none.
    #[must_use]
    pub fn take(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        if len <= HEAP_MAX {
            return Some(Buffer {
                memory: Memory::Heap(vec![0; len].into_boxed_slice()),
                len,
                home: None,
            });
        }
        let classes = self
            .classes
            .iter()
            .enumerate()
            .filter(|(_, class)| class.len >= len);
        for (index, class) in classes {
            if let Some(memory) = class.free.lock().pop() {
                return Some(Buffer {
                    memory,
                    len,
                    home: Some((Arc::clone(self), index)),
                });
            }
        }
        None
    }
}

/// Fails unless the heap has `len` bytes to give now. For what may fail and calls libraries that
/// end the program when they get no memory.
pub fn ensure_heap(len: usize) -> Result<()> {
    let mut memory = Vec::<u8>::new();
    let reserved = memory.try_reserve_exact(len);
    // Else the compiler may see that nothing is done with it, and not ask at all.
    std::hint::black_box(&mut memory);
    reserved.map_err(|_| Error::errno(libc::ENOMEM))
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some((buffers, class)) = self.home.take() {
            let class = &buffers.classes[class];
            let mut free = class.free.lock();
            // There is room, as the list was made for all of its buffers; but for one that somebody
            // had while others were set aside again, of which the host gets the memory back.
            if free.len() < class.count {
                free.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        let buffers = Buffers::new().unwrap();
        for _ in 0..3 {
            let all: Vec<_> = std::iter::from_fn(|| buffers.take(LARGE_LEN)).collect();
            assert_eq!(all.len(), LARGE_COUNT);
            let small: Vec<_> = std::iter::from_fn(|| buffers.take(HEAP_MAX + 1)).collect();
            assert_eq!(small.len(), SMALL_COUNT);
            assert!(small.iter().all(|buffer| buffer.len() == HEAP_MAX + 1));
            assert!(buffers.take(HEAP_MAX).is_some());
        }
        assert!(buffers.take(LARGE_LEN + 1).is_none());
        let out = buffers.take(LARGE_LEN);
        buffers.release();
        assert!(out.is_some() && buffers.take(LARGE_LEN).is_none());
        drop(out);
        assert!(buffers.take(LARGE_LEN).is_some(), "it comes back as before");
    }

    #[test]
    fn large_buffers_are_there_again_after_a_release() {
        let buffers = Buffers::new().unwrap();
        let count = || {
            let all: Vec<_> = std::iter::from_fn(|| buffers.take(LARGE_LEN)).collect();
            all.len()
        };
        let out = buffers.take(LARGE_LEN);
        buffers.release();
        assert_eq!(count(), 0);
        buffers.restore().unwrap();
        drop(out);
        assert_eq!(count(), LARGE_COUNT, "not one more for that which was out");
        buffers.restore().unwrap();
        assert_eq!(count(), LARGE_COUNT);
    }
}
