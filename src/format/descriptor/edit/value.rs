//! Exchanges the text of an element, and leaves what else stands in it alone.
//!
//! The parser gives texts that may have been written in pieces: with comments and instructions
//! between them, as characters, references or CDATA sections. The first piece that is not blank
//! becomes the new text, the others go, and so does the markup of a CDATA section.

use super::{EditError, Splice, apply};
use crate::format::descriptor::{DEPTH_MAX, DescriptorError};
use crate::format::guid::Guid;
use crate::format::xml::{self, child};
use roxmltree::{Document, Node};
use std::ops::Range;

/// The splices into `text`, the document, that give an element without children another text.
pub(super) fn exchange(text: &str, node: Node<'_, '_>, to: &str) -> Option<Vec<Splice>> {
    let inner = inner(text, node)?;
    let mut at = inner.start;
    let mut splices = Vec::new();
    while at < inner.end {
        let (len, core) = piece(text.get(at..inner.end)?)?;
        if let Some(core) = core {
            let with = if splices.is_empty() { to } else { "" };
            let start = at.checked_add(core.start)?;
            splices.push((start..at.checked_add(core.end)?, with.to_owned()));
        }
        at = at.checked_add(len)?;
    }
    if splices.is_empty() {
        splices.push((inner.end..inner.end, to.to_owned()));
    }
    Some(splices)
}

/// What is between the tags of an element; `None` where it has only one.
fn inner(text: &str, node: Node<'_, '_>) -> Option<Range<usize>> {
    let range = node.range();
    let element = text.get(range.clone())?;
    let mut quote = None;
    let mut bytes = element.bytes();
    let tag_end = bytes.position(|byte| {
        match (quote, byte) {
            (Some(open), byte) if open == byte => quote = None,
            (None, b'"' | b'\'') => quote = Some(byte),
            _ => {}
        }
        quote.is_none() && byte == b'>'
    })?;
    let start = range.start.checked_add(tag_end)?.checked_add(1)?;
    let end = range.start.checked_add(element.rfind("</")?)?;
    (start <= end).then_some(start..end)
}

/// The length of the first piece of what is in an element, and where in it the text is, without
/// blanks around it. `None` for an element.
fn piece(text: &str) -> Option<(usize, Option<Range<usize>>)> {
    for (open, close) in [("<!--", "-->"), ("<?", "?>"), ("<![CDATA[", "]]>")] {
        let Some(rest) = text.strip_prefix(open) else {
            continue;
        };
        let (content, _) = rest.split_once(close)?;
        let len = [open, content, close].map(str::len).into_iter().sum();
        let is_text = open == "<![CDATA[" && !content.trim().is_empty();
        return Some((len, is_text.then_some(0..len)));
    }
    let len = text.find('<').unwrap_or(text.len());
    let characters = text.get(..len).filter(|text| !text.is_empty())?;
    let start = len.checked_sub(characters.trim_start().len())?;
    let end = characters.trim_end().len();
    Some((len, (start < end).then_some(start..end)))
}

/// The text of a descriptor with another GUID of the disk itself, where it has one.
pub fn with_uid(text: &str, uid: Guid) -> Result<String, EditError> {
    let document = xml::parse(text, DEPTH_MAX).map_err(DescriptorError::from)?;
    let Some(node) = uid_of(&document) else {
        return Ok(text.to_owned());
    };
    let to = uid.to_string();
    let new = apply(text, exchange(text, node, &to).ok_or(EditError::Layout)?)?;
    let parsed = xml::parse(&new, DEPTH_MAX).map_err(DescriptorError::from)?;
    if uid_of(&parsed).and_then(guid_in) != Some(uid) {
        return Err(EditError::Layout);
    }
    Ok(new)
}

fn uid_of<'a, 'i>(document: &'a Document<'i>) -> Option<Node<'a, 'i>> {
    let parameters = child(document.root_element(), "Disk_Parameters")?;
    child(parameters, "UID").filter(|node| guid_in(*node).is_some())
}

fn guid_in(node: Node<'_, '_>) -> Option<Guid> {
    Guid::parse(xml::text(node).trim())
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn exchanged(text: &str) -> Option<String> {
        let document = Document::parse(text).unwrap();
        let splices = exchange(text, document.root_element(), "NEW")?;
        Some(apply(text, splices).unwrap())
    }

    #[test]
    fn only_the_text_changes() {
        for (old, new) in [
            ("<a>1</a>", "<a>NEW</a>"),
            (
                "<a b='>' c=\"'>\">\n 1 2\t</a >",
                "<a b='>' c=\"'>\">\n NEW\t</a >",
            ),
            (
                "<a><!-- </a> --> 1<?x >?>2 </a>",
                "<a><!-- </a> --> NEW<?x >?> </a>",
            ),
            ("<a>1<![CDATA[2</a>]]>&#51;</a>", "<a>NEW</a>"),
            (
                "<a> <![CDATA[ ]]><![CDATA[1]]></a>",
                "<a> <![CDATA[ ]]>NEW</a>",
            ),
            ("<a><!--1--></a>", "<a><!--1-->NEW</a>"),
            ("<a></a>", "<a>NEW</a>"),
        ] {
            assert_eq!(exchanged(old).as_deref(), Some(new), "{old}");
        }
        for odd in ["<a/>", "<a b='/>'/>", "<a>1<b/></a>"] {
            assert_eq!(exchanged(odd), None, "{odd}");
        }
    }

    #[test]
    fn a_disk_gets_another_guid_and_nothing_else_changes() {
        let (old, new) = (Guid::random([7; 16]), Guid::random([9; 16]));
        let (head, tail) = (&old.to_string()[..9], &old.to_string()[9..]);
        let text = |uid: &str| {
            format!("<r><Disk_Parameters><X>{old}</X><UID>{uid}</UID></Disk_Parameters></r>")
        };
        for (uid, with) in [
            (old.to_string(), new.to_string()),
            (format!("\n {old}"), format!("\n {new}")),
            (format!("<!-- own -->{old}"), format!("<!-- own -->{new}")),
            (
                format!("{head}<!-- own -->{tail}"),
                format!("{new}<!-- own -->"),
            ),
            (format!("{head}<![CDATA[{tail}]]>"), new.to_string()),
            // None of a disk is left as it is.
            ("none".to_owned(), "none".to_owned()),
        ] {
            assert_eq!(with_uid(&text(&uid), new).unwrap(), text(&with));
        }
        let none = "<r><Disk_Parameters/></r>";
        assert_eq!(with_uid(none, new).unwrap(), none);
    }
}
