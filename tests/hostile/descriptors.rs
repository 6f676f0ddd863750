//! Rows 50 to 66: what a descriptor says, and whether its images agree.

use crate::answer::{BOTH, Row, info, opens, opens_with, refused, room, row, selection};
use crate::forge::bundle::{BundleSpec, NONE, Style, TOP};
use crate::forge::content::Level;
use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::Outcome;
use anyhow::{Context, Result, ensure};
use ploopfs::chain::bundle::Selection;
use ploopfs::error::ErrorKind::{Corrupt, Descriptor, NoSuchSnapshot, Unsupported};
use std::fs;
use std::path::{Path, PathBuf};

/// The rows of this file.
pub(crate) const ROWS: &[Row] = &[
    row(50, "no_xml", no_xml),
    row(51, "unknown_root", unknown_root),
    row(52, "no_snapshots", no_snapshots),
    row(53, "no_top", no_top),
    row(54, "unknown_top", unknown_top),
    row(55, "image_without_shot_and_shot_without_image", unpaired),
    row(56, "guids_twice", guids_twice),
    row(57, "parent_missing", parent_missing),
    row(58, "cycle", cycle),
    row(59, "two_roots", two_roots),
    row(60, "guids_in_other_spellings", guids_in_other_spellings),
    row(61, "several_parts", several_parts),
    row(62, "bounds_of_the_only_part", bounds_of_the_only_part),
    row(63, "size_other_than_the_header", size_other_than_the_header),
    row(64, "no_blocksize", no_blocksize),
    row(65, "blocksize_other_than_the_header", blocksize_other),
    row(66, "expanding_image_called_plain", expanding_called_plain),
];

/// A name of a snapshot that no forged bundle has.
pub(crate) const OTHER: &str = "{0badcafe-0000-4000-8000-00000000beef}";

/// Disk size of [`chain`], sectors.
pub(crate) const SECTORS: u64 = 6403;

fn like() -> ImageSpec {
    ImageSpec::new(2, 64, SECTORS).mapping(Mapped::Percent(40))
}

/// A chain of so many images.
pub(crate) fn chain(depth: usize) -> BundleSpec {
    BundleSpec::chain(Style::Ploop, &like(), depth, |_, _| {})
}

/// A bundle alone in a directory, broken in these ways.
pub(crate) fn broken(dir: &Path, spec: &BundleSpec, names: &[&str]) -> Result<PathBuf> {
    let home = tempfile::Builder::new().prefix("b").tempdir_in(dir)?.keep();
    let path = home.join("d.hdd");
    spec.write(&path)?;
    for name in names {
        corrupt::apply(name, &path).with_context(|| (*name).to_string())?;
    }
    Ok(path)
}

/// Changes a descriptor's text; fails where that changes nothing.
pub(crate) fn edit(bundle: &Path, change: impl FnOnce(&str) -> String) -> Outcome {
    let path = bundle.join("DiskDescriptor.xml");
    let before = fs::read_to_string(&path)?;
    let after = change(&before);
    ensure!(before != after, "the descriptor was to be changed");
    fs::write(&path, after)?;
    Ok(())
}

/// The last of something in a text, replaced.
pub(crate) fn replace_last(text: &str, from: &str, to: &str) -> String {
    match text.rsplit_once(from) {
        Some((before, after)) => format!("{before}{to}{after}"),
        None => text.to_string(),
    }
}

/// Refused in both ways.
pub(crate) fn never(path: &Path, kind: ploopfs::error::ErrorKind, words: &[&str]) -> Outcome {
    for write in BOTH {
        refused(path, write, kind, words)?;
    }
    info(path)?;
    Ok(())
}

/// Opened in both ways, with these notes, and right.
pub(crate) fn always(path: &Path, spec: &BundleSpec, words: &[&str]) -> Outcome {
    for write in BOTH {
        let opened = opens(path, write)?;
        let opened = match words {
            [] => opened.tells_nothing()?,
            _ => opened.tells(words)?,
        };
        opened.shows(&spec.model())?.unchanged()?;
    }
    opens(path, true)?.takes_a_write(5)
}

fn no_xml() -> Outcome {
    let dir = room()?;
    let spec = chain(3);
    never(
        &broken(dir.path(), &spec, &["x-empty"])?,
        Descriptor,
        &["the file is empty"],
    )?;
    let path = broken(dir.path(), &spec, &["x-truncated"])?;
    let lines = fs::read_to_string(path.join("DiskDescriptor.xml"))?
        .trim_end()
        .lines()
        .count();
    never(&path, Descriptor, &[&format!("line {lines}: ")])?;
    let path = broken(dir.path(), &spec, &[])?;
    edit(&path, |xml| xml.replacen("</Disk_size>", "</Disk_sise>", 1))?;
    never(&path, Descriptor, &["line 4: "])?;
    fs::write(path.join("DiskDescriptor.xml"), b"<a>\n\n\xff\xfe</a>")?;
    never(&path, Descriptor, &["line 3: not UTF-8"])
}

fn unknown_root() -> Outcome {
    let dir = room()?;
    for style in [Style::Ploop, Style::Parallels] {
        let spec = BundleSpec::chain(style, &like(), 2, |_, _| {});
        always(&broken(dir.path(), &spec, &[])?, &spec, &[])?;
        let path = broken(dir.path(), &spec, &["x-root"])?;
        always(&path, &spec, &["unknown root element <foo>"])?;
    }
    Ok(())
}

fn no_snapshots() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(3), &["x-no-snapshots"])?;
    never(&path, Descriptor, &["line ", "no <Snapshots> here"])?;
    let path = broken(dir.path(), &chain(1), &["x-no-snapshots"])?;
    always(&path, &chain(1), &["the only image is taken as the top"])
}

fn no_top() -> Outcome {
    let dir = room()?;
    let mut spec = chain(3);
    always(&broken(dir.path(), &spec, &["x-no-top"])?, &spec, &[])?;
    spec.top_predefined = false;
    spec.top_guid = false;
    let path = broken(dir.path(), &spec, &[])?;
    always(
        &path,
        &spec,
        &["no TopGUID", &spec.guid(2), "taken as the top"],
    )?;
    // Two that could be it.
    edit(&path, |xml| {
        let shot = format!("<Shot><GUID>{OTHER}</GUID><ParentGUID>{NONE}</ParentGUID></Shot>");
        xml.replacen("</Snapshots>", &format!("{shot}</Snapshots>"), 1)
    })?;
    never(&path, Descriptor, &["not clear which snapshot is the top"])
}

fn unknown_top() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-unknown-top"])?;
    never(&path, Descriptor, &["is no snapshot of this disk", OTHER])
}

fn unpaired() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-image-without-shot"])?;
    always(&path, &chain(2), &["belongs to no snapshot and is ignored"])?;
    let path = broken(dir.path(), &chain(2), &["x-shot-without-image"])?;
    never(
        &path,
        Descriptor,
        &["has no image for snapshot", &chain(2).guid(0)],
    )?;
    // One that the top does not stand on is missed by nobody.
    let path = broken(dir.path(), &chain(2), &["x-two-roots"])?;
    always(&path, &chain(2), &[])
}

fn guids_twice() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-duplicate-guid"])?;
    never(&path, Descriptor, &["line ", "has two images in one part"])?;
    let path = broken(dir.path(), &chain(2), &["x-duplicate-shot"])?;
    never(&path, Descriptor, &["line ", "is there twice"])
}

fn parent_missing() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-parent-missing"])?;
    never(&path, Descriptor, &[OTHER, "does not exist"])?;
    // Another branch may lead nowhere: this chain does not pass there.
    let path = broken(dir.path(), &chain(2), &[])?;
    let lost = "{0badcafe-0000-4000-8000-000000000001}";
    edit(&path, |xml| {
        let shot = format!("<Shot><GUID>{OTHER}</GUID><ParentGUID>{lost}</ParentGUID></Shot>");
        xml.replacen("</Snapshots>", &format!("{shot}</Snapshots>"), 1)
    })?;
    always(&path, &chain(2), &[])?;
    let through = Selection {
        snapshot: Some(OTHER.to_owned()),
        ..Selection::default()
    };
    let error = opens_with(&path, &through)
        .err()
        .context("a chain to nowhere")?;
    ensure!(format!("{error:#}").contains("does not exist"), "{error:#}");
    Ok(())
}

fn cycle() -> Outcome {
    let dir = room()?;
    for depth in [1, 3] {
        let path = broken(dir.path(), &chain(depth), &["x-cycle"])?;
        never(&path, Descriptor, &["is its own ancestor"])?;
    }
    // Two that stand on each other, beside the chain in use.
    let path = broken(dir.path(), &chain(2), &[])?;
    let lost = "{0badcafe-0000-4000-8000-000000000001}";
    edit(&path, |xml| {
        let shot = |own, parent| {
            format!("<Shot><GUID>{own}</GUID><ParentGUID>{parent}</ParentGUID></Shot>")
        };
        let both = format!("{}{}</Snapshots>", shot(OTHER, lost), shot(lost, OTHER));
        xml.replacen("</Snapshots>", &both, 1)
    })?;
    always(&path, &chain(2), &[])
}

fn two_roots() -> Outcome {
    let dir = room()?;
    always(
        &broken(dir.path(), &chain(3), &["x-two-roots"])?,
        &chain(3),
        &[],
    )
}

/// No descriptor is written yet, so there is nothing to normalise.
fn guids_in_other_spellings() -> Outcome {
    let dir = room()?;
    for name in ["x-bare-guid", "x-upper-guid"] {
        always(&broken(dir.path(), &chain(2), &[name])?, &chain(2), &[])?;
    }
    let path = broken(dir.path(), &chain(2), &["x-bad-guid"])?;
    never(&path, Descriptor, &["line ", "> is no GUID"])?;
    let path = broken(dir.path(), &chain(2), &[])?;
    let unknown = Selection {
        snapshot: Some(TOP.replace("41}", "42}")),
        ..Selection::default()
    };
    let error = opens_with(&path, &unknown)
        .err()
        .context("no such snapshot")?;
    let kind = error
        .downcast_ref::<ploopfs::error::Error>()
        .map(|e| e.kind());
    ensure!(kind == Some(NoSuchSnapshot), "{error:#}");
    Ok(())
}

/// Changes to the descriptor of [`several_parts`], and what is said of each.
const WRONG_BOUNDS: [(&str, &str, &str); 7] = [
    (
        "<Start>6403<",
        "<Start>6404<",
        "starts at sector 6404 instead of 6403",
    ),
    (
        "<Start>6403<",
        "<Start>6402<",
        "starts at sector 6402 instead of 6403",
    ),
    (
        "<Start>0<",
        "<Start>1<",
        "part 0 starts at sector 1 instead of 0",
    ),
    (
        "<End>8052<",
        "<End>8051<",
        "the parts end at sector 8051, the disk at 8052",
    ),
    (
        "<End>8052<",
        "<End>8053<",
        "the parts end at sector 8053, the disk at 8052",
    ),
    (
        "<End>7412<",
        "<End>6403<",
        "is empty: it ends at sector 6403",
    ),
    ("<Start>6403</Start>", "", "no <Start> here"),
];

fn several_parts() -> Outcome {
    let dir = room()?;
    let part = |cluster, sectors| {
        let image = ImageSpec::new(1, cluster, sectors).mapping(Mapped::Percent(40));
        vec![Level::Image(image.clone()), Level::Image(image)]
    };
    let mut spec = BundleSpec::new(Style::Parallels, part(64, 6403));
    spec.push_part(part(128, 1009));
    spec.push_part(part(64, 640));
    always(&broken(dir.path(), &spec, &[])?, &spec, &[])?;
    // In any order, as long as they join.
    let path = broken(dir.path(), &spec, &[])?;
    edit(&path, |xml| {
        let (before, rest) = xml.split_once("<Storage>").unwrap_or((xml, ""));
        let (first, rest) = rest.split_once("</Storage>").unwrap_or((rest, ""));
        rest.replacen(
            "</StorageData>",
            &format!("<Storage>{first}</Storage></StorageData>"),
            1,
        )
        .replacen("", before, 1)
    })?;
    always(&path, &spec, &[])?;
    for (from, to, words) in WRONG_BOUNDS {
        let path = broken(dir.path(), &spec, &[])?;
        edit(&path, |xml| xml.replacen(from, to, 1))?;
        never(&path, Descriptor, &[words])?;
    }
    // The bounds fit together and the images do not fit them.
    let path = broken(dir.path(), &spec, &[])?;
    edit(&path, |xml| xml.replace(">7412<", ">7411<"))?;
    refused(
        &path,
        true,
        Descriptor,
        &["the descriptor says", "the image's header"],
    )?;
    info(&path)?;
    refused_parts_leave_the_others(dir.path(), &spec)
}

/// What would be mended in one part stays as it is where another one cannot be written to.
fn refused_parts_leave_the_others(dir: &Path, spec: &BundleSpec) -> Outcome {
    for (worse, kind, words) in [
        ("t-duplicate", Corrupt, "that another one has too"),
        ("h-first-eof", Corrupt, "past the end of the file"),
        ("h-type", Corrupt, "disk type 3"),
    ] {
        let path = broken(dir, spec, &[])?;
        let top = |part| path.join(spec.file_name("d.hdd", part, 1));
        for name in ["h-in-use", "t-odd-length", "t-slots-after-end"] {
            corrupt::apply(name, &top(0))?;
        }
        corrupt::apply(worse, &top(2))?;
        refused(&path, true, kind, &[words]).with_context(|| worse.to_string())?;
    }
    Ok(())
}

fn bounds_of_the_only_part() -> Outcome {
    let dir = room()?;
    for names in [&["x-start"][..], &["x-end-small"], &["x-end-large"]] {
        let path = broken(dir.path(), &chain(2), names)?;
        let words = [
            "the part covers sectors ",
            "of 6403",
            "the file's own size is used",
        ];
        refused(&path, true, Unsupported, &[words[0], "-r"])?;
        opens(&path, false)?
            .tells(&words)?
            .shows(&chain(2).model())?
            .unchanged()?;
    }
    Ok(())
}

fn size_other_than_the_header() -> Outcome {
    let dir = room()?;
    let model = chain(2).model();
    for sectors in [SECTORS - 7, SECTORS + 7] {
        let path = broken(dir.path(), &chain(2), &[])?;
        edit(&path, |xml| {
            xml.replace(&format!(">{SECTORS}<"), &format!(">{sectors}<"))
        })?;
        let says = format!(
            "the descriptor says {} bytes, the image's header",
            sectors * 512
        );
        refused(
            &path,
            true,
            Descriptor,
            &[&says, "read-only", "--trust-header"],
        )?;
        let shown = sectors.min(SECTORS) * 512;
        let looked = opens(&path, false)?.tells(&[&says, "the smaller is shown"])?;
        looked
            .shows_bytes(&model.read(0, shown as usize))?
            .unchanged()?;
        let trusting = Selection {
            trust_header: true,
            ..selection(true)
        };
        let opened = opens_with(&path, &trusting)?;
        opened.shows(&model)?.takes_a_write(SECTORS - 1)?;
    }
    let path = broken(dir.path(), &chain(2), &["x-size"])?;
    refused(&path, true, Unsupported, &["the part covers sectors"])?;
    let path = broken(dir.path(), &chain(2), &["x-size-garbage"])?;
    never(
        &path,
        Descriptor,
        &["line 4: <Disk_size> is no possible number"],
    )?;
    for absurd in [
        "18446744073709551615",
        "36028797018963968",
        "-1",
        "1e9",
        "0x",
        "",
    ] {
        let path = broken(dir.path(), &chain(1), &[])?;
        edit(&path, |xml| {
            xml.replacen("<Disk_size>6403<", &format!("<Disk_size>{absurd}<"), 1)
        })?;
        never(&path, Descriptor, &["<Disk_size> is no possible number"])?;
    }
    Ok(())
}

fn no_blocksize() -> Outcome {
    let dir = room()?;
    for name in ["x-no-blocksize", "x-blocksize-0"] {
        let path = broken(dir.path(), &chain(2), &[name])?;
        always(&path, &chain(2), &["no usable Blocksize"])?;
    }
    Ok(())
}

fn blocksize_other() -> Outcome {
    let dir = room()?;
    let path = broken(dir.path(), &chain(2), &["x-blocksize"])?;
    let words = [
        "the descriptor says clusters of 65536 bytes, the header 32768",
        "Blocksize",
    ];
    never(&path, Descriptor, &words)
}

/// Writing plain bytes into it would destroy it, and what is copied up from it could be wrong.
fn expanding_called_plain() -> Outcome {
    let dir = room()?;
    for depth in [1, 3] {
        let path = broken(dir.path(), &chain(depth), &["x-plain-type"])?;
        refused(
            &path,
            true,
            Unsupported,
            &["said to be plain", "magic", "-r"],
        )?;
        let looked = opens(&path, false)?.tells(&["said to be plain; read by its magic"])?;
        looked.shows(&chain(depth).model())?.unchanged()?;
    }
    Ok(())
}
