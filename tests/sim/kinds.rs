//! The disks that are worked on, small enough for hundreds of thousands of whole reads.

use crate::forge::image::{ImageSpec, Mapped};
use crate::sim::storage::World;
use ploopfs::chain::bundle::{OpenedFile, OpenedImages, OpenedPart, Plain};
use ploopfs::units::SectorCount;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// One file of a part, base first.
#[derive(Clone, Debug)]
struct Level {
    bytes: Vec<u8>,
    plain: Plain,
}

/// A disk: its parts, with their lengths in sectors.
#[derive(Debug)]
pub(crate) struct DiskKind {
    pub(crate) name: &'static str,
    parts: Vec<(u64, Vec<Level>)>,
}

fn forged(spec: &ImageSpec) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("image");
    spec.write(&path).expect("an image");
    std::fs::read(path).expect("its bytes")
}

fn image(version: u8, cluster: u32, sectors: u64, mapped: Mapped) -> Level {
    Level {
        bytes: forged(&ImageSpec::new(version, cluster, sectors).mapping(mapped)),
        plain: Plain::No,
    }
}

fn plain(sectors: usize) -> Level {
    let bytes = (0..sectors).flat_map(|sector| [0x11 + sector as u8 % 7; 512]);
    Level {
        bytes: bytes.collect(),
        plain: Plain::Yes,
    }
}

/// All of them.
pub(crate) fn all() -> &'static [DiskKind] {
    static ALL: OnceLock<Vec<DiskKind>> = OnceLock::new();
    ALL.get_or_init(|| {
        let empty = || Mapped::Nothing;
        let kind = |name, parts| DiskKind { name, parts };
        vec![
            kind("v2", vec![(160, vec![image(2, 8, 160, empty())])]),
            kind(
                "v1 of odd size",
                vec![(157, vec![image(1, 16, 157, Mapped::Percent(60))])],
            ),
            kind(
                "over a plain base",
                vec![(160, vec![plain(150), image(2, 8, 160, empty())])],
            ),
            kind(
                "over expanding bases",
                vec![(
                    160,
                    vec![
                        image(1, 8, 120, Mapped::Percent(70)),
                        image(2, 8, 160, Mapped::Percent(30)),
                        image(2, 8, 160, Mapped::Percent(20)),
                    ],
                )],
            ),
            kind(
                "split",
                vec![
                    (80, vec![image(1, 8, 80, Mapped::Percent(50))]),
                    (81, vec![plain(70), image(2, 16, 81, empty())]),
                ],
            ),
            kind(
                "table of two pages",
                vec![(8800, vec![image(2, 8, 8800, Mapped::Percent(1))])],
            ),
            kind("plain", vec![(160, vec![plain(160)])]),
        ]
    })
}

/// Disks for requests that the kernel carries, some of them large.
pub(crate) fn of_mounts() -> &'static [DiskKind] {
    static ALL: OnceLock<Vec<DiskKind>> = OnceLock::new();
    ALL.get_or_init(|| {
        let chain = vec![
            image(1, 8, 500, Mapped::Percent(70)),
            image(2, 8, 640, Mapped::Percent(30)),
        ];
        let large = vec![plain(700), image(2, 64, 900, Mapped::Nothing)];
        let kind = |name, parts| DiskKind { name, parts };
        vec![
            kind("a chain", vec![(640, chain)]),
            kind("large clusters over a plain base", vec![(900, large)]),
        ]
    })
}

impl DiskKind {
    /// Contents of all files, in the order of their numbers.
    pub(crate) fn files(&self) -> Vec<Vec<u8>> {
        let levels = self.parts.iter().flat_map(|(_, levels)| levels);
        levels.map(|level| level.bytes.clone()).collect()
    }

    /// Numbers of the files that are written to and have a header.
    pub(crate) fn tops(&self) -> Vec<usize> {
        let mut tops = Vec::new();
        let mut next = 0;
        for (_, levels) in &self.parts {
            next += levels.len();
            if levels.last().is_some_and(|top| top.plain == Plain::No) {
                tops.push(next - 1);
            }
        }
        tops
    }

    /// Sectors that are worked on: few, so that requests meet.
    pub(crate) fn windows(&self) -> Vec<Range<u64>> {
        let sectors = self.sectors();
        match sectors {
            // Where one page of the table ends and the next begins.
            1000.. => vec![0..40, 1008 * 8 - 40..1008 * 8 + 40],
            _ => vec![0..sectors, 0..24, sectors - 24..sectors],
        }
    }

    /// Sectors of the disk.
    pub(crate) fn sectors(&self) -> u64 {
        self.parts.iter().map(|(sectors, _)| sectors).sum()
    }

    /// The files of a world as those of an open disk.
    pub(crate) fn open(&self, world: &Arc<World>) -> Arc<OpenedImages> {
        let mut start = 0;
        let mut number = 0;
        let mut parts = Vec::new();
        for (sectors, levels) in &self.parts {
            let mut files = Vec::new();
            for (at, level) in levels.iter().enumerate() {
                files.push(OpenedFile {
                    path: PathBuf::from("simulated"),
                    storage: world.open(number, at + 1 == levels.len()),
                    plain: level.plain,
                    guid: None,
                });
                number += 1;
            }
            parts.push(OpenedPart {
                start: SectorCount::new(start),
                end: Some(SectorCount::new(start + sectors)),
                blocksize: None,
                files,
            });
            start += sectors;
        }
        Arc::new(OpenedImages::from_parts(PathBuf::from("simulated"), parts))
    }
}
