//! What changes a disk: `compact`, `resize`, `repair`, `merge`.

use crate::course::{Act, Course, Rule};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use crate::sim::storage::Manners;
use crate::world::{DESCRIPTOR, InMemory, load, load_changed};
use ploopfs::admin::bundle::Bundle;
use ploopfs::admin::compact::{self, compact_image};
use ploopfs::admin::progress::Progress;
use ploopfs::admin::repair::{KeepOld, repair_image_with};
use ploopfs::admin::resize::disk::describe;
use ploopfs::admin::resize::{self, Place, resize_image, resize_plain};
use ploopfs::admin::snapshot::{self, Upper};
use ploopfs::delta::image::Image;
use ploopfs::error::Result;
use ploopfs::format::descriptor::Descriptor;
use ploopfs::plan::repair::Policy;
use ploopfs::storage::{Directory, SharedStorage, Storage};
use ploopfs::units::{FileOffset, SectorCount};
use std::path::Path;

/// Sectors of every disk here.
const SECTORS: u64 = 400;

pub(crate) fn courses() -> Vec<Course> {
    let mut all = compactions();
    all.extend(resizes());
    all.extend(repairs());
    all.extend(merges());
    all
}

/// Clusters of 4 KiB, of which those in the first half may have a place: the end is empty.
fn image(version: u8, level: u64, sectors: u64) -> ImageSpec {
    let mapped = (0..sectors / 16)
        .filter(|cluster| cluster % (level + 2) == 1)
        .collect();
    let mut spec = ImageSpec::new(version, 8, sectors).mapping(Mapped::List(mapped));
    spec.layout = Layout::Gaps(1);
    spec
}

/// A kind of disk, of which each image can still be given another shape.
fn bundle(kind: &str, shape: impl Fn(&mut ImageSpec)) -> BundleSpec {
    let levels = |count: u64, version, sectors| {
        let all = (0..count).map(|level| {
            let mut spec = image(version, level, sectors);
            shape(&mut spec);
            Level::Image(spec)
        });
        all.collect::<Vec<_>>()
    };
    let mut spec = match kind {
        "single v1" => BundleSpec::new(Style::Ploop, levels(1, 1, SECTORS)),
        "single v2" => BundleSpec::new(Style::Ploop, levels(1, 2, SECTORS)),
        "chain" => BundleSpec::new(Style::Ploop, levels(3, 2, SECTORS)),
        "Parallels" => BundleSpec::new(Style::Parallels, levels(2, 1, SECTORS)),
        "split" => BundleSpec::new(Style::Parallels, levels(2, 1, 160)),
        _ => {
            let plain = Level::Plain {
                seed: 5,
                level: 0,
                bytes: SECTORS * 512,
            };
            let images = levels(u64::from(kind == "plain base") * 2, 2, SECTORS);
            let levels = std::iter::once(plain).chain(images).collect();
            BundleSpec::new(Style::Ploop, levels)
        }
    };
    if kind == "split" {
        spec.push_part(levels(2, 1, SECTORS - 160));
    }
    spec.top_guid = true;
    spec
}

fn described(host: &SimDirectory) -> Result<Descriptor> {
    let text = host.open(DESCRIPTOR, false)?;
    let mut bytes = vec![0; usize::try_from(text.len()?.get()).expect("small")];
    text.read_at(FileOffset::ZERO, &mut bytes)?;
    Ok(Descriptor::parse(&bytes).expect("a descriptor is never torn"))
}

/// The lower images of a part's chain, and its top.
fn opened(host: &SimDirectory, part: usize) -> Result<(Vec<Image>, SharedStorage)> {
    let descriptor = described(host)?;
    let chain = descriptor.chain(descriptor.top).expect("a chain");
    let images = descriptor.images(part, &chain).expect("images");
    let (top, below) = images.split_last().expect("a top");
    let mut lower = Vec::new();
    for image in below {
        let storage = host.open(&image.file, false)?;
        let path = Path::new(&image.file);
        lower.push(match is_plain(&*storage)? {
            true => Image::plain(path, storage)?,
            false => Image::expanding(path, storage)?,
        });
    }
    Ok((lower, host.open(&top.file, true)?))
}

fn is_plain(storage: &dyn Storage) -> Result<bool> {
    let mut magic = [0; 5];
    storage.read_at(FileOffset::ZERO, &mut magic)?;
    Ok(&magic != b"Witho")
}

fn course(verb: &'static str, kind: String, old: Media, act: Box<Act>) -> Course {
    Course {
        verb,
        kind,
        old,
        rule: Rule::Changes,
        manners: Manners::default(),
        act,
    }
}

/// The first data cluster of each image becomes zeros.
fn blanked(spec: &BundleSpec) -> Media {
    load_changed(spec, |path| {
        for (part, levels) in spec.parts.iter().enumerate() {
            for (number, level) in levels.levels.iter().enumerate() {
                let Level::Image(image) = level else {
                    continue;
                };
                let name = spec.file_name("disk.hdd", part, number);
                let (_, slot) = image.slots()[0];
                let at = image.slot_at(slot) as usize;
                let mut bytes = std::fs::read(path.join(&name)).expect("it was made");
                bytes[at..at + 4096].fill(0);
                std::fs::write(path.join(&name), bytes).expect("it can be written");
            }
        }
    })
}

fn compactions() -> Vec<Course> {
    let modes = [
        ("", false, false, false),
        (", zeroes", true, false, false),
        (", defrag", false, true, false),
        (", zeroes defrag", true, true, false),
        (", fill holes", false, false, true),
    ];
    let mut all = Vec::new();
    for kind in ["single v1", "single v2", "chain", "split", "plain base"] {
        for (mode, zeroes, defrag, fill_holes) in modes {
            let spec = bundle(kind, |image| {
                if defrag {
                    image.layout = Layout::Reversed;
                }
            });
            let request = compact::Request {
                zeroes,
                defrag,
                fill_holes,
                batch_bytes: 8192,
                ..compact::Request::default()
            };
            let act = move |host: &SimDirectory, progress: &Progress| {
                for part in 0..described(host)?.parts.len() {
                    let (lower, top) = opened(host, part)?;
                    compact_image(&*top, &lower, &request, progress)?;
                }
                Ok(())
            };
            let old = blanked(&spec);
            all.push(course(
                "compact",
                format!("{kind}{mode}"),
                old,
                Box::new(act),
            ));
        }
    }
    all
}

/// The last part of a disk gets a size with which the whole has this one.
fn resize_to(sectors: u64) -> Box<Act> {
    Box::new(move |host, progress| {
        let descriptor = described(host)?;
        let part = descriptor.parts.last().expect("a part");
        let (start, own) = (part.start.get(), part.end.get() - part.start.get());
        let (lower, top) = opened(host, descriptor.parts.len() - 1)?;
        let request = resize::Request {
            shrink: true,
            batch_bytes: 8192,
            ..resize::Request::new(SectorCount::new(sectors - start))
        };
        // Here and in the product: what was left of an interrupted change goes first.
        let mut tell =
            |size: SectorCount| describe(host, DESCRIPTOR, SectorCount::new(start + size.get()));
        if is_plain(&*top)? {
            let place = Place {
                size: SectorCount::new(own),
                unit: SectorCount::new(1),
            };
            return resize_plain(&*top, place, &request, &mut tell).map(drop);
        }
        resize_image(&*top, &lower, &request, progress, &mut tell).map(drop)
    })
}

fn resizes() -> Vec<Course> {
    let mut all = Vec::new();
    for kind in [
        "single v1",
        "single v2",
        "chain",
        "split",
        "plain base",
        "plain",
    ] {
        for (what, sectors) in [("grows", 8 * 1100), ("grows little", 464), ("shrinks", 304)] {
            if matches!(kind, "plain base" | "plain") && what == "shrinks" {
                // Its data reaches to the end.
                continue;
            }
            // Packed, so that a longer table takes the place of data.
            let old = load(&bundle(kind, |image| image.layout = Layout::Packed));
            all.push(course(
                "resize",
                format!("{kind} {what}"),
                old,
                resize_to(sectors),
            ));
        }
    }
    all
}

fn repair_all(host: &SimDirectory, progress: &Progress) -> Result<()> {
    for image in described(host)?.parts.iter().flat_map(|part| &part.images) {
        let storage = host.open(&image.file, true)?;
        if is_plain(&*storage)? {
            continue;
        }
        let keep = KeepOld::In {
            directory: host,
            image: &image.file,
        };
        repair_image_with(&*storage, keep, &Policy::default(), progress)?;
    }
    Ok(())
}

fn repairs() -> Vec<Course> {
    let damage = [
        ("not closed, leaks", &["h-in-use", "t-leak-tail"][..]),
        ("shared cluster", &["t-duplicate"][..]),
    ];
    let mut all = Vec::new();
    for kind in ["single v1", "single v2", "chain", "split", "plain base"] {
        for (what, names) in damage {
            let spec = bundle(kind, |image| image.layout = Layout::Packed);
            let top = spec.parts[0].levels.len() - 1;
            let old = load_changed(&spec, |path| {
                let file = path.join(spec.file_name("disk.hdd", 0, top));
                for name in names {
                    corrupt::apply(name, &file).expect("it can be broken");
                }
            });
            let mut mended = course(
                "repair",
                format!("{kind}, {what}"),
                old,
                Box::new(repair_all),
            );
            mended.rule = Rule::Mends;
            all.push(mended);
        }
    }
    all
}

/// Merges until so many snapshots are left, the top among them; then only clears up.
fn merge_to(left: usize, into_new: bool) -> Box<Act> {
    Box::new(move |host, progress| {
        let files = InMemory(host.clone());
        let mut bundle = Bundle::open(host, DESCRIPTOR, &files)?;
        if bundle.descriptor().snapshots.len() <= left {
            return bundle.settle();
        }
        let upper = Upper {
            into_new: into_new.then(|| "merged.hds".to_owned()),
            all: left == 1,
            ..Upper::default()
        };
        snapshot::merge(&mut bundle, &upper, progress).map(drop)
    })
}

fn merges() -> Vec<Course> {
    let mut all = Vec::new();
    for kind in ["chain", "plain base", "split", "Parallels"] {
        for into_new in [true, false] {
            for (what, left) in [("top", 2), ("all", 1)] {
                // Two levels have no more than the top to merge, and parts no new file.
                let is_two = ["split", "Parallels"].contains(&kind);
                if kind == "split" && into_new || is_two && left == 2 {
                    continue;
                }
                let old = load(&bundle(kind, |_| {}));
                let verb = if into_new { "merge-new" } else { "merge" };
                let act = merge_to(left, into_new);
                all.push(course(verb, format!("{kind}, {what}"), old, act));
            }
        }
    }
    all
}
