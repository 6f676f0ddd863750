//! The table: what each example needs to be there.

use crate::page::{Block, blocks, pages};
use crate::stage::{Stage, Thing};
use crate::support::harness::{skip, trial};
use crate::support::probe::Need;
use crate::support::{Outcome, command};
use anyhow::Context;
use libtest_mimic::Trial;

/// One block of one page.
struct Row {
    page: &'static str,
    /// The first line of the block.
    first: &'static str,
    things: &'static [Thing],
    needs: &'static [Need],
    /// The lines are alternatives: each has a stage of its own.
    alone: bool,
    /// Lines that end with another code than 0.
    codes: &'static [(usize, i32)],
}

const fn row(page: &'static str, first: &'static str, things: &'static [Thing]) -> Row {
    Row {
        page,
        first,
        things,
        needs: &[],
        alone: false,
        codes: &[],
    }
}

impl Row {
    const fn needs(mut self, needs: &'static [Need]) -> Self {
        self.needs = needs;
        self
    }

    const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    const fn codes(mut self, codes: &'static [(usize, i32)]) -> Self {
        self.codes = codes;
        self
    }
}

const MKFS: &[Need] = &[Need::E2fsprogs];
const MOUNT: &[Need] = &[Need::Fuse, Need::Root, Need::Loop, Need::E2fsprogs];

const ROWS: [Row; 27] = [
    row(
        "ploopfs.1",
        "$ ploopfs info win11.hdd",
        &[Thing::Dir("/mnt"), Thing::Partitions("win11.hdd", 2)],
    )
    .needs(MOUNT),
    row(
        "ploopfs.1",
        "# ploopfs attach -m /mnt/ct -p 1 /vz/private/101/root.hdd",
        &[
            Thing::Dir("/mnt/ct"),
            Thing::Container("/vz/private/101/root.hdd"),
        ],
    )
    .needs(MOUNT),
    row(
        "ploopfs.1",
        "$ ploopfs mount win11.hdd ~/img",
        &[Thing::Dir("img"), Thing::Partitions("win11.hdd", 2)],
    )
    .needs(MOUNT),
    row("ploopfs.1", "$ . <(ploopfs completions bash)", &[]),
    row(
        "ploopfs-attach.1",
        "# ploopfs attach root.hdd",
        &[Thing::Dir("/mnt"), Thing::Container("root.hdd")],
    )
    .needs(MOUNT),
    row(
        "ploopfs-attach.1",
        "# ploopfs attach -r -m /mnt -p 3 \"Windows 11.hdd\"",
        &[Thing::Dir("/mnt"), Thing::Partitions("Windows 11.hdd", 3)],
    )
    .needs(MOUNT),
    row(
        "ploopfs-check.1",
        "$ ploopfs check root.hdd",
        &[Thing::Chain("root.hdd")],
    ),
    row(
        "ploopfs-checksum.1",
        "$ ploopfs checksum root.hdd >root.sums",
        &[Thing::Chain("root.hdd")],
    ),
    row(
        "ploopfs-compact.1",
        "$ ploopfs compact disk.hdd",
        &[Thing::Wasted("disk.hdd")],
    ),
    row(
        "ploopfs-compact.1",
        "# ploopfs compact --trim disk.hdd",
        &[Thing::Container("disk.hdd")],
    )
    .needs(MOUNT),
    row(
        "ploopfs-compare.1",
        "$ ploopfs compare root.hdd copy.raw",
        &[Thing::Twins("root.hdd", "copy.raw")],
    ),
    row(
        "ploopfs-convert.1",
        "$ ploopfs convert disk.hdd disk.img",
        &[Thing::Chain("disk.hdd")],
    )
    .needs(&[Need::Qemu]),
    row(
        "ploopfs-copy.1",
        "$ ploopfs copy disk.hdd clone.hdd",
        &[Thing::Chain("disk.hdd")],
    ),
    row("ploopfs-create.1", "$ ploopfs create -s 64G disk.hdd", &[]).needs(MKFS),
    row(
        "ploopfs-detach.1",
        "# ploopfs detach /dev/loop0",
        &[Thing::Attached("/vz/private/101/root.hdd")],
    )
    .needs(MOUNT)
    .alone(),
    row(
        "ploopfs-info.1",
        "$ ploopfs info root.hdd",
        &[Thing::Chain("root.hdd")],
    ),
    row("ploopfs-list.1", "$ ploopfs list", &[]),
    row(
        "ploopfs-map.1",
        "$ ploopfs map root.hdd",
        &[Thing::Chain("root.hdd")],
    ),
    row(
        "ploopfs-measure.1",
        "$ ploopfs measure -O qcow2 root.hdd",
        &[Thing::Chain("root.hdd")],
    ),
    row(
        "ploopfs-merge.1",
        "$ ploopfs merge --dry-run root.hdd",
        &[Thing::Chain("root.hdd")],
    )
    .alone(),
    row(
        "ploopfs-mount.1",
        "# ploopfs mount root.hdd /mnt/img",
        &[
            Thing::Dir("/mnt/img"),
            Thing::Dir("/mnt/ct"),
            Thing::Unpartitioned("root.hdd"),
        ],
    )
    .needs(MOUNT),
    row(
        "ploopfs-mount.1",
        "# ploopfs mount -r win11.hdd /mnt/img",
        &[
            Thing::Dir("/mnt/img"),
            Thing::Dir("/mnt/win"),
            Thing::Partitions("win11.hdd", 3),
        ],
    )
    .needs(MOUNT),
    row(
        "ploopfs-mount.1",
        "$ ploopfs mount -r --lower base.hds --lower middle.hds top.hds ~/img",
        &[
            Thing::Dir("img"),
            Thing::Levels(["base.hds", "middle.hds", "top.hds"]),
        ],
    )
    .needs(&[Need::Fuse]),
    row(
        "ploopfs-repair.1",
        "$ ploopfs check root.hdd",
        &[Thing::Wasted("root.hdd")],
    )
    .codes(&[(0, 3), (1, 3)]),
    row(
        "ploopfs-resize.1",
        "$ ploopfs resize disk.hdd 100G",
        &[Thing::Empty("disk.hdd", "64G")],
    ),
    row(
        "ploopfs-snapshot.1",
        "$ ploopfs snapshot create --name \"before the update\" root.hdd",
        &[Thing::Empty("root.hdd", "64M")],
    ),
    row(
        "ploopfs-umount.1",
        "$ ploopfs umount /mnt/img && qemu-img check root.hds",
        &[Thing::Mounted("root.hds", "/mnt/img")],
    )
    .needs(&[Need::Fuse, Need::Qemu]),
];

/// Blocks that are no lines to type.
const TEXTS: [(&str, &str); 2] = [
    (
        "mount.fuse.ploopfs.8",
        "/vm/data.hdd  /mnt/data  fuse.ploopfs  ro,nofail,allow_other  0 0",
    ),
    ("mount.fuse.ploopfs.8", "[Service]"),
];

fn all() -> Vec<(String, Block)> {
    let of = |(name, text): (String, String)| {
        let blocks = blocks(&text).into_iter();
        blocks.map(move |block| (name.clone(), block))
    };
    pages().into_iter().flat_map(of).collect()
}

/// Every block has one row, and every row its block.
pub(crate) fn complete() -> Result<(), String> {
    let mut wrong = Vec::new();
    for (page, block) in all() {
        let row = |one: &&Row| one.page == page && one.first == block.first;
        let is_text = TEXTS.contains(&(&*page, &*block.first)) && block.lines.is_empty();
        if ROWS.iter().filter(row).count() + usize::from(is_text) != 1 {
            wrong.push(format!("{page}: not one row for {:?}", block.first));
        }
    }
    let names = ROWS.iter().map(|row| (row.page, row.first));
    for (page, first) in names.chain(TEXTS) {
        let there = |(name, block): &(String, Block)| name == page && block.first == first;
        if !all().iter().any(there) {
            wrong.push(format!("{page}: no example {first:?}"));
        }
    }
    for (page, text) in pages() {
        let is_verb = page.starts_with("ploopfs") && page.ends_with(".1");
        if is_verb && blocks(&text).is_empty() {
            wrong.push(format!("{page} has no examples"));
        }
    }
    wrong.is_empty().then_some(()).ok_or(wrong.join("\n"))
}

/// One test a row.
pub(crate) fn trials() -> Vec<Trial> {
    macro_rules! each {
        ($($number:literal)*) => {
            vec![$(trial(ROWS[$number].first, ROWS[$number].needs, || play(&ROWS[$number]))),*]
        };
    }
    let all = each!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26);
    assert_eq!(all.len(), ROWS.len());
    all
}

/// Programs that examples name and hosts lack, where nothing else of the example is lost by that.
const OTHERS: [&str; 1] = ["udisksctl"];

fn has(program: &str) -> bool {
    command::run(command::new(program).arg("--version")).is_ok()
}

fn play(row: &Row) -> Outcome {
    if !has("bash") {
        return Err(skip("no bash"));
    }
    let (_, block) = all()
        .into_iter()
        .find(|(page, block)| page == row.page && block.first == row.first)
        .context("the page does not have it")?;
    let mut stage = Stage::new(row.things)?;
    for (number, line) in block.lines.iter().enumerate() {
        let program = line.typed.split(' ').next().unwrap_or_default();
        if OTHERS.contains(&program) {
            eprintln!("not played: `{}`: it needs a desktop", line.typed);
            continue;
        }
        if row.alone && number > 0 {
            stage = Stage::new(row.things)?;
        }
        let codes = row.codes.iter().find(|(which, _)| *which == number);
        stage
            .play(line, codes.map_or(0, |(_, code)| *code))
            .with_context(|| line.typed.clone())?;
    }
    Ok(())
}
