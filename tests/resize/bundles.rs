//! A bundle's image and its descriptor, cut at every operation.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::{ImageSpec, Mapped};
use crate::net::{shown, sound};
use crate::sim::directory::{Names, SimDirectory};
use crate::sim::media::Media;
use crate::sim::storage::{Manners, World};
use ploopfs::admin::progress::Progress;
use ploopfs::admin::resize::disk::describe;
use ploopfs::admin::resize::{Place, Request, resize_image, resize_plain};
use ploopfs::error::Result;
use ploopfs::format::descriptor::Descriptor;
use ploopfs::storage::{Directory, Storage};
use ploopfs::units::SectorCount;
use std::sync::Arc;

const XML: &str = "DiskDescriptor.xml";
const IMAGE: &str = "root.hds";

/// Files by their names.
type Dir = Vec<(String, Vec<u8>)>;

struct Bundle {
    name: &'static str,
    files: Dir,
    to: u64,
    is_plain: bool,
}

fn forged(name: &'static str, level: Level, to: u64) -> Bundle {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("b.hdd");
    let is_plain = matches!(level, Level::Plain { .. });
    let spec = BundleSpec::new(Style::Ploop, vec![level]);
    spec.write(&path).expect("it is made");
    let names = [XML, "DiskDescriptor.xml.Backup", IMAGE];
    let read = |name: &str| {
        let from = name.strip_suffix(".Backup").unwrap_or(name);
        let bytes = std::fs::read(path.join(from)).expect("it was made");
        (name.to_owned(), bytes)
    };
    Bundle {
        name,
        files: names.into_iter().map(read).collect(),
        to,
        is_plain,
    }
}

fn bundles() -> Vec<Bundle> {
    let image = |sectors, clusters: &[u64]| {
        let mapped = Mapped::List(clusters.to_vec());
        Level::Image(ImageSpec::new(2, 8, sectors).mapping(mapped))
    };
    let plain = || Level::Plain {
        seed: 3,
        level: 0,
        bytes: 64 * 512,
    };
    vec![
        forged("grows", image(8000, &[4, 2, 9]), 8 * 1200),
        forged("shrinks", image(8 * 1200, &[4, 2, 9]), 8 * 100),
        forged("plain, grows", plain(), 640),
        forged("plain, shrinks", plain(), 32),
    ]
}

impl Bundle {
    fn run(&self, world: &Arc<World>) -> Result<()> {
        let directory = SimDirectory::new(world);
        let image = directory.open(IMAGE, true)?;
        let text = directory.open(XML, false)?;
        let request = Request {
            shrink: true,
            force_discard: true,
            ..Request::new(SectorCount::new(self.to))
        };
        let mut tell = |size| describe(&directory, XML, size);
        if self.is_plain {
            let place = Place {
                size: parsed(&content(&*text)?).expect("a descriptor").disk_size,
                unit: SectorCount::new(1),
            };
            return resize_plain(&*image, place, &request, &mut tell).map(|_| ());
        }
        let progress = Progress::default();
        resize_image(&*image, &[], &request, &progress, &mut tell).map(|_| ())
    }
}

fn content(storage: &dyn Storage) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(storage.len()?.get()).expect("small")];
    storage.read_at(ploopfs::units::FileOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

fn parsed(text: &[u8]) -> std::result::Result<Descriptor, String> {
    Descriptor::parse(text).map_err(|e| e.to_string())
}

fn world(files: &[Vec<u8>], names: Names, logs: bool) -> Arc<World> {
    let world = World::new(files.to_vec(), Manners::default(), logs);
    world.set_names(names);
    world
}

/// What is there under each name.
fn listed(world: &Arc<World>) -> Dir {
    let directory = SimDirectory::new(world);
    let names = directory.entries().expect("names");
    let read = |name: String| {
        let file = directory.open(&name, false).expect("it is there");
        let bytes = content(&*file).expect("it can be read");
        (name, bytes)
    };
    names.into_iter().map(read).collect()
}

fn get<'a>(dir: &'a Dir, name: &str) -> std::result::Result<&'a [u8], String> {
    let found = dir.iter().find(|(own, _)| own == name);
    found
        .map(|(_, bytes)| &bytes[..])
        .ok_or_else(|| format!("{name} is gone"))
}

fn judge(
    bundle: &Bundle,
    left: &Dir,
    again: impl FnOnce() -> Result<Dir>,
    good: &Dir,
) -> std::result::Result<(), String> {
    let (text, image) = (get(left, XML)?, get(left, IMAGE)?);
    let (old_text, old_image) = (get(&bundle.files, XML)?, get(&bundle.files, IMAGE)?);
    let size = parsed(text)?.disk_size.get();
    if text != old_text && text != get(good, XML)? {
        return Err("a third descriptor".to_owned());
    }
    if bundle.is_plain {
        let old = parsed(old_text)?.disk_size.get().min(size) as usize * 512;
        if image[..old.min(image.len())] != old_image[..old.min(image.len())] {
            return Err("the disk has another content".to_owned());
        }
        if size != bundle.to && image.len() < old {
            return Err("cut before the descriptor said so".to_owned());
        }
        if size == bundle.to && size as usize * 512 > image.len() {
            return Err("the descriptor promises more than there is".to_owned());
        }
    } else {
        sound(image)?;
        let own = shown(&[image.to_vec()]).sectors;
        let is_marked = image[0x2c..0x30] != [0; 4];
        if own != size && !is_marked {
            return Err("two sizes, and no mark".to_owned());
        }
        if size == bundle.to && own != size {
            return Err("the descriptor promises what the image does not have".to_owned());
        }
    }
    let end = again().map_err(|e| format!("repeated: {e}"))?;
    if end != *good {
        return Err("repeated, it ends otherwise".to_owned());
    }
    Ok(())
}

/// Everything that power cuts find wrong.
pub(crate) fn complaints(states: u64) -> (u64, Vec<String>) {
    let (mut tried, mut found) = (0, Vec::new());
    for bundle in bundles() {
        let files: Vec<Vec<u8>> = bundle
            .files
            .iter()
            .map(|(_, bytes)| bytes.clone())
            .collect();
        let names = bundle.files.iter().map(|(name, _)| name.clone());
        let names: Names = names.zip(0..).collect();
        let world = world(&files, names.clone(), true);
        if let Err(error) = bundle.run(&world) {
            found.push(format!("{}: {error}", bundle.name));
            continue;
        }
        let good = listed(&world);
        let mut media = Media::new(&files, names);
        let mut dice = 3;
        for (now, event) in world.log().iter().enumerate() {
            if !media.take(event) {
                continue;
            }
            for _ in 0..states {
                tried += 1;
                let (files, names) = media.after_cut(&mut dice);
                let cut = self::world(&files, names.clone(), false);
                let left = listed(&cut);
                let again = || {
                    bundle.run(&cut)?;
                    Ok(listed(&cut))
                };
                if let Err(why) = judge(&bundle, &left, again, &good) {
                    found.push(format!("{}: event {now}: {why}", bundle.name));
                }
            }
        }
    }
    (tried, found)
}

pub(crate) fn image_and_descriptor_agree() {
    let (states, found) = complaints(12);
    assert!(found.is_empty(), "{found:#?}");
    assert!(states > 300, "only {states} states");
}
