//! Makes a change of a file undoable: the old bytes, in a file of their own, before the change.
//!
//! Imports: `storage` and lower.
//! Never: runs in the data path, or knows what the bytes mean.
//!
//! The order, and what each reordering would break:
//!
//! 1. every range that will be changed is recorded, with its old bytes;
//! 2. `seal`: the number of records so far is written, the file synced, then its directory. Only
//!    now may the first change be made: were it made before, a power cut could leave a changed file
//!    and no way back, or a record whose bytes never reached the disk;
//! 3. ... the changes ...
//! 4. the journal is renamed from its first name to its last, and the directory synced. A journal
//!    under its first name belongs to a change that was interrupted.
//!
//! A record is its kind, the place and length of the range, the bytes, and a CRC-32C over all of
//! these. What follows the last sound seal is of a recording that was cut short: nothing was
//! changed on its account, so it is not looked at. A range is recorded once: what a change that
//! goes on after an interruption would record again is no longer what it was.
//!
//! Two records tell whether somebody else has changed the file meanwhile. The frame is a checksum
//! of a part of the file that the change leaves alone, but for what is recorded. When the change is
//! complete, a record says what the file holds by then in the recorded and the watched ranges and
//! behind its old length: in all that an undo overwrites, cuts, or brings back into use.
//!
//! An undo says so in the journal before it changes anything: from then on the file is neither what
//! the change left nor what it was, until the undo is through.
//!
//! | offset | size | field |
//! |-------:|-----:|-------|
//! |      0 |    4 | kind: 1 bytes, 2 zeros, 3 length of the file, 4 seal, 5 complete, 6 frame, |
//! |        |      | 7 undo begun, 8 watched range; 256 more for what comes back late |
//! |      4 |    4 | CRC-32C of the record with this field 0 |
//! |      8 |    8 | place of the range; number of records before a seal; the file's length; end |
//! |     16 |    8 | length of the range, or of the file; CRC-32C of the frame, or of the ranges |
//! |     24 |      | the bytes, of kind 1 |
//!
//! A checksum of parts of the file is one of their blocks of 4096 bytes (the first 64 bytes of the
//! file are a block of their own) that are not all zeros, each behind its place as 8 bytes.
//!
//! A complete record has two checksums: the upper half is that of the file before the last step,
//! which changes its first bytes only.

mod frame;
mod restore;

pub use restore::{begin_undo, restore};

use frame::{fold, fold_block, frame};

use crate::error::{Error, ErrorKind, Result};
use crate::planted::{Bug, planted};
use crate::storage::{Directory, SharedStorage, Storage};
use crate::units::{FileOffset, len_u64, len_usize};
use std::collections::BTreeMap;
use std::ops::Range;

/// What the name of a journal has behind that of its file while the change runs or is taken back,
/// and after either was interrupted.
pub const RUNNING: &str = ".repair";
/// First bytes of a journal.
const MAGIC: [u8; 16] = *b"ploopfs undo 1\n\0";
const HEAD: usize = 24;
/// The most bytes of one record.
const RECORD_MAX: u64 = 1 << 20;

const BYTES: u32 = 1;
const ZEROS: u32 = 2;
const LENGTH: u32 = 3;
const SEAL: u32 = 4;
const COMPLETE: u32 = 5;
const FRAME: u32 = 6;
const UNDOING: u32 = 7;
const WATCH: u32 = 8;
/// Added to the kind of what an undo gives back only when nothing names it any more.
const LATE: u32 = 256;
/// Where every frame begins: behind the file's first bytes.
const FRAME_START: u64 = 64;
/// No frame ends behind this: the longest table does not.
const FRAME_MAX: u64 = 1 << 32;

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal {
    file: SharedStorage,
    end: FileOffset,
    records: u64,
    /// What is recorded: starts and ends, apart from each other.
    covered: BTreeMap<u64, u64>,
    has_len: bool,
    /// The file is longer than what is believed of it.
    trim: bool,
}

/// A record without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    kind: u32,
    crc: u32,
    place: u64,
    len: u64,
}

impl Head {
    fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.crc.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.place.to_le_bytes());
        bytes[16..].copy_from_slice(&self.len.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEAD]) -> Self {
        let word = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u32::from_le_bytes(*b))
        };
        let long = |at: usize| {
            bytes[at..]
                .first_chunk()
                .map_or(0, |b| u64::from_le_bytes(*b))
        };
        Self {
            kind: word(0),
            crc: word(4),
            place: long(8),
            len: long(16),
        }
    }

    fn checksum(&self, bytes: &[u8]) -> u32 {
        let bare = Self { crc: 0, ..*self };
        crc32c::crc32c_append(crc32c::crc32c(&bare.encode()), bytes)
    }

    /// The kind, late or not.
    fn what(&self) -> u32 {
        self.kind & !LATE
    }

    fn bytes_len(&self) -> u64 {
        if self.what() == BYTES { self.len } else { 0 }
    }
}

impl Journal {
    /// Starts a journal in a new file.
    pub fn create(directory: &dyn Directory, name: &str) -> Result<Self> {
        let file = directory.create_new(name)?;
        file.write_at(FileOffset::ZERO, &MAGIC)?;
        Ok(Self {
            file,
            end: FileOffset::new(len_u64(MAGIC.len())),
            records: 0,
            covered: BTreeMap::new(),
            has_len: false,
            trim: false,
        })
    }

    /// Goes on with a journal of a change that was interrupted. What was not sealed is dropped with
    /// the first record that is added, and so is the note that the change was complete.
    pub fn resume(file: SharedStorage) -> Result<Self> {
        let sealed = Sealed::read(&*file)?;
        let mut journal = Self {
            end: sealed.end,
            records: len_u64(sealed.places.len()),
            covered: BTreeMap::new(),
            has_len: false,
            trim: true,
            file,
        };
        for place in &sealed.places {
            let head = read_head(&*journal.file, *place)?;
            match head.what() {
                LENGTH => journal.has_len = true,
                WATCH => {}
                _ => journal.cover(head.place..head.place.saturating_add(head.len)),
            }
        }
        Ok(journal)
    }

    /// Notes that a range is recorded, which was not.
    fn cover(&mut self, range: Range<u64>) {
        let before = self.covered.range(..=range.start).next_back();
        match before {
            Some((start, end)) if *end >= range.start => {
                let (start, end) = (*start, (*end).max(range.end));
                self.covered.insert(start, end);
            }
            _ => {
                self.covered.insert(range.start, range.end);
            }
        }
    }

    /// The first part of a range that is not recorded.
    fn uncovered(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let mut start = range.start;
        while let Some((_, end)) = self.covered.range(..=start).next_back() {
            if *end <= start {
                break;
            }
            start = *end;
        }
        let next = self.covered.range(start..).next();
        let end = next.map_or(range.end, |(next, _)| (*next).min(range.end));
        (start < end).then_some(start..end)
    }

    /// Bytes written so far.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.get()
    }

    /// True before the first record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    fn write(&mut self, kind: u32, place: u64, len: u64, bytes: &[u8]) -> Result<()> {
        let mut head = Head {
            kind,
            crc: 0,
            place,
            len,
        };
        head.crc = head.checksum(bytes);
        if self.trim {
            self.file.set_len(self.end)?;
            self.trim = false;
        }
        self.file.write_at(self.end, &head.encode())?;
        let at = self.end.saturating_add(len_u64(HEAD));
        self.file.write_at(at, bytes)?;
        self.end = at.saturating_add(len_u64(bytes.len()));
        self.records += u64::from(matches!(head.what(), BYTES | ZEROS | LENGTH | WATCH));
        Ok(())
    }

    /// Records the length of the file.
    pub fn record_len(&mut self, len: FileOffset) -> Result<()> {
        if self.has_len {
            return Ok(());
        }
        self.has_len = true;
        self.write(LENGTH, 0, len.get(), &[])
    }

    /// Records a range of the file as it is now. What lies past its end is not recorded: an undo
    /// restores the length.
    pub fn record(&mut self, file: &dyn Storage, range: Range<FileOffset>) -> Result<()> {
        self.record_as(file, range, 0)
    }

    /// Records a range that the change brings into use: an undo gives its old bytes back only
    /// after the frame's part of the file, when nothing names it any more.
    pub fn record_late(&mut self, file: &dyn Storage, range: Range<FileOffset>) -> Result<()> {
        self.record_as(file, range, LATE)
    }

    /// Notes a range that is not changed, and that must be the same for an undo.
    pub fn watch(&mut self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(RECORD_MAX);
            self.write(WATCH, at, len, &[])?;
            at += len;
        }
        Ok(())
    }

    fn record_as(&mut self, file: &dyn Storage, range: Range<FileOffset>, late: u32) -> Result<()> {
        let mut rest = range.start.get()..range.end.get().min(file.len()?.get());
        let mut buffer = Vec::new();
        while let Some(part) = self.uncovered(&rest) {
            let (at, len) = (part.start, (part.end - part.start).min(RECORD_MAX));
            let is_hole = is_hole(file, FileOffset::new(at), len)?;
            if !is_hole {
                buffer.resize(usize::try_from(len).unwrap_or(0), 0);
                file.read_at(FileOffset::new(at), &mut buffer)?;
            }
            if is_hole || buffer.iter().all(|byte| *byte == 0) {
                self.write(ZEROS | late, at, len, &[])?;
            } else {
                self.write(BYTES | late, at, len, &buffer)?;
            }
            self.cover(at..at + len);
            rest.start = at + len;
        }
        Ok(())
    }

    /// Notes what the file holds from byte 64 to `end`, but for what is recorded.
    pub fn frame(&mut self, file: &dyn Storage, end: u64) -> Result<()> {
        let end = end.min(file.len()?.get()).min(FRAME_MAX);
        let crc = frame(&*self.file, self.end.get(), file, end)?;
        self.write(FRAME, end, crc.into(), &[])
    }

    /// Makes all records durable, the file's name too (step 2).
    pub fn seal(&mut self, directory: &dyn Directory) -> Result<()> {
        self.write(SEAL, self.records, 0, &[])?;
        if !planted(Bug::UndoFileNotSynced) {
            self.file.sync_data()?;
        }
        if planted(Bug::UndoFileNameNotSynced) {
            return Ok(());
        }
        directory.sync()
    }

    /// Says that the change is complete, if that was not said yet.
    pub fn conclude(&mut self, file: &dyn Storage) -> Result<()> {
        if inspect(&*self.file, file)?.as_left {
            return Ok(());
        }
        self.complete(file, None)
    }

    /// Says that the change is complete, and what the file holds by now, but for its first bytes
    /// where they have yet to be written.
    pub fn complete(&mut self, file: &dyn Storage, first: Option<[u8; 64]>) -> Result<()> {
        let sealed = Sealed::read(&*self.file)?;
        let now = u64::from(sealed.checksum(&*self.file, file, None)?);
        let then = match first {
            Some(_) => u64::from(sealed.checksum(&*self.file, file, first)?),
            None => now,
        };
        self.write(COMPLETE, file.len()?.get(), then | now << 32, &[])?;
        self.file.sync_data()
    }
}

/// What a sound journal holds, without the bytes.
#[derive(Debug)]
struct Sealed {
    /// Where each record begins, the oldest first.
    places: Vec<u64>,
    /// End of the last seal.
    end: FileOffset,
    /// Length and checksums that the change left.
    complete: Option<(u64, u64)>,
    /// End of that, or of the seal: what the beginning of an undo is written behind.
    tail: FileOffset,
    /// An undo has begun.
    undoing: bool,
    /// End and checksum of the last frame.
    frame: Option<(u64, u64)>,
}

fn unsound(why: &str) -> Error {
    Error::why(
        ErrorKind::NotAnImage,
        format!("not a sound undo file: {why}"),
    )
}

fn read_head(file: &dyn Storage, at: u64) -> Result<Head> {
    let mut bytes = [0; HEAD];
    file.read_at(FileOffset::new(at), &mut bytes)?;
    Ok(Head::decode(&bytes))
}

fn read_record(file: &dyn Storage, at: u64, len: u64, bytes: &mut Vec<u8>) -> Result<Option<Head>> {
    let from = at.saturating_add(len_u64(HEAD));
    if from > len {
        return Ok(None);
    }
    let head = read_head(file, at)?;
    let follows = head.bytes_len();
    if follows > RECORD_MAX || from.saturating_add(follows) > len {
        return Ok(None);
    }
    bytes.resize(len_usize(follows).unwrap_or(0), 0);
    file.read_at(FileOffset::new(from), bytes)?;
    Ok((head.checksum(bytes) == head.crc).then_some(head))
}

impl Sealed {
    fn read(file: &dyn Storage) -> Result<Self> {
        let len = file.len()?.get();
        let mut magic = [0; MAGIC.len()];
        if len < len_u64(MAGIC.len()) {
            return Err(unsound("it is too short"));
        }
        file.read_at(FileOffset::ZERO, &mut magic)?;
        if magic != MAGIC {
            return Err(unsound("another magic"));
        }
        let (mut at, mut places, mut bytes) = (len_u64(MAGIC.len()), Vec::new(), Vec::new());
        let (mut sealed, mut complete, mut frame) = (None, None, None);
        let (mut tail, mut undoing) = (0, false);
        while let Some(head) = read_record(file, at, len, &mut bytes)? {
            let end = at + len_u64(HEAD) + head.bytes_len();
            match head.what() {
                BYTES | ZEROS | LENGTH | WATCH => places.push(at),
                FRAME => frame = Some((head.place, head.len)),
                SEAL if head.place == len_u64(places.len()) => {
                    sealed = Some((places.len(), end, frame));
                    (complete, tail, undoing) = (None, end, false);
                }
                COMPLETE => (complete, tail) = (Some((head.place, head.len)), end),
                UNDOING => undoing = true,
                _ => break,
            }
            at = end;
        }
        let (count, end, frame) = sealed.ok_or_else(|| unsound("it has no seal"))?;
        places.truncate(count);
        let end = FileOffset::new(end);
        Ok(Self {
            places,
            end,
            complete,
            tail: FileOffset::new(tail),
            undoing,
            frame,
        })
    }

    /// CRC-32C of what the file holds in all recorded and watched ranges, and behind its old end.
    fn checksum(
        &self,
        journal: &dyn Storage,
        file: &dyn Storage,
        first: Option<[u8; 64]>,
    ) -> Result<u32> {
        let (mut crc, mut bytes) = (0, Vec::new());
        let file_len = file.len()?.get();
        for place in &self.places {
            let head = read_head(journal, *place)?;
            let (mut at, end) = match head.what() {
                LENGTH => (head.len, file_len),
                _ => (head.place, head.place.saturating_add(head.len)),
            };
            let end = end.min(file_len);
            if let (Some(first), 0) = (first, at) {
                at = end.min(FRAME_START);
                fold_block(
                    &mut crc,
                    0,
                    &first[..len_usize(at).unwrap_or(0).min(first.len())],
                );
            }
            fold(&mut crc, file, at..end, &mut bytes)?;
        }
        Ok(crc)
    }
}

/// True where the host stores the range as a hole.
fn is_hole(file: &dyn Storage, at: FileOffset, len: u64) -> Result<bool> {
    let data = file.next_data(at)?;
    Ok(data.is_none_or(|data| data.start >= at.saturating_add(len)))
}

/// True for a file that begins like a journal.
pub fn is_journal(file: &dyn Storage) -> bool {
    let mut magic = [0; MAGIC.len()];
    file.read_at(FileOffset::ZERO, &mut magic).is_ok() && magic == MAGIC
}

/// What an undo gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undo {
    /// Records.
    pub records: u64,
    /// Length that the file gets.
    pub len: Option<FileOffset>,
    /// The first bytes of the file as they were, where they were recorded.
    pub first: Option<[u8; 64]>,
    /// The change was complete, and no undo has begun.
    pub complete: bool,
    /// The change was complete, and the file is what it left.
    pub as_left: bool,
    /// The change was complete but for its last step, and the file is what it was before that.
    pub as_left_last: bool,
    /// All that is recorded is still as it was.
    pub untouched: bool,
    /// What the change leaves alone is still as it was.
    pub frame_holds: bool,
}

/// True where an undo with this journal has begun; an error where nothing was sealed.
pub fn is_undoing(journal: &dyn Storage) -> Result<bool> {
    Ok(Sealed::read(journal)?.undoing)
}

/// Reads what an undo would give back, and checks every record.
pub fn inspect(journal: &dyn Storage, file: &dyn Storage) -> Result<Undo> {
    let sealed = Sealed::read(journal)?;
    let (as_left, as_left_last) = match sealed.complete {
        Some((len, crc)) if len == file.len()?.get() => {
            let now = u64::from(sealed.checksum(journal, file, None)?);
            (now == crc & u64::from(u32::MAX), now == crc >> 32)
        }
        _ => (false, false),
    };
    let mut undo = Undo {
        records: len_u64(sealed.places.len()),
        len: None,
        first: None,
        complete: sealed.complete.is_some() && !sealed.undoing,
        as_left,
        as_left_last,
        untouched: true,
        frame_holds: match sealed.frame {
            None => true,
            Some((end, crc)) => crc == u64::from(frame(journal, sealed.end.get(), file, end)?),
        },
    };
    let file_len = file.len()?;
    let mut now = Vec::new();
    let mut bytes = Vec::new();
    for place in sealed.places.iter().rev() {
        let head = read_record(journal, *place, sealed.end.get(), &mut bytes)?
            .ok_or_else(|| unsound("a record has changed"))?;
        match head.what() {
            LENGTH => {
                undo.len = Some(FileOffset::new(head.len));
                continue;
            }
            WATCH => continue,
            BYTES if head.place == 0 => undo.first = bytes.first_chunk().copied(),
            _ => {}
        }
        if undo.untouched {
            let at = FileOffset::new(head.place);
            let end = at.saturating_add(head.len);
            undo.untouched = end <= file_len && head.len <= RECORD_MAX && {
                let is_zero = head.what() == ZEROS && is_hole(file, at, head.len)?;
                is_zero || {
                    bytes.resize(len_usize(head.len).unwrap_or(0), 0);
                    now.resize(bytes.len(), 0);
                    file.read_at(at, &mut now)?;
                    now == bytes
                }
            };
        }
    }
    undo.untouched &= undo.len.is_none_or(|len| len == file_len);
    Ok(undo)
}

#[cfg(test)]
mod tests;
