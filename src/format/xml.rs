//! XML with bounds: what is parsed is at most 1 MiB, flat, and has no DTD, so that parsing takes
//! linear time and little memory whoever wrote the file.
#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use crate::units::len_u64;
use roxmltree::{Document, Node, ParsingOptions};
use thiserror::Error;

/// The most bytes of a document.
pub const BYTES_MAX: u64 = 1 << 20;
/// The most nodes of a document, texts between elements included.
const NODES_MAX: u32 = 200_000;
/// The most `=` between two `<`, and so the most attributes of an element: the parser compares each
/// with each.
const ATTRIBUTES_MAX: usize = 64;
/// The most declarations of name spaces: the parser copies them into every element below.
const NAMESPACES_MAX: usize = 64;

/// Why a document is not even looked into.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum XmlError {
    /// More than [`BYTES_MAX`].
    #[error("{0} bytes are more than such a file may have (1 MiB)")]
    TooLong(u64),
    /// No bytes, or only blanks.
    #[error("the file is empty")]
    Empty,
    /// Not UTF-8.
    #[error("line {line}: not UTF-8")]
    NotText {
        /// Line of the first bad byte.
        line: usize,
    },
    /// An element with more attributes, or a document with more name spaces, than any writer makes.
    #[error("line {line}: too many attributes")]
    Attributes {
        /// Line of the element.
        line: usize,
    },
    /// Elements nested too deep.
    #[error("line {line}: elements nested more than {max} deep")]
    TooDeep {
        /// Line of the element.
        line: usize,
        /// The bound.
        max: usize,
    },
    /// Not well-formed, or with a DTD.
    #[error("line {line}: {}", printable(&error.to_string(), 200))]
    Malformed {
        /// Where the parser stopped.
        line: usize,
        /// What it says.
        error: roxmltree::Error,
    },
}

/// Places an error. The parser leaves some without a position.
fn malformed(error: roxmltree::Error, text: &str) -> XmlError {
    let bytes = text.as_bytes();
    let line = match error {
        roxmltree::Error::UnclosedRootNode
        | roxmltree::Error::UnexpectedEndOfStream
        | roxmltree::Error::NoRootNode => line_of(bytes, text.trim_end().len()),
        roxmltree::Error::DtdDetected => line_of(bytes, text.find("<!DOCTYPE").unwrap_or(0)),
        _ => usize::try_from(error.pos().row).unwrap_or(usize::MAX),
    };
    XmlError::Malformed { line, error }
}

fn line_of(bytes: &[u8], at: usize) -> usize {
    let before = bytes.iter().take(at);
    before
        .filter(|byte| **byte == b'\n')
        .count()
        .saturating_add(1)
}

/// Checks the bounds and gives the text without its byte order mark.
pub fn text_of(bytes: &[u8]) -> Result<&str, XmlError> {
    let len = len_u64(bytes.len());
    if len > BYTES_MAX {
        return Err(XmlError::TooLong(len));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| XmlError::NotText {
        line: line_of(bytes, e.valid_up_to()),
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(XmlError::Empty);
    }
    let mut equals = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'<' => equals = 0,
            b'=' => equals = equals.saturating_add(1),
            _ => {}
        }
        if equals > ATTRIBUTES_MAX {
            return Err(XmlError::Attributes {
                line: line_of(text.as_bytes(), at),
            });
        }
    }
    if let Some((at, _)) = text.match_indices("xmlns").nth(NAMESPACES_MAX) {
        return Err(XmlError::Attributes {
            line: line_of(text.as_bytes(), at),
        });
    }
    Ok(text)
}

/// Parses a checked text whose elements nest at most `depth_max` deep, the root being 1.
pub fn parse(text: &str, depth_max: usize) -> Result<Document<'_>, XmlError> {
    let options = ParsingOptions {
        nodes_limit: NODES_MAX,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(text, options).map_err(|e| malformed(e, text))?;
    check_depth(&document, depth_max)?;
    Ok(document)
}

fn check_depth(document: &Document<'_>, max: usize) -> Result<(), XmlError> {
    let mut node = document.root();
    let mut depth = 0_usize;
    loop {
        if let Some(child) = node.first_child() {
            node = child;
            depth = depth.saturating_add(1);
        } else {
            // Up to the nearest node that has one after it.
            loop {
                if let Some(next) = node.next_sibling() {
                    node = next;
                    break;
                }
                let Some(parent) = node.parent() else {
                    return Ok(());
                };
                node = parent;
                depth = depth.saturating_sub(1);
            }
        }
        if depth > max && node.is_element() {
            return Err(XmlError::TooDeep {
                line: line(node),
                max,
            });
        }
    }
}

/// The line on which a node starts. Linear in the document: for errors only.
#[must_use]
pub fn line(node: Node<'_, '_>) -> usize {
    line_of(node.document().input_text().as_bytes(), node.range().start)
}

/// The children of this name, whatever name space they are in.
pub fn children<'a, 'i: 'a>(
    node: Node<'a, 'i>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children()
        .filter(move |child| child.is_element() && child.tag_name().name() == name)
}

/// The first child of this name.
#[must_use]
pub fn child<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

/// All text directly in a node: comments may cut it into several.
#[must_use]
pub fn text(node: Node<'_, '_>) -> String {
    node.children()
        .filter(Node::is_text)
        .filter_map(|part| part.text())
        .collect()
}

/// True for what a document can hold, be it as a reference.
#[must_use]
pub const fn can_hold(character: char) -> bool {
    match character {
        '\t' | '\n' | '\r' => true,
        '\u{fffe}' | '\u{ffff}' => false,
        other => other >= ' ',
    }
}

/// At most so many bytes of a text that came from a file, fit to be shown: control characters could
/// do things to a terminal, and line breaks tear tables.
#[must_use]
pub fn printable(text: &str, max: usize) -> String {
    let mut kept = String::new();
    for character in text.chars() {
        let character = if character.is_control() {
            ' '
        } else {
            character
        };
        if kept.len().saturating_add(character.len_utf8()) > max {
            break;
        }
        kept.push(character);
    }
    kept
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn error(text: &str) -> XmlError {
        match text_of(text.as_bytes()).and_then(|text| parse(text, 16)) {
            Ok(_) => panic!("{text} was accepted"),
            Err(e) => e,
        }
    }

    #[test]
    fn bounds_hold() {
        let deep = |n: usize| format!("{}{}", "<a>".repeat(n), "</a>".repeat(n));
        assert!(parse(&deep(16), 16).is_ok());
        assert_eq!(error(&deep(17)), XmlError::TooDeep { line: 1, max: 16 });
        assert_eq!(
            error(&deep(100_000)),
            XmlError::TooDeep { line: 1, max: 16 }
        );
        assert_eq!(error(" \n"), XmlError::Empty);
        assert_eq!(
            error(&" ".repeat((1 << 20) + 1)),
            XmlError::TooLong((1 << 20) + 1)
        );
        let many: String = (0..65).map(|i| format!(" a{i}='1'")).collect();
        assert_eq!(
            error(&format!("<r>\n<a{many}/></r>")),
            XmlError::Attributes { line: 2 }
        );
        let spaces = "<a xmlns:b='c'/>".repeat(65);
        assert_eq!(
            error(&format!("<r>{spaces}</r>")),
            XmlError::Attributes { line: 1 }
        );
        assert!(matches!(
            error(&"<a/>".repeat(200_001)),
            XmlError::Malformed { .. }
        ));
        assert_eq!(text_of(b"<r>\n\xff"), Err(XmlError::NotText { line: 2 }));
    }

    #[test]
    fn long_names_do_not_make_long_errors() {
        let name = "a".repeat(100_000);
        let text = error(&format!("<{name}></b>")).to_string();
        assert_eq!(text.len(), "line 1: ".len() + 200);
        assert_eq!(printable("a\u{9b}31m\u{e9}\n", 7), "a 31m\u{e9}");
    }

    #[test]
    fn there_is_no_dtd() {
        let bomb = "<!DOCTYPE r [<!ENTITY a \"aaaa\">]><r>&a;</r>";
        assert!(matches!(
            error(bomb),
            XmlError::Malformed {
                error: roxmltree::Error::DtdDetected,
                ..
            }
        ));
    }

    #[test]
    fn every_error_has_its_line() {
        for (text, line) in [
            ("<r>\n<a>\n</r>", 3),
            ("<r>\n<a>\n\n", 2),
            ("\n<!-- x -->\n", 2),
            ("\n\n<!DOCTYPE r []>\n<r/>", 3),
            ("<r>\n&unknown;</r>", 2),
            ("<r>\n<a b='1' b='2'/></r>", 2),
            ("<r", 1),
        ] {
            let told = error(text).to_string();
            assert!(
                told.starts_with(&format!("line {line}: ")),
                "{text}: {told}"
            );
        }
    }

    #[test]
    fn texts_cut_by_comments_are_one() {
        let document = parse("<r>a<!-- x -->b<![CDATA[<c>]]></r>", 16).unwrap();
        assert_eq!(text(document.root_element()), "ab<c>");
    }
}
