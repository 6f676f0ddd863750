//! Width, ASCII, lengths, words.

use crate::source::{code, comments, functions, line_of, shipped_code, words};
use crate::{TextFile, assert_none, files_below, read, root, rust_files, shipped_files};

const WIDTH_MAX: usize = 100;
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// Everything that people write here: sources, scripts, pages and manifests.
fn written_files() -> Vec<TextFile> {
    let text = |name: &str| !name.ends_with(".lock") && !name.contains("/data/") && !binary(name);
    let mut files: Vec<TextFile> = ["src", "tests", "tools", "man"]
        .iter()
        .flat_map(|dir| files_below(dir, text))
        .collect();
    files.extend(files_below("fuzz", |name| {
        name.ends_with(".rs") || name.ends_with(".toml")
    }));
    for name in [
        "Cargo.toml",
        "README.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        ".ci/run",
    ] {
        files.push(TextFile {
            name: name.to_owned(),
            text: read(name),
        });
    }
    files
}

/// Files of bytes, and the seeds that proptest writes.
fn binary(name: &str) -> bool {
    [".hds", ".bin", ".gz", ".xz", ".proptest-regressions"]
        .iter()
        .any(|end| name.ends_with(end))
}

fn line_complaints(file: &TextFile) -> Vec<String> {
    let mut complaints = Vec::new();
    for (number, line) in file.text.lines().enumerate() {
        let place = format!("{}:{}", file.name, number + 1);
        // Scripts indent with tabs.
        let width: usize = line.chars().map(|c| if c == '\t' { 4 } else { 1 }).sum();
        // A table of Markdown and a dependency of a manifest cannot be broken.
        let whole = line.starts_with('|') || file.name.ends_with(".toml") && line.contains(" = {");
        if width > WIDTH_MAX && !whole {
            complaints.push(format!("{place}: {width} columns"));
        }
        if !line.is_ascii() {
            complaints.push(format!("{place}: not ASCII"));
        }
        if line.ends_with([' ', '\t']) {
            complaints.push(format!("{place}: blanks at the end"));
        }
    }
    complaints
}

#[test]
fn lines_are_ascii_and_fit_the_screen() {
    assert_none(
        &written_files()
            .iter()
            .flat_map(line_complaints)
            .collect::<Vec<_>>(),
    );
    let bad = format!("{}\ncaf\u{e9}\nend \n", "x".repeat(101));
    assert_eq!(
        line_complaints(&TextFile {
            name: String::new(),
            text: bad
        })
        .len(),
        3
    );
}

fn length_complaints(file: &TextFile) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = file.text.lines().count();
    if file.name.starts_with("src/") && lines > FILE_LINES_MAX {
        complaints.push(format!("{}: {lines} lines", file.name));
    }
    for function in functions(&file.text) {
        if function.lines > FUNCTION_LINES_MAX {
            complaints.push(format!(
                "{}:{}: {} has {} lines",
                file.name, function.line, function.name, function.lines
            ));
        }
    }
    complaints
}

#[test]
fn files_and_functions_are_short() {
    let files = rust_files(&["src", "tests", "tools", "fuzz"]);
    assert_none(&files.iter().flat_map(length_complaints).collect::<Vec<_>>());
    let long = TextFile {
        name: "src/long.rs".to_owned(),
        text: format!("fn long() {{\n{}}}\n", "    step();\n".repeat(600)),
    };
    assert_eq!(length_complaints(&long).len(), 2);
}

fn head_complaints(file: &TextFile) -> Vec<String> {
    let opens = file.text.starts_with("//! ");
    if opens {
        Vec::new()
    } else {
        vec![format!("{}: does not start with //!", file.name)]
    }
}

#[test]
fn every_module_says_its_duty_first() {
    let files = rust_files(&["src", "tests", "tools", "fuzz"]);
    assert_none(&files.iter().flat_map(head_complaints).collect::<Vec<_>>());
    let bad = TextFile {
        name: String::new(),
        text: "use std::fs;\n".to_owned(),
    };
    assert_eq!(head_complaints(&bad).len(), 1);
}

fn unsafe_complaints(file: &TextFile) -> Vec<String> {
    if file.name == "src/sys.rs" || file.name.starts_with("src/sys/") {
        return Vec::new();
    }
    let code = code(&file.text);
    words(&code)
        .filter(|(_, word)| *word == "unsafe")
        .map(|(at, _)| format!("{}:{}: unsafe outside sys", file.name, line_of(&code, at)))
        .collect()
}

#[test]
fn unsafe_lives_in_one_room() {
    assert_none(
        &rust_files(&["src"])
            .iter()
            .flat_map(unsafe_complaints)
            .collect::<Vec<_>>(),
    );
    let text = "// unsafe\n#![deny(unsafe_code)]\nfn f() { unsafe { g() } }\n".to_owned();
    let bad = |name: &str| TextFile {
        name: name.to_owned(),
        text: text.clone(),
    };
    assert_eq!(unsafe_complaints(&bad("src/disk.rs")).len(), 1);
    assert_eq!(unsafe_complaints(&bad("src/sys/file.rs")).len(), 0);
}

/// Parts of names that the vocabulary replaces: a name that is defined here may not hold them.
/// Names of other crates are only used, and stay.
const NAME_PARTS: [&str; 7] = [
    "guest", "virtual", "logical", "physical", "clu", "iblk", "lba",
];
const DEFINERS: [&str; 9] = [
    "fn", "struct", "enum", "trait", "type", "const", "static", "mod", "union",
];
/// Phrases that the vocabulary replaces, in comments: what they mean has one word here.
const PHRASES: [&str; 7] = [
    "guest",
    "dirty flag",
    "l2 table",
    "iblk",
    "zero cluster",
    "sparse block",
    "image dir",
];

/// `FileCluster` and `file_cluster` alike become `file`, `cluster`.
fn parts_of(name: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut lower_before = false;
    for c in name.chars() {
        if c == '_' || (c.is_uppercase() && lower_before) {
            parts.push(String::new());
        }
        lower_before = c.is_lowercase();
        if c != '_' {
            parts.last_mut().unwrap().extend(c.to_lowercase());
        }
    }
    parts
}

fn vocabulary_complaints(file: &TextFile) -> Vec<String> {
    let mut complaints = Vec::new();
    let code = shipped_code(&file.text);
    let all: Vec<(usize, &str)> = words(&code).collect();
    for pair in all.windows(2) {
        let [(_, definer), (at, name)] = pair else {
            continue;
        };
        let banned = parts_of(name)
            .into_iter()
            .find(|part| NAME_PARTS.contains(&part.as_str()));
        if let (true, Some(part)) = (DEFINERS.contains(definer), banned) {
            let line = line_of(&code, *at);
            complaints.push(format!("{}:{line}: {name}: not \"{part}\"", file.name));
        }
    }
    let comments = comments(&file.text).to_lowercase();
    for phrase in PHRASES {
        for (at, _) in comments.match_indices(phrase) {
            let line = line_of(&comments, at);
            complaints.push(format!("{}:{line}: not \"{phrase}\"", file.name));
        }
    }
    complaints
}

#[test]
fn things_have_one_name_each() {
    assert_none(
        &shipped_files()
            .iter()
            .flat_map(vocabulary_complaints)
            .collect::<Vec<_>>(),
    );
    let text =
        "//! The guest's view.\nfn guest_len() {}\nstruct VirtualDisk;\nlet c = a.chunks(4);\n";
    let bad = TextFile {
        name: String::new(),
        text: text.to_owned(),
    };
    assert_eq!(vocabulary_complaints(&bad).len(), 3);
}

/// Where people keep their files, the place where this is built, and its first directory unless
/// every machine has such a one.
fn machine_paths(checkout: &str) -> Vec<String> {
    let common = [
        "bin", "dev", "etc", "lib", "media", "mnt", "opt", "run", "srv", "tmp", "usr", "var",
    ];
    let mut steps = checkout.split('/').skip(1);
    let (Some(first), Some(_)) = (steps.next(), steps.next()) else {
        return Vec::new();
    };
    let people = [concat!("/ho", "me/"), concat!("/Us", "ers/")];
    let mut paths: Vec<String> = people.iter().map(ToString::to_string).collect();
    paths.push(checkout.to_owned());
    if !common.contains(&first) {
        paths.push(format!("/{first}/"));
    }
    paths
}

fn leftover_complaints(file: &TextFile, checkout: &str) -> Vec<String> {
    // Composed, so that this file does not complain about itself.
    let words = [
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
        concat!("XX", "X:"),
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
    ];
    let text = &file.text;
    let complaint = |at: usize, word: &str| format!("{}:{}: {word}", file.name, line_of(text, at));
    let mut complaints = Vec::new();
    for word in words {
        complaints.extend(text.match_indices(word).map(|(at, _)| complaint(at, word)));
    }
    for path in machine_paths(checkout) {
        // The same letters further down another path mean nothing.
        let starts = |at: usize| {
            let before = text[..at].chars().next_back();
            before.is_none_or(|c| !c.is_alphanumeric() && !"/._-$}".contains(c))
        };
        let found = text
            .match_indices(path.as_str())
            .filter(|(at, _)| starts(*at));
        complaints.extend(found.map(|(at, _)| complaint(at, &path)));
    }
    complaints
}

#[test]
fn nothing_is_left_over() {
    let checkout = root().to_str().unwrap();
    let files = written_files();
    let complaints = files
        .iter()
        .flat_map(|file| leftover_complaints(file, checkout));
    assert_none(&complaints.collect::<Vec<_>>());
    let text = concat!(
        "to",
        "do!()\nopen(\"/ho",
        "me/anna/x\")\nopen(\"/space/ploopfs/y\")\n"
    );
    let bad = TextFile {
        name: String::new(),
        text: text.to_owned(),
    };
    // The last line names both the checkout and its first directory.
    assert_eq!(leftover_complaints(&bad, "/space/ploopfs").len(), 4);
}
