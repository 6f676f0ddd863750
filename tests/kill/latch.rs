//! A host that fails a sync or a write of the table: the disk is read-only from then on, says so,
//! and what was durable is there after a restart. And power cuts under a running daemon.
//!
//! Imports: `bench`, `host`, `writer`, `support`; std, `anyhow`, `nix`.
//! Never: relies on a time that something should take.

use super::bench::{Bench, CLUSTER, Front, SECTORS, spec, spec_of, table};
use super::host::Fault;
use super::writer;
use super::{STOP, seed};
use crate::forge::content::splitmix;
use crate::forge::image::IN_USE;
use crate::support::guards::Mounted;
use crate::support::harness::trial;
use crate::support::probe::Need::{self, Fuse, Root};
use crate::support::{self, Outcome, command};
use anyhow::{Context, ensure};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use std::fs;
use std::sync::atomic::Ordering;
use std::time::Duration;

const NEEDS: &[Need] = &[Fuse, Root];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("failed_data_sync_latches", NEEDS, || {
            latches(&Fault::Sync(0))
        }),
        trial("failed_table_sync_latches", NEEDS, || {
            latches(&Fault::Sync(1))
        }),
        trial("failed_table_write_latches", NEEDS, || {
            latches(&Fault::Write(table()))
        }),
        trial("failed_timer_flush_latches", NEEDS, timer_latches),
        trial("failed_close_keeps_the_mark", NEEDS, close_keeps_the_mark),
        trial("failed_mark_lets_nothing_through", NEEDS, mark_fails),
        trial("failed_data_write_is_one_error", NEEDS, write_fails),
        trial("failed_sync_refuses_the_open", NEEDS, open_fails),
        trial("failed_part_latches_the_disk", NEEDS, part_latches),
        trial("failed_part_leaves_all_marks", NEEDS, part_fails_at_close),
        trial("power_cuts_under_the_daemon", NEEDS, power_cuts),
    ]
}

/// A fault in a flush that somebody waits for.
fn latches(fault: &Fault) -> Outcome {
    let mut bench = Bench::new(1)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    bench.scatter(&file)?;
    ensure!(front.latched()?.is_none(), "latched too early");
    let mut failed = None;
    // A flush of two syncs is one that names a file cluster which somebody had before, and that is
    // one that was freed some flushes ago.
    for _ in 0..20 {
        bench.zero(&file, 0, 8 * u64::from(CLUSTER), true)?;
        bench.flush(&file)?;
        bench.write(&file, 5, 8 * u64::from(CLUSTER) - 10)?;
        bench.host.arm(fault.clone());
        failed = bench.flush(&file).err().and_then(|e| e.raw_os_error());
        if bench.host.failed() > 0 {
            break;
        }
        bench.host.arm(Fault::None);
    }
    ensure!(failed == Some(Errno::EIO as i32), "fsync: errno {failed:?}");
    ensure!(bench.host.failed() == 1, "the fault did not happen");
    bench.expect_latched(&file)?;
    front.expect_told("a flush failed")?;
    drop(file);
    let (done, status) = front.umount()?;
    // The mount has gone, but whoever asked must know that the image was not closed.
    ensure!(
        done.code() != 0 && status != 0,
        "{status}: {}",
        done.story()
    );
    bench.expect_durable()
}

/// Nobody waits for the flush that fails; the next who asks must be told.
fn timer_latches() -> Outcome {
    let mut bench = Bench::new(2)?;
    let front = Front::start(&bench, &["--flush-interval=0.1"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    bench.host.arm(Fault::Sync(0));
    // Once the timer has met the fault, writes fail, too.
    command::eventually(Duration::from_secs(60), || {
        // The timer has something to do when clusters get a place, so any place will do here.
        let first = splitmix(&mut bench.dice) % SECTORS;
        let _ = bench.write(&file, first, 1);
        ensure!(front.latched()?.is_some(), "the timer does not flush");
        Ok(())
    })?;
    bench.expect_latched(&file)?;
    front.expect_told("a flush failed")?;
    drop(file);
    let (done, status) = front.umount()?;
    ensure!(
        done.code() != 0 && status != 0,
        "{status}: {}",
        done.story()
    );
    bench.expect_durable()
}

/// The last flush fails, or the sync that makes the cut durable: the mark stays.
fn close_keeps_the_mark() -> Outcome {
    for after in 0..4 {
        let mut bench = Bench::new(3 + u64::from(after))?;
        let front = Front::start(&bench, &["--flush-interval=0"])?;
        bench.work(&front.disk())?;
        let file = writer::open(&front.disk(), true)?;
        bench.scatter(&file)?;
        // Entries go, so the table must be made durable, too.
        bench.zero(&file, 0, 4 * u64::from(CLUSTER), true)?;
        drop(file);
        bench.host.arm(Fault::Sync(after));
        let log = front.log.clone();
        let (done, status) = front.umount()?;
        if bench.host.failed() == 0 {
            ensure!(after > 2, "a close with {after} syncs");
            continue;
        }
        let said = fs::read_to_string(log)?;
        let story = format!(
            "sync {after}: status {status}, {}, log {said}",
            done.story()
        );
        ensure!(done.code() != 0 && status != 0, "{story}");
        ensure!(said.contains("read-only from now on"), "{story}");
        bench.expect_durable().context(story)?;
    }
    Ok(())
}

/// The mark cannot be made durable: no write gets through, and nothing else has changed.
fn mark_fails() -> Outcome {
    let mut bench = Bench::new(8)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    let file = writer::open(&front.disk(), true)?;
    bench.host.arm(Fault::Sync(0));
    let failed = bench
        .write(&file, 0, 64)
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(failed == Some(Errno::EIO as i32), "write: errno {failed:?}");
    ensure!(bench.host.failed() == 1, "the fault did not happen");
    bench.read_all(&file)?;
    bench.expect_latched(&file)?;
    front.expect_told("mark")?;
    drop(file);
    front.umount()?;
    // Marked or not, but with the content of before.
    bench.host.arm(Fault::None);
    bench.reopen()
}

/// A write of data that fails is an error of that request alone.
fn write_fails() -> Outcome {
    let mut bench = Bench::new(9)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    let data = spec().data_start() * 512;
    bench.host.arm(Fault::Write(data..u64::MAX));
    let failed = bench
        .write(&file, 640, 200)
        .err()
        .and_then(|e| e.raw_os_error());
    ensure!(failed == Some(Errno::EIO as i32), "write: errno {failed:?}");
    bench.scatter(&file)?;
    let begun = bench.ledger.flush();
    file.sync_all().context("fsync after a failed write")?;
    bench.ledger.flushed(begun);
    bench.read_all(&file)?;
    ensure!(front.latched()?.is_none(), "latched by a failed write");
    drop(file);
    let (done, status) = front.umount()?;
    ensure!(
        done.code() == 0 && status == 0,
        "{status}: {}",
        done.story()
    );
    bench.reopen()
}

/// The daemon is killed and the host loses what was not synced, again and again.
fn power_cuts() -> Outcome {
    let cuts = super::number("PLOOPFS_KILLS").unwrap_or(super::KILLS) / 6;
    let benches = [
        Bench::with(10, &spec_of(2), false)?,
        Bench::with(11, &spec_of(1), false)?,
        Bench::with(12, &spec_of(2), true)?,
    ];
    let (mut kills, mut judged, mut issued) = (0, 0, 0);
    for mut bench in benches {
        let before = bench.base.as_deref().map(support::sha256).transpose()?;
        for cut in 0..cuts.max(2) {
            let told = || format!("power cut {cut}, PLOOPFS_SEED={}", seed());
            bench.cut().with_context(told)?;
            kills += 1;
            ensure!(!STOP.load(Ordering::Relaxed), "stopped by a signal");
        }
        bench.reopen()?;
        let after = bench.base.as_deref().map(support::sha256).transpose()?;
        ensure!(before == after, "the base was written to");
        judged += bench.ledger.judged();
        issued += bench.ledger.issued();
    }
    eprintln!(
        "killed power_cuts_under_the_daemon : {kills} kills {judged} sectors {issued} requests \
         0 bad"
    );
    Ok(())
}

/// After a kill the image must be made sure of before it is believed; where that fails it is
/// refused, and nothing is lost by asking.
fn open_fails() -> Outcome {
    let mut bench = Bench::new(13)?;
    let mut refused = 0;
    for after in 0..6 {
        let mounted = Mounted::new(bench.dir.path(), &bench.image, &[])?;
        bench.work(&mounted.disk())?;
        mounted.signal(Signal::SIGKILL)?;
        mounted.gone(Duration::from_secs(20))?;
        drop(mounted);
        bench.host.arm(Fault::Sync(after));
        let at = bench.dir.path().join("mnt");
        match Mounted::at(&at, &bench.image, &["--flush-interval=0"]) {
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(bench.host.failed() == refused + 1, "{text}");
                ensure!(
                    text.contains("a.hds") && text.contains("os error 5"),
                    "{text}"
                );
                refused += 1;
            }
            Ok(mounted) => {
                // The open needed fewer syncs than that.
                bench.host.arm(Fault::None);
                ensure!(bench.host.failed() == refused, "a failed sync was ignored");
                mounted.umount()?;
            }
        }
        bench.host.arm(Fault::None);
        bench.reopen()?;
    }
    ensure!(refused >= 1, "no open syncs the image");
    Ok(())
}

/// One part of a split disk fails: no part is written to any more.
fn part_latches() -> Outcome {
    let mut bench = Bench::split(14)?;
    let front = Front::start(&bench, &["--flush-interval=0"])?;
    bench.work(&front.disk())?;
    let file = writer::open(&front.disk(), true)?;
    bench.scatter(&file)?;
    bench.host.arm(Fault::Sync(0));
    let failed = file.sync_all().err().and_then(|e| e.raw_os_error());
    ensure!(failed == Some(Errno::EIO as i32), "fsync: errno {failed:?}");
    // What is tried then lies in the part whose host is well.
    bench.expect_latched(&file)?;
    front.expect_told("a flush failed")?;
    drop(file);
    let (done, status) = front.umount()?;
    ensure!(
        done.code() != 0 && status != 0,
        "{status}: {}",
        done.story()
    );
    ensure!(
        support::mark_of(&bench.sound_part()?)? == IN_USE,
        "a part lost its mark"
    );
    bench.expect_durable()
}

/// A close that fails in the last part before any mark is cleared leaves the marks of all parts.
fn part_fails_at_close() -> Outcome {
    let mut failures = 0;
    for after in 0..6 {
        let mut bench = Bench::split(15 + u64::from(after))?;
        let front = Front::start(&bench, &["--flush-interval=0"])?;
        bench.work(&front.disk())?;
        let file = writer::open(&front.disk(), true)?;
        bench.scatter(&file)?;
        drop(file);
        bench.host.arm(Fault::Sync(after));
        let (done, status) = front.umount()?;
        let story = format!("sync {after}: status {status}, {}", done.story());
        if bench.host.failed() == 0 {
            ensure!(done.code() == 0 && status == 0, "{story}");
            break;
        }
        failures += 1;
        ensure!(done.code() != 0 && status != 0, "{story}");
        let other = support::mark_of(&bench.sound_part()?)?;
        let is_last = bench.host.written_mark() != IN_USE;
        ensure!(
            other == IN_USE || is_last,
            "{story}: the mark of the first part went first"
        );
        bench.expect_durable().context(story)?;
    }
    ensure!(failures >= 3, "a close with {failures} syncs");
    Ok(())
}
