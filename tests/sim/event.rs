//! What can happen to files and disks, and how a change of a file may be kept or lost in parts.

use super::directory::NameChange;
use super::model::{Stamp, WriteId};
use std::ops::Range;
use std::sync::Arc;

/// One operation that changes a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
    /// Blocks are reserved up to here; a shorter file becomes as long.
    Allocate(usize),
    Zero(Range<usize>),
}

impl Change {
    /// Does it to these bytes. `keep` is asked for each piece that a power cut keeps or loses by
    /// itself: sectors of a write, and every other operation as a whole.
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>, keep: &mut dyn FnMut() -> bool) {
        match self {
            Self::Write(at, data) => {
                let mut from = 0;
                while from < data.len() {
                    let to = ((at + from) / 512 * 512 + 512 - at).min(data.len());
                    if keep() {
                        let end = at + to;
                        if bytes.len() < end {
                            bytes.resize(end, 0);
                        }
                        bytes[at + from..end].copy_from_slice(&data[from..to]);
                    }
                    from = to;
                }
            }
            Self::SetLen(len) if keep() => bytes.resize(*len, 0),
            Self::Allocate(end) if *end > bytes.len() && keep() => bytes.resize(*end, 0),
            // A host may punch a long range piece by piece.
            Self::Zero(range) => {
                let mut start = range.start;
                while start < range.end.min(bytes.len()) {
                    let end = (start / 4096 * 4096 + 4096).min(range.end).min(bytes.len());
                    if keep() {
                        bytes[start..end].fill(0);
                    }
                    start = end;
                }
            }
            _ => {}
        }
    }
}

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A file was changed, as reads see it.
    Changed { file: usize, change: Change },
    /// All changes of a file before this are durable.
    Synced { file: usize },
    /// A sync failed: what was not durable never will be, although reads still see it.
    SyncFailed { file: usize },
    /// Names in a directory were changed, as others see them.
    Named {
        directory: usize,
        change: NameChange,
    },
    /// All changes of the names in a directory before this are durable.
    NamesSynced { directory: usize },
    /// Reads come from the medium, and from what has yet to be written there.
    CacheDropped { file: usize },
    /// A client began to write these sectors of the disk.
    Issued {
        id: WriteId,
        sectors: Range<u64>,
        stamp: Stamp,
    },
    /// It was told the end of that.
    Ended { id: WriteId, ok: bool },
    /// A client asked for a flush.
    FlushBegan { flush: u64 },
    /// It was told that all is durable.
    FlushDone { flush: u64 },
    /// The disk is closed, is open again and shows this.
    Opened { shows: Arc<Vec<u8>> },
    /// The files are now as a power cut left them.
    Cut { files: Vec<Vec<u8>> },
}

/// Kinds of operations on files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Len,
    Read,
    Write,
    Sync,
    SetLen,
    Allocate,
    Zero,
    Copy,
    NextData,
    Open,
    Create,
    Rename,
    Remove,
    SyncNames,
}

impl Kind {
    pub(crate) const ALL: [Self; 14] = [
        Self::Len,
        Self::Read,
        Self::Write,
        Self::Sync,
        Self::SetLen,
        Self::Allocate,
        Self::Zero,
        Self::Copy,
        Self::NextData,
        Self::Open,
        Self::Create,
        Self::Rename,
        Self::Remove,
        Self::SyncNames,
    ];

    /// True for what changes a file or a name, or makes such a change durable.
    pub(crate) fn is_change(self) -> bool {
        !matches!(self, Self::Len | Self::Read | Self::NextData | Self::Open)
    }
}
