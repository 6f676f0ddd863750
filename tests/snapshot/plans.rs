//! What a deletion brings with it is told before, and whatever refuses that refuses all.

use crate::forge::bundle::{BundleSpec, Style};
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use crate::steps::{FORCED, delete_with, line, mark, name, switch};
use crate::world::{
    DESCRIPTOR, InMemory, after, carry_out, chain, described, expect_sound, like, load, overwrite,
    shows,
};
use ploopfs::admin::bundle::Bundle;
use ploopfs::admin::progress::Progress;
use ploopfs::admin::snapshot::{self, Deleted, Deletion, Losses, plan_switch};
use ploopfs::error::{ErrorKind, Result};
use ploopfs::format::guid::Guid;

/// Plans in a directory in memory, where nothing may happen for that.
fn plan<T>(old: &Media, plan: impl FnOnce(&Bundle<'_>) -> Result<T>) -> Result<T> {
    let host = SimDirectory::on(old);
    let files = InMemory(host.clone());
    let bundle = Bundle::open(&host, DESCRIPTOR, &files).expect("it opens");
    let told = plan(&bundle);
    let moments = host.world().moments().collect::<Vec<_>>();
    assert_eq!(moments.len(), 1, "a plan has changed something");
    told
}

fn plan_of(old: &Media, target: Guid, losses: Losses) -> Result<Deletion> {
    plan(old, |bundle| snapshot::plan_delete(bundle, target, losses))
}

/// Carries the deletion out: it does what was planned, and no file goes of which nothing was told.
fn does_as_planned(old: &Media, target: Guid, losses: Losses) -> (Deletion, Media) {
    let told = plan_of(old, target, losses).expect("it can go");
    let host = SimDirectory::on(old);
    let files = InMemory(host.clone());
    let mut bundle = Bundle::open(&host, DESCRIPTOR, &files).expect("it opens");
    let done = snapshot::delete(&mut bundle, target, losses, &Progress::default());
    let (done, warnings) = done.expect("it can go");
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(done, told);
    let new = host.media();
    let mut gone: Vec<String> = match &told.what {
        Deleted::Dropped { files, .. } => files.clone(),
        Deleted::Merged(merged) => merged.files.clone(),
        Deleted::Marked { .. } => Vec::new(),
    };
    gone.extend(told.then.iter().flat_map(|merged| merged.files.clone()));
    let names = |state: &Media| -> Vec<String> {
        state
            .names()
            .iter()
            .map(|name| (*name).to_owned())
            .collect()
    };
    let (mut left, now) = (names(old), names(&new));
    left.retain(|name| !gone.contains(name));
    assert_eq!(left, now, "{told:?}");
    expect_sound(&new, true, "as planned");
    (told, new)
}

/// A base that is marked and has two children: the snapshot 9, and the top. And the base.
fn waiting(sizes: [u64; 2]) -> (Media, Guid) {
    let spec = BundleSpec::chain(Style::Ploop, &like(2), 2, |level, image| {
        image.disk_sectors = sizes[level];
    });
    let old = load(&spec);
    let base = line(&old)[0];
    let forked = after(&old, &switch(base, 1, Some(name(9))));
    (after(&forked, &delete_with(base, Losses::default())), base)
}

#[test]
fn what_goes_after_a_leaf_is_planned() {
    let (old, base) = waiting([237, 237]);
    let before = shows(&old, "before");
    let (told, new) = does_as_planned(&old, name(9), Losses::default());
    let Deleted::Dropped { gone, files } = told.what else {
        panic!("{told:?}");
    };
    assert_eq!((gone, files.len()), (vec![name(9)], 1));
    let then = told.then.expect("the base goes too");
    assert_eq!((then.gone, then.survivor), (vec![base], Guid::TOP));
    // The top is empty.
    assert_eq!((then.amount.clusters, then.files.len()), (0, 1));
    assert!(shows(&new, "after")[&Guid::NONE] == before[&Guid::NONE]);
    assert_eq!(described(&new, "after").snapshots.len(), 1);
}

#[test]
fn what_refuses_the_second_step_refuses_the_first() {
    let expect = |old: &Media, losses: Losses, kind: ErrorKind| {
        let error = plan_of(old, name(9), losses).expect_err("it is refused");
        assert_eq!(error.kind(), kind, "{error}");
        let host = SimDirectory::on(old);
        let error = carry_out(&host, &delete_with(name(9), losses)).expect_err("it is refused");
        assert_eq!(error.kind(), kind, "{error}");
        let moments = host.world().moments().collect::<Vec<_>>();
        assert_eq!(moments.len(), 1, "{error}: something was done");
        let why = error.to_string();
        assert!(why.contains("was marked, is to go with it"), "{why}");
        assert!(error.place().path.is_some(), "{why}");
        assert!(error.fix_text().is_some(), "{why}");
    };
    // Data behind the end of the only child that is left.
    let (old, _) = waiting([400, 237]);
    expect(&old, Losses::default(), ErrorKind::Usage);
    let (told, _) = does_as_planned(&old, name(9), FORCED);
    assert_eq!(told.then.map(|merged| merged.discards.len()), Some(1));
    // Dirty bitmaps of that child.
    let (old, _) = waiting([237, 237]);
    let descriptor = described(&old, "top");
    let top = &descriptor.images(0, &[descriptor.top]).expect("an image")[0].file;
    let mut bytes = old.bytes(top).expect("it is there").to_vec();
    bytes[44..48].copy_from_slice(b"v2.1");
    bytes[56..64].copy_from_slice(&8_u64.to_le_bytes());
    let host = SimDirectory::on(&old);
    overwrite(&host, top, &bytes);
    expect(&host.media(), Losses::default(), ErrorKind::BitmapPresent);
    // Wrong entries of what is to be merged.
    let (old, base) = waiting([237, 237]);
    let file = &described(&old, "base")
        .images(0, &[base])
        .expect("an image")[0]
        .file
        .clone();
    let mut bytes = old.bytes(file).expect("it is there").to_vec();
    bytes[64..68].fill(0xfe);
    let host = SimDirectory::on(&old);
    overwrite(&host, file, &bytes);
    expect(&host.media(), Losses::default(), ErrorKind::Corrupt);
}

/// Deletions that were interrupted are completed with the next one above them.
#[test]
fn interrupted_deletions_below_are_planned() {
    let old = load(&chain(Style::Ploop, 2, 4));
    let (guids, before) = (line(&old), shows(&old, "before"));
    let mut marked = after(&old, &mark(guids[0]));
    // In one merge with what is deleted.
    let (told, new) = does_as_planned(&marked, guids[1], Losses::default());
    let Deleted::Merged(merged) = &told.what else {
        panic!("{told:?}");
    };
    assert_eq!((&merged.gone[..], merged.survivor), (&guids[..2], guids[2]));
    assert!(told.then.is_none() && merged.files.len() == 2);
    let after_it = shows(&new, "after");
    assert!(after_it[&guids[2]] == before[&guids[2]]);
    assert!(after_it[&Guid::NONE] == before[&Guid::NONE]);
    // Into what is only marked itself.
    marked = after(&marked, &switch(guids[2], 1, Some(name(9))));
    let (told, _) = does_as_planned(
        &after(&marked, &mark(guids[1])),
        guids[2],
        Losses::default(),
    );
    assert!(
        matches!(told.what, Deleted::Marked { children: 2 }),
        "{told:?}"
    );
    let then = told.then.expect("both go");
    assert_eq!((&then.gone[..], then.survivor), (&guids[..2], guids[2]));
    // And what had no other child goes with a leaf.
    let forked = after(&old, &switch(guids[1], 1, Some(name(9))));
    let forked = after(&forked, &mark(guids[2]));
    let (told, _) = does_as_planned(&forked, name(9), Losses::default());
    let Deleted::Dropped { gone, files } = &told.what else {
        panic!("{told:?}");
    };
    assert_eq!((&gone[..], files.len()), (&[guids[2], name(9)][..], 2));
    assert!(told.then.is_none(), "{told:?}");
}

/// With the old top goes what has waited for that.
#[test]
fn what_goes_with_a_switch_is_planned() {
    let (old, base) = waiting([237, 237]);
    let look = |old: &Media, keep| {
        let planned = plan(old, |bundle| plan_switch(bundle, name(9), name(3), keep));
        planned.expect("it can be done")
    };
    assert_eq!(look(&old, Some(name(4))), snapshot::Switched::default());
    let told = look(&old, None);
    let then = told.then.expect("the base goes");
    let Deleted::Merged(merged) = &then.what else {
        panic!("{then:?}");
    };
    assert_eq!((&merged.gone[..], merged.survivor), (&[base][..], name(9)));
    assert!(told.warnings.is_empty());
    let new = after(&old, &switch(name(9), 2, None));
    assert_eq!(described(&new, "switched").snapshots.len(), 2);
    // What cannot go stays, and that is told.
    let (old, base) = waiting([400, 237]);
    let told = look(&old, None);
    assert!(told.then.is_none());
    assert!(told.warnings[0].contains("--force-discard"), "{told:?}");
    let host = SimDirectory::on(&old);
    let warned = carry_out(&host, &switch(name(9), 2, None)).expect_err("there is a warning");
    assert!(warned.to_string().contains("is still there"), "{warned}");
    let descriptor = described(&host.media(), "switched");
    assert!(descriptor.snapshots.iter().any(|shot| shot.guid == base));
}
