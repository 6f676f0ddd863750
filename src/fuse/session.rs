//! Serves one mounted descriptor until the kernel ends the session.
//!
//! Imports: `error`, the doors of `fuse`.
//! Never: mounts or unmounts; the session has no other hand on the mount than its descriptor.
//!
//! The kernel decides who may send requests ([`Access`] went into the mount), so the library's own
//! check is left open; it would refuse the kernel's loop workers, which run as root. The exception
//! is access for root only, which the kernel does not know.

use super::PloopFs;
use super::library::Library;
use super::mount::Access;
use crate::error::{Error, ErrorKind, Result};
use fuser::{Config, Session, SessionACL};
use std::os::fd::OwnedFd;

/// Answers INIT, calls `on_ready` once (its failure ends the session at once), and serves requests
/// on this many threads. Returns after the last request when the mount has gone.
pub fn serve(
    fs: PloopFs,
    fd: OwnedFd,
    access: Access,
    threads: usize,
    on_ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let acl = match access {
        Access::Root => SessionACL::RootAndOwner,
        Access::Owner | Access::Everybody => SessionACL::All,
    };
    let mut config = Config::default();
    let threads = threads.max(1);
    config.n_threads = Some(threads);
    let session = Session::from_fd(Library::new(fs, threads), fd, acl, config)
        .map_err(|e| Error::why(ErrorKind::Host, "the kernel did not greet us").because(e))?;
    on_ready()?;
    session.run().map_err(|e| {
        let error = Error::from(e);
        log::error!("the session ended badly: {error}");
        error
    })
}
