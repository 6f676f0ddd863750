//! Files in memory that log what is done to them, and fail when they are told to.
//!
//! A file is what reads see (the host's cache); what a power cut would leave of it is worked out
//! from the log, by [`super::media`]. All files of one run share a [`World`].

use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::storage::{FileId, Keep, Storage};
use ploopfs::sync::{self, Rank};
use ploopfs::units::FileOffset;
use std::ops::Range;
use std::sync::Arc;

pub(crate) use super::event::{Change, Event, Kind};
use super::heap;
use super::world::Trouble;
pub(crate) use super::world::{Manners, State, World};

/// One open file.
#[derive(Debug)]
pub(crate) struct SimStorage {
    world: Arc<World>,
    file: usize,
    writable: bool,
    process: u64,
}

fn index(at: FileOffset) -> usize {
    usize::try_from(at.get()).expect("simulated files are small")
}

impl SimStorage {
    /// A file, opened by the process that uses the files now.
    pub(super) fn new(world: &Arc<World>, file: usize, writable: bool) -> Self {
        Self {
            world: Arc::clone(world),
            file,
            writable,
            process: world.process(),
        }
    }

    /// One operation: `what` does it, `partly` does the part of it that a failing host has done.
    fn operation<T>(
        &self,
        kind: Kind,
        what: impl FnOnce(&mut State) -> Result<T>,
        partly: impl FnOnce(&mut State),
    ) -> Result<T> {
        assert!(!Rank::Table.is_held(), "a call under a table's lock");
        heap::with(None, || {
            sync::step();
            let done = {
                let mut state = self.world.state.lock();
                match state.begin(kind, self.process) {
                    Ok(()) => what(&mut state),
                    Err(trouble) => {
                        if matches!(trouble, Trouble::Fault(_)) {
                            partly(&mut state);
                        }
                        Err(trouble.into())
                    }
                }
            };
            // What was done and what the caller does next are two moments.
            sync::step();
            done
        })
    }

    fn modify(&self, kind: Kind, change: Change, partly: impl FnOnce(&mut State)) -> Result<()> {
        assert!(self.writable, "a lower delta is never written");
        let file = self.file;
        self.operation(
            kind,
            |state| {
                state.change(file, change);
                Ok(())
            },
            partly,
        )
    }

    /// A change of which a failing host has done a part.
    fn modify_partly(&self, kind: Kind, change: Change, part: Option<Change>) -> Result<()> {
        let file = self.file;
        self.modify(kind, change, |state| {
            if let Some(part) = part {
                state.change(file, part);
            }
        })
    }
}

impl Storage for SimStorage {
    fn len(&self) -> Result<FileOffset> {
        let file = self.file;
        let len = |state: &mut State| Ok(FileOffset::new(state.files[file].len() as u64));
        self.operation(Kind::Len, len, |_| {})
    }

    fn read_at(&self, at: FileOffset, buf: &mut [u8]) -> Result<()> {
        let file = self.file;
        let read = |state: &mut State| {
            let source = state.files[file].get(index(at)..index(at) + buf.len());
            buf.copy_from_slice(source.ok_or_else(|| Error::new(ErrorKind::Truncated))?);
            Ok(())
        };
        self.operation(Kind::Read, read, |_| {})
    }

    fn read_now(&self, at: FileOffset, buf: &mut [u8]) -> Result<usize> {
        // What the host has in memory is its own affair: all of it, nothing, or any part.
        let reads = self.world.state.lock().count(Kind::Read);
        let odd = usize::try_from(reads).expect("few") % 7 * buf.len() / 6 / 512 * 512;
        let len = odd.min(buf.len());
        self.read_at(at, &mut buf[..len])?;
        // The rest is not what it should be.
        buf[len..].fill(0x5a);
        Ok(len)
    }

    fn write_at(&self, at: FileOffset, buf: &[u8]) -> Result<()> {
        // Hosts stop between sectors, not within one.
        let half = buf.len() / 2 / 512 * 512;
        heap::with(None, || {
            let at = index(at);
            let change = Change::Write(at, buf.to_vec());
            let file = self.file;
            self.modify(Kind::Write, change, |state| {
                state.failures.may_latch |= at < state.table_end(file);
                if half > 0 {
                    state.change(file, Change::Write(at, buf[..half].to_vec()));
                }
            })
        })
    }

    fn sync_data(&self) -> Result<()> {
        let file = self.file;
        let sync = |state: &mut State| {
            let lying = state.manners.lying_syncs;
            if let Some(log) = state.log.as_mut().filter(|_| !lying) {
                log.push(Event::Synced { file });
            }
            Ok(())
        };
        let lose = |state: &mut State| {
            state.failures.lost_sync |= !state.is_mark_alone(file);
            state.failures.may_latch = true;
            state.log_event(Event::SyncFailed { file });
        };
        self.operation(Kind::Sync, sync, lose)
    }

    fn set_len(&self, len: FileOffset) -> Result<()> {
        self.modify(Kind::SetLen, Change::SetLen(index(len)), |_| {})
    }

    fn allocate(&self, range: Range<FileOffset>) -> Result<()> {
        // A host that runs out of space midway leaves the file longer by any amount; one that
        // cannot reserve blocks lengthens it in one step.
        let odd = (index(range.start) + index(range.end)) / 2 + 100;
        let odd = Change::Allocate(odd.min(index(range.end)));
        self.modify_partly(
            Kind::Allocate,
            Change::Allocate(index(range.end)),
            (!self.world.is_poor()).then_some(odd),
        )
    }

    fn zero(&self, range: Range<FileOffset>, _keep: Keep) -> Result<()> {
        let range = index(range.start)..index(range.end);
        if self.world.is_poor() && range.start < range.end {
            return heap::with(None, || {
                let len = self.world.len_of(self.file);
                let zeros = vec![0; range.end.min(len).saturating_sub(range.start)];
                let half = zeros[..zeros.len() / 2 / 512 * 512].to_vec();
                let partly = Some(Change::Write(range.start, half));
                self.modify_partly(Kind::Zero, Change::Write(range.start, zeros), partly)
            });
        }
        let half = range.start..range.start + (range.end - range.start) / 1024 * 512;
        self.modify_partly(Kind::Zero, Change::Zero(range), Some(Change::Zero(half)))
    }

    fn copy_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        if self.world.is_poor() {
            return Ok(false);
        }
        heap::with(None, || {
            let mut data = vec![0; index(from.end) - index(from.start)];
            source.read_at(from.start, &mut data)?;
            let half = data[..data.len() / 2 / 512 * 512].to_vec();
            let partly = Change::Write(index(at), half);
            self.modify_partly(Kind::Copy, Change::Write(index(at), data), Some(partly))?;
            Ok(true)
        })
    }

    fn share_from(
        &self,
        at: FileOffset,
        source: &dyn Storage,
        from: Range<FileOffset>,
    ) -> Result<bool> {
        let shares = self.world.state.lock().manners.shares;
        Ok(shares && self.copy_from(at, source, from)?)
    }

    fn next_data(&self, from: FileOffset) -> Result<Option<Range<FileOffset>>> {
        let file = self.file;
        let next = |state: &mut State| {
            let bytes = &state.files[file];
            let is_hole = |at: usize| {
                let end = (at / 4096 * 4096 + 4096).min(bytes.len());
                bytes[at..end].iter().all(|byte| *byte == 0)
            };
            // Blocks of zeros are holes, but where the host does not know of holes.
            let poor = state.manners.poor_host;
            let mut start = index(from);
            while start < bytes.len() && !poor && is_hole(start) {
                start = start / 4096 * 4096 + 4096;
            }
            let mut end = start;
            while end < bytes.len() && (poor || !is_hole(end)) {
                end = end / 4096 * 4096 + 4096;
            }
            let end = end.min(bytes.len());
            let range = FileOffset::new(start as u64)..FileOffset::new(end as u64);
            Ok((start < bytes.len()).then_some(range))
        };
        self.operation(Kind::NextData, next, |_| {})
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.len()?.get())
    }

    fn drop_cache(&self) -> Result<()> {
        heap::with(None, || {
            let mut state = self.world.state.lock();
            let file = self.file;
            let mut media = state.first.clone();
            if let Some(log) = &mut state.log {
                for event in log.iter() {
                    media.take(event);
                }
                log.push(Event::CacheDropped { file });
                state.files[file] = media.uncached(file);
            }
            Ok(())
        })
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}
