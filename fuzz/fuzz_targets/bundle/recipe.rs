//! What an input makes of a bundle that was in order.
//!
//! An input of zeros is that bundle: one part, one image. Each byte that is something else spoils
//! something, so that the fuzzer gets far with little.

use super::directory::Place;
use super::forge::bundle::{NONE, TOP, guid};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Bytes of a cluster, and clusters of a part.
const CLUSTER: usize = 4096;
const CLUSTERS: u64 = 8;
const SECTORS: u64 = CLUSTERS * 8;

/// Words that are put into the descriptor.
const WORDS: &[&str] = &[
    "../outside/secret",
    "/proc/self/fd/0",
    "/dev/zero",
    "/nowhere/p0l0",
    "p0l0",
    "p0l1",
    "p1l0",
    "link/secret",
    "sub/file",
    ".",
    "..",
    "",
    "DiskDescriptor.xml",
    "./p0l0/../p0l1",
    "0",
    "64",
    "0x40",
    "18014398509481983",
    "2048",
    "8",
    "Plain",
    "Compressed",
    TOP,
    NONE,
    "<Snapshots>",
    "</Snapshots>",
    "<Shot><GUID>",
    "<TopGUID>",
    "</TopGUID>",
    "<Storage>",
    "</Storage>",
    "<Image>",
    "<!--",
    "-->",
    "<![CDATA[",
    "]]>",
    "&#xa;",
    "<Padding>1</Padding>",
    "<Temporary/>",
    "<Encryption><KeyId>k</KeyId></Encryption>",
    "\u{feff}",
    "xmlns:a=\"b\"",
];

/// One file of the bundle.
#[derive(Debug)]
struct Spoilt {
    kind: u8,
    /// Clusters that the image maps.
    mapped: u8,
    is_v1: bool,
    /// Bytes of the file that are something else.
    patches: Vec<(u16, u8)>,
}

/// What is spoilt in the descriptor: a position, what goes, and the number of a word that comes.
#[derive(Debug)]
struct Edit {
    at: u16,
    removed: u8,
    word: u8,
}

/// A bundle.
#[derive(Debug)]
pub(crate) struct Recipe {
    depth: usize,
    files: Vec<Vec<Spoilt>>,
    edits: Vec<Edit>,
    /// The whole descriptor, whatever it is.
    raw: Option<Vec<u8>>,
    /// The dumb reader may be asked: it would not come back from a FIFO, and does not know what to
    /// do about a delta whose disk is smaller than that of the one above.
    pub(crate) is_comparable: bool,
    /// The directory beside the bundle is allowed.
    pub(crate) allows_outside: bool,
    /// What is opened.
    pub(crate) snapshot: Option<String>,
    /// It is opened for writing, too.
    pub(crate) writes: bool,
    /// Seed of the changes.
    pub(crate) seed: u64,
}

impl Recipe {
    /// Takes the input apart.
    pub(crate) fn read(data: &[u8]) -> Option<Self> {
        Self::from_input(&mut Unstructured::new(data)).ok()
    }

    fn from_input(input: &mut Unstructured<'_>) -> Result<Self> {
        let flags: u8 = input.arbitrary()?;
        let shape: u8 = input.arbitrary()?;
        let seed: u16 = input.arbitrary()?;
        let depth = usize::from(shape & 3) + 1;
        let parts = [1, 1, 2, 3][usize::from(shape >> 2 & 3)];
        let mut files = Vec::new();
        for _ in 0..parts {
            let levels: Result<Vec<Spoilt>> = (0..depth).map(|_| spoilt(input)).collect();
            files.push(levels?);
        }
        let mut edits = Vec::new();
        for _ in 0..shape >> 4 & 7 {
            let (at, removed, word) = input.arbitrary()?;
            edits.push(Edit { at, removed, word });
        }
        let rest = input.bytes(input.len())?.to_vec();
        let raw = (flags & 1 == 1).then_some(rest);
        let all = || files.iter().flatten();
        let is_resized = |file: &Spoilt| file.patches.iter().any(|(at, _)| (28..44).contains(at));
        let has_fifo = all().any(|file| file.kind % 32 == 23);
        let has_other_size = all().any(is_resized) || all().any(|file| file.kind % 32 > 20);
        Ok(Self {
            depth,
            is_comparable: raw.is_none() && edits.is_empty() && !has_fifo && !has_other_size,
            files,
            edits,
            raw,
            allows_outside: flags & 2 != 0,
            snapshot: match flags >> 2 & 7 {
                1 => Some("latest".to_owned()),
                2 => Some(guid(u64::from(flags >> 5 & 1), 0)),
                3 => Some("name".to_owned()),
                _ => None,
            },
            writes: flags & 0x80 == 0,
            seed: seed.into(),
        })
    }

    /// Writes it all.
    pub(crate) fn write(&self, place: &Place) {
        let dir = &place.bundle;
        fs::create_dir(dir.join("sub")).expect("a directory");
        fs::write(dir.join("sub/file"), self.image(0, 0)).expect("a file");
        symlink(&place.outside, dir.join("link")).expect("a link");
        for (part, levels) in self.files.iter().enumerate() {
            for (level, file) in levels.iter().enumerate() {
                self.write_file(file, part, level, place);
            }
        }
        let text = match &self.raw {
            Some(raw) => raw.clone(),
            None => self.edited(self.descriptor()),
        };
        fs::write(dir.join("DiskDescriptor.xml"), text).expect("a descriptor");
    }

    fn write_file(&self, file: &Spoilt, part: usize, level: usize, place: &Place) {
        let dir = &place.bundle;
        let path = dir.join(name(part, level));
        let link_to = |target: &Path| symlink(target, &path).expect("a link");
        match file.kind % 32 {
            0..=20 => fs::write(&path, self.image(part, level)).expect("a file"),
            21 => fs::write(&path, [0x77; 20_000]).expect("a file"),
            22 => link_to(Path::new("sub/file")),
            23 => {
                let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes());
                let name = name.expect("a name without NUL");
                make_fifo(&name);
            }
            24 => fs::create_dir(&path).expect("a directory"),
            25 => {
                // Two names of one file, where the other one is there already.
                let _ = fs::hard_link(dir.join(name(0, 0)), &path);
            }
            26 => fs::write(&path, b"").expect("a file"),
            27 => {}
            28 => {
                fs::write(&path, self.image(part, level)).expect("a file");
                let file = fs::File::options().write(true).open(&path).expect("a file");
                file.set_len(1 << 40).expect("a hole");
            }
            29 => link_to(&place.outside.join("secret")),
            30 => link_to(Path::new("/dev/zero")),
            _ => link_to(Path::new(&name(part, level))),
        }
    }

    /// The bytes of an image: a header, eight entries, and the clusters that they name.
    fn image(&self, part: usize, level: usize) -> Vec<u8> {
        let file = &self.files[part][level];
        let mut bytes = vec![0; CLUSTER];
        let magic = if file.is_v1 {
            b"WithoutFreeSpace"
        } else {
            b"WithouFreSpacExt"
        };
        bytes[..16].copy_from_slice(magic);
        let mut put =
            |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        for (at, value) in [(16, 2), (20, 16), (28, 8), (32, 8), (36, 64), (48, 8)] {
            put(at, value);
        }
        let mut clusters = Vec::new();
        for cluster in (0..8).filter(|cluster| file.mapped >> cluster & 1 == 1) {
            let number = clusters.len() as u32 / CLUSTER as u32 + 1;
            put(
                64 + 4 * cluster,
                if file.is_v1 { number * 8 } else { number },
            );
            clusters.extend([(part << 6 | level << 4 | cluster) as u8 | 0x80; CLUSTER]);
        }
        bytes.extend(clusters);
        for (at, value) in &file.patches {
            let at = usize::from(*at) % bytes.len();
            bytes[at] = *value;
        }
        bytes
    }

    fn guid(&self, level: usize) -> String {
        if level + 1 == self.depth {
            return TOP.to_owned();
        }
        guid(0, level)
    }

    fn descriptor(&self) -> String {
        let size = self.files.len() as u64 * SECTORS;
        let mut text = format!(
            "<Parallels_disk_image Version=\"1.0\"><Disk_Parameters><Disk_size>{size}</Disk_size>\
             </Disk_Parameters><StorageData>"
        );
        for (part, levels) in self.files.iter().enumerate() {
            let start = part as u64 * SECTORS;
            let end = start + SECTORS;
            let _ = write!(
                text,
                "<Storage><Start>{start}</Start><End>{end}</End><Blocksize>8</Blocksize>"
            );
            for (level, file) in levels.iter().enumerate() {
                let kind = if file.kind % 32 == 21 {
                    "Plain"
                } else {
                    "Compressed"
                };
                let (guid, name) = (self.guid(level), name(part, level));
                let _ = write!(
                    text,
                    "<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{name}</File></Image>"
                );
            }
            text.push_str("</Storage>");
        }
        text.push_str("</StorageData><Snapshots>");
        let mut parent = NONE.to_owned();
        for level in 0..self.depth {
            let own = self.guid(level);
            let _ = write!(
                text,
                "<Shot><GUID>{own}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"
            );
            parent = own;
        }
        text.push_str("</Snapshots></Parallels_disk_image>");
        text
    }

    fn edited(&self, text: String) -> Vec<u8> {
        let mut bytes = text.into_bytes();
        for edit in &self.edits {
            let at = usize::from(edit.at) % (bytes.len() + 1);
            let end = (at + usize::from(edit.removed)).min(bytes.len());
            let word = WORDS[usize::from(edit.word) % WORDS.len()];
            bytes.splice(at..end, word.bytes());
        }
        bytes
    }
}

fn name(part: usize, level: usize) -> String {
    format!("p{part}l{level}")
}

fn spoilt(input: &mut Unstructured<'_>) -> Result<Spoilt> {
    let (kind, options, mapped): (u8, u8, u8) = input.arbitrary()?;
    let patches: Result<Vec<(u16, u8)>> = (0..options & 7).map(|_| input.arbitrary()).collect();
    Ok(Spoilt {
        kind,
        mapped,
        is_v1: options & 8 != 0,
        patches: patches?,
    })
}

fn make_fifo(name: &std::ffi::CStr) {
    let mode = nix::sys::stat::Mode::S_IRWXU;
    nix::unistd::mkfifo(name, mode).expect("a FIFO");
}
