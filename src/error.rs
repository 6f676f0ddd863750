//! What went wrong, and where: the one error type of every floor above the parsers.
//!
//! Imports: `units`.
//! Never: is matched by its text; `kind` alone drives the errno that the kernel is told and the
//! exit status of the program.
//!
//! An [`Error`] is a stable [`ErrorKind`], a [`Place`] (path, level, offset, cluster) that callers
//! fill in as the error passes them, and the cause below it. It shows as one line for people.

use crate::units::{DiskCluster, FileOffset, Level};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about an image that only its owner may have changed.
pub const REPAIR_HINT: &str = "`ploopfs check` tells what is wrong, `ploopfs repair` mends it; \
                               to read what is intact: `ploopfs mount -r`";

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The stable class of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host refused an operation; the raw errno is kept, so ENOSPC arrives as ENOSPC.
    Io(i32),
    /// A file ended before bytes that its own tables promise.
    Truncated,
    /// The bytes are not this image format at all.
    NotAnImage,
    /// A valid image or setting that this program does not handle in the way asked for.
    Unsupported,
    /// The image contradicts itself; only `repair` may change it.
    Corrupt,
    /// The in-use mark is set and the image needs more than the safe repairs.
    InUse,
    /// Another program holds a lock on the image.
    Locked,
    /// A dirty bitmap would become a lie by writing.
    BitmapPresent,
    /// A change was asked of something opened or stored read-only.
    ReadOnly,
    /// An earlier failed write or sync has turned the disk read-only.
    Latched,
    /// A position past the end of the disk.
    OutOfRange,
    /// A file that the disk needs does not exist.
    Missing,
    /// The descriptor cannot be understood or contradicts itself.
    Descriptor,
    /// A manifest of sums cannot be understood, or is not whole.
    Manifest,
    /// No snapshot has that GUID or name.
    NoSuchSnapshot,
    /// A name leads out of the bundle, or to something that is no plain file.
    OutsideBundle,
    /// The command line asks for something impossible.
    Usage,
    /// The mountpoint cannot be used as it is.
    Mountpoint,
    /// The host lacks a device, a helper program or a permission.
    Host,
    /// Something did not happen in the time allowed.
    TimedOut,
    /// The user stopped the operation by a signal.
    Interrupted,
}

impl ErrorKind {
    /// The word that `--json` output and scripts use; never changes once released.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Io(_) => "io",
            Self::Truncated => "truncated",
            Self::NotAnImage => "not-an-image",
            Self::Unsupported => "unsupported",
            Self::Corrupt => "corrupt",
            Self::InUse => "in-use",
            Self::Locked => "locked",
            Self::BitmapPresent => "bitmap-present",
            Self::ReadOnly => "read-only",
            Self::Latched => "latched",
            Self::OutOfRange => "out-of-range",
            Self::Missing => "missing",
            Self::Descriptor => "descriptor",
            Self::Manifest => "manifest",
            Self::NoSuchSnapshot => "no-such-snapshot",
            Self::OutsideBundle => "outside-bundle",
            Self::Usage => "usage",
            Self::Mountpoint => "mountpoint",
            Self::Host => "host",
            Self::TimedOut => "timed-out",
            Self::Interrupted => "interrupted",
        }
    }

    /// The class in words, for people.
    #[must_use]
    pub const fn phrase(self) -> &'static str {
        match self {
            Self::Io(_) => "the host refused the operation",
            Self::Truncated => "the file is too short",
            Self::NotAnImage => "not a ploop or Parallels image",
            Self::Unsupported => "not supported",
            Self::Corrupt => "corrupt image",
            Self::InUse => "the image was not closed cleanly",
            Self::Locked => "the image is locked",
            Self::BitmapPresent => "the image carries a dirty bitmap",
            Self::ReadOnly => "read-only",
            Self::Latched => "the disk refuses writes after an earlier failure",
            Self::OutOfRange => "position past the end of the disk",
            Self::Missing => "not found",
            Self::Descriptor => "bad disk descriptor",
            Self::Manifest => "bad manifest",
            Self::NoSuchSnapshot => "no such snapshot",
            Self::OutsideBundle => "refusing to open a file outside the bundle",
            Self::Usage => "wrong usage",
            Self::Mountpoint => "cannot use the mountpoint",
            Self::Host => "the host is missing something",
            Self::TimedOut => "timed out",
            Self::Interrupted => "stopped by a signal",
        }
    }
}

/// Where an error happened; what is not known stays empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The file, as the user would name it.
    pub path: Option<PathBuf>,
    /// The delta's level in its chain.
    pub level: Option<Level>,
    /// The byte position in the file.
    pub offset: Option<FileOffset>,
    /// The disk cluster.
    pub cluster: Option<DiskCluster>,
}

/// What went wrong, where, and why.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: ErrorKind,
    place: Place,
    why: Option<String>,
    fix: Option<String>,
    source: Option<Source>,
}

impl Error {
    /// An error of this kind at a place not yet known.
    #[must_use]
    pub fn new(kind: ErrorKind) -> Self {
        let inner = Inner {
            kind,
            place: Place::default(),
            why: None,
            fix: None,
            source: None,
        };
        Self {
            inner: Box::new(inner),
        }
    }

    /// An error of this kind that says why in words of its own.
    #[must_use]
    pub fn why(kind: ErrorKind, why: impl Into<String>) -> Self {
        let mut error = Self::new(kind);
        error.inner.why = Some(why.into());
        error
    }

    /// A host error with this errno.
    #[must_use]
    pub fn errno(errno: i32) -> Self {
        Self::from(io::Error::from_raw_os_error(errno))
    }

    /// Adds the cause below this error.
    #[must_use]
    pub fn because(mut self, source: impl Into<Source>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// Adds what the user can do about it; shown on a line of its own.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.inner.fix = Some(fix.into());
        self
    }

    /// Adds the file, unless a caller nearer to the fault has named one.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Self {
        self.inner.place.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Adds the level, unless it is known already.
    #[must_use]
    pub fn at_level(mut self, level: Level) -> Self {
        self.inner.place.level.get_or_insert(level);
        self
    }

    /// Adds the position in the file, unless it is known already.
    #[must_use]
    pub fn at_offset(mut self, offset: FileOffset) -> Self {
        self.inner.place.offset.get_or_insert(offset);
        self
    }

    /// Adds the disk cluster, unless it is known already.
    #[must_use]
    pub fn at_cluster(mut self, cluster: DiskCluster) -> Self {
        self.inner.place.cluster.get_or_insert(cluster);
        self
    }

    /// The stable class.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// Where it happened.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.inner.place
    }

    /// What the user can do, where something is known.
    #[must_use]
    pub fn fix_text(&self) -> Option<&str> {
        self.inner.fix.as_deref()
    }

    /// The reason in words, without the class and the place.
    #[must_use]
    pub fn why_text(&self) -> Option<String> {
        match (&self.inner.why, &self.inner.source) {
            (Some(why), Some(source)) => Some(format!("{why}: {source}")),
            (Some(why), None) => Some(why.clone()),
            (None, Some(source)) => Some(source.to_string()),
            (None, None) => None,
        }
    }

    /// True for the host's "no space left on device" and its quota sibling.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        matches!(self.kind(), ErrorKind::Io(libc::ENOSPC | libc::EDQUOT))
    }
}

impl From<io::Error> for Error {
    fn from(source: io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(errno) => ErrorKind::Io(errno),
            None if source.kind() == io::ErrorKind::UnexpectedEof => ErrorKind::Truncated,
            None => ErrorKind::Io(libc::EIO),
        };
        Self::new(kind).because(source)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inner.kind.phrase())?;
        if let Some(why) = self.why_text() {
            write!(f, ": {why}")?;
        }
        let place = &self.inner.place;
        let mut parts = Vec::new();
        if let Some(level) = place.level {
            parts.push(format!("level {level}"));
        }
        if let Some(path) = &place.path {
            parts.push(Shown(&path.display().to_string()).to_string());
        }
        if let Some(cluster) = place.cluster {
            parts.push(format!("cluster {cluster}"));
        }
        if let Some(offset) = place.offset {
            parts.push(format!("offset {:#x}", offset.get()));
        }
        if !parts.is_empty() {
            write!(f, " ({})", parts.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {self})", self.inner.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|source| source as _)
    }
}

/// Text of a file's choosing, made harmless for a terminal: names may hold line breaks, escape
/// sequences and marks that turn the direction of writing, which are shown as what they are.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            let turns = matches!(
                character,
                '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            );
            if character.is_control() || turns {
                write!(f, "{}", character.escape_default())?;
            } else {
                fmt::Write::write_char(f, character)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_place_wins_and_all_of_it_is_shown() {
        let error = Error::why(
            ErrorKind::Corrupt,
            "BAT entry 1041 points past the end of the file",
        )
        .at_level(Level::new(2))
        .at_offset(FileOffset::new(0x10a4))
        .in_file(Path::new("near.hds"))
        .in_file(Path::new("far.hdd"));
        assert_eq!(
            error.to_string(),
            "corrupt image: BAT entry 1041 points past the end of the file \
             (level 2, near.hds, offset 0x10a4)"
        );
    }

    #[test]
    fn names_cannot_write_to_the_terminal() {
        assert_eq!(
            Shown("a\nb\u{1b}[31m\u{202e}.hds").to_string(),
            "a\\nb\\u{1b}[31m\\u{202e}.hds"
        );
    }

    #[test]
    fn the_errno_survives() {
        assert!(Error::errno(libc::ENOSPC).is_no_space());
        assert_eq!(Error::errno(libc::EROFS).kind(), ErrorKind::Io(libc::EROFS));
    }
}
