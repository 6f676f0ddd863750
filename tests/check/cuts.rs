//! Power cuts and failures during a repair, at every operation.

use crate::forge::content::splitmix;
use crate::host::{Host, State};
use crate::{broken, spec, spec_with_bitmap};
use ploopfs::admin::check::check_image;
use ploopfs::admin::repair::{KeepOld, Repaired, is_clean, repair_image, undo_image};
use ploopfs::error::Result;
use ploopfs::plan::repair::Policy;
use ploopfs::storage::Directory;

/// Damage that together needs every step of a repair.
const SETS: [(u8, &[&str]); 13] = [
    (2, &["t-duplicate"]),
    (1, &["t-duplicate", "t-leak-tail"]),
    (2, &["t-duplicate", "t-odd-length", "h-in-use"]),
    (2, &["t-straddle", "t-slots-after-end", "h-in-use"]),
    (2, &["t-past-eof", "t-duplicate"]),
    (1, &["t-unaligned", "t-leak-tail"]),
    (2, &["t-leak-interior", "t-leak-tail"]),
    (2, &["h-first-small", "t-far"]),
    (2, &["h-type", "h-extension-stale"]),
    (1, &["h-type", "t-all-ones", "t-odd-length"]),
    (1, &["h-entries-few", "h-in-use"]),
    (2, &["h-extension-bad", "t-leak-interior"]),
    (2, &["t-duplicate", "t-straddle"]),
];

fn bytes_of(version: u8, names: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec(version), names).expect("the image is made");
    std::fs::read(path).expect("the image was made")
}

fn repair(host: &Host) -> Result<Repaired> {
    let storage = host.open("x", true)?;
    let keep = KeepOld::In {
        directory: host,
        image: "x",
    };
    repair_image(&*storage, keep, &Policy::default())
}

/// What the image is when nothing disturbs its repair, and the moments of that.
fn undisturbed(bytes: &[u8]) -> (State, Vec<State>) {
    let host = Host::with("x", bytes);
    host.record();
    let done = repair(&host).expect("the image can be repaired");
    assert!(is_clean(&done.after), "{:?}", done.after.report);
    (host.state(), host.moments())
}

/// True where a repair would go back to the old bytes from here.
fn undone(state: &State, name: &str) -> Vec<u8> {
    let host = Host::new(state.clone());
    let storage = host.open("x", true).expect("the image is there");
    undo_image(&*storage, &host, name).expect("the undo file is sound");
    assert_eq!(host.state().names(), ["x"]);
    host.state()
        .bytes("x")
        .expect("the image is there")
        .to_vec()
}

/// Repairs what a cut has left, and expects what an undisturbed repair gives.
fn expect_mended(left: &State, old: &[u8], good: &State, moved: bool, what: &str) {
    let host = Host::new(left.clone());
    let done = repair(&host).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(is_clean(&done.after), "{what}: {:?}", done.after.report);
    let now = host.state();
    if !moved {
        assert!(now.bytes("x") == good.bytes("x"), "{what}: another end");
    }
    assert!(!now.names().contains(&"x.repair"), "{what}");
    let again = repair(&host).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(again.fixes.is_empty() && again.undo.is_none(), "{what}");
    let undo = now.names().into_iter().find(|name| *name != "x");
    match undo {
        Some(name) => assert!(undone(&now, name) == old, "{what}: undo"),
        None => assert!(now.bytes("x") == Some(old), "{what}: no undo file"),
    }
}

/// Until the undo file is sealed the image is untouched; from then on it gives the old bytes back.
fn expect_a_way_back(left: &State, old: &[u8], what: &str) {
    if left.bytes("x") == Some(old) {
        return;
    }
    let names = left.names();
    let name = names.iter().find(|name| **name != "x");
    let name = name.unwrap_or_else(|| panic!("{what}: changed without an undo file"));
    assert!(undone(left, name) == old, "{what}: not as it was");
}

#[test]
fn a_repair_cut_anywhere_is_undone_or_completed() {
    let mut dice = 1;
    let mut cuts = 0;
    for (version, names) in SETS {
        let old = bytes_of(version, names);
        let (good, moments) = undisturbed(&old);
        let moved = names.contains(&"t-unaligned");
        for (number, moment) in moments.iter().enumerate() {
            for attempt in 0..6 {
                let left = moment.after_cut(&mut dice);
                let what = format!("{names:?}, operation {number}, attempt {attempt}");
                expect_a_way_back(&left, &old, &what);
                expect_mended(&left, &old, &good, moved, &what);
                cuts += 1;
            }
        }
    }
    assert!(cuts > 1000, "only {cuts} cuts");
}

#[test]
fn a_second_cut_changes_nothing() {
    let mut dice = 7;
    for (version, names) in SETS {
        let old = bytes_of(version, names);
        let (good, moments) = undisturbed(&old);
        let moved = names.contains(&"t-unaligned");
        for _ in 0..12 {
            let first = &moments[splitmix(&mut dice) as usize % moments.len()];
            let host = Host::new(first.after_cut(&mut dice));
            host.record();
            repair(&host).expect("the image can be repaired");
            let moments = host.moments();
            let second = &moments[splitmix(&mut dice) as usize % moments.len()];
            let left = second.after_cut(&mut dice);
            let what = format!("{names:?}, cut twice");
            expect_a_way_back(&left, &old, &what);
            expect_mended(&left, &old, &good, moved, &what);
        }
    }
}

#[test]
fn an_undo_cut_anywhere_can_be_repeated() {
    let mut dice = 3;
    for (version, names) in SETS {
        let old = bytes_of(version, names);
        let (good, _) = undisturbed(&old);
        let Some(name) = good.names().into_iter().find(|name| *name != "x") else {
            continue;
        };
        let host = Host::new(good.clone());
        host.record();
        let storage = host.open("x", true).expect("the image is there");
        undo_image(&*storage, &host, name).expect("the undo file is sound");
        for (number, moment) in host.moments().iter().enumerate() {
            for _ in 0..8 {
                let left = moment.after_cut(&mut dice);
                let what = format!("{names:?}, operation {number}");
                expect_old_or_new(version, &left, &old, &good, &what);
                let there = left.names();
                match there.iter().find(|name| **name != "x") {
                    Some(name) => assert!(undone(&left, name) == old, "{what}"),
                    None => assert!(left.bytes("x") == Some(&old[..]), "{what}"),
                }
            }
        }
    }
}

/// What a cluster of the disk shows; none where its entry points to no data.
fn shown(version: u8, bytes: &[u8], index: usize) -> Option<Vec<u8>> {
    let entry = bytes[64 + 4 * index..].first_chunk();
    let entry = u32::from_le_bytes(*entry.expect("the table is there")) as usize;
    let start = entry * if version == 1 { 512 } else { 4096 };
    if entry == 0 {
        return Some(vec![0; 4096]);
    }
    if start < 4096 || start >= bytes.len() {
        return None;
    }
    let mut data = bytes[start..bytes.len().min(start + 4096)].to_vec();
    data.resize(4096, 0);
    Some(data)
}

/// Whatever an undo has reached, each cluster shows what it did before or after the repair.
fn expect_old_or_new(version: u8, left: &State, old: &[u8], good: &State, what: &str) {
    let bytes = |state: &State| state.bytes("x").expect("the image is there").to_vec();
    let (left, good) = (bytes(left), bytes(good));
    for index in 0..30 {
        let place = 64 + 4 * index..68 + 4 * index;
        let before = shown(version, old, index);
        if before.is_none() && left[place.clone()] == old[place] {
            continue;
        }
        let now = shown(version, &left, index);
        let is_known = now == before || now == shown(version, &good, index);
        assert!(is_known, "{what}: cluster {index} shows neither");
    }
}

/// The image after a repair, with the name of the undo file.
fn repaired(names: &[&str]) -> (Host, String) {
    let (good, _) = undisturbed(&bytes_of(2, names));
    let there = good.names();
    let name = there.iter().find(|name| **name != "x");
    let name = (*name.expect("something was changed")).to_owned();
    (Host::new(good), name)
}

fn expect_no_undo(host: &Host, name: &str, what: &str) {
    let image = host.open("x", true).expect("the image is there");
    let before = host.state();
    let refused = undo_image(&*image, host, name).expect_err(what);
    let (before, now) = (before.bytes("x"), host.state());
    assert!(now.bytes("x") == before, "{what}: changed");
    assert!(now.names().contains(&name), "{what}: {refused}");
}

fn place(at: u64) -> ploopfs::units::FileOffset {
    ploopfs::units::FileOffset::new(at)
}

/// A program opens the mended image, writes a new cluster, syncs, and is killed.
fn write_and_die(host: &Host) -> u64 {
    let image = host.open("x", true).expect("the image is there");
    let now = host.state();
    let bytes = now.bytes("x").expect("there");
    let hole = (0..29).find(|n| bytes[64 + 4 * n..68 + 4 * n] == [0; 4]);
    let at = 64 + 4 * hole.expect("half of it is mapped") as u64;
    let end = u32::try_from(bytes.len().div_ceil(4096)).expect("small");
    let start = u64::from(end) * 4096;
    let mark = ploopfs::format::header::IN_USE.to_le_bytes();
    image.write_at(place(44), &mark).expect("memory");
    image.write_at(place(start), &[7; 4096]).expect("memory");
    image
        .write_at(place(at), &end.to_le_bytes())
        .expect("memory");
    image.sync_data().expect("memory");
    start
}

#[test]
fn what_was_written_after_a_repair_is_not_undone() {
    for names in [
        &["t-duplicate"][..],
        &["t-duplicate", "t-leak-tail"],
        &["t-straddle", "h-in-use"],
        &["h-in-use"],
        &["t-leak-tail"],
    ] {
        let (host, name) = repaired(names);
        write_and_die(&host);
        expect_no_undo(&host, &name, "a new cluster and a mark");
        // Killed at the last rename: the image is clean, and the undo file has its first name.
        let (host, name) = repaired(names);
        host.rename(&name, "x.repair").expect("it is there");
        let start = write_and_die(&host);
        expect_no_undo(&host, "x.repair", "the first name");
        let done = repair(&host).expect("the image can be repaired");
        assert!(is_clean(&done.after), "{names:?}: {:?}", done.after.report);
        let now = host.state();
        let start = usize::try_from(start).expect("small");
        let data = now.bytes("x").and_then(|x| x.get(start..start + 4096));
        assert!(data == Some(&[7; 4096][..]), "{names:?}: taken back");
        if let Some(name) = done.undo {
            let image = host.open("x", true).expect("the image is there");
            undo_image(&*image, &host, &name).expect("the undo of the second repair");
            let now = host.state();
            let data = now.bytes("x").and_then(|x| x.get(start..start + 4096));
            assert!(
                data == Some(&[7; 4096][..]),
                "{names:?}: taken back too far"
            );
        }
    }
}

#[test]
fn copies_and_what_they_were_made_from_are_not_undone_once_written_to() {
    let old = bytes_of(2, &["t-duplicate"]);
    let (good, _) = undisturbed(&old);
    let good = good.bytes("x").expect("there").to_vec();
    let entry = |bytes: &[u8], n: usize| {
        u32::from_le_bytes(bytes[64 + 4 * n..68 + 4 * n].try_into().expect("four"))
    };
    let moved = (0..30).find(|n| entry(&old, *n) != entry(&good, *n));
    let moved = moved.expect("one entry was repointed");
    for target in [entry(&good, moved), entry(&old, moved)] {
        let (host, name) = repaired(&["t-duplicate"]);
        let image = host.open("x", true).expect("the image is there");
        let byte = u64::from(target) * 4096 + 77;
        image.write_at(place(byte), &[0xa5]).expect("memory");
        expect_no_undo(&host, &name, "written in place");
    }
}

#[test]
fn an_undo_does_not_run_beside_an_interrupted_repair() {
    let (host, name) = repaired(&["t-duplicate"]);
    host.create_new("x.repair").expect("memory");
    expect_no_undo(&host, &name, "two undo files");
}

#[test]
fn a_host_that_fails_leaves_a_way_back_and_a_way_on() {
    for (version, names) in SETS {
        let old = bytes_of(version, names);
        let (good, moments) = undisturbed(&old);
        let moved = names.contains(&"t-unaligned");
        for number in 0..moments.len() as u64 - 1 {
            let host = Host::with("x", &old);
            host.fail_after(number);
            assert!(
                repair(&host).is_err(),
                "{names:?}: failure {number} was lost"
            );
            let what = format!("{names:?}, failure {number}");
            expect_a_way_back(&host.state(), &old, &what);
            expect_mended(&host.state(), &old, &good, moved, &what);
        }
    }
}

#[test]
fn a_sound_bitmap_survives_when_only_space_is_given_back() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = broken(dir.path(), &spec_with_bitmap(), &["t-leak-tail"]).expect("made");
    let bytes = std::fs::read(path).expect("the image was made");
    let host = Host::with("x", &bytes);
    let done = repair(&host).expect("the image can be repaired");
    assert!(is_clean(&done.after));
    let now = host.state();
    let storage = Host::new(now.clone()).open("x", false).expect("there");
    assert_eq!(check_image(&*storage).expect("readable").bitmaps.len(), 1);
    assert!(now.bytes("x").map(<[u8]>::len) < Some(bytes.len()));
}

#[test]
fn an_undo_file_is_not_used_when_somebody_else_has_written_since() {
    let old = bytes_of(2, &["t-duplicate", "t-leak-tail"]);
    let (_, moments) = undisturbed(&old);
    let mut interrupted = 0;
    for moment in &moments {
        if !moment.names().contains(&"x.repair") || moment.bytes("x") == Some(&old[..]) {
            continue;
        }
        // Another program takes the image for its own: a new cluster, and closed.
        let host = Host::new(moment.clone());
        let image = host.open("x", true).expect("the image is there");
        let bytes = moment.bytes("x").expect("there").to_vec();
        let hole = (0..29).find(|n| bytes[64 + 4 * n..68 + 4 * n] == [0; 4]);
        let at = 64 + 4 * hole.expect("half of it is mapped") as u64;
        let end = u32::try_from(bytes.len().div_ceil(4096)).expect("small");
        image
            .write_at(place(u64::from(end) * 4096), &[7; 4096])
            .expect("memory");
        image
            .write_at(place(at), &end.to_le_bytes())
            .expect("memory");
        image.write_at(place(44), &[0; 4]).expect("memory");
        let refused = undo_image(&*image, &host, "x.repair");
        assert!(refused.is_err(), "written data was taken back");
        let done = repair(&host).expect("the image can be repaired");
        assert!(is_clean(&done.after));
        let now = host.state();
        let now = now.bytes("x").expect("there");
        let entry = u64::from(now[at as usize]) | u64::from(now[at as usize + 1]) << 8;
        let start = usize::try_from(entry * 4096).expect("small");
        assert_eq!(now[start..start + 4096], [7; 4096]);
        interrupted += 1;
    }
    assert!(interrupted > 10, "{interrupted}");
}

/// Bytes of headers and tables changed at random, then a cut at random.
#[test]
fn random_damage_is_mended_after_a_cut() {
    let seed = std::env::var("PLOOPFS_SEED").ok();
    let first = seed.and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut repaired = 0;
    for seed in first..first + 60_u64 {
        let mut dice = seed;
        let version = 1 + (seed % 2) as u8;
        let mut old = bytes_of(version, &[]);
        for _ in 0..1 + splitmix(&mut dice) % 6 {
            let cluster = splitmix(&mut dice) as usize % 31;
            let unit = if version == 1 { 8 } else { 1 };
            let entry = (splitmix(&mut dice) % 30 * unit) as u32;
            old[64 + 4 * cluster..68 + 4 * cluster].copy_from_slice(&entry.to_le_bytes());
        }
        let len = old.len() - splitmix(&mut dice) as usize % 5000;
        old.truncate(len);
        let (good, moments) = undisturbed(&old);
        for _ in 0..20 {
            let number = splitmix(&mut dice) as usize % moments.len();
            let left = moments[number].after_cut(&mut dice);
            let what = format!("PLOOPFS_SEED={seed}, operation {number}");
            expect_a_way_back(&left, &old, &what);
            expect_mended(&left, &old, &good, false, &what);
        }
        repaired += 1;
    }
    assert_eq!(repaired, 60);
}
