//! Goes through a log and cuts the power after every operation.
//!
//! Whatever is left ([`super::media`]), the disk must open from it, show in every sector something
//! that the model allows, and close; and a file without its in-use mark must be one that was
//! closed.

use crate::forge::content::splitmix;
use crate::sim::directory::Names;
use crate::sim::kinds::DiskKind;
use crate::sim::media::Media;
use crate::sim::model::{Model, SECTOR};
use crate::sim::storage::{Event, Manners, World};
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy, Resources};
use ploopfs::units::DiskOffset;
use std::collections::HashMap;
use std::sync::Arc;

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
        if media.is_wrongly_unmarked(top, &files[top]) {
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
