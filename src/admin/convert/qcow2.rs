//! Writes a qcow2 image with the help of `qemu-img`.

use super::copy;
use crate::admin::create::{Ids, NewFile, exists};
use crate::admin::program::{self, QEMU_IMG};
use crate::admin::progress::Progress;
use crate::admin::source::Source;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::directory::HostDirectory;
use crate::storage::file::FileStorage;
use crate::storage::{Directory, SharedStorage};
use crate::sys::directory::nameless;
use crate::units::{ClusterSize, FileOffset};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Writes the image under a temporary name, syncs and renames it.
pub(super) fn write(
    source: &dyn Source,
    parent: &HostDirectory,
    name: &str,
    unit: ClusterSize,
    progress: &Progress,
) -> Result<()> {
    let place = parent.path();
    let flat = nameless(place).map_err(|e| Error::from(e).in_file(place))?;
    let descriptor = flat.as_raw_fd();
    let flat: SharedStorage = Arc::new(FileStorage::new(flat)?);
    flat.set_len(FileOffset::new(source.size()))?;
    let file = NewFile::Plain(Arc::clone(&flat));
    copy::copy(source, &file, unit, progress)?;
    let temporary = Ids::new()?.temporary_name(name);
    // An absolute path is never taken for the name of a protocol.
    let full = std::fs::canonicalize(place).map_err(|e| Error::from(e).in_file(place))?;
    let path = full.join(&temporary);
    // It keeps the mode of a file that is there.
    parent.create_new(&temporary)?;
    progress.step("writing through qemu-img", flat.allocated_bytes()?);
    let mut command = Command::new(QEMU_IMG.name);
    command
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(format!("/proc/{}/fd/{descriptor}", std::process::id()))
        .arg(&path)
        .stdout(Stdio::null());
    let mut seen = 0;
    let made = program::run(&mut command, &QEMU_IMG, |_| {
        let now = path.metadata().map_or(0, |meta| meta.blocks() * 512);
        progress.add(now.saturating_sub(seen));
        seen = seen.max(now);
        progress.check()
    });
    let named = made
        .and_then(|()| parent.open(&temporary, true)?.sync_data())
        .and_then(|()| progress.check())
        .and_then(|()| parent.rename_new(&temporary, name))
        .and_then(|()| parent.sync());
    named.map_err(|e| {
        let left = parent.remove(&temporary);
        log::debug!("what was made is removed: {left:?}");
        match e.kind() {
            ErrorKind::Io(libc::EEXIST) => exists(name),
            _ => e,
        }
    })
}
