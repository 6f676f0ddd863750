//! Gives a file back what a journal has saved of it.
//!
//! Imports: `storage` and lower.
//! Never: decides whether the file may be taken back.
//!
//! The order of [`restore`], each step durable before the next, and what each reordering would
//! break. The frame's part of the file (a table) names places behind it:
//!
//! 1. the journal says that an undo runs;
//! 2. the old length, if the file is shorter, and the ranges that the frame's part named before the
//!    change: later, and it would name what is not back yet;
//! 3. the frame's part;
//! 4. the ranges that it named since the change. Earlier, and it would name the wrong bytes;
//! 5. the old length, if the file is longer;
//! 6. the first 64 bytes.

use super::{BYTES, Head, LATE, Sealed, UNDOING, ZEROS};
use super::{inspect, read_head, read_record, unsound};
use crate::error::Result;
use crate::planted::{Bug, planted};
use crate::storage::{Keep, Storage};
use crate::units::FileOffset;

/// Says, durably, that an undo has begun: whatever the file holds from now on, it is on its way
/// back.
pub fn begin_undo(journal: &dyn Storage) -> Result<()> {
    if planted(Bug::UndoBegunSilently) {
        return Ok(());
    }
    let sealed = Sealed::read(journal)?;
    if !sealed.undoing {
        let mut head = Head {
            kind: UNDOING,
            crc: 0,
            place: 0,
            len: 0,
        };
        head.crc = head.checksum(&[]);
        journal.set_len(sealed.tail)?;
        journal.write_at(sealed.tail, &head.encode())?;
    }
    journal.sync_data()
}

/// When an undo gives a range back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// First: the frame's part of the file may name it again afterwards.
    Early,
    /// The frame's part of the file.
    Frame,
    /// What that named until then.
    Late,
}

impl Turn {
    fn of(head: &Head, frame_end: u64) -> Self {
        if head.place < frame_end {
            Self::Frame
        } else if head.kind & LATE != 0 {
            Self::Late
        } else {
            Self::Early
        }
    }
}

/// Gives the file its old length and its old bytes back, the first 64 of them last, and makes
/// them durable. Repeating it changes nothing.
///
/// Each turn is durable before the next begins: the frame's part of the file never names what is
/// not back yet, or what is no longer there.
pub fn restore(journal: &dyn Storage, file: &dyn Storage) -> Result<()> {
    begin_undo(journal)?;
    let undo = inspect(journal, file)?;
    let sealed = Sealed::read(journal)?;
    let frame_end = sealed.frame.map_or(0, |(end, _)| end);
    let old_len = undo.len.unwrap_or(file.len()?);
    if file.len()? < old_len {
        file.set_len(old_len)?;
    }
    for turn in [Turn::Early, Turn::Frame, Turn::Late] {
        for place in sealed.places.iter().rev() {
            if Turn::of(&read_head(journal, *place)?, frame_end) == turn {
                put_back(journal, *place, sealed.end.get(), file)?;
            }
        }
        if !planted(Bug::UndoTurnsNotSynced) {
            file.sync_data()?;
        }
    }
    if file.len()? > old_len {
        file.set_len(old_len)?;
        file.sync_data()?;
    }
    if let Some(first) = undo.first {
        file.write_at(FileOffset::ZERO, &first)?;
        if !planted(Bug::UndoEndsUnsynced) {
            file.sync_data()?;
        }
    }
    Ok(())
}

/// Gives one range its old bytes back, but for the first.
fn put_back(journal: &dyn Storage, place: u64, len: u64, file: &dyn Storage) -> Result<()> {
    let mut bytes = Vec::new();
    let head = read_record(journal, place, len, &mut bytes)?
        .ok_or_else(|| unsound("a record has changed"))?;
    let at = FileOffset::new(head.place);
    match head.what() {
        BYTES if head.place != 0 => file.write_at(at, &bytes),
        ZEROS => {
            // What lies past the end of the file becomes zeros with its length.
            let end = at.saturating_add(head.len).min(file.len()?);
            if at < end {
                file.zero(at..end, Keep::Nothing)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
