//! Bundles in memory, and the dumbest possible look at what each of their snapshots shows.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::sim::directory::SimDirectory;
use crate::sim::media::Media;
use ploopfs::admin::bundle::{Bundle, Files};
use ploopfs::admin::check::check_image;
use ploopfs::error::Result;
use ploopfs::format::descriptor::{Descriptor, Image};
use ploopfs::format::guid::Guid;
use ploopfs::plan::repair::{Finding, Severity, Trouble};
use ploopfs::storage::{Directory, SharedStorage};
use ploopfs::units::FileOffset;
use std::collections::BTreeMap;
use std::path::Path;

pub(crate) const DESCRIPTOR: &str = "DiskDescriptor.xml";

/// The files of a bundle in a directory in memory.
#[derive(Clone, Debug)]
pub(crate) struct InMemory(pub(crate) SimDirectory);

impl Files for InMemory {
    fn image(&self, image: &Image) -> Result<SharedStorage> {
        self.0.open(&image.file, true)
    }

    fn own_name(&self, image: &Image) -> Option<String> {
        Some(image.file.clone())
    }
}

pub(crate) fn load(spec: &BundleSpec) -> Media {
    load_changed(spec, |_| {})
}

/// A bundle to which something was done after it was made.
pub(crate) fn load_changed(spec: &BundleSpec, change: impl Fn(&Path)) -> Media {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("disk.hdd");
    spec.write(&path).expect("the bundle is made");
    change(&path);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&path).expect("it was made") {
        let entry = entry.expect("it was made");
        let name = entry.file_name().into_string().expect("names are UTF-8");
        files.push((name, std::fs::read(entry.path()).expect("it was made")));
    }
    files.sort();
    Media::with_files(files)
}

/// The same with one file more, which is durable.
pub(crate) fn with_file(state: &Media, name: &str, bytes: &[u8]) -> Media {
    let host = SimDirectory::on(state);
    let file = host.create_new(name).expect("memory");
    file.write_at(FileOffset::ZERO, bytes).expect("memory");
    file.sync_data().expect("memory");
    host.sync().expect("memory");
    host.media()
}

/// 30 clusters of 4 KiB, the last one cut, about half of them mapped.
pub(crate) fn like(version: u8) -> ImageSpec {
    let mut spec = ImageSpec::new(version, 8, 237).mapping(Mapped::Percent(50));
    spec.layout = Layout::Shuffled(3);
    spec.garbage = true;
    spec
}

pub(crate) fn chain(style: Style, version: u8, depth: usize) -> BundleSpec {
    BundleSpec::chain(style, &like(version), depth, |_, _| {})
}

pub(crate) fn split(depth: usize) -> BundleSpec {
    let mut spec = chain(Style::Parallels, 1, depth);
    // Parts end on cluster borders, but for the last.
    let levels = |sectors| {
        (0..depth).map(move |_| {
            let mut image = like(1);
            image.disk_sectors = sectors;
            Level::Image(image)
        })
    };
    spec.parts.clear();
    spec.push_part(levels(80).collect());
    spec.push_part(levels(77).collect());
    spec
}

/// Images over a plain base that ends on no cluster border.
pub(crate) fn over_plain(depth: usize) -> BundleSpec {
    let plain = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 237 * 512,
    };
    let images = (1..depth).map(|_| Level::Image(like(2)));
    let mut spec = BundleSpec::new(Style::Ploop, std::iter::once(plain).chain(images).collect());
    spec.top_guid = true;
    spec
}

fn le32(bytes: &[u8], at: usize) -> usize {
    bytes[at..at + 4]
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
}

/// Bytes of the disk that one image gives at a cluster; `None` for a hole.
fn cluster(bytes: &[u8], index: usize, what: &str) -> Option<Vec<u8>> {
    const SIZE: usize = 4096;
    let mut found = vec![0; SIZE];
    let mut take = |from: usize, len: usize| {
        let end = (from + len).min(bytes.len());
        let part = bytes.get(from..end).unwrap_or_default();
        found[..part.len()].copy_from_slice(part);
    };
    if !bytes.starts_with(b"Witho") {
        take(index * SIZE, SIZE);
        return Some(found);
    }
    // Clusters of the image itself may be larger than the pieces that are looked at.
    let own = le32(bytes, 28) * 512;
    let unit = if bytes.starts_with(b"WithoutFree") {
        512
    } else {
        own
    };
    let disk = le32(bytes, 36) * 512;
    let (number, within) = (index * SIZE / own, index * SIZE % own);
    if number >= le32(bytes, 32) || index * SIZE >= disk {
        return None;
    }
    let entry = le32(bytes, 64 + 4 * number);
    if entry == 0 {
        return None;
    }
    assert!(
        entry * unit >= le32(bytes, 48) * 512,
        "{what}: entry {number} in the table"
    );
    assert!(
        entry * unit + own <= bytes.len(),
        "{what}: entry {number} past the end"
    );
    let start = entry * unit + within;
    take(start, SIZE.min(disk - index * SIZE));
    Some(found)
}

/// What every snapshot that is not going away shows, the top under the name of zeros.
pub(crate) fn shows(state: &Media, what: &str) -> BTreeMap<Guid, Vec<u8>> {
    let descriptor = described(state, what);
    let mut shown = BTreeMap::new();
    for shot in &descriptor.snapshots {
        let is_top = shot.guid == descriptor.top;
        if shot.temporary && !is_top {
            continue;
        }
        let chain = descriptor.chain(shot.guid);
        let chain = chain.unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut disk = Vec::new();
        for (number, part) in descriptor.parts.iter().enumerate() {
            let images = descriptor.images(number, &chain);
            let images = images.unwrap_or_else(|e| panic!("{what}: {e}"));
            let len = (part.end.get() - part.start.get()) as usize * 512;
            let mut bytes = Vec::new();
            for index in 0..len.div_ceil(4096) {
                let levels = images.iter().rev();
                let found = levels.into_iter().find_map(|image| {
                    let file = state.bytes(&image.file);
                    let file = file.unwrap_or_else(|| panic!("{what}: no {}", image.file));
                    cluster(file, index, &format!("{what}: {}", image.file))
                });
                bytes.extend(found.unwrap_or_else(|| vec![0; 4096]));
            }
            bytes.truncate(len);
            disk.extend(bytes);
        }
        let name = if is_top { Guid::NONE } else { shot.guid };
        shown.insert(name, disk);
    }
    shown
}

pub(crate) fn described(state: &Media, what: &str) -> Descriptor {
    let text = state.bytes(DESCRIPTOR);
    let text = text.unwrap_or_else(|| panic!("{what}: no descriptor"));
    Descriptor::parse(text).unwrap_or_else(|e| panic!("{what}: {e}"))
}

/// Every image is sound but for its mark, what comes with it, and space that nothing names.
pub(crate) fn expect_sound(state: &Media, closed: bool, what: &str) {
    let host = SimDirectory::on(state);
    let descriptor = described(state, what);
    for image in descriptor.parts.iter().flat_map(|part| &part.images) {
        let storage = host.open(&image.file, false);
        let storage = storage.unwrap_or_else(|_| panic!("{what}: no {}", image.file));
        let is_plain = !state
            .bytes(&image.file)
            .is_some_and(|bytes| bytes.starts_with(b"Witho"));
        if is_plain {
            continue;
        }
        let found = check_image(&*storage).expect("memory");
        let corrupt = |finding: &&Finding| finding.severity == Severity::Corrupt;
        let bad: Vec<_> = found.report.findings.iter().filter(corrupt).collect();
        let is_marked = bad.iter().any(|finding| finding.trouble == Trouble::InUse);
        // A size that is being cut leaves entries behind its end for a while.
        let is_allowed = |finding: &&Finding| {
            is_marked && !closed && matches!(finding.trouble, Trouble::InUse | Trouble::StraySlots)
        };
        let bad: Vec<_> = bad.into_iter().filter(|f| !is_allowed(f)).collect();
        assert!(bad.is_empty(), "{what}: {}: {bad:?}", image.file);
    }
}

/// A change of a bundle.
pub(crate) type Step<'a> = &'a dyn Fn(&mut Bundle<'_>) -> Result<()>;

/// Carries a change out in this directory.
pub(crate) fn carry_out(host: &SimDirectory, step: Step<'_>) -> Result<()> {
    let files = InMemory(host.clone());
    let mut bundle = Bundle::open(host, DESCRIPTOR, &files)?;
    step(&mut bundle)
}

/// The directory after a change that nothing disturbs.
pub(crate) fn after(state: &Media, step: Step<'_>) -> Media {
    let host = SimDirectory::on(state);
    carry_out(&host, step).unwrap_or_else(|e| panic!("{e}"));
    host.media()
}

/// Gives a file other bytes, durably.
pub(crate) fn overwrite(host: &SimDirectory, name: &str, bytes: &[u8]) {
    let file = host.open(name, true).expect("it is there");
    let len = FileOffset::new(bytes.len() as u64);
    file.set_len(len).expect("memory");
    file.write_at(FileOffset::ZERO, bytes).expect("memory");
    file.sync_data().expect("memory");
}
