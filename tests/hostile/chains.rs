//! Rows 67 to 78: files that do not belong together, or should not be opened.

use crate::answer::{Row, info, opens, opens_with, refused, room, row, selection};
use crate::descriptors::{always, broken, chain, edit, never, replace_last};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::Outcome;
use anyhow::ensure;
use ploopfs::chain::bundle::Selection;
use ploopfs::error::ErrorKind::{Descriptor, Missing, NotAnImage, OutsideBundle, Unsupported};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// The rows of this file. What a merge asks of 72, 73 and 75 comes with merging.
pub(crate) const ROWS: &[Row] = &[
    row(67, "plain_image_above_another", plain_above_another),
    row(68, "file_missing", file_missing),
    row(69, "names_that_lead_elsewhere", names_that_lead_elsewhere),
    row(70, "the_same_file_twice", the_same_file_twice),
    row(71, "padding", padding),
    row(72, "cluster_sizes_and_versions_mixed", mixed),
    row(73, "lower_larger_than_upper", lower_larger_than_upper),
    row(74, "plain_base_of_odd_length", plain_base_of_odd_length),
    row(75, "lower_in_use", lower_in_use),
    row(76, "leftovers", leftovers),
    row(77, "entities_and_size", entities_and_size),
    row(78, "encrypted", encrypted),
];

fn image(version: u8, cluster: u32, sectors: u64) -> Level {
    Level::Image(ImageSpec::new(version, cluster, sectors).mapping(Mapped::Percent(40)))
}

fn plain_above_another() -> Outcome {
    let dir = room()?;
    // By its magic it is no plain image, and then it only has the wrong name.
    let path = broken(dir.path(), &chain(3), &["x-plain-above"])?;
    refused(
        &path,
        true,
        Unsupported,
        &["said to be plain", "magic", "-r"],
    )?;
    opens(&path, false)?
        .tells(&["read by its magic"])?
        .shows(&chain(3).model())?
        .unchanged()?;
    // Without the magic it is what it is called.
    let path = broken(dir.path(), &chain(3), &[])?;
    edit(&path, |xml| replace_last(xml, "Compressed", "Plain"))?;
    for level in [2, 1] {
        let name = chain(3).file_name("d.hdd", 0, level);
        fs::write(path.join(&name), vec![b'p'; 6403 * 512])?;
        if level == 1 {
            edit(&path, |xml| xml.replacen("Compressed", "Plain", 1))?;
        }
        let kind = if level == 2 { Unsupported } else { NotAnImage };
        let words: &[&str] = match kind {
            Unsupported => &["a plain image can only be the lowest", &name],
            _ => &["neither magic", "(Compressed)"],
        };
        for write in [false, true] {
            match (level, write) {
                (1, true) => refused(&path, true, Unsupported, &["said to be plain"])?,
                _ => refused(&path, write, kind, words)?,
            }
        }
    }
    Ok(())
}

fn file_missing() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(3), &["x-file-missing"])?;
    let name = chain(3).file_name("d.hdd", 0, 0);
    never(
        &path,
        Missing,
        &["the image of snapshot", &chain(3).guid(0), &name],
    )
}

fn names_that_lead_elsewhere() -> Outcome {
    let dir = room()?;
    for name in ["x-file-dotdot", "x-file-absolute", "x-file-symlink"] {
        let path = broken(dir.path(), &chain(3), &[name])?;
        never(
            &path,
            OutsideBundle,
            &["is not in the bundle's directory", "--allow-outside"],
        )?;
        let home = path.parent().unwrap_or(&path);
        for (allowed, ok) in [(home.to_owned(), true), (home.join("d.hdd"), false)] {
            let how = Selection {
                allow_outside: vec![allowed],
                ..selection(true)
            };
            match opens_with(&path, &how) {
                Ok(opened) => {
                    ensure!(ok, "{name}: opened although only the bundle is allowed");
                    opened.shows(&chain(3).model())?.unchanged()?;
                }
                Err(error) => ensure!(!ok, "{name}: {error:#}"),
            }
        }
    }
    let path = broken(dir.path(), &chain(3), &["x-file-empty"])?;
    never(&path, Descriptor, &["line ", "<File> is empty"])?;
    // A line break in a name is a part of it, and is shown as what it is.
    let path = broken(dir.path(), &chain(3), &["x-file-newline"])?;
    never(&path, Missing, &["\\n"])?;
    let name = chain(3).file_name("d.hdd", 0, 0);
    fs::rename(path.join(&name), path.join(format!("{name}\n")))?;
    always(&path, &chain(3), &[])?;
    let path = broken(dir.path(), &chain(1), &[])?;
    edit(&path, |xml| {
        xml.replacen("<File>", &format!("<File>{}", "x".repeat(5000)), 1)
    })?;
    never(&path, Descriptor, &["line ", "longer than any name can be"])
}

fn the_same_file_twice() -> Outcome {
    let dir = room()?;
    let words = ["the same file is used twice in the disk"];
    never(
        &broken(dir.path(), &chain(3), &["x-same-file"])?,
        Descriptor,
        &words,
    )?;
    let links: [fn(&Path, &Path) -> std::io::Result<()>; 3] = [
        |a, b| fs::hard_link(a, b),
        |a, b| symlink(a, b),
        |a, b| symlink(a.file_name().unwrap_or_default(), b),
    ];
    for link in links {
        let path = broken(dir.path(), &chain(3), &[])?;
        let file = |level| path.join(chain(3).file_name("d.hdd", 0, level));
        fs::remove_file(file(2))?;
        link(&fs::canonicalize(file(0))?, &file(2))?;
        never(&path, Descriptor, &words)?;
    }
    // By another spelling of its name.
    let path = broken(dir.path(), &chain(2), &[])?;
    let (base, top) = (
        chain(2).file_name("d.hdd", 0, 0),
        chain(2).file_name("d.hdd", 0, 1),
    );
    edit(&path, |xml| {
        xml.replace(&format!(">{top}<"), &format!(">.//./{base}<"))
    })?;
    never(&path, Descriptor, &words)
}

fn padding() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-padding"])?;
    refused(&path, true, Unsupported, &["Padding is set", "-r"])?;
    opens(&path, false)?
        .tells(&["Padding is set"])?
        .shows(&chain(2).model())?
        .unchanged()
}

fn mixed() -> Outcome {
    let dir = room()?;
    let levels = vec![image(2, 128, 6400), image(2, 64, 6400)];
    let path = broken(dir.path(), &BundleSpec::new(Style::Ploop, levels), &[])?;
    never(
        &path,
        Descriptor,
        &["clusters of 32768 bytes here, of 65536 bytes in"],
    )?;
    let levels = vec![image(1, 64, 6400), image(2, 64, 6400), image(1, 64, 6400)];
    let spec = BundleSpec::new(Style::Ploop, levels);
    let path = broken(dir.path(), &spec, &[])?;
    opens(&path, false)?
        .tells_nothing()?
        .shows(&spec.model())?
        .unchanged()?;
    opens(&path, true)?
        .tells(&["mixes versions 1 and 2"])?
        .shows(&spec.model())?
        .unchanged()?;
    opens(&path, true)?.takes_a_write(77)
}

/// What the lower delta has behind the disk's end is never seen, and never cut off.
fn lower_larger_than_upper() -> Outcome {
    let dir = room()?;
    let levels = vec![image(2, 64, 9000), image(2, 64, 6403), image(2, 64, 6003)];
    let spec = BundleSpec::new(Style::Ploop, levels);
    let path = broken(dir.path(), &spec, &[])?;
    for write in [false, true] {
        opens(&path, write)?
            .tells_nothing()?
            .shows(&spec.model())?
            .unchanged()?;
    }
    let lower = |level| path.join(spec.file_name("d.hdd", 0, level));
    let before = [fs::read(lower(0))?, fs::read(lower(1))?];
    opens(&path, true)?.takes_a_write(6002)?;
    ensure!(
        before == [fs::read(lower(0))?, fs::read(lower(1))?],
        "a lower delta was written"
    );
    Ok(())
}

fn plain_base_of_odd_length() -> Outcome {
    let dir = room()?;
    for bytes in [1_000_001, 64 * 512 * 7 + 512, 1] {
        let base = Level::Plain {
            seed: 1,
            level: 0,
            bytes,
        };
        let spec = BundleSpec::new(Style::Ploop, vec![base, image(2, 64, 6403)]);
        let path = broken(dir.path(), &spec, &[])?;
        always(&path, &spec, &[])?;
        let found = fs::metadata(path.join(spec.file_name("d.hdd", 0, 0)))?.len();
        ensure!(
            found == bytes,
            "the base has {found} bytes instead of {bytes}"
        );
    }
    Ok(())
}

fn lower_in_use() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(3), &["x-lower-in-use"])?;
    always(&path, &chain(3), &["the in-use mark is set"])
}

fn leftovers() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-left-tmp"])?;
    always(&path, &chain(2), &["DiskDescriptor.xml.tmp is there"])?;
    ensure!(
        info(&path)?.0.text().contains(".tmp is there"),
        "info says nothing of it"
    );
    let path = broken(dir.path(), &chain(2), &[])?;
    let index = format!("{}.idx", chain(2).file_name("d.hdd", 0, 1));
    fs::write(path.join(&index), "")?;
    always(&path, &chain(2), &[&index, "interrupted"])?;
    ensure!(
        info(&path)?.0.text().contains(&index),
        "info says nothing of it"
    );
    for mark in ["Temporary", "TemporaryZero", "TemporaryZeroSwap"] {
        let path = broken(dir.path(), &chain(2), &[])?;
        edit(&path, |xml| {
            xml.replacen("</Shot>", &format!("<{mark}/></Shot>"), 1)
        })?;
        always(&path, &chain(2), &["is marked temporary"])?;
    }
    Ok(())
}

fn entities_and_size() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-entities"])?;
    never(&path, Descriptor, &["line 2: ", "DTD"])?;
    let path = broken(dir.path(), &chain(2), &["x-huge"])?;
    never(
        &path,
        Descriptor,
        &["1048577 bytes are more than such a file may have (1 MiB)"],
    )?;
    let path = broken(dir.path(), &chain(2), &["x-deep"])?;
    never(&path, Descriptor, &["line ", "nested more than 16 deep"])?;
    // A file that never ends, and one of a size that no memory has.
    let path = broken(dir.path(), &chain(2), &[])?;
    let descriptor = path.join("DiskDescriptor.xml");
    fs::OpenOptions::new()
        .write(true)
        .open(&descriptor)?
        .set_len(1 << 40)?;
    never(&path, Descriptor, &["more than such a file may have"])
}

fn encrypted() -> Outcome {
    let dir = room()?;
    for (style, name, word) in [
        (Style::Ploop, "x-key-id", "forged-key"),
        (Style::Parallels, "x-engine", "00112233-4455"),
    ] {
        let like = ImageSpec::new(1, 64, 6403).mapping(Mapped::Percent(40));
        let spec = BundleSpec::chain(style, &like, 2, |_, _| {});
        let path = broken(dir.path(), &spec, &[name])?;
        always(&path, &spec, &["the disk is encrypted", word])?;
        let (human, json) = info(&path)?;
        for said in [human.text(), json.text()] {
            ensure!(said.contains(word), "info says nothing of it: {said}");
        }
    }
    Ok(())
}
