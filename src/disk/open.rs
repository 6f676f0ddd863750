//! From open, locked files to a disk that can be served.
//!
//! A read-only open reads the headers and nothing else; it costs the same for 16 TiB as for 16 MiB.
//! A read-write open makes sure of the image first: see [`super::prepare`].
//! A clean image is not changed by being opened: its mark is set before the first write.

use super::buffers::Buffers;
use super::flush::FlushState;
use super::flusher::Flusher;
use super::health::Health;
use super::part::Part;
use super::pool::{self, Spawn};
use super::prepare::{self, Writer, open_for_writing};
use super::serve::Kind;
use super::stats::Counters;
use super::{Disk, DiskOptions, InlineMax, direct};
use crate::chain::Chain;
use crate::chain::bundle::{OpenedImages, OpenedPart};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::RequestOrder;
use crate::sync::{Condvar, Mutex, Rank};
use arc_swap::ArcSwap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Bytes of map pages for a frozen view: people look into one, they do not work on it.
const VIEW_CACHE: u64 = 4 << 20;
/// The most table pages of all parts of a split disk: 16 TiB in clusters of 1 MiB.
const SPLIT_PAGES_MAX: u64 = 1 << 14;

/// Threads and memory that several disks can share: a disk and its frozen views do.
#[derive(Clone, Debug)]
pub struct Resources {
    pub(super) pool: Arc<dyn Spawn>,
    pub(super) buffers: Arc<Buffers>,
    pub(super) large: Arc<LargeInline>,
}

/// Requests above the threshold that stay on the threads on which they arrive. The threads serve a
/// disk and its frozen views, so these share the account.
#[derive(Debug, Default)]
pub(super) struct LargeInline {
    /// How many there are now.
    pub(super) count: AtomicUsize,
    max_reads: AtomicUsize,
    max_writes: AtomicUsize,
}

impl LargeInline {
    /// Says how many there may be.
    pub(super) fn set(&self, max: InlineMax) {
        self.max_reads.store(max.reads, Ordering::Relaxed);
        self.max_writes.store(max.writes, Ordering::Relaxed);
    }

    /// How many there may be for another one of its kind.
    pub(super) fn max(&self, kind: Kind) -> usize {
        let max = match kind {
            Kind::Read => &self.max_reads,
            Kind::Write => &self.max_writes,
        };
        max.load(Ordering::Relaxed)
    }
}

impl Resources {
    /// These buffers with another pool.
    #[must_use]
    pub fn with_pool(&self, pool: Arc<dyn Spawn>) -> Self {
        Self {
            pool,
            ..self.clone()
        }
    }

    /// A pool, and no buffers at all: every request is served where it arrives.
    #[must_use]
    pub fn without_buffers(pool: Arc<dyn Spawn>) -> Self {
        Self {
            pool,
            buffers: Buffers::none(),
            large: Arc::default(),
        }
    }

    /// Starts this many threads and sets all buffers aside.
    pub fn new(pool_threads: usize) -> Result<Self> {
        Ok(Self {
            pool: pool::start(pool_threads)?,
            buffers: Buffers::new()?,
            large: Arc::default(),
        })
    }
}

/// Opens the flat disk over the files of a bundle or image, with resources of its own. The strings
/// are what the user should be told.
pub fn open(images: Arc<OpenedImages>, options: &DiskOptions) -> Result<(Arc<Disk>, Vec<String>)> {
    let threads = if options.direct {
        options.pool_threads.max(direct::POOL_THREADS)
    } else {
        options.pool_threads
    };
    open_with(images, options, Resources::new(threads)?)
}

/// Opens a frozen state of a disk, which shares its resources.
pub fn open_view(disk: &Disk, images: OpenedImages) -> Result<Arc<Disk>> {
    let options = DiskOptions {
        read_only: true,
        inline_order: disk.inline_order.0,
        bat_cache: VIEW_CACHE,
        direct: disk.direct,
        ..DiskOptions::default()
    };
    let resources = disk.resources.clone();
    open_on(Arc::new(images), &options, resources).map(|(disk, _)| disk)
}

/// Opens a disk with a pool and buffers that the caller has, maybe for other disks as well.
pub fn open_with(
    images: Arc<OpenedImages>,
    options: &DiskOptions,
    resources: Resources,
) -> Result<(Arc<Disk>, Vec<String>)> {
    let large = Arc::<LargeInline>::default();
    large.set(options.large_inline);
    open_on(images, options, Resources { large, ..resources })
}

fn open_on(
    images: Arc<OpenedImages>,
    options: &DiskOptions,
    resources: Resources,
) -> Result<(Arc<Disk>, Vec<String>)> {
    if options.direct {
        let prepare = |part| direct::prepare(part, options.read_only);
        images.parts.iter().try_for_each(prepare)?;
    }
    let caches = look_at_parts(&images, options)?;
    if !options.read_only {
        images.claim()?;
        images.parts.iter().try_for_each(prepare::settle)?;
    }
    check_split(&images.parts, options)?;
    let mut notes = images.warnings.clone();
    let mut parts = Vec::with_capacity(images.parts.len());
    let mut marks = Vec::with_capacity(images.parts.len());
    for (opened, bat_cache) in images.parts.iter().zip(caches) {
        let (chain, writer) = open_part(opened, options, &mut notes)?;
        let (mark, alloc, is_marked) = match writer {
            Some(writer) => (Some(writer.mark), Some(writer.alloc), writer.is_marked),
            None => (None, None, false),
        };
        let part = Part::new(
            opened.start.bytes().ok_or(Error::errno(libc::EFBIG))?,
            chain,
            alloc,
            bat_cache,
            options,
            Arc::clone(&resources.pool),
        )?;
        if is_marked {
            part.reserve_table();
            part.marked.open();
        }
        parts.push(part);
        marks.push(mark);
    }
    let size = total_size(&parts)?;
    let flush = (!options.read_only).then(|| FlushState::new(marks, &parts));
    let disk = Arc::new(Disk {
        parts: ArcSwap::from_pointee(parts),
        size,
        read_only: options.read_only,
        direct: options.direct,
        inline_order: RequestOrder(options.inline_order),
        enospc: options.enospc,
        resources,
        health: Health::default(),
        counters: Counters::default(),
        flush: Mutex::ranked(Rank::Flush, flush.transpose()?),
        flusher: Flusher::new(),
        in_flight: Mutex::ranked(Rank::Intake, 0),
        idle: Condvar::new(),
        space_waiters: AtomicUsize::new(0),
        space_is_short: AtomicBool::new(false),
        closing: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        _images: images,
    });
    if !options.read_only {
        start_flusher(&disk, options)?;
    }
    Ok((disk, notes))
}

fn open_part(
    opened: &OpenedPart,
    options: &DiskOptions,
    notes: &mut Vec<String>,
) -> Result<(Chain, Option<Writer>)> {
    if options.read_only {
        let chain = crate::chain::open::chain(opened, false, notes)?;
        prepare::tell_of_extension(chain.top(), notes);
        return Ok((chain, None));
    }
    let (chain, writer) = open_for_writing(opened, options, notes)?;
    if options.direct {
        direct::expect_blocks(&chain, true)?;
    }
    Ok((chain, writer))
}

fn start_flusher(disk: &Arc<Disk>, options: &DiskOptions) -> Result<()> {
    let interval = Duration::from_millis(options.flush_interval_ms);
    disk.flusher
        .start(disk, (!interval.is_zero()).then_some(interval))
}

/// Looks at the headers of all parts of a split disk before anything is done to any, and gives each
/// part its share of the memory for table pages. However many parts a descriptor names, they get
/// no more memory together than one image could.
fn look_at_parts(images: &OpenedImages, options: &DiskOptions) -> Result<Vec<u64>> {
    let [_, _, ..] = images.parts.as_slice() else {
        return Ok(vec![options.bat_cache; images.parts.len()]);
    };
    let mut pages = Vec::with_capacity(images.parts.len());
    for opened in &images.parts {
        let chain = crate::chain::open::chain(opened, !options.read_only, &mut Vec::new())?;
        pages.push(
            chain
                .top()
                .layout()
                .map_or(1, |l| u64::from(l.page_count())),
        );
    }
    let all: u64 = pages.iter().sum();
    if all > SPLIT_PAGES_MAX {
        let why = format!(
            "the tables of its {} parts are too large together",
            pages.len()
        );
        return Err(Error::why(ErrorKind::Unsupported, why)
            .in_file(&images.named)
            .fix("nobody makes such a disk; nothing was changed"));
    }
    let share = |pages: u64| u128::from(options.bat_cache) * u128::from(pages) / u128::from(all);
    Ok(pages
        .into_iter()
        .map(|pages| u64::try_from(share(pages)).unwrap_or(u64::MAX))
        .collect())
}

/// Checks that the parts follow each other without gap or overlap, and adds them up.
fn total_size(parts: &[Part]) -> Result<u64> {
    let mut end = 0_u64;
    for part in parts {
        if part.start != end {
            let why = format!(
                "a part starts at byte {}, the one before ends at {end}",
                part.start
            );
            return Err(Error::why(ErrorKind::Descriptor, why)
                .in_file(part.chain.top().path())
                .fix("the descriptor's Start and End do not fit the images' sizes"));
        }
        end = end
            .checked_add(part.disk_len())
            .ok_or_else(|| Error::errno(libc::EFBIG))?;
    }
    if i64::try_from(end).is_err() {
        return Err(Error::why(
            ErrorKind::Unsupported,
            "the disk is larger than a file can be",
        ));
    }
    Ok(end)
}

/// Makes sure that no part of a split disk is refused after another one has been changed. All parts
/// are settled by now, so that what is found here is what is found when each is opened.
fn check_split(parts: &[OpenedPart], options: &DiskOptions) -> Result<()> {
    if options.read_only || parts.len() == 1 {
        return Ok(());
    }
    for opened in parts {
        let chain = crate::chain::open::chain(opened, true, &mut Vec::new())?;
        let top = chain.top();
        if let Some(header) = top.header() {
            prepare::examine(top, header, options, &mut Vec::new())
                .map_err(|e| e.at_level(chain.geometry().top).in_file(top.path()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
