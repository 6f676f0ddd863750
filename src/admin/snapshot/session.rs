//! Snapshots of a bundle of the host: opened and locked, and the words that people use.

use super::{Created, Deletion, Losses, Merged, Names, Switched, Upper};
use crate::admin::bundle::{Bundle, host};
use crate::admin::progress::Progress;
use crate::chain::bundle::Changing;
use crate::error::{Error, ErrorKind, Result};
use crate::format::guid::Guid;
use crate::format::names;
use crate::sys::random;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The most bytes of a name.
const NAME_MAX: usize = 256;

/// A bundle that nobody else changes.
#[derive(Debug)]
pub struct Session {
    changing: Changing,
}

/// What is to be merged, as people say it.
#[derive(Clone, Debug, Default)]
pub struct MergeWish {
    /// GUID or name of the upper one; the top where none is given.
    pub snapshot: Option<String>,
    /// All that is below it, into the base.
    pub all: bool,
    /// The result is a new file of this name.
    pub into_new: Option<String>,
    /// What may be lost.
    pub losses: Losses,
}

/// A GUID that nobody else has.
fn new_guid() -> Result<Guid> {
    let bytes = random::sixteen().map_err(Error::from)?;
    Ok(Guid::random(bytes))
}

fn check_name(name: &str) -> Result<()> {
    let is_plain = !name.trim().is_empty() && name.trim() == name;
    let is_short = name.len() <= NAME_MAX;
    // A name that reads as something else could never be used.
    let is_word = name == crate::chain::bundle::LATEST || Guid::parse(name).is_some();
    if !is_plain || !is_short || is_word || name.chars().any(char::is_control) {
        let why = format!("{name:?} cannot be a snapshot's name");
        return Err(Error::why(ErrorKind::Usage, why)
            .fix("1 to 256 bytes, no control characters, no GUID, not `latest`"));
    }
    Ok(())
}

impl Session {
    /// Finds a bundle and locks it.
    pub fn open(image: &Path, allow_outside: &[PathBuf]) -> Result<Self> {
        let changing = Changing::open(image, allow_outside)?;
        Ok(Self { changing })
    }

    fn bundle(&self) -> Result<Bundle<'_>> {
        host::open(&self.changing)
    }

    /// Adds the bundle's place to the file that an error names.
    fn placed(&self, error: Error) -> Error {
        error.in_file(self.changing.directory().path())
    }

    /// What is odd about the bundle.
    pub fn warnings(&self) -> Result<Vec<String>> {
        Ok(self.changing.told(self.bundle()?.descriptor()))
    }

    /// The snapshot that a word means.
    pub fn find(&self, word: &str) -> Result<Guid> {
        let bundle = self.bundle()?;
        let found = self.changing.select(bundle.descriptor(), word);
        found.map_err(|e| self.placed(e))
    }

    /// The state of the disk becomes a snapshot of this name.
    pub fn create(&self, guid: Option<Guid>, name: Option<&str>) -> Result<Created> {
        if let Some(name) = name {
            check_name(name)?;
            self.free_name(name)?;
            self.changing.own_names()?;
        }
        let names = Names {
            snapshot: match guid {
                Some(guid) => guid,
                None => new_guid()?,
            },
            file: new_guid()?,
        };
        let mut bundle = self.bundle()?;
        let mut made = super::create(&mut bundle, names).map_err(|e| self.placed(e))?;
        if let Some(name) = name {
            if let Err(error) = self.write_name(&bundle, made.guid, name) {
                made.warnings.push(format!(
                    "the snapshot is made, but it got no name: {error}; `ploopfs snapshot rename` \
                     gives it one"
                ));
            }
        }
        Ok(made)
    }

    fn free_name(&self, name: &str) -> Result<()> {
        let bundle = self.bundle()?;
        let shots = &bundle.descriptor().snapshots;
        let names = self.changing.names();
        let mut others = shots.iter().filter_map(|shot| names.get(&shot.guid));
        if others.any(|other| other == name) {
            let why = format!("another snapshot is named {name:?}");
            return Err(Error::why(ErrorKind::Usage, why));
        }
        Ok(())
    }

    /// A snapshot has this name from now on, for people.
    pub fn rename(&self, word: &str, name: &str) -> Result<Guid> {
        check_name(name)?;
        let guid = self.find(word)?;
        let bundle = self.bundle()?;
        if guid == bundle.descriptor().top {
            let why = "the top is the disk itself, and no snapshot";
            return Err(self.placed(Error::why(ErrorKind::Usage, why)));
        }
        if self
            .changing
            .names()
            .get(&guid)
            .is_some_and(|own| own == name)
        {
            // An earlier attempt may have failed to make that last.
            bundle.settle()?;
            return Ok(guid);
        }
        self.free_name(name)?;
        self.write_name(&bundle, guid, name)?;
        Ok(guid)
    }

    fn write_name(&self, bundle: &Bundle<'_>, guid: Guid, name: &str) -> Result<()> {
        let mut own = self.changing.own_names()?;
        own.retain(|guid, _| {
            bundle
                .descriptor()
                .snapshots
                .iter()
                .any(|s| s.guid == *guid)
        });
        own.insert(guid, name.to_owned());
        bundle.put(names::OWN_END, &names::encode_own(&own))
    }

    /// The names of snapshots that are gone go too. Without them nothing is lost.
    fn forget_names(&self) -> Result<()> {
        let own = self.changing.own_names()?;
        let bundle = self.bundle()?;
        let shots = &bundle.descriptor().snapshots;
        let left: HashMap<Guid, String> = own
            .iter()
            .filter(|(guid, _)| shots.iter().any(|shot| shot.guid == **guid))
            .map(|(guid, name)| (*guid, name.clone()))
            .collect();
        if left.len() == own.len() {
            return Ok(());
        }
        let bytes = if left.is_empty() {
            Vec::new()
        } else {
            names::encode_own(&left)
        };
        bundle.put(names::OWN_END, &bytes)
    }

    /// The same, and what is to be told where it fails.
    fn names_left(&self) -> Option<String> {
        let error = self.forget_names().err()?;
        Some(format!(
            "the names of what is gone are still there, which does no harm: {error}"
        ))
    }

    /// What a switch would do besides. Refuses what [`Self::switch`] would refuse.
    pub fn plan_switch(&self, target: Guid, keep: bool) -> Result<Switched> {
        let kept = if keep { Some(new_guid()?) } else { None };
        let planned = super::plan_switch(&self.bundle()?, target, new_guid()?, kept);
        planned.map_err(|e| self.placed(e))
    }

    /// The disk becomes what it was in a snapshot. With it, the GUID that the top is kept under, if
    /// it is.
    pub fn switch(
        &self,
        word: &str,
        keep: bool,
        progress: &Progress,
    ) -> Result<(Created, Option<Guid>)> {
        let target = self.find(word)?;
        let kept = if keep { Some(new_guid()?) } else { None };
        let mut bundle = self.bundle()?;
        let made = super::switch(&mut bundle, target, new_guid()?, kept, progress);
        let mut made = made.map_err(|e| self.placed(e))?;
        made.warnings.extend(self.names_left());
        Ok((made, kept))
    }

    /// What a deletion would do.
    pub fn plan_delete(&self, target: Guid, losses: Losses) -> Result<Deletion> {
        super::plan_delete(&self.bundle()?, target, losses).map_err(|e| self.placed(e))
    }

    /// A snapshot goes. With it, what could not be done after that.
    pub fn delete(
        &self,
        target: Guid,
        losses: Losses,
        progress: &Progress,
    ) -> Result<(Deletion, Vec<String>)> {
        let mut bundle = self.bundle()?;
        let done = super::delete(&mut bundle, target, losses, progress);
        let (done, mut warnings) = done.map_err(|e| self.placed(e))?;
        warnings.extend(self.names_left());
        Ok((done, warnings))
    }

    fn upper(&self, wish: &MergeWish) -> Result<Upper> {
        let snapshot = wish.snapshot.as_deref();
        Ok(Upper {
            snapshot: snapshot.map(|word| self.find(word)).transpose()?,
            all: wish.all,
            into_new: wish.into_new.clone(),
            losses: wish.losses,
        })
    }

    /// What a merge would do.
    pub fn plan_merge(&self, wish: &MergeWish) -> Result<Merged> {
        let upper = self.upper(wish)?;
        super::plan_merge(&self.bundle()?, &upper).map_err(|e| self.placed(e))
    }

    /// Merges. With it, what could not be done after that.
    pub fn merge(&self, wish: &MergeWish, progress: &Progress) -> Result<(Merged, Vec<String>)> {
        let upper = self.upper(wish)?;
        let mut bundle = self.bundle()?;
        let done = super::merge(&mut bundle, &upper, progress);
        let (done, mut warnings) = done.map_err(|e| self.placed(e))?;
        warnings.extend(self.names_left());
        Ok((done, warnings))
    }
}
