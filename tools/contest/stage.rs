//! Where contestants meet, and the files that they serve.
//!
//! Imports: `forge`, `host` (the kind of a file system); std, `anyhow`.
//! Never: gives one contestant's files better memory than another's.
//!
//! Files with the same bytes are not equally fast. In memory, one that is filled alone gets long
//! runs of neighbouring pages and the next one what that has left over, and requests of 128 KiB
//! and more feel it: by more than most servers differ. So all files are made sparse first, and then
//! filled together, a piece of each contestant's in turn, in an order that is shuffled for each
//! turn. Nothing allocates ahead, which would hand out the memory file by file again. On a disk
//! each file is filled whole instead: in turns its blocks would lie scattered among the others'.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::splitmix;
use crate::forge::image::{ImageSpec, Mapped};
use crate::host::file_system;
use anyhow::Result;
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What is filled of a contestant's files before it is another's turn.
const PIECE: u64 = 1 << 20;

/// How the bytes are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// The file itself.
    File,
    /// A loop device with direct I/O over it.
    Loop,
}

/// What the image has before the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Every cluster.
    Full,
    /// No cluster.
    Empty,
    /// No cluster, over a lower image that has every one.
    Covered,
    /// Every cluster, spread over so many levels.
    Chain(usize),
}

impl Content {
    /// True when a contestant needs lower images for it.
    pub(crate) fn is_chain(self) -> bool {
        matches!(self, Self::Covered | Self::Chain(_))
    }
}

/// Which level of a chain has a cluster.
#[derive(Clone, Copy, Debug)]
enum Place {
    Base,
    Spread,
}

/// Where contestants meet.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    pub(crate) dir: PathBuf,
    pub(crate) view: View,
    pub(crate) content: Content,
    /// Servers go past the host's page cache.
    pub(crate) direct: bool,
    pub(crate) bytes: u64,
    pub(crate) cluster_sectors: u32,
}

/// The files of one contestant.
#[derive(Debug)]
pub(crate) struct Files {
    /// What is served: a file, or the directory of a bundle.
    pub(crate) path: PathBuf,
    /// What has no data yet, in the order in which it is filled.
    blanks: VecDeque<Blank>,
}

/// The part of a file that is to be filled.
#[derive(Debug)]
struct Blank {
    file: PathBuf,
    at: u64,
    end: u64,
}

impl Stage {
    fn spec(&self, mapped: Mapped) -> ImageSpec {
        let mut spec = ImageSpec::new(2, self.cluster_sectors, self.bytes / 512).mapping(mapped);
        spec.no_data = true;
        spec
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster(&self) -> u64 {
        u64::from(self.cluster_sectors) * 512
    }

    /// True when its files are in memory and nowhere else.
    pub(crate) fn is_in_memory(&self) -> Result<bool> {
        Ok(file_system(&self.dir)? == "tmpfs")
    }

    /// Makes a raw file, without its data.
    pub(crate) fn make_raw(&self, dir: &Path) -> Result<Files> {
        let path = dir.join("raw");
        File::create_new(&path)?.set_len(self.bytes)?;
        let mut files = Files::new(path.clone());
        if self.content == Content::Full {
            files.leave_blank(path, 0)?;
        }
        Ok(files)
    }

    /// Makes an image, or a bundle of several, without the data.
    pub(crate) fn make_image(&self, dir: &Path) -> Result<Files> {
        match self.content {
            Content::Full => self.make_single(dir, Mapped::All),
            Content::Empty => self.make_single(dir, Mapped::Nothing),
            Content::Covered => self.make_chain(dir, 2, Place::Base),
            Content::Chain(depth) => self.make_chain(dir, depth, Place::Spread),
        }
    }

    fn make_single(&self, dir: &Path, mapped: Mapped) -> Result<Files> {
        let path = dir.join("disk.hds");
        let spec = self.spec(mapped);
        spec.write(&path)?;
        let mut files = Files::new(path.clone());
        files.leave_blank(path, spec.data_start() * 512)?;
        Ok(files)
    }

    fn make_chain(&self, dir: &Path, depth: usize, place: Place) -> Result<Files> {
        let bundle = dir.join("disk.hdd");
        let like = self.spec(Mapped::Nothing);
        let spec = BundleSpec::chain(Style::Parallels, &like, depth, |number, image| {
            image.mapped = match place {
                Place::Base if number == 0 => Mapped::All,
                Place::Base => Mapped::Nothing,
                Place::Spread => Mapped::Every {
                    step: depth as u64,
                    phase: number as u64,
                },
            };
        });
        spec.write(&bundle)?;
        let mut files = Files::new(bundle.clone());
        for file in spec.files(&bundle, 0) {
            files.leave_blank(file, like.data_start() * 512)?;
        }
        Ok(files)
    }
}

impl Files {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            blanks: VecDeque::new(),
        }
    }

    /// Notes that a file has no data from a place on.
    fn leave_blank(&mut self, file: PathBuf, at: u64) -> Result<()> {
        let end = fs::metadata(&file)?.len();
        if at < end {
            self.blanks.push_back(Blank { file, at, end });
        }
        Ok(())
    }

    /// Fills the next piece with bytes that are not zero; false when there is none.
    fn fill_piece(&mut self, bytes: &[u8]) -> Result<bool> {
        let Some(blank) = self.blanks.front_mut() else {
            return Ok(false);
        };
        let file = OpenOptions::new().write(true).open(&blank.file)?;
        let len = (blank.end - blank.at).min(bytes.len() as u64);
        file.write_all_at(&bytes[..len as usize], blank.at)?;
        blank.at += len;
        if blank.at == blank.end {
            file.sync_all()?;
            self.blanks.pop_front();
        }
        Ok(true)
    }
}

/// Fills all files: in turns those in memory, and one after the other those on a disk.
pub(crate) fn fill(mut all: Vec<&mut Files>, in_memory: bool, random: &mut u64) -> Result<()> {
    let bytes = vec![0x5a; PIECE as usize];
    while !all.is_empty() {
        shuffle(&mut all, random);
        let mut unfilled = Vec::new();
        for files in all {
            while files.fill_piece(&bytes)? && !in_memory {}
            if !files.blanks.is_empty() {
                unfilled.push(files);
            }
        }
        all = unfilled;
    }
    Ok(())
}

/// Shuffles by a seed.
pub(crate) fn shuffle<T>(list: &mut [T], state: &mut u64) {
    for end in (1..list.len()).rev() {
        list.swap(end, (splitmix(state) % (end as u64 + 1)) as usize);
    }
}
