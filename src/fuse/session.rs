//! Serves one mounted descriptor until the kernel ends the session.
//!
//! Imports: `error`, the doors of `fuse`.
//! Never: mounts or unmounts; the session has no other hand on the mount than its descriptor.
//!
//! Which door serves is settled before INIT is read, and what a ring needs is there by then.
//! Unasked, rings are taken where the kernel offers them and they can be had; there is a way back
//! until INIT is answered:
//!
//! 1. the kernel does not offer rings, or they could need more memory than they are worth: fuser;
//! 2. memory, rings or threads cannot be had, or do not work: fuser, on the same descriptor;
//! 3. INIT does not offer them, as the switch was turned off meanwhile: INIT has been read by then,
//!    so our own door serves on;
//! 4. the kernel was told of rings and refuses one: `rings` goes on with our own door.
//!
//! The kernel decides who may send requests ([`Access`] went into the mount), so the library's own
//! check is left open; it would refuse the kernel's loop workers, which run as root. The exception
//! is access for root only, which the kernel does not know.

use super::PloopFs;
use super::device::{self, Device, Start};
use super::dispatch::Guard;
use super::library::Library;
use super::mount::Access;
use super::rings;
use crate::error::{Error, ErrorKind, Result};
use fuser::{Config, Session, SessionACL};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// How requests come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// By rings of io_uring where the kernel offers them, else by the library.
    #[default]
    Auto,
    /// By the library fuser, from /dev/fuse.
    Fuser,
    /// By rings of io_uring, or not at all.
    Uring,
    /// By our own door on /dev/fuse; it is what rings fall back on, and for tests.
    Device,
    /// By rings with more threads than CPUs; for tests.
    Crowded,
    /// By rings as if all CPUs but one had been off at the start; for tests.
    Lame,
    /// By rings that the kernel refuses; for tests.
    Refused,
    /// By rings of which the kernel refuses a part; for tests.
    PartlyRefused,
    /// As by default, when the kernel's offer has gone by the time of INIT; for tests.
    Late,
}

/// What is said of the library's door, and of our own.
const LIBRARY: &str = "requests come from /dev/fuse, by fuser";
const OWN: &str = "requests come from /dev/fuse";

impl Transport {
    /// The rings that may be taken.
    fn shape(self) -> Option<rings::Shape> {
        match self {
            Self::Fuser | Self::Device => None,
            Self::Auto | Self::Uring | Self::Late => Some(rings::Shape::Usual),
            Self::Crowded => Some(rings::Shape::Crowded),
            Self::Lame => Some(rings::Shape::Lame),
            Self::Refused => Some(rings::Shape::Refused),
            Self::PartlyRefused => Some(rings::Shape::PartlyRefused),
        }
    }
}

/// Fails if rings were asked for and the kernel does not offer them.
pub fn expect_offered(transport: Transport) -> Result<()> {
    let wants = transport != Transport::Auto && transport.shape().is_some();
    if !wants || rings::are_offered() {
        return Ok(());
    }
    let fix = format!(
        "as root: echo Y > {}; or leave --transport out",
        rings::SWITCH
    );
    Err(Error::why(
        ErrorKind::Host,
        "the kernel does not offer FUSE over io_uring",
    )
    .fix(fix))
}

/// What turns rings on, where this kernel has them and does not offer them.
#[must_use]
pub fn rings_switch() -> Option<&'static str> {
    let is_off = !rings::are_offered() && std::path::Path::new(rings::SWITCH).exists();
    is_off.then_some(rings::SWITCH)
}

/// Fails if the kernel is to read a flat clone by itself and that cannot be, as far as it is known
/// before anything is opened.
pub fn expect_flat(transport: Transport, read_only: bool) -> Result<()> {
    let usage = |why: &str, fix: &str| Err(Error::why(ErrorKind::Usage, why).fix(fix));
    if !read_only {
        return usage(
            "--linearize serves a frozen copy, which cannot be written to",
            "add -r (--read-only), or leave --linearize out",
        );
    }
    if !matches!(transport, Transport::Auto | Transport::Fuser) {
        return usage(
            "with --linearize the kernel reads the disk by itself, which is set up by fuser only",
            "leave --transport out: it makes no difference to the disk's speed then",
        );
    }
    if !nix::unistd::geteuid().is_root() {
        let why = "only root may have the kernel read a file by itself (FUSE passthrough)";
        return Err(Error::why(ErrorKind::Host, why).fix("use sudo, or leave --linearize out"));
    }
    Ok(())
}

/// Answers INIT, calls `on_ready` once (its failure ends the session at once), and serves requests
/// on this many threads, or on one for each CPU if they come by rings. Returns after the last
/// request when the mount has gone.
pub fn serve(
    fs: PloopFs,
    fd: OwnedFd,
    access: Access,
    (transport, threads): (Transport, usize),
    on_ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let threads = threads.max(1);
    let served = match (transport, transport.shape()) {
        (_, Some(shape)) => match make_rings(&fs, fd, transport, shape) {
            Ok(made) => serve_own(fs, made, (transport, access, threads), on_ready),
            Err((e, fd)) if transport == Transport::Auto => {
                let told = format!("{LIBRARY}: {e}");
                serve_library(fs, fd, (access, threads, told), on_ready)
            }
            Err((e, _)) => Err(no_rings(&e)),
        },
        (Transport::Device, None) => {
            let made = (Device::new(fd), None);
            serve_own(fs, made, (transport, access, threads), on_ready)
        }
        (_, None) => serve_library(fs, fd, (access, threads, LIBRARY.to_owned()), on_ready),
    };
    served.inspect_err(|error| log::error!("the session ended badly: {error}"))
}

/// A descriptor to be served by a door of our own, with rings or without.
type Made = (Arc<Device>, Option<rings::Prepared>);

/// Makes what rings need, without a word to the kernel's FUSE. If they cannot be had, the
/// descriptor comes back as it was.
fn make_rings(
    fs: &PloopFs,
    fd: OwnedFd,
    transport: Transport,
    shape: rings::Shape,
) -> std::result::Result<Made, (io::Error, OwnedFd)> {
    if transport == Transport::Auto {
        let useless = fs.has_no_use_for_rings().map(io::Error::other);
        if let Some(why) = useless.or_else(|| rings::are_worth_it().err()) {
            return Err((why, fd));
        }
    }
    match rings::prepare(&fd, shape) {
        // Without its socket pair the descriptor still is what the library expects.
        Ok(rings) => Device::stoppable(fd).map(|device| (device, Some(rings))),
        Err(e) => Err((e, fd)),
    }
}

fn no_rings(e: &io::Error) -> Error {
    Error::why(ErrorKind::Host, format!("no rings can be had: {e}")).fix(
        "see kernel.io_uring_disabled, RLIMIT_MEMLOCK and what the container lets through; or \
         leave --transport out",
    )
}

fn serve_library(
    fs: PloopFs,
    fd: OwnedFd,
    (access, threads, told): (Access, usize, String),
    on_ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let acl = match access {
        Access::Root => SessionACL::RootAndOwner,
        Access::Owner | Access::Everybody => SessionACL::All,
    };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    let passed = match fs.views.settings.flat.clone() {
        Some(flat) => Some((flat, fd.try_clone()?)),
        None => None,
    };
    let library = Library::new(fs, threads);
    let through = library.through();
    let session = Session::from_fd(library, fd, acl, config)
        .map_err(|e| Error::why(ErrorKind::Host, "the kernel did not greet us").because(e))?;
    if let Some((flat, device)) = passed {
        through.expect(&device, &flat)?;
    }
    on_ready()?;
    log::info!("{told}");
    session.run().map_err(Error::from)
}

fn serve_own(
    mut fs: PloopFs,
    (device, rings): Made,
    (transport, access, threads): (Transport, Access, usize),
    on_ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let guard = Guard::new(access);
    // Threads of queues wait for locks as others do.
    let others = rings.as_ref().map_or(0, rings::Prepared::count);
    let wants = rings.is_some() && transport != Transport::Late;
    let agreed = device::greet(&device, &mut fs, threads + others, wants)?;
    let (rings, told) = match rings {
        Some(rings) if agreed => (Some(rings), format!("requests come through {others} rings")),
        Some(unwanted) if matches!(transport, Transport::Auto | Transport::Late) => {
            drop(unwanted);
            (None, format!("{OWN}: the kernel offers no rings any more"))
        }
        Some(_) => return Err(no_rings(&io::ErrorKind::Unsupported.into())),
        None => (None, OWN.to_owned()),
    };
    if rings.is_some() {
        fs.expect_threads(others);
        // Before anybody can see the mount, and what it needs. The kernel may still refuse the
        // rings; `rings` sets them aside again then.
        fs.release_buffers();
    }
    on_ready()?;
    log::info!("{told}");
    let fs = Arc::new(fs);
    let served = match rings {
        Some(rings) => {
            let fs = Arc::clone(&fs);
            rings::run(rings, Start { fs, device, guard }, threads)
        }
        None => device::serve_alone(&fs, &device, guard, threads).map_err(Error::from),
    };
    // Only after a failure there is still somebody who has it.
    if let Some(mut fs) = Arc::into_inner(fs) {
        fs.end();
    }
    served
}
