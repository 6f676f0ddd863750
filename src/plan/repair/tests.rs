//! Facts, and what follows from them.
use super::*;
use crate::format::header::{Header, MAGIC_V1, MAGIC_V2};
use crate::units::FileOffset;

const LEN: u64 = 10 * 4096;

fn raw() -> RawHeader {
    RawHeader {
        magic: MAGIC_V2,
        disk_type: 2,
        heads: 0,
        cylinders: 0,
        cluster_sectors: 8,
        entry_count: 20,
        size_in_sectors: 160,
        in_use: 0,
        first_block: 8,
        flags: 0,
        extension: 0,
    }
}

fn facts(raw: RawHeader) -> Facts {
    let header = Header::validate(&raw, FileOffset::new(LEN)).unwrap();
    Facts {
        file_len: LEN,
        raw: Some(raw),
        normal: Ok(Normal {
            header,
            fixes: Vec::new(),
        }),
        table: TableFacts {
            end: LEN,
            ..TableFacts::default()
        },
        extension: ExtensionFacts::None,
    }
}

fn steps(facts: &Facts) -> Vec<Fix> {
    fixes(facts, Policy::default()).unwrap()
}

#[test]
fn a_clean_image_needs_no_step() {
    let facts = facts(raw());
    assert_eq!(examine(&facts).worst(), None);
    assert_eq!(steps(&facts), []);
}

#[test]
fn space_is_given_back_without_the_mark() {
    let mut facts = facts(raw());
    facts.table.leaked = 3;
    facts.extension = ExtensionFacts::Valid {
        unknown: false,
        forbids_writing: false,
    };
    assert_eq!(examine(&facts).worst(), Some(Severity::Leak));
    assert_eq!(steps(&facts), [Fix::Punch]);
    facts.table.end = LEN - 4096;
    assert_eq!(steps(&facts), [Fix::Punch, Fix::Cut]);
}

#[test]
fn every_change_of_entries_is_within_the_mark() {
    let mut facts = facts(raw());
    facts.table.shared.add(3);
    facts.table.past_end.add(4);
    let all = [
        Fix::Mark,
        Fix::Clear,
        Fix::Extend,
        Fix::Copy,
        Fix::Repoint,
        Fix::Punch,
        Fix::Cut,
        Fix::Close,
    ];
    assert_eq!(steps(&facts), all);
    let leaks_only = Policy { leaks_only: true };
    assert_eq!(fixes(&facts, leaks_only), Ok(vec![]));
    facts.table.leaked = 1;
    assert_eq!(fixes(&facts, leaks_only), Err(Refusal::LeaksOfCorrupt));
}

#[test]
fn an_extension_goes_with_the_mark_unless_it_forbids_that() {
    let mut facts = facts(raw());
    facts.table.past_end.add(4);
    let valid = |forbids_writing| ExtensionFacts::Valid {
        unknown: forbids_writing,
        forbids_writing,
    };
    facts.extension = valid(false);
    let expected = [Fix::Mark, Fix::Clear, Fix::Punch, Fix::Cut, Fix::Close];
    assert_eq!(steps(&facts), expected);
    facts.extension = valid(true);
    assert_eq!(fixes(&facts, Policy::default()), Err(Refusal::Extension));
}

#[test]
fn kinds_that_are_only_read_are_no_trouble() {
    let mut odd = raw();
    odd.cluster_sectors = 9;
    odd.first_block = 9;
    let facts = facts(odd);
    let report = examine(&facts);
    assert_eq!((report.worst(), report.findings.len()), (None, 1));
}

#[test]
fn kinds_that_are_only_read_are_not_mended() {
    let mut odd = raw();
    (odd.cluster_sectors, odd.first_block, odd.in_use) = (9, 9, IN_USE);
    let mut facts = facts(odd);
    let refused = Refusal::ReadOnlyKind(HeaderError::ClusterSizeReadOnly(9));
    for leaks_only in [false, true] {
        assert_eq!(fixes(&facts, Policy { leaks_only }), Err(refused));
    }
    assert!(examine(&facts).has_unmendable());
    if let Some(raw) = &mut facts.raw {
        raw.in_use = 0;
    }
    facts.file_len += 512;
    assert_eq!(fixes(&facts, Policy::default()), Err(refused), "a tail");
}

#[test]
fn a_header_without_sense_is_refused() {
    let mut facts = facts(raw());
    facts.normal = Err(HeaderError::Magic);
    assert!(examine(&facts).has_unmendable());
    let refusal = Refusal::Header(HeaderError::Magic);
    assert_eq!(fixes(&facts, Policy::default()), Err(refusal));
}

/// Ten entries of clusters of 4 KiB in version 1, data from `first` on.
fn old(first: u32) -> RawHeader {
    RawHeader {
        magic: MAGIC_V1,
        entry_count: 10,
        size_in_sectors: 80,
        first_block: first,
        ..raw()
    }
}

/// The first block that a repair would set, where these entries are in the table.
fn moved(raw: &RawHeader, entries: &[u32]) -> Option<u32> {
    let len = FileOffset::new(LEN);
    let layout = count_entries(raw, len).unwrap();
    let mut evidence = Evidence::default();
    for entry in entries {
        evidence.add(&layout, *entry, len);
    }
    let normal = normalise(raw, &layout, &evidence, len).unwrap();
    normal.fixes.iter().find_map(|fix| match fix {
        HeaderFix::FirstBlock { to, .. } => Some(*to),
        _ => None,
    })
}

#[test]
fn what_can_be_read_does_not_end_up_in_the_table() {
    assert_eq!(moved(&old(0), &[8, 16, 24]), Some(8));
    assert_eq!(moved(&old(0), &[2, 8, 16, 24]), None);
}

#[test]
fn data_does_not_begin_past_the_end_of_the_file() {
    for entries in [&[][..], &[8, 16]] {
        assert_eq!(moved(&old(1_000_001), entries), Some(8));
    }
}

#[test]
fn what_passes_for_clean_is_left_alone() {
    let mut facts = facts(RawHeader {
        entry_count: 0,
        size_in_sectors: 0,
        ..raw()
    });
    facts.table.end = LEN + 4096;
    assert!(examine(&facts).worst() < Some(Severity::Leak));
    assert_eq!(steps(&facts), []);
}
