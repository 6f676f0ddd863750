//! The targets, each with what was measured for it.
//!
//! Imports: `contestants` (names), `jobs` (titles), `report`.
//! Never: rounds in favour of a target.

use crate::contestants::{IDENTITY, PLOOPFS, QEMU, RAW, RINGS};
use crate::jobs;
use crate::report::{Report, Verdict};

/// At least so many times as good as another contestant.
struct AtLeast {
    scene: &'static str,
    contestant: &'static str,
    base: &'static str,
    jobs: &'static [&'static str],
    times: f64,
}

/// At most so much.
struct AtMost {
    scene: &'static str,
    contestant: &'static str,
    job: &'static str,
    most: f64,
}

const fn at_least(
    contestant: &'static str,
    base: &'static str,
    jobs: &'static [&'static str],
    times: f64,
) -> AtLeast {
    AtLeast {
        scene: "loop",
        contestant,
        base,
        jobs,
        times,
    }
}

const EVERY: &[&str] = &[
    "rr1", "rw1", "rr32", "rw32", "sr128", "sw128", "sr1m", "sw1m",
];

/// The comparisons.
const RATIOS: [AtLeast; 13] = [
    at_least(PLOOPFS, IDENTITY, EVERY, 0.95),
    at_least(RINGS, IDENTITY, &["rr1", "rw1"], 1.8),
    at_least(RINGS, IDENTITY, &["rr32", "rw32"], 1.1),
    at_least(RINGS, IDENTITY, &["sr128", "sw128", "sr1m", "sw1m"], 1.0),
    at_least(PLOOPFS, QEMU, &["rr1", "rw1"], 1.8),
    at_least(PLOOPFS, QEMU, &["rr32", "rw32"], 3.0),
    at_least(PLOOPFS, QEMU, &["sr128", "sw128", "sr1m"], 2.0),
    at_least(PLOOPFS, QEMU, &["sw1m"], 1.5),
    at_least(RINGS, QEMU, &["rr1", "rw1"], 3.0),
    at_least(RINGS, QEMU, &["rr32", "rw32"], 3.5),
    AtLeast {
        scene: "depth",
        ..at_least(
            "depth 253",
            "depth 1",
            &["rr1", "rr32", "sr128", "sr1m"],
            0.95,
        )
    },
    AtLeast {
        scene: "sync",
        ..at_least(PLOOPFS, RAW, &["on new clusters"], 0.5)
    },
    AtLeast {
        scene: "sync",
        ..at_least(RINGS, RAW, &["on new clusters"], 0.5)
    },
];

const fn at_most(contestant: &'static str, job: &'static str, most: f64) -> AtMost {
    AtMost {
        scene: "open",
        contestant,
        job,
        most,
    }
}

/// The limits.
const LIMITS: [AtMost; 8] = [
    at_most("read-only", "open, 512 deltas", 100.0),
    at_most("read-write", "open, 512 deltas", 100.0),
    at_most("read-only", "open, 16 TiB", 10.0),
    at_most("read-write", "open, 16 TiB", 150.0),
    at_most("read-only", "memory, 16 TiB", 40.0),
    at_most("read-write", "memory, 16 TiB", 40.0),
    AtMost {
        scene: INSIDE,
        ..at_most(OURS, "read of 4 KiB beside its pread", 500.0)
    },
    AtMost {
        scene: INSIDE,
        ..at_most(OURS, "write of 4 KiB beside its pwrite", 500.0)
    },
];

/// The scene of the micro-benchmark.
pub(crate) const INSIDE: &str = "inside";
/// Its only contestant.
pub(crate) const OURS: &str = "one request";

/// Targets that this program cannot judge, and where they are.
const ELSEWHERE: [(&str, &str, &str); 2] = [
    (
        "heap allocations of a request below the threshold",
        "0",
        "tests/allocation.rs judges",
    ),
    (
        "copy-up on one XFS with reflinks against without",
        ">= 5x",
        "not measured: ploopfs has no switch for it yet",
    ),
];

/// Judges all targets.
pub(crate) fn judge(report: &Report) -> Vec<Verdict> {
    let ratios = RATIOS.iter().flat_map(|target| {
        target
            .jobs
            .iter()
            .map(|job| judge_ratio(report, target, job))
    });
    let limits = LIMITS.iter().map(|target| judge_limit(report, target));
    let elsewhere = ELSEWHERE.iter().map(|(what, target, why)| Verdict {
        what: (*what).to_owned(),
        target: (*target).to_owned(),
        measured: (*why).to_owned(),
        met: None,
    });
    ratios.chain(limits).chain(elsewhere).collect()
}

fn judge_ratio(report: &Report, target: &AtLeast, job: &str) -> Verdict {
    let cell = |name| report.cell(target.scene, job, name);
    let ratio = cell(target.contestant)
        .zip(cell(target.base))
        .and_then(|(own, base)| own.ratio_to(base));
    let title = jobs::title(job);
    Verdict {
        what: format!("{}: {} against {}", title, target.contestant, target.base),
        target: format!(">= {}", target.times),
        measured: ratio.map_or_else(
            || "not measured".to_owned(),
            |r| format!("{:.3} ({:.2} to {:.2})", r.median, r.worst, r.best),
        ),
        met: ratio.map(|ratio| ratio.median >= target.times),
    }
}

fn judge_limit(report: &Report, target: &AtMost) -> Verdict {
    let cell = report.cell(target.scene, target.job, target.contestant);
    let unit = cell.map_or("", |cell| cell.unit.name());
    Verdict {
        what: format!("{}, {}", target.job, target.contestant),
        target: format!("< {} {unit}", target.most),
        measured: cell.map_or_else(
            || "not measured".to_owned(),
            |cell| format!("{:.1} {unit} (+-{:.0} %)", cell.median, cell.spread_percent),
        ),
        met: cell.map(|cell| cell.median < target.most),
    }
}
