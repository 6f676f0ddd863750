//! A disk in a format of another program, read through `qemu-img`.
//!
//! Its extents are what `qemu-img map` tells. Its bytes are converted once, into a temporary file
//! without a name that keeps the holes, and read from there; nothing of it is left behind however
//! the program ends.
//!
//! The library that comes nearest, imago, reads qcow2 and VMDK only and calls, in all its releases
//! that are alive, functions of Rust 1.87. Others read one format each, or have been left alone.

use super::magic::Format;
use super::raw::RawDisk;
use super::{Asked, Extent, Extents, Source, What, strangers};
use crate::admin::program::{self, QEMU_IMG};
use crate::admin::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::directory;
use crate::units::{DiskOffset, FileOffset};
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Bytes of a map that are read.
const MAP_MAX: u64 = 1 << 30;

/// A disk of another program.
#[derive(Debug)]
pub(super) struct ForeignDisk {
    format: Format,
    path: [PathBuf; 1],
    /// Somebody writes to it, and QEMU has to be told that this is known.
    is_shared: bool,
    map: Vec<Mapped>,
    flat: OnceLock<RawDisk>,
}

/// A line of `qemu-img map`.
#[derive(Debug, Deserialize)]
struct Mapped {
    start: u64,
    length: u64,
    depth: usize,
    #[serde(default)]
    present: bool,
    zero: bool,
    data: bool,
}

impl ForeignDisk {
    pub(super) fn open(
        path: &Path,
        format: Format,
        asked: &Asked,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        // An absolute path is never taken for the name of a protocol.
        let full = std::fs::canonicalize(path).map_err(|e| Error::from(e).in_file(path))?;
        let mut is_shared = false;
        let look = |is_shared| {
            let allowed = &asked.selection.allow_outside;
            strangers::refuse(&full, format, is_shared, allowed)?;
            map(&full, format, is_shared)
        };
        let map = match look(is_shared) {
            Err(e) if e.why_text().is_some_and(|why| why.contains("lock")) => {
                is_shared = true;
                notes.push(format!(
                    "{}: in use; what is read may be of different moments",
                    path.display()
                ));
                look(is_shared)
            }
            other => other,
        };
        let map = map.map_err(|e| e.in_file(path))?;
        notes.push(format!(
            "{}: {format} is read through qemu-img",
            path.display()
        ));
        Ok(Self {
            format,
            path: [full],
            is_shared,
            map,
            flat: OnceLock::new(),
        })
    }

    /// Converts it into a file without a name.
    fn flatten(&self, progress: &Progress) -> Result<RawDisk> {
        let place = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        let file = directory::nameless(&place).map_err(|e| Error::from(e).in_file(&place))?;
        file.set_len(self.size())
            .map_err(|e| Error::from(e).in_file(&place))?;
        let target = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let data = self.map.iter().filter(|mapped| mapped.data && !mapped.zero);
        progress.step(
            "reading through qemu-img",
            data.map(|mapped| mapped.length).sum(),
        );
        let mut command = qemu_img(&["convert", "-n", "--target-is-zero", "-O", "raw"]);
        if self.is_shared {
            command.arg("-U");
        }
        command.args(["-f", self.format.word()]);
        command
            .arg(&self.path[0])
            .arg(&target)
            .stdout(Stdio::null());
        let seen = |file: &File| {
            file.metadata()
                .map_or(0, |meta| meta.blocks().saturating_mul(512))
        };
        let mut before = 0;
        program::run(&mut command, &QEMU_IMG, |_| {
            let now = seen(&file);
            progress.add(now.saturating_sub(before));
            before = before.max(now);
            progress.check()
        })
        .map_err(|e| {
            if e.kind() == ErrorKind::Interrupted {
                return e;
            }
            let fix = format!(
                "it needs room for the disk's data in {}; TMPDIR names another place",
                place.display()
            );
            e.in_file(&self.path[0]).fix(fix)
        })?;
        RawDisk::of(file, &self.path[0])
    }
}

fn map(path: &Path, format: Format, is_shared: bool) -> Result<Vec<Mapped>> {
    let mut command = qemu_img(&["map", "--output=json"]);
    if is_shared {
        command.arg("-U");
    }
    command.args(["-f", format.word()]).arg(path);
    let mut text = Vec::new();
    command.stdout(Stdio::piped());
    program::run(&mut command, &QEMU_IMG, |child| {
        // All of it at once: it is written as fast as it is read.
        if let Some(out) = child.stdout.take() {
            out.take(MAP_MAX).read_to_end(&mut text)?;
        }
        Ok(())
    })?;
    let map: Vec<Mapped> = serde_json::from_slice(&text)
        .map_err(|e| Error::why(ErrorKind::Host, "qemu-img says what cannot be read").because(e))?;
    let mut end = 0_u64;
    for mapped in &map {
        if mapped.start != end || mapped.length == 0 {
            return Err(Error::why(ErrorKind::Host, "qemu-img's map has gaps"));
        }
        end = end.saturating_add(mapped.length);
    }
    Ok(map)
}

pub(super) fn qemu_img(args: &[&str]) -> Command {
    let mut command = Command::new(QEMU_IMG.name);
    command.args(args);
    command
}

impl Source for ForeignDisk {
    fn format(&self) -> &'static str {
        self.format.word()
    }

    fn size(&self) -> u64 {
        self.map
            .last()
            .map_or(0, |last| last.start.saturating_add(last.length))
    }

    fn extents(&self, at: DiskOffset) -> Extents<'_> {
        let end = |mapped: &Mapped| mapped.start.saturating_add(mapped.length);
        let first = self.map.partition_point(|mapped| end(mapped) <= at.get());
        Box::new(self.map[first..].iter().map(move |mapped| {
            Ok(Extent {
                range: DiskOffset::new(mapped.start.max(at.get()))..DiskOffset::new(end(mapped)),
                what: match (mapped.data && !mapped.zero, mapped.present) {
                    (true, _) => What::Data,
                    (false, true) => What::Zeros,
                    (false, false) => What::Hole,
                },
                depth: mapped.depth,
                place: None::<(usize, FileOffset)>,
            })
        }))
    }

    fn files(&self) -> &[PathBuf] {
        &self.path
    }

    fn prepare(&self, progress: &Progress) -> Result<()> {
        if self.flat.get().is_none() {
            let flat = self.flatten(progress)?;
            // Whoever was quicker has the same.
            let _ = self.flat.set(flat);
        }
        Ok(())
    }

    fn read_at(&self, at: DiskOffset, buf: &mut [u8]) -> Result<()> {
        let Some(flat) = self.flat.get() else {
            return Err(Error::why(ErrorKind::Host, "read before it was prepared"));
        };
        flat.read_at(at, buf)
    }

    fn host_place(&self, at: DiskOffset, most: u64) -> Result<Option<super::HostPlace>> {
        let flat = self.flat.get();
        flat.map_or(Ok(None), |flat| flat.host_place(at, most))
    }
}
