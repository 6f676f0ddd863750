//! The floor table: a room imports only rooms of lower floors; siblings never import each other.

use crate::source::{line_of, shipped_code};
use crate::{TextFile, assert_none, read, shipped_files};
use std::collections::BTreeSet;

/// Rooms by floor, lowest first; the same picture as at the top of src/lib.rs.
const FLOORS: [&[&str]; 8] = [
    &["units", "error", "sys", "atomics", "sync", "planted"],
    &["format", "storage"],
    &["plan", "journal"],
    &["delta"],
    &["chain"],
    &["disk"],
    &["fuse", "admin"],
    &["cli"],
];

/// The one import within a floor: an error says where, in units.
const WITHIN_FLOOR: [(&str, &str); 1] = [("error", "units")];

fn floor_of(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// The room of a source file, or `None` for lib.rs and main.rs, which have none.
fn room_of(name: &str) -> Option<&str> {
    let inside = name.strip_prefix("src/")?;
    let room = inside.split('/').next()?;
    let room = room.strip_suffix(".rs").unwrap_or(room);
    (room != "lib" && room != "main").then_some(room)
}

/// First segments of all paths of this crate in a piece of code: `crate::a::b`,
/// `crate::{a::b, c}`. Positions are byte offsets.
fn crate_paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            found.extend(group_heads(group).into_iter().map(|head| (at, head)));
        } else {
            found.push((at, head(rest)));
        }
    }
    found
}

fn head(path: &str) -> String {
    path.trim_start()
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// The heads of the paths in `{...}`, whose opening brace is already gone.
fn group_heads(group: &str) -> Vec<String> {
    let mut depth = 0_usize;
    let mut heads = vec![head(group)];
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(head(&group[at + 1..])),
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

fn floor_complaints(file: &TextFile) -> Vec<String> {
    let TextFile { name, text } = file;
    let Some(room) = room_of(name) else {
        return Vec::new();
    };
    let Some(floor) = floor_of(room) else {
        return vec![format!("{name}: the room {room} is on no floor")];
    };
    let code = shipped_code(text);
    let mut complaints = Vec::new();
    for (at, import) in crate_paths(&code) {
        let line = line_of(&code, at);
        if import == room || WITHIN_FLOOR.contains(&(room, import.as_str())) {
            continue;
        }
        match floor_of(&import) {
            Some(other) if other < floor => {}
            Some(other) => complaints.push(format!(
                "{name}:{line}: {room} (floor {floor}) imports {import} (floor {other})"
            )),
            // Names that lib.rs itself exports would hide which room they come from.
            None => complaints.push(format!("{name}:{line}: crate::{import} is no room")),
        }
    }
    // A way round the rule above: up and out of the room.
    for (at, _) in code.match_indices("super::super::") {
        complaints.push(format!(
            "{name}:{}: super::super:: hides a room",
            line_of(&code, at)
        ));
    }
    complaints
}

#[test]
fn rooms_import_only_lower_floors() {
    let files = shipped_files();
    assert_none(&files.iter().flat_map(floor_complaints).collect::<Vec<_>>());
}

#[test]
fn imports_upwards_and_sideways_are_found() {
    let complaints = |name: &str, text: &str| {
        floor_complaints(&TextFile {
            name: name.to_owned(),
            text: text.to_owned(),
        })
        .len()
    };
    assert_eq!(
        complaints(
            "src/plan/read.rs",
            "use crate::format::bat; use crate::units::A;"
        ),
        0
    );
    assert_eq!(complaints("src/error.rs", "use crate::units::Level;"), 0);
    assert_eq!(complaints("src/units.rs", "use crate::error::Error;"), 1);
    assert_eq!(
        complaints("src/format.rs", "use crate::storage::Storage;"),
        1
    );
    assert_eq!(
        complaints("src/delta/alloc.rs", "fn a() { crate::chain::open() }"),
        1
    );
    assert_eq!(
        complaints(
            "src/fuse.rs",
            "use crate::{disk::Disk, admin::{info, check}};"
        ),
        1
    );
    assert_eq!(complaints("src/plan.rs", "use crate::Error;"), 1);
    assert_eq!(complaints("src/attic.rs", ""), 1);
    assert_eq!(
        complaints("src/disk/read.rs", "use super::super::fuse::Node;"),
        1
    );
    assert_eq!(
        complaints("src/disk.rs", "#[cfg(test)] mod t { use crate::cli::run; }"),
        0
    );
    assert_eq!(
        complaints(
            "src/disk.rs",
            "// crate::cli\nconst A: &str = \"crate::cli\";"
        ),
        0
    );
}

/// Rooms by floor as the picture in the documentation of src/lib.rs shows them. Columns are two or
/// more spaces apart; a column of one word is a room, the words after them explain.
fn picture(lib: &str) -> Vec<(usize, String)> {
    let mut rooms = Vec::new();
    for line in lib.lines().filter_map(|line| line.strip_prefix("//!")) {
        let mut columns = line
            .split("  ")
            .map(str::trim)
            .filter(|column| !column.is_empty());
        let Some(floor) = columns
            .next()
            .and_then(|column| column.parse::<usize>().ok())
        else {
            continue;
        };
        let names = columns.take_while(|column| !column.contains(' '));
        rooms.extend(names.map(|name| (floor, name.to_owned())));
    }
    rooms.sort();
    rooms
}

#[test]
fn the_picture_in_lib_rs_is_this_table() {
    let mut table: Vec<(usize, String)> = Vec::new();
    for (floor, rooms) in FLOORS.iter().enumerate() {
        table.extend(rooms.iter().map(|room| (floor, (*room).to_owned())));
    }
    table.sort();
    assert_eq!(picture(&read("src/lib.rs")), table);
    assert_eq!(
        picture("//!  3  a   b      words in, out\n//! 2 x"),
        [(3, "a".to_owned()), (3, "b".to_owned())]
    );
}

/// Law 2 of the data path: work is spawned and never waited for, because a thread that waits for
/// the pool while it holds anything may be handed a job that wants what it holds.
fn waiting_complaints(file: &TextFile) -> Vec<String> {
    let room = room_of(&file.name);
    if !matches!(room, Some("disk" | "chain" | "delta")) {
        return Vec::new();
    }
    let code = shipped_code(&file.text);
    let banned = [
        "par_iter",
        "par_chunks",
        "par_bridge",
        "rayon::scope",
        "rayon::join",
        "rayon::in_place_scope",
    ];
    let methods = [".install(", ".broadcast(", ".in_place_scope("];
    banned
        .iter()
        .chain(&methods)
        .flat_map(|word| code.match_indices(word))
        .map(|(at, word)| {
            format!(
                "{}:{}: {word} waits for the pool",
                file.name,
                line_of(&code, at)
            )
        })
        .collect()
}

#[test]
fn the_data_path_never_waits_for_the_pool() {
    let files = shipped_files();
    assert_none(
        &files
            .iter()
            .flat_map(waiting_complaints)
            .collect::<Vec<_>>(),
    );
    let bad = |name: &str| TextFile {
        name: name.to_owned(),
        text: "fn f() { pool.install(|| x.par_iter()); rayon::join(a, b) }".to_owned(),
    };
    assert_eq!(waiting_complaints(&bad("src/disk/read.rs")).len(), 3);
    assert_eq!(waiting_complaints(&bad("src/admin/check.rs")).len(), 0);
}

/// The `Imports:` line of a room is what the room imports, at most. Words such as "all" or
/// "every room below" open it; what the floors forbid stays forbidden.
fn declared_complaints(file: &TextFile, others: &[TextFile]) -> Vec<String> {
    let Some(room) = room_of(&file.name) else {
        return Vec::new();
    };
    let head: Vec<&str> = file
        .text
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .collect();
    let head = head.join(" ");
    let (Some(imports), true) = (head.find("Imports:"), head.contains("Never:")) else {
        return vec![format!(
            "{}: the room's head lacks Imports: or Never:",
            file.name
        )];
    };
    let sentence = head[imports..].split('.').next().unwrap_or_default();
    if ["lower", "below", "all", "every"]
        .iter()
        .any(|word| sentence.contains(word))
    {
        return Vec::new();
    }
    let declared: Vec<&str> = sentence.split('`').skip(1).step_by(2).collect();
    let mut complaints = BTreeSet::new();
    for other in others
        .iter()
        .filter(|other| room_of(&other.name) == Some(room))
    {
        for (_, import) in crate_paths(&shipped_code(&other.text)) {
            if import != room && !declared.contains(&import.as_str()) {
                complaints.insert(format!(
                    "{}: {import} is not in {room}'s Imports:",
                    other.name
                ));
            }
        }
    }
    complaints.into_iter().collect()
}

#[test]
fn rooms_declare_what_they_import() {
    let files = shipped_files();
    let rooms = files
        .iter()
        .filter(|file| file.name.matches('/').count() == 1);
    assert_none(
        &rooms
            .flat_map(|room| declared_complaints(room, &files))
            .collect::<Vec<_>>(),
    );

    let file = |name: &str, text: &str| TextFile {
        name: name.to_owned(),
        text: text.to_owned(),
    };
    let head = "//! Duty.\n//!\n//! Imports: `units`.\n//! Never: sleeps.\n";
    let room = file("src/plan.rs", head);
    let inside = [file(
        "src/plan/a.rs",
        "use crate::units::A; use crate::error::B;",
    )];
    assert_eq!(declared_complaints(&room, &inside).len(), 1);
    assert_eq!(
        declared_complaints(&file("src/plan.rs", "//! Duty.\n"), &[]).len(),
        1
    );
}
