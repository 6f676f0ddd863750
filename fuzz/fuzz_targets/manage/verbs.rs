//! The offline verbs, on a bundle in any directory.

use crate::world::DESCRIPTOR;
use ploopfs::admin::bundle::{Bundle, Files};
use ploopfs::admin::compact::{self, compact_image};
use ploopfs::admin::convert::{Output, Wanted, convert_in};
use ploopfs::admin::create::{Ids, Product};
use ploopfs::admin::progress::Progress;
use ploopfs::admin::repair::{KeepOld, repair_image_with};
use ploopfs::admin::resize::disk::describe;
use ploopfs::admin::resize::{self, Place, resize_image, resize_plain};
use ploopfs::admin::snapshot::{self, Deleted, Losses, Names, Upper};
use ploopfs::admin::source::OurDisk;
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::delta::image::Image;
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::format::descriptor;
use ploopfs::format::guid::Guid;
use ploopfs::plan::repair::Policy;
use ploopfs::storage::{Directory, SharedStorage, Storage};
use ploopfs::units::{FileOffset, SectorCount};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Sectors that a disk has at the most.
const SECTORS_MAX: u64 = 8 * 1200;

/// One verb, and how it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) what: u8,
    pub(crate) at: u8,
    pub(crate) how: u8,
}

impl From<(u8, u8, u8)> for Step {
    fn from((what, at, how): (u8, u8, u8)) -> Self {
        Self { what, at, how }
    }
}

impl Step {
    /// Changes after which the host fails; most verbs are left in peace.
    pub(crate) fn fails_after(&self) -> u8 {
        self.how & 0x7f
    }

    /// Then the power is cut, too.
    pub(crate) fn is_cut(&self) -> bool {
        self.how & 0x80 != 0
    }
}

/// What a verb has done.
#[derive(Clone, Debug)]
pub(crate) enum Changed {
    Nothing,
    Created(Guid),
    Gone(Vec<Guid>),
    Switched(Guid, Option<Guid>),
    Merged(Vec<Guid>),
    Resized,
    Converted(Vec<u8>),
}

/// The files of a bundle in its own directory.
#[derive(Debug)]
struct Own<'a>(&'a dyn Directory);

impl Files for Own<'_> {
    fn image(&self, image: &descriptor::Image) -> Result<SharedStorage> {
        self.0.open(&image.file, true)
    }

    fn own_name(&self, image: &descriptor::Image) -> Option<String> {
        Some(image.file.clone())
    }
}

fn guid(number: usize, kind: u8) -> Guid {
    let mut bytes = [kind; 16];
    bytes[0] = number as u8 + 1;
    Guid::from_bytes(bytes)
}

/// Carries out one verb; `number` makes the names that it needs.
pub(crate) fn carry_out(
    host: &dyn Directory,
    step: &Step,
    number: usize,
    progress: &Progress,
) -> Result<Changed> {
    let files = Own(host);
    let mut bundle = Bundle::open(host, DESCRIPTOR, &files)?;
    let shots: Vec<Guid> = bundle
        .descriptor()
        .frozen()
        .iter()
        .map(|shot| shot.guid)
        .collect();
    let chosen = shots
        .get(usize::from(step.at) % shots.len().max(1))
        .copied();
    let none = || Error::new(ErrorKind::NoSuchSnapshot);
    match step.what % 8 {
        0 => {
            let names = Names {
                snapshot: guid(number, 1),
                file: guid(number, 2),
            };
            snapshot::create(&mut bundle, names)?;
            Ok(Changed::Created(names.snapshot))
        }
        1 => {
            let target = chosen.ok_or_else(none)?;
            let losses = Losses {
                force_discard: step.at & 0x40 != 0,
                ..Losses::default()
            };
            let (done, _) = snapshot::delete(&mut bundle, target, losses, progress)?;
            let mut gone = match done.what {
                Deleted::Dropped { gone, .. } => gone,
                Deleted::Merged(merged) => merged.gone,
                Deleted::Marked { .. } => vec![target],
            };
            gone.extend(done.then.into_iter().flat_map(|merged| merged.gone));
            Ok(Changed::Gone(gone))
        }
        2 => {
            let target = chosen.ok_or_else(none)?;
            let kept = (step.at & 0x80 != 0).then(|| guid(number, 3));
            snapshot::switch(&mut bundle, target, guid(number, 4), kept, progress)?;
            Ok(Changed::Switched(target, kept))
        }
        3 => {
            let upper = Upper {
                snapshot: chosen.filter(|_| step.at & 0x40 != 0),
                into_new: (step.at & 0x20 != 0).then(|| format!("new{number}.hds")),
                all: step.at & 0x80 != 0,
                losses: Losses {
                    force_discard: step.at & 0x10 != 0,
                    ..Losses::default()
                },
            };
            let (merged, _) = snapshot::merge(&mut bundle, &upper, progress)?;
            Ok(Changed::Merged(merged.gone))
        }
        4 => resize(host, &bundle, step, progress),
        5 => compact(host, &bundle, step, progress),
        6 => repair(host, &bundle, progress),
        _ => convert(host, &bundle, number, progress),
    }
}

fn compact(
    host: &dyn Directory,
    bundle: &Bundle<'_>,
    step: &Step,
    progress: &Progress,
) -> Result<Changed> {
    let request = compact::Request {
        zeroes: step.at & 1 != 0,
        defrag: step.at & 2 != 0,
        fill_holes: step.at & 4 != 0,
        drop_bitmaps: true,
        batch_bytes: 8192,
    };
    for part in 0..bundle.descriptor().parts.len() {
        let (lower, top) = opened(host, bundle, part)?;
        compact_image(&*top, &lower, &request, progress)?;
    }
    Ok(Changed::Nothing)
}

fn repair(host: &dyn Directory, bundle: &Bundle<'_>, progress: &Progress) -> Result<Changed> {
    let parts = bundle.descriptor().parts.iter();
    for image in parts.flat_map(|part| &part.images) {
        let storage = host.open(&image.file, true)?;
        if !is_plain(&*storage)? {
            let keep = KeepOld::In {
                directory: host,
                image: &image.file,
            };
            repair_image_with(&*storage, keep, &Policy::default(), progress)?;
        }
    }
    Ok(Changed::Nothing)
}

fn is_plain(storage: &dyn Storage) -> Result<bool> {
    let mut magic = [0; 5];
    match storage.len()?.get() < 5 {
        true => Ok(true),
        false => {
            storage.read_at(FileOffset::ZERO, &mut magic)?;
            Ok(&magic != b"Witho")
        }
    }
}

fn wrong(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Descriptor).because(error)
}

fn names(bundle: &Bundle<'_>, part: usize) -> Result<Vec<String>> {
    let described = bundle.descriptor();
    let chain = described.chain(described.top).map_err(wrong)?;
    let images = described.images(part, &chain).map_err(wrong)?;
    Ok(images.iter().map(|image| image.file.clone()).collect())
}

/// The lower images of a part's chain, and its top.
fn opened(
    host: &dyn Directory,
    bundle: &Bundle<'_>,
    part: usize,
) -> Result<(Vec<Image>, SharedStorage)> {
    let mut lower = Vec::new();
    let names = names(bundle, part)?;
    let (top, below) = names
        .split_last()
        .ok_or_else(|| Error::new(ErrorKind::Descriptor))?;
    for name in below {
        let storage = host.open(name, false)?;
        lower.push(match is_plain(&*storage)? {
            true => Image::plain(Path::new(name), storage)?,
            false => Image::expanding(Path::new(name), storage)?,
        });
    }
    Ok((lower, host.open(top, true)?))
}

fn resize(
    host: &dyn Directory,
    bundle: &Bundle<'_>,
    step: &Step,
    progress: &Progress,
) -> Result<Changed> {
    let none = || Error::new(ErrorKind::Descriptor);
    let described = bundle.descriptor();
    let part = described.parts.last().ok_or_else(none)?;
    let start = part.start.get();
    let own = part.end.get().checked_sub(start).ok_or_else(none)?;
    let (lower, top) = opened(host, bundle, described.parts.len() - 1)?;
    let mut request = resize::Request::new(SectorCount::new(
        8 * (1 + u64::from(step.at) * u64::from(step.at) / 55).min(SECTORS_MAX / 8),
    ));
    request.shrink = true;
    request.batch_bytes = 8192;
    let mut tell = |size: SectorCount| {
        let total = start.saturating_add(size.get());
        describe(host, DESCRIPTOR, SectorCount::new(total))
    };
    if is_plain(&*top)? {
        let place = Place {
            size: SectorCount::new(own),
            unit: SectorCount::new(1),
        };
        resize_plain(&*top, place, &request, &mut tell)?;
    } else {
        resize_image(&*top, &lower, &request, progress, &mut tell)?;
    }
    Ok(Changed::Resized)
}

fn convert(
    host: &dyn Directory,
    bundle: &Bundle<'_>,
    number: usize,
    progress: &Progress,
) -> Result<Changed> {
    let mut parts = Vec::new();
    for (at, part) in bundle.descriptor().parts.iter().enumerate() {
        let mut files = Vec::new();
        for name in names(bundle, at)? {
            let storage = host.open(&name, false)?;
            let plain = is_plain(&*storage)?;
            files.push(OpenedFile {
                path: PathBuf::from(&name),
                plain: if plain { Plain::Yes } else { Plain::No },
                storage,
                guid: None,
            });
        }
        parts.push(OpenedPart {
            start: part.start,
            end: Some(part.end),
            blocksize: None,
            files,
        });
    }
    let images = OpenedImages::from_parts(PathBuf::from("memory"), parts);
    let source = OurDisk::of(Arc::new(images), &mut Vec::new())?;
    let wanted = Wanted {
        output: Output::Raw,
        version: None,
        cluster: None,
        product: Product::Any,
    };
    let ids = Ids {
        temporary: format!("{}", host.entries()?.len()),
        uid: guid(number, 5),
    };
    let name = format!("converted{number}.raw");
    let size = ploopfs::admin::source::Source::size(&source);
    if size > SECTORS_MAX * 512 * 2 {
        return Ok(Changed::Nothing);
    }
    convert_in(&source, (host, &name), &wanted, &ids, progress)?;
    let made = host.open(&name, false)?;
    let mut bytes = vec![0; size as usize];
    made.read_at(FileOffset::ZERO, &mut bytes)?;
    host.remove(&name)?;
    host.sync()?;
    Ok(Changed::Converted(bytes))
}
