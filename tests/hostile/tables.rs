//! Rows 30 to 40: tables, and files whose length does not fit them.

use crate::answer::{BOTH, Row, opens, refused, room, row};
use crate::forge::content::{self, Model};
use crate::forge::corrupt;
use crate::forge::image::{FirstBlock, ImageSpec};
use crate::headers::{broken, spec};
use crate::support::{self, Outcome};
use anyhow::{Context, Result, ensure};
use ploopfs::error::ErrorKind::{self, Corrupt, InUse};
use ploopfs::units::DiskOffset;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The rows of this file. What 30 to 34 ask of a repair, and the counts of 36, are for the tests of
/// `check` and `repair`.
pub(crate) const ROWS: &[Row] = &[
    row(30, "entry_in_the_table", entry_in_the_table),
    row(31, "entry_past_the_end", entry_past_the_end),
    row(32, "entry_across_the_end", entry_across_the_end),
    row(
        33,
        "two_entries_for_one_cluster",
        two_entries_for_one_cluster,
    ),
    row(34, "version_1_entry_off_the_grid", entry_off_the_grid),
    row(35, "slots_after_the_last_entry", slots_after_the_last_entry),
    row(36, "unused_clusters_in_the_middle", unused_in_the_middle),
    row(37, "unused_clusters_at_the_end", unused_at_the_end),
    row(38, "length_no_multiple_of_the_cluster", odd_length),
    row(39, "length_changes_meanwhile", length_changes),
    row(40, "hole_in_a_mapped_cluster", hole_in_a_mapped_cluster),
];

/// One cluster cannot be read, the others can, and nobody writes.
fn one_bad(dir: &Path, spec: &ImageSpec, name: &str, words: &[&str]) -> Outcome {
    for marks in [&[][..], &["h-in-use"]] {
        let path = broken(dir, spec, &[&[name], marks].concat())?;
        let bad = corrupt::nth_mapped(&path, 0)?;
        let looked = opens(&path, false)?;
        looked
            .shows_all_but(&Model::of(spec), &[bad])?
            .unchanged()?;
        let kind = if marks.is_empty() { Corrupt } else { InUse };
        let place = format!("cluster {bad}");
        let words = [words, &[&place, "repair", "mount -r"]].concat();
        let words: Vec<&str> = match kind {
            // The words of the place belong to the cause then.
            InUse => words.into_iter().filter(|word| *word != place).collect(),
            _ => words,
        };
        refused(&path, true, kind, &words).with_context(|| name.to_string())?;
    }
    Ok(())
}

fn entry_in_the_table() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let mut spec = spec(version);
        // So late that an entry can point before it.
        spec.first_block = FirstBlock::Extra(2);
        one_bad(
            dir.path(),
            &spec,
            "t-in-table",
            &["the entry 1 points into the table"],
        )?;
    }
    Ok(())
}

fn entry_past_the_end() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        for name in ["t-past-eof", "t-far", "t-all-ones"] {
            one_bad(
                dir.path(),
                &spec(version),
                name,
                &["points past the end of the file"],
            )?;
        }
    }
    Ok(())
}

fn entry_across_the_end() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let spec = spec(version);
        let last = spec.slots().last().context("nothing is mapped")?.0;
        let path = broken(dir.path(), &spec, &["t-straddle"])?;
        let looked = opens(&path, false)?;
        looked
            .shows_all_but(&Model::of(&spec), &[last])?
            .unchanged()?;
        let place = format!("cluster {last}");
        refused(
            &path,
            true,
            Corrupt,
            &["the end of the file cuts", &place, "-r"],
        )?;
        // After a crash the file was growing, and what had not arrived yet was zeros.
        let path = broken(dir.path(), &spec, &["t-straddle", "h-in-use"])?;
        let cluster = 64 * 512;
        let (from, to) = (last * cluster + cluster / 2, (last + 1) * cluster);
        let missing = to.min(Model::of(&spec).bytes()) - 1;
        let told = format!("bytes {from} to {missing} of the disk are missing");
        let mut want = Model::of(&spec).read(0, Model::of(&spec).bytes() as usize);
        let end = want.len().min(to as usize);
        want[from as usize..end].fill(0);
        let opened = opens(&path, true)?.tells(&[&told])?;
        opened.shows_bytes(&want)?.takes_a_write(5)?;
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn two_entries_for_one_cluster() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        for marks in [&[][..], &["h-in-use"]] {
            let spec = spec(version);
            let path = broken(dir.path(), &spec, &[&["t-duplicate"], marks].concat())?;
            let kind = if marks.is_empty() { Corrupt } else { InUse };
            refused(
                &path,
                true,
                kind,
                &["that another one has too", "repair", "mount -r"],
            )?;
            // Both show the same bytes to those who only read.
            let second = corrupt::nth_mapped(&path, 1)?;
            let opened = opens(&path, false)?;
            let found = opened.bytes()?;
            let first = corrupt::nth_mapped(&path, 0)?;
            let at = |cluster: u64| cluster as usize * 32768..(cluster as usize + 1) * 32768;
            ensure!(
                found[at(first)] == found[at(second)],
                "not the same cluster"
            );
            opened.unchanged()?;
        }
    }
    Ok(())
}

fn entry_off_the_grid() -> Outcome {
    let dir = room()?;
    let spec = spec(1);
    let path = broken(dir.path(), &spec, &["t-unaligned"])?;
    let cluster = corrupt::nth_mapped(&path, 0)?;
    let entry = support::read_at(&path, 64 + 4 * cluster, 4)?;
    let place = u64::from(u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])) * 512;
    let want = support::read_at(&path, place, 32768)?;
    let opened = opens(&path, false)?;
    let mut found = vec![0; 32768];
    opened
        .disk
        .read_at(DiskOffset::new(cluster * 32768), &mut found)?;
    ensure!(found == want, "not what the entry names");
    opened.unchanged()?;
    // It overlaps two clusters of the grid, so somebody has to move it before anybody writes.
    let place = format!("cluster {cluster}");
    refused(
        &path,
        true,
        Corrupt,
        &["not on a cluster border", &place, "repair"],
    )
}

fn slots_after_the_last_entry() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let spec = spec(version);
        let path = broken(dir.path(), &spec, &["t-slots-after-end"])?;
        for write in BOTH {
            let opened = opens(&path, write)?.tells_nothing()?;
            opened.shows(&Model::of(&spec))?.unchanged()?;
        }
        let path = broken(dir.path(), &spec, &["t-slots-after-end", "h-in-use"])?;
        let opened = opens(&path, true)?.tells(&["1 slots after the last entry cleared"])?;
        opened.shows(&Model::of(&spec))?.takes_a_write(5)?;
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn unused_in_the_middle() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let path = broken(dir.path(), &spec(version), &[])?;
        let freed = corrupt::nth_mapped(&path, 0)?;
        corrupt::apply("t-leak-interior", &path)?;
        let before = fs::metadata(&path)?.len();
        // A cluster that was a hole gets the place of the one that nothing names any more, and none
        // of its bytes.
        opens(&path, true)?
            .tells_nothing()?
            .takes_a_write(freed * 64)?;
        ensure!(fs::metadata(&path)?.len() == before, "the file has grown");
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn unused_at_the_end() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let spec = spec(version);
        let path = broken(dir.path(), &spec, &[])?;
        let before = fs::metadata(&path)?.len();
        corrupt::apply("t-leak-tail", &path)?;
        for write in BOTH {
            let opened = opens(&path, write)?.tells_nothing()?;
            opened.shows(&Model::of(&spec))?.unchanged()?;
        }
        opens(&path, true)?.takes_a_write(64)?;
        ensure!(
            fs::metadata(&path)?.len() == before,
            "not trimmed at the close"
        );
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn odd_length() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let spec = spec(version);
        for marks in [&[][..], &["h-in-use"]] {
            let path = broken(dir.path(), &spec, &[&["t-odd-length"], marks].concat())?;
            opens(&path, false)?.shows(&Model::of(&spec))?.unchanged()?;
            let mut opened = opens(&path, true)?;
            if !marks.is_empty() {
                opened = opened.tells(&["1000 unused bytes at the end cut off"])?;
            }
            opened.shows(&Model::of(&spec))?.takes_a_write(0)?;
            ensure!(fs::metadata(&path)?.len() % 32768 == 0, "still odd");
            support::expect_clean(&path)?;
        }
    }
    Ok(())
}

/// Reads clusters in disk order and tells which failed, and how.
fn failures(disk: &ploopfs::disk::Disk, model: &Model) -> Result<Vec<(u64, ErrorKind)>> {
    let mut failed = Vec::new();
    for cluster in 0..model.bytes().div_ceil(32768) {
        let at = cluster * 32768;
        let mut bytes = vec![0; 32768.min(model.bytes() - at) as usize];
        match disk.read_at(DiskOffset::new(at), &mut bytes) {
            Err(error) => failed.push((cluster, error.kind())),
            Ok(()) => {
                let difference =
                    content::first_difference(at, &model.read(at, bytes.len()), &bytes);
                ensure!(difference.is_none(), "{}", difference.unwrap_or_default());
            }
        }
    }
    Ok(failed)
}

fn length_changes() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        for write in BOTH {
            let home = dir.path().join(format!("{write}"));
            fs::create_dir_all(&home)?;
            let spec = spec(version);
            let model = Model::of(&spec);
            let path = broken(&home, &spec, &[])?;
            let opened = opens(&path, write)?;
            ensure!(
                failures(&opened.disk, &model)?.is_empty(),
                "failures before anything"
            );
            let file = OpenOptions::new().write(true).open(&path)?;
            let len = file.metadata()?.len();
            // Longer: nothing that is mapped minds.
            file.set_len(len + 12_345)?;
            ensure!(
                failures(&opened.disk, &model)?.is_empty(),
                "failures of a longer file"
            );
            // Shorter by two clusters and a half: three are errors, never zeros.
            file.set_len(len - 5 * 16384)?;
            let failed = failures(&opened.disk, &model)?;
            let kinds: Vec<_> = failed.iter().map(|(_, kind)| *kind).collect();
            ensure!(kinds == [ErrorKind::Truncated; 3], "{failed:?}");
            // Nothing was latched, and the end of the use is no failure.
            ensure!(opened.disk.stats().latched.is_none(), "latched");
            opened.disk.close()?;
            // What is gone before the table was read is known by the length.
            let opened = opens(&path, false)?;
            let failed = failures(&opened.disk, &model)?;
            let kinds: Vec<_> = failed.iter().map(|(_, kind)| *kind).collect();
            ensure!(kinds == [Corrupt; 3], "{failed:?}");
            opened.unchanged()?;
        }
    }
    Ok(())
}

fn hole_in_a_mapped_cluster() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let mut spec = spec(version);
        spec.no_data = true;
        let path = broken(dir.path(), &spec, &[])?;
        for write in BOTH {
            let zeros = vec![0; Model::of(&spec).bytes() as usize];
            opens(&path, write)?
                .tells_nothing()?
                .shows_bytes(&zeros)?
                .unchanged()?;
        }
        opens(&path, true)?.takes_a_write(64)?;
        let file = OpenOptions::new().read(true).open(&path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, spec.slot_at(0))?;
        ensure!(byte == [0x77], "not written in place");
    }
    Ok(())
}
