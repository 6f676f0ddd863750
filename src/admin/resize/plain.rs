//! Gives a disk whose top is a plain file another size.
//!
//! Growing, in this order, each step durable before the next begins: bytes that the file has behind
//! the disk's end become zeros; the file is lengthened with a hole; the descriptor says so. The
//! disk shows nothing of the first two before the third. Nothing tells whether an earlier attempt
//! has failed to make them durable, so the file is synced, read anew and given its length again.
//! Shrinking, the descriptor comes first and then the cut: the other way round the disk would be as
//! large as before, and its end gone.

use super::{Planned, Request, room, rounded};
use crate::admin::relocate::first_data;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Keep, Storage};
use crate::units::{FileOffset, SECTOR, SectorCount};

/// What a plain file is to its disk.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Size of the disk, or of the part of it that the file is.
    pub size: SectorCount,
    /// The new size is a multiple of this.
    pub unit: SectorCount,
}

fn bytes(size: SectorCount) -> Result<u64> {
    let bytes = size.bytes().filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| Error::why(ErrorKind::Usage, "no file can be that long"))
}

/// What resizing a plain file would do. Changes nothing.
pub(super) fn plan_plain(
    storage: &dyn Storage,
    place: Place,
    request: &Request,
) -> Result<Planned> {
    let after = rounded(request.size, place.unit, place.size);
    let (old, new) = (bytes(place.size)?, bytes(after)?);
    if new == 0 {
        return Err(Error::why(ErrorKind::Usage, "a disk has at least a sector"));
    }
    if new < old && !request.shrink {
        return Err(room::smaller(old, new));
    }
    let end = storage.len()?.get().min(old);
    let discards = match new < old {
        true => first_data(storage, new.min(end)..end)?,
        false => None,
    };
    match discards {
        Some(byte) if !request.force_discard => Err(room::in_the_way(byte)),
        _ => Ok(Planned {
            before: place.size,
            after,
            moves: 0,
            cluster_bytes: place.unit.get().saturating_mul(SECTOR),
            discards,
            drops_bitmaps: false,
            was_marked: false,
        }),
    }
}

/// Resizes a plain file. The caller has it locked. `describe` makes the descriptor right, durably,
/// where there is one and where it is not.
pub fn resize_plain(
    storage: &dyn Storage,
    place: Place,
    request: &Request,
    describe: &mut dyn FnMut(SectorCount) -> Result<()>,
) -> Result<Planned> {
    storage.sync_data()?;
    if let Err(error) = storage.drop_cache() {
        log::debug!("the host's cache stays: {error}");
    }
    let told = plan_plain(storage, place, request)?;
    let (old, new) = (bytes(told.before)?, bytes(told.after)?);
    let len = storage.len()?.get();
    let at = FileOffset::new;
    if new > old && len > old {
        storage.zero(at(old)..at(len), Keep::Nothing)?;
        storage.sync_data()?;
    }
    if new > old && new >= len {
        storage.set_len(at(new))?;
        storage.sync_data()?;
    }
    describe(told.after)?;
    // A file that was longer than its disk before stays so unless it is to shrink.
    if new < len && request.shrink {
        storage.set_len(at(new))?;
        storage.sync_data()?;
    }
    Ok(told)
}
