//! One kind of disk with all that is known of it, and the judges of what a command has left.
//!
//! Imports: `disk`, `kinds`, `peers`, `support`.
//! Never: believes what the program under test says of the content.

use crate::disk::{self, Contents, View, XML};
use crate::forge::reader;
use crate::kinds::{Form, Kind};
use crate::peers;
use crate::support::command::{self, Finished};
use crate::support::guards::text;
use crate::support::{Outcome, scratch_tmpfs};
use anyhow::{Context, Result, ensure};
use std::cell::Cell as Counter;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What a command's cell becomes; a reason where it makes no sense for the kind.
pub(crate) type Verdict = Result<Option<&'static str>>;

/// A disk of a kind, as it was made; commands get copies.
pub(crate) struct Case {
    pub(crate) kind: Kind,
    /// Never written again.
    pub(crate) stock: PathBuf,
    pub(crate) view: View,
    pub(crate) contents: Contents,
    scratch: tempfile::TempDir,
    count: Counter<usize>,
}

/// A copy of a disk that goes with it.
pub(crate) struct Copy {
    dir: PathBuf,
    pub(crate) disk: PathBuf,
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Copy {
    /// A path beside the disk, which goes with it.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory that holds the disk and all beside it.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Runs the program under test.
pub(crate) fn run(args: &[&str], disk: &Path, rest: &[&str]) -> Result<Finished> {
    command::run(command::ploopfs(args).arg(disk).args(rest))
}

/// The same, which must work.
pub(crate) fn does(args: &[&str], disk: &Path, rest: &[&str]) -> Result<String> {
    Ok(run(args, disk, rest)?.expect_code(0)?.text())
}

impl Case {
    /// Makes the disk and reads it.
    pub(crate) fn new(kind: Kind) -> Result<Self> {
        let scratch = scratch_tmpfs()?;
        let dir = scratch.path().join("stock");
        fs::create_dir(&dir)?;
        let stock = kind.make(&dir)?;
        let (view, contents) = (disk::view(&stock)?, disk::contents(&stock)?);
        for (guid, bytes) in &contents {
            fs::write(scratch.path().join(format!("{guid}.raw")), &bytes[..])?;
        }
        let case = Self {
            kind,
            stock,
            view,
            contents,
            scratch,
            count: Counter::new(0),
        };
        case.expect_different()?;
        Ok(case)
    }

    /// A disk whose snapshots are alike would pass whatever a command mixes up.
    fn expect_different(&self) -> Outcome {
        let different: BTreeSet<_> = self.contents.values().collect();
        ensure!(
            different.len() == self.contents.len(),
            "snapshots are alike"
        );
        let wanted = if self.kind.has_snapshots() { 5 } else { 1 };
        ensure!(different.len() == wanted, "{} snapshots", different.len());
        let is_empty = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        ensure!(!different.iter().any(|bytes| is_empty(bytes)));
        Ok(())
    }

    /// A number that none of the others got.
    pub(crate) fn number(&self) -> usize {
        self.count.set(self.count.get() + 1);
        self.count.get()
    }

    /// A copy to be changed.
    pub(crate) fn fresh(&self) -> Result<Copy> {
        let dir = self.scratch.path().join(format!("work{}", self.number()));
        fs::create_dir(&dir)?;
        let disk = dir.join(self.kind.file_name());
        disk::copy(&self.stock, &disk)?;
        Ok(Copy { dir, disk })
    }

    /// A plain file with what a snapshot shows.
    pub(crate) fn raw(&self, guid: &str) -> PathBuf {
        self.scratch.path().join(format!("{guid}.raw"))
    }

    /// What the top shows.
    pub(crate) fn top(&self) -> &[u8] {
        &self.contents[&self.view.top]
    }

    /// Options with which commands may drop the bitmap, where there is one.
    pub(crate) fn drops(&self) -> &'static [&'static str] {
        match self.kind.form {
            Form::Bitmap => &["--drop-bitmaps"],
            _ => &[],
        }
    }

    /// Everybody agrees about the disk: there are these snapshots, and they show this.
    pub(crate) fn expect(&self, disk: &Path, wanted: &Contents) -> Outcome {
        run(&["check"], disk, &[])?.expect_code(0)?;
        self.expect_by_others(disk, wanted)
    }

    /// The same without the program's own word.
    pub(crate) fn expect_by_others(&self, disk: &Path, wanted: &Contents) -> Outcome {
        let view = disk::view(disk)?;
        let found = disk::contents(disk)?;
        let names: Vec<_> = found.keys().collect();
        let expected: Vec<_> = wanted.keys().collect();
        ensure!(names == expected, "snapshots {names:?}, not {expected:?}");
        for (guid, bytes) in &found {
            disk::expect_same(guid, &wanted[guid], bytes)?;
        }
        expect_no_others(disk, &view)?;
        self.expect_peers(disk, &view, wanted)
    }

    /// The images that are not as they were made.
    fn changed(&self, view: &View) -> Result<Vec<PathBuf>> {
        let mut changed = Vec::new();
        for file in view.shots.iter().flat_map(|shot| &shot.files) {
            let name = file.file_name().context("a name")?;
            let old = if self.stock.is_dir() {
                self.stock.join(name)
            } else {
                self.stock.clone()
            };
            let is_old = *file != old && old.exists() && fs::read(file)? == fs::read(&old)?;
            if !is_old && reader::fields(&File::open(file)?)?.is_some() {
                changed.push(file.clone());
            }
        }
        Ok(changed)
    }

    fn expect_peers(&self, disk: &Path, view: &View, wanted: &Contents) -> Outcome {
        for image in self.changed(view)? {
            peers::qemu_check(&image)?;
            // It takes other marks than 0 for one that is not closed, and cuts bitmaps off.
            if reader::fields(&File::open(&image)?)?.is_some_and(|fields| fields.mark == 0) {
                peers::ploop_check(&image, self.scratch.path())?;
            }
        }
        // Neither of them knows disks of several parts.
        if view.shots[0].files.len() > 1 {
            return Ok(());
        }
        if disk.is_dir() {
            peers::ploop_list(disk, view)?;
        }
        // qemu is slow, so it reads the top and one more in turn.
        let frozen = view.frozen();
        let turn = self.number() % frozen.len().max(1);
        let others = frozen.get(turn).map(|shot| shot.guid.as_str());
        for guid in others.into_iter().chain([view.top.as_str()]) {
            let raw = self.raw(guid);
            let is_as_made = self.contents.get(guid) == wanted.get(guid);
            if is_as_made && raw.exists() {
                peers::qemu_compare(view, guid, &raw)?;
            } else {
                let raw = self.scratch.path().join("qemu.raw");
                fs::write(&raw, &wanted[guid][..])?;
                peers::qemu_compare(view, guid, &raw)?;
            }
        }
        Ok(())
    }

    /// The command says no, for this reason, and nothing is touched.
    pub(crate) fn refuses(&self, copy: &Copy, args: &[&str], rest: &[&str]) -> Outcome {
        let before = disk::traces(copy.dir())?;
        let done = run(args, &copy.disk, rest)?;
        ensure!(
            [1, 2].contains(&done.code()),
            "not refused: {}",
            done.story()
        );
        ensure!(!done.stderr.is_empty(), "no reason: {}", done.story());
        disk::expect_untouched(&before, copy.dir(), &done.line)
    }

    /// The command works and touches nothing, but for the lock file that a bundle may get from those
    /// who could write to it.
    pub(crate) fn looks(&self, copy: &Copy, args: &[&str], rest: &[&str]) -> Result<String> {
        let before = disk::traces(copy.dir())?;
        let done = run(args, &copy.disk, rest)?.expect_code(0)?;
        disk::expect_untouched(&before, copy.dir(), &done.line)?;
        Ok(done.text())
    }

    /// The command works, touches nothing and leaves nothing at all.
    pub(crate) fn reads(&self, copy: &Copy, args: &[&str], rest: &[&str]) -> Result<String> {
        let before = disk::traces(copy.dir())?;
        let said = self.looks(copy, args, rest)?;
        let same = disk::traces(copy.dir())? == before;
        ensure!(same, "{args:?} leaves something");
        Ok(said)
    }
}

/// Nothing is left in a bundle but what its descriptor names, and what belongs to that.
pub(crate) fn expect_no_others(disk: &Path, view: &View) -> Outcome {
    if !disk.is_dir() {
        return Ok(());
    }
    let images: BTreeSet<_> = view.shots.iter().flat_map(|shot| &shot.files).collect();
    for entry in fs::read_dir(disk)? {
        let path = entry?.path();
        let name = text(path.strip_prefix(disk)?).to_owned();
        let belongs = match name.strip_prefix(XML) {
            Some(end) => ["", ".lck", ".names", ".Backup"].contains(&end),
            // Parallels Desktop has an empty file of the bundle's own name.
            None => path.file_name() == disk.file_name(),
        };
        let is_mount = name.ends_with(".mnt") && path.is_dir();
        ensure!(
            belongs || is_mount || images.contains(&path),
            "{name} is left behind"
        );
    }
    Ok(())
}
