//! The life of a daemon from mending to close, killed at each operation on its host file.
//!
//! Imports: `bench`, `host`, `writer`, `support`; std, `anyhow`.
//! Never: leaves it to chance which operation a kill meets.
//!
//! The image comes with harmless damage, so that the open mends; then it is written to, flushed and
//! discarded from, and closed. One life without a kill counts the operations. Half of the kills are
//! power cuts as well.

use super::bench::{Bench, Front, SECTORS, spec_of};
use super::host::{Fault, When};
use super::{KILLS, STOP, number, seed, stage, writer};
use crate::forge::content::splitmix;
use crate::forge::image::{FirstBlock, IN_USE};
use crate::support::harness::trial;
use crate::support::probe::Need::{Fuse, Root};
use crate::support::{self, Outcome};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use std::sync::atomic::Ordering;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("killed_at_every_operation_v1", &[Fuse, Root], || {
            every(1, false)
        }),
        trial("killed_at_every_operation_v2", &[Fuse, Root], || {
            every(2, false)
        }),
        trial("killed_at_every_operation_chain", &[Fuse, Root], || {
            every(2, true)
        }),
    ]
}

const DAMAGE: [&str; 5] = [
    "t-leak-tail",
    "t-odd-length",
    "t-slots-after-end",
    "h-extension-stale",
    "h-in-use",
];

/// One life. An error from any of its steps is one of a killed daemon.
fn live(bench: &Bench) -> Result<()> {
    let mut options = vec!["--flush-interval=0", "--grow-step=256K"];
    options.extend(bench.options());
    let front = Front::start(bench, &options)?;
    let file = writer::open(&front.disk(), true)?;
    let cluster = 128;
    // In place and to holes, whole and in part, over borders; then all of that is made durable.
    for number in 0..6 {
        bench.write(&file, number * 5 * cluster + 100, 100 + number * 40)?;
    }
    bench.flush(&file)?;
    // Freed clusters, and what takes them as soon as it may.
    bench.zero(&file, cluster, 5 * cluster, true)?;
    bench.zero(&file, 20 * cluster + 9, 3 * cluster, false)?;
    bench.write(&file, 60 * cluster, 2 * cluster)?;
    bench.flush(&file)?;
    bench.flush(&file)?;
    bench.write(&file, 70 * cluster + 5, 3 * cluster)?;
    bench.write(&file, cluster, 1)?;
    bench.zero(&file, 60 * cluster, cluster, true)?;
    drop(file);
    let begun = bench.ledger.flush();
    let (done, status) = front.umount()?;
    let closed = done.code() == 0;
    if closed {
        bench.ledger.flushed(begun);
    }
    ensure!(
        closed == (status == 0),
        "umount and daemon disagree: {status}, {}",
        done.story()
    );
    ensure!(closed, "{}", done.story());
    Ok(())
}

fn make(number: u64, version: u8, chain: bool) -> Result<Bench> {
    let mut spec = spec_of(version);
    spec.first_block = FirstBlock::Extra(1);
    let mut damage = DAMAGE.to_vec();
    if chain {
        // So that an open which mends nothing but the mark is there, too.
        damage.retain(|name| *name != "t-odd-length");
    }
    Bench::damaged(number, &spec, chain, &damage)
}

fn every(version: u8, chain: bool) -> Outcome {
    let mut bench = make(100, version, chain)?;
    live(&bench).context("without a kill")?;
    let operations = bench.host.operations();
    bench.reopen()?;
    ensure!(operations > 20, "a life of {operations} operations");
    let (mut judged, mut issued) = (0, 0);
    // The rest of them is met with other seeds.
    let is_long = number("PLOOPFS_KILLS").unwrap_or(KILLS) >= 500;
    let step = if is_long || version == 2 && !chain {
        1
    } else {
        3
    };
    let phase = (seed() % step) as u32;
    let mut kills = 0;
    for after in (phase..operations).step_by(step as usize) {
        kills += 1;
        let mut bench = make(101 + u64::from(after), version, chain)?;
        let when = match splitmix(&mut bench.dice) % 2 {
            0 => When::Before,
            _ => When::After,
        };
        let cut = splitmix(&mut bench.dice) % 2 == 0;
        let told = || {
            format!(
                "killed {when:?} operation {after} of {operations}, power cut {cut}, \
                 PLOOPFS_SEED={}",
                seed()
            )
        };
        one(&mut bench, after, when, cut).with_context(told)?;
        judged += bench.ledger.judged();
        issued += bench.ledger.issued();
        ensure!(!STOP.load(Ordering::Relaxed), "stopped by a signal");
    }
    eprintln!(
        "killed at operations 0 to {operations}, version {version}, chain {chain} : {kills} kills \
         {judged} sectors {issued} requests 0 bad"
    );
    Ok(())
}

/// One life, one kill, and what it left.
fn one(bench: &mut Bench, after: u32, when: When, cut: bool) -> Outcome {
    bench.host.arm(Fault::Kill(after, when));
    let lived = live(bench);
    let at = stage::mountpoint(bench.dir.path())?;
    stage::lazy(&at)?;
    match (lived, bench.host.failed()) {
        (Err(error), 0) => return Err(error.context("not killed")),
        (Ok(()), 0) => {
            // A life has a few operations more or less, as the flusher's rounds fall.
            // The next daemon is not the one to be killed.
            bench.host.arm(Fault::None);
            bench.host.survive();
            return bench.reopen();
        }
        (Ok(()), _) if bench.host.written_mark() == IN_USE => {
            bail!("called closed, though it was killed with its mark set")
        }
        _ => {}
    }
    if cut {
        bench.host.cut(&mut bench.dice)?;
    } else {
        bench.host.survive();
    }
    bench.look()?;
    bench.reopen()?;
    let copy = bench.dir.path().join("copy");
    support::expect_clean(&copy)?;
    ensure!(bench.ledger.sectors() == SECTORS, "another disk");
    Ok(())
}
