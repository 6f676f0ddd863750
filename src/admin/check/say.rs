//! Findings in words and as JSON.

use super::Checked;
use crate::plan::repair::{ExtensionFacts, Finding, HeaderFix, Severity, Spans, Trouble};
use crate::units::{DiskCluster, DiskOffset};
use serde::Serialize;

/// A finding as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Said {
    /// `corrupt`, `leak` or `note`.
    pub severity: &'static str,
    /// The stable word of its kind.
    pub kind: &'static str,
    /// What it is.
    pub message: String,
    /// How often it was met: entries, slots, clusters or bytes, as the message has it.
    pub count: u64,
    /// A repair takes it away.
    pub repairable: bool,
    /// What a repair does to the disk's contents: `lost` (reads as the level below has it, or as
    /// zeros), `cut` (the end of the cluster does) or `suspect` (kept, but perhaps another's).
    pub fate: Option<&'static str>,
    /// The bytes of the disk that it concerns, as far as they are listed.
    pub ranges: Vec<ByteRange>,
    /// Clusters that it concerns and that are in no range.
    pub unlisted_clusters: u64,
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ByteRange {
    /// The first one.
    pub start: u64,
    /// How many.
    pub len: u64,
}

/// The word for a severity, or for its absence.
#[must_use]
pub const fn state(worst: Option<Severity>) -> &'static str {
    match worst {
        Some(Severity::Corrupt) => "corrupt",
        Some(Severity::Leak) => "leaks",
        Some(Severity::Note) | None => "clean",
    }
}

fn entries(count: u64, one: &str, more: &str) -> String {
    match count {
        1 => format!("1 entry of the table {one}"),
        n => format!("{n} entries of the table {more}"),
    }
}

fn message(finding: &Finding) -> String {
    let n = finding.count;
    match &finding.trouble {
        Trouble::Header(error) => format!("the header makes no sense: {error}"),
        Trouble::Implausible => "the header contradicts itself, or much of the image makes no \
                                 sense with it: its magic, its cluster size or the size of the \
                                 disk is probably wrong"
            .to_owned(),
        Trouble::Field(fix) => field(*fix),
        Trouble::ReadOnly(error) => format!("this kind is only read here: {error}"),
        Trouble::InUse => {
            "the in-use mark is set: the image is open elsewhere, or was not closed".to_owned()
        }
        Trouble::InTable => entries(n, "points into the table", "point into the table"),
        Trouble::PastEnd => entries(
            n,
            "points past the end of the file",
            "point past the end of the file",
        ),
        Trouble::Cut => "the end of the file cuts a cluster of the disk".to_owned(),
        Trouble::Misaligned => entries(
            n,
            "is not on a cluster border",
            "are not on a cluster border",
        ),
        Trouble::Shared => entries(
            n,
            "names the cluster of another one",
            "name the cluster of another one",
        ),
        Trouble::BeforeFirst => entries(
            n,
            "names a cluster that the header's first block leaves to the table",
            "name clusters that the header's first block leaves to the table",
        ),
        Trouble::PastDisk => entries(
            n,
            "is for a cluster behind the end of the disk",
            "are for clusters behind the end of the disk",
        ),
        Trouble::StraySlots => format!("{n} slots after the last entry are not zero"),
        Trouble::ShortTable => "the file ends before its first data cluster".to_owned(),
        Trouble::Leaked => format!("{n} clusters hold data that nothing names"),
        Trouble::Tail => format!("{n} bytes at the end of the file are not used"),
        Trouble::StaleExtension => {
            "the header has the offset of a format extension and says that there is none".to_owned()
        }
        Trouble::BadExtension => "the format extension is not valid".to_owned(),
        Trouble::ForeignExtension => "the header names a format extension with a closed mark of \
                                      another program, so leaks cannot be told"
            .to_owned(),
        Trouble::UnknownExtension => {
            "the format extension has unknown sections, so leaks cannot be told".to_owned()
        }
    }
}

fn field(fix: HeaderFix) -> String {
    match fix {
        HeaderFix::Type { from } => format!("the header's type is {from} instead of 2"),
        HeaderFix::EntryCount { from, to } => {
            format!("the header has {from} entries; its disk size makes {to}")
        }
        HeaderFix::FirstBlock { from, to } => {
            format!("the header has the first block at sector {from}; by the table it is at {to}")
        }
    }
}

fn fate(trouble: &Trouble) -> Option<&'static str> {
    match trouble {
        Trouble::InTable | Trouble::PastEnd => Some("lost"),
        Trouble::Cut => Some("cut"),
        Trouble::Shared | Trouble::Misaligned => Some("suspect"),
        _ => None,
    }
}

/// The ranges of some disk clusters in bytes, clipped to the disk.
fn ranges(checked: &Checked, clusters: &Spans) -> Vec<ByteRange> {
    let Ok(normal) = &checked.facts.normal else {
        return Vec::new();
    };
    let (cluster, end) = (normal.header.layout().cluster(), normal.header.size_bytes());
    let at = |number| {
        let start: DiskOffset = cluster.disk_start(DiskCluster::new(number));
        start.get().min(end)
    };
    let spans = clusters.list().iter();
    spans
        .map(|span| ByteRange {
            start: at(span.start),
            len: at(span.end) - at(span.start),
        })
        .collect()
}

/// All findings of an image, the worst first.
#[must_use]
pub fn findings(checked: &Checked) -> Vec<Said> {
    let facts = &checked.facts;
    let said = |finding: &Finding| {
        let mut message = message(finding);
        if let (Trouble::BadExtension, Some(why)) = (finding.trouble, checked.disbelief) {
            message = format!("{message}: {why}");
        }
        let mut ranges = ranges(checked, &finding.clusters);
        if finding.trouble == Trouble::Shared {
            ranges.extend(self::ranges(checked, &facts.table.partners));
            ranges.sort_unstable_by_key(|range| range.start);
        }
        Said {
            severity: finding.severity.word(),
            kind: finding.trouble.word(),
            message,
            count: finding.count,
            repairable: finding.mendable,
            fate: fate(&finding.trouble),
            ranges,
            unlisted_clusters: finding.clusters.untold(),
        }
    };
    checked.report.findings.iter().map(said).collect()
}

/// True where a repair that sets the in-use mark drops dirty bitmaps that are sound.
#[must_use]
pub fn has_bitmaps(checked: &Checked) -> bool {
    matches!(checked.facts.extension, ExtensionFacts::Valid { .. }) && !checked.bitmaps.is_empty()
}
