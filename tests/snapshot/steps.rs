//! What each change does to the tree, and that no snapshot shows anything else for it.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::{IN_USE, Mapped, V21};
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use crate::world::{
    DESCRIPTOR, after, carry_out, chain, described, expect_sound, like, load, over_plain,
    overwrite, shows, split,
};
use ploopfs::admin::bundle::Bundle;
use ploopfs::admin::progress::Progress;
use ploopfs::admin::snapshot::{self, Deleted, Losses, Names, Upper};
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::format::descriptor::edit::Edit;
use ploopfs::format::guid::Guid;

pub(crate) fn name(number: u8) -> Guid {
    Guid::from_bytes([number; 16])
}

pub(crate) fn names(number: u8) -> Names {
    Names {
        snapshot: name(number),
        file: name(number + 100),
    }
}

/// A warning is as good as a failure here: it must not get lost.
fn whole(warnings: &[String]) -> Result<()> {
    match warnings.first() {
        Some(warning) => Err(Error::why(ErrorKind::Host, warning.clone())),
        None => Ok(()),
    }
}

pub(crate) fn create(number: u8) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    move |bundle| whole(&snapshot::create(bundle, names(number))?.warnings)
}

pub(crate) fn switch(
    target: Guid,
    number: u8,
    keep: Option<Guid>,
) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    move |bundle| {
        let progress = Progress::default();
        let made = snapshot::switch(bundle, target, name(number + 100), keep, &progress)?;
        whole(&made.warnings)
    }
}

pub(crate) fn delete(target: Guid) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    delete_with(target, Losses::default())
}

pub(crate) fn delete_with(target: Guid, losses: Losses) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    move |bundle| whole(&snapshot::delete(bundle, target, losses, &Progress::default())?.1)
}

/// What is behind the end of the disk may go.
pub(crate) const FORCED: Losses = Losses {
    drop_bitmaps: false,
    force_discard: true,
};

pub(crate) fn merge(upper: Upper) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    move |bundle| whole(&snapshot::merge(bundle, &upper, &Progress::default())?.1)
}

/// As a deletion leaves it that was interrupted.
pub(crate) fn mark(target: Guid) -> impl Fn(&mut Bundle<'_>) -> Result<()> {
    move |bundle| Ok(bundle.replace(&[Edit::Mark(target)])?)
}

/// The snapshots from the base up to the top.
pub(crate) fn line(state: &Media) -> Vec<Guid> {
    let descriptor = described(state, "");
    descriptor.chain(descriptor.top).expect("a chain")
}

fn bundles(depth: usize) -> Vec<(&'static str, BundleSpec)> {
    let mut own = chain(Style::Ploop, 2, depth);
    own.top_predefined = false;
    vec![
        ("a top of another name", own),
        ("ploop, version 2", chain(Style::Ploop, 2, depth)),
        ("ploop, version 1", chain(Style::Ploop, 1, depth)),
        ("Parallels", chain(Style::Parallels, 1, depth)),
        ("split", split(depth)),
        ("plain", over_plain(depth)),
    ]
}

#[test]
fn a_new_snapshot_shows_what_the_disk_did() {
    for depth in [1, 3] {
        for (what, spec) in bundles(depth) {
            let old = load(&spec);
            let before = shows(&old, what);
            let new = after(&old, &create(1));
            let mut expected = before.clone();
            expected.insert(name(1), before[&Guid::NONE].clone());
            assert!(shows(&new, what) == expected, "{what}");
            expect_sound(&new, true, what);
            let parts = described(&old, what).parts.len();
            assert_eq!(new.names().len(), old.names().len() + parts, "{what}");
            assert_eq!(described(&new, what).top, described(&old, what).top);
            let again = after(&new, &create(2));
            expected.insert(name(2), before[&Guid::NONE].clone());
            assert!(shows(&again, what) == expected, "{what}, twice");
        }
    }
}

#[test]
fn files_are_named_as_their_neighbours_are() {
    let file = |spec: &BundleSpec| {
        let new = after(&load(spec), &create(1));
        let descriptor = described(&new, "");
        let images = descriptor.images(0, &[descriptor.top]).expect("an image");
        images[0].file.clone()
    };
    let guid = name(101);
    assert_eq!(file(&chain(Style::Ploop, 2, 1)), format!("root.hds.{guid}"));
    assert_eq!(file(&chain(Style::Ploop, 2, 3)), format!("root.hds.{guid}"));
    let desktop = file(&chain(Style::Parallels, 1, 2));
    assert_eq!(desktop, format!("disk.hdd.0.{guid}.hds"));
}

#[test]
fn the_disk_goes_back_to_a_snapshot() {
    for (what, spec) in bundles(3) {
        let old = load(&spec);
        let before = shows(&old, what);
        for target in line(&old).into_iter().take(2) {
            for keep in [None, Some(name(9))] {
                let new = after(&old, &switch(target, 1, keep));
                let mut expected = before.clone();
                if let Some(kept) = keep {
                    expected.insert(kept, before[&Guid::NONE].clone());
                }
                expected.insert(Guid::NONE, before[&target].clone());
                assert!(shows(&new, what) == expected, "{what}, {target}, {keep:?}");
                expect_sound(&new, true, what);
                let parts = described(&old, what).parts.len();
                let more = if keep.is_some() { parts } else { 0 };
                assert_eq!(new.names().len(), old.names().len() + more, "{what}");
            }
        }
    }
}

#[test]
fn a_snapshot_that_goes_leaves_all_others_as_they_were() {
    for (what, spec) in bundles(4) {
        let old = load(&spec);
        let before = shows(&old, what);
        for target in line(&old).into_iter().take(3) {
            let new = after(&old, &delete(target));
            let mut expected = before.clone();
            expected.remove(&target);
            let what = format!("{what}, {target}");
            assert!(shows(&new, &what) == expected, "{what}");
            expect_sound(&new, true, &what);
            let parts = described(&old, &what).parts.len();
            assert_eq!(new.names().len(), old.names().len() - parts, "{what}");
        }
    }
}

#[test]
fn a_snapshot_of_several_children_goes_with_the_last_but_one() {
    let old = load(&chain(Style::Ploop, 2, 3));
    let base = line(&old)[0];
    // Three children of the base: what was its child, the top that was kept, and the new top.
    let forked = after(&old, &switch(base, 1, Some(name(9))));
    let before = shows(&forked, "forked");
    let marked = after(&forked, &delete(base));
    let mut expected = before.clone();
    expected.remove(&base);
    assert!(shows(&marked, "marked") == expected);
    assert_eq!(marked.names(), forked.names());
    let refused = carry_out(&SimDirectory::on(&marked), &switch(base, 2, None));
    assert_eq!(
        refused.expect_err("it goes").kind(),
        ErrorKind::NoSuchSnapshot
    );
    // Marked twice is marked once.
    let text = |state: &Media| state.bytes(DESCRIPTOR).map(<[u8]>::to_vec);
    assert_eq!(text(&after(&marked, &delete(base))), text(&marked));
    // What was its child is between it and the kept one.
    let left = after(&marked, &delete(name(9)));
    expected.remove(&name(9));
    assert!(shows(&left, "left") == expected);
    assert_eq!(described(&left, "").snapshots.len(), 3);
    let child = described(&left, "")
        .snapshots
        .iter()
        .find(|shot| shot.parent == Some(base) && shot.guid != Guid::TOP)
        .map(|shot| shot.guid);
    let child = child.expect("the other child");
    let last = after(&left, &delete(child));
    expected.remove(&child);
    assert!(shows(&last, "last") == expected);
    assert_eq!(described(&last, "").snapshots.len(), 1, "the base went too");
    assert_eq!(last.names().len(), 2);
    expect_sound(&last, true, "last");
}

#[test]
fn the_top_merges_down_and_so_does_everything() {
    for (what, spec) in bundles(4) {
        let old = load(&spec);
        let before = shows(&old, what);
        let chain = line(&old);
        let upper = Upper::default();
        let new = after(&old, &merge(upper));
        let mut expected = before.clone();
        expected.remove(&chain[2]);
        assert!(shows(&new, what) == expected, "{what}, the top");
        let upper = Upper {
            snapshot: Some(chain[2]),
            ..Upper::default()
        };
        let new = after(&old, &merge(upper));
        let mut expected = before.clone();
        expected.remove(&chain[1]);
        assert!(shows(&new, what) == expected, "{what}, the middle");
        let upper = Upper {
            all: true,
            ..Upper::default()
        };
        let new = after(&old, &merge(upper));
        let only = shows(&new, what);
        assert_eq!(only.len(), 1, "{what}");
        assert!(only[&Guid::NONE] == before[&Guid::NONE], "{what}, all");
        expect_sound(&new, true, what);
        assert_eq!(described(&new, what).top, described(&old, what).top);
    }
}

#[test]
fn the_result_may_be_a_new_file() {
    for (what, spec) in bundles(3) {
        let old = load(&spec);
        let before = shows(&old, what);
        for all in [false, true] {
            let upper = Upper {
                into_new: Some("merged.hds".to_owned()),
                all,
                ..Upper::default()
            };
            let new = after(&old, &merge(upper));
            let mut expected = before.clone();
            let gone = if all { 2 } else { 1 };
            for guid in line(&old).iter().rev().skip(1).take(gone) {
                expected.remove(guid);
            }
            assert!(shows(&new, what) == expected, "{what}, {all}");
            expect_sound(&new, true, what);
            let made: &[&str] = match what {
                "split" => &["merged.0.hds", "merged.1.hds"],
                _ => &["merged.hds"],
            };
            let left = old.names().len() - gone * made.len();
            assert_eq!(new.names().len(), left, "{what}");
            assert!(made.iter().all(|name| new.names().contains(name)), "{what}");
        }
    }
}

fn refusal(spec: &BundleSpec, step: crate::world::Step<'_>) -> ErrorKind {
    let old = load(spec);
    refusal_of(&old, step)
}

fn refusal_of(old: &Media, step: crate::world::Step<'_>) -> ErrorKind {
    let host = SimDirectory::on(old);
    let error = carry_out(&host, step).expect_err("it is refused");
    assert_eq!(
        host.world().moments().collect::<Vec<_>>().len(),
        1,
        "{error}: something was done"
    );
    error.kind()
}

#[test]
fn what_is_not_sure_is_refused_and_left_alone() {
    let mut marked = chain(Style::Ploop, 2, 2);
    if let Level::Image(image) = &mut marked.parts[0].levels[1] {
        image.mark = IN_USE;
    }
    let base = line(&load(&marked))[0];
    let top = Upper::default;
    assert_eq!(refusal(&marked, &create(1)), ErrorKind::InUse);
    assert_eq!(refusal(&marked, &delete(base)), ErrorKind::InUse);
    assert_eq!(refusal(&marked, &merge(top())), ErrorKind::InUse);
    assert_eq!(
        refusal(&marked, &switch(base, 1, Some(name(2)))),
        ErrorKind::InUse
    );
    let sound = chain(Style::Ploop, 2, 3);
    let chain_of = line(&load(&sound));
    assert_eq!(refusal(&sound, &delete(Guid::TOP)), ErrorKind::Usage);
    assert_eq!(refusal(&sound, &delete(name(5))), ErrorKind::NoSuchSnapshot);
    assert_eq!(
        refusal(&sound, &switch(Guid::TOP, 1, None)),
        ErrorKind::Usage
    );
    let into_base = Upper {
        snapshot: Some(chain_of[0]),
        ..Upper::default()
    };
    assert_eq!(refusal(&sound, &merge(into_base)), ErrorKind::Usage);
    for bad in ["../x", "DiskDescriptor.xml.y", "root.hds", ""] {
        let into_new = Upper {
            into_new: Some(bad.to_owned()),
            ..Upper::default()
        };
        assert_eq!(refusal(&sound, &merge(into_new)), ErrorKind::Usage, "{bad}");
    }
    // A branch needs what all of the chain would lose.
    let forked = after(&load(&sound), &switch(chain_of[0], 1, Some(name(9))));
    let all = Upper {
        all: true,
        ..Upper::default()
    };
    assert_eq!(refusal_of(&forked, &merge(all)), ErrorKind::Usage);
    assert_eq!(refusal_of(&forked, &create(9)), ErrorKind::Usage);
    // A bitmap of the top is lost on request only.
    let mut with_bitmap = chain(Style::Ploop, 2, 2);
    if let Level::Image(image) = &mut with_bitmap.parts[0].levels[1] {
        image.mark = V21;
        image.bitmap = Some(crate::forge::extension::BitmapSpec::new(vec![0, 3]));
    }
    assert_eq!(
        refusal(&with_bitmap, &merge(top())),
        ErrorKind::BitmapPresent
    );
    let losses = Losses {
        drop_bitmaps: true,
        ..Losses::default()
    };
    let drop = Upper {
        losses,
        ..Upper::default()
    };
    let new = after(&load(&with_bitmap), &merge(drop));
    expect_sound(&new, true, "bitmap");
}

#[test]
fn an_exchange_that_ploop_has_begun_is_left_alone() {
    let old = load(&chain(Style::Ploop, 2, 3));
    let host = SimDirectory::on(&old);
    let text = String::from_utf8(old.bytes(DESCRIPTOR).expect("there").to_vec()).expect("XML");
    let marked = text.replacen("</Shot>", "<TemporaryZero/></Shot>", 1);
    overwrite(&host, DESCRIPTOR, marked.as_bytes());
    let state = host.media();
    let base = line(&state)[0];
    for step in [
        &create(1) as crate::world::Step<'_>,
        &switch(base, 1, None),
        &delete(base),
        &merge(Upper::default()),
    ] {
        assert_eq!(refusal_of(&state, step), ErrorKind::Unsupported);
    }
}

#[test]
fn a_top_that_was_guessed_is_named() {
    let mut spec = chain(Style::Ploop, 2, 2);
    (spec.top_guid, spec.top_predefined) = (false, false);
    let old = load(&spec);
    let before = shows(&old, "guessed");
    let new = after(&old, &switch(line(&old)[0], 1, Some(name(9))));
    assert_eq!(described(&new, "named").top, Guid::TOP);
    let now = shows(&new, "named");
    assert!(now[&name(9)] == before[&Guid::NONE]);
    assert!(now[&Guid::NONE] == before[&line(&old)[0]]);
}

#[test]
fn images_that_do_not_belong_together_are_refused() {
    let other = BundleSpec::chain(Style::Ploop, &like(2), 2, |level, image| {
        if level == 0 {
            image.cluster_sectors = 16;
        }
    });
    let base = line(&load(&other))[0];
    assert_eq!(refusal(&other, &delete(base)), ErrorKind::Descriptor);
    // Mixed versions are merged all the same, each read in its own way.
    for first in [1, 2] {
        let mixed = BundleSpec::chain(Style::Ploop, &like(2), 2, |level, image| {
            image.version = if level == 0 { first } else { 3 - first };
        });
        let old = load(&mixed);
        let before = shows(&old, "mixed");
        let new = after(&old, &merge(Upper::default()));
        let now = shows(&new, "mixed");
        assert!(now[&Guid::NONE] == before[&Guid::NONE], "{first}");
        expect_sound(&new, true, "mixed");
    }
}

#[test]
fn a_plan_tells_what_will_be_and_does_nothing() {
    let old = load(&chain(Style::Ploop, 2, 3));
    let host = SimDirectory::on(&old);
    let files = crate::world::InMemory(host.clone());
    let bundle = Bundle::open(&host, DESCRIPTOR, &files).expect("it opens");
    let middle = line(&old)[1];
    let plan = snapshot::plan_delete(&bundle, middle, Losses::default()).expect("it can go");
    let (Deleted::Merged(merged), None) = (&plan.what, &plan.then) else {
        panic!("{plan:?}");
    };
    assert_eq!(merged.gone, [middle]);
    assert_eq!(merged.survivor, Guid::TOP);
    assert!(merged.amount.clusters > 5 && merged.amount.fresh < merged.amount.clusters);
    assert_eq!(host.world().moments().collect::<Vec<_>>().len(), 1);
    let all = like(2).mapping(Mapped::All);
    let over = BundleSpec::chain(Style::Ploop, &all, 2, |_, _| {});
    let host = SimDirectory::on(&load(&over));
    let files = crate::world::InMemory(host.clone());
    let bundle = Bundle::open(&host, DESCRIPTOR, &files).expect("it opens");
    let plan = snapshot::plan_merge(&bundle, &Upper::default()).expect("it can");
    let amount = (plan.amount.clusters, plan.amount.fresh, plan.amount.bytes);
    assert_eq!(amount, (30, 0, 237 * 512));
}
