//! Goes through a log and cuts the power after every operation.
//!
//! At each moment the medium has of each file what its last sync made durable, and of what was done
//! since any part: each operation, and each sector of a write, is kept or lost by itself. Whatever
//! it is, the disk must open from it, show in every sector something that the model allows, and
//! close; and a file without its in-use mark must be one that was closed.

use crate::forge::content::splitmix;
use crate::sim::directory::{NameChange, Names};
use crate::sim::kinds::DiskKind;
use crate::sim::model::{Model, SECTOR};
use crate::sim::storage::{Change, Event, Manners, World};
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy, Resources};
use ploopfs::units::DiskOffset;
use std::collections::HashMap;
use std::sync::Arc;

/// Where the in-use mark is in a header.
const MARK: std::ops::Range<usize> = 0x2c..0x30;
const HEADER_LEN: usize = 64;

/// One file on the medium.
#[derive(Clone, Debug)]
struct Medium {
    durable: Vec<u8>,
    /// What reads see.
    cached: Vec<u8>,
    pending: Vec<Change>,
    /// Contents without the header that it may have while the mark is not set: those that it had
    /// when it was last closed, and will have when it is closed the next time.
    closed: [Option<Vec<u8>>; 2],
}

impl Medium {
    fn new(bytes: &[u8]) -> Self {
        Self {
            durable: bytes.to_vec(),
            cached: bytes.to_vec(),
            pending: Vec::new(),
            closed: [
                Some(bytes.get(HEADER_LEN..).unwrap_or_default().to_vec()),
                None,
            ],
        }
    }

    fn change(&mut self, change: &Change) {
        if let Change::Write(0, data) = change {
            let unmarks = data.len() == HEADER_LEN && data[MARK] == [0; 4];
            if unmarks {
                let now = self.cached[HEADER_LEN..].to_vec();
                self.closed[1] = Some(now);
            }
        }
        change.apply(&mut self.cached, &mut || true);
        self.pending.push(change.clone());
    }

    fn sync(&mut self) {
        // Not what reads see: what an earlier sync has lost stays lost.
        for change in self.pending.drain(..) {
            change.apply(&mut self.durable, &mut || true);
        }
        if self.durable.get(MARK) == Some(&[0; 4]) && self.closed[1].is_some() {
            self.closed = [self.closed[1].take(), None];
        }
    }

    /// What reads see when nothing comes from the host's cache that is not yet to be written.
    fn uncached(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for change in &self.pending {
            change.apply(&mut bytes, &mut || true);
        }
        bytes
    }

    fn after_cut(&self, dice: &mut u64) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        // All kept, none kept, and everything between.
        let bias = splitmix(dice) % 5;
        for change in &self.pending {
            change.apply(&mut bytes, &mut || splitmix(dice) % 4 < bias);
        }
        bytes
    }

    /// A file without its mark must be as some close left it, or was about to.
    fn is_wrongly_unmarked(&self, bytes: &[u8]) -> bool {
        bytes.get(MARK) == Some(&[0; 4])
            && !self
                .closed
                .iter()
                .flatten()
                .any(|closed| *closed == bytes[HEADER_LEN..])
    }
}

/// All files as a log leaves them.
#[derive(Debug)]
pub(crate) struct Media {
    files: Vec<Medium>,
    names: Names,
    pending_names: Vec<NameChange>,
}

impl Media {
    /// Files with these contents, and names for them.
    pub(crate) fn new(files: &[Vec<u8>], names: Names) -> Self {
        Self {
            files: files.iter().map(|bytes| Medium::new(bytes)).collect(),
            names,
            pending_names: Vec::new(),
        }
    }

    /// What a power cut now leaves.
    pub(crate) fn after_cut(&self, dice: &mut u64) -> (Vec<Vec<u8>>, Names) {
        let mut names = self.names.clone();
        let bias = splitmix(dice) % 5;
        for change in &self.pending_names {
            if splitmix(dice) % 4 < bias {
                change.apply(&mut names);
            }
        }
        let files = self.files.iter().map(|medium| medium.after_cut(dice));
        (files.collect(), names)
    }

    /// Takes one event in. True when it changed what a power cut could leave.
    pub(crate) fn take(&mut self, event: &Event) -> bool {
        match event {
            Event::Changed { file, change } => self.files[*file].change(change),
            Event::Synced { file } => self.files[*file].sync(),
            // The host gives up what it could not write, and calls it clean.
            Event::SyncFailed { file } => self.files[*file].pending.clear(),
            Event::CacheDropped { file } => self.files[*file].cached = self.files[*file].uncached(),
            Event::Cut { files } => {
                for (medium, bytes) in self.files.iter_mut().zip(files) {
                    let closed = medium.closed.clone();
                    *medium = Medium::new(bytes);
                    if bytes.get(MARK) != Some(&[0; 4]) {
                        medium.closed = closed;
                    }
                }
            }
            Event::Named { change } => {
                if let NameChange::Create(..) = change {
                    self.files.push(Medium::new(&[]));
                }
                self.pending_names.push(change.clone());
            }
            Event::NamesSynced => {
                for change in self.pending_names.drain(..) {
                    change.apply(&mut self.names);
                }
            }
            _ => return false,
        }
        true
    }
}

/// A file as the medium has it, with all that is still to be written there.
pub(crate) fn uncached(log: &[Event], files: &[Vec<u8>], file: usize) -> Vec<u8> {
    let mut media = Media::new(files, Names::new());
    for event in log {
        media.take(event);
    }
    media.files[file].uncached()
}

/// The files as a power cut at the end of the log leaves them.
pub(crate) fn after_cut(log: &[Event], files: &[Vec<u8>], dice: &mut u64) -> Vec<Vec<u8>> {
    let mut media = Media::new(files, Names::new());
    for event in log {
        media.take(event);
    }
    media.after_cut(dice).0
}

/// What a replay found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) states: u64,
    pub(crate) complaints: Vec<String>,
}

impl Found {
    /// Adds what another replay found.
    pub(crate) fn add(&mut self, other: Self) {
        self.states += other.states;
        self.complaints.extend(other.complaints);
    }
}

/// How often the power is cut.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cuts {
    /// States tried at one moment.
    pub(crate) states: u64,
    /// Moments before this position in the log are passed over.
    pub(crate) from: usize,
    /// And of those after it, all but every so many.
    pub(crate) every: usize,
}

/// Cuts the power at the moments of a log, and judges what is left.
pub(crate) fn replay(
    kind: &DiskKind,
    log: &[Event],
    cuts: Cuts,
    seed: u64,
    resources: &Resources,
) -> Found {
    let mut found = Found::default();
    let mut dice = seed;
    let mut media = Media::new(&kind.files(), Names::new());
    let mut model: Option<Model> = None;
    let mut writes = HashMap::new();
    let mut flushes = HashMap::new();
    let mut moments = 0;
    for (now, event) in log.iter().enumerate() {
        let time = now as u64;
        match (event, model.as_mut()) {
            (Event::Opened { shows }, old) => {
                if let Some(why) = old.and_then(|old| old.wrong(shows)) {
                    found.complaints.push(format!("event {now}: opened: {why}"));
                }
                model = Some(Model::new(Arc::clone(shows)));
            }
            (Event::Issued { id, sectors, stamp }, Some(model)) => {
                model.issue(*id, sectors.clone(), *stamp, time);
                writes.insert(*id, sectors.clone());
            }
            (Event::Ended { id, ok }, Some(model)) => {
                let sectors = writes.remove(id).expect("it was issued");
                model.end(*id, sectors, *ok, time);
            }
            (Event::FlushBegan { flush }, _) => {
                flushes.insert(*flush, time);
            }
            (Event::FlushDone { flush }, Some(model)) => model.durable(flushes[flush]),
            _ => {}
        }
        if !media.take(event) || now < cuts.from {
            continue;
        }
        moments += 1;
        if moments % cuts.every != 0 && now + 1 != log.len() {
            continue;
        }
        let mut last = None;
        for _ in 0..cuts.states {
            let (files, _) = media.after_cut(&mut dice);
            if last.as_ref() == Some(&files) {
                continue;
            }
            last = Some(files.clone());
            judge(
                kind,
                &media,
                files,
                model.as_ref(),
                &mut dice,
                resources,
                &mut found,
            )
            .unwrap_or_else(|why| found.complaints.push(format!("event {now}: cut: {why}")));
        }
        if found.complaints.len() > 3 {
            break;
        }
    }
    found
}

fn judge(
    kind: &DiskKind,
    media: &Media,
    files: Vec<Vec<u8>>,
    model: Option<&Model>,
    dice: &mut u64,
    resources: &Resources,
    found: &mut Found,
) -> Result<(), String> {
    found.states += 1;
    for top in kind.tops() {
        if media.files[top].is_wrongly_unmarked(&files[top]) {
            return Err("changed, and not marked as in use".to_owned());
        }
    }
    let world = World::new(files, Manners::default(), false);
    let options = DiskOptions {
        bat_cache: 1 << 20,
        grow_step: 1,
        enospc: EnospcPolicy::Fail,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    };
    let opened = disk::open_with(kind.open(&world), &options, resources.clone());
    let (disk, _) = opened.map_err(|error| format!("cannot be opened: {error}"))?;
    let Some(model) = model else {
        let closed = disk.close();
        return closed.map_err(|error| format!("cannot be closed: {error}"));
    };
    let mut bytes = vec![0; model.bytes()];
    disk.read_at(DiskOffset::ZERO, &mut bytes)
        .map_err(|error| format!("cannot be read: {error}"))?;
    model.wrong(&bytes).map_or(Ok(()), Err)?;
    let goes_on = splitmix(dice) % 8 == 0;
    if goes_on {
        write_on(&disk, &mut bytes, dice).map_err(|error| format!("cannot be written: {error}"))?;
    }
    disk.close()
        .map_err(|error| format!("cannot be closed: {error}"))?;
    if goes_on {
        let opened = disk::open_with(kind.open(&world), &options, resources.clone());
        let (disk, _) = opened.map_err(|error| format!("cannot be opened again: {error}"))?;
        let mut found = vec![0; bytes.len()];
        disk.read_at(DiskOffset::ZERO, &mut found)
            .map_err(|error| format!("cannot be read again: {error}"))?;
        if found != bytes {
            return Err("shows something else after writes and a close".to_owned());
        }
    }
    Ok(())
}

/// Writes a few sectors here and there, so that clusters get a place.
fn write_on(disk: &Disk, bytes: &mut [u8], dice: &mut u64) -> ploopfs::error::Result<()> {
    for turn in 0..4 {
        let sector = splitmix(dice) % (bytes.len() as u64 / SECTOR);
        let at = (sector * SECTOR) as usize;
        let data = [0xa0 + turn; SECTOR as usize];
        disk.write_at(DiskOffset::new(sector * SECTOR), &data)?;
        bytes[at..at + SECTOR as usize].copy_from_slice(&data);
    }
    Ok(())
}
