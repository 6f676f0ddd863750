//! Facts, and what follows from them.
use super::*;
use crate::format::header::{Header, MAGIC_V2};
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
fn a_header_without_sense_is_refused() {
    let mut facts = facts(raw());
    facts.normal = Err(HeaderError::Magic);
    assert!(examine(&facts).has_unmendable());
    let refusal = Refusal::Header(HeaderError::Magic);
    assert_eq!(fixes(&facts, Policy::default()), Err(refusal));
}
