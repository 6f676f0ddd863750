//! Power cuts and failures during a repair, at every operation.

use crate::damage::bytes_of;
use crate::forge::content::splitmix;
use crate::mending::{self, Course, Verdict};
use crate::sim::storage::Kind;
use crate::stage::{Left, Stage};
use crate::{broken, spec_with_bitmap};
use ploopfs::admin::check::check_image;
use ploopfs::admin::repair::is_clean;

/// What changes files or names.
const CHANGES: [Kind; 7] = [
    Kind::Write,
    Kind::Sync,
    Kind::SetLen,
    Kind::Zero,
    Kind::Create,
    Kind::Rename,
    Kind::SyncNames,
];

fn ok<T>(verdict: Result<T, String>) -> T {
    verdict.unwrap_or_else(|why| panic!("{why}"))
}

#[test]
fn a_repair_cut_anywhere_is_undone_or_completed() {
    let cuts = ok(mending::cut_repairs(6));
    assert!(cuts > 1000, "only {cuts} cuts");
}

#[test]
fn a_second_cut_changes_nothing() {
    ok(mending::cut_twice(12));
}

#[test]
fn an_undo_cut_anywhere_can_be_repeated() {
    let cuts = ok(mending::cut_undos(8));
    assert!(cuts > 500, "only {cuts} cuts");
}

#[test]
fn what_was_written_after_a_repair_is_not_undone() {
    ok(mending::written_since());
}

#[test]
fn what_only_the_hosts_cache_has_is_not_believed() {
    ok(mending::from_the_cache());
    ok(mending::from_a_cached_undo_file());
}

#[test]
fn a_host_that_fails_leaves_a_way_back_and_a_way_on() {
    let runs = ok(mending::failing_host(&CHANGES));
    assert!(runs > 500, "only {runs} runs");
}

#[test]
fn a_sound_bitmap_survives_when_only_space_is_given_back() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec_with_bitmap(), &["t-leak-tail"]).expect("made");
    let bytes = std::fs::read(path).expect("the image was made");
    let stage = Stage::new(&Left::image(&bytes));
    let done = stage.repair().expect("the image can be repaired");
    assert!(is_clean(&done.after));
    let now = check_image(&*stage.x()).expect("readable");
    assert_eq!(now.bitmaps.len(), 1);
}

/// Bytes of headers and tables changed at random, then a cut at random.
#[test]
fn random_damage_is_mended_after_a_cut() {
    let seed = std::env::var("PLOOPFS_SEED").ok();
    let first = seed.and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut repaired = 0;
    for seed in first..first + 60_u64 {
        ok(after_random_damage(seed));
        repaired += 1;
    }
    assert_eq!(repaired, 60);
}

fn after_random_damage(seed: u64) -> Verdict {
    let mut dice = seed;
    let version = 1 + (seed % 2) as u8;
    let mut old = bytes_of((version, &[]));
    for _ in 0..1 + splitmix(&mut dice) % 6 {
        let cluster = splitmix(&mut dice) as usize % 31;
        let unit = if version == 1 { 8 } else { 1 };
        let entry = (splitmix(&mut dice) % 30 * unit) as u32;
        old[64 + 4 * cluster..68 + 4 * cluster].copy_from_slice(&entry.to_le_bytes());
    }
    let len = old.len() - splitmix(&mut dice) as usize % 5000;
    old.truncate(len);
    let course = Course::of_bytes(version, &old, false)?;
    for _ in 0..20 {
        let events = splitmix(&mut dice) as usize % course.stage.moments().max(1);
        let left = course.stage.cut_at(events, &mut dice);
        let what = format!("PLOOPFS_SEED={seed}, after {events} events");
        course.judge(&left, false, &what)?;
    }
    Ok(())
}
