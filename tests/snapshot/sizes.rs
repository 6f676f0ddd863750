//! Images of unequal sizes: who stays keeps its size, and nothing comes up from behind its end.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::Mapped;
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use crate::steps::{FORCED, create, delete, delete_with, line, merge};
use crate::world::{
    DESCRIPTOR, InMemory, Step, after, carry_out, described, expect_sound, like, load, shows,
};
use ploopfs::admin::bundle::Bundle;
use ploopfs::admin::progress::Progress;
use ploopfs::admin::snapshot::{self, Deleted, Losses, Upper};
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::format::guid::Guid;

type Change = Box<dyn Fn(&mut Bundle<'_>) -> Result<()>>;

/// A change that may lose something.
type Way = Box<dyn Fn(Losses) -> Change>;

/// Images of these sizes, in sectors, base first. Each maps about half of its clusters.
fn of_sizes(sizes: &[u64]) -> BundleSpec {
    let sizes = sizes.to_vec();
    BundleSpec::chain(Style::Ploop, &like(2), sizes.len(), move |level, image| {
        image.disk_sectors = sizes[level];
    })
}

/// What the image of a snapshot says of its size.
fn own_size(state: &Media, guid: Guid) -> u64 {
    let descriptor = described(state, "size");
    let images = descriptor.images(0, &[guid]).expect("an image");
    let bytes = state.bytes(&images[0].file).expect("it is there");
    u64::from_le_bytes(bytes[36..44].try_into().expect("eight bytes"))
}

#[test]
fn the_top_keeps_its_size() {
    let in_place = Upper {
        losses: FORCED,
        ..Upper::default()
    };
    let into_new = Upper {
        into_new: Some("merged.hds".to_owned()),
        ..in_place.clone()
    };
    for (lower, upper) in [
        (237, 400),
        (240, 400),
        (400, 237),
        (400, 240),
        (8 * 1100, 77),
        (77, 8 * 1000),
    ] {
        for how in [in_place.clone(), into_new.clone()] {
            let what = format!("{upper} sectors over {lower}, {:?}", how.into_new);
            let old = load(&of_sizes(&[lower, upper]));
            let before = shows(&old, &what);
            let new = after(&old, &merge(how));
            expect_sound(&new, true, &what);
            assert!(
                shows(&new, &what)[&Guid::NONE] == before[&Guid::NONE],
                "{what}"
            );
            let descriptor = described(&new, &what);
            assert_eq!(descriptor.disk_size.get(), upper, "{what}");
            assert_eq!(own_size(&new, descriptor.top), upper, "{what}");
            // The next snapshot finds nothing that contradicts.
            after(&new, &create(1));
        }
    }
}

/// Images, the base of them a plain file of 400 sectors.
fn over_longer_plain(sizes: &[u64]) -> BundleSpec {
    let mut spec = of_sizes(sizes);
    spec.parts[0].levels[0] = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 400 * 512,
    };
    spec
}

#[test]
fn a_plain_base_keeps_nothing_behind_the_end() {
    let old = load(&over_longer_plain(&[400, 237]));
    let before = shows(&old, "plain");
    let forced = Upper {
        losses: FORCED,
        ..Upper::default()
    };
    let new = after(&old, &merge(forced));
    assert!(shows(&new, "plain")[&Guid::NONE] == before[&Guid::NONE]);
    let descriptor = described(&new, "plain");
    let file = &descriptor.images(0, &[descriptor.top]).expect("it")[0].file;
    let bytes = new.bytes(file).expect("it is there");
    assert_eq!(bytes.len(), 240 * 512, "whole clusters");
    assert!(bytes[237 * 512..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_snapshot_keeps_its_size() {
    for (base, middle, top) in [(400, 237, 237), (400, 240, 237), (237, 400, 237)] {
        let what = format!("{base}, {middle}, {top}");
        let old = load(&of_sizes(&[base, middle, top]));
        let (chain, mut before) = (line(&old), shows(&old, &what));
        let new = after(&old, &delete_with(chain[0], FORCED));
        expect_sound(&new, true, &what);
        before.remove(&chain[0]);
        assert!(shows(&new, &what) == before, "{what}");
        assert_eq!(own_size(&new, chain[1]), middle, "{what}");
    }
}

/// The error of a change that leaves all as it is.
fn refusal(old: &Media, step: Step<'_>) -> Error {
    let host = SimDirectory::on(old);
    let error = carry_out(&host, step).expect_err("it is refused");
    let moments = host.world().moments().collect::<Vec<_>>();
    assert_eq!(moments.len(), 1, "{error}: something was done");
    error
}

/// All ways to merge a chain of three, the top of which is the smallest.
fn ways(old: &Media) -> Vec<(&'static str, Way)> {
    let chain = line(old);
    let merged = |all: bool, into_new: bool| {
        Box::new(move |losses| -> Change {
            Box::new(merge(Upper {
                all,
                into_new: into_new.then(|| "merged.hds".to_owned()),
                losses,
                ..Upper::default()
            }))
        }) as Way
    };
    let deleted =
        |guid| Box::new(move |losses| -> Change { Box::new(delete_with(guid, losses)) }) as Way;
    vec![
        ("the top", merged(false, false)),
        ("all", merged(true, false)),
        ("the top into a new file", merged(false, true)),
        ("all into a new file", merged(true, true)),
        ("the middle is deleted", deleted(chain[1])),
    ]
}

/// A smaller disk over larger ones: what they hold behind its end is lost only where that was said,
/// and the refusal says where it is.
#[test]
fn data_behind_the_end_is_not_lost_unasked() {
    let data = |size| over_longer_plain(&[400, size, 237]);
    let cases = [
        // The middle has no cluster there, and not all ways take the base.
        ("in the base", of_sizes(&[400, 237, 237]), 2),
        ("in the middle", of_sizes(&[237, 400, 237]), 5),
        ("in both", of_sizes(&[400, 400, 237]), 5),
        ("in a cluster that is cut", of_sizes(&[237, 240, 237]), 5),
        ("in a plain base", data(237), 2),
        ("in a plain base and above", data(400), 5),
    ];
    for (what, mut spec, expected) in cases {
        if let Level::Image(image) = &mut spec.parts[0].levels[1] {
            image.mapped = Mapped::All;
        }
        let old = load(&spec);
        let before = shows(&old, what);
        let mut refused = 0;
        for (how, way) in ways(&old) {
            let what = format!("{what}, {how}");
            let host = SimDirectory::on(&old);
            let losses = match carry_out(&host, &*way(Losses::default())) {
                Ok(()) => Losses::default(),
                Err(_) => {
                    refused += 1;
                    let error = refusal(&old, &*way(Losses::default()));
                    assert_eq!(error.kind(), ErrorKind::Usage, "{what}: {error}");
                    let fix = error.fix_text().expect("there is a way");
                    assert!(fix.contains("--force-discard"), "{what}: {fix}");
                    let end = format!("ends at byte {}", 237 * 512);
                    assert!(error.to_string().contains(&end), "{what}: {error}");
                    assert!(error.to_string().contains("root.hds"), "{what}: {error}");
                    FORCED
                }
            };
            let new = after(&old, &*way(losses));
            expect_sound(&new, true, &what);
            assert!(
                shows(&new, &what)[&Guid::NONE] == before[&Guid::NONE],
                "{what}"
            );
            let descriptor = described(&new, &what);
            if !how.contains("deleted") && described(&new, &what).parts[0].images.len() == 1 {
                let plain = new.bytes(&descriptor.parts[0].images[0].file);
                let is_plain = !plain.expect("it is there").starts_with(b"Witho");
                assert!(is_plain || own_size(&new, descriptor.top) == 237, "{what}");
            }
        }
        assert_eq!(refused, expected, "{what}");
    }
}

/// Where nothing is behind the end, larger images need no word: they become as small.
#[test]
fn a_larger_base_without_data_behind_the_end_is_cut() {
    let mut spec = of_sizes(&[8 * 1100, 400, 237]);
    for level in &mut spec.parts[0].levels {
        if let Level::Image(image) = level {
            image.mapped = Mapped::List((0..29).step_by(2).collect());
        }
    }
    let old = load(&spec);
    let before = shows(&old, "empty");
    for (how, way) in ways(&old) {
        let new = after(&old, &*way(Losses::default()));
        expect_sound(&new, true, how);
        assert!(
            shows(&new, how)[&Guid::NONE] == before[&Guid::NONE],
            "{how}"
        );
        assert_eq!(own_size(&new, described(&new, how).top), 237, "{how}");
    }
}

/// What is lost is told before.
#[test]
fn a_plan_tells_what_is_lost() {
    let mut spec = of_sizes(&[400, 237]);
    if let Level::Image(image) = &mut spec.parts[0].levels[0] {
        image.mapped = Mapped::List(vec![1, 40, 45]);
    }
    let host = SimDirectory::on(&load(&spec));
    let files = InMemory(host.clone());
    let bundle = Bundle::open(&host, DESCRIPTOR, &files).expect("it opens");
    let base = bundle.descriptor().snapshots[0].guid;
    let plan = snapshot::plan_delete(&bundle, base, FORCED).expect("it may");
    let Deleted::Merged(merged) = plan.what else {
        panic!("{plan:?}");
    };
    let [discard] = &merged.discards[..] else {
        panic!("{merged:?}");
    };
    assert_eq!(discard.file.to_str(), Some("root.hds"));
    assert!(discard.byte / 4096 == 40, "{discard:?}");
}

/// A disk that was made larger again by a program that does not mind what comes up.
#[test]
fn what_a_larger_disk_shows_through_stays() {
    let old = load(&of_sizes(&[400, 237, 400]));
    let (chain, before) = (line(&old), shows(&old, "through"));
    for losses in [Losses::default(), FORCED] {
        let refused = refusal(&old, &delete_with(chain[0], losses));
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        assert!(refused.to_string().contains("stands on it"), "{refused}");
    }
    let new = after(&old, &delete(chain[1]));
    assert!(shows(&new, "through")[&Guid::NONE] == before[&Guid::NONE]);
    // Without data there, nothing is lost.
    let mut empty = of_sizes(&[400, 237, 400]);
    if let Level::Image(image) = &mut empty.parts[0].levels[0] {
        image.mapped = Mapped::Every { step: 60, phase: 3 };
    }
    let old = load(&empty);
    let before = shows(&old, "empty");
    let new = after(&old, &delete(line(&old)[0]));
    assert!(shows(&new, "empty")[&Guid::NONE] == before[&Guid::NONE]);
}

/// What fails when the descriptor says already that all is done is no failure of the command.
#[test]
fn late_failures_are_told_and_not_reported() {
    let old = load(&of_sizes(&[237, 237, 237]));
    let base = line(&old)[0];
    let run = |host: &SimDirectory| {
        let files = InMemory(host.clone());
        let mut bundle = Bundle::open(host, DESCRIPTOR, &files).expect("it opens");
        snapshot::delete(&mut bundle, base, Losses::default(), &Progress::default())
    };
    let host = SimDirectory::on(&old);
    let (_, told) = run(&host).expect("nothing disturbs it");
    assert!(told.is_empty(), "{told:?}");
    let (good, moments) = (
        described(&host.media(), "good"),
        host.world().moments().collect::<Vec<_>>(),
    );
    let mut late = 0;
    for number in 0..moments.len() as u64 - 1 {
        let host = SimDirectory::on(&old);
        host.world().fail_after(number);
        if let Ok((_, told)) = run(&host) {
            late += 1;
            assert_eq!(described(&host.media(), "late").snapshots, good.snapshots);
            assert!(told[0].contains("stay until the next change"), "{told:?}");
        }
    }
    // The directory, the file, the directory again, the list, and the directory once more.
    assert_eq!(late, 5);
}
