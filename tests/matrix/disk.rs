//! A disk as its files tell it: who made which snapshot, what each shows, what lies beside.
//!
//! Imports: `forge` (its reader and its content), `roxmltree`; nothing of ploopfs.
//! Never: asks the program under test.

use crate::forge::bundle::{NONE, TOP};
use crate::forge::content;
use crate::forge::reader::{self, Flat};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the descriptor.
pub(crate) const XML: &str = "DiskDescriptor.xml";
const SECTOR: u64 = 512;

/// The bytes of each snapshot by its GUID, the top's among them; of a single image by "".
pub(crate) type Contents = BTreeMap<String, Arc<Vec<u8>>>;

/// A snapshot, or the top.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Shot {
    /// In small letters.
    pub(crate) guid: String,
    /// `None` for a root.
    pub(crate) parent: Option<String>,
    /// One for each part.
    pub(crate) files: Vec<PathBuf>,
}

/// All that a descriptor says of snapshots.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// As they stand there.
    pub(crate) shots: Vec<Shot>,
    /// The GUID of the one that is written.
    pub(crate) top: String,
}

fn child<'a>(node: roxmltree::Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.children()
        .find(|child| child.has_tag_name(name))
        .and_then(|child| child.text())
}

/// Reads the descriptor; a single image is a disk with a top called "".
pub(crate) fn view(disk: &Path) -> Result<View> {
    if !disk.is_dir() {
        let only = Shot {
            guid: String::new(),
            parent: None,
            files: vec![disk.to_owned()],
        };
        return Ok(View {
            shots: vec![only],
            top: String::new(),
        });
    }
    let text = fs::read_to_string(disk.join(XML))?;
    let tree = roxmltree::Document::parse(&text)?;
    let named = |name: &'static str| tree.descendants().filter(move |n| n.has_tag_name(name));
    let mut shots = Vec::new();
    for shot in named("Shot") {
        let guid = child(shot, "GUID").context("a GUID")?.to_lowercase();
        let parent = child(shot, "ParentGUID").unwrap_or(NONE).to_lowercase();
        let mut files = Vec::new();
        for image in named("Image") {
            if child(image, "GUID").is_some_and(|own| own.eq_ignore_ascii_case(&guid)) {
                files.push(disk.join(child(image, "File").context("a file")?));
            }
        }
        ensure!(!files.is_empty(), "{guid} has no image");
        shots.push(Shot {
            guid,
            parent: (parent != NONE).then_some(parent),
            files,
        });
    }
    let top = named("TopGUID").next().and_then(|node| node.text());
    let top = top.unwrap_or(TOP).to_lowercase();
    Ok(View { shots, top })
}

impl View {
    /// One of them.
    pub(crate) fn shot(&self, guid: &str) -> Result<&Shot> {
        let found = self.shots.iter().find(|shot| shot.guid == guid);
        found.with_context(|| format!("no snapshot {guid}"))
    }

    /// From the base up to it.
    pub(crate) fn chain(&self, guid: &str) -> Result<Vec<&Shot>> {
        let mut chain = vec![self.shot(guid)?];
        while let Some(parent) = &chain[chain.len() - 1].parent {
            ensure!(chain.len() <= self.shots.len(), "the snapshots form a ring");
            chain.push(self.shot(parent)?);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Those that were made from it.
    pub(crate) fn children(&self, guid: &str) -> Vec<&Shot> {
        let all = self.shots.iter();
        all.filter(|shot| shot.parent.as_deref() == Some(guid))
            .collect()
    }

    /// All but the top.
    pub(crate) fn frozen(&self) -> Vec<&Shot> {
        let all = self.shots.iter();
        all.filter(|shot| shot.guid != self.top).collect()
    }

    /// The image of the last part that is written.
    pub(crate) fn top_file(&self) -> Result<PathBuf> {
        let top = self.shot(&self.top)?;
        Ok(top.files[top.files.len() - 1].clone())
    }
}

/// What every snapshot shows, by the dumb reader.
pub(crate) fn contents(disk: &Path) -> Result<Contents> {
    let mut all = Contents::new();
    for shot in &view(disk)?.shots {
        all.insert(shot.guid.clone(), Arc::new(content_of(disk, &shot.guid)?));
    }
    Ok(all)
}

fn content_of(disk: &Path, guid: &str) -> Result<Vec<u8>> {
    let image = File::open(view(disk)?.top_file()?)?;
    if disk.is_file() && reader::fields(&image)?.is_none() {
        return Ok(fs::read(disk)?);
    }
    let flat = if guid.is_empty() {
        Flat::open(disk)
    } else {
        Flat::open_at(disk, Some(guid))
    };
    let flat = flat.with_context(|| format!("{} at {guid}", disk.display()))?;
    let mut bytes = Vec::with_capacity(usize::try_from(flat.bytes())?);
    flat.copy_to(&mut bytes)?;
    Ok(bytes)
}

/// The first bytes of what a snapshot of a bundle shows.
pub(crate) fn start_of(disk: &Path, guid: &str, len: usize) -> Result<Vec<u8>> {
    let flat = Flat::open_at(disk, Some(guid));
    let flat = flat.with_context(|| format!("{} at {guid}", disk.display()))?;
    Ok(flat.read(0, len)?)
}

/// Longer is the same where only zeros follow.
pub(crate) fn expect_same(what: &str, wanted: &[u8], found: &[u8]) -> Result<()> {
    ensure!(
        found.len() >= wanted.len(),
        "{what}: {} bytes instead of {}",
        found.len(),
        wanted.len()
    );
    let (start, rest) = found.split_at(wanted.len());
    if start != wanted {
        let text = content::first_difference(0, wanted, start);
        anyhow::bail!("{what}: {}", text.unwrap_or_default());
    }
    ensure!(
        rest.iter().all(|byte| *byte == 0),
        "{what}: garbage at the end"
    );
    Ok(())
}

fn le32(file: &File, at: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Content of a cluster: sometimes zeros, which a table may well name.
fn cluster(seed: u64, number: u64, sectors: u64, left: u64) -> Vec<u8> {
    let mut bytes = vec![0; (sectors * SECTOR) as usize];
    if content::mix(&[seed, number, 3]) % 8 == 0 {
        return bytes;
    }
    for (local, sector) in (0..sectors.min(left)).zip(bytes.chunks_exact_mut(512)) {
        sector.copy_from_slice(&content::sector(seed, 0, number * sectors + local));
    }
    bytes
}

/// Writes to some clusters of an image (a plain one where it has no magic), which nobody has open:
/// where they are, or at the end of the file after `gap` clusters that nothing names.
pub(crate) fn scribble(image: &Path, seed: u64, percent: u64, gap: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(image)?;
    let Some(fields) = reader::fields(&file)? else {
        let len = file.metadata()?.len();
        for number in 0..len / 65536 {
            if content::mix(&[seed, number]) % 100 < percent {
                file.write_all_at(&cluster(seed, number, 128, 128), number * 65536)?;
            }
        }
        return Ok(());
    };
    let bytes = fields.cluster * SECTOR;
    for number in 0..fields.entries {
        if content::mix(&[seed, number]) % 100 >= percent {
            continue;
        }
        let mut entry = u64::from(le32(&file, 64 + 4 * number)?);
        let unit = if fields.version == 1 { SECTOR } else { bytes };
        if entry == 0 {
            let end = file.metadata()?.len().max(fields.first * SECTOR);
            entry = (end.div_ceil(bytes) + gap) * bytes / unit;
            file.write_all_at(&u32::try_from(entry)?.to_le_bytes(), 64 + 4 * number)?;
        }
        let left = fields.sectors - number * fields.cluster;
        file.write_all_at(&cluster(seed, number, fields.cluster, left), entry * unit)?;
    }
    clear_empty(image)
}

/// The flag that says "empty" goes where it is not true.
pub(crate) fn clear_empty(image: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(image)?;
    let Some(fields) = reader::fields(&file)? else {
        return Ok(());
    };
    let mut entries = vec![0; usize::try_from(4 * fields.entries)?];
    file.read_exact_at(&mut entries, 64)?;
    if fields.flags & 1 != 0 && entries.iter().any(|byte| *byte != 0) {
        file.write_all_at(&(fields.flags & !1).to_le_bytes(), 52)?;
    }
    Ok(())
}

/// What can be seen of a file without opening the disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Trace {
    pub(crate) path: PathBuf,
    mode: u32,
    inode: u64,
    changed: (i64, i64),
    bytes: Vec<u8>,
}

/// The lock file that ploop and whoever else may write to a bundle make.
pub(crate) fn is_lock(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "lck")
}

/// All files and directories from here on, with bytes and times.
pub(crate) fn traces(path: &Path) -> Result<Vec<Trace>> {
    let mut found = Vec::new();
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                open.push(entry?.path());
            }
        }
        let bytes = if meta.is_file() {
            fs::read(&path)?
        } else {
            Vec::new()
        };
        found.push(Trace {
            path,
            mode: meta.mode(),
            inode: meta.ino(),
            changed: (meta.mtime(), meta.mtime_nsec()),
            bytes,
        });
    }
    found.sort();
    Ok(found)
}

/// Nothing has another byte or another time; a lock file may have come.
pub(crate) fn expect_untouched(before: &[Trace], path: &Path, what: &str) -> Result<()> {
    let now = traces(path)?;
    let has_new_lock = now
        .iter()
        .any(|trace| is_lock(&trace.path) && before.iter().all(|old| old.path != trace.path));
    let is_excused = |trace: &&Trace| is_lock(&trace.path) || has_new_lock && trace.path.is_dir();
    let key = |trace: &&Trace| !is_excused(trace);
    let (old, new) = (before.iter().filter(key), now.iter().filter(key));
    for (old, new) in old.clone().zip(new.clone()) {
        ensure!(
            old.path == new.path,
            "{what}: {:?} or {:?}",
            old.path,
            new.path
        );
        ensure!(old == new, "{what}: {:?} was touched", old.path);
    }
    ensure!(old.count() == new.count(), "{what}: files came or went");
    Ok(())
}

/// Copies a disk, whatever it is.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_file() {
        fs::copy(from, to)?;
        return Ok(());
    }
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}
