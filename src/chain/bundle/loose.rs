//! Images that no descriptor holds together: the user says which lies over which.

use super::files::{Opening, Registry, Wanted};
use super::find::{self, Found, Naming};
use super::{OpenedFile, role_in_bundle, with_hint};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::ImageType;
use std::path::PathBuf;

/// Opens and locks images by themselves, the lowest first, which is plain where that is said. With
/// `write` the lowest is opened for writing, and none may belong to a bundle: its descriptor would
/// be wrong then. Returns warnings too.
pub fn open_loose(
    paths: &[PathBuf],
    is_plain: bool,
    write: bool,
) -> Result<(Vec<OpenedFile>, Vec<String>)> {
    let registry = Registry::default();
    let mut opening = Opening::new(false, false, &registry);
    for (level, path) in paths.iter().enumerate() {
        let write = write && level == 0;
        let found = match find::find(path)? {
            Found::Image(path, _) => path,
            Found::Bundle { .. } => {
                let why = "a bundle cannot be merged with images by themselves";
                return Err(Error::why(ErrorKind::Usage, why).in_file(path));
            }
        };
        opening.add(Wanted {
            part: 0,
            file: find::open_image(&found, Naming::User, write)
                .map_err(|e| with_hint(e, write).in_file(path))?,
            path: found,
            guid: None,
            kind: if is_plain && level == 0 {
                ImageType::Plain
            } else {
                ImageType::Compressed
            },
            write,
        })?;
    }
    if let Some((path, role)) = paths
        .iter()
        .filter(|_| write)
        .find_map(|path| Some((path, role_in_bundle(path)?)))
    {
        let why = format!("the image is {role} of the bundle around it");
        return Err(Error::why(ErrorKind::Usage, why)
            .in_file(path)
            .fix("name the bundle, whose descriptor is changed too"));
    }
    let (mut chains, warnings) = opening.finish(1)?;
    Ok((chains.pop().unwrap_or_default(), warnings))
}
