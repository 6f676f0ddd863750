//! The files that a disk of another format names: backing files, files with its data, extents.
//!
//! Who wrote a disk could have named any file of the host in it, and a copy would hold that file's
//! bytes. So they have to lie where the disk lies, or in directories that the user has named. They
//! are followed one by one: `qemu-img` is never told to open what has not been looked at.

use super::foreign::qemu_img;
use super::magic::Format;
use crate::admin::program::{self, QEMU_IMG};
use crate::error::{Error, ErrorKind, Result};
use serde_json::Value;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Disks below each other.
const DEPTH_MAX: usize = 256;
/// Bytes that are read of what `qemu-img` says.
const SAID_MAX: u64 = 16 << 20;

/// Refuses a disk that names files elsewhere.
pub(super) fn refuse(
    path: &Path,
    format: Format,
    is_shared: bool,
    allowed: &[PathBuf],
) -> Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).map_err(|e| Error::from(e).in_file(path));
    let mut homes = vec![path.parent().unwrap_or(path).to_owned()];
    for place in allowed {
        homes.push(real(place)?);
    }
    let (mut path, mut format) = (path.to_owned(), Some(format.word().to_owned()));
    for _ in 0..DEPTH_MAX {
        let said = info(&path, format.as_deref(), is_shared)?;
        let mut named = Vec::new();
        collect(&said, &mut named);
        for name in named {
            if is_protocol(name) {
                let why = format!("it names {name:?}, which is more than the name of a file");
                let fix = "convert it with `qemu-img`, if you trust whoever made it";
                return Err(Error::why(ErrorKind::OutsideBundle, why).fix(fix));
            }
            let file = path.parent().unwrap_or(&path).join(name);
            let file = std::fs::canonicalize(&file).map_err(|e| {
                let why = format!("it names {name:?}");
                Error::why(ErrorKind::Missing, why).because(e)
            })?;
            if !homes.iter().any(|home| file.starts_with(home)) {
                let why = format!("it names {name:?}, which is not where the disk is");
                let fix = "if you trust it: --allow-outside DIR, with the directory of that file";
                return Err(Error::why(ErrorKind::OutsideBundle, why).fix(fix));
            }
        }
        let Some(below) = said.get(BACKING).and_then(Value::as_str) else {
            return Ok(());
        };
        // Where this is a link, names are looked for beside the link, as `qemu-img` does it.
        path = path.parent().unwrap_or(&path).join(below);
        let known = said.get("backing-filename-format").and_then(Value::as_str);
        format = known.map(str::to_owned);
    }
    let why = "more disks lie below it than any program makes";
    Err(Error::why(ErrorKind::Unsupported, why))
}

/// What `qemu-img` takes for a protocol and a name: a directory `file:` beside the disk could have
/// been made to look like it.
fn is_protocol(name: &str) -> bool {
    let first = name.find([':', '/']);
    first.is_some_and(|at| name[at..].starts_with(':'))
}

const BACKING: &str = "full-backing-filename";

fn info(path: &Path, format: Option<&str>, is_shared: bool) -> Result<Value> {
    let mut command = qemu_img(&["info", "--output=json"]);
    if is_shared {
        command.arg("-U");
    }
    if let Some(format) = format {
        command.args(["-f", format]);
    }
    let mut text = Vec::new();
    command.arg(path).stdout(Stdio::piped());
    program::run(&mut command, &QEMU_IMG, |child| {
        if let Some(out) = child.stdout.take() {
            out.take(SAID_MAX).read_to_end(&mut text)?;
        }
        Ok(())
    })?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::why(ErrorKind::Host, "qemu-img says what cannot be read").because(e))
}

/// All names of files, however deep.
fn collect<'a>(said: &'a Value, names: &mut Vec<&'a str>) {
    match said {
        Value::Object(members) => {
            for (key, value) in members {
                match value.as_str() {
                    Some(name) if ["filename", "data-file", BACKING].contains(&key.as_str()) => {
                        names.push(name);
                    }
                    _ => collect(value, names),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, names)),
        _ => {}
    }
}

#[cfg(test)]
// Its numbers are in the order of networks.
#[allow(clippy::big_endian_bytes)]
mod tests {
    use super::*;
    use crate::units::len_u64;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// The smallest qcow2 with a backing file: a header, then the formats and the name.
    fn qcow2(below: &str, format: &str) -> Vec<u8> {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.extend(0x200_u64.to_be_bytes());
        bytes.extend(u32::try_from(below.len()).unwrap().to_be_bytes());
        bytes.extend(16_u32.to_be_bytes());
        bytes.extend((64_u64 << 10).to_be_bytes());
        bytes.extend([0; 4]);
        // One entry of the first table, that table, the refcounts' and its clusters.
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend(0x30000_u64.to_be_bytes());
        bytes.extend(0x10000_u64.to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend([0; 36]);
        bytes.extend(4_u32.to_be_bytes());
        bytes.extend(104_u32.to_be_bytes());
        bytes.extend(0xe279_2aca_u32.to_be_bytes());
        bytes.extend(u32::try_from(format.len()).unwrap().to_be_bytes());
        bytes.extend(format.bytes());
        bytes.resize(0x200, 0);
        bytes.extend(below.bytes());
        bytes.resize(0x10000, 0);
        bytes.extend(0x20000_u64.to_be_bytes());
        bytes.resize(0x20000, 0);
        bytes.extend([0, 1].repeat(4));
        bytes.resize(0x40000, 0);
        assert_eq!(len_u64(bytes.len()), 0x40000);
        bytes
    }

    #[test]
    fn protocols_are_told_from_names() {
        for (name, expected) in [
            ("file:/etc/passwd", true),
            ("json:{\"driver\":\"file\"}", true),
            ("nbd://host/disk", true),
            (":", true),
            ("/a:b", false),
            ("./a:b", false),
            ("a/b:c", false),
            ("a", false),
            ("", false),
        ] {
            assert_eq!(is_protocol(name), expected, "{name}");
        }
    }

    /// What is looked at is what `qemu-img` reads, whatever lies beside the disk.
    #[test]
    fn nothing_elsewhere_is_hidden_by_what_has_its_name() {
        if qemu_img(&["--version"]).output().is_err() {
            assert!(std::env::var("CI").is_err(), "qemu-img is missing");
            println!("skipped: qemu-img is missing");
            return;
        }
        let temporary = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(temporary.path()).unwrap();
        let (home, secret) = (top.join("home"), top.join("secret"));
        fs::create_dir_all(home.join("sub")).unwrap();
        fs::write(&secret, [1; 65536]).unwrap();
        let refused = |name: &str| {
            let error = refuse(&home.join(name), Format::Qcow2, false, &[]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutsideBundle, "{name}: {error}");
        };
        let protocol = format!("file:{}", secret.display());
        let decoy = home.join(&protocol);
        fs::create_dir_all(decoy.parent().unwrap()).unwrap();
        fs::write(decoy, [2; 65536]).unwrap();
        fs::write(home.join("protocol"), qcow2(&protocol, "raw")).unwrap();
        refused("protocol");

        fs::write(home.join("sub/below"), qcow2("flat", "raw")).unwrap();
        fs::write(home.join("sub/flat"), [2; 65536]).unwrap();
        symlink("sub/below", home.join("below")).unwrap();
        symlink(&secret, home.join("flat")).unwrap();
        fs::write(home.join("linked"), qcow2("below", "qcow2")).unwrap();
        refused("linked");
        fs::remove_file(home.join("flat")).unwrap();
        fs::write(home.join("flat"), [3; 65536]).unwrap();
        refuse(&home.join("linked"), Format::Qcow2, false, &[]).unwrap();
    }
}
