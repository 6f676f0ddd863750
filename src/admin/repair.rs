//! Mends an image: every state that a kill or a power cut can leave can be mended again, or undone.
//!
//! The order, each step durable before the next begins:
//!
//! 1. Sync the file: what a killed program wrote may be in the host's cache only, and a repair must
//!    not build on what a power cut takes back.
//! 2. Look, and decide. Nothing has been changed.
//! 3. The undo file: the old bytes of all that will change, sealed and synced with its name. A
//!    change made earlier could not be undone after a power cut.
//! 4. The in-use mark, with the header's fields as they should be. Were it set later, an image
//!    mended half-way could pass for a closed one.
//! 5. Invalid entries become 0, and so do slots after the last. Before the file grows: longer, it
//!    might make an entry that points past its end look valid.
//! 6. The file grows to hold every cluster that is named, and the copies that are needed.
//! 7. Clusters of a second owner, or off the borders, are copied to free ones, and synced: an entry
//!    that became durable before its data would show what was there before.
//! 8. Those entries name the copies. The lowest free clusters are taken in disk order, so that a
//!    repair that was cut short here goes on as it would have.
//! 9. What nothing names is punched, and the tail is cut: only now, because until 8 was durable the
//!    old places were still named.
//! 10. The undo file says what the image will be, so that an undo can tell whether somebody has
//!     written to it since. After step 11 that would be too late: a closed image may be used.
//! 11. The in-use mark goes. Earlier, and a power cut could leave a mark that says all is well
//!     before it is.
//! 12. Look again, and give the undo file its final name.

pub mod disk;
mod undo;

pub use undo::{Saved, saved_names, saved_of, undo_image};

use crate::admin::check::{self, Checked, Gathered, Passed, Space};
use crate::admin::progress::Progress;
use crate::delta::classify::{Class, Classifier, Used};
use crate::delta::image::header_error;
use crate::delta::in_use::InUseMark;
use crate::delta::walk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{HEADER_LEN, Header};
use crate::journal::Journal;
use crate::plan::repair::{Facts, Fix, Policy, Refusal, Severity, Trouble, fixes};
use crate::planted::{Bug, planted};
use crate::storage::{Directory, Keep, Storage};
use crate::units::{FileOffset, len_u64};
use std::ops::Range;

/// Bytes that are copied at a time.
const STRIDE: u64 = 1 << 20;

/// Where the old bytes are kept.
#[derive(Clone, Copy, Debug)]
pub enum KeepOld<'a> {
    /// Nowhere: the caller has a copy of the image.
    Nowhere,
    /// In a file beside the image.
    In {
        /// The image's directory.
        directory: &'a dyn Directory,
        /// The image's name in it.
        image: &'a str,
    },
}

/// What a repair would do.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The image as it is.
    pub checked: Checked,
    /// The steps; none for a clean image.
    pub fixes: Vec<Fix>,
}

/// What a repair did.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// The image as it was.
    pub before: Checked,
    /// The steps that were taken.
    pub fixes: Vec<Fix>,
    /// The image as it is now.
    pub after: Checked,
    /// Name of the undo file, where one was written.
    pub undo: Option<String>,
}

/// What the image needs, without changing it.
pub fn plan_image(storage: &dyn Storage, policy: &Policy) -> Result<Planned> {
    plan_image_with(storage, policy, &Progress::default())
}

/// The same, telling how far it is.
pub fn plan_image_with(
    storage: &dyn Storage,
    policy: &Policy,
    progress: &Progress,
) -> Result<Planned> {
    let checked = check::check_image_with(storage, progress)?;
    let fixes = fixes(&checked.facts, *policy).map_err(refused)?;
    Ok(Planned { checked, fixes })
}

fn unguessed(why: &'static str) -> Error {
    Error::why(ErrorKind::Corrupt, why)
        .fix("nothing is guessed, and nothing was changed: it needs the header of a backup")
}

fn refused(refusal: Refusal) -> Error {
    match refusal {
        Refusal::Header(error) => {
            let error = header_error(error);
            match error.kind() {
                ErrorKind::NotAnImage => error,
                _ => error.fix(
                    "what the header should say cannot be told from the rest of the image, so \
                     nothing is guessed: it needs the header of a backup",
                ),
            }
        }
        Refusal::Implausible => unguessed(
            "much of the image makes no sense with the header: its magic, its cluster size or the \
             size of the disk is probably wrong",
        ),
        Refusal::BeforeFirst => unguessed(
            "entries name clusters between the table and the header's first block, and either may \
             be wrong",
        ),
        Refusal::PastDisk => unguessed(
            "the table has entries for clusters behind the end of the disk: its size, or the \
             cluster size, may be wrong",
        ),
        Refusal::ForeignExtension => Error::why(
            ErrorKind::Unsupported,
            "another program's closed mark stands with a format extension that a repair would lose",
        )
        .fix("repair it with the program that wrote it; nothing was changed"),
        Refusal::Extension => Error::why(
            ErrorKind::Unsupported,
            "a section of the format extension that is not known here forbids writing",
        )
        .fix("to give back wasted space only: --leaks-only"),
        Refusal::ReadOnlyKind(error) => header_error(error).fix(
            "images of this kind are only read here, and so they are not repaired; nothing was \
             changed: copy what can be read to a new image",
        ),
        Refusal::LeaksOfCorrupt => Error::why(
            ErrorKind::Corrupt,
            "the image is not sound, and what nothing names may be what it should name",
        )
        .fix("repair it without --leaks-only: the undo file then keeps those bytes"),
    }
}

/// Mends an image and leaves a clean check, or says why it cannot. The caller has it locked.
pub fn repair_image(storage: &dyn Storage, keep: KeepOld<'_>, policy: &Policy) -> Result<Repaired> {
    repair_image_with(storage, keep, policy, &Progress::default())
}

/// The same, telling how far it is. Where it is stopped it has changed nothing, or is to be gone on
/// with or undone.
pub fn repair_image_with(
    storage: &dyn Storage,
    keep: KeepOld<'_>,
    policy: &Policy,
    progress: &Progress,
) -> Result<Repaired> {
    repair_image_after(storage, keep, policy, progress, &mut || Ok(()))
}

/// Steps 1 and 2.
fn look(storage: &dyn Storage, progress: &Progress) -> Result<Gathered> {
    if !planted(Bug::RepairOnUnsynced) {
        storage.sync_data()?;
    }
    let found = check::gather_with(storage, progress)?;
    if !found.checked.report.has(Trouble::InUse.word()) || planted(Bug::RepairBelievesCache) {
        return Ok(found);
    }
    // After a failed sync the host's cache may hold what the medium does not.
    if let Err(error) = storage.drop_cache() {
        log::debug!("the host's cache stays: {error}");
    }
    check::gather_with(storage, progress)
}

/// The same, where `begin` is called before the first change, which it can still refuse.
pub(super) fn repair_image_after(
    storage: &dyn Storage,
    keep: KeepOld<'_>,
    policy: &Policy,
    progress: &Progress,
    begin: &mut dyn FnMut() -> Result<()>,
) -> Result<Repaired> {
    let Gathered { checked, space } = look(storage, progress)?;
    let fixes = fixes(&checked.facts, *policy).map_err(refused)?;
    let copies = copied_bytes(&checked.facts, &fixes);
    let is_begun = undo::is_begun(keep)?;
    if !is_begun {
        check_room(keep, copies)?;
    }
    if is_begun || !fixes.is_empty() {
        begin()?;
    }
    let mut begun = undo::begin(storage, keep, !fixes.is_empty())?;
    if let (Some(space), false) = (space, fixes.is_empty()) {
        let header = checked.facts.normal.as_ref().map(|normal| normal.header);
        let header = header.map_err(|e| header_error(*e))?;
        let mut work = Work {
            storage,
            progress,
            header,
            file_len: FileOffset::new(checked.facts.file_len),
            mapped: checked.facts.table.mapped - checked.facts.table.invalid(),
            space,
            copies,
            fixes: fixes.clone(),
            kept: None,
            end: 0,
        };
        let prepared = work.prepare(begun.journal.as_mut()).and_then(|end| {
            // By now the undo file has taken its part.
            if !begun.is_resumed() {
                check_room(keep, copies)?;
            }
            undo::seal(storage, begun.journal.as_mut(), keep, end)
        });
        if let Err(e) = prepared {
            undo::abandon(&begun, keep);
            return Err(e);
        }
        work.carry_out(begun.journal.as_mut())
            .map_err(|e| undo::advise(e, keep))?;
    }
    let after = check::check_image(storage)?;
    // An interrupted repair is not through where this one found nothing to do and left trouble.
    let is_through = !fixes.is_empty() || is_clean(&after);
    if let (Some(journal), true, true) = (&mut begun.journal, fixes.is_empty(), is_through) {
        journal.conclude(storage)?;
    }
    let undo = undo::finish(begun.journal.is_some() && is_through, keep)?;
    Ok(Repaired {
        before: checked,
        fixes,
        after,
        undo,
    })
}

/// The most bytes that these steps copy.
#[must_use]
pub fn copied_bytes(facts: &Facts, fixes: &[Fix]) -> u64 {
    match &facts.normal {
        Ok(normal) if fixes.contains(&Fix::Copy) => {
            let size = normal.header.layout().cluster().bytes();
            facts.table.to_separate().saturating_mul(size)
        }
        _ => 0,
    }
}

/// Refuses what the host has no room for before anything is written: an image must not be left half
/// mended because a table lets thousands of entries share a cluster.
fn check_room(keep: KeepOld<'_>, copies: u64) -> Result<()> {
    let KeepOld::In { directory, .. } = keep else {
        return Ok(());
    };
    match directory.available()? {
        Some(room) if room < copies => {
            let why = format!("up to {copies} bytes must be copied, and {room} are free");
            Err(Error::why(ErrorKind::Io(libc::ENOSPC), why)
                .fix("make room, or repair a copy where there is more; nothing was changed"))
        }
        _ => Ok(()),
    }
}

/// True where nothing but notes is left.
#[must_use]
pub fn is_clean(checked: &Checked) -> bool {
    checked.report.worst() < Some(Severity::Leak)
}

/// A repair under way.
struct Work<'a> {
    storage: &'a dyn Storage,
    progress: &'a Progress,
    /// As it should be.
    header: Header,
    /// Length of the file as it was found: entries are judged by it throughout.
    file_len: FileOffset,
    /// Entries that are left in the end.
    mapped: u64,
    /// What was taken when the repair began.
    space: Space,
    /// The most bytes that are copied.
    copies: u64,
    fixes: Vec<Fix>,
    /// What is taken when it ends.
    kept: Option<Used>,
    /// End of that, bytes.
    end: u64,
}

/// Hands out the lowest free clusters, in order.
struct Free<'a> {
    space: &'a Space,
    next: u64,
}

impl Free<'_> {
    /// A free cluster and the entry that names it.
    fn take(&mut self) -> Result<(u64, u32)> {
        let is_taken = |n| self.space.named.contains(n) || self.space.touched.contains(n);
        while is_taken(self.next) {
            self.next += 1;
        }
        let number = self.next;
        self.next += 1;
        let full = || {
            let why = "the image has no room for a copy of a cluster that two entries share";
            Error::why(ErrorKind::Unsupported, why)
        };
        let entry = self.space.grid.entry(number).ok_or_else(full)?;
        Ok((number, entry))
    }
}

impl Work<'_> {
    fn has(&self, fix: Fix) -> bool {
        self.fixes.contains(&fix)
    }

    fn free(&self) -> Free<'_> {
        Free {
            space: &self.space,
            next: self.space.first,
        }
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.layout().cluster().bytes()
    }

    /// Walks the table and calls `change` for each piece that `decide` wants to be different, with
    /// the place and the new bytes of the part that differs. `decide` sees entries in disk order,
    /// and slots after the last entry without a class.
    fn rewrite(
        &self,
        mut decide: impl FnMut(u32, Option<Class>) -> Result<u32>,
        mut change: impl FnMut(FileOffset, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let layout = self.header.layout();
        let mut classifier = Classifier::new(layout, self.file_len)?;
        let mut new = Vec::with_capacity(walk::PIECE);
        walk::words(self.storage, check::slots_end(layout), |at, bytes| {
            new.clear();
            check::entries(at, bytes, layout, |cluster, word| {
                let class = match cluster {
                    Some(_) => Some(classifier.class(word)?),
                    None => None,
                };
                new.extend_from_slice(&decide(word, class)?.to_le_bytes());
                Ok(())
            })?;
            let differs = |pair: (&u8, &u8)| pair.0 != pair.1;
            let first = bytes.iter().zip(&new).position(differs);
            let last = bytes.iter().zip(&new).rposition(differs);
            if let (Some(first), Some(last)) = (first, last) {
                // Whole words, so that an entry is never half of one and half of another.
                let part = first & !3..(last | 3) + 1;
                change(at.saturating_add(len_u64(part.start)), &new[part])?;
            }
            Ok(())
        })
    }

    /// Step 3: finds out what will be named in the end, and records all that will change.
    /// Returns the end of the table's part of the file.
    fn prepare(&mut self, journal: Option<&mut Journal>) -> Result<u64> {
        let mut old = undo::Recorder::new(journal, self.storage);
        old.len(self.file_len)?;
        if self.has(Fix::Mark) {
            old.range(0..len_u64(HEADER_LEN))?;
        }
        let mut copies = Used::new(self.space.limit)?;
        let mut end = self.space.named_end;
        let mut free = self.free();
        let (clears, moves) = (self.has(Fix::Clear), self.has(Fix::Copy));
        let decide = |word, class| match class {
            None | Some(Class::Bad(_)) if clears => Ok(0),
            Some(Class::Shared(_) | Class::Misaligned) if moves => {
                let (number, entry) = free.take()?;
                copies.insert(number)?;
                end = end.max(self.space.grid.start(number + 1));
                Ok(entry)
            }
            _ => Ok(word),
        };
        self.rewrite(decide, |at, new| {
            old.range(at.get()..at.get() + len_u64(new.len()))
        })?;
        let grid = self.space.grid;
        copies.for_each(|number| old.late(grid.start(number)..grid.start(number + 1)))?;
        if moves {
            self.watch(&mut old)?;
        }
        if self.has(Fix::Mark) {
            self.space.extension.clear();
        }
        for numbers in &self.space.extension {
            end = end.max(grid.start(numbers.end));
            for number in numbers.clone() {
                copies.insert(number)?;
            }
        }
        self.end = end;
        let mut kept = self.space.named.clone();
        copies.for_each(|number| kept.insert(number).map(|_| ()))?;
        self.kept = Some(kept);
        if self.has(Fix::Punch) {
            self.punched(|range| old.range(range))?;
        }
        if self.has(Fix::Cut) {
            old.data(end..self.file_len.get())?;
        }
        Ok(self.header.layout().data_start().get())
    }

    /// Notes what will be copied: an undo gives up the copies, and so it may only be when what
    /// they were made from is still the same.
    fn watch(&self, old: &mut undo::Recorder<'_>) -> Result<()> {
        let layout = self.header.layout();
        let decide = |word, class| {
            if let Some(Class::Shared(_) | Class::Misaligned) = class {
                let start = layout.entry_start(word).get();
                old.watch(start..start + self.cluster_bytes())?;
            }
            Ok(word)
        };
        self.rewrite(decide, |_, _| Ok(()))
    }

    /// Calls `each` with the bytes of every cluster that nothing names in the end.
    fn punched(&self, mut each: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let kept: Vec<&Used> = self.kept.iter().collect();
        let (grid, end) = (self.space.grid, self.end);
        let first = grid.start(self.space.first);
        let mut passed = Passed::begin(self.progress, "giving space back", first, end);
        check::leaks_with(
            self.storage,
            &self.space,
            &kept,
            end,
            &mut passed,
            |number| each(grid.start(number)..grid.start(number + 1).min(end)),
        )
    }

    /// Steps 4 to 11.
    fn carry_out(&self, mut journal: Option<&mut Journal>) -> Result<()> {
        let storage = self.storage;
        let mut mark = InUseMark::new(*self.header.raw());
        for fix in &self.fixes {
            match fix {
                Fix::Mark => mark.set(storage)?,
                Fix::Clear => self.clear()?,
                Fix::Extend => self.extend()?,
                Fix::Copy => self.copy()?,
                Fix::Repoint => self.repoint()?,
                Fix::Punch => self.punched(|range| {
                    let range = FileOffset::new(range.start)..FileOffset::new(range.end);
                    storage.zero(range, Keep::Nothing)
                })?,
                Fix::Cut => {
                    if storage.len()?.get() > self.end {
                        storage.set_len(FileOffset::new(self.end))?;
                    }
                }
                Fix::Close => {
                    if planted(Bug::ClosedBeforeTold) {
                        mark.clear(storage, self.mapped == 0)?;
                    }
                    let closed = mark.closed(self.mapped == 0).encode();
                    if let Some(journal) = journal.take() {
                        journal.complete(storage, Some(closed))?;
                    }
                    mark.clear(storage, self.mapped == 0)?;
                }
            }
            if !is_left_unsynced(*fix) {
                storage.sync_data()?;
            }
        }
        match journal {
            Some(journal) => journal.complete(storage, None),
            None => Ok(()),
        }
    }

    fn write(&self, at: FileOffset, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(at, bytes)
    }

    fn clear(&self) -> Result<()> {
        let decide = |word, class| match class {
            None | Some(Class::Bad(_)) => Ok(0),
            _ => Ok(word),
        };
        self.rewrite(decide, |at, new| self.write(at, new))
    }

    fn extend(&self) -> Result<()> {
        if self.storage.len()?.get() < self.end {
            self.storage.set_len(FileOffset::new(self.end))?;
        }
        Ok(())
    }

    fn copy(&self) -> Result<()> {
        let mut free = self.free();
        self.progress.step("copying clusters", self.copies);
        let layout = self.header.layout();
        let decide = |word, class| {
            if let Some(Class::Shared(_) | Class::Misaligned) = class {
                let (number, _) = free.take()?;
                self.progress.check()?;
                self.copy_cluster(
                    layout.entry_start(word).get(),
                    self.space.grid.start(number),
                )?;
            }
            Ok(word)
        };
        self.rewrite(decide, |_, _| Ok(()))
    }

    /// Copies one cluster to a place that nothing names, and leaves holes where it is zeros.
    fn copy_cluster(&self, from: u64, to: u64) -> Result<()> {
        let size = self.cluster_bytes();
        let at = FileOffset::new;
        // Behind the old end of the file there is nothing but what it was lengthened by.
        if at(to) < self.file_len {
            self.storage.zero(at(to)..at(to + size), Keep::Nothing)?;
        }
        let mut buffer = vec![0; usize::try_from(size.min(STRIDE)).unwrap_or(0)];
        let mut done = 0;
        while done < size {
            let len = usize::try_from((size - done).min(STRIDE)).unwrap_or(0);
            let piece = &mut buffer[..len];
            self.storage.read_at(at(from + done), piece)?;
            if piece.iter().any(|byte| *byte != 0) {
                self.storage.write_at(at(to + done), piece)?;
            }
            done += len_u64(len);
        }
        self.progress.add(size);
        Ok(())
    }

    fn repoint(&self) -> Result<()> {
        let mut free = self.free();
        let decide = |word, class| match class {
            Some(Class::Shared(_) | Class::Misaligned) => Ok(free.take()?.1),
            _ => Ok(word),
        };
        self.rewrite(decide, |at, new| self.write(at, new))
    }
}

/// A planted bug: the next step begins before this one is durable.
fn is_left_unsynced(fix: Fix) -> bool {
    match fix {
        Fix::Mark => planted(Bug::MarkNotSynced),
        Fix::Clear => planted(Bug::ClearsNotSynced),
        Fix::Copy => planted(Bug::CopiesNotSynced),
        Fix::Repoint => planted(Bug::RepointsNotSynced),
        Fix::Punch | Fix::Cut => planted(Bug::CutsNotSynced),
        Fix::Extend | Fix::Close => false,
    }
}

#[cfg(test)]
mod tests;
