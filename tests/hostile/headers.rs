//! Rows 1 to 27: headers, and the extensions that they name.

use crate::answer::{
    BOTH, Row, expect_unchanged, info, open, opens, refused, room, row, selection, state,
};
use crate::forge::content::Model;
use crate::forge::corrupt;
use crate::forge::extension::BitmapSpec;
use crate::forge::image::{FirstBlock, ImageSpec, Mapped, V21};
use crate::support::{self, Outcome};
use anyhow::{Context, Result, ensure};
use ploopfs::error::ErrorKind::{Corrupt, Locked, NotAnImage, Truncated, Unsupported};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The rows of this file.
pub(crate) const ROWS: &[Row] = &[
    row(1, "shorter_than_a_header", shorter_than_a_header),
    row(2, "shorter_than_a_page", shorter_than_a_page),
    row(3, "unknown_magic", unknown_magic),
    row(4, "unknown_type", unknown_type),
    row(5, "cluster_of_no_sectors", cluster_of_no_sectors),
    row(6, "cluster_no_power_of_two", cluster_no_power_of_two),
    row(7, "cluster_too_small_or_large", cluster_too_small_or_large),
    row(8, "no_entries_for_a_disk", no_entries_for_a_disk),
    row(9, "no_entries_for_no_disk", no_entries_for_no_disk),
    row(
        10,
        "table_shorter_than_the_disk",
        table_shorter_than_the_disk,
    ),
    row(11, "table_longer_than_the_disk", table_longer_than_the_disk),
    row(12, "table_longer_than_the_file", table_longer_than_the_file),
    row(13, "size_no_multiple_of_the_cluster", size_no_multiple),
    row(14, "version_1_with_an_upper_half", version_1_upper_half),
    row(15, "size_absurd", size_absurd),
    row(16, "first_block_0", first_block_0),
    row(17, "first_block_in_the_table", first_block_in_the_table),
    row(18, "first_block_later_than_needed", first_block_later),
    row(19, "first_block_past_the_end", first_block_past_the_end),
    row(20, "in_use", in_use),
    row(21, "other_marks", other_marks),
    row(22, "empty_flag_with_data", empty_flag_with_data),
    row(23, "conversion_interrupted", conversion_interrupted),
    row(24, "unknown_flags", unknown_flags),
    row(25, "extension_of_an_unmarked_image", extension_unmarked),
    row(26, "extension_bad", extension_bad),
    row(27, "extension_elsewhere", extension_elsewhere),
];

const SECTORS: u64 = 12_803;
/// Clusters of 32 KiB in it; the last is partial.
const CLUSTERS: u64 = 201;

/// Half of the clusters mapped.
pub(crate) fn spec(version: u8) -> ImageSpec {
    ImageSpec::new(version, 64, SECTORS).mapping(Mapped::Every { step: 2, phase: 1 })
}

/// An image alone in a directory, broken in these ways.
pub(crate) fn broken(dir: &Path, spec: &ImageSpec, names: &[&str]) -> Result<PathBuf> {
    let home = dir.join(format!("{}-{}", spec.version, names.join("+")));
    fs::create_dir(&home)?;
    let path = home.join("a.hds");
    spec.write(&path)?;
    for name in names {
        corrupt::apply(name, &path).with_context(|| (*name).to_string())?;
    }
    Ok(path)
}

/// Refused whatever is wanted, in both versions.
fn always_refused(
    name: &str,
    kind: ploopfs::error::ErrorKind,
    words: &[&str],
    versions: &[u8],
) -> Outcome {
    let dir = room()?;
    for version in versions {
        let path = broken(dir.path(), &spec(*version), &[name])?;
        for write in BOTH {
            refused(&path, write, kind, words).with_context(|| name.to_string())?;
        }
        // The look at it tells the same.
        let (human, _) = info(&path)?;
        let said = human.expect_code(0)?.text();
        ensure!(
            said.contains(words[0]),
            "info: nothing about {:?}: {said}",
            words[0]
        );
    }
    Ok(())
}

fn shorter_than_a_header() -> Outcome {
    let dir = room()?;
    for (name, words) in [("h-empty", "0 bytes"), ("h-short", "63 bytes")] {
        let path = broken(dir.path(), &spec(2), &[name])?;
        for write in BOTH {
            refused(
                &path,
                write,
                Truncated,
                &[words, "the 64 of a header", "copy"],
            )?;
        }
        info(&path)?;
    }
    Ok(())
}

fn shorter_than_a_page() -> Outcome {
    always_refused(
        "h-only",
        Truncated,
        &["the BAT ends at byte 868, the file at 64"],
        &[1, 2],
    )?;
    // Ten entries, which end at byte 104.
    let dir = room()?;
    for (number, len) in [104, 4095].into_iter().enumerate() {
        let spec = ImageSpec::new(1 + number as u8, 64, 640);
        let path = broken(dir.path(), &spec, &[])?;
        OpenOptions::new().write(true).open(&path)?.set_len(len)?;
        refused(
            &path,
            true,
            Corrupt,
            &["first block lies at sector 64", "past the end", "-r"],
        )?;
        let looked = opens(&path, false)?.tells(&["past the end"])?;
        looked.shows(&Model::of(&spec))?.unchanged()?;
        OpenOptions::new().write(true).open(&path)?.set_len(103)?;
        refused(&path, false, Truncated, &["the BAT ends at byte 104"])?;
    }
    Ok(())
}

fn unknown_magic() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &spec(2), &["h-magic"])?;
    for write in BOTH {
        refused(&path, write, NotAnImage, &["neither magic", "--format raw"])?;
    }
    info(&path)?;
    // In a bundle only the descriptor can say that it is raw; `descriptors` has that case.
    Ok(())
}

fn unknown_type() -> Outcome {
    always_refused("h-type", Corrupt, &["disk type 3 instead of 2"], &[1, 2])
}

fn cluster_of_no_sectors() -> Outcome {
    always_refused(
        "h-cluster-0",
        Corrupt,
        &["cluster size of 0 sectors"],
        &[1, 2],
    )
}

fn cluster_no_power_of_two() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        for cluster in [3, 24, 63, 72, 100, 196] {
            let home = dir.path().join(format!("{cluster}"));
            fs::create_dir_all(&home)?;
            let mut spec = spec(version);
            spec.cluster_sectors = cluster;
            let path = broken(&home, &spec, &[])?;
            let looked = opens(&path, false)?;
            looked.shows(&Model::of(&spec))?.unchanged()?;
            if cluster % 8 != 0 {
                let words = [
                    &*format!("clusters of {cluster} sectors"),
                    "multiple of 8",
                    "-r",
                ];
                refused(&path, true, Unsupported, &words)?;
                continue;
            }
            let opened = opens(&path, true)?.tells(&["power of two", &cluster.to_string()])?;
            opened.shows(&Model::of(&spec))?.takes_a_write(7)?;
            support::expect_clean(&path)?;
        }
    }
    Ok(())
}

fn cluster_too_small_or_large() -> Outcome {
    let dir = room()?;
    let sized = |cluster: u32, sectors: u64| -> Result<(ImageSpec, PathBuf)> {
        let home = dir.path().join(format!("{cluster}"));
        fs::create_dir_all(&home)?;
        let mut spec = ImageSpec::new(2, cluster, sectors);
        spec.no_data = true;
        let path = broken(&home, &spec, &[])?;
        Ok((spec, path))
    };
    let (spec, path) = sized(8, 803)?;
    let opened = opens(&path, true)?.tells(&["clusters of 8 sectors"])?;
    opened.shows(&Model::of(&spec))?.takes_a_write(800)?;
    let (_, path) = sized(131_072, 4 << 17)?;
    opens(&path, true)?.tells_nothing()?.unchanged()?;
    for cluster in [131_080, 262_144, 4_186_127] {
        let (_, path) = sized(cluster, 1 << 24)?;
        opens(&path, false)?.unchanged()?;
        refused(
            &path,
            true,
            Unsupported,
            &["at most 131072", &cluster.to_string(), "-r"],
        )?;
    }
    let (_, path) = sized(4_186_128, 1 << 24)?;
    for write in BOTH {
        refused(
            &path,
            write,
            Corrupt,
            &["cluster size of 4186128 sectors is impossible"],
        )?;
    }
    always_refused(
        "h-cluster-absurd",
        Corrupt,
        &["4294967295 sectors"],
        &[1, 2],
    )
}

fn no_entries_for_a_disk() -> Outcome {
    always_refused(
        "h-entries-0",
        Corrupt,
        &["no BAT entries for a disk of 12803"],
        &[1, 2],
    )
}

fn no_entries_for_no_disk() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let path = broken(dir.path(), &spec(version), &["h-nothing"])?;
        let opened = opens(&path, false)?;
        ensure!(
            opened.disk.size_bytes() == 0,
            "{} bytes",
            opened.disk.size_bytes()
        );
        opened
            .tells(&["no sectors"])?
            .shows_bytes(&[])?
            .unchanged()?;
        refused(&path, true, Unsupported, &["the disk has no sectors", "-r"])?;
    }
    Ok(())
}

fn table_shorter_than_the_disk() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let mut spec = spec(version);
        spec.mapped = Mapped::All;
        let path = broken(dir.path(), &spec, &["h-entries-few"])?;
        let words = ["200 BAT entries do not cover 12803 sectors"];
        refused(&path, true, Corrupt, &[words[0], "-r"])?;
        let mut want = Model::of(&spec).read(0, SECTORS as usize * 512);
        want[200 * 32768..].fill(0);
        opens(&path, false)?
            .tells(&words)?
            .shows_bytes(&want)?
            .unchanged()?;
    }
    Ok(())
}

fn table_longer_than_the_disk() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let words = ["204 BAT entries for a disk of 201 clusters"];
        let path = broken(dir.path(), &spec(version), &["h-entries-many"])?;
        let looked = opens(&path, false)?.tells(&words)?;
        looked.shows(&Model::of(&spec(version)))?.unchanged()?;
        let opened = opens(&path, true)?.tells(&words)?;
        opened
            .shows(&Model::of(&spec(version)))?
            .takes_a_write(SECTORS - 1)?;
        // What such a slot says shows nowhere; but it could claim a cluster, so nobody writes.
        let file = OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&u32::MAX.to_le_bytes(), 64 + 4 * 202)?;
        opens(&path, false)?.tells(&words)?.unchanged()?;
        refused(&path, true, Corrupt, &["past the end", "cluster 202", "-r"])?;
    }
    Ok(())
}

fn table_longer_than_the_file() -> Outcome {
    for (name, count) in [
        ("h-entries-2e29", "536870912"),
        ("h-entries-max", "4294967295"),
    ] {
        let words = [&*format!(
            "{count} BAT entries are more than the format allows"
        )];
        always_refused(name, Corrupt, &words, &[1, 2])?;
    }
    let dir = room()?;
    let path = broken(dir.path(), &spec(2), &[])?;
    let file = OpenOptions::new().write(true).open(&path)?;
    for entries in [(1_u32 << 29) - 1, 1 << 24, 900_000] {
        file.write_all_at(&entries.to_le_bytes(), 32)?;
        let end = format!("the BAT ends at byte {}", 64 + 4 * u64::from(entries));
        for write in BOTH {
            refused(&path, write, Truncated, &[&end, "copy"])?;
        }
    }
    Ok(())
}

fn size_no_multiple() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let mut spec = spec(version);
        spec.disk_sectors += 7;
        let path = broken(dir.path(), &spec, &["h-size-odd"])?;
        let sectors = SECTORS + 4;
        let want = Model::of(&spec).read(0, sectors as usize * 512);
        opens(&path, false)?
            .tells_nothing()?
            .shows_bytes(&want)?
            .unchanged()?;
        let file_len = fs::metadata(&path)?.len();
        opens(&path, true)?
            .tells_nothing()?
            .takes_a_write(sectors - 1)?;
        support::expect_clean(&path)?;
        // The last cluster is a hole before, and stored whole after.
        ensure!(
            fs::metadata(&path)?.len() == file_len + 32768,
            "not stored whole"
        );
    }
    Ok(())
}

fn version_1_upper_half() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &spec(1), &["h-v1-upper"])?;
    let looked = opens(&path, false)?.tells_nothing()?;
    looked.shows(&Model::of(&spec(1)))?.unchanged()?;
    let opened = opens(&path, true)?.tells_nothing()?;
    opened.shows(&Model::of(&spec(1)))?.takes_a_write(1)?;
    ensure!(
        support::read_at(&path, 40, 4)? == [0; 4],
        "the upper half was kept"
    );
    Ok(())
}

fn size_absurd() -> Outcome {
    let words = ["201 BAT entries do not cover 1099511627776 sectors"];
    always_refused("h-size-absurd", Corrupt, &words, &[2])?;
    always_refused(
        "h-size-max",
        Corrupt,
        &["18446744073709551615 sectors cannot exist"],
        &[2],
    )?;
    always_refused(
        "h-size-max",
        Corrupt,
        &["do not cover 4294967295 sectors"],
        &[1],
    )?;
    // A little less than half of the disk is the least that is not shown.
    let dir = room()?;
    let path = broken(dir.path(), &spec(2), &[])?;
    let file = OpenOptions::new().write(true).open(&path)?;
    file.write_all_at(&(2 * CLUSTERS * 64 + 1).to_le_bytes(), 36)?;
    refused(&path, false, Corrupt, &["do not cover"])?;
    file.write_all_at(&(2 * CLUSTERS * 64).to_le_bytes(), 36)?;
    opens(&path, false)?.tells(&["do not cover"])?.unchanged()
}

fn first_block_0() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let mut spec = spec(version);
        if version == 1 {
            spec.first_block = FirstBlock::Zero;
        }
        let path = broken(dir.path(), &spec, &["h-first-0"])?;
        let words = [
            "m_FirstBlockOffset is 0",
            if version == 1 {
                "sector 2,"
            } else {
                "sector 64,"
            },
        ];
        refused(&path, true, Unsupported, &[words[0], words[1], "-r"])?;
        let looked = opens(&path, false)?.tells(&words)?;
        looked.shows(&Model::of(&spec))?.unchanged()?;
    }
    Ok(())
}

fn first_block_in_the_table() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let path = broken(dir.path(), &spec(version), &["h-first-small"])?;
        let words = ["first block lies at sector 1, inside the BAT that ends at sector 2"];
        refused(&path, true, Corrupt, &[words[0], "-r"])?;
        let looked = opens(&path, false)?.tells(&words)?;
        looked.shows(&Model::of(&spec(version)))?.unchanged()?;
    }
    // An entry that points behind that first block but into the table is an error all the same.
    let path = broken(
        &dir.path().join("1-h-first-small"),
        &spec(1),
        &["h-first-small"],
    )?;
    let file = OpenOptions::new().write(true).open(&path)?;
    file.write_all_at(&1_u32.to_le_bytes(), 64 + 4 * 3)?;
    opens(&path, false)?
        .shows_all_but(&Model::of(&spec(1)), &[3])?
        .unchanged()
}

fn first_block_later() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let mut spec = spec(version);
        spec.first_block = FirstBlock::Extra(2);
        let path = broken(dir.path(), &spec, &[])?;
        let words = [
            "first block lies at sector 192 where sector 64 would do",
            "dm-ploop",
        ];
        for write in BOTH {
            let opened = opens(&path, write)?.tells(&words)?;
            opened.shows(&Model::of(&spec))?.unchanged()?;
        }
        opens(&path, true)?.takes_a_write(3)?;
        ensure!(
            support::read_at(&path, 48, 4)? == [192, 0, 0, 0],
            "it was moved"
        );
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn first_block_past_the_end() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let path = broken(dir.path(), &spec(version), &["h-first-eof"])?;
        refused(
            &path,
            true,
            Corrupt,
            &["first block lies at sector", "past the end", "-r"],
        )?;
        let odd: Vec<u64> = (0..CLUSTERS).filter(|c| c % 2 == 1).collect();
        let looked = opens(&path, false)?.tells(&["past the end"])?;
        looked
            .shows_all_but(&Model::of(&spec(version)), &odd)?
            .unchanged()?;
    }
    Ok(())
}

fn in_use() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let path = broken(dir.path(), &spec(version), &["h-in-use"])?;
        let looked = opens(&path, false)?.tells(&["the in-use mark is set"])?;
        looked.shows(&Model::of(&spec(version)))?.unchanged()?;
        let opened = opens(&path, true)?.tells(&["was not closed cleanly; examined"])?;
        // Somebody who holds a lock is the reason for the mark: nobody else mends anything then.
        let second = open(&path, &selection(true))
            .err()
            .context("opened twice")?;
        ensure!(second.kind() == Locked, "{second}");
        opened.shows(&Model::of(&spec(version)))?.takes_a_write(5)?;
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn other_marks() -> Outcome {
    let dir = room()?;
    for name in ["h-mark-v21", "h-mark-pd17", "h-mark-pd22", "h-mark-1"] {
        let path = broken(dir.path(), &spec(1), &[name])?;
        for write in BOTH {
            let opened = opens(&path, write)?.tells_nothing()?;
            opened.shows(&Model::of(&spec(1)))?.unchanged()?;
        }
        opens(&path, true)?.takes_a_write(5)?;
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn empty_flag_with_data() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        let path = broken(dir.path(), &spec(version), &["h-flag-empty"])?;
        for write in BOTH {
            let opened = opens(&path, write)?.tells_nothing()?;
            opened.shows(&Model::of(&spec(version)))?.unchanged()?;
        }
        opens(&path, true)?.takes_a_write(5)?;
        ensure!(
            support::read_at(&path, 52, 4)? == [0; 4],
            "the flag was kept"
        );
    }
    Ok(())
}

/// Which unit the entries have is for `check` to find out.
fn conversion_interrupted() -> Outcome {
    let words = ["a conversion between versions was interrupted", ".idx"];
    always_refused("h-converting", Corrupt, &words, &[1, 2])
}

fn unknown_flags() -> Outcome {
    let dir = room()?;
    for (name, flags) in [("h-flags-all", u32::MAX), ("h-flag-empty", 0x8000_0080)] {
        let path = broken(dir.path(), &spec(2), &[name])?;
        let file = OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&flags.to_le_bytes(), 52)?;
        let words = [&*format!("unknown bits in m_Flags ({:#x})", flags & !3)];
        for write in BOTH {
            let opened = opens(&path, write)?.tells(&words)?;
            opened.shows(&Model::of(&spec(2)))?.unchanged()?;
        }
        opens(&path, true)?.takes_a_write(5)?;
        let kept = support::read_at(&path, 52, 4)?;
        // All ones are no flags but the lack of any.
        let want = if flags == u32::MAX { 0 } else { flags };
        ensure!(kept == want.to_le_bytes(), "{kept:02x?} of {flags:#x}");
    }
    Ok(())
}

fn extension_unmarked() -> Outcome {
    let dir = room()?;
    for names in [
        &["h-extension-stale"][..],
        &["h-extension-stale", "h-in-use"],
    ] {
        let path = broken(dir.path(), &spec(2), names)?;
        opens(&path, false)?
            .shows(&Model::of(&spec(2)))?
            .unchanged()?;
        let opened = opens(&path, true)?;
        ensure!(
            !opened
                .notes
                .iter()
                .any(|note| note.contains("format extension")),
            "{:?}",
            opened.notes
        );
        opened.shows(&Model::of(&spec(2)))?.takes_a_write(5)?;
        ensure!(
            support::read_at(&path, 56, 8)? == [0; 8],
            "the offset stayed"
        );
        support::expect_clean(&path)?;
    }
    Ok(())
}

fn without_extension(path: &Path, spec: &ImageSpec) -> Outcome {
    let words = ["format extension is not valid and ignored"];
    let looked = opens(path, false)?.tells(&words)?;
    looked.shows(&Model::of(spec))?.unchanged()?;
    let opened = opens(path, true)?.tells(&words)?;
    opened.shows(&Model::of(spec))?.takes_a_write(5)?;
    let header = support::read_at(path, 44, 20)?;
    ensure!(
        header[..4] == [0; 4] && header[12..] == [0; 8],
        "header {header:02x?}"
    );
    support::expect_clean(path)
}

fn extension_bad() -> Outcome {
    let dir = room()?;
    let mut with_bitmap = spec(2);
    with_bitmap.mark = V21;
    with_bitmap.bitmap = Some(BitmapSpec::new(vec![0, 3, 40]));
    for corruption in corrupt::ALL.iter().filter(|c| c.name.starts_with("e-")) {
        let name = corruption.name;
        let path = broken(dir.path(), &with_bitmap, &[name])?;
        match name {
            // Valid, of a kind that may be dropped silently or that forbids to write.
            "e-unknown" | "e-necessary" => {
                let before = state(&path)?;
                opens(&path, false)?
                    .shows(&Model::of(&with_bitmap))?
                    .unchanged()?;
                expect_unchanged(&path, &before)?;
            }
            _ => without_extension(&path, &with_bitmap).with_context(|| name.to_string())?,
        }
    }
    let path = broken(dir.path(), &spec(2), &["h-extension-bad"])?;
    without_extension(&path, &spec(2))
}

fn extension_elsewhere() -> Outcome {
    let dir = room()?;
    for version in [1, 2] {
        for name in ["2e54", "eof", "unaligned", "on-data", "in-table"] {
            let name = format!("h-extension-{name}");
            let path = broken(dir.path(), &spec(version), &[&name])?;
            without_extension(&path, &spec(version)).context(name)?;
        }
    }
    Ok(())
}
