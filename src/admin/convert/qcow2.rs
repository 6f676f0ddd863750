//! Writes a qcow2 image with the help of `qemu-img`.
//!
//! The file is made, named and taken back as every new disk ([`create`](crate::admin::create)); the
//! other program gets it by its descriptor and never learns a name.

use super::copy;
use crate::admin::create::{Ids, NewFile, Place, make_in};
use crate::admin::program::{self, QEMU_IMG};
use crate::admin::progress::Progress;
use crate::admin::source::Source;
use crate::error::{Error, Result};
use crate::storage::directory::HostDirectory;
use crate::storage::file::FileStorage;
use crate::storage::{SharedStorage, Storage};
use crate::sys::directory::nameless;
use crate::units::{ClusterSize, FileOffset};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// Copies the source into a flat file without a name, and has that made a qcow2.
pub(super) fn write(
    source: &dyn Source,
    parent: &HostDirectory,
    name: &str,
    unit: ClusterSize,
    progress: &Progress,
) -> Result<()> {
    let place = parent.path();
    let flat = nameless(place).map_err(|e| Error::from(e).in_file(place))?;
    let flat: SharedStorage = Arc::new(FileStorage::new(flat)?);
    flat.set_len(FileOffset::new(source.size()))?;
    let file = NewFile::Plain(Arc::clone(&flat));
    copy::copy(source, &file, unit, progress)?;
    make_in(
        parent,
        name,
        false,
        &Ids::new()?,
        progress,
        |place| match place {
            Place::Image(file) => make(&*flat, &**file, progress),
            Place::Bundle(_) => Err(Error::errno(libc::EIO)),
        },
    )
}

fn make(flat: &dyn Storage, file: &dyn Storage, progress: &Progress) -> Result<()> {
    progress.step("writing through qemu-img", flat.allocated_bytes()?);
    let mut command = Command::new(QEMU_IMG.name);
    command
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([path_of(flat)?, path_of(file)?])
        .stdout(Stdio::null());
    let mut seen = 0;
    program::run(&mut command, &QEMU_IMG, |_| {
        let now = file.allocated_bytes()?;
        progress.add(now.saturating_sub(seen));
        seen = seen.max(now);
        progress.check()
    })?;
    file.sync_data()
}

/// By what name another program finds an open file: an absolute path, which is never taken for the
/// name of a protocol.
fn path_of(file: &dyn Storage) -> Result<String> {
    let descriptor = file.as_host_fd().ok_or_else(|| Error::errno(libc::EIO))?;
    let (pid, number) = (std::process::id(), descriptor.as_raw_fd());
    Ok(format!("/proc/{pid}/fd/{number}"))
}
