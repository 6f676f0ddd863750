//! House rules that no compiler checks: the floors, widths, lengths, words, the manual pages.
//!
//! Every checker is a function from text to complaints, and each is tried here on bad text too:
//! a rule that cannot fail checks nothing.
// A test that cannot read what it is to judge has failed, in helper functions too.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "tidy/floors.rs"]
mod floors;
#[path = "tidy/manual.rs"]
mod manual;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/style.rs"]
mod style;

use std::fs;
use std::path::{Path, PathBuf};

/// A text file of the project: its path below the root, and its content.
pub(crate) struct TextFile {
    pub(crate) name: String,
    pub(crate) text: String,
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Reads one file of the project.
pub(crate) fn read(name: &str) -> String {
    let path = root().join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files below a directory of the project whose name `wanted` accepts, in order.
pub(crate) fn files_below(dir: &str, wanted: impl Fn(&str) -> bool + Copy) -> Vec<TextFile> {
    let mut found = Vec::new();
    let mut pending: Vec<PathBuf> = vec![root().join(dir)];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let name = path
                .strip_prefix(root())
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            if entry.file_type().unwrap().is_dir() {
                if !["fuzz/target", "fuzz/corpus", "fuzz/artifacts"].contains(&name.as_str()) {
                    pending.push(path);
                }
            } else if wanted(&name) {
                found.push(TextFile {
                    text: read(&name),
                    name,
                });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!found.is_empty(), "no files below {dir}");
    found
}

pub(crate) fn rust_files(dirs: &[&str]) -> Vec<TextFile> {
    dirs.iter()
        .flat_map(|dir| files_below(dir, |name| name.ends_with(".rs")))
        .collect()
}

/// Whether a file below src is a module of tests, to which the rules for shipped code do not apply.
fn is_test_module(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.contains("/tests/")
}

/// The sources that end up in the program.
pub(crate) fn shipped_files() -> Vec<TextFile> {
    rust_files(&["src"])
        .into_iter()
        .filter(|file| !is_test_module(&file.name))
        .collect()
}

/// Fails with every complaint, one a line.
pub(crate) fn assert_none(complaints: &[String]) {
    assert!(
        complaints.is_empty(),
        "{} complaints:\n{}",
        complaints.len(),
        complaints.join("\n")
    );
}

const TOP_LEVEL: [&str; 10] = [
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "fuzz",
    "man",
    "src",
    "tests",
    "tools",
];

fn top_level_complaints(entries: &[String]) -> Vec<String> {
    let extra = entries.iter().filter(|name| {
        // Hidden files configure tools; `target` is where Cargo builds.
        !name.starts_with('.') && *name != "target" && !TOP_LEVEL.contains(&name.as_str())
    });
    let missing = TOP_LEVEL
        .iter()
        .filter(|name| !entries.iter().any(|entry| entry == *name));
    extra
        .map(|name| format!("{name}: not an entry of the top level"))
        .chain(missing.map(|name| format!("{name}: missing at the top level")))
        .collect()
}

#[test]
fn the_top_level_holds_only_what_belongs_there() {
    let entries: Vec<String> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_none(&top_level_complaints(&entries));
    let mut bad: Vec<String> = TOP_LEVEL[1..].iter().map(ToString::to_string).collect();
    bad.push("contrib".to_owned());
    assert_eq!(top_level_complaints(&bad).len(), 2);
}

fn manifest_complaints(manifest: &str) -> Vec<String> {
    [
        "edition = \"2024\"",
        "rust-version = \"1.85\"",
        "license = \"MIT OR Apache-2.0\"",
    ]
    .iter()
    .filter(|line| !manifest.lines().any(|found| found == **line))
    .map(|line| format!("Cargo.toml lacks the line {line}"))
    .collect()
}

#[test]
fn the_manifest_promises_the_same_rust_as_the_documents() {
    assert_none(&manifest_complaints(&read("Cargo.toml")));
    assert!(read("README.md").contains("1.85") && read("tools/setup.sh").contains("1.85"));
    assert_eq!(
        manifest_complaints("edition = \"2021\"\nrust-version = \"1.85\"\n").len(),
        2
    );
}
