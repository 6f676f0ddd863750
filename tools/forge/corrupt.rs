//! Breaks images and bundles in named ways.
//!
//! Imports: `bundle`, `extension`, `reader` (its header fields).
//! Never: breaks more than the name says.
//!
//! Each name carries the number of its row in the format's table of malformed input: `h` headers,
//! `t` tables, `e` format extensions (of an image made with a bitmap), `x` descriptors. What can
//! only be made, not broken (63-sector clusters, a lower delta larger than its upper, garbage after
//! its end, an odd base), is asked of `image` and `bundle` instead.

use super::bundle::{NONE, TOP};
use super::{extension, reader};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

/// One way to break something.
#[derive(Clone, Copy)]
pub(crate) struct Corruption {
    /// What `--corrupt` takes.
    pub(crate) name: &'static str,
    /// Row of the table of malformed input.
    pub(crate) row: u8,
    how: How,
}

#[derive(Clone, Copy)]
enum How {
    /// Sets bytes of the header.
    Header(usize, &'static [u8]),
    /// Anything to an image.
    Image(fn(&File) -> io::Result<()>),
    /// Changes the extension's cluster; its checksum is mended.
    Extension(fn(&mut [u8])),
    /// Changes the descriptor's text.
    Text(fn(&str) -> String),
    /// Anything to a bundle's directory.
    Bundle(fn(&Path) -> io::Result<()>),
}

const fn header(name: &'static str, row: u8, at: usize, bytes: &'static [u8]) -> Corruption {
    Corruption {
        name,
        row,
        how: How::Header(at, bytes),
    }
}

const fn image(name: &'static str, row: u8, how: fn(&File) -> io::Result<()>) -> Corruption {
    Corruption {
        name,
        row,
        how: How::Image(how),
    }
}

const fn ext(name: &'static str, row: u8, how: fn(&mut [u8])) -> Corruption {
    Corruption {
        name,
        row,
        how: How::Extension(how),
    }
}

const fn text(name: &'static str, row: u8, how: fn(&str) -> String) -> Corruption {
    Corruption {
        name,
        row,
        how: How::Text(how),
    }
}

const fn bundle(name: &'static str, row: u8, how: fn(&Path) -> io::Result<()>) -> Corruption {
    Corruption {
        name,
        row,
        how: How::Bundle(how),
    }
}

/// Every name.
pub(crate) const ALL: &[Corruption] = &[
    image("h-empty", 1, |file| file.set_len(0)),
    image("h-short", 1, |file| file.set_len(63)),
    image("h-only", 2, |file| file.set_len(64)),
    header("h-magic", 3, 4, b"X"),
    header("h-type", 4, 16, &[3]),
    header("h-cluster-0", 5, 28, &[0; 4]),
    header("h-cluster-3", 6, 28, &[3, 0, 0, 0]),
    header("h-cluster-huge", 7, 28, &[0, 0, 4, 0]),
    header("h-cluster-absurd", 7, 28, &[0xff; 4]),
    header("h-entries-0", 8, 32, &[0; 4]),
    image("h-nothing", 9, |file| {
        file.write_all_at(&[0; 12], 32)?;
        Ok(())
    }),
    image("h-entries-few", 10, |file| change_entries(file, |n| n - 1)),
    image("h-entries-many", 11, |file| change_entries(file, |n| n + 3)),
    header("h-entries-2e29", 12, 32, &[0, 0, 0, 0x20]),
    header("h-entries-max", 12, 32, &[0xff; 4]),
    image("h-size-odd", 13, |file| {
        let fields = need(file)?;
        file.write_all_at(&(fields.sectors - 3).to_le_bytes(), 36)
    }),
    header("h-v1-upper", 14, 40, &[0xef, 0xbe, 0xad, 0xde]),
    header("h-size-absurd", 15, 36, &[0, 0, 0, 0, 0, 1, 0, 0]),
    header("h-size-max", 15, 36, &[0xff; 8]),
    header("h-first-0", 16, 48, &[0; 4]),
    header("h-first-small", 17, 48, &[1, 0, 0, 0]),
    image("h-first-eof", 19, |file| {
        let fields = need(file)?;
        let past = file.metadata()?.len() / 512 + 16 * fields.cluster;
        file.write_all_at(
            &((past / fields.cluster * fields.cluster) as u32).to_le_bytes(),
            48,
        )
    }),
    header("h-in-use", 20, 44, b"Ynot"),
    header("h-mark-v21", 21, 44, b"v2.1"),
    header("h-mark-pd17", 21, 44, b"pd17"),
    header("h-mark-pd22", 21, 44, b"pd22"),
    header("h-mark-1", 21, 44, &[1, 0, 0, 0]),
    header("h-flag-empty", 22, 52, &[1]),
    image("h-converting", 23, |file| {
        file.write_all_at(b"Ynot", 44)?;
        file.write_all_at(&[2], 52)
    }),
    header("h-flags-all", 24, 52, &[0xff; 4]),
    header("h-extension-stale", 25, 56, &[0, 0x10, 0, 0, 0, 0, 0, 0]),
    image("h-extension-bad", 26, |file| {
        let end = file.metadata()?.len();
        let fields = need(file)?;
        file.set_len(end + fields.cluster * 512)?;
        claim_extension(file, end / 512)
    }),
    image("h-extension-2e54", 27, |file| {
        claim_extension(file, 1 << 54)
    }),
    image("h-extension-eof", 27, |file| claim_extension(file, 1 << 40)),
    image("h-extension-unaligned", 27, |file| {
        let fields = need(file)?;
        claim_extension(file, fields.first + 1)
    }),
    image("h-extension-on-data", 27, |file| {
        let fields = need(file)?;
        claim_extension(file, fields.first)
    }),
    image("h-extension-in-table", 27, |file| claim_extension(file, 0)),
    image("t-in-table", 30, |file| {
        let fields = need(file)?;
        if fields.first / unit(fields) < 2 {
            return Err(io::Error::other(
                "the table fills one cluster: no entry can point into it",
            ));
        }
        set_entry(file, 0, |_, _| 1)
    }),
    image("t-past-eof", 31, |file| {
        set_entry(file, 0, |fields, len| len / 512 / unit(fields))
    }),
    image("t-far", 31, |file| {
        set_entry(file, 0, |fields, _| {
            0xffff_fff0 / fields.cluster * fields.cluster
        })
    }),
    image("t-all-ones", 31, |file| {
        set_entry(file, 0, |_, _| 0xffff_ffff)
    }),
    image("t-straddle", 32, |file| {
        let fields = need(file)?;
        let entries = entries(file, fields)?;
        let last = entries.iter().map(|(_, entry)| *entry).max().unwrap_or(0);
        file.set_len(last * unit(fields) * 512 + fields.cluster * 256)
    }),
    image("t-duplicate", 33, |file| {
        let fields = need(file)?;
        let (_, first) = entries(file, fields)?[0];
        set_entry(file, 1, |_, _| first)
    }),
    image("t-unaligned", 34, |file| {
        let fields = need(file)?;
        let (_, first) = entries(file, fields)?[0];
        set_entry(file, 0, |_, _| first + 1)
    }),
    image("t-slots-after-end", 35, |file| {
        let fields = need(file)?;
        file.write_all_at(&3_u32.to_le_bytes(), 64 + 4 * fields.entries)
    }),
    image("t-leak-interior", 36, |file| set_entry(file, 0, |_, _| 0)),
    image("t-leak-tail", 37, |file| {
        let fields = need(file)?;
        file.set_len(file.metadata()?.len() + 5 * fields.cluster * 512)
    }),
    image("t-odd-length", 38, |file| {
        file.set_len(file.metadata()?.len() + 1000)
    }),
    ext("e-magic", 26, |bytes| bytes[0] ^= 1),
    ext("e-md5", 26, |bytes| bytes[8] ^= 1),
    ext("e-size", 26, |bytes| bytes[48] ^= 1),
    ext("e-granularity-0", 26, |bytes| bytes[72..76].fill(0)),
    ext("e-granularity-96", 26, |bytes| bytes[72] = 96),
    ext("e-l1-count", 26, |bytes| bytes[76] += 1),
    ext("e-l1-absurd", 26, |bytes| bytes[76..80].fill(0xff)),
    ext("e-l1-eof", 27, |bytes| {
        bytes[80..88].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    }),
    ext("e-l1-unaligned", 27, |bytes| bytes[80] |= 1),
    ext("e-necessary", 26, |bytes| bytes[32] |= 1),
    ext("e-unknown", 26, |bytes| bytes[24] ^= 1),
    ext("e-length", 26, |bytes| bytes[40..44].fill(0xff)),
    text("x-empty", 50, |_| String::new()),
    text("x-truncated", 50, |xml| xml[..xml.len() / 2].to_string()),
    text("x-root", 51, |xml| {
        xml.replace("Virtuozzo_disk_image", "foo")
            .replace("Parallels_disk_image", "foo")
    }),
    text("x-no-snapshots", 52, |xml| {
        cut(xml, "<Snapshots>", "</Snapshots>")
    }),
    text("x-no-top", 53, |xml| cut(xml, "<TopGUID>", "</TopGUID>")),
    text("x-unknown-top", 54, |xml| {
        let xml = cut(xml, "<TopGUID>", "</TopGUID>");
        xml.replacen(
            "<Snapshots>",
            &format!("<Snapshots><TopGUID>{OTHER}</TopGUID>"),
            1,
        )
    }),
    text("x-image-without-shot", 55, |xml| {
        let image =
            format!("<Image><GUID>{OTHER}</GUID><Type>Compressed</Type><File>n</File></Image>");
        xml.replacen("</Storage>", &format!("{image}</Storage>"), 1)
    }),
    text("x-shot-without-image", 55, |xml| {
        cut(xml, "<Image>", "</Image>")
    }),
    text("x-duplicate-guid", 56, |xml| {
        double(xml, "<Image>", "</Image>")
    }),
    text("x-duplicate-shot", 56, |xml| {
        double(xml, "<Shot>", "</Shot>")
    }),
    text("x-parent-missing", 57, |xml| {
        xml.replace(
            &format!("<ParentGUID>{NONE}"),
            &format!("<ParentGUID>{OTHER}"),
        )
    }),
    text("x-cycle", 58, |xml| {
        xml.replace(
            &format!("<ParentGUID>{NONE}"),
            &format!("<ParentGUID>{TOP}"),
        )
    }),
    text("x-two-roots", 59, |xml| {
        let shot = format!("<Shot><GUID>{OTHER}</GUID><ParentGUID>{NONE}</ParentGUID></Shot>");
        xml.replacen("</Snapshots>", &format!("{shot}</Snapshots>"), 1)
    }),
    text("x-bare-guid", 60, |xml| {
        ["GUID", "ParentGUID", "TopGUID"]
            .iter()
            .fold(xml.to_string(), |xml, tag| {
                let open = xml.replace(&format!("<{tag}>{{"), &format!("<{tag}>"));
                open.replace(&format!("}}</{tag}>"), &format!("</{tag}>"))
            })
    }),
    text("x-upper-guid", 60, |xml| {
        xml.replace(TOP, &TOP.to_uppercase())
    }),
    text("x-bad-guid", 60, |xml| xml.replace(TOP, "{5fbaabe3}")),
    text("x-start", 62, |xml| {
        xml.replacen("<Start>0<", "<Start>2048<", 1)
    }),
    text("x-end-small", 61, |xml| {
        change_number(xml, "End", |n| n - 8)
    }),
    text("x-end-large", 61, |xml| {
        change_number(xml, "End", |n| n + 8)
    }),
    text("x-size", 63, |xml| {
        change_number(xml, "Disk_size", |n| n + 2048)
    }),
    text("x-size-garbage", 63, |xml| {
        xml.replacen("<Disk_size>", "<Disk_size>x", 1)
    }),
    text("x-no-blocksize", 64, |xml| {
        cut(xml, "<Blocksize>", "</Blocksize>")
    }),
    text("x-blocksize", 65, |xml| {
        change_number(xml, "Blocksize", |n| n * 2)
    }),
    text("x-blocksize-0", 65, |xml| {
        change_number(xml, "Blocksize", |_| 0)
    }),
    text("x-plain-type", 66, |xml| {
        xml.replacen("Compressed", "Plain", 1)
    }),
    text("x-plain-above", 67, |xml| {
        replace_last(xml, "Compressed", "Plain")
    }),
    bundle("x-file-missing", 68, |dir| {
        fs::remove_file(dir.join(first_file(dir)?))
    }),
    text("x-file-empty", 69, |xml| set_file(xml, "")),
    text("x-file-newline", 69, |xml| {
        xml.replacen("</File>", "\n</File>", 1)
    }),
    bundle("x-file-dotdot", 69, |dir| {
        move_out(dir, |out| format!("../{out}"))
    }),
    bundle("x-file-absolute", 69, |dir| {
        let parent = fs::canonicalize(dir.join(".."))?;
        move_out(dir, |out| parent.join(out).display().to_string())
    }),
    bundle("x-file-symlink", 69, |dir| {
        let name = first_file(dir)?;
        move_out(dir, |_| name.clone())?;
        // The link's text must not depend on where the caller stands.
        let out = fs::canonicalize(dir.join(".."))?.join(format!("out-{name}"));
        symlink(out, dir.join(first_file(dir)?))
    }),
    text("x-same-file", 70, |xml| {
        let first = between(xml, "<File>", "</File>")
            .unwrap_or_default()
            .to_string();
        replace_last(
            xml,
            &format!("<File>{}<", last_file(xml)),
            &format!("<File>{first}<"),
        )
    }),
    text("x-padding", 71, |xml| {
        xml.replacen("<Padding>0", "<Padding>1", 1)
    }),
    bundle("x-lower-in-use", 75, |dir| {
        let file = OpenOptions::new()
            .write(true)
            .open(dir.join(first_file(dir)?))?;
        file.write_all_at(b"Ynot", 44)
    }),
    bundle("x-left-tmp", 76, |dir| {
        fs::copy(
            dir.join("DiskDescriptor.xml"),
            dir.join("DiskDescriptor.xml.tmp"),
        )
        .map(|_| ())
    }),
    text("x-entities", 77, |xml| {
        let dtd = "<!DOCTYPE d [<!ENTITY a \"aaaa\"><!ENTITY b \"&a;&a;&a;&a;\">]>\n";
        xml.replacen("?>\n", &format!("?>\n{dtd}"), 1)
            .replacen("<Heads>16", "<Heads>&b;", 1)
    }),
    text("x-huge", 77, |xml| {
        xml.replacen(
            "</Disk_Parameters>",
            &format!("<Pad>{}</Pad></Disk_Parameters>", "x".repeat(9 << 20)),
            1,
        )
    }),
    text("x-deep", 77, |xml| {
        let (open, close) = ("<a>".repeat(20_000), "</a>".repeat(20_000));
        xml.replacen(
            "</Disk_Parameters>",
            &format!("{open}{close}</Disk_Parameters>"),
            1,
        )
    }),
    text("x-key-id", 78, |xml| {
        let key = "<Encryption><KeyId>forged-key</KeyId></Encryption>";
        let xml = cut(xml, "<Encryption>", "</Encryption>");
        xml.replacen("</Disk_Parameters>", &format!("{key}</Disk_Parameters>"), 1)
    }),
    text("x-engine", 78, |xml| {
        let engine =
            "<Encryption><Engine>{00112233-4455-6677-8899-aabbccddeeff}</Engine></Encryption>";
        let xml = cut(xml, "<Encryption>", "</Encryption>");
        xml.replacen(
            "</Disk_Parameters>",
            &format!("{engine}</Disk_Parameters>"),
            1,
        )
    }),
];

const OTHER: &str = "{0badcafe-0000-4000-8000-00000000beef}";

/// Applies a corruption by its name: `h`, `t` and `e` to an image, `x` to a bundle's directory.
pub(crate) fn apply(name: &str, path: &Path) -> io::Result<()> {
    let Some(corruption) = ALL.iter().find(|corruption| corruption.name == name) else {
        return Err(io::Error::other(format!("no corruption is called {name}")));
    };
    let xml = path.join("DiskDescriptor.xml");
    match corruption.how {
        How::Header(at, bytes) => open(path)?.write_all_at(bytes, at as u64),
        How::Image(how) => how(&open(path)?),
        How::Extension(how) => extension::rewrite(&open(path)?, name != "e-md5", how),
        How::Text(how) => fs::write(&xml, how(&fs::read_to_string(&xml)?)),
        How::Bundle(how) => how(path),
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn need(file: &File) -> io::Result<reader::Fields> {
    reader::fields(file)?.ok_or_else(|| io::Error::other("no header to break"))
}

/// Sectors that one step of an entry means.
fn unit(fields: reader::Fields) -> u64 {
    if fields.version == 1 {
        1
    } else {
        fields.cluster
    }
}

fn change_entries(file: &File, change: fn(u64) -> u64) -> io::Result<()> {
    let fields = need(file)?;
    file.write_all_at(&(change(fields.entries) as u32).to_le_bytes(), 32)
}

fn claim_extension(file: &File, sector: u64) -> io::Result<()> {
    // Sector 0 would mean none; inside the table is told by sector 1.
    file.write_all_at(b"v2.1", 44)?;
    file.write_all_at(&sector.max(1).to_le_bytes(), 56)
}

/// The mapped entries, in disk order.
fn entries(file: &File, fields: reader::Fields) -> io::Result<Vec<(u64, u64)>> {
    let mut bytes = vec![0; 4 * fields.entries as usize];
    file.read_exact_at(&mut bytes, 64)?;
    let words = bytes
        .chunks_exact(4)
        .map(|w| u64::from(u32::from_le_bytes([w[0], w[1], w[2], w[3]])));
    let mapped: Vec<(u64, u64)> = (0..).zip(words).filter(|(_, entry)| *entry != 0).collect();
    if mapped.len() < 2 {
        return Err(io::Error::other("the image maps fewer than two clusters"));
    }
    Ok(mapped)
}

/// Changes the `nth` mapped entry; the function gets the header and the length of the file.
fn set_entry(file: &File, nth: usize, to: impl Fn(reader::Fields, u64) -> u64) -> io::Result<()> {
    let fields = need(file)?;
    let (index, _) = entries(file, fields)?[nth];
    let entry = to(fields, file.metadata()?.len()) as u32;
    file.write_all_at(&entry.to_le_bytes(), 64 + 4 * index)
}

/// The disk cluster whose entry `set_entry` changes.
pub(crate) fn nth_mapped(path: &Path, nth: usize) -> io::Result<u64> {
    let file = open(path)?;
    let fields = need(&file)?;
    Ok(entries(&file, fields)?[nth].0)
}

fn between<'a>(xml: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(open)?;
    rest.split_once(close).map(|(inside, _)| inside)
}

fn cut(xml: &str, open: &str, close: &str) -> String {
    match between(xml, open, close) {
        Some(inside) => xml.replacen(&format!("{open}{inside}{close}"), "", 1),
        None => xml.to_string(),
    }
}

fn double(xml: &str, open: &str, close: &str) -> String {
    let inside = between(xml, open, close).unwrap_or_default();
    let one = format!("{open}{inside}{close}");
    xml.replacen(&one, &format!("{one}{one}"), 1)
}

fn replace_last(xml: &str, from: &str, to: &str) -> String {
    match xml.rsplit_once(from) {
        Some((before, after)) => format!("{before}{to}{after}"),
        None => xml.to_string(),
    }
}

fn change_number(xml: &str, tag: &str, change: fn(u64) -> u64) -> String {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    let old = between(xml, &open, &close).unwrap_or_default();
    let new = change(old.parse().unwrap_or(0));
    replace_last(
        xml,
        &format!("{open}{old}{close}"),
        &format!("{open}{new}{close}"),
    )
}

fn set_file(xml: &str, to: &str) -> String {
    let old = between(xml, "<File>", "</File>").unwrap_or_default();
    xml.replacen(
        &format!("<File>{old}</File>"),
        &format!("<File>{to}</File>"),
        1,
    )
}

fn last_file(xml: &str) -> String {
    let after = xml.rsplit_once("<File>").map_or("", |(_, after)| after);
    after
        .split_once("</File>")
        .map_or("", |(name, _)| name)
        .to_string()
}

fn first_file(dir: &Path) -> io::Result<String> {
    let xml = fs::read_to_string(dir.join("DiskDescriptor.xml"))?;
    Ok(between(&xml, "<File>", "</File>")
        .unwrap_or_default()
        .to_string())
}

/// Moves the base out of the bundle and names it there.
fn move_out(dir: &Path, name: impl Fn(&str) -> String) -> io::Result<()> {
    let file = first_file(dir)?;
    let out = format!("out-{file}");
    fs::rename(dir.join(&file), dir.parent().unwrap_or(dir).join(&out))?;
    let xml = dir.join("DiskDescriptor.xml");
    fs::write(&xml, set_file(&fs::read_to_string(&xml)?, &name(&out)))
}
