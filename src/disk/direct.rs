//! Disks whose files are read and written past the host's page cache.
//!
//! Everything of a file goes directly then, its header and table too: one way for all of its bytes,
//! so that no page of the cache can take back what went to the medium beside it. What requests need
//! that are no whole blocks of the device is `storage`'s affair. What is promised stays the same:
//! bytes that were written directly are in the device, whose own cache only a flush empties.
//!
//! A direct disk waits for the medium at each request. A door that can ask the host for bytes and
//! go on is given what lies in one piece of one file ([`moving`](super::moving)). Of all else, the
//! door that can hand over a request without a copy, as its memory goes with it, always does; the
//! pool has more threads then, which mostly sleep. Where the memory stays with the thread, and
//! threads are as many, small ones are served on it.
//!
//! A top must consist of whole blocks, or its last bytes could not be written without making the
//! file longer. It does if its clusters do, and if nothing is behind the last one.

use crate::chain::Chain;
use crate::chain::bundle::OpenedPart;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Header;

/// Threads of the pool, at least.
pub(super) const POOL_THREADS: usize = 16;
const FIX: &str = "leave out --direct";

/// Has all files of the part go directly, if each of them can and the top may be written that way.
pub(super) fn prepare(part: &OpenedPart, read_only: bool) -> Result<()> {
    for file in &part.files {
        file.storage.go_direct().map_err(|e| {
            let ErrorKind::Io(libc::EINVAL | libc::EOPNOTSUPP) = e.kind() else {
                return e.in_file(&file.path);
            };
            let why = "its file system cannot read and write past the page cache";
            Error::why(ErrorKind::Unsupported, why)
                .because(e)
                .in_file(&file.path)
                .fix(FIX)
        })?;
    }
    if read_only {
        return Ok(());
    }
    let chain = crate::chain::open::chain(part, true, &mut Vec::new())?;
    // What a killed process left behind the last cluster is cut before anything else.
    let is_cut = chain.top().header().is_some_and(Header::is_in_use);
    expect_blocks(&chain, !is_cut)
}

/// Fails if the top, whose length counts or does not, has bytes that are less than a block.
pub(super) fn expect_blocks(chain: &Chain, with_length: bool) -> Result<()> {
    let top = chain.top();
    let (unit, name) = match top.header() {
        Some(_) => (chain.geometry().cluster.bytes(), "the image's clusters are"),
        None => (chain.geometry().disk_len, "the disk's size is"),
    };
    let block = top.storage().go_direct()?;
    let len = top.storage().len()?.get();
    let what = if unit % block != 0 {
        name
    } else if with_length && len % block != 0 {
        "its length is"
    } else {
        return Ok(());
    };
    let why = format!("the device has blocks of {block} bytes, and {what} no multiple of that");
    Err(Error::why(ErrorKind::Unsupported, why)
        .in_file(top.path())
        .fix(FIX))
}
