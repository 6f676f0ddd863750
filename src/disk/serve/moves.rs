//! What becomes of requests that the transport carries out: how they begin, and end.

use super::{Change, Op};
use crate::disk::moving::{Moving, Pinned, Run, UnderWay};
use crate::disk::{Disk, DoneReply};
use crate::error::Result;
use crate::storage::Way;
use crate::units::{DiskOffset, len_u64};
use std::sync::Arc;

impl Disk {
    /// A request of a direct disk for the transport to carry out, between this memory and the file,
    /// if it is one that can be.
    pub(super) fn move_directly(
        self: &Arc<Self>,
        at: DiskOffset,
        memory: &[u8],
        way: Way,
    ) -> Option<Moving> {
        if !self.direct || memory.is_empty() {
            return None;
        }
        // Who goes on after a panic finds the disk latched.
        self.guarded(|| Ok(self.plan_move(at, memory, way)))
            .ok()
            .flatten()
    }

    fn plan_move(self: &Arc<Self>, at: DiskOffset, memory: &[u8], way: Way) -> Option<Moving> {
        let parts = self.parts.load_full();
        let (index, within) = Self::locate(&parts, at);
        let pinned = Pinned::new(parts, index);
        let part = pinned.part();
        let len = len_u64(memory.len());
        if part.disk_len() - within.get() < len {
            return None;
        }
        let place = match way {
            Way::Read => part.one_run(within, len)?,
            Way::Write if !part.marked.is_open() => return None,
            Way::Write => part.one_run_in_place(within, memory)?,
        };
        let request = UnderWay::new(self)?;
        let run = Run::borrow(pinned, place, memory, way)?;
        Some(Moving::new(run, at, request))
    }

    /// The pool writes what the transport could not.
    pub(in crate::disk) fn write_again<R: DoneReply>(self: &Arc<Self>, at: DiskOffset, reply: R) {
        self.spawn_change(at, Op::Brought, reply);
    }

    /// The transport has written the bytes that came with the reply, or has failed to.
    pub(in crate::disk) fn answer_write<R: DoneReply>(&self, result: Result<()>, reply: R) {
        if result.is_ok() {
            self.count_change(Change::Write(reply.brought()));
        }
        reply.done(result);
    }
}
