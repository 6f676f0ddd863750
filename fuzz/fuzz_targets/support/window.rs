//! Pieces of a disk that are looked at: its start and its end, since the whole may be endless.

use super::dice::Dice;
use ploopfs::disk::Disk;
use ploopfs::units::DiskOffset;
use std::sync::Arc;

const HEAD: u64 = 96 << 10;
const TAIL: u64 = 8 << 10;
/// Bytes that are read at a time, so that one bad cluster does not hide all others.
const STEP: u64 = 4096;

/// What a step of a window shows: its bytes, or that it cannot be read.
pub(crate) type Shown = Option<Vec<u8>>;

/// The ranges of a disk of this size that are looked at, as start and length.
pub(crate) fn steps(size: u64) -> Vec<(u64, u64)> {
    let head = size.min(HEAD);
    let tail = size.saturating_sub(TAIL).max(head);
    let mut steps = Vec::new();
    for (from, to) in [(0, head), (tail, size)] {
        let mut at = from;
        while at < to {
            let len = (to - at).min(STEP);
            steps.push((at, len));
            at += len;
        }
    }
    steps
}

/// The windows into a disk: what was shown, and what must be shown after changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Windows {
    steps: Vec<(u64, u64)>,
    shown: Vec<Shown>,
}

impl Windows {
    /// Reads them. A seek in both directions must end, too.
    pub(crate) fn of(disk: &Disk) -> Self {
        let steps = steps(disk.size_bytes());
        let read = |(at, len): &(u64, u64)| {
            let mut bytes = vec![0xee; *len as usize];
            let read = disk.read_at(DiskOffset::new(*at), &mut bytes);
            read.is_ok().then_some(bytes)
        };
        let shown = steps.iter().map(read).collect();
        if disk.size_bytes() > 0 {
            let data = disk.seek_data(DiskOffset::ZERO);
            let _ = data.map(|at| at.map(|at| disk.seek_hole(at)));
        }
        Self { steps, shown }
    }

    /// All steps, and what they show.
    pub(crate) fn iter(&self) -> impl Iterator<Item = ((u64, u64), &Shown)> {
        self.steps.iter().copied().zip(&self.shown)
    }

    /// True when all could be read.
    pub(crate) fn is_whole(&self) -> bool {
        self.shown.iter().all(Option::is_some)
    }

    /// From now on anything may be seen in this step.
    pub(crate) fn forget_step(&mut self, index: usize) {
        if let Some(shown) = self.shown.get_mut(index) {
            *shown = None;
        }
    }

    /// Makes a few changes, in the disk and here. The first that fails ends it.
    pub(crate) fn change(&mut self, disk: &Arc<Disk>, dice: &mut Dice, count: u64) {
        for _ in 0..count {
            let index = dice.below(self.steps.len() as u64) as usize;
            let Some((start, len)) = self.steps.get(index).copied() else {
                return;
            };
            let first = dice.below(len);
            let most = [1, 512, STEP][dice.below(3) as usize];
            let count = (1 + dice.below(most)).min(len - first);
            let at = DiskOffset::new(start + first);
            let bytes = match dice.below(8) {
                0 | 1 => {
                    disk.zero_at(at, count).expect("a range becomes zeros");
                    vec![0; count as usize]
                }
                2 => {
                    disk.flush_now().expect("a flush");
                    continue;
                }
                kind => {
                    let bytes = if kind == 3 {
                        vec![0; count as usize]
                    } else {
                        dice.bytes(count)
                    };
                    disk.write_at(at, &bytes).expect("a write");
                    bytes
                }
            };
            let step = self.shown[index].as_mut();
            let step = step.expect("what can be written can be read");
            step[first as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// Fails where `later` does not show what this one does, as far as this one shows anything.
    pub(crate) fn assert_kept_by(&self, later: &Self, story: &str) {
        for ((step, kept), shown) in self.steps.iter().zip(&self.shown).zip(&later.shown) {
            if let Some(kept) = kept {
                let shown = shown.as_ref();
                let shown = shown.unwrap_or_else(|| panic!("{story}: {step:?} is lost"));
                let differs = kept.iter().zip(shown).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{story}: {step:?} has changed");
            }
        }
    }
}
