//! Daemons of real mounts are killed at random moments; nothing that was synced may be lost.
//!
//! `PLOOPFS_KILLS` is the number of kills of all disks together, `PLOOPFS_SEED` decides sizes,
//! places, pauses and options (what a kill meets also depends on the host). `tools/soak kill` runs
//! this for as long as asked. `PLOOPFS_TEST_RINGS` has all of it go through rings as well.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

#[path = "kill/bench.rs"]
mod bench;
#[path = "kill/cycle.rs"]
mod cycle;
#[path = "kill/fio.rs"]
mod fio;
#[path = "kill/host.rs"]
mod host;
#[path = "kill/latch.rs"]
mod latch;
#[path = "kill/ledger.rs"]
mod ledger;
#[path = "kill/limits.rs"]
mod limits;
#[path = "kill/points.rs"]
mod points;
#[path = "kill/stage.rs"]
mod stage;
#[path = "kill/subject.rs"]
mod subject;
#[path = "kill/system.rs"]
mod system;
#[path = "kill/writer.rs"]
mod writer;

use cycle::Run;
use libtest_mimic::Trial;
use nix::sys::signal::{SigSet, Signal};
use std::sync::atomic::{AtomicBool, Ordering};
use subject::{ALL, Door, Place, Subject};
use support::harness;
use support::probe::Need::{self, Fio, Fuse, Loop, Qemu, Root};

/// Kills of all disks where nobody says otherwise.
const KILLS: u64 = 64;

/// Set by a signal: runs end before the next cycle and clean up.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}: no number: {text}")),
    )
}

/// Decides all that can be decided.
pub(crate) fn seed() -> u64 {
    number("PLOOPFS_SEED").unwrap_or(1)
}

fn kills() -> u64 {
    number("PLOOPFS_KILLS")
        .unwrap_or(KILLS)
        .div_ceil(ALL.len() as u64)
}

/// Turns the signals that end a program into a flag, so that everything is taken down.
fn catch_signals() {
    let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    if set.thread_block().is_err() {
        return;
    }
    std::thread::spawn(move || {
        while set.wait().is_err() {}
        eprintln!("stopping after the running cycles");
        STOP.store(true, Ordering::Relaxed);
    });
}

fn trial(subject: Subject, test: fn() -> support::Outcome) -> Trial {
    const FILE: &[Need] = &[Fuse, Qemu];
    const LOOP: &[Need] = &[Fuse, Qemu, Root, Loop];
    const FIO: &[Need] = &[Fuse, Qemu, Root, Loop, Fio];
    const HOST: &[Need] = &[Fuse, Qemu, Root];
    let needs = match (subject.door, subject.fio) {
        (_, true) => FIO,
        (Door::Loop | Door::Attach, false) => LOOP,
        _ if subject.host != Place::Disk => HOST,
        _ => FILE,
    };
    harness::trial(subject.name, needs, test)
}

fn run<const N: usize>() -> support::Outcome {
    Run::new(ALL[N])?.go(kills())
}

/// What must be true whichever way requests come.
fn either_way() -> Vec<Trial> {
    let runs: [fn() -> support::Outcome; ALL.len()] = [
        run::<0>, run::<1>, run::<2>, run::<3>, run::<4>, run::<5>, run::<6>, run::<7>, run::<8>,
        run::<9>,
    ];
    let mut trials: Vec<Trial> = ALL
        .into_iter()
        .zip(runs)
        .map(|(s, r)| trial(s, r))
        .collect();
    trials.extend(ledger::trials());
    trials.extend(system::trials());
    trials.extend(limits::trials());
    trials.extend(points::trials());
    trials.extend(latch::trials());
    trials
}

fn main() {
    catch_signals();
    let mut trials = either_way();
    if support::rings::are_asked_for() {
        trials.extend(harness::over("uring", either_way));
    }
    harness::main(trials)
}
