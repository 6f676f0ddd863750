//! The names of the mount and their inode numbers.
//!
//! Imports: `fuse::partitions` (the numbers of partitions only).
//! Never: touches a disk: what exists is a function of the snapshots known at the mount and of the
//! partition list that the caller hands in.
//!
//! Inode numbers follow from the names alone, so they are the same at every mount of the same disk
//! and the kernel never needs to be told that one was reused:
//!
//! ```text
//!          1  the root: a directory, or the disk itself where the mountpoint is a file
//!    2 ..= 6  disk.img  info.json  stats.json  snapshots  snapshots/latest
//!  256 + n    partN.img
//!  65536 + 2i, + 1   snapshots/GUID and its disk.img, i counting from the oldest
//! ```

use super::partitions::Partition;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;

/// What MOUNTPOINT is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A directory: `disk.img` and its companions.
    Directory,
    /// A regular file: the disk itself, and nothing else.
    File,
}

/// One thing in the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Node {
    /// The directory at the top.
    Root,
    /// The whole disk, newest state.
    Disk,
    /// A partition of it, by number.
    Part(u32),
    /// What `info` would print.
    Info,
    /// Live counters.
    Stats,
    /// The directory of frozen snapshots.
    Snapshots,
    /// The link to the newest snapshot.
    Latest,
    /// The directory of one snapshot, by index.
    Snapshot(usize),
    /// The whole disk as that snapshot has it.
    SnapshotDisk(usize),
}

/// The nodes of a directory with their names.
pub(crate) type Listing<'a> = Box<dyn Iterator<Item = (Node, String)> + 'a>;

/// What `readdir` says a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

const PART_BASE: u64 = 256;
const PART_END: u64 = SNAPSHOT_BASE;
const SNAPSHOT_BASE: u64 = 1 << 16;

impl Node {
    /// Whether it is a directory, a file or a link.
    #[must_use]
    pub(crate) fn sort(self) -> Sort {
        match self {
            Self::Root | Self::Snapshots | Self::Snapshot(_) => Sort::Directory,
            Self::Latest => Sort::Link,
            Self::Disk | Self::Part(_) | Self::Info | Self::Stats | Self::SnapshotDisk(_) => {
                Sort::File
            }
        }
    }
}

/// The tree of one mount.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    shape: Shape,
    /// Name of the disk's file in the root directory.
    disk_name: String,
    /// Directory names of the snapshots, oldest first; none for one that cannot be shown.
    snapshots: Vec<Option<String>>,
    /// Where in that list each name is: a look-up must not search thousands.
    by_name: HashMap<String, usize>,
    /// The snapshot that the live disk stands on, where it is shown.
    latest: Option<String>,
}

impl Tree {
    /// The tree of a disk with these snapshots, oldest first. All of them keep their index; one
    /// whose name cannot be a directory's is not shown.
    #[must_use]
    pub(crate) fn new(
        shape: Shape,
        disk_name: String,
        snapshots: Vec<String>,
        latest: Option<String>,
    ) -> Self {
        let mut by_name = HashMap::new();
        let mut shown = |(i, name): (usize, String)| {
            let is_new = can_be_shown(&name) && !by_name.contains_key(&name);
            is_new.then(|| {
                by_name.insert(name.clone(), i);
                name
            })
        };
        let snapshots = snapshots.into_iter().enumerate().map(&mut shown).collect();
        Self {
            shape,
            disk_name,
            snapshots,
            latest: latest.filter(|name| by_name.contains_key(name)),
            by_name,
        }
    }

    /// The inode number of a node.
    #[must_use]
    pub(crate) fn ino(&self, node: Node) -> u64 {
        let snapshot = |i| SNAPSHOT_BASE.saturating_add(2 * crate::units::len_u64(i));
        match node {
            Node::Disk if self.shape == Shape::File => 1,
            Node::Root => 1,
            Node::Disk => 2,
            Node::Info => 3,
            Node::Stats => 4,
            Node::Snapshots => 5,
            Node::Latest => 6,
            Node::Part(number) => PART_BASE.saturating_add(u64::from(number)),
            Node::Snapshot(i) => snapshot(i),
            Node::SnapshotDisk(i) => snapshot(i).saturating_add(1),
        }
    }

    /// The node with this inode number. Whether a partition of that number exists is not known
    /// here.
    #[must_use]
    pub(crate) fn node(&self, ino: u64) -> Option<Node> {
        if self.shape == Shape::File {
            return (ino == 1).then_some(Node::Disk);
        }
        match ino {
            1 => Some(Node::Root),
            2 => Some(Node::Disk),
            3 => Some(Node::Info),
            4 => Some(Node::Stats),
            5 => Some(Node::Snapshots),
            6 => Some(Node::Latest).filter(|_| self.newest().is_some()),
            PART_BASE..PART_END => u32::try_from(ino - PART_BASE).ok().map(Node::Part),
            SNAPSHOT_BASE.. => {
                let i = usize::try_from((ino - SNAPSHOT_BASE) / 2).ok()?;
                self.snapshot_name(i)?;
                Some(if ino % 2 == 0 {
                    Node::Snapshot(i)
                } else {
                    Node::SnapshotDisk(i)
                })
            }
            _ => None,
        }
    }

    /// The node of this name in a directory. A partition's existence is for the caller to check.
    #[must_use]
    pub(crate) fn child(&self, parent: Node, name: &OsStr) -> Option<Node> {
        let name = name.to_str()?;
        match (parent, name) {
            (Node::Root, _) if name == self.disk_name => Some(Node::Disk),
            (Node::Root, "info.json") => Some(Node::Info),
            (Node::Root, "stats.json") => Some(Node::Stats),
            (Node::Root, "snapshots") => Some(Node::Snapshots),
            (Node::Root, _) => part_number(name).map(Node::Part),
            (Node::Snapshots, "latest") => self.newest().map(|_| Node::Latest),
            (Node::Snapshots, _) => self.by_name.get(name).copied().map(Node::Snapshot),
            (Node::Snapshot(i), "disk.img") => Some(Node::SnapshotDisk(i)),
            _ => None,
        }
    }

    /// The directory that holds a directory; the root holds itself.
    #[must_use]
    pub(crate) fn parent(&self, node: Node) -> Node {
        match node {
            Node::Snapshot(_) | Node::Latest => Node::Snapshots,
            Node::SnapshotDisk(i) => Node::Snapshot(i),
            _ => Node::Root,
        }
    }

    /// What a directory holds, in a fixed order, `.` and `..` first; `None` for what is none. Names
    /// are made one by one: a list of all of them may be more than the heap gives.
    #[must_use]
    pub(crate) fn list<'a>(&'a self, node: Node, parts: &'a [Partition]) -> Option<Listing<'a>> {
        if node.sort() != Sort::Directory {
            return None;
        }
        let dots = [(node, ".".to_owned()), (self.parent(node), "..".to_owned())];
        let inside: Listing<'a> = match node {
            Node::Root => {
                let parts = parts.iter().map(|p| p.number);
                Box::new(
                    std::iter::once((Node::Disk, self.disk_name.clone()))
                        .chain(parts.map(|number| (Node::Part(number), part_name(number))))
                        .chain([
                            (Node::Info, "info.json".to_owned()),
                            (Node::Stats, "stats.json".to_owned()),
                            (Node::Snapshots, "snapshots".to_owned()),
                        ]),
                )
            }
            Node::Snapshots => {
                let shown = (0..self.snapshots.len()).filter_map(|i| {
                    self.snapshot_name(i)
                        .map(|name| (Node::Snapshot(i), name.to_owned()))
                });
                let latest = self.newest().map(|_| (Node::Latest, "latest".to_owned()));
                Box::new(shown.chain(latest))
            }
            Node::Snapshot(i) => Box::new(std::iter::once((
                Node::SnapshotDisk(i),
                "disk.img".to_owned(),
            ))),
            _ => Box::new(std::iter::empty()),
        };
        Some(Box::new(dots.into_iter().chain(inside)))
    }

    /// Links to a node: a directory has its name, its `.`, and the `..` of each one in it.
    #[must_use]
    pub(crate) fn nlink(&self, node: Node) -> u32 {
        match node {
            Node::Root => 3,
            Node::Snapshots => u32::try_from(self.by_name.len())
                .unwrap_or(u32::MAX)
                .saturating_add(2),
            Node::Snapshot(_) => 2,
            _ => 1,
        }
    }

    /// The directory name of a snapshot, where it can be one.
    #[must_use]
    pub(crate) fn snapshot_name(&self, i: usize) -> Option<&str> {
        self.snapshots.get(i)?.as_deref()
    }

    /// Where `latest` leads: the newest frozen state of the live disk, if it can be shown.
    #[must_use]
    pub(crate) fn newest(&self) -> Option<&str> {
        self.latest.as_deref()
    }
}

fn can_be_shown(name: &str) -> bool {
    let one_part = Path::new(name).file_name() == Some(OsStr::new(name));
    one_part && name.len() <= 255 && !name.contains('\0') && name != "latest"
}

fn part_name(number: u32) -> String {
    format!("part{number}.img")
}

/// The number in a partition's name, if that is how the name would be written.
fn part_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("part")?.strip_suffix(".img")?;
    let number: u32 = digits.parse().ok()?;
    let has_ino = u64::from(number) < PART_END - PART_BASE;
    (number > 0 && has_ino && part_name(number) == name).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::super::partitions::Kind;
    use super::*;

    fn tree() -> Tree {
        let names = ["{aa}", "../evil", "{bb}", "latest", "", "a/b", "{cc}"];
        let names = names.map(str::to_owned).to_vec();
        let latest = names
            .iter()
            .rev()
            .find(|name| name.starts_with('{'))
            .cloned();
        Tree::new(Shape::Directory, "disk.img".to_owned(), names, latest)
    }

    fn parts() -> Vec<Partition> {
        [1, 5, 128]
            .map(|number| Partition {
                number,
                start: 0,
                len: 1,
                kind: Kind::Mbr(7),
            })
            .to_vec()
    }

    #[test]
    fn every_listed_name_is_found_again_under_its_number() {
        let tree = tree();
        let mut open = vec![Node::Root];
        let mut numbers = Vec::new();
        while let Some(dir) = open.pop() {
            assert_eq!(tree.node(tree.ino(dir)), Some(dir));
            for (node, name) in tree.list(dir, &parts()).unwrap() {
                if name == "." || name == ".." {
                    continue;
                }
                assert_eq!(tree.child(dir, OsStr::new(&name)), Some(node), "{name}");
                assert_eq!(tree.node(tree.ino(node)), Some(node), "{name}");
                assert_eq!(tree.parent(node), dir, "{name}");
                numbers.push(tree.ino(node));
                if node.sort() == Sort::Directory {
                    open.push(node);
                }
            }
        }
        let all = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), all, "an inode number serves two nodes");
        // disk, 3 parts, info, stats, snapshots; 3 snapshots with a disk each; latest.
        assert_eq!(all, 7 + 6 + 1);
    }

    #[test]
    fn names_that_lead_elsewhere_are_not_shown() {
        let tree = tree();
        for name in ["../evil", "", "a/b", "{dd}", ".", ".."] {
            assert_eq!(
                tree.child(Node::Snapshots, OsStr::new(name)),
                None,
                "{name}"
            );
        }
        assert_eq!(
            tree.child(Node::Snapshots, OsStr::new("latest")),
            Some(Node::Latest)
        );
        assert_eq!(tree.newest(), Some("{cc}"));
        assert_eq!(tree.nlink(Node::Snapshots), 5);
        assert_eq!(tree.node(tree.ino(Node::Snapshot(1))), None);
        assert_eq!(tree.node(tree.ino(Node::SnapshotDisk(7))), None);
        assert_eq!(tree.node(u64::MAX), None);
        assert_eq!(tree.node(0), None);
    }

    #[test]
    fn a_disk_without_snapshots_has_no_latest() {
        let tree = Tree::new(Shape::Directory, "disk.img".to_owned(), Vec::new(), None);
        assert_eq!(tree.child(Node::Snapshots, OsStr::new("latest")), None);
        assert_eq!(tree.node(6), None);
        assert_eq!(tree.list(Node::Snapshots, &[]).unwrap().count(), 2);
    }

    #[test]
    fn partition_names_have_one_spelling() {
        assert_eq!(part_number("part1.img"), Some(1));
        assert_eq!(part_number("part256.img"), Some(256));
        for name in [
            "part0.img",
            "part01.img",
            "part+1.img",
            "part.img",
            "part1",
            "part65535.img",
        ] {
            assert_eq!(part_number(name), None, "{name}");
        }
    }

    #[test]
    fn over_a_file_there_is_the_disk_only() {
        let tree = Tree::new(
            Shape::File,
            "disk.img".to_owned(),
            vec!["{aa}".to_owned()],
            None,
        );
        assert_eq!(tree.ino(Node::Disk), 1);
        assert_eq!(tree.node(1), Some(Node::Disk));
        for ino in [0, 2, 3, 257, 65536] {
            assert_eq!(tree.node(ino), None);
        }
        assert!(tree.list(Node::Disk, &[]).is_none());
    }
}
