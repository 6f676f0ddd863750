//! What makes new disks: `create`, `copy`, `convert`.

use crate::course::{Course, Rule};
use crate::forge::bundle::Style;
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use crate::sim::storage::Manners;
use crate::world::{DESCRIPTOR, chain, load, over_plain, shows, split};
use ploopfs::admin::convert::{Output, Wanted, convert_in};
use ploopfs::admin::copy::{Original, copy_image_in, copy_in};
use ploopfs::admin::create::{Ids, Kind, NewFile, Plan, Product, Request, create_in, plan};
use ploopfs::admin::progress::Progress;
use ploopfs::admin::source::OurDisk;
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::error::Result;
use ploopfs::format::descriptor::Descriptor;
use ploopfs::format::guid::Guid;
use ploopfs::format::header::Version;
use ploopfs::storage::{Directory, SharedStorage};
use ploopfs::units::{DiskCluster, FileOffset};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the source is.
const SOURCE: &str = "src.hdd";

pub(crate) fn courses() -> Vec<Course> {
    let mut all = creations();
    all.extend(copies());
    all.extend(conversions());
    all
}

/// The same disk each time, made under another temporary name.
fn ids() -> Ids {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    Ids {
        temporary: format!("{:08}", NUMBER.fetch_add(1, Ordering::Relaxed)),
        uid: Guid::random([3; 16]),
    }
}

/// Disks of all shapes, each in a directory of its own.
fn sources() -> Vec<(&'static str, Media)> {
    let shapes = [
        ("single v1", chain(Style::Ploop, 1, 1)),
        ("chain v2", chain(Style::Ploop, 2, 3)),
        ("split", split(2)),
        ("plain base", over_plain(2)),
        ("Parallels", chain(Style::Parallels, 1, 2)),
    ];
    let all = shapes.into_iter();
    all.map(|(kind, spec)| (kind, load(&spec).within(SOURCE)))
        .collect()
}

fn fill(file: &NewFile, plan: &Plan) -> Result<()> {
    let size = usize::try_from(plan.shape.cluster.bytes()).expect("small");
    if size > 1 << 16 {
        return Ok(());
    }
    for cluster in [5, 0] {
        file.put(
            plan.shape.cluster,
            DiskCluster::new(cluster),
            &vec![0xa5; size],
        )?;
    }
    Ok(())
}

fn creation(kind: String, path: &'static str, request: &Request) -> Course {
    let plan = plan(Path::new(path), request).expect("it can be made");
    Course {
        verb: "create",
        kind,
        old: Media::empty(),
        rule: Rule::Makes { same: true },
        manners: Manners::default(),
        act: Box::new(move |host, progress| {
            create_in(host, path, &plan, &ids(), progress, |file| {
                fill(file, &plan)
            })
        }),
    }
}

fn creations() -> Vec<Course> {
    let mut all = Vec::new();
    for (path, end) in [("dst.hds", "image"), ("dst.hdd", "bundle")] {
        for kind in [Kind::Expanding, Kind::Preallocated, Kind::Plain] {
            if kind == Kind::Plain && end == "image" {
                continue;
            }
            for version in [Version::V1, Version::V2] {
                let request = Request {
                    size: 7 << 15,
                    kind,
                    version: (kind != Kind::Plain).then_some(version),
                    cluster: Some(1 << 15),
                    product: Product::Any,
                    file_system: None,
                };
                let kind = format!("{kind:?} {version:?} {end}").to_lowercase();
                all.push(creation(kind, path, &request));
            }
        }
    }
    let desktop = Request {
        size: 1 << 20,
        kind: Kind::Expanding,
        version: None,
        cluster: None,
        product: Product::Desktop,
        file_system: None,
    };
    all.push(creation("desktop".to_owned(), "dst.hdd", &desktop));
    all
}

fn source_of(host: &SimDirectory) -> SimDirectory {
    host.inner(SOURCE).expect("the source is there")
}

fn copies() -> Vec<Course> {
    let mut all = Vec::new();
    for (kind, old) in sources() {
        for new_guids in [false, true] {
            let end = if new_guids { ", new GUIDs" } else { "" };
            all.push(Course {
                verb: "copy",
                kind: format!("{kind}{end}"),
                old: old.clone(),
                rule: Rule::Makes { same: !new_guids },
                manners: Manners {
                    poor_host: new_guids,
                    ..Manners::default()
                },
                act: Box::new(move |host, progress| {
                    let from = Original {
                        directory: &source_of(host),
                        name: SOURCE,
                        path: Path::new(SOURCE),
                    };
                    let to = (host as &dyn Directory, "dst.hdd");
                    copy_in(from, to, new_guids, &ids(), progress).map(drop)
                }),
            });
        }
    }
    let (_, old) = sources().remove(0);
    for shares in [false, true] {
        all.push(Course {
            verb: "copy",
            kind: if shares { "image, shared" } else { "image" }.to_owned(),
            old: old.clone(),
            rule: Rule::Makes { same: true },
            manners: Manners {
                shares,
                ..Manners::default()
            },
            act: Box::new(|host, progress| {
                let image = source_of(host).open("root.hds", false)?;
                copy_image_in(&image, (host, "dst.hds"), &ids(), progress).map(drop)
            }),
        });
    }
    all
}

/// The disk in a bundle as of its base or its top, open for reading.
fn opened(source: &SimDirectory, is_base: bool) -> Result<OurDisk> {
    let text = source.open(DESCRIPTOR, false)?;
    let mut bytes = vec![0; usize::try_from(text.len()?.get()).expect("small")];
    text.read_at(FileOffset::ZERO, &mut bytes)?;
    let descriptor = Descriptor::parse(&bytes).expect("it is sound");
    let mut chain = descriptor.chain(descriptor.top).expect("a chain");
    chain.truncate(if is_base { 1 } else { usize::MAX });
    let mut parts = Vec::new();
    for (number, part) in descriptor.parts.iter().enumerate() {
        let mut files = Vec::new();
        for image in descriptor.images(number, &chain).expect("images") {
            let storage = source.open(&image.file, false)?;
            files.push(OpenedFile {
                path: PathBuf::from(&image.file),
                plain: plainness(&storage)?,
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
    let images = OpenedImages::from_parts(PathBuf::from(SOURCE), parts);
    OurDisk::of(Arc::new(images), &mut Vec::new())
}

fn plainness(storage: &SharedStorage) -> Result<Plain> {
    let mut magic = [0; 5];
    storage.read_at(FileOffset::ZERO, &mut magic)?;
    let is_image = &magic == b"Witho";
    Ok(if is_image { Plain::No } else { Plain::Yes })
}

fn conversions() -> Vec<Course> {
    let mut all = Vec::new();
    let targets = [
        ("raw", "dst.raw", Output::Raw, None, Product::Any),
        (
            "hds v1",
            "dst.hds",
            Output::Image,
            Some(Version::V1),
            Product::Any,
        ),
        (
            "hds v2",
            "dst.hds",
            Output::Image,
            Some(Version::V2),
            Product::Any,
        ),
        ("hdd", "dst.hdd", Output::Bundle, None, Product::Virtuozzo),
        ("desktop", "dst.hdd", Output::Bundle, None, Product::Desktop),
    ];
    for (number, (kind, old)) in sources().into_iter().enumerate() {
        for (to, name, output, version, product) in targets {
            let is_image = output == Output::Image;
            let wanted = Wanted {
                output,
                version,
                cluster: (is_image || product == Product::Virtuozzo).then_some(1 << 15),
                product,
            };
            all.push(conversion(
                format!("{kind} to {to}"),
                &old,
                name,
                wanted,
                number == 4,
            ));
        }
    }
    all
}

fn conversion(
    kind: String,
    old: &Media,
    name: &'static str,
    wanted: Wanted,
    is_base: bool,
) -> Course {
    Course {
        verb: "convert",
        kind,
        old: old.clone(),
        rule: Rule::Makes { same: true },
        manners: Manners {
            shares: wanted.output == Output::Raw,
            poor_host: wanted.output == Output::Bundle,
            ..Manners::default()
        },
        act: Box::new(move |host, progress| {
            let source = opened(&source_of(host), is_base)?;
            convert_in(&source, (host, name), &wanted, &ids(), progress).map(drop)
        }),
    }
}

/// What a raw file must hold that is made of a disk.
fn expected(inner: &Media, is_base: bool) -> Vec<u8> {
    let mut shown = shows(inner, "the source");
    let top = shown.remove(&Guid::NONE).expect("a top");
    match is_base {
        true => shown.into_values().next().expect("a snapshot"),
        false => top,
    }
}

/// Every raw file holds what the source shows; images are compared with it by `tests/create`.
pub(crate) fn raw_files_are_right() -> std::result::Result<u32, String> {
    let mut compared = 0;
    let shapes = [
        ("chain v2", chain(Style::Ploop, 2, 3), false),
        ("split", split(2), false),
        ("plain base", over_plain(2), false),
        ("Parallels", chain(Style::Parallels, 1, 2), true),
    ];
    for (kind, spec, is_base) in shapes {
        let inner = load(&spec);
        let wanted = Wanted {
            output: Output::Raw,
            version: None,
            cluster: None,
            product: Product::Any,
        };
        let course = conversion(
            kind.to_owned(),
            &inner.within(SOURCE),
            "dst.raw",
            wanted,
            is_base,
        );
        let host = SimDirectory::on(&course.old);
        (course.act)(&host, &Progress::default()).map_err(|e| format!("{kind}: {e}"))?;
        let made = host.media();
        if made.bytes("dst.raw") != Some(&expected(&inner, is_base)[..]) {
            return Err(format!("{kind}: another content"));
        }
        compared += 1;
    }
    Ok(compared)
}
