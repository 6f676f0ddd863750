//! Other descriptors in a bundle's directory: an old one that somebody has kept, or that of another
//! disk. They say nothing of this disk; but the files that they name are not ours to remove.
//!
//! A descriptor that cannot be understood counts as naming every file whose name is in its text.
//! Not meant are the one before this one (`.Backup`) and the one that ploop is about to use
//! (`.tmp`): these are known.

use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::{Descriptor, Oddity};
use crate::format::xml;
use crate::storage::Directory;
use crate::storage::directory::read_small;
use std::collections::HashSet;
use std::path::Path;

/// More names that may be descriptors are too many to be read.
const READ_MAX: usize = 256;
/// How the root element begins, which tells that broken XML was meant for a descriptor.
const ROOTS: [&str; 2] = ["<Parallels_disk_image", "<Virtuozzo_disk_image"];

/// Another descriptor.
#[derive(Debug)]
pub struct OtherDescriptor {
    /// Its name in the directory.
    pub name: String,
    named: Named,
}

#[derive(Debug)]
enum Named {
    Files(HashSet<String>),
    /// What is in it, of which only names can be sought.
    Text(String),
}

impl OtherDescriptor {
    /// True where it names this file of the directory.
    #[must_use]
    pub fn needs(&self, file: &str) -> bool {
        match &self.named {
            Named::Files(files) => files.contains(file),
            Named::Text(text) => text.contains(file),
        }
    }

    fn read(name: &str, bytes: &[u8]) -> Option<Self> {
        let named = match Descriptor::parse(bytes) {
            Ok(found) => {
                let is_foreign = |odd: &Oddity| matches!(odd, Oddity::RootName(_));
                if found.oddities.iter().any(is_foreign) {
                    return None;
                }
                let images = found.parts.iter().flat_map(|part| &part.images);
                let last = images.filter_map(|image| Path::new(&image.file).file_name());
                Named::Files(last.map(|file| file.to_string_lossy().into()).collect())
            }
            Err(_) => {
                let text = String::from_utf8_lossy(bytes).into_owned();
                if !ROOTS.iter().any(|root| text.contains(root)) {
                    return None;
                }
                Named::Text(text)
            }
        };
        Some(Self {
            name: name.to_owned(),
            named,
        })
    }
}

/// The other descriptors among these names of a bundle's directory, where `own` is the bundle's.
pub fn other_descriptors(
    directory: &dyn Directory,
    names: &[String],
    own: &str,
) -> Result<Vec<OtherDescriptor>> {
    let is_xml = |name: &&String| {
        let end = name.rsplit_once('.').map(|(_, end)| end);
        end.is_some_and(|end| end.eq_ignore_ascii_case("xml")) && *name != own
    };
    let candidates: Vec<&String> = names.iter().filter(is_xml).collect();
    if candidates.len() > READ_MAX {
        let count = candidates.len();
        let why = format!("{count} names end in .xml, too many to see which files they need");
        return Err(Error::why(ErrorKind::Unsupported, why).fix("move them elsewhere first"));
    }
    let mut found = Vec::new();
    for name in candidates {
        let read = directory.open(name, false);
        let read = read.and_then(|file| read_small(&*file, xml::BYTES_MAX));
        match read {
            Ok(bytes) => found.extend(OtherDescriptor::read(name, &bytes)),
            // No file, or none any more.
            Err(e) if matches!(e.kind(), ErrorKind::OutsideBundle | ErrorKind::Missing) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}
