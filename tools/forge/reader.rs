//! The dumbest possible reader of the format, and a strict checker of one image.
//!
//! Imports: std, `roxmltree`; `sha256sum` for the hash.
//! Never: caches, merges or guesses.
//!
//! A read is cut at the cluster borders of every level; each piece asks the levels from the top
//! down, with one 4-byte read of the BAT entry each. What is not plainly valid is an error.

use super::content::SECTOR;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The header's numbers, in the format's own names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    /// 1 or 2.
    pub(crate) version: u8,
    /// `m_Sectors`.
    pub(crate) cluster: u64,
    /// `m_Size`.
    pub(crate) entries: u64,
    /// `m_SizeInSectors`.
    pub(crate) sectors: u64,
    /// `m_DiskInUse`.
    pub(crate) mark: u32,
    /// `m_FirstBlockOffset`.
    pub(crate) first: u64,
    /// `m_Flags`.
    pub(crate) flags: u32,
    /// `m_FormatExtensionOffset`.
    pub(crate) extension: u64,
}

/// Reads the header; `None` where there is no magic.
pub(crate) fn fields(file: &File) -> io::Result<Option<Fields>> {
    let mut bytes = [0; 64];
    if file.metadata()?.len() < 64 {
        return Ok(None);
    }
    file.read_exact_at(&mut bytes, 0)?;
    let version = match &bytes[..16] {
        b"WithoutFreeSpace" => 1,
        b"WithouFreSpacExt" => 2,
        _ => return Ok(None),
    };
    let upper = if version == 1 {
        0
    } else {
        u64::from(le32(&bytes, 40)) << 32
    };
    Ok(Some(Fields {
        version,
        cluster: u64::from(le32(&bytes, 28)),
        entries: u64::from(le32(&bytes, 32)),
        sectors: u64::from(le32(&bytes, 36)) | upper,
        mark: le32(&bytes, 44),
        first: u64::from(le32(&bytes, 48)),
        flags: le32(&bytes, 52),
        extension: u64::from(le32(&bytes, 56)) | u64::from(le32(&bytes, 60)) << 32,
    }))
}

/// One file of a chain.
#[derive(Debug)]
pub(crate) struct LevelFile {
    file: File,
    len: u64,
    /// `None` for a plain base.
    fields: Option<Fields>,
}

impl LevelFile {
    /// Opens an image, or a plain file where `plain` allows it.
    pub(crate) fn open(path: &Path, plain: bool) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let fields = fields(&file)?;
        match fields {
            None if !plain => Err(bad(format!("{}: no magic", path.display()))),
            Some(found) if found.cluster == 0 => Err(bad("cluster size 0")),
            _ => Ok(Self { file, len, fields }),
        }
    }

    fn disk_bytes(&self) -> u64 {
        self.fields
            .map_or(self.len, |fields| fields.sectors * SECTOR)
    }

    fn left_in_cluster(&self, at: u64) -> u64 {
        self.fields
            .map_or(u64::MAX, |f| f.cluster * SECTOR - at % (f.cluster * SECTOR))
    }

    /// Fills `buf` if this level has the place; a piece never crosses a cluster of this level.
    fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<bool> {
        let Some(fields) = self.fields else {
            buf.fill(0);
            let valid = self.len.saturating_sub(at).min(buf.len() as u64) as usize;
            self.file.read_exact_at(&mut buf[..valid], at)?;
            return Ok(true);
        };
        let cluster = fields.cluster * SECTOR;
        let index = at / cluster;
        if index >= fields.entries {
            return Ok(false);
        }
        let mut entry = [0; 4];
        self.file.read_exact_at(&mut entry, 64 + 4 * index)?;
        let entry = u64::from(u32::from_le_bytes(entry));
        if entry == 0 {
            return Ok(false);
        }
        let start = if fields.version == 1 {
            entry * SECTOR
        } else {
            entry * cluster
        };
        let data = (64 + 4 * fields.entries).max(fields.first * SECTOR);
        if start < data || start + cluster > self.len {
            return Err(bad(format!(
                "BAT entry {index} is {entry}, outside the data of the file"
            )));
        }
        self.file.read_exact_at(buf, start + at % cluster)?;
        // Past the end of this delta's own disk its last cluster means nothing.
        let valid = self.disk_bytes().saturating_sub(at).min(buf.len() as u64) as usize;
        buf[valid..].fill(0);
        Ok(true)
    }
}

/// One part of a disk.
#[derive(Debug)]
pub(crate) struct PartFiles {
    start: u64,
    end: u64,
    levels: Vec<LevelFile>,
}

/// A disk as the dumb reader sees it.
#[derive(Debug)]
pub(crate) struct Flat {
    parts: Vec<PartFiles>,
}

impl Flat {
    /// Opens a bundle directory, a descriptor or a bare image, at its top.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_at(path, None)
    }

    /// The same, at a snapshot's GUID.
    pub(crate) fn open_at(path: &Path, snapshot: Option<&str>) -> io::Result<Self> {
        if path.is_dir() {
            return Self::bundle(&path.join("DiskDescriptor.xml"), snapshot);
        }
        if path
            .file_name()
            .is_some_and(|name| name == "DiskDescriptor.xml")
        {
            return Self::bundle(path, snapshot);
        }
        Self::chain(&[path.to_path_buf()])
    }

    /// Opens files named by hand, base first.
    pub(crate) fn chain(paths: &[PathBuf]) -> io::Result<Self> {
        let levels: io::Result<Vec<LevelFile>> = paths
            .iter()
            .enumerate()
            .map(|(number, path)| LevelFile::open(path, number == 0 && paths.len() > 1))
            .collect();
        let levels = levels?;
        let end = levels.last().ok_or_else(|| bad("no files"))?.disk_bytes();
        Ok(Self {
            parts: vec![PartFiles {
                start: 0,
                end,
                levels,
            }],
        })
    }

    fn bundle(xml: &Path, snapshot: Option<&str>) -> io::Result<Self> {
        let text = fs::read_to_string(xml)?;
        let tree = roxmltree::Document::parse(&text).map_err(|error| bad(error.to_string()))?;
        let root = tree.root_element();
        let dir = xml.parent().unwrap_or(Path::new("."));
        let chain = chain_of(root, snapshot)?;
        let mut parts = Vec::new();
        for storage in root
            .descendants()
            .filter(|node| node.has_tag_name("Storage"))
        {
            let number = |name| -> io::Result<u64> {
                let text = child(storage, name).ok_or_else(|| bad(format!("no {name}")))?;
                text.trim()
                    .parse()
                    .map_err(|_| bad(format!("{name} is no number")))
            };
            let mut levels = Vec::new();
            for guid in &chain {
                let image = storage
                    .children()
                    .filter(|node| node.has_tag_name("Image"))
                    .find(|node| child(*node, "GUID").is_some_and(|g| g.eq_ignore_ascii_case(guid)))
                    .ok_or_else(|| bad(format!("no image {guid}")))?;
                let plain = child(image, "Type").is_some_and(|kind| kind == "Plain");
                let name = child(image, "File").ok_or_else(|| bad("no File"))?;
                levels.push(LevelFile::open(&dir.join(name), plain)?);
            }
            let (start, end) = (number("Start")? * SECTOR, number("End")? * SECTOR);
            parts.push(PartFiles { start, end, levels });
        }
        Ok(Self { parts })
    }

    /// Bytes of the disk.
    pub(crate) fn bytes(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// The bytes of a range.
    pub(crate) fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let here = at + done as u64;
            let part = self
                .parts
                .iter()
                .find(|part| (part.start..part.end).contains(&here))
                .ok_or_else(|| bad(format!("byte {here} is in no part")))?;
            let local = here - part.start;
            let left = part
                .levels
                .iter()
                .map(|level| level.left_in_cluster(local))
                .min();
            let piece = left
                .unwrap_or(1)
                .min(part.end - here)
                .min((len - done) as u64) as usize;
            for level in part.levels.iter().rev() {
                if level.read(local, &mut bytes[done..done + piece])? {
                    break;
                }
            }
            done += piece;
        }
        Ok(bytes)
    }

    /// Writes the flat bytes from beginning to end.
    pub(crate) fn copy_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut at = 0;
        while at < self.bytes() {
            let len = (self.bytes() - at).min(1 << 20) as usize;
            out.write_all(&self.read(at, len)?)?;
            at += len as u64;
        }
        Ok(())
    }

    /// sha256 of the flat disk, by `sha256sum`.
    pub(crate) fn sha256(&self) -> io::Result<String> {
        let mut child = Command::new("sha256sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut pipe = child.stdin.take().ok_or_else(|| bad("no pipe"))?;
        self.copy_to(&mut pipe)?;
        drop(pipe);
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_string())
    }
}

fn child<'a>(node: roxmltree::Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.children()
        .find(|child| child.has_tag_name(name))
        .and_then(|child| child.text())
}

/// GUIDs from the base to what is to be opened.
fn chain_of(root: roxmltree::Node<'_, '_>, snapshot: Option<&str>) -> io::Result<Vec<String>> {
    let top = root.descendants().find(|node| node.has_tag_name("TopGUID"));
    let top = top
        .and_then(|node| node.text())
        .unwrap_or(super::bundle::TOP);
    let mut guid = snapshot.unwrap_or(top).to_lowercase();
    let mut chain = Vec::new();
    while guid != super::bundle::NONE {
        if chain.contains(&guid) {
            return Err(bad("the snapshots form a cycle"));
        }
        let shot = root
            .descendants()
            .filter(|node| node.has_tag_name("Shot"))
            .find(|node| child(*node, "GUID").is_some_and(|g| g.eq_ignore_ascii_case(&guid)))
            .ok_or_else(|| bad(format!("no snapshot {guid}")))?;
        chain.push(guid);
        guid = child(shot, "ParentGUID")
            .unwrap_or(super::bundle::NONE)
            .to_lowercase();
    }
    chain.reverse();
    Ok(chain)
}

/// Everything that a closed image of ours must be; each string is one thing that it is not.
pub(crate) fn check(path: &Path) -> io::Result<Vec<String>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let Some(fields) = fields(&file)? else {
        return Ok(vec!["no magic".to_string()]);
    };
    let mut wrong = Vec::new();
    let cluster = fields.cluster * SECTOR;
    if cluster == 0 {
        return Ok(vec!["cluster size 0".to_string()]);
    }
    let mut complain = |text: String| {
        if wrong.len() < 20 {
            wrong.push(text);
        }
    };
    if fields.mark == super::image::IN_USE {
        complain("the in-use mark is set".into());
    }
    if len % cluster != 0 {
        complain(format!(
            "length {len} is no multiple of the cluster {cluster}"
        ));
    }
    if fields.first % fields.cluster != 0 || fields.first * SECTOR < 64 + 4 * fields.entries {
        complain(format!(
            "first block {} is unaligned or inside the table",
            fields.first
        ));
    }
    if fields.entries * fields.cluster < fields.sectors {
        complain(format!(
            "{} entries for {} sectors",
            fields.entries, fields.sectors
        ));
    }
    if fields.first * SECTOR > len {
        complain("the file ends inside the table".into());
        return Ok(wrong);
    }
    let mapped = check_table(&file, fields, len, &mut complain)?;
    if (fields.flags & 1 != 0) != (mapped == 0) && fields.flags != u32::MAX {
        complain(format!(
            "flag Empty is {} with {mapped} mapped clusters",
            fields.flags & 1
        ));
    }
    Ok(wrong)
}

fn check_table(
    file: &File,
    fields: Fields,
    len: u64,
    complain: &mut impl FnMut(String),
) -> io::Result<usize> {
    let mut seen = HashSet::new();
    let end = fields.first * SECTOR;
    let mut at = 64;
    while at < end {
        let mut bytes = vec![0; (end - at).min(1 << 20) as usize];
        file.read_exact_at(&mut bytes, at)?;
        for (slot, word) in bytes.chunks_exact(4).enumerate() {
            let entry = u64::from(le32(word, 0));
            let index = (at - 64) / 4 + slot as u64;
            if entry == 0 {
                continue;
            }
            if index >= fields.entries {
                complain(format!("slot {index} after the last entry holds {entry}"));
                continue;
            }
            let sector = if fields.version == 1 {
                entry
            } else {
                entry * fields.cluster
            };
            if sector < fields.first {
                complain(format!("entry {index} is {entry}, in the table"));
            } else if sector % fields.cluster != 0 {
                complain(format!("entry {index} is {entry}, unaligned"));
            } else if (sector + fields.cluster) * SECTOR > len {
                complain(format!(
                    "entry {index} is {entry}, past the end of the file"
                ));
            }
            if !seen.insert(entry) {
                complain(format!("entry {index} is {entry}, mapped twice"));
            }
        }
        at += bytes.len() as u64;
    }
    Ok(seen.len())
}
