//! How a hostile image must be answered: refused unchanged, read without a change, or written.
//!
//! Imports: `forge`, `support`; `ploopfs` through its public rooms.
//! Never: takes an error for right that does not say what, where and what to do.

use crate::forge::content::{self, Model};
use crate::support::guards::{Mounted, text};
use crate::support::{self, Outcome, command};
use anyhow::{Context, Result, bail, ensure};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy};
use ploopfs::error::{Error, ErrorKind};
use ploopfs::units::DiskOffset;
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A row of the table of malformed input.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    /// Its number there.
    pub(crate) number: u8,
    /// What is wrong.
    pub(crate) name: &'static str,
    /// That it is answered rightly.
    pub(crate) test: fn() -> Outcome,
}

/// A row of the table.
pub(crate) const fn row(number: u8, name: &'static str, test: fn() -> Outcome) -> Row {
    Row { number, name, test }
}

/// Both ways to open a disk.
pub(crate) const BOTH: [bool; 2] = [false, true];

/// Bytes of a file that are compared; what is longer is sparse and compared by its size and times.
const COMPARED_MAX: u64 = 16 << 20;

/// A scratch directory, in memory where the host has one: most of these tests wait for nothing but
/// the disk otherwise.
pub(crate) fn room() -> Result<tempfile::TempDir> {
    support::scratch_tmpfs().or_else(|_| support::scratch())
}

/// Everything that a program could have changed about a file or directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct State {
    path: PathBuf,
    kind: u32,
    len: u64,
    blocks: u64,
    mtime: (i64, i64),
    bytes: Vec<u8>,
}

/// The state of all that is in a directory (or of one file). Lock files of ploop's are left out:
/// like ploop, whoever tries to write makes one.
pub(crate) fn state(path: &Path) -> Result<Vec<State>> {
    let mut found = Vec::new();
    let mut left = vec![path.to_path_buf()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path)?;
        let mut state = State {
            kind: meta.mode(),
            len: meta.len(),
            blocks: meta.blocks(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            bytes: Vec::new(),
            path: path.clone(),
        };
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
            // Lock files come and go in it.
            state.mtime = (0, 0);
            state.len = 0;
            state.blocks = 0;
        } else if meta.is_file() {
            let file = fs::File::open(&path)?;
            file.take(COMPARED_MAX).read_to_end(&mut state.bytes)?;
        }
        if path.extension().is_none_or(|e| e != "lck") {
            found.push(state);
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Fails if anything has changed since.
pub(crate) fn expect_unchanged(path: &Path, before: &[State]) -> Outcome {
    let after = state(path)?;
    let differs = before.iter().zip(&after).find(|(a, b)| a != b);
    if let Some((a, _)) = differs {
        bail!("{} was changed", a.path.display());
    }
    ensure!(before.len() == after.len(), "files came or went");
    Ok(())
}

/// What to open, and how.
pub(crate) fn selection(write: bool) -> Selection {
    Selection {
        write,
        ..Selection::default()
    }
}

/// Opens a disk as a mount does.
pub(crate) fn open(path: &Path, selection: &Selection) -> Result<(Arc<Disk>, Vec<String>), Error> {
    let options = DiskOptions {
        read_only: !selection.write,
        bat_cache: 1 << 20,
        pool_threads: 1,
        flush_interval_ms: 0,
        enospc: EnospcPolicy::Fail,
        ..DiskOptions::default()
    };
    let images = bundle::open(path, selection)?;
    disk::open(Arc::new(images), &options)
}

/// An error must be of this kind, hold all of the words, and say what to do.
pub(crate) fn expect_error(error: &Error, kind: ErrorKind, words: &[&str]) -> Outcome {
    let said = format!("{error}; {}", error.fix_text().unwrap_or_default());
    ensure!(
        error.kind() == kind,
        "{:?} instead of {kind:?}: {said}",
        error.kind()
    );
    for word in words {
        ensure!(said.contains(word), "nothing about {word:?}: {said}");
    }
    ensure!(
        error.fix_text().is_some(),
        "nothing about what to do: {said}"
    );
    ensure!(said.len() < 2000, "{} bytes of error", said.len());
    Ok(())
}

/// Must be refused in this way, by the library and by `ploopfs mount`, with nothing changed.
pub(crate) fn refused(path: &Path, write: bool, kind: ErrorKind, words: &[&str]) -> Outcome {
    refused_with(path, &selection(write), kind, words)
        .with_context(|| format!("{}, write: {write}", path.display()))
}

fn refused_with(path: &Path, how: &Selection, kind: ErrorKind, words: &[&str]) -> Outcome {
    let home = path.parent().context("a scratch path has a parent")?;
    let before = state(home)?;
    match open(path, how) {
        Ok((disk, notes)) => {
            let _ = disk.close();
            bail!("was opened, with notes {notes:?}");
        }
        Err(error) => expect_error(&error, kind, words)?,
    }
    expect_unchanged(home, &before)?;
    let at = support::scratch()?;
    let options: &[&str] = if how.write { &[] } else { &["-r"] };
    let said = Mounted::refused(at.path(), path, options)?;
    expect_calm(&said)?;
    let mut words = words.to_vec();
    words.extend([
        "ploopfs: cannot mount",
        "  fix : ",
        "  data: nothing was changed",
    ]);
    let squeezed = said.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
    for word in words {
        let word = word.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(
            squeezed.contains(&word),
            "nothing about {word:?}: {}",
            said.story()
        );
    }
    expect_unchanged(home, &before)
}

/// No panic, no signal, and nothing that could paint a terminal or forge a line of a log.
pub(crate) fn expect_calm(said: &command::Finished) -> Outcome {
    let code = said.code();
    ensure!(code == 0 || code == 1, "neither 0 nor 1: {}", said.story());
    ensure!(!said.stderr.contains("panicked"), "{}", said.story());
    let all = format!("{}{}", said.text(), said.stderr);
    let control = all
        .chars()
        .find(|c| c.is_control() && *c != '\n' && *c != '\t');
    ensure!(
        control.is_none(),
        "{control:?} got through: {}",
        said.story()
    );
    Ok(())
}

/// What `ploopfs info` says, in both forms; it must change nothing.
pub(crate) fn info(path: &Path) -> Result<(command::Finished, command::Finished)> {
    let home = path.parent().context("a scratch path has a parent")?;
    let before = state(home)?;
    let human = command::run(&mut command::ploopfs(&["info", "--", text(path)]))?;
    let json = command::run(&mut command::ploopfs(&["info", "--json", "--", text(path)]))?;
    expect_calm(&human)?;
    expect_calm(&json)?;
    expect_unchanged(home, &before).context("info")?;
    Ok((human, json))
}

/// What opening without a refusal gave.
pub(crate) struct Open {
    /// The disk.
    pub(crate) disk: Arc<Disk>,
    /// What the user is told.
    pub(crate) notes: Vec<String>,
    home: PathBuf,
    before: Vec<State>,
}

impl Open {
    /// Reads all of it.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>> {
        let size = usize::try_from(self.disk.size_bytes())?;
        let mut bytes = vec![0; size];
        self.disk.read_at(DiskOffset::new(0), &mut bytes)?;
        Ok(bytes)
    }

    /// Must tell all of these, each in one note.
    pub(crate) fn tells(self, words: &[&str]) -> Result<Self> {
        for word in words {
            ensure!(
                self.notes.iter().any(|note| note.contains(word)),
                "nothing about {word:?}: {:?}",
                self.notes
            );
        }
        Ok(self)
    }

    /// Must tell nothing.
    pub(crate) fn tells_nothing(self) -> Result<Self> {
        ensure!(self.notes.is_empty(), "was told: {:?}", self.notes);
        Ok(self)
    }

    /// Must show what the model says.
    pub(crate) fn shows(self, model: &Model) -> Result<Self> {
        ensure!(
            self.disk.size_bytes() == model.bytes(),
            "{} bytes instead of {}",
            self.disk.size_bytes(),
            model.bytes()
        );
        self.shows_bytes(&model.read(0, usize::try_from(model.bytes())?))
    }

    /// Must show these bytes.
    pub(crate) fn shows_bytes(self, want: &[u8]) -> Result<Self> {
        match content::first_difference(0, want, &self.bytes()?) {
            Some(difference) => bail!("{difference}"),
            None => Ok(self),
        }
    }

    /// Must show what the model says, except in these clusters, which must be errors.
    pub(crate) fn shows_all_but(self, model: &Model, bad: &[u64]) -> Result<Self> {
        let cluster = self.disk.cluster_bytes();
        let size = self.disk.size_bytes();
        for number in 0..size.div_ceil(cluster) {
            let at = number * cluster;
            let mut bytes = vec![0; usize::try_from(cluster.min(size - at))?];
            let read = self.disk.read_at(DiskOffset::new(at), &mut bytes);
            if bad.contains(&number) {
                let error = read
                    .err()
                    .with_context(|| format!("cluster {number} was read"))?;
                ensure!(
                    error.kind() == ErrorKind::Corrupt,
                    "cluster {number}: {error}"
                );
                continue;
            }
            read.with_context(|| format!("cluster {number}"))?;
            let want = model.read(at, bytes.len());
            if let Some(difference) = content::first_difference(at, &want, &bytes) {
                bail!("{difference}");
            }
        }
        Ok(self)
    }

    /// Ends the use of the disk, which must have left every byte as it was.
    pub(crate) fn unchanged(self) -> Outcome {
        self.disk.close()?;
        expect_unchanged(&self.home, &self.before)
    }

    /// Writes to a sector, reads it back, and closes. Everything else must stay.
    pub(crate) fn takes_a_write(self, sector: u64) -> Outcome {
        let mut want = self.bytes()?;
        let at = usize::try_from(sector * 512)?;
        want[at..at + 512].fill(0x77);
        self.disk
            .write_at(DiskOffset::new(sector * 512), &[0x77; 512])?;
        if let Some(difference) = content::first_difference(0, &want, &self.bytes()?) {
            bail!("after a write: {difference}");
        }
        self.disk.close()?;
        Ok(())
    }
}

/// Must open in this way.
pub(crate) fn opens(path: &Path, write: bool) -> Result<Open> {
    opens_with(path, &selection(write))
        .with_context(|| format!("{}, write: {write}", path.display()))
}

/// Must open with this selection.
pub(crate) fn opens_with(path: &Path, how: &Selection) -> Result<Open> {
    let home = path
        .parent()
        .context("a scratch path has a parent")?
        .to_path_buf();
    let (human, _) = info(path)?;
    human.expect_code(0)?;
    let before = state(&home)?;
    let (disk, notes) = open(path, how)?;
    Ok(Open {
        disk,
        notes,
        home,
        before,
    })
}
