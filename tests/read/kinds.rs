//! Disks of every kind that is ours, small ones.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, Model};
use crate::forge::image::{FirstBlock, ImageSpec, Layout, Mapped};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// A disk with the bytes that it must show.
pub(crate) struct Made {
    pub(crate) path: PathBuf,
    pub(crate) model: Model,
}

fn image(version: u8, cluster: u32, layout: Layout) -> ImageSpec {
    let mut spec = ImageSpec::new(version, cluster, 8191).mapping(Mapped::Percent(40));
    spec.layout = layout;
    spec
}

/// Writes single images of both versions in every layout.
pub(crate) fn images(dir: &Path) -> Result<Vec<Made>> {
    let mut specs = Vec::new();
    for version in [1, 2] {
        for (cluster, layout) in [
            (8, Layout::Packed),
            (64, Layout::Shuffled(3)),
            (128, Layout::Identity),
            (16, Layout::Reversed),
            (32, Layout::Gaps(2)),
        ] {
            specs.push(image(version, cluster, layout));
        }
    }
    let mut old = ImageSpec::new(1, 63, 6301).mapping(Mapped::Percent(70));
    old.first_block = FirstBlock::Zero;
    specs.push(old);
    let mut made = Vec::new();
    for (number, spec) in specs.iter().enumerate() {
        let path = dir.join(format!("{number}.hds"));
        spec.write(&path)?;
        let model = Model::of(spec);
        made.push(Made { path, model });
    }
    Ok(made)
}

/// Writes bundles: chains over images and plain bases, split disks, bases that are too short.
pub(crate) fn bundles(dir: &Path) -> Result<Vec<Made>> {
    let small = image(2, 16, Layout::Packed);
    let chain = |version, cluster| {
        let like = image(version, cluster, Layout::Shuffled(5));
        BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {})
    };
    let plain = |bytes| {
        let base = Level::Plain {
            seed: 1,
            level: 0,
            bytes,
        };
        let tops = [small.clone(), small.clone()].map(Level::Image);
        [vec![base], tops.to_vec()].concat()
    };
    let mut split = BundleSpec::new(Style::Parallels, plain(8191 * 512));
    split.push_part(plain(100_001));
    let mut shorter = small.clone();
    shorter.disk_sectors = 5003;
    let grown = vec![Level::Image(shorter), Level::Image(small.clone())];
    let specs = [
        chain(1, 32),
        chain(2, 64),
        BundleSpec::new(Style::Ploop, plain(8191 * 512)),
        BundleSpec::new(Style::Ploop, grown),
        split,
    ];
    let mut made = Vec::new();
    for (number, spec) in specs.iter().enumerate() {
        let path = dir.join(format!("{number}.hdd"));
        spec.write(&path)?;
        made.push(Made {
            path,
            model: spec.model(),
        });
    }
    Ok(made)
}
