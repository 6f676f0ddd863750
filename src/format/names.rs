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
use std::collections::HashMap;

/// The file's name.
pub const FILE_NAME: &str = "Snapshots.xml";
/// Deepest nesting: every snapshot of a chain is one level.
const DEPTH_MAX: usize = 1024;
/// The most bytes of a name that are kept.
const NAME_MAX: usize = 256;

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
