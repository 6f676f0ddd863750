//! Any sequence of offline verbs on any small bundle, held against flat copies of what each
//! snapshot shows; and the same on bundles whose bytes were changed at random, where nothing is
//! known of the content, and only panics, endless loops and memory without a bound count.
//!
//! The bundle is made by the forge, and looked at by the dumb reader of `tests/snapshot`. In the
//! sound half the host may fail for ever from some operation on; then the verb is repeated on what
//! reads see, or on what a power cut leaves of it. README.md says how to run it.
#![no_main]

#[path = "../../tools/forge/mod.rs"]
mod forge;
#[path = "../../tests/sim/mod.rs"]
mod sim;
mod support;
#[path = "manage/verbs.rs"]
mod verbs;
#[path = "../../tests/snapshot/world.rs"]
#[allow(dead_code)]
mod world;

use forge::bundle::{BundleSpec, Style};
use forge::content::Level;
use forge::image::{ImageSpec, Layout, Mapped};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ploopfs::admin::progress::Progress;
use ploopfs::format::guid::Guid;
use sim::directory::SimDirectory;
use sim::media::Media;
use std::collections::BTreeMap;
use std::sync::OnceLock;
use support::dice::Dice;
use support::names::Names;
use verbs::{Changed, Step};
use world::{DESCRIPTOR, described, expect_sound, load, shows};

/// Verbs of one sequence.
const STEPS: usize = 10;
/// Levels of a part at first.
const DEPTHS: usize = 3;

/// What there is at first: each is made once.
fn bundles() -> &'static [Media] {
    static ALL: OnceLock<Vec<Media>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all = Vec::new();
        for depth in 1..=DEPTHS {
            for version in [1, 2] {
                all.push(load(&bundle(Style::Ploop, version, depth, 237)));
            }
            all.push(load(&bundle(Style::Parallels, 1, depth, 240)));
            let mut split = bundle(Style::Parallels, 1, depth, 80);
            split.push_part(
                bundle(Style::Parallels, 1, depth, 77)
                    .parts
                    .remove(0)
                    .levels,
            );
            all.push(load(&split));
            all.push(load(&world::over_plain(depth)));
        }
        all
    })
}

fn bundle(style: Style, version: u8, depth: usize, sectors: u64) -> BundleSpec {
    let level = |level: usize| {
        let mut image = ImageSpec::new(version, 8, sectors).mapping(Mapped::Percent(40));
        image.layout = [Layout::Packed, Layout::Shuffled(3), Layout::Gaps(1)][level % 3];
        image.garbage = true;
        Level::Image(image)
    };
    let mut spec = BundleSpec::new(style, (0..depth).map(level).collect());
    spec.top_guid = true;
    spec
}

/// What every snapshot shows; the top has the GUID of zeros.
type Shown = BTreeMap<Guid, Vec<u8>>;

/// Two disks, of which one may have become longer, show the same.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    let len = one.len().min(other.len());
    one[..len] == other[..len]
}

fn expect(media: &Media, expected: &Shown, closed: bool, what: &str) {
    expect_sound(media, closed, what);
    let now = shows(media, what);
    for (guid, bytes) in expected {
        let shown = now.get(guid);
        let shown = shown.unwrap_or_else(|| panic!("{what}: {guid} is gone"));
        assert!(is_same(bytes, shown), "{what}: {guid} shows something else");
    }
    let unknown = now.keys().find(|guid| !expected.contains_key(*guid));
    assert_eq!(unknown, None, "{what}");
}

/// What is to be seen after a verb that said what it did.
fn follow(expected: &mut Shown, changed: &Changed, media: &Media) {
    match changed {
        Changed::Nothing => {}
        Changed::Created(guid) => {
            expected.insert(*guid, expected[&Guid::NONE].clone());
        }
        Changed::Gone(gone) => expected.retain(|guid, _| !gone.contains(guid)),
        Changed::Switched(target, kept) => {
            if let Some(kept) = kept {
                expected.insert(*kept, expected[&Guid::NONE].clone());
            }
            expected.insert(Guid::NONE, expected[target].clone());
        }
        Changed::Resized => {
            let size = described(media, "resized").disk_size.get() as usize * 512;
            for bytes in expected.values_mut() {
                bytes.truncate(size);
            }
            // What the top shows of its new end is zeros; frozen snapshots may show what they had.
            expected
                .get_mut(&Guid::NONE)
                .expect("a top")
                .resize(size, 0);
        }
        Changed::Merged(gone) => expected.retain(|guid, _| !gone.contains(guid)),
        Changed::Converted(raw) => {
            let size = described(media, "converted").disk_size.get() as usize * 512;
            assert_eq!(raw.len(), size, "converted");
            // A snapshot that the disk went back to may be shorter than the disk is now.
            assert!(is_same(raw, &expected[&Guid::NONE]), "converted");
        }
    }
}

fn sound(media: &Media, steps: &[Step]) {
    let mut media = media.clone();
    let mut expected = shows(&media, "at first");
    for (number, step) in steps.iter().enumerate() {
        let what = format!("verb {number}, {step:?}");
        let host = SimDirectory::on(&media);
        if step.fails_after() < 60 {
            host.world().fail_after(step.fails_after().into());
        }
        let done = verbs::carry_out(&host, step, number, &Progress::default());
        media = host.media();
        match done {
            Ok(changed) => {
                follow(&mut expected, &changed, &media);
                expect(&media, &expected, true, &what);
            }
            Err(error) if host.world().failures().count > 0 => {
                let left = left(&media, step);
                let Some(now) = goes_on(left, step, number, &mut expected, &error.to_string())
                else {
                    return;
                };
                media = now;
            }
            // Refused: all is as it was.
            Err(error) => expect(&media, &expected, true, &format!("{what}: {error}")),
        }
        media = Media::of(&media.files(), media.trees());
    }
}

/// What the next process finds: what reads see, or what a power cut leaves.
fn left(media: &Media, step: &Step) -> Media {
    match step.is_cut() {
        true => media.cut(&mut u64::from(step.at).wrapping_mul(0x9e37_79b9)),
        false => Media::of(&media.files(), media.trees()),
    }
}

/// A verb that failed half-way is repeated. None where it was done already and cannot be.
fn goes_on(
    left: Media,
    step: &Step,
    number: usize,
    expected: &mut Shown,
    why: &str,
) -> Option<Media> {
    let what = format!("verb {number}, {step:?}, after {why}");
    expect_sound(&left, false, &what);
    for (guid, bytes) in &shows(&left, &what) {
        let known = expected.values().any(|known| is_same(known, bytes));
        assert!(known, "{what}: {guid} shows what nobody had");
    }
    let host = SimDirectory::on(&left);
    let again = verbs::carry_out(&host, step, number, &Progress::default());
    let media = host.media();
    let changed = again.ok()?;
    let is_gone = |guid: &Guid| !expected.contains_key(guid);
    if matches!(&changed, Changed::Switched(target, _) if is_gone(target)) {
        return None;
    }
    follow(expected, &changed, &media);
    // It may have been done, and have been done once more.
    let now = shows(&media, &what);
    if now.keys().ne(expected.keys()) {
        expect_sound(&media, true, &what);
        return None;
    }
    expect(&media, expected, true, &what);
    Some(media)
}

/// Bytes are changed, and nobody knows what that means.
fn hostile(media: &Media, damage: &[(u8, u16, u8)], steps: &[Step], seed: u64) {
    let host = Names::default();
    let mut dice = Dice(seed);
    let names = media.names();
    for name in &names {
        host.put(name, media.bytes(name).unwrap_or_default());
    }
    for (which, at, byte) in damage {
        let name = names[usize::from(*which >> 2) % names.len()];
        let len = media.bytes(name).map_or(0, <[u8]>::len) as u64;
        // Most of it in headers and tables.
        let at = match which & 3 {
            0 => u64::from(*at) % 64,
            1 => 64 + u64::from(*at) % 128,
            2 => u64::from(*at),
            _ => dice.below(len.max(1)),
        };
        if at < len {
            host.poke(name, at, *byte);
        }
    }
    if !names.contains(&DESCRIPTOR) {
        return;
    }
    for (number, step) in steps.iter().enumerate() {
        let _ = verbs::carry_out(&host, step, number, &Progress::default());
    }
}

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let (kind, mode, seed): (u8, u8, u16) = input.arbitrary()?;
    let media = &bundles()[usize::from(kind) % bundles().len()];
    let mut damage = Vec::new();
    for _ in 0..mode % 8 {
        damage.push(input.arbitrary()?);
    }
    let mut steps = Vec::new();
    while steps.len() < STEPS && !input.is_empty() {
        steps.push(input.arbitrary::<(u8, u8, u8)>()?.into());
    }
    match damage.is_empty() {
        true => sound(media, &steps),
        false => hostile(media, &damage, &steps, seed.into()),
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
