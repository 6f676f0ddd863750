//! Which threads there are, where they run, and whose queues they serve.
//!
//! Imports: nothing of this crate.
//! Never: asks the host anything; pins a thread to a CPU that is off, or that it may not use.
//!
//! The kernel wants a queue for each CPU that there can ever be, numbered from 0, and puts a
//! request on the queue of the CPU that its task runs on. Hosts in the cloud name hundreds of CPUs
//! that they never get. So only CPUs that are on have threads and queues of full depth; the queue
//! of one that is off has a single slot, at home with one of those threads, and gets the others
//! should a request ever come through it.

use std::collections::BTreeSet;

/// Requests that a queue lets out at a time. More than may wait for space on the host, so that
/// other requests get through meanwhile.
pub(super) const DEPTH: usize = 10;

/// One queue, or a share of one, at home with a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queue {
    /// The kernel's number for it.
    pub(super) id: u16,
    /// Its thread.
    pub(super) home: usize,
    /// Slots to begin with.
    pub(super) depth: usize,
}

/// All threads and queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The CPU that each thread is pinned to, if any.
    pub(super) pins: Vec<Option<usize>>,
    pub(super) queues: Vec<Queue>,
}

impl Layout {
    /// For so many possible CPUs, of which these are on and those are for us to use, with so many
    /// threads for each.
    pub(super) fn new(
        possible: u16,
        on: &BTreeSet<usize>,
        allowed: &BTreeSet<usize>,
        crowd: usize,
    ) -> Self {
        let mut layout = Self {
            pins: Vec::new(),
            queues: Vec::new(),
        };
        let is_on = |id: &u16| on.contains(&usize::from(*id));
        for id in (0..possible).filter(is_on) {
            let cpu = usize::from(id);
            for _ in 0..crowd.max(1) {
                let (home, depth) = (layout.pins.len(), DEPTH);
                layout.queues.push(Queue { id, home, depth });
                // Others may run there: their requests come, and we serve them elsewhere.
                layout.pins.push(allowed.contains(&cpu).then_some(cpu));
            }
        }
        if layout.pins.is_empty() {
            layout.pins.push(None);
        }
        let threads = layout.pins.len();
        for id in (0..possible).filter(|id| !is_on(id)) {
            let (home, depth) = (usize::from(id) % threads, 1);
            layout.queues.push(Queue { id, home, depth });
        }
        layout
    }

    /// Slots of all queues at first, and at least one.
    pub(super) fn slots(&self) -> usize {
        let slots: usize = self.queues.iter().map(|queue| queue.depth).sum();
        slots.max(1)
    }

    /// Slots of all queues, once each is of full depth.
    pub(super) fn slots_max(&self) -> usize {
        self.queues.len() * DEPTH
    }
}

/// The numbers of CPUs in a list of the kernel's: `0-3,8`.
pub(super) fn cpus_of(list: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last > usize::from(u16::MAX) {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[usize]) -> BTreeSet<usize> {
        cpus.iter().copied().collect()
    }

    fn queue(id: u16, home: usize, depth: usize) -> Queue {
        Queue { id, home, depth }
    }

    #[test]
    fn each_cpu_has_a_thread_and_a_queue() {
        let all = set(&[0, 1]);
        let layout = Layout::new(2, &all, &all, 1);
        assert_eq!(layout.pins, [Some(0), Some(1)]);
        assert_eq!(layout.queues, [queue(0, 0, DEPTH), queue(1, 1, DEPTH)]);
        let crowd = Layout::new(2, &all, &all, 3);
        assert_eq!(crowd.pins.len(), 6);
        assert!((0..6).all(|home| crowd.queues[home].home == home));
    }

    #[test]
    fn cpus_that_are_off_have_a_queue_and_no_thread() {
        let on = set(&[0, 1]);
        let layout = Layout::new(240, &on, &on, 1);
        assert_eq!(layout.pins, [Some(0), Some(1)]);
        assert_eq!(layout.queues.len(), 240);
        assert!(layout.queues[2..].iter().all(|queue| queue.depth == 1));
        let ids: BTreeSet<u16> = layout.queues.iter().map(|queue| queue.id).collect();
        assert_eq!(ids.len(), 240, "the kernel waits for every queue");
        assert!(layout.queues.iter().all(|queue| queue.home < 2));
    }

    #[test]
    fn only_cpus_that_are_ours_are_pinned_to() {
        let layout = Layout::new(3, &set(&[0, 1, 2]), &set(&[1]), 1);
        assert_eq!(layout.pins, [None, Some(1), None]);
        assert!(layout.queues.iter().all(|queue| queue.depth == DEPTH));
    }

    #[test]
    fn there_is_always_a_thread() {
        let layout = Layout::new(2, &set(&[7]), &set(&[]), 1);
        assert_eq!(layout.pins, [None]);
        assert_eq!(layout.queues, [queue(0, 0, 1), queue(1, 0, 1)]);
    }

    #[test]
    fn the_list_of_cpus_is_read() {
        assert_eq!(cpus_of("0\n"), Some(set(&[0])));
        assert_eq!(cpus_of("0-3\n"), Some(set(&[0, 1, 2, 3])));
        assert_eq!(cpus_of("0-1,8,10-11"), Some(set(&[0, 1, 8, 10, 11])));
        for bad in ["", "x", "3-1", "0-99999999", "1-"] {
            assert_eq!(cpus_of(bad), None, "{bad}");
        }
    }
}
