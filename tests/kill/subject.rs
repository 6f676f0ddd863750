//! The disks whose daemons are killed: images, chains and split disks, on the file or over loop.
//!
//! Imports: `forge`, `support`; std, `anyhow`.
//! Never: opens an image for writing once it is made.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, Model, SECTOR};
use crate::forge::image::{IN_USE, ImageSpec, Mapped};
use crate::forge::reader;
use crate::support::{self, command};
use anyhow::{Context, Result, ensure};
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How the disk is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// The flat file, past the page cache.
    Direct,
    /// The flat file, through the page cache.
    Cached,
    /// A loop device with direct I/O.
    Loop,
    /// The loop device that `ploopfs attach` makes.
    Attach,
}

/// What the disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One image.
    Single,
    /// A top over two lower deltas over a plain base.
    Chain,
    /// Two parts, each a top over one lower delta.
    Split,
}

/// Where the files lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the tests are built.
    Disk,
    /// In memory: many more requests to a kill, and a host that cannot zero ranges.
    Memory,
    /// In memory, with less room than the disk has.
    Full,
}

impl Place {
    /// MiB in memory.
    pub(crate) fn mib(self) -> Option<u64> {
        match self {
            Self::Disk => None,
            Self::Memory => Some(400),
            Self::Full => Some(40),
        }
    }
}

/// One disk to try.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject {
    /// Of the test.
    pub(crate) name: &'static str,
    /// Of the format.
    pub(crate) version: u8,
    /// Sectors of a cluster.
    pub(crate) cluster: u32,
    /// Sectors of the disk.
    pub(crate) sectors: u64,
    /// See there.
    pub(crate) door: Door,
    /// See there.
    pub(crate) shape: Shape,
    /// Let fio verify the last quarter of the disk in some cycles.
    pub(crate) fio: bool,
    /// See there.
    pub(crate) host: Place,
}

const fn subject(name: &'static str, version: u8, cluster: u32, door: Door) -> Subject {
    Subject {
        name,
        version,
        cluster,
        sectors: 96 * 2048 + 24,
        door,
        shape: Shape::Single,
        fio: false,
        host: Place::Disk,
    }
}

const fn over(subject: Subject, shape: Shape) -> Subject {
    Subject { shape, ..subject }
}

const fn fio(subject: Subject) -> Subject {
    Subject {
        fio: true,
        ..subject
    }
}

const fn on(subject: Subject, host: Place) -> Subject {
    Subject { host, ..subject }
}

/// All of them. Small clusters give a table of many pages, large ones many writes to a cluster.
pub(crate) const ALL: [Subject; 10] = [
    subject("file_v2", 2, 128, Door::Direct),
    on(
        subject("file_v1_small_clusters", 1, 16, Door::Direct),
        Place::Memory,
    ),
    subject("file_v2_page_cache", 2, 64, Door::Cached),
    fio(subject("loop_v2_fio", 2, 2048, Door::Loop)),
    on(subject("loop_v1", 1, 64, Door::Loop), Place::Memory),
    subject("attach_v2", 2, 64, Door::Attach),
    on(
        over(subject("chain_v2_file", 2, 128, Door::Direct), Shape::Chain),
        Place::Memory,
    ),
    fio(over(
        subject("chain_v1_loop_fio", 1, 256, Door::Loop),
        Shape::Chain,
    )),
    over(subject("split_v2_file", 2, 64, Door::Direct), Shape::Split),
    on(subject("full_host_v2", 2, 64, Door::Direct), Place::Full),
];

/// A disk that has been made.
#[derive(Debug)]
pub(crate) struct Made {
    /// What `ploopfs mount` takes.
    pub(crate) image: PathBuf,
    /// The writable files, one for each part.
    pub(crate) tops: Vec<PathBuf>,
    /// What it shows.
    pub(crate) model: Model,
    /// The lower deltas with their hashes.
    lower: Vec<(PathBuf, String)>,
}

impl Subject {
    fn spec(&self, sectors: u64, percent: u64) -> ImageSpec {
        let mapped = match percent {
            0 => Mapped::Nothing,
            _ => Mapped::Percent(percent),
        };
        ImageSpec::new(self.version, self.cluster, sectors).mapping(mapped)
    }

    /// Makes the files.
    pub(crate) fn make(&self, dir: &Path) -> Result<Made> {
        let image = |sectors, percent| Level::Image(self.spec(sectors, percent));
        let bundle = match self.shape {
            Shape::Single => {
                let path = dir.join("a.hds");
                let spec = self.spec(self.sectors, 25);
                spec.write(&path)?;
                return Ok(Made::single(path, Model::of(&spec)));
            }
            Shape::Chain => {
                let base = Level::Plain {
                    seed: 3,
                    level: 0,
                    bytes: self.sectors * SECTOR / 2 + 1000,
                };
                let lower = [image(self.sectors / 3, 40), image(self.sectors, 20)];
                let [one, two] = lower;
                BundleSpec::new(Style::Ploop, vec![base, one, two, image(self.sectors, 0)])
            }
            Shape::Split => {
                let first = self.sectors / 3 / 8 * 8;
                let part = |sectors| vec![image(sectors, 40), image(sectors, 0)];
                let mut bundle = BundleSpec::new(Style::Parallels, part(first));
                bundle.push_part(part(self.sectors - first));
                bundle
            }
        };
        let path = dir.join("a.hdd");
        bundle.write(&path)?;
        let mut made = Made {
            image: path.clone(),
            tops: Vec::new(),
            model: bundle.model(),
            lower: Vec::new(),
        };
        for part in 0..bundle.parts.len() {
            let mut files = bundle.files(&path, part);
            made.tops.extend(files.pop());
            for file in files {
                let hash = support::sha256(&file)?;
                made.lower.push((file, hash));
            }
        }
        Ok(made)
    }
}

/// What one writable file holds, by its own table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Bytes of a cluster.
    pub(crate) cluster: u64,
    /// Length of the file.
    pub(crate) len: u64,
    /// Clusters of the table.
    pub(crate) table: u64,
    /// Clusters that entries name.
    pub(crate) mapped: u64,
    /// One past the last cluster that an entry names.
    pub(crate) used_end: u64,
    /// Entries of the table.
    pub(crate) entries: u64,
    /// Bytes that the file takes on the host.
    pub(crate) taken: u64,
}

impl Extent {
    /// Reads header and table.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let fields = reader::fields(&file)?.context("no magic")?;
        let mut bytes = vec![0; fields.entries as usize * 4];
        file.read_exact_at(&mut bytes, 64)?;
        let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let entries = bytes.chunks_exact(4).map(|bytes| u64::from(word(bytes)));
        let entries = entries.filter(|entry| *entry != 0);
        let places = entries.map(|entry| match fields.version {
            1 => entry / fields.cluster,
            _ => entry,
        });
        let places: HashSet<u64> = places.collect();
        let table = fields.first / fields.cluster;
        Ok(Self {
            cluster: fields.cluster * SECTOR,
            len: file.metadata()?.len(),
            table,
            mapped: places.len() as u64,
            used_end: places.iter().max().map_or(table, |last| last + 1),
            entries: fields.entries,
            taken: support::host_bytes(path)?,
        })
    }

    /// Clusters inside the file that nothing maps.
    pub(crate) fn leaked(&self) -> u64 {
        (self.len / self.cluster).saturating_sub(self.table + self.mapped)
    }
}

impl Made {
    /// A disk of one image.
    pub(crate) fn single(image: PathBuf, model: Model) -> Self {
        Self {
            tops: vec![image.clone()],
            image,
            model,
            lower: Vec::new(),
        }
    }

    /// Is the in-use mark of any writable file set?
    pub(crate) fn is_marked(&self) -> Result<bool> {
        for top in &self.tops {
            if support::mark_of(top)? == IN_USE {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The files as a kill leaves them: nothing is wrong but the mark, a table that says Empty, and
    /// clusters that nothing maps. Without the mark nothing at all is wrong, as nothing may be
    /// changed before it. Gives the number of clusters that nothing maps.
    pub(crate) fn expect_sound(&self) -> Result<u64> {
        let mut leaked = 0;
        for top in &self.tops {
            if support::mark_of(top)? != IN_USE {
                expect_closed(top).context("the mark is not set")?;
                continue;
            }
            let mut wrong = reader::check(top)?;
            wrong.retain(|what| !what.contains("in-use mark") && !what.contains("flag Empty"));
            ensure!(
                wrong.is_empty(),
                "{}: needs more than its mark cleared: {}",
                top.display(),
                wrong.join("; ")
            );
            let extent = Extent::of(top)?;
            ensure!(
                extent.len <= (extent.table + extent.entries) * extent.cluster,
                "{}: longer than table and entries can need: {extent:?}",
                top.display()
            );
            leaked += extent.leaked();
        }
        Ok(leaked)
    }

    /// The files as a clean close leaves them: nothing wrong, nothing leaked.
    pub(crate) fn expect_closed(&self) -> Result<()> {
        self.tops.iter().try_for_each(|top| expect_closed(top))
    }

    /// The same, and what others say of it.
    pub(crate) fn expect_approved(&self) -> Result<()> {
        self.expect_closed()?;
        for top in &self.tops {
            let mut tool = command::new("qemu-img");
            command::ok(tool.args(["check", "-f", "parallels"]).arg(top))?;
        }
        for (path, hash) in &self.lower {
            ensure!(
                *hash == support::sha256(path)?,
                "{} was written to",
                path.display()
            );
        }
        ensure!(fs::metadata(&self.image).is_ok(), "the image has gone");
        Ok(())
    }
}

fn expect_closed(top: &Path) -> Result<()> {
    support::expect_clean(top)?;
    let extent = Extent::of(top)?;
    let used = extent.used_end * extent.cluster;
    ensure!(
        extent.len == used,
        "{}: {} bytes, of which {used} are used",
        top.display(),
        extent.len
    );
    // What the host needs to remember where the pieces are comes on top.
    let most = (extent.table + extent.mapped) * extent.cluster + (1 << 18);
    ensure!(
        extent.taken <= most,
        "{}: takes {} bytes of the host for {most}: {extent:?}",
        top.display(),
        extent.taken
    );
    Ok(())
}
