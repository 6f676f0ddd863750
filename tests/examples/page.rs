//! Reads the examples out of a manual page.

use std::fs;
use std::path::PathBuf;

/// A line to type, and what the page shows as its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// It is for root.
    pub(crate) root: bool,
    pub(crate) typed: String,
    pub(crate) answer: Vec<String>,
}

/// Consecutive lines of a page. Without a line to type it is the text of some file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) lines: Vec<Line>,
    /// Its first line as it stands.
    pub(crate) first: String,
}

/// mdoc's ways to write some characters.
fn plain(line: &str) -> String {
    [("\\e", "\\"), ("\\-", "-"), ("\\(aq", "'"), ("\\&", "")]
        .iter()
        .fold(line.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn push(block: &mut Block, line: &str) {
    let line = plain(line);
    if block.first.is_empty() {
        block.first.clone_from(&line);
    }
    let prompts = [("$ ", false), ("# ", true)];
    let typed = prompts
        .iter()
        .find_map(|(prompt, root)| Some((line.strip_prefix(prompt)?, *root)));
    match (typed, block.lines.last_mut()) {
        (Some((typed, root)), _) => block.lines.push(Line {
            root,
            typed: typed.to_owned(),
            answer: Vec::new(),
        }),
        (None, Some(last)) => last.answer.push(line),
        (None, None) => {}
    }
}

/// The blocks of the EXAMPLES section.
pub(crate) fn blocks(page: &str) -> Vec<Block> {
    let (mut found, mut open, mut inside) = (Vec::new(), None::<Block>, false);
    for line in page.lines() {
        if let Some(title) = line.strip_prefix(".Sh ") {
            inside = title.trim() == "EXAMPLES";
        } else if !inside {
            continue;
        } else if line.starts_with(".Bd ") {
            open = Some(Block::default());
        } else if line == ".Ed" {
            found.extend(open.take());
        } else if let Some(text) = line.strip_prefix(".Dl ") {
            let mut block = Block::default();
            push(&mut block, text);
            found.push(block);
        } else if let Some(block) = &mut open {
            push(block, line);
        }
    }
    found
}

/// All pages with their names.
pub(crate) fn pages() -> Vec<(String, String)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("man");
    let entries = fs::read_dir(dir).expect("the pages");
    let mut all: Vec<_> = entries
        .map(|entry| {
            let entry = entry.expect("a page");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read_to_string(entry.path()).expect("text"))
        })
        .collect();
    all.sort();
    all
}

pub(crate) fn reading() {
    let page = ".Sh NAME\n.Dl $ no\n.Sh EXAMPLES\nWords:\n.Bd -literal\n# a \\- \\e\nb\n$ c\n.Ed\n\
                .Dl $ d\n.Bd -literal\n[Unit]\n# x=1\n.Ed\n.Sh SEE ALSO\n.Dl $ no\n";
    let found = blocks(page);
    assert_eq!(found.len(), 3);
    let line = |root, typed: &str, answer: &[&str]| Line {
        root,
        typed: typed.to_owned(),
        answer: answer.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(
        found[0].lines,
        [line(true, "a - \\", &["b"]), line(false, "c", &[])]
    );
    assert_eq!(found[0].first, "# a - \\");
    assert_eq!(found[1].lines, [line(false, "d", &[])]);
    assert_eq!(found[2].first, "[Unit]");
}
