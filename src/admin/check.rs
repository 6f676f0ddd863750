//! What is wrong with an image: found without changing a byte, whatever state the image is in.
//!
//! The facts are gathered in a few passes: the header; the table for what its entries say about the
//! header; the table again, entry by entry; then the clusters that nothing names, of which those
//! that hold bytes have leaked. Memory is a bit for each entry at most, and holes of the file cost
//! nothing. What the facts mean is for [`crate::plan::repair`] to say,
//! and [`disk`] looks at all images of a disk and at what lies beside them.

pub mod disk;
pub mod say;

use crate::admin::progress::Progress;
use crate::delta::classify::{Class, Classifier, Grid, Used};
use crate::delta::{extension, walk};
use crate::error::Result;
use crate::format::bat::EntryError;
use crate::format::extension::Extension;
use crate::format::header::{CLOSED_V21, HEADER_LEN, Header, HeaderError, IN_USE, RawHeader};
use crate::format::layout::Layout;
use crate::plan::repair::{
    Evidence, ExtensionFacts, Facts, Report, SPANS_MAX, Spans, TableFacts, count_entries, examine,
    normalise,
};
use crate::storage::Storage;
use crate::units::{FileOffset, len_u64};
use std::collections::HashSet;
use std::ops::Range;

/// Bytes that are looked at at a time for whether they are all zeros.
const STRIDE: u64 = 1 << 20;

/// An image that was looked at.
#[derive(Clone, Debug)]
pub struct Checked {
    /// What was found.
    pub facts: Facts,
    /// What it means.
    pub report: Report,
    /// Why the extension is not believed, where it is not.
    pub disbelief: Option<extension::Disbelief>,
    /// Id of each dirty bitmap of a sound extension.
    pub bitmaps: Vec<String>,
}

/// Looks at one image. Fails only where the host does; an image that makes no sense is a finding.
pub fn check_image(storage: &dyn Storage) -> Result<Checked> {
    check_image_with(storage, &Progress::default())
}

/// The same, telling how far it is.
pub fn check_image_with(storage: &dyn Storage, progress: &Progress) -> Result<Checked> {
    Ok(gather_with(storage, progress)?.checked)
}

/// What a check knows besides.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) checked: Checked,
    pub(super) space: Option<Space>,
}

/// Which clusters of a file are spoken for.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) grid: Grid,
    /// First cluster after the table.
    pub(super) first: u64,
    /// A sound image has no cluster at or above this.
    pub(super) limit: u64,
    /// Named by entries that keep their clusters.
    pub(super) named: Used,
    /// End of these and of the table, bytes.
    pub(super) named_end: u64,
    /// Touched by entries off the borders.
    pub(super) touched: Used,
    /// Used by a sound extension.
    pub(super) extension: Vec<Range<u64>>,
}

/// Gathers all facts of an image.
pub(super) fn gather(storage: &dyn Storage) -> Result<Gathered> {
    gather_with(storage, &Progress::default())
}

/// The same, telling how far it is.
pub(super) fn gather_with(storage: &dyn Storage, progress: &Progress) -> Result<Gathered> {
    let file_len = storage.len()?;
    let mut facts = Facts {
        file_len: file_len.get(),
        raw: None,
        normal: Err(HeaderError::Short {
            len: file_len.get(),
        }),
        table: TableFacts::default(),
        extension: ExtensionFacts::None,
    };
    let header = if file_len.get() < len_u64(HEADER_LEN) {
        None
    } else {
        let mut bytes = [0; HEADER_LEN];
        storage.read_at(FileOffset::ZERO, &mut bytes)?;
        let raw = RawHeader::decode(&bytes);
        facts.raw = Some(raw);
        facts.normal = read_header(storage, &raw, file_len)?;
        facts.normal.as_ref().ok().map(|normal| normal.header)
    };
    let (mut space, mut disbelief, mut bitmaps) = (None, None, Vec::new());
    if let Some(header) = header {
        let mut found = table(storage, &header, file_len, &mut facts.table, progress)?;
        match read_extension(storage, &header, &found)? {
            Ok(known) => {
                facts.extension = known.facts;
                bitmaps = known.bitmaps;
                found.extension = known.touched;
            }
            Err(why) => {
                facts.extension = ExtensionFacts::Bad;
                disbelief = Some(why);
            }
        }
        // Behind other closed marks stands who knows what; it is left alone.
        if matches!(header.raw().in_use, 0 | IN_USE) && header.raw().extension != 0 {
            facts.extension = ExtensionFacts::Stale;
        }
        if !matches!(header.raw().in_use, 0 | IN_USE | CLOSED_V21) && header.raw().extension != 0 {
            facts.extension = ExtensionFacts::Foreign;
        }
        spaces(storage, &mut facts, &found, progress)?;
        space = Some(found);
    }
    let report = examine(&facts);
    let checked = Checked {
        facts,
        report,
        disbelief,
        bitmaps,
    };
    Ok(Gathered { checked, space })
}

fn read_header(
    storage: &dyn Storage,
    raw: &RawHeader,
    file_len: FileOffset,
) -> Result<std::result::Result<crate::plan::repair::Normal, HeaderError>> {
    let layout = match count_entries(raw, file_len) {
        Ok(layout) => layout,
        Err(error) => return Ok(Err(error)),
    };
    let mut evidence = Evidence::default();
    if layout.table_end() <= file_len {
        walk::words(storage, layout.table_end(), |_, bytes| {
            for entry in bytes.chunks_exact(4).map(walk::word) {
                if entry != 0 {
                    evidence.add(&layout, entry, file_len);
                }
            }
            Ok(())
        })?;
    }
    Ok(normalise(raw, &layout, &evidence, file_len))
}

/// Calls `each` with every word of a table: the disk cluster and class of an entry, or `None` for a
/// slot after the last one.
pub(super) fn entries(
    at: FileOffset,
    bytes: &[u8],
    layout: &Layout,
    mut each: impl FnMut(Option<u64>, u32) -> Result<()>,
) -> Result<()> {
    let end = layout.table_end().get();
    let positions = (at.get()..).step_by(4);
    for (position, word) in positions.zip(bytes.chunks_exact(4)) {
        let cluster = (position < end).then(|| (position - 64) / 4);
        each(cluster, walk::word(word))?;
    }
    Ok(())
}

/// End of the clusters that the entries need, or of the table's room where that is less. What
/// follows up to the first block may be data, if the header has the wrong one.
pub(super) fn slots_end(layout: &Layout) -> FileOffset {
    let cluster = layout.cluster();
    let needed = cluster.count_for(layout.table_end().get()).get();
    let needed = FileOffset::new(needed.saturating_mul(cluster.bytes()));
    layout.data_start().min(needed)
}

fn table(
    storage: &dyn Storage,
    header: &Header,
    file_len: FileOffset,
    facts: &mut TableFacts,
    progress: &Progress,
) -> Result<Space> {
    let layout = header.layout();
    let mut classifier = Classifier::new(layout, file_len)?;
    let grid = classifier.grid();
    let size = layout.cluster().bytes();
    let (mut touched, mut shared) = (Used::new(classifier.limit())?, HashSet::new());
    let mut named_end = layout.data_start().get().max(layout.table_end().get());
    let mut end = named_end;
    let disk_clusters = layout.cluster().count_for(header.size_bytes()).get();
    let slots_end = slots_end(layout);
    let mut passed = Passed::begin(progress, "reading the table", 0, slots_end.get());
    walk::words(storage, slots_end, |at, bytes| {
        passed.to(at.get())?;
        entries(at, bytes, layout, |cluster, entry| {
            let Some(cluster) = cluster else {
                facts.stray_slots += u64::from(entry != 0);
                return Ok(());
            };
            facts.mapped += u64::from(entry != 0);
            facts.past_disk += u64::from(entry != 0 && cluster >= disk_clusters);
            match classifier.class(entry)? {
                Class::Hole => {}
                Class::Good(number) => named_end = named_end.max(grid.start(number + 1)),
                Class::Cut(number) => {
                    named_end = named_end.max(grid.start(number + 1));
                    facts.cut.add(cluster);
                }
                Class::Shared(number) => {
                    if shared.len() < SPANS_MAX {
                        shared.insert(number);
                    }
                    facts.shared.add(cluster);
                }
                Class::Misaligned => {
                    let start = layout.entry_start(entry).get();
                    end = end.max(start + size);
                    for number in grid.touched(start..start + size) {
                        touched.insert(number)?;
                    }
                    facts.misaligned.add(cluster);
                }
                Class::Bad(EntryError::InTable(_)) => {
                    let start = layout.entry_start(entry);
                    let is_data = start >= slots_end.max(layout.table_end()) && start < file_len;
                    facts.before_first += u64::from(is_data);
                    facts.in_table.add(cluster);
                }
                Class::Bad(_) => facts.past_end.add(cluster),
            }
            Ok(())
        })
    })?;
    facts.end = end.max(named_end);
    facts.partners = partners(storage, layout, file_len, &shared)?;
    Ok(Space {
        grid,
        first: grid.first_from(layout.data_start().get().max(layout.table_end().get())),
        limit: classifier.limit(),
        named: classifier.finish(),
        named_end,
        touched,
        extension: Vec::new(),
    })
}

/// The entries that had the shared clusters first.
fn partners(
    storage: &dyn Storage,
    layout: &Layout,
    file_len: FileOffset,
    shared: &HashSet<u64>,
) -> Result<Spans> {
    let mut found = Spans::default();
    if shared.is_empty() {
        return Ok(found);
    }
    let mut classifier = Classifier::new(layout, file_len)?;
    walk::words(storage, layout.table_end(), |at, bytes| {
        entries(at, bytes, layout, |cluster, entry| {
            match (cluster, classifier.class(entry)?) {
                (Some(cluster), Class::Good(number) | Class::Cut(number))
                    if shared.contains(&number) =>
                {
                    found.add(cluster);
                }
                _ => {}
            }
            Ok(())
        })
    })?;
    Ok(found)
}

/// A sound extension.
struct Known {
    facts: ExtensionFacts,
    touched: Vec<Range<u64>>,
    bitmaps: Vec<String>,
}

fn read_extension(
    storage: &dyn Storage,
    header: &Header,
    space: &Space,
) -> Result<std::result::Result<Known, extension::Disbelief>> {
    let size = header.layout().cluster().bytes();
    let numbers = |at: u64| space.grid.touched(at..at.saturating_add(size));
    let is_data = |at: FileOffset| {
        let mut all = numbers(at.get());
        all.any(|number| space.named.contains(number))
    };
    let found = extension::read(storage, header, is_data)?;
    Ok(found.map(|found| match found {
        None => Known {
            facts: ExtensionFacts::None,
            touched: Vec::new(),
            bitmaps: Vec::new(),
        },
        Some(extension) => Known {
            facts: ExtensionFacts::Valid {
                unknown: !extension.unknown.is_empty(),
                forbids_writing: extension.forbids_writing(),
            },
            touched: extension
                .clusters
                .iter()
                .map(|at| numbers(at.bytes().unwrap_or(u64::MAX)))
                .collect(),
            bitmaps: bitmap_ids(&extension),
        },
    }))
}

fn bitmap_ids(extension: &Extension) -> Vec<String> {
    let bitmaps = extension.bitmaps.iter();
    bitmaps.map(|bitmap| bitmap.id.to_string()).collect()
}

/// Counts what has leaked, and finds the end of all that is used.
fn spaces(
    storage: &dyn Storage,
    facts: &mut Facts,
    space: &Space,
    progress: &Progress,
) -> Result<()> {
    let extension = facts.extension;
    if let ExtensionFacts::Foreign | ExtensionFacts::Valid { unknown: true, .. } = extension {
        // Its sections may use any cluster.
        facts.table.end = facts.table.end.max(facts.file_len);
        return Ok(());
    }
    let mut extension = Used::new(space.limit)?;
    for numbers in &space.extension {
        for number in numbers.clone() {
            extension.insert(number)?;
        }
        facts.table.end = facts.table.end.max(space.grid.start(numbers.end));
    }
    let mut leaked = 0_u64;
    let taken = [&space.named, &space.touched, &extension];
    let mut passed = Passed::begin(
        progress,
        "looking for lost clusters",
        space.grid.start(space.first),
        facts.table.end,
    );
    leaks_with(storage, space, &taken, facts.table.end, &mut passed, |_| {
        leaked += 1;
        Ok(())
    })?;
    facts.table.leaked = leaked;
    Ok(())
}

/// Calls `each` for every cluster from the first up to byte `end` that no set has and that holds
/// a byte that is not 0.
pub(super) fn leaks(
    storage: &dyn Storage,
    space: &Space,
    taken: &[&Used],
    end: u64,
    each: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let progress = Progress::default();
    let mut passed = Passed::begin(&progress, "", 0, end);
    leaks_with(storage, space, taken, end, &mut passed, each)
}

/// The same, telling how far it is.
pub(super) fn leaks_with(
    storage: &dyn Storage,
    space: &Space,
    taken: &[&Used],
    end: u64,
    passed: &mut Passed<'_>,
    mut each: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let grid = space.grid;
    let end = end.min(storage.len()?.get());
    let mut next = space.first;
    let mut buffer = Vec::new();
    let mut at = grid.start(next);
    while at < end {
        let Some(data) = storage.next_data(FileOffset::new(at))? else {
            break;
        };
        let numbers = grid.touched(data.start.get()..data.end.get().min(end));
        for number in numbers.start.max(next)..numbers.end {
            let range = grid.start(number)..grid.start(number + 1).min(end);
            passed.to(range.start)?;
            let is_taken = taken.iter().any(|set| set.contains(number));
            if !is_taken && !is_zero(storage, range, &mut buffer)? {
                each(number)?;
            }
        }
        next = next.max(numbers.end);
        at = data.end.get().max(grid.start(next));
    }
    Ok(())
}

/// Tells how far a walk over a file is.
#[derive(Debug)]
pub(super) struct Passed<'a> {
    progress: &'a Progress,
    at: u64,
}

impl<'a> Passed<'a> {
    /// Begins a step from one place of the file to another one.
    pub(super) fn begin(progress: &'a Progress, what: &str, from: u64, end: u64) -> Self {
        progress.step(what, end.saturating_sub(from));
        Self { progress, at: from }
    }

    /// The walk is here. Fails where the user wants it to end.
    pub(super) fn to(&mut self, at: u64) -> Result<()> {
        self.progress.add(at.saturating_sub(self.at));
        self.at = self.at.max(at);
        self.progress.check()
    }
}

/// True where all bytes of the range are 0.
fn is_zero(storage: &dyn Storage, range: Range<u64>, buffer: &mut Vec<u8>) -> Result<bool> {
    let mut at = range.start;
    while at < range.end {
        let Some(data) = storage.next_data(FileOffset::new(at))? else {
            break;
        };
        at = at.max(data.start.get());
        let len = range.end.min(data.end.get()).saturating_sub(at).min(STRIDE);
        if len == 0 {
            break;
        }
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        storage.read_at(FileOffset::new(at), buffer)?;
        if buffer.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}
