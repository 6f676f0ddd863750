//! A ploop or Parallels disk as a source.

use super::{Asked, Data, Extent, Extents, HostPlace, Ranges, Source, What};
use crate::chain::bundle::{self, OpenedImages, Selection};
use crate::disk::extents::{self, Content};
use crate::disk::{self, Disk, DiskOptions, Resources, pool};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::SharedStorage;
use crate::units::{DiskOffset, FileOffset};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A disk of ours, opened read-only.
#[derive(Debug)]
pub struct OurDisk {
    disk: Arc<Disk>,
    images: Arc<OpenedImages>,
    /// Every file of every part, parts in disk order and base first.
    files: Vec<PathBuf>,
    storages: Vec<SharedStorage>,
    /// The number of each part's base in those.
    bases: Vec<usize>,
    /// The host has fewer blocks than the file has bytes, so that clusters may be holes of it.
    sparse: Vec<bool>,
    is_bundle: bool,
}

impl OurDisk {
    /// Opens and locks it, so that nobody changes it meanwhile; without locks where somebody is
    /// changing it already, which is then told in the notes.
    pub fn open(path: &Path, asked: &Asked, notes: &mut Vec<String>) -> Result<Self> {
        let mut selection = Selection {
            write: false,
            ..asked.selection.clone()
        };
        let may_differ = !selection.no_lock && !asked.at_rest;
        let images = match bundle::open(path, &selection) {
            Err(e) if e.kind() == ErrorKind::Locked && may_differ => {
                selection.no_lock = true;
                let images = bundle::open(path, &selection)?;
                let why = e.why_text().unwrap_or_default();
                notes.push(format!(
                    "{}: in use: {why}; what is read may be of different moments",
                    path.display()
                ));
                images
            }
            other => other?,
        };
        Self::of(Arc::new(images), notes)
    }

    /// The disk over files that are open.
    pub fn of(images: Arc<OpenedImages>, notes: &mut Vec<String>) -> Result<Self> {
        let options = DiskOptions {
            read_only: true,
            ..DiskOptions::default()
        };
        // Every read is served on the thread that asks for it.
        let resources = Resources::without_buffers(pool::start(1)?);
        let (disk, told) = disk::open_with(Arc::clone(&images), &options, resources)?;
        notes.extend(told);
        let all = || images.parts.iter().flat_map(|part| &part.files);
        let mut bases = Vec::with_capacity(images.parts.len());
        let mut count = 0_usize;
        for part in &images.parts {
            bases.push(count);
            count += part.files.len();
        }
        let sparse = |storage: &SharedStorage| -> Result<bool> {
            Ok(storage.allocated_bytes()? < storage.len()?.get())
        };
        Ok(Self {
            files: all().map(|file| file.path.clone()).collect(),
            storages: all().map(|file| Arc::clone(&file.storage)).collect(),
            sparse: all()
                .map(|file| sparse(&file.storage))
                .collect::<Result<_>>()?,
            is_bundle: images.descriptor().is_some(),
            bases,
            disk,
            images,
        })
    }

    /// The files that it is made of.
    #[must_use]
    pub fn images(&self) -> &OpenedImages {
        &self.images
    }

    fn file_of(&self, extent: &extents::Extent) -> Option<(usize, FileOffset)> {
        match extent.what {
            Content::Data { level, at } => Some((self.bases.get(extent.part)? + level.index(), at)),
            Content::Hole | Content::Bad => None,
        }
    }

    fn told(&self, extent: &extents::Extent) -> Extent {
        let depth = self.disk.depth(extent.part);
        let place = self.file_of(extent);
        let (what, level) = match extent.what {
            Content::Hole => (What::Hole, 0),
            Content::Data { level, .. } => (What::Data, level.index()),
            Content::Bad => (What::Bad, depth.saturating_sub(1)),
        };
        Extent {
            range: extent.range.clone(),
            what,
            depth: depth.saturating_sub(level + 1),
            place,
        }
    }

    /// Whether a file is a plain one: what the host says of those is a part of the map.
    fn is_plain(&self, extent: &extents::Extent) -> bool {
        match extent.what {
            Content::Data { level, .. } => self.disk.is_plain_level(extent.part, level),
            Content::Hole | Content::Bad => false,
        }
    }

    /// The extents with the host's holes in `Zeros`, in all files or in plain ones only.
    fn refined(&self, at: DiskOffset, all: bool) -> Refined<'_> {
        Refined {
            disk: self,
            extents: self.disk.extents(at),
            all,
            rest: None,
            known: vec![None; self.files.len()],
        }
    }
}

/// Extents, cut at the borders of the host's holes.
struct Refined<'a> {
    disk: &'a OurDisk,
    extents: extents::Extents<'a>,
    all: bool,
    /// What is left of an extent that was cut.
    rest: Option<Extent>,
    /// Of each file what the host said last, and where that holds: to find the end of data may cost
    /// it a look at each page, so it is not asked again for what lies within.
    known: Vec<Option<(What, Range<u64>)>>,
}

impl Refined<'_> {
    /// What the host has at a place in a file, and for how many bytes.
    fn ask(&mut self, file: usize, at: FileOffset) -> Result<(What, u64)> {
        let at = at.get();
        if let Some((what, range)) = &self.known[file] {
            if range.contains(&at) {
                return Ok((*what, range.end - at));
            }
        }
        let found = self.disk.storages[file].next_data(FileOffset::new(at));
        let found = found.map_err(|e| e.in_file(&self.disk.files[file]))?;
        let (what, end) = match found {
            // The host may not know a range that it is just being asked for twice.
            Some(data) if data.start.get() <= at => (What::Data, data.end.get().max(at + 1)),
            Some(data) => (What::Zeros, data.start.get()),
            None => (What::Zeros, u64::MAX),
        };
        self.known[file] = Some((what, at..end));
        Ok((what, end - at))
    }

    /// The first piece of an extent; the rest is kept.
    fn cut(&mut self, extent: Extent) -> Result<Extent> {
        let Some((file, at)) = extent.place.filter(|(file, _)| self.disk.sparse[*file]) else {
            return Ok(extent);
        };
        let len = extent.range.end.get() - extent.range.start.get();
        let (what, there) = self.ask(file, at)?;
        let piece = there.min(len);
        let middle = DiskOffset::new(extent.range.start.get() + piece);
        if piece < len {
            self.rest = Some(Extent {
                range: middle..extent.range.end,
                place: Some((file, at.saturating_add(piece))),
                ..extent
            });
        }
        Ok(Extent {
            range: extent.range.start..middle,
            what,
            ..extent
        })
    }
}

impl Iterator for Refined<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(rest) = self.rest.take() {
            return Some(self.cut(rest));
        }
        let extent = match self.extents.next()? {
            Ok(extent) => extent,
            Err(e) => return Some(Err(e)),
        };
        let told = self.disk.told(&extent);
        if self.all || self.disk.is_plain(&extent) {
            Some(self.cut(told))
        } else {
            Some(Ok(told))
        }
    }
}

impl Source for OurDisk {
    fn format(&self) -> &'static str {
        if self.is_bundle { "hdd" } else { "hds" }
    }

    fn size(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn extents(&self, at: DiskOffset) -> Extents<'_> {
        Box::new(self.refined(at, false))
    }

    fn files(&self) -> &[PathBuf] {
        &self.files
    }

    fn read_at(&self, at: DiskOffset, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(at, buf)
    }

    fn data(&self, from: DiskOffset) -> Ranges<'_> {
        Box::new(Data::of(self.refined(from, true)))
    }

    fn host_place(&self, at: DiskOffset, most: u64) -> Result<Option<HostPlace>> {
        let Some(extent) = self.disk.extents_by(at, most).next().transpose()? else {
            return Ok(None);
        };
        let len = extent.range.end.get() - extent.range.start.get();
        let Some((file, at)) = self.file_of(&extent) else {
            return Ok(None);
        };
        let storage = self
            .storages
            .get(file)
            .ok_or_else(|| Error::errno(libc::EIO))?;
        // A plain file may end before its disk does.
        let there = storage.len()?.get().saturating_sub(at.get());
        Ok((there > 0).then(|| HostPlace {
            storage: Arc::clone(storage),
            at,
            len: len.min(there),
        }))
    }

    fn cluster_bytes(&self) -> Option<u64> {
        Some(self.disk.cluster_bytes())
    }

    fn disk(&self) -> Option<&Disk> {
        Some(&self.disk)
    }

    fn is_encrypted(&self) -> bool {
        let descriptor = self.images.descriptor();
        descriptor.is_some_and(|descriptor| descriptor.encryption.is_some())
    }
}
