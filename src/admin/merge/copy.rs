//! Copies runs of clusters from one image to another, holes as holes.

use crate::error::Result;
use crate::storage::{Keep, Storage};
use crate::units::FileOffset;

/// Bytes that are copied at a time where the host cannot do it.
const STRIDE: u64 = 1 << 20;
/// The most bytes of a run, so that several threads have work.
const RUN_MAX: u64 = 64 << 20;

/// Bytes that go from one place to another, and zeros behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub level: usize,
    pub from: u64,
    pub to: u64,
    pub len: u64,
    /// Zeros behind, in the file that is copied to.
    pub zeros: u64,
}

/// Joins runs that are neighbours in both files.
pub(super) fn join(runs: impl Iterator<Item = Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last)
                if last.zeros == 0
                    && last.level == run.level
                    && last.from + last.len == run.from
                    && last.to + last.len == run.to
                    && last.len + run.len <= RUN_MAX =>
            {
                last.len += run.len;
                last.zeros = run.zeros;
            }
            _ => joined.push(run),
        }
    }
    joined
}

fn offset(at: u64) -> FileOffset {
    FileOffset::new(at)
}

/// Copies a run.
pub(super) fn copy_run(source: &dyn Storage, target: &dyn Storage, run: &Run) -> Result<()> {
    let end = run.from + run.len;
    let mut at = run.from;
    while at < end {
        let data = source.next_data(offset(at))?;
        let start = data
            .as_ref()
            .map_or(end, |data| data.start.get().clamp(at, end));
        if start > at {
            zero(target, run.to + (at - run.from), start - at)?;
        }
        at = data.map_or(end, |data| data.end.get().clamp(start, end));
        if start < at {
            copy(source, start..at, target, run.to + (start - run.from))?;
        } else if start < end {
            // Nothing was found at all, which no host says: not to go round for ever.
            copy(source, start..end, target, run.to + (start - run.from))?;
            at = end;
        }
    }
    zero(target, run.to + run.len, run.zeros)
}

fn zero(target: &dyn Storage, at: u64, len: u64) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    target.zero(offset(at)..offset(at + len), Keep::Nothing)
}

fn copy(
    source: &dyn Storage,
    from: std::ops::Range<u64>,
    target: &dyn Storage,
    to: u64,
) -> Result<()> {
    let range = offset(from.start)..offset(from.end);
    if target.copy_from(offset(to), source, range)? {
        return Ok(());
    }
    let mut buffer = Vec::new();
    let mut at = from.start;
    while at < from.end {
        let len = (from.end - at).min(STRIDE);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        source.read_at(offset(at), &mut buffer)?;
        target.write_at(offset(to + (at - from.start)), &buffer)?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(level: usize, from: u64, to: u64, len: u64, zeros: u64) -> Run {
        Run {
            level,
            from,
            to,
            len,
            zeros,
        }
    }

    #[test]
    fn only_neighbours_in_both_files_are_joined() {
        let runs = [
            run(0, 0, 100, 10, 0),
            run(0, 10, 110, 10, 0),
            run(1, 20, 120, 10, 0),
            run(1, 30, 140, 10, 5),
            run(1, 40, 150, 10, 0),
        ];
        let expected = [
            run(0, 0, 100, 20, 0),
            run(1, 20, 120, 10, 0),
            run(1, 30, 140, 10, 5),
            run(1, 40, 150, 10, 0),
        ];
        assert_eq!(join(runs.into_iter()), expected);
        let long = [run(0, 0, 0, RUN_MAX, 0), run(0, RUN_MAX, RUN_MAX, 1, 0)];
        assert_eq!(join(long.into_iter()), long);
    }
}
