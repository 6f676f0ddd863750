//! What must hold of a repair and its undo wherever the power is cut, whatever fails, and whoever
//! writes meanwhile. Each function says what does not, so that planted bugs can be looked for too.

use crate::damage::{SETS, Set, bytes_of};
use crate::forge::content::splitmix;
use crate::sim::faults::Fault;
use crate::sim::storage::{Kind, Manners};
use crate::stage::{Left, Stage};
use ploopfs::admin::check::check_image;
use ploopfs::admin::repair::is_clean;
use ploopfs::plan::repair::Fix;
use ploopfs::storage::mem::MemStorage;
use ploopfs::storage::{Directory, Storage};
use ploopfs::units::FileOffset;

pub(crate) type Verdict = Result<(), String>;

/// Where the in-use mark is.
const MARK: std::ops::Range<usize> = 44..48;

fn hold(holds: bool, why: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(why()) }
}

fn at(position: u64) -> FileOffset {
    FileOffset::new(position)
}

fn is_marked(bytes: &[u8]) -> bool {
    bytes.get(MARK) == Some(&ploopfs::format::header::IN_USE.to_le_bytes())
}

/// What an undisturbed repair makes of an image.
pub(crate) struct Course {
    pub(crate) old: Vec<u8>,
    pub(crate) stage: Stage,
    pub(crate) good: Left,
    version: u8,
    /// It sets the in-use mark.
    marks: bool,
    /// Where copies go depends on what an earlier repair has done.
    moved: bool,
}

impl Course {
    pub(crate) fn of(set: Set) -> Result<Self, String> {
        let moved = set.1.contains(&"t-unaligned");
        Self::of_bytes(set.0, &bytes_of(set), moved)
    }

    pub(crate) fn of_bytes(version: u8, bytes: &[u8], moved: bool) -> Result<Self, String> {
        let stage = Stage::new(&Left::image(bytes));
        let done = stage.repair().map_err(|e| format!("undisturbed: {e}"))?;
        let report = &done.after.report;
        hold(is_clean(&done.after), || format!("undisturbed: {report:?}"))?;
        Ok(Self {
            old: bytes.to_vec(),
            good: stage.left(),
            version,
            stage,
            marks: done.fixes.contains(&Fix::Mark),
            moved,
        })
    }

    /// What must hold of what a cut has left.
    pub(crate) fn judge(&self, left: &Left, is_over: bool, what: &str) -> Verdict {
        if is_over {
            return hold(*left == self.good, || {
                format!("{what}: over, and not durable")
            });
        }
        self.judge_mark(left, what)?;
        self.judge_way_back(left, what)?;
        self.judge_way_on(left, what)
    }

    /// An image without its mark is what it was, or what it will be.
    fn judge_mark(&self, left: &Left, what: &str) -> Verdict {
        let is_end = left.x() == self.old || left.x() == self.good.x();
        hold(!self.marks || is_marked(left.x()) || is_end, || {
            format!("{what}: half mended, and not marked")
        })
    }

    /// Until the undo file is sealed the image is untouched; then it gives the old bytes back.
    pub(crate) fn judge_way_back(&self, left: &Left, what: &str) -> Verdict {
        if left.x() == self.old {
            return Ok(());
        }
        let name = left.undo_file();
        let name = name.ok_or_else(|| format!("{what}: changed without an undo file"))?;
        let back = undone(left, name, what)?;
        hold(back == self.old, || format!("{what}: not as it was"))
    }

    /// Another repair goes on, to the same end.
    pub(crate) fn judge_way_on(&self, left: &Left, what: &str) -> Verdict {
        let stage = Stage::new(left);
        let done = stage.repair().map_err(|e| format!("{what}: {e}"))?;
        let report = &done.after.report;
        hold(is_clean(&done.after), || format!("{what}: {report:?}"))?;
        let now = stage.left();
        let shows = |bytes: &[u8]| -> Vec<_> {
            let clusters = 0..30;
            clusters.map(|n| shown(self.version, bytes, n)).collect()
        };
        let is_same = if self.moved {
            shows(now.x()) == shows(self.good.x())
        } else {
            now.x() == self.good.x()
        };
        hold(is_same, || format!("{what}: another end"))?;
        let is_ended = !now.names().contains(&"x.repair");
        hold(is_ended, || format!("{what}: the undo file is unfinished"))?;
        let again = stage.repair().map_err(|e| format!("{what}: {e}"))?;
        let is_idle = again.fixes.is_empty() && again.undo.is_none();
        hold(is_idle, || format!("{what}: mended twice"))?;
        let back = match now.undo_file() {
            Some(name) => undone(&now, name, what)?,
            None => now.x().to_vec(),
        };
        hold(back == self.old, || format!("{what}: no way back any more"))
    }
}

/// The image once its repair is undone.
fn undone(left: &Left, name: &str, what: &str) -> Result<Vec<u8>, String> {
    let stage = Stage::new(left);
    let undone = stage.undo(name);
    undone.map_err(|e| format!("{what}: no undo: {e}"))?;
    let now = stage.left();
    hold(now.undo_file().is_none(), || {
        format!("{what}: the undo file stays")
    })?;
    Ok(now.x().to_vec())
}

/// A repair is cut after each operation, with any of what was not durable kept or lost.
pub(crate) fn cut_repairs(attempts: u32) -> Result<u32, String> {
    let (mut dice, mut cuts) = (1, 0);
    for set in SETS {
        let course = Course::of(set)?;
        cuts += course
            .stage
            .cut(0, attempts, &mut dice, |number, is_over, left| {
                course.judge(&left, is_over, &format!("{set:?}, event {number}"))
            })?;
    }
    Ok(cuts)
}

/// And the repair that goes on is cut too.
pub(crate) fn cut_twice(attempts: u32) -> Verdict {
    let mut dice = 7;
    for set in SETS {
        let course = Course::of(set)?;
        for _ in 0..attempts {
            let events = 1 + splitmix(&mut dice) as usize % course.stage.moments();
            let stage = Stage::new(&course.stage.cut_at(events, &mut dice));
            let what = format!("{set:?}, cut twice");
            stage.repair().map_err(|e| format!("{what}: {e}"))?;
            let events = splitmix(&mut dice) as usize % (stage.moments() + 1);
            let left = stage.cut_at(events, &mut dice);
            course.judge_way_back(&left, &what)?;
            course.judge_way_on(&left, &what)?;
        }
    }
    Ok(())
}

/// An undo is cut after each operation, and repeated.
pub(crate) fn cut_undos(attempts: u32) -> Result<u32, String> {
    let (mut dice, mut cuts) = (3, 0);
    for set in SETS {
        let course = Course::of(set)?;
        let Some(name) = course.good.undo_file() else {
            continue;
        };
        let stage = Stage::new(&course.good);
        stage.undo(name).map_err(|e| format!("{set:?}: {e}"))?;
        cuts += stage.cut(0, attempts, &mut dice, |number, is_over, left| {
            let what = format!("{set:?}, undo, event {number}");
            course.judge_mark(&left, &what)?;
            expect_old_or_new(set.0, &left, &course, &what)?;
            let back = match left.undo_file() {
                Some(_) if is_over => Err(format!("{what}: the undo file comes back"))?,
                Some(name) => undone(&left, name, &what)?,
                None => left.x().to_vec(),
            };
            hold(back == course.old, || format!("{what}: not as it was"))
        })?;
    }
    Ok(cuts)
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
fn expect_old_or_new(version: u8, left: &Left, course: &Course, what: &str) -> Verdict {
    let (left, old, good) = (left.x(), &course.old[..], course.good.x());
    for index in 0..30 {
        let place = 64 + 4 * index..68 + 4 * index;
        let before = shown(version, old, index);
        if before.is_none() && left[place.clone()] == old[place] {
            continue;
        }
        let now = shown(version, left, index);
        let is_known = now == before || now == shown(version, good, index);
        hold(is_known, || {
            format!("{what}: cluster {index} shows neither")
        })?;
    }
    Ok(())
}

/// Every operation fails, once or from then on: the repair fails, and there are a way back and a
/// way on.
pub(crate) fn failing_host(kinds: &[Kind]) -> Result<u32, String> {
    let mut runs = 0;
    for set in SETS {
        let course = Course::of(set)?;
        for (kind, count) in course.stage.world().counts() {
            let count = if kinds.contains(&kind) { count } else { 0 };
            for (nth, for_ever) in (0..count).flat_map(|nth| [(nth, false), (nth, true)]) {
                let fault = Fault {
                    kind,
                    nth,
                    errno: libc::EIO,
                    for_ever,
                };
                let manners = Manners {
                    fault: Some(fault),
                    ..Manners::default()
                };
                let what = format!("{set:?}, {fault:?}");
                let stage = Stage::with(&Left::image(&course.old), manners);
                hold(stage.repair().is_err(), || format!("{what}: lost"))?;
                course.judge_way_back(&stage.left(), &what)?;
                course.judge_way_on(&stage.left(), &what)?;
                runs += 1;
            }
        }
    }
    Ok(runs)
}

/// A program writes a new cluster to the mended image, syncs, and is killed.
fn write_and_die(stage: &Stage) -> u64 {
    let (image, now) = (stage.x(), stage.left());
    let bytes = now.x();
    let hole = (0..29).find(|n| bytes[64 + 4 * n..68 + 4 * n] == [0; 4]);
    let place = 64 + 4 * hole.expect("half of it is mapped") as u64;
    let end = u32::try_from(bytes.len().div_ceil(4096)).expect("small");
    let start = u64::from(end) * 4096;
    let mark = ploopfs::format::header::IN_USE.to_le_bytes();
    image.write_at(at(44), &mark).expect("memory");
    image.write_at(at(start), &[7; 4096]).expect("memory");
    image
        .write_at(at(place), &end.to_le_bytes())
        .expect("memory");
    image.sync_data().expect("memory");
    start
}

fn refuses_undo(stage: &Stage, name: &str, what: &str) -> Verdict {
    let before = stage.left();
    hold(stage.undo(name).is_err(), || format!("{what}: undone"))?;
    let now = stage.left();
    hold(now == before, || format!("{what}: refused, and changed"))
}

/// What was written since a repair is never taken back.
pub(crate) fn written_since() -> Verdict {
    for names in [
        &["t-duplicate"][..],
        &["t-duplicate", "t-leak-tail"],
        &["t-straddle", "h-in-use"],
        &["h-in-use"],
        &["t-leak-tail"],
    ] {
        let course = Course::of((2, names))?;
        let name = course.good.undo_file().expect("something was changed");
        let stage = Stage::new(&course.good);
        write_and_die(&stage);
        refuses_undo(&stage, name, &format!("{names:?}, a new cluster"))?;
        // Killed at the last rename: the image is clean, and the undo file has its first name.
        let stage = Stage::new(&course.good);
        let renamed = stage.directory().rename(name, "x.repair");
        renamed.expect("it is there");
        let start = usize::try_from(write_and_die(&stage)).expect("small");
        refuses_undo(&stage, "x.repair", &format!("{names:?}, the first name"))?;
        let is_kept = |left: &Left| left.x().get(start..start + 4096) == Some(&[7; 4096][..]);
        let done = stage.repair().map_err(|e| format!("{names:?}: {e}"))?;
        hold(is_clean(&done.after), || format!("{names:?}: not mended"))?;
        hold(is_kept(&stage.left()), || format!("{names:?}: taken back"))?;
        if let Some(name) = done.undo {
            stage.undo(&name).map_err(|e| format!("{names:?}: {e}"))?;
            hold(is_kept(&stage.left()), || {
                format!("{names:?}: taken back too far")
            })?;
        }
    }
    written_in_place()
}

/// Copies, and what they were made from, are not undone once they were written to.
fn written_in_place() -> Verdict {
    let course = Course::of((2, &["t-duplicate"]))?;
    let (old, good) = (&course.old, course.good.x());
    let entry = |bytes: &[u8], n: usize| {
        u32::from_le_bytes(bytes[64 + 4 * n..68 + 4 * n].try_into().expect("four"))
    };
    let moved = (0..30).find(|n| entry(old, *n) != entry(good, *n));
    let moved = moved.expect("one entry was repointed");
    for target in [entry(good, moved), entry(old, moved)] {
        let stage = Stage::new(&course.good);
        let byte = u64::from(target) * 4096 + 77;
        stage.x().write_at(at(byte), &[0xa5]).expect("memory");
        let name = course.good.undo_file().expect("it was repaired");
        refuses_undo(&stage, name, "written in place")?;
    }
    let stage = Stage::new(&course.good);
    stage.directory().create_new("x.repair").expect("memory");
    let name = course.good.undo_file().expect("it was repaired");
    refuses_undo(&stage, name, "two undo files")
}

/// The image after a power cut when a repair has said that it is clean.
fn expect_clean_for_good(stage: &Stage, what: &str) -> Verdict {
    let done = stage.repair().map_err(|e| format!("{what}: {e}"))?;
    hold(is_clean(&done.after), || format!("{what}: not mended"))?;
    let mut dice = 5;
    for _ in 0..20 {
        let left = stage.cut_at(stage.moments(), &mut dice);
        let found = check_image(&MemStorage::new(left.x().to_vec()));
        let is_clean = found.is_ok_and(|found| is_clean(&found));
        hold(is_clean, || format!("{what}: clean, until the power fails"))?;
    }
    Ok(())
}

/// What a killed program wrote is in the host's cache, and perhaps nowhere else, for ever.
pub(crate) fn from_the_cache() -> Verdict {
    let sound = bytes_of((2, &[]));
    let closed = at(44);
    let stage = Stage::new(&Left::image(&bytes_of((2, &["h-in-use"]))));
    stage.x().write_at(closed, &sound[MARK]).expect("memory");
    expect_clean_for_good(&stage, "closed, and not synced")?;
    let bad = bytes_of((2, &["t-duplicate", "h-in-use"]));
    let stage = Stage::new(&Left::image(&bad));
    let table = 64..64 + 4 * 30;
    let written = stage.x().write_at(at(64), &sound[table]);
    written.expect("memory");
    stage.fail_sync();
    expect_clean_for_good(&stage, "a table whose sync has failed")
}

/// The sync of the undo file fails, and the program is killed: what the next one finds of the file
/// may be in the host's cache only.
pub(crate) fn from_a_cached_undo_file() -> Verdict {
    let set = (2, &["t-duplicate", "h-in-use"][..]);
    let course = Course::of(set)?;
    let mut dice = 9;
    let total = course.stage.world().total();
    for operations in 0..total {
        let fault = Fault {
            kind: Kind::Sync,
            // The first sync is that of the image.
            nth: 1,
            errno: libc::EIO,
            for_ever: false,
        };
        let manners = Manners {
            fault: Some(fault),
            ..Manners::default()
        };
        let stage = Stage::with(&Left::image(&course.old), manners);
        stage.world().kill_after(operations);
        hold(stage.repair().is_err(), || {
            "a failed sync was lost".to_owned()
        })?;
        stage.world().kill();
        let from = stage.moments();
        stage.world().mend();
        let done = stage.repair().map_err(|e| format!("after a kill: {e}"))?;
        hold(is_clean(&done.after), || "not mended".to_owned())?;
        stage.cut(from, 4, &mut dice, |number, _, left| {
            let what = format!("killed after {operations}, event {number}");
            course.judge_way_back(&left, &what)
        })?;
    }
    Ok(())
}
