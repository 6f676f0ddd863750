//! What snapshots there are. Reads only, and locks nothing.

use super::descriptor_error;
use crate::chain::bundle::{OpenedImages, Selection};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::Descriptor;
use crate::format::guid::Guid;
use crate::storage::Storage;
use crate::storage::file::FileStorage;
use crate::storage::host::Roots;
use serde::Serialize;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Version of the JSON document; grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// The snapshots of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// As the user named it.
    pub image: String,
    /// The one that is written to.
    pub top: String,
    /// All, the top included, parents before their children.
    pub snapshots: Vec<Row>,
    /// What is odd.
    pub warnings: Vec<String>,
}

/// A snapshot, or the top.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `{...}`.
    pub guid: String,
    /// What it was made from.
    pub parent: Option<String>,
    /// What people call it.
    pub name: Option<String>,
    /// It is the top: the disk as it is now.
    pub is_top: bool,
    /// It is being deleted, or will be when only one child is left.
    pub is_going: bool,
    /// Its files, one in each part of the disk.
    pub files: Vec<String>,
    /// Bytes of the host that they take; none where a file is missing.
    pub allocated_bytes: Option<u64>,
    /// Snapshots below it, as far as they are known.
    pub depth: usize,
}

/// Lists the snapshots of a bundle.
pub fn list(image: &Path, allow_outside: &[PathBuf]) -> Result<Listed> {
    let selection = Selection {
        allow_outside: allow_outside.to_vec(),
        no_lock: true,
        ..Selection::default()
    };
    let survey = OpenedImages::survey(image, &selection)?;
    let Some((path, descriptor)) = survey.descriptor else {
        let why = survey.problems.into_iter().next();
        let why = why.unwrap_or_else(|| "only a bundle has snapshots".to_owned());
        let kind = if survey.is_bundle {
            ErrorKind::Descriptor
        } else {
            ErrorKind::Unsupported
        };
        return Err(Error::why(kind, why).in_file(image));
    };
    let home = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let roots = Roots::open(home, allow_outside)?;
    let known = survey.snapshots.into_iter();
    let names: HashMap<String, String> = known
        .filter_map(|info| Some((info.guid, info.name?)))
        .collect();
    let mut snapshots = Vec::new();
    for guid in order(&descriptor) {
        snapshots.push(row(&descriptor, &roots, &names, guid));
    }
    Ok(Listed {
        schema_version: SCHEMA_VERSION,
        image: image.display().to_string(),
        top: descriptor.top.to_string(),
        snapshots,
        warnings: survey.warnings,
    })
}

/// All snapshots, each directly followed by what was made from it.
fn order(descriptor: &Descriptor) -> Vec<Guid> {
    let shots = &descriptor.snapshots;
    let mut below: HashMap<Option<Guid>, Vec<Guid>> = HashMap::new();
    for shot in shots {
        let parent = shot.parent.filter(|p| shots.iter().any(|s| s.guid == *p));
        below.entry(parent).or_default().push(shot.guid);
    }
    let mut found = Vec::new();
    let mut open = below.remove(&None).unwrap_or_default();
    open.reverse();
    while let Some(guid) = open.pop() {
        found.push(guid);
        let children = below.remove(&Some(guid)).unwrap_or_default();
        open.extend(children.into_iter().rev());
    }
    // Those of a ring are listed too.
    for shot in shots {
        if !found.contains(&shot.guid) {
            found.push(shot.guid);
        }
    }
    found
}

fn row(descriptor: &Descriptor, roots: &Roots, names: &HashMap<String, String>, guid: Guid) -> Row {
    let shots = descriptor.snapshots.iter();
    let shot = shots.into_iter().find(|shot| shot.guid == guid);
    let images = descriptor.parts.iter().flat_map(|part| &part.images);
    let files: Vec<String> = images
        .filter(|image| image.guid == guid)
        .map(|image| image.file.clone())
        .collect();
    let size = |file: &String| -> Result<u64> {
        FileStorage::new(roots.named(file, false)?.file)?.allocated_bytes()
    };
    let sizes: Result<Vec<u64>> = files.iter().map(size).collect();
    let chain = descriptor.chain(guid).map_err(descriptor_error);
    Row {
        guid: guid.to_string(),
        parent: shot
            .and_then(|shot| shot.parent)
            .map(|parent| parent.to_string()),
        name: names.get(&guid.to_string()).cloned(),
        is_top: guid == descriptor.top,
        is_going: shot.is_some_and(|shot| shot.temporary) && guid != descriptor.top,
        files,
        allocated_bytes: sizes.ok().map(|sizes| sizes.iter().sum()),
        depth: chain.map_or(0, |chain| chain.len() - 1),
    }
}

/// Draws the tree; `label` says what stands for a snapshot.
#[must_use]
pub fn draw(listed: &Listed, label: impl Fn(&Row) -> String) -> String {
    let mut out = String::new();
    // For each level whether something more follows on it.
    let mut follows: Vec<bool> = Vec::new();
    for (at, row) in listed.snapshots.iter().enumerate() {
        follows.truncate(row.depth);
        let rest = listed.snapshots.iter().skip(at + 1);
        let mut sisters = rest.take_while(|other| other.depth >= row.depth);
        let more = sisters.any(|other| other.depth == row.depth);
        for open in follows.iter().skip(1) {
            out.push_str(if *open { "|  " } else { "   " });
        }
        if row.depth > 0 {
            out.push_str(if more { "|- " } else { "`- " });
        }
        let _ = writeln!(out, "{}", label(row));
        follows.push(more);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_drawn_with_its_branches() {
        let row = |guid: &str, depth| Row {
            guid: guid.to_owned(),
            parent: None,
            name: None,
            is_top: false,
            is_going: false,
            files: Vec::new(),
            allocated_bytes: None,
            depth,
        };
        let rows = [
            ("a", 0),
            ("b", 1),
            ("c", 2),
            ("d", 2),
            ("e", 3),
            ("f", 1),
            ("g", 2),
        ];
        let listed = Listed {
            schema_version: 1,
            image: String::new(),
            top: String::new(),
            snapshots: rows.map(|(guid, depth)| row(guid, depth)).to_vec(),
            warnings: Vec::new(),
        };
        let drawn = draw(&listed, |row| row.guid.clone());
        let expected = "a\n|- b\n|  |- c\n|  `- d\n|     `- e\n`- f\n   `- g\n";
        assert_eq!(drawn, expected);
    }
}
