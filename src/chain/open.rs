//! Checks that the files of one part fit together, and makes a chain of them.

use super::Chain;
use super::bundle::{OpenedFile, OpenedPart, Plain};
use crate::delta::image::{Image, Kind, version_of};
use crate::error::{Error, ErrorKind, Result};
use crate::format::oddities;
use crate::plan::Geometry;
use crate::units::{ClusterSize, Level, SECTOR, SectorCount};
use std::sync::Arc;

/// Cluster size of a disk that only plain files make up and no descriptor gives one for: 1 MiB.
const PLAIN_CLUSTER_SECTORS: u32 = 2048;

/// Makes the chain of one part. With `write` all that forbids writing is an error; otherwise it is
/// a warning, or an answer of EIO for the clusters that it concerns.
pub fn chain(part: &OpenedPart, write: bool, warnings: &mut Vec<String>) -> Result<Chain> {
    let mut levels = Vec::with_capacity(part.files.len());
    for (number, file) in part.files.iter().enumerate() {
        let level = u16::try_from(number)
            .ok()
            .filter(|level| *level < u16::MAX)
            .map(Level::new)
            .ok_or_else(|| Error::why(ErrorKind::Unsupported, "more than 65534 deltas"))?;
        levels.push(open_level(file, level, write, warnings).map_err(|e| e.at_level(level))?);
    }
    let Some(top) = levels.last() else {
        return Err(Error::why(
            ErrorKind::Descriptor,
            "a part of the disk has no image",
        ));
    };
    let cluster = cluster_size(&levels, part.blocksize)?;
    let disk_len = disk_len(top, part, write, warnings)?;
    if write {
        check_writable(top)?;
    }
    warn_of_oddities(&levels, write, warnings);
    let top = Level::new(u16::try_from(levels.len() - 1).unwrap_or(u16::MAX));
    Ok(Chain {
        levels,
        geometry: Geometry {
            cluster,
            disk_len,
            top,
        },
    })
}

fn open_level(
    file: &OpenedFile,
    level: Level,
    write: bool,
    warnings: &mut Vec<String>,
) -> Result<Image> {
    let storage = Arc::clone(&file.storage);
    if file.plain == Plain::No {
        return Image::expanding(&file.path, storage);
    }
    let version = version_of(&storage).map_err(|e| e.in_file(&file.path))?;
    if version.is_some() {
        let says = "the descriptor calls this file plain, but it has the header of an image";
        if write {
            return Err(Error::why(ErrorKind::Descriptor, says)
                .in_file(&file.path)
                .fix("mount it read-only, or correct <Type> in the descriptor to Compressed"));
        }
        warnings.push(format!("{}: {says}; read as an image", file.path.display()));
        return Image::expanding(&file.path, storage);
    }
    if level != Level::BASE {
        return Err(
            Error::why(ErrorKind::Descriptor, "a plain image above another image")
                .in_file(&file.path)
                .fix("correct <Type> and <File> in the descriptor"),
        );
    }
    Image::plain(&file.path, storage)
}

fn cluster_size(levels: &[Image], blocksize: Option<u32>) -> Result<ClusterSize> {
    let mut found: Option<(&Image, ClusterSize)> = None;
    for image in levels {
        let Some(layout) = image.layout() else {
            continue;
        };
        let size = layout.cluster();
        match found {
            Some((other, first)) if first != size => {
                let why = format!(
                    "clusters of {} bytes here, of {} bytes in {}",
                    size.bytes(),
                    first.bytes(),
                    other.path().display()
                );
                return Err(Error::why(ErrorKind::Descriptor, why)
                    .in_file(image.path())
                    .fix(
                        "images of one chain have one cluster size: these do not belong together",
                    ));
            }
            Some(_) => {}
            None => found = Some((image, size)),
        }
    }
    let declared = blocksize.and_then(ClusterSize::from_sectors);
    match (found, declared) {
        (Some((image, size)), Some(declared)) if size != declared => {
            let why = format!(
                "the descriptor says clusters of {} bytes, the header {}",
                declared.bytes(),
                size.bytes()
            );
            Err(Error::why(ErrorKind::Descriptor, why)
                .in_file(image.path())
                .fix("correct <Blocksize> in the descriptor, if the image belongs there"))
        }
        (Some((_, size)), _) => Ok(size),
        (None, Some(declared)) => Ok(declared),
        (None, None) => ClusterSize::from_sectors(PLAIN_CLUSTER_SECTORS)
            .ok_or_else(|| Error::errno(libc::EINVAL)),
    }
}

/// Length of the part in bytes: what the top says, held against the descriptor.
fn disk_len(
    top: &Image,
    part: &OpenedPart,
    write: bool,
    warnings: &mut Vec<String>,
) -> Result<u64> {
    let declared = part
        .end
        .and_then(|end| end.get().checked_sub(part.start.get()))
        .and_then(|sectors| SectorCount::new(sectors).bytes());
    let own = match top.kind() {
        Kind::Plain => {
            // A plain file may end early: the rest of the disk reads as zeros.
            return Ok(declared.unwrap_or_else(|| top.len().get().next_multiple_of(SECTOR)));
        }
        Kind::Expanding(header) => header.size_bytes(),
    };
    let Some(declared) = declared.filter(|declared| *declared != own) else {
        return Ok(own);
    };
    let why = format!("the descriptor says {declared} bytes, the image's header {own}");
    if write {
        return Err(Error::why(ErrorKind::Descriptor, why)
            .in_file(top.path())
            .fix(
                "mount it read-only, which shows the smaller of the two; if the header is right: \
                 --trust-header",
            ));
    }
    warnings.push(format!(
        "{}: {why}; the smaller is shown",
        top.path().display()
    ));
    Ok(own.min(declared))
}

fn check_writable(top: &Image) -> Result<()> {
    let Some(refusal) = top
        .header()
        .and_then(crate::format::header::Header::write_refusal)
    else {
        return Ok(());
    };
    Err(crate::delta::image::header_error(refusal)
        .in_file(top.path())
        .fix("mount it read-only (`ploopfs mount -r`)"))
}

fn warn_of_oddities(levels: &[Image], write: bool, warnings: &mut Vec<String>) {
    let mut versions = Vec::new();
    for (number, image) in levels.iter().enumerate() {
        let Some(header) = image.header() else {
            continue;
        };
        versions.push(header.version());
        let is_top = number + 1 == levels.len();
        let path = image.path().display();
        if header.is_in_use() && !(is_top && write) {
            warnings.push(format!(
                "{path}: the in-use mark is set: the image is open elsewhere, or was not closed"
            ));
        }
        // A lower delta that is short of entries shows what is below it instead.
        if !(is_top && write) {
            warnings.extend(header.write_refusal().map(|why| format!("{path}: {why}")));
        }
        if is_top {
            let told = oddities::of(header)
                .into_iter()
                .filter(|odd| write || !odd.is_for_writers());
            warnings.extend(told.map(|odd| format!("{path}: {odd}")));
        }
    }
    if write && versions.windows(2).any(|pair| pair[0] != pair[1]) {
        warnings.push("the chain mixes versions 1 and 2, which kernel drivers refuse".to_owned());
    }
}
