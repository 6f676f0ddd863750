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
        path = real(&path.parent().unwrap_or(&path).join(below))?;
        let known = said.get("backing-filename-format").and_then(Value::as_str);
        format = known.map(str::to_owned);
    }
    let why = "more disks lie below it than any program makes";
    Err(Error::why(ErrorKind::Unsupported, why))
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
