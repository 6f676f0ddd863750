//! The undo file of a repair: where it is, what its name says, and how it is used.
//!
//! While a repair runs it is `IMAGE.repair`; when the image is mended it becomes `IMAGE.undo`, or
//! `IMAGE.undo.2` and so on where there is one already. An undo gives it the first name back before
//! it changes anything. A file of that name is therefore of a repair or an undo that was
//! interrupted: nobody may write to the image until it is ended. The next repair goes on with it,
//! so that it still holds what the image was before the first.

use super::{KeepOld, is_clean};
use crate::admin::check::check_image;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{HEADER_LEN, IN_USE, RawHeader};
use crate::journal::{self, Journal, RUNNING};
use crate::planted::{Bug, planted};
use crate::storage::{Directory, SharedStorage, Storage};
use crate::units::{FileOffset, len_u64};
use std::ops::Range;

const DONE: &str = ".undo";
/// Undo files of one image that are kept.
const DONE_MAX: u32 = 1000;

/// What a file beside an image is to it, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saved {
    /// The undo file of a repair that was interrupted.
    Interrupted,
    /// The undo file of a repair.
    Complete,
}

/// The image that a file beside it belongs to by its name, and what it is to that.
#[must_use]
pub fn saved_of(name: &str) -> Option<(&str, Saved)> {
    if let Some(image) = name.strip_suffix(RUNNING) {
        return Some((image, Saved::Interrupted));
    }
    let unnumbered = match name.rsplit_once('.') {
        Some((start, digits)) if digits.parse::<u32>().is_ok() => start,
        _ => name,
    };
    let image = unnumbered.strip_suffix(DONE)?;
    Some((image, Saved::Complete))
}

/// The undo files of an image among the names of its directory.
#[must_use]
pub fn saved_names<'a>(image: &str, names: &'a [String]) -> Vec<(&'a str, Saved)> {
    let kind = |name: &'a String| match saved_of(name) {
        Some((of, saved)) if of == image => Some((name.as_str(), saved)),
        _ => None,
    };
    names.iter().filter_map(kind).collect()
}

/// The undo file of a repair that begins or goes on.
pub(super) struct Begun {
    pub(super) journal: Option<Journal>,
    /// It holds what an interrupted repair has saved, so it must not go.
    resumed: bool,
}

impl Begun {
    pub(super) fn is_resumed(&self) -> bool {
        self.resumed
    }
}

/// True beside what an interrupted repair or undo has left.
pub(super) fn is_begun(keep: KeepOld<'_>) -> Result<bool> {
    match keep {
        KeepOld::In { directory, image } => {
            Ok(directory.entries()?.contains(&format!("{image}{RUNNING}")))
        }
        KeepOld::Nowhere => Ok(false),
    }
}

/// Opens an undo file as the medium has it: after a failed sync the host's cache may hold more.
fn open_saved(directory: &dyn Directory, name: &str) -> Result<SharedStorage> {
    let file = directory.open(name, true)?;
    if !planted(Bug::UndoCacheBelieved) {
        if let Err(error) = file.drop_cache() {
            log::debug!("the host's cache of {name} stays: {error}");
        }
    }
    Ok(file)
}

/// Starts the undo file, or goes on with that of a repair that was interrupted. None where nothing
/// will change and nothing was interrupted.
pub(super) fn begin(storage: &dyn Storage, keep: KeepOld<'_>, needed: bool) -> Result<Begun> {
    let mut begun = Begun {
        journal: None,
        resumed: false,
    };
    let KeepOld::In { directory, image } = keep else {
        return Ok(begun);
    };
    let name = format!("{image}{RUNNING}");
    if directory.entries()?.contains(&name) {
        let file = open_saved(directory, &name)?;
        match Journal::resume(file.clone()) {
            Ok(journal) if belongs(storage, &*file, true)? => {
                begun.journal = Some(journal);
                begun.resumed = true;
                return Ok(begun);
            }
            // Somebody has written to the image since: it can neither be undone nor gone on with.
            Ok(_) => {
                finish(true, keep)?;
            }
            // It was cut short before its seal was durable, so nothing was changed on its account.
            Err(e) if e.kind() == ErrorKind::NotAnImage && is_unfinished(&*file)? => {
                drop(file);
                directory.remove(&name)?;
                directory.sync()?;
            }
            Err(e) if e.kind() == ErrorKind::NotAnImage => {
                let why = format!("{name} is in the way, and it is no undo file");
                return Err(Error::why(ErrorKind::Usage, why).fix("move it elsewhere first"));
            }
            Err(e) => return Err(e),
        }
    }
    if needed {
        begun.journal = Some(Journal::create(directory, &name)?);
    }
    Ok(begun)
}

/// Removes an undo file that was not sealed, if it can: nothing was changed on its account.
pub(super) fn abandon(begun: &Begun, keep: KeepOld<'_>) {
    if let (KeepOld::In { directory, image }, false, true) =
        (keep, begun.resumed, begun.journal.is_some())
    {
        let removed = directory.remove(&format!("{image}{RUNNING}"));
        if let Err(e) = removed.and_then(|()| directory.sync()) {
            log::debug!("an unfinished undo file stays: {e}");
        }
    }
}

/// True where the image is what the repair of this undo file found or left, or where that repair
/// (or an undo) still runs: nobody else has changed it since.
///
/// The in-use mark tells that one runs only beside an undo file that is not complete, or whose undo
/// has begun, and that has the name of one that runs: whoever writes to a mended image sets the
/// mark too.
fn belongs(storage: &dyn Storage, saved: &dyn Storage, is_running: bool) -> Result<bool> {
    let undo = journal::inspect(saved, storage)?;
    if !undo.frame_holds {
        return Ok(false);
    }
    let as_left = undo.as_left || (is_running && undo.as_left_last);
    let may_run = is_running && !undo.complete;
    let Some(old) = undo.first else {
        // Only space was given back, and nothing was named anew.
        return Ok(may_run || as_left || undo.untouched);
    };
    if storage.len()?.get() < len_u64(HEADER_LEN) {
        return Ok(false);
    }
    let mut now = [0; HEADER_LEN];
    storage.read_at(FileOffset::ZERO, &mut now)?;
    let runs = may_run && RawHeader::decode(&now).in_use == IN_USE;
    Ok(runs || as_left || (now == old && undo.untouched))
}

/// A journal without a seal, or a new file whose first bytes were never written.
fn is_unfinished(file: &dyn Storage) -> Result<bool> {
    let mut bytes = [0; 16];
    let len = usize::try_from(file.len()?.get().min(16)).unwrap_or(16);
    file.read_at(FileOffset::ZERO, &mut bytes[..len])?;
    Ok(bytes == [0; 16] || journal::is_journal(file))
}

/// Gives the undo file its final name, durably.
pub(super) fn finish(written: bool, keep: KeepOld<'_>) -> Result<Option<String>> {
    let (KeepOld::In { directory, image }, true) = (keep, written) else {
        return Ok(None);
    };
    let names = directory.entries()?;
    let mut candidates = std::iter::once(format!("{image}{DONE}"))
        .chain((2..DONE_MAX).map(|number| format!("{image}{DONE}.{number}")));
    let free = candidates.find(|name| !names.contains(name));
    let name = free.ok_or_else(|| {
        let why = format!("the image is mended, and has {DONE_MAX} undo files already");
        let error = Error::why(ErrorKind::Io(libc::EEXIST), why);
        error.fix("remove those that are not wanted, and run the repair again, which then ends")
    })?;
    directory.rename_new(&format!("{image}{RUNNING}"), &name)?;
    if !planted(Bug::LastNameNotSynced) {
        directory.sync()?;
    }
    Ok(Some(name))
}

/// Adds what can be done after a repair that failed half-way.
pub(super) fn advise(error: Error, keep: KeepOld<'_>) -> Error {
    match keep {
        KeepOld::In { image, .. } => error.fix(format!(
            "run the repair again, which goes on where it stopped; or go back to what was: \
             `ploopfs repair --undo {image}{RUNNING} IMAGE`"
        )),
        KeepOld::Nowhere => error,
    }
}

/// Writes old bytes to the undo file, if there is to be one.
pub(super) struct Recorder<'a> {
    journal: Option<&'a mut Journal>,
    storage: &'a dyn Storage,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(journal: Option<&'a mut Journal>, storage: &'a dyn Storage) -> Self {
        Self { journal, storage }
    }

    /// The length of the file.
    pub(super) fn len(&mut self, len: FileOffset) -> Result<()> {
        match &mut self.journal {
            Some(journal) => journal.record_len(len),
            None => Ok(()),
        }
    }

    /// All bytes of a range.
    pub(super) fn range(&mut self, range: Range<u64>) -> Result<()> {
        let range = FileOffset::new(range.start)..FileOffset::new(range.end);
        match &mut self.journal {
            Some(journal) => journal.record(self.storage, range),
            None => Ok(()),
        }
    }

    /// All bytes of a range that the repair brings into use.
    pub(super) fn late(&mut self, range: Range<u64>) -> Result<()> {
        let range = FileOffset::new(range.start)..FileOffset::new(range.end);
        match &mut self.journal {
            Some(journal) => journal.record_late(self.storage, range),
            None => Ok(()),
        }
    }

    /// Notes a range that an undo relies on.
    pub(super) fn watch(&mut self, range: Range<u64>) -> Result<()> {
        match &mut self.journal {
            Some(journal) => journal.watch(range),
            None => Ok(()),
        }
    }

    /// The bytes of a range that are no hole of the file.
    pub(super) fn data(&mut self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end && self.journal.is_some() {
            let Some(data) = self.storage.next_data(FileOffset::new(at))? else {
                break;
            };
            let end = data.end.get().min(range.end);
            self.range(at.max(data.start.get())..end)?;
            at = data.end.get().max(at + 1);
        }
        Ok(())
    }
}

/// Makes the undo file durable, with a note of the table's other bytes up to `end`.
pub(super) fn seal(
    storage: &dyn Storage,
    journal: Option<&mut Journal>,
    keep: KeepOld<'_>,
    end: u64,
) -> Result<()> {
    match (journal, keep) {
        (Some(journal), KeepOld::In { directory, .. }) => {
            journal.frame(storage, end)?;
            journal.seal(directory)
        }
        _ => Ok(()),
    }
}

/// The name that an undo file has while the repair or the undo runs.
fn running_name(file: &str) -> String {
    let image = file.strip_suffix(RUNNING);
    let image = image.or_else(|| file.rfind(DONE).and_then(|end| file.get(..end)));
    format!("{}{RUNNING}", image.unwrap_or(file))
}

/// Gives an image back what a repair changed, and removes the undo file. The caller has the image
/// locked. The order: the undo file's name, and its note that an undo runs, so that nobody takes
/// the image for a mended one; the in-use mark, so that an image that is neither old nor new never
/// passes for a closed one; the old bytes and the old length; the old header; the undo file goes.
pub fn undo_image(storage: &dyn Storage, directory: &dyn Directory, file: &str) -> Result<()> {
    undo_image_after(storage, directory, file, &mut || Ok(()))
}

/// The same, where `begin` is called before the first change, which it can still refuse.
pub(super) fn undo_image_after(
    storage: &dyn Storage,
    directory: &dyn Directory,
    file: &str,
    begin: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    storage.sync_data()?;
    let saved = open_saved(directory, file)?;
    let undo = journal::inspect(&*saved, storage)?;
    let running = running_name(file);
    if !planted(Bug::UndoUnverified) && !belongs(storage, &*saved, file == running)? {
        return Err(changed_since(storage));
    }
    if file != running {
        if directory.entries()?.contains(&running) {
            let why = format!("{running} is there: another repair or undo was interrupted");
            return Err(Error::why(ErrorKind::Usage, why).fix(
                "end that first: `ploopfs repair IMAGE`, or `ploopfs repair --undo` with its file",
            ));
        }
        begin()?;
        directory.rename(file, &running)?;
        if !planted(Bug::UndoNameNotSynced) {
            directory.sync()?;
        }
    } else {
        begin()?;
    }
    let advise = |error: Error| {
        error.fix(format!(
            "the image is on its way back, and not to be used: go on with `ploopfs repair --undo \
             {running} IMAGE`"
        ))
    };
    give_back(storage, &*saved, undo.first.is_some()).map_err(advise)?;
    drop(saved);
    directory.remove(&running)?;
    directory.sync()
}

fn give_back(storage: &dyn Storage, saved: &dyn Storage, has_mark: bool) -> Result<()> {
    journal::begin_undo(saved)?;
    if has_mark && !planted(Bug::UndoNotMarked) {
        let mut now = [0; HEADER_LEN];
        storage.read_at(FileOffset::ZERO, &mut now)?;
        let mut raw = RawHeader::decode(&now);
        raw.in_use = IN_USE;
        storage.write_at(FileOffset::ZERO, &raw.encode())?;
        storage.sync_data()?;
    }
    journal::restore(saved, storage)
}

/// Why there is no going back, and what to do instead.
fn changed_since(storage: &dyn Storage) -> Error {
    let why = "the image has been changed since the repair: going back would damage it; nothing \
               was changed";
    let is_clean = check_image(storage).is_ok_and(|checked| is_clean(&checked));
    Error::why(ErrorKind::Corrupt, why).fix(if is_clean {
        "nothing need be done: the image is clean, and the undo file can be removed"
    } else {
        "`ploopfs check IMAGE` tells how the image is, and `ploopfs repair IMAGE` mends it; what \
         was before the first repair is in a backup only"
    })
}
