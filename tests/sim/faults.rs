//! Operations that fail, and the errors of requests that may follow from that.
//!
//! A request may fail only if the failing operation was made, and failed, while the request was
//! under way, and if requests of its sort make such operations at all; and with the very errno of
//! the host. The one exception is the latch: after a failed sync or a failed write of a header or a
//! table, everything but a read is refused.

use super::storage::Kind;
use ploopfs::error::{Error, ErrorKind};

/// An operation that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    /// Which one of its kind, from 0.
    pub(crate) nth: u64,
    pub(crate) errno: i32,
    /// All from that one on, not only that one.
    pub(crate) for_ever: bool,
}

/// An operation that fails whatever it is: that with this number, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Nth {
    pub(crate) nth: u64,
    pub(crate) errno: i32,
    /// All from that one on, not only that one.
    pub(crate) for_ever: bool,
    /// Everything counts, and not only what changes something.
    pub(crate) of_all: bool,
}

impl Nth {
    /// True for the operation that has this number among all, and that among the changes if it is
    /// one.
    pub(crate) fn is_hit(self, of_all: u64, change: Option<u64>) -> bool {
        let number = if self.of_all { Some(of_all) } else { change };
        number.is_some_and(|number| number == self.nth || self.for_ever && number > self.nth)
    }
}

/// What has failed so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Failures {
    /// Operations.
    pub(crate) count: u64,
    /// One of them was a sync with something to lose.
    pub(crate) lost_sync: bool,
    /// One of them must, or may, have latched the disk.
    pub(crate) may_latch: bool,
}

/// What a client, or the life of the disk around it, asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Open,
    Read,
    Change,
    Flush,
    Close,
}

impl Request {
    /// True when such a request fails if an operation of this kind does that it needs.
    fn needs(self, kind: Kind) -> bool {
        match kind {
            // Pages of the map are loaded and checked against the file's length.
            Kind::Read => matches!(self, Self::Open | Self::Read | Self::Change),
            Kind::Len => self != Self::Flush,
            Kind::Write | Kind::Sync => self != Self::Read,
            // What is free at the file's end is cut, what is odd there is mended.
            Kind::SetLen => matches!(self, Self::Open | Self::Change | Self::Close),
            Kind::Zero => matches!(self, Self::Open | Self::Change | Self::Close),
            Kind::Allocate | Kind::Copy => self == Self::Change,
            // Where the table is a hole is nothing to read; where free space is, nothing to punch.
            Kind::NextData => matches!(self, Self::Open | Self::Close),
            _ => false,
        }
    }
}

impl Fault {
    /// True when a request that waits for space is served in the end.
    fn passes(self) -> bool {
        self.errno == libc::ENOSPC && !self.for_ever && self.kind != Kind::Sync
    }

    /// True when `error` is what such a request may be told. `before` had failed when it began,
    /// `now` by its end; a `patient` one waits for space.
    pub(crate) fn explains(
        self,
        request: Request,
        error: &Error,
        (before, now): (Failures, Failures),
        patient: bool,
    ) -> bool {
        match error.kind() {
            ErrorKind::Io(errno) => {
                errno == self.errno
                    && now.count > before.count
                    && request.needs(self.kind)
                    && !(patient && self.passes() && request == Request::Change)
            }
            ErrorKind::Latched => now.may_latch && request != Request::Read,
            _ => false,
        }
    }
}
