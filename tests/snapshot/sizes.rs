//! Images of unequal sizes: who stays keeps its size, and nothing comes up from behind its end.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::Mapped;
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use crate::steps::{create, delete, line, merge};
use crate::world::{
    DESCRIPTOR, InMemory, after, carry_out, described, expect_sound, like, load, shows,
};
use ploopfs::admin::bundle::Bundle;
use ploopfs::admin::progress::Progress;
use ploopfs::admin::snapshot::{self, Upper};
use ploopfs::error::ErrorKind;
use ploopfs::format::guid::Guid;

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
    let into_new = Upper {
        into_new: Some("merged.hds".to_owned()),
        ..Upper::default()
    };
    for (lower, upper) in [
        (237, 400),
        (240, 400),
        (400, 237),
        (400, 240),
        (8 * 1100, 77),
        (77, 8 * 1000),
    ] {
        for how in [Upper::default(), into_new.clone()] {
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

#[test]
fn a_plain_base_keeps_nothing_behind_the_end() {
    let mut spec = of_sizes(&[400, 237]);
    spec.parts[0].levels[0] = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 400 * 512,
    };
    let old = load(&spec);
    let before = shows(&old, "plain");
    let new = after(&old, &merge(Upper::default()));
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
        let new = after(&old, &delete(chain[0]));
        expect_sound(&new, true, &what);
        before.remove(&chain[0]);
        assert!(shows(&new, &what) == before, "{what}");
        assert_eq!(own_size(&new, chain[1]), middle, "{what}");
    }
}

/// A disk that was made larger again by a program that does not mind what comes up.
#[test]
fn what_a_larger_disk_shows_through_stays() {
    let old = load(&of_sizes(&[400, 237, 400]));
    let (chain, before) = (line(&old), shows(&old, "through"));
    let host = SimDirectory::on(&old);
    let refused = carry_out(&host, &delete(chain[0])).expect_err("the top would lose something");
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    assert!(refused.to_string().contains("stands on it"), "{refused}");
    assert_eq!(
        host.world().moments().collect::<Vec<_>>().len(),
        1,
        "something was done"
    );
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
        snapshot::delete(&mut bundle, base, false, &Progress::default())
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
