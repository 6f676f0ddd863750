//! An open image file whose header holds together, or a plain file without any.

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{HEADER_LEN, Header, HeaderError, RawHeader, Version};
use crate::format::layout::{BAT_PAGE_LEN, Layout, PageIndex};
use crate::planted::{Bug, planted};
use crate::storage::SharedStorage;
use crate::units::{FileOffset, len_u64, len_usize};
use std::path::{Path, PathBuf};

/// One file of a chain.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    storage: SharedStorage,
    len: FileOffset,
    kind: Kind,
}

/// What the file holds.
#[derive(Debug)]
pub enum Kind {
    /// The disk's bytes as they are ("plain", raw).
    Plain,
    /// Header, table and clusters ("expanding", "compressed").
    Expanding(Header),
}

/// Reads the magic of a file, if it has one; `None` for a file too short for any.
pub fn version_of(storage: &SharedStorage) -> Result<Option<Version>> {
    if storage.len()?.get() < len_u64(HEADER_LEN) {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_LEN];
    storage.read_at(FileOffset::ZERO, &mut bytes)?;
    Ok(Version::of(&bytes))
}

impl Image {
    /// Takes a file as plain bytes.
    pub fn plain(path: &Path, storage: SharedStorage) -> Result<Self> {
        let len = storage.len().map_err(|e| e.in_file(path))?;
        Ok(Self {
            path: path.to_owned(),
            storage,
            len,
            kind: Kind::Plain,
        })
    }

    /// Reads and checks the header of an expanding image.
    pub fn expanding(path: &Path, storage: SharedStorage) -> Result<Self> {
        let read = || -> Result<(FileOffset, Header)> {
            let len = storage.len()?;
            if len.get() < len_u64(HEADER_LEN) {
                return Err(header_error(HeaderError::Short { len: len.get() }));
            }
            let mut bytes = [0; HEADER_LEN];
            storage.read_at(FileOffset::ZERO, &mut bytes)?;
            let header = Header::validate(&RawHeader::decode(&bytes), len).map_err(header_error)?;
            Ok((len, header))
        };
        let (len, header) = read().map_err(|e| e.in_file(path))?;
        Ok(Self {
            path: path.to_owned(),
            storage,
            len,
            kind: Kind::Expanding(header),
        })
    }

    /// The same file as it is now, for who builds on it: what a killed program wrote is made
    /// durable, and after that, where the image was not closed or has no mark that could tell, it
    /// is read from the medium. After a failed sync the host's cache may hold what that does not.
    pub fn settled(&self) -> Result<Self> {
        let here = |e: Error| e.in_file(&self.path);
        self.storage.sync_data().map_err(here)?;
        let is_unsure = self.header().is_none_or(Header::is_in_use);
        if is_unsure && !planted(Bug::MergeBelievesCache) {
            if let Err(error) = self.storage.drop_cache() {
                log::debug!("{}: the host's cache stays: {error}", self.path.display());
            }
        }
        let storage = self.storage.clone();
        match self.kind {
            Kind::Plain => Self::plain(&self.path, storage),
            Kind::Expanding(_) => Self::expanding(&self.path, storage),
        }
    }

    /// The file's name, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    #[must_use]
    pub fn storage(&self) -> &SharedStorage {
        &self.storage
    }

    /// Length of the file when it was opened.
    #[must_use]
    pub fn len(&self) -> FileOffset {
        self.len
    }

    /// True for a file without bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == FileOffset::ZERO
    }

    /// What the file holds.
    #[must_use]
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The header, unless the file is plain.
    #[must_use]
    pub fn header(&self) -> Option<&Header> {
        match &self.kind {
            Kind::Plain => None,
            Kind::Expanding(header) => Some(header),
        }
    }

    /// The layout, unless the file is plain.
    #[must_use]
    pub fn layout(&self) -> Option<&Layout> {
        self.header().map(Header::layout)
    }

    /// Bytes of the disk that this file alone describes.
    #[must_use]
    pub fn disk_len(&self) -> u64 {
        match &self.kind {
            Kind::Plain => self.len.get(),
            Kind::Expanding(header) => header.size_bytes(),
        }
    }

    /// Reads one page of the table. Slots that hold no entry (the header's, those after the last)
    /// come back as 0, whatever the file has there.
    pub fn read_bat_page(&self, page: PageIndex, bytes: &mut [u8; BAT_PAGE_LEN]) -> Result<()> {
        bytes.fill(0);
        let Some(layout) = self.layout() else {
            return Ok(());
        };
        let range = layout.page_bytes(page);
        let within = len_usize(range.start.get() % len_u64(BAT_PAGE_LEN)).unwrap_or(0);
        let len = len_usize(range.end.get().saturating_sub(range.start.get())).unwrap_or(0);
        if len == 0 {
            return Ok(());
        }
        let target = bytes
            .get_mut(within..within + len)
            .ok_or_else(|| Error::errno(libc::EIO))?;
        self.storage
            .read_at(range.start, target)
            .map_err(|e| e.in_file(&self.path))
    }
}

/// The class that a bad header belongs to.
#[must_use]
pub fn header_error(error: HeaderError) -> Error {
    let kind = match error {
        HeaderError::Magic => ErrorKind::NotAnImage,
        HeaderError::Short { .. } | HeaderError::TableTruncated { .. } => ErrorKind::Truncated,
        HeaderError::ClusterSizeReadOnly(_)
        | HeaderError::FirstBlockUnaligned { .. }
        | HeaderError::FirstBlockMissing { .. }
        | HeaderError::Empty => ErrorKind::Unsupported,
        _ => ErrorKind::Corrupt,
    };
    let wrapped = Error::new(kind).because(error);
    match error {
        HeaderError::Magic => wrapped.fix("if it is a raw disk, say so with --format raw"),
        // Version 1 counts sectors and version 2 clusters: either reading could be wrong.
        HeaderError::Converting => wrapped.fix(
            "where a file of the image's name with .idx is left, ploop can take the conversion \
             back; else take the image from a copy",
        ),
        HeaderError::Short { .. } | HeaderError::TableTruncated { .. } => {
            wrapped.fix("the file was cut: take it from a copy")
        }
        _ if kind == ErrorKind::Corrupt => {
            wrapped.fix("nothing can be found by such a header: take the image from a copy")
        }
        _ => wrapped,
    }
}
