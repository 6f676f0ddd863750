//! What images hold behind the end of the disk that a merge leaves: the uppermost one's.
//!
//! A merge takes the size of the uppermost image, and with the files of the others goes what they
//! hold behind it, or it is cut off where it is the lowest. So nothing may be there, or somebody
//! has to say that it may go. Behind the end of an image itself nothing counts: nobody shows it.

use crate::admin::resize::data_in;
use crate::delta::image::Image;
use crate::error::{Error, ErrorKind, Result};
use std::path::PathBuf;

/// Data that a merge gives up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discard {
    /// The image that holds it.
    pub file: PathBuf,
    /// The first byte of it in the disk.
    pub byte: u64,
}

/// Finds what these images hold behind the end, one discard for each that holds anything. Refuses
/// where that was not given up.
pub(super) fn discards<'a>(
    images: impl IntoIterator<Item = &'a Image>,
    end: u64,
    force_discard: bool,
) -> Result<Vec<Discard>> {
    let mut found = Vec::new();
    for image in images {
        let here = |e: Error| e.in_file(image.path());
        let behind = end..image.disk_len().max(end);
        let byte = match behind.is_empty() {
            true => None,
            false => data_in(&**image.storage(), image.header(), behind).map_err(here)?,
        };
        let Some(byte) = byte else {
            continue;
        };
        if !force_discard {
            return Err(here(would_be_lost(end, byte)));
        }
        found.push(Discard {
            file: image.path().to_owned(),
            byte,
        });
    }
    Ok(found)
}

fn would_be_lost(end: u64, byte: u64) -> Error {
    let why = format!(
        "the merged disk ends at byte {end}, and would lose what this image holds behind that, the \
         first of it at byte {byte}"
    );
    Error::why(ErrorKind::Usage, why).fix(
        "convert what shows it to a disk of its own first (`ploopfs convert --snapshot`); to lose \
         it: --force-discard",
    )
}
