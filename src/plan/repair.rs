//! What is wrong with one image, and what mends it: facts in, findings and fixes out.
//!
//! Whoever has the file gathers [`Facts`]: its length, its header, and what one pass over its
//! table found. [`examine`] turns them into findings, one for each kind of trouble, and [`fixes`]
//! into the steps of a repair, in the order in which they must become durable. Neither depends on
//! anything but its arguments, so the same facts always give the same repair.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

mod header;
mod spans;

pub use header::{Evidence, HeaderFix, Normal, count_entries, normalise};
pub use spans::{SPANS_MAX, Spans};

use crate::format::header::{
    FLAG_CONVERTING, Header, HeaderError, IN_USE, RawHeader, WRITE_CLUSTER_SECTORS_MAX,
};
use crate::units::FileCluster;

/// How bad a finding is; the worst one decides the state of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Space of the host is wasted; the data is safe.
    Leak,
    /// The image contradicts itself, or was not closed.
    Corrupt,
}

impl Severity {
    /// The word for programs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Leak => "leak",
            Self::Corrupt => "corrupt",
        }
    }
}

/// One kind of trouble with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trouble {
    /// The header makes no sense, and nothing tells what it should say.
    Header(HeaderError),
    /// The header holds together, but most of the table makes no sense with it.
    Implausible,
    /// A header field is wrong, and the rest of the image tells what it should say.
    Field(HeaderFix),
    /// The image can be read, and this program does not write to its kind.
    ReadOnly(HeaderError),
    /// The in-use mark is set.
    InUse,
    /// Entries that point into the table.
    InTable,
    /// Entries that point past the end of the file.
    PastEnd,
    /// An entry whose cluster the end of the file cuts.
    Cut,
    /// Entries off the cluster borders.
    Misaligned,
    /// Entries that name a cluster of an earlier entry.
    Shared,
    /// Entries that name clusters between the table's last cluster and the first block.
    BeforeFirst,
    /// Entries of clusters behind the end of the disk.
    PastDisk,
    /// Slots after the last entry that are not zero.
    StraySlots,
    /// The file ends before its data begins.
    ShortTable,
    /// Clusters inside the file that nothing uses and that hold bytes.
    Leaked,
    /// Bytes at the end of the file that nothing uses.
    Tail,
    /// An offset of an extension in an image that says it has none.
    StaleExtension,
    /// An extension that cannot be believed.
    BadExtension,
    /// An extension with sections that are not known here; what it uses cannot be told.
    UnknownExtension,
    /// The offset of an extension with another program's closed mark; what it uses cannot be told.
    ForeignExtension,
}

impl Trouble {
    /// True where nothing tells what would be right: the image is then left as it is.
    const fn is_hopeless(self) -> bool {
        matches!(
            self,
            Self::Header(_)
                | Self::Implausible
                | Self::BeforeFirst
                | Self::PastDisk
                | Self::ForeignExtension
        )
    }

    /// The word for programs.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Header(_) => "header",
            Self::Implausible => "header-implausible",
            Self::Field(_) => "header-field",
            Self::ReadOnly(_) => "read-only-kind",
            Self::InUse => "in-use",
            Self::InTable => "entry-in-table",
            Self::PastEnd => "entry-past-end",
            Self::Cut => "entry-cut",
            Self::Misaligned => "entry-misaligned",
            Self::Shared => "entry-shared",
            Self::BeforeFirst => "entry-before-first",
            Self::PastDisk => "entry-past-disk",
            Self::StraySlots => "stray-slots",
            Self::ShortTable => "short-table",
            Self::Leaked => "leaked-clusters",
            Self::Tail => "leaked-tail",
            Self::StaleExtension => "extension-stale",
            Self::BadExtension => "extension-bad",
            Self::UnknownExtension => "extension-unknown",
            Self::ForeignExtension => "extension-foreign",
        }
    }
}

/// Trouble of one kind, with all the places where it was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub trouble: Trouble,
    /// How often it was met: entries, slots, clusters or bytes, as the trouble has it.
    pub count: u64,
    /// The disk clusters that it concerns.
    pub clusters: Spans,
    /// Whether a repair takes it away.
    pub mendable: bool,
}

/// What one pass over the table and the clusters found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableFacts {
    /// Entries that are not 0.
    pub mapped: u64,
    /// Entries that point into the table.
    pub in_table: Spans,
    /// Entries that point past the end.
    pub past_end: Spans,
    /// The entry whose cluster the end of the file cuts.
    pub cut: Spans,
    /// Entries off the cluster borders, their clusters inside the file.
    pub misaligned: Spans,
    /// Entries that name a cluster of an earlier entry.
    pub shared: Spans,
    /// The earlier entries.
    pub partners: Spans,
    /// Entries that name bytes of the file behind the clusters that the table needs and before the
    /// first block: the header's first block may be wrong rather than they.
    pub before_first: u64,
    /// Entries that are not 0 of clusters behind the end of the disk.
    pub past_disk: u64,
    /// Slots after the last entry that are not 0.
    pub stray_slots: u64,
    /// Clusters before [`TableFacts::end`] that nothing uses and that hold bytes.
    pub leaked: u64,
    /// End of all that is used, table included, in bytes; may lie past the end of the file.
    pub end: u64,
}

impl TableFacts {
    /// Entries that a repair sets to 0.
    #[must_use]
    pub fn invalid(&self) -> u64 {
        self.in_table
            .clusters()
            .saturating_add(self.past_end.clusters())
    }

    /// Entries that a repair gives a cluster of their own.
    #[must_use]
    pub fn to_separate(&self) -> u64 {
        self.shared
            .clusters()
            .saturating_add(self.misaligned.clusters())
    }
}

/// What the format extension is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ExtensionFacts {
    /// The header names none.
    #[default]
    None,
    /// The header names one, and says at the same time that there is none.
    Stale,
    /// It cannot be believed.
    Bad,
    /// The header names one, and has a closed mark of another program.
    Foreign,
    /// It holds together.
    Valid {
        /// It has sections that are not known here.
        unknown: bool,
        /// One of them forbids writing.
        forbids_writing: bool,
    },
}

/// All that a decision needs to know of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Length of the file in bytes.
    pub file_len: u64,
    /// The header as found; none in a file too short for one.
    pub raw: Option<RawHeader>,
    /// The header as it should be.
    pub normal: Result<Normal, HeaderError>,
    /// What the table holds; empty where the header makes no sense.
    pub table: TableFacts,
    /// The extension.
    pub extension: ExtensionFacts,
}

/// The findings of one image, the worst first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One for each kind of trouble.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst severity, notes aside; none for a clean image.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        let bad = self.findings.iter().map(|finding| finding.severity);
        bad.filter(|severity| *severity > Severity::Note).max()
    }

    /// Why the image is not written to whatever state it is in.
    fn read_only_kind(&self) -> Option<HeaderError> {
        self.findings
            .iter()
            .find_map(|finding| match finding.trouble {
                Trouble::ReadOnly(why) => Some(why),
                _ => None,
            })
    }

    /// True where a repair would leave trouble behind.
    #[must_use]
    pub fn has_unmendable(&self) -> bool {
        let bad = |f: &Finding| f.severity > Severity::Note && !f.mendable;
        self.findings.iter().any(bad)
    }

    /// True where the findings hold trouble of this kind.
    #[must_use]
    pub fn has(&self, word: &str) -> bool {
        let mut all = self.findings.iter();
        all.any(|finding| finding.trouble.word() == word)
    }

    fn add(&mut self, severity: Severity, trouble: Trouble, count: u64, clusters: &Spans) {
        if count > 0 {
            self.findings.push(Finding {
                severity,
                trouble,
                count,
                clusters: clusters.clone(),
                mendable: severity == Severity::Note || !trouble.is_hopeless(),
            });
        }
    }
}

/// What is wrong with an image.
#[must_use]
pub fn examine(facts: &Facts) -> Report {
    use Severity::{Corrupt, Note};
    let mut report = Report::default();
    let nowhere = Spans::default();
    let normal = match &facts.normal {
        Ok(normal) => normal,
        Err(error) => {
            report.add(Corrupt, Trouble::Header(*error), 1, &nowhere);
            return report;
        }
    };
    for fix in &normal.fixes {
        report.add(Corrupt, Trouble::Field(*fix), 1, &nowhere);
    }
    if let Some(refusal) = normal.header.write_refusal() {
        match refusal {
            HeaderError::ClusterSizeReadOnly(_)
            | HeaderError::FirstBlockUnaligned { .. }
            | HeaderError::Empty => report.add(Note, Trouble::ReadOnly(refusal), 1, &nowhere),
            HeaderError::FirstBlockPastEnd { .. } => {}
            other => report.add(Corrupt, Trouble::Header(other), 1, &nowhere),
        }
    }
    if let Some(trouble) = short(facts.file_len, &normal.header) {
        report.add(Corrupt, trouble, 1, &nowhere);
    }
    report.add(
        Corrupt,
        Trouble::Implausible,
        implausible(facts).into(),
        &nowhere,
    );
    let was_in_use = facts.raw.is_some_and(|raw| raw.in_use == IN_USE);
    report.add(Corrupt, Trouble::InUse, was_in_use.into(), &nowhere);
    let table = &facts.table;
    for (trouble, spans) in [
        (Trouble::InTable, &table.in_table),
        (Trouble::PastEnd, &table.past_end),
        (Trouble::Cut, &table.cut),
        (Trouble::Misaligned, &table.misaligned),
        (Trouble::Shared, &table.shared),
    ] {
        report.add(Corrupt, trouble, spans.clusters(), spans);
    }
    report.add(Corrupt, Trouble::BeforeFirst, table.before_first, &nowhere);
    report.add(Corrupt, Trouble::PastDisk, table.past_disk, &nowhere);
    report.add(Corrupt, Trouble::StraySlots, table.stray_slots, &nowhere);
    examine_space(facts, &mut report);
    if report.read_only_kind().is_some() {
        // What is not written to is not mended either.
        let bad = report.findings.iter_mut();
        bad.for_each(|finding| finding.mendable = finding.severity == Note);
    }
    report
        .findings
        .sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    report
}

/// The extension, and what nothing uses.
fn examine_space(facts: &Facts, report: &mut Report) {
    use Severity::{Corrupt, Leak, Note};
    let nowhere = Spans::default();
    match facts.extension {
        ExtensionFacts::Stale => report.add(Corrupt, Trouble::StaleExtension, 1, &nowhere),
        ExtensionFacts::Bad => report.add(Corrupt, Trouble::BadExtension, 1, &nowhere),
        ExtensionFacts::Valid { unknown: true, .. } => {
            report.add(Note, Trouble::UnknownExtension, 1, &nowhere);
        }
        ExtensionFacts::Foreign => {
            // A repair of anything would set the in-use mark, and so lose the extension.
            let severity = report.worst().map_or(Note, |_| Corrupt);
            report.add(severity, Trouble::ForeignExtension, 1, &nowhere);
        }
        ExtensionFacts::None | ExtensionFacts::Valid { .. } => {}
    }
    report.add(Leak, Trouble::Leaked, facts.table.leaked, &nowhere);
    let tail = facts.file_len.saturating_sub(facts.table.end);
    report.add(Leak, Trouble::Tail, tail, &nowhere);
}

/// What it is when a file ends before its data begins.
fn short(file_len: u64, header: &Header) -> Option<Trouble> {
    let layout = header.layout();
    if file_len >= layout.data_start().get() {
        return None;
    }
    if layout.cluster().sectors().get() <= WRITE_CLUSTER_SECTORS_MAX {
        return Some(Trouble::ShortTable);
    }
    // It would become longer by gigabytes, for a cluster size that is hardly right.
    let first = layout.first_block().get();
    Some(Trouble::Header(HeaderError::FirstBlockPastEnd { first }))
}

/// True where mending the image would follow a header that is probably wrong itself: at least half
/// of the entries point into the table or off the borders, or none is right; or the number of
/// entries contradicts the size of the disk, and so does anything else. A file that was cut off has
/// many entries that point past its end, but no contradiction.
fn implausible(facts: &Facts) -> bool {
    let (Some(raw), Ok(normal)) = (facts.raw, &facts.normal) else {
        return false;
    };
    let (table, layout) = (&facts.table, normal.header.layout());
    let cluster = layout.cluster();
    if normal.header.size().get() == 0 {
        return table.stray_slots > 0 || table.mapped > 0;
    }
    let displaced = table.in_table.clusters();
    let displaced = displaced.saturating_add(table.misaligned.clusters());
    let bad = table.invalid().saturating_add(table.misaligned.clusters());
    let all_bad = table.mapped > 1 && bad == table.mapped;
    // Once the others are cleared these are all: a repair that was cut short must go on.
    let inside = table.mapped.saturating_sub(table.past_end.clusters());
    if all_bad || (displaced > 0 && displaced.saturating_mul(2) >= inside) {
        return true;
    }
    let needed = cluster.count_for(normal.header.size_bytes()).get();
    let found = u64::from(raw.entry_count);
    if found == needed {
        return false;
    }
    let minimum = cluster.count_for(layout.table_end().get());
    let elsewhere = layout.data_start() != cluster.file_start(FileCluster::new(minimum.get()));
    let moved = |fix: &HeaderFix| matches!(fix, HeaderFix::FirstBlock { .. });
    let doubtful = bad > 0
        || table.shared.clusters() > 0
        || table.cut.clusters() > 0
        || table.leaked > 0
        || facts.file_len > table.end;
    (found < needed && (elsewhere || doubtful))
        || (found >= needed.saturating_mul(2) && doubtful)
        || normal.fixes.iter().any(moved)
        || (bad > 0 && bad.saturating_mul(2) >= table.mapped)
}

/// What a repair may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Give wasted space back and change nothing else.
    pub leaks_only: bool,
}

/// A step of a repair. Each is durable before the next begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Set the in-use mark, with the header's fields as they should be and no extension.
    Mark,
    /// Set invalid entries and the slots after the last entry to 0.
    Clear,
    /// Lengthen the file to the end of all that is used.
    Extend,
    /// Copy clusters that two entries share, or that lie off the borders, to free ones.
    Copy,
    /// Let the entries name the copies.
    Repoint,
    /// Give back clusters that nothing uses.
    Punch,
    /// Cut the file behind all that is used.
    Cut,
    /// Take the in-use mark away.
    Close,
}

impl Fix {
    /// The word for programs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Mark => "mark",
            Self::Clear => "clear",
            Self::Extend => "extend",
            Self::Copy => "copy",
            Self::Repoint => "repoint",
            Self::Punch => "punch",
            Self::Cut => "cut",
            Self::Close => "close",
        }
    }

    /// The step in words.
    #[must_use]
    pub const fn phrase(self) -> &'static str {
        match self {
            Self::Mark => "set the in-use mark while the image is changed",
            Self::Clear => "set bad entries, and slots after the last, to 0",
            Self::Extend => "lengthen the file to the end of its last cluster",
            Self::Copy => "copy shared and displaced clusters to places of their own",
            Self::Repoint => "let the table name the copies",
            Self::Punch => "give back clusters that nothing names",
            Self::Cut => "cut off the unused end of the file",
            Self::Close => "take the in-use mark away",
        }
    }
}

/// Why an image is not repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its header makes no sense.
    Header(HeaderError),
    /// Most of the table makes no sense with the header.
    Implausible,
    /// Entries contradict the header's first block.
    BeforeFirst,
    /// Entries contradict the size of the disk.
    PastDisk,
    /// It has an extension that a repair would lose, of another program.
    ForeignExtension,
    /// It has an extension that forbids to write to it.
    Extension,
    /// It is of a kind that is not written to.
    ReadOnlyKind(HeaderError),
    /// Only leaks may be mended, and what leaked may be what bad entries meant.
    LeaksOfCorrupt,
}

/// Why an image is left as it is whatever may be mended of it. Of a kind that is only read even a
/// table that ends too early is no trouble, so that such an image may be clean.
fn refusal(report: &Report) -> Option<Refusal> {
    let hopeless = |f: &&Finding| f.severity > Severity::Note && f.trouble.is_hopeless();
    if let Some(finding) = report.findings.iter().find(hopeless) {
        return Some(match finding.trouble {
            Trouble::Header(error) => Refusal::Header(error),
            Trouble::BeforeFirst => Refusal::BeforeFirst,
            Trouble::PastDisk => Refusal::PastDisk,
            Trouble::ForeignExtension => Refusal::ForeignExtension,
            _ => Refusal::Implausible,
        });
    }
    report.worst()?;
    report.read_only_kind().map(Refusal::ReadOnlyKind)
}

/// The steps that leave a clean image, in durable order; none for a clean one.
pub fn fixes(facts: &Facts, policy: Policy) -> Result<Vec<Fix>, Refusal> {
    let normal = facts.normal.as_ref().map_err(|e| Refusal::Header(*e))?;
    let report = examine(facts);
    if let Some(refusal) = refusal(&report) {
        return Err(refusal);
    }
    if report.worst() < Some(Severity::Leak) {
        return Ok(Vec::new());
    }
    let table = &facts.table;
    let moves = table.to_separate() > 0;
    let clears = table.invalid() > 0;
    let extends = facts.file_len < table.end || moves;
    let raw = facts.raw.unwrap_or(*normal.header.raw());
    let bad_extension = matches!(facts.extension, ExtensionFacts::Stale | ExtensionFacts::Bad);
    let marks = moves
        || clears
        || extends
        || bad_extension
        || table.stray_slots > 0
        || raw.in_use == IN_USE
        || !normal.fixes.is_empty();
    if let ExtensionFacts::Valid {
        forbids_writing, ..
    } = facts.extension
    {
        if forbids_writing && marks {
            return Err(Refusal::Extension);
        }
    }
    if policy.leaks_only {
        let leaks = [
            (table.leaked > 0, Fix::Punch),
            (facts.file_len > table.end, Fix::Cut),
        ];
        // What is not closed or contradicts itself may name its clusters in a way not seen here.
        let sound = !(marks || clears || extends);
        let has_leaks = leaks.iter().any(|(wanted, _)| *wanted);
        if has_leaks && !sound {
            return Err(Refusal::LeaksOfCorrupt);
        }
        return Ok(wanted(&leaks));
    }
    // The extension goes with the mark, and old places with the copies: both leave space behind.
    let frees = moves || (marks && matches!(facts.extension, ExtensionFacts::Valid { .. }));
    let steps = [
        (marks, Fix::Mark),
        (clears || table.stray_slots > 0, Fix::Clear),
        (extends, Fix::Extend),
        (moves, Fix::Copy),
        (moves, Fix::Repoint),
        (table.leaked > 0 || frees, Fix::Punch),
        (facts.file_len > table.end || frees, Fix::Cut),
        (marks, Fix::Close),
    ];
    Ok(wanted(&steps))
}

fn wanted(steps: &[(bool, Fix)]) -> Vec<Fix> {
    let chosen = steps.iter().filter(|(wanted, _)| *wanted);
    chosen.map(|(_, fix)| *fix).collect()
}

/// True for a header of a conversion that was interrupted: its `.idx` file has the old table.
#[must_use]
pub fn is_converting(raw: &RawHeader) -> bool {
    raw.in_use == IN_USE && raw.flags != u32::MAX && raw.flags & FLAG_CONVERTING != 0
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests;
