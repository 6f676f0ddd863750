//! What people called the snapshots: `Snapshots.xml` beside the bundle.
//!
//! The file belongs to the virtual machine and not to the disk: a tree of `SavedStateItem` elements
//! with the snapshot's GUID as the attribute `guid` and its name in the child `Name`. An item lies
//! within the one that it was made from, and the outermost stands for no snapshot. Nothing depends
//! on the names, so whatever cannot be read is left out.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::format::guid::Guid;
use crate::format::xml::{self, XmlError, child};
use std::collections::{BTreeMap, HashMap};

/// The file's name.
pub const FILE_NAME: &str = "Snapshots.xml";
/// Deepest nesting: every snapshot of a chain is one level.
const DEPTH_MAX: usize = 1024;
/// The most bytes of a name that are kept.
const NAME_MAX: usize = 256;

/// What follows the descriptor's name in the name of the file of names that this program keeps.
pub const OWN_END: &str = ".names";

/// The names that people gave by this program: a file beside the descriptor, since a bundle without
/// a virtual machine has no other place for them, and the virtual machine's is not ours.
#[must_use]
pub fn parse_own(bytes: &[u8]) -> HashMap<Guid, String> {
    let found: Result<Own, _> = serde_json::from_slice(bytes);
    let names = found.map(|own| own.names).unwrap_or_default();
    let known = names.into_iter().filter_map(|(guid, name)| {
        let name = xml::printable(name.trim(), NAME_MAX);
        Some((Guid::parse(&guid)?, name)).filter(|(_, name)| !name.is_empty())
    });
    known.collect()
}

/// The same for whoever will write the file again: `None` where something of it would be lost.
#[must_use]
pub fn parse_own_whole(bytes: &[u8]) -> Option<HashMap<Guid, String>> {
    let own: Own = serde_json::from_slice(bytes).ok()?;
    let known = parse_own(bytes);
    (own.schema_version == 1 && known.len() == own.names.len()).then_some(known)
}

/// The bytes of such a file.
#[must_use]
pub fn encode_own(names: &HashMap<Guid, String>) -> Vec<u8> {
    let own = Own {
        schema_version: 1,
        names: names
            .iter()
            .map(|(guid, name)| (guid.to_string(), name.clone()))
            .collect(),
    };
    let mut bytes = serde_json::to_vec_pretty(&own).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Own {
    schema_version: u32,
    names: BTreeMap<String, String>,
}

/// The names by GUID; of two names for one GUID the first is taken.
pub fn parse(bytes: &[u8]) -> Result<HashMap<Guid, String>, XmlError> {
    let document = xml::parse(xml::text_of(bytes)?, DEPTH_MAX)?;
    let mut names = HashMap::new();
    for node in document
        .descendants()
        .filter(|n| n.tag_name().name() == "SavedStateItem")
    {
        let Some(guid) = node
            .attribute("guid")
            .and_then(|text| Guid::parse(text.trim()))
        else {
            continue;
        };
        let name = child(node, "Name").map(xml::text).unwrap_or_default();
        let name = xml::printable(name.trim(), NAME_MAX);
        if !name.is_empty() {
            names.entry(guid).or_insert(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn own_names_come_back_and_nonsense_is_none() {
        let names = HashMap::from([(Guid::TOP, "a \"b\"".to_owned())]);
        assert_eq!(parse_own(&encode_own(&names)), names);
        let odd = br#"{"schema_version":1,"names":{"x":"y","{5fbaabe3}":"z"}}"#;
        for bytes in [&b""[..], b"[]", odd] {
            assert!(parse_own(bytes).is_empty());
            assert_eq!(parse_own_whole(bytes), None);
        }
        assert_eq!(parse_own_whole(&encode_own(&names)), Some(names));
        assert!(parse_own_whole(br#"{"schema_version":1,"names":{}}"#).is_some());
        assert_eq!(parse_own_whole(br#"{"schema_version":2,"names":{}}"#), None);
    }

    #[test]
    fn names_are_found_at_any_depth() {
        let text = "<?xml version='1.0'?>
<ParallelsSavedStates>
 <SavedStateItem guid=''>
  <Name/>
  <SavedStateItem guid='{0C2F3F0E-71c4-4a55-8f2e-6a1f3d0b9c11}'>
   <Name>Before &amp; after</Name><DateTime>2026-01-01</DateTime>
   <SavedStateItem guid='{1c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}' current='yes'>
    <Name><![CDATA[two
lines]]></Name>
   </SavedStateItem>
   <SavedStateItem guid='nonsense'><Name>lost</Name></SavedStateItem>
   <SavedStateItem guid='{2c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}'/>
  </SavedStateItem>
 </SavedStateItem>
</ParallelsSavedStates>";
        let names = parse(text.as_bytes()).unwrap();
        let of = |text| names.get(&Guid::parse(text).unwrap()).map(String::as_str);
        assert_eq!(
            of("{0c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}"),
            Some("Before & after")
        );
        assert_eq!(
            of("{1c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}"),
            Some("two lines")
        );
        assert_eq!(names.len(), 2);
    }

    #[test]
    fn long_chains_and_long_names_fit() {
        let mut text = String::new();
        for i in 0..253 {
            let guid = format!("{i:08x}-0000-0000-0000-000000000001");
            let name = "\u{e9}".repeat(300);
            text.push_str(&format!(
                "<SavedStateItem guid='{guid}'><Name>{name}</Name>"
            ));
        }
        text.push_str(&"</SavedStateItem>".repeat(253));
        let names = parse(text.as_bytes()).unwrap();
        assert_eq!(names.len(), 253);
        assert!(names.values().all(|name| name.len() == 256));
    }
}
