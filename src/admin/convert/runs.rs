//! The ranges of a source that have to be read, in the order of the disk.

use crate::admin::source::{Extent, Extents, Ranges, Source, What};
use crate::error::Result;
use crate::units::{ClusterSize, DiskOffset};
use std::iter::Peekable;
use std::ops::Range;

/// Data that may have holes of the host in it is asked about from here on; below, reading zeros
/// costs less than the question.
const LONG: u64 = 16 << 20;

/// Ranges that may have something else than zeros, none longer than asked for. What cannot be read
/// is among them, so that reading it fails.
pub(super) struct Runs<'a> {
    source: &'a dyn Source,
    extents: Peekable<Extents<'a>>,
    /// Data that is known to be long, as far as it has not been looked at, and what is looked at.
    long: Range<u64>,
    within: Option<Ranges<'a>>,
    /// Data that is given piece by piece.
    piece: Range<u64>,
    most: u64,
}

fn is_data(extent: &Extent) -> bool {
    matches!(extent.what, What::Data | What::Bad)
}

impl<'a> Runs<'a> {
    pub(super) fn new(source: &'a dyn Source, most: u64) -> Self {
        Self {
            source,
            extents: source.extents(DiskOffset::ZERO).peekable(),
            long: 0..0,
            within: None,
            piece: 0..0,
            most,
        }
    }

    /// The next run of extents with data, and whether it is to be asked about.
    fn advance(&mut self) -> Result<bool> {
        if !self.long.is_empty() {
            let (source, start) = (self.source, DiskOffset::new(self.long.start));
            let within = self.within.get_or_insert_with(|| source.data(start));
            let found = within.next().transpose()?;
            let found = found.map(|range| range.start.get()..range.end.get());
            let found = found.filter(|range| range.start < self.long.end);
            self.piece = match found {
                Some(range) => range.start..range.end.min(self.long.end),
                None => self.long.end..self.long.end,
            };
            self.long.start = self.piece.end;
            return Ok(true);
        }
        let mut run: Option<Range<u64>> = None;
        while let Some(extent) = self
            .extents
            .next_if(|next| run.is_none() || next.as_ref().is_ok_and(is_data))
        {
            let extent = extent?;
            let range = extent.range.start.get()..extent.range.end.get();
            match &mut run {
                Some(run) => run.end = range.end,
                None if is_data(&extent) => run = Some(range),
                None => {}
            }
        }
        let Some(run) = run else {
            return Ok(false);
        };
        if run.end - run.start >= LONG {
            self.long = run;
            self.within = None;
        } else {
            self.piece = run;
        }
        Ok(true)
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.piece.is_empty() {
            match self.advance() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(e) => return Some(Err(e)),
            }
        }
        let end = self
            .piece
            .end
            .min(self.piece.start.saturating_add(self.most));
        let piece = self.piece.start..end;
        self.piece.start = end;
        Some(Ok(piece))
    }
}

/// The cells of a disk, cut into these units, that may have something else than zeros.
pub(super) fn cells(
    source: &dyn Source,
    unit: ClusterSize,
) -> impl Iterator<Item = Result<u64>> + '_ {
    let mut runs = Runs::new(source, u64::MAX);
    let mut left = 0..0_u64;
    std::iter::from_fn(move || {
        while left.is_empty() {
            let run = match runs.next()? {
                Ok(run) => run,
                Err(e) => return Some(Err(e)),
            };
            let first = run.start / unit.bytes();
            // The end of a run and the start of the next may be in one cell.
            left = first.max(left.end)..run.end.div_ceil(unit.bytes());
        }
        left.next().map(Ok)
    })
}
