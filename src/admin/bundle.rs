//! A bundle that is changed as a whole: its descriptor, and which files it has.
//!
//! The descriptor is the one place that says what the disk is, and it is replaced in one step: who
//! opens the bundle finds what was before or what is after. Files come before a descriptor that
//! names them, and go after one that does not. What is to come and to go is written down first, in
//! a list beside the descriptor; whatever of that list the descriptor does not name is waste, so
//! that the next change finds and removes what an interrupted one has left.
//!
//! A change, each step durable before the next begins:
//!
//! 1. [`Bundle::announce`]: the list of files that come and go. Later, and a power cut would leave
//!    files of which nobody knows whose they are.
//! 2. The caller makes new files, or changes some that the new descriptor will need.
//! 3. [`Bundle::replace`]: the new text beside the old, synced. A name that leads to a file without
//!    its bytes would leave no descriptor.
//! 4. The old text becomes the backup, where there is one, in the same way.
//! 5. The directory is synced: a descriptor must not name a file whose own name is lost.
//! 6. The new text takes the name of the old one, and the directory is synced: from then on the
//!    change is made. A file of the old disk that is removed before could be missing in it.
//! 7. [`Bundle::settle`]: what the descriptor does not name is removed, and at last the list. Were
//!    the list removed first, those files would stay for ever.

pub mod host;
mod pending;

use crate::admin::bundle::pending::{Listed, Pending};
pub use crate::chain::bundle::PENDING;
use crate::chain::bundle::{OtherDescriptor, other_descriptors};
use crate::error::{Error, ErrorKind, Result};
use crate::format::descriptor::edit::{Edit, EditError, edit};
use crate::format::descriptor::{Descriptor, Image};
use crate::format::{names, xml};
use crate::planted::{Bug, planted};
pub(super) use crate::storage::directory::read_small;
use crate::storage::directory::take_after;
use crate::storage::{Directory, SharedStorage, Storage};
use crate::units::{FileOffset, len_u64};
use std::path::Path;

/// What a new descriptor is named until it is the descriptor.
pub const NEW: &str = ".new";
/// What Parallels Desktop names the descriptor before this one.
pub const BACKUP: &str = ".Backup";

/// Opens the files that a descriptor names.
pub trait Files: std::fmt::Debug {
    /// Opens an image that nobody else uses, for reading and writing. The same file may be asked
    /// for more than once.
    fn image(&self, image: &Image) -> Result<SharedStorage>;

    /// The name in the bundle's directory of an image that has been opened, or `None` where the
    /// file is elsewhere.
    fn own_name(&self, image: &Image) -> Option<String>;

    /// Called before each change of the bundle, for whoever must keep others out of it first.
    fn claim(&self) -> Result<()> {
        Ok(())
    }
}

/// A bundle whose descriptor nobody else changes.
#[derive(Debug)]
pub struct Bundle<'a> {
    directory: &'a dyn Directory,
    files: &'a dyn Files,
    name: String,
    text: Vec<u8>,
    descriptor: Descriptor,
}

/// Why a descriptor was not replaced.
#[derive(Debug)]
pub enum Failure {
    /// All is as it was.
    Before(Error),
    /// The new descriptor is there, but a power cut may bring the old one back: nothing that either
    /// needs may be removed.
    Unsure(Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Before(error) => error,
            Failure::Unsure(error) => error.fix(
                "the change is made, but a power cut now could take it back; any other change of \
                 the disk makes it last; see how the disk is before repeating this one",
            ),
        }
    }
}

impl<'a> Bundle<'a> {
    /// Reads the descriptor of that name in a directory.
    pub fn open(directory: &'a dyn Directory, name: &str, files: &'a dyn Files) -> Result<Self> {
        let storage = directory.open(name, false)?;
        let text = read_small(&*storage, xml::BYTES_MAX)?;
        let descriptor = Descriptor::parse(&text).map_err(|e| {
            Error::new(ErrorKind::Descriptor)
                .because(e)
                .in_file(Path::new(name))
        })?;
        Ok(Self {
            directory,
            files,
            name: name.to_owned(),
            text,
            descriptor,
        })
    }

    /// What the descriptor says.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// True where ploop is in the middle of exchanging the base and the top, which none but it can
    /// end: the base then lacks what the top has.
    #[must_use]
    pub fn is_being_exchanged(&self) -> bool {
        let mark = b"<TemporaryZero";
        self.text.windows(mark.len()).any(|bytes| bytes == mark)
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &'a dyn Directory {
        self.directory
    }

    /// The files.
    #[must_use]
    pub fn files(&self) -> &'a dyn Files {
        self.files
    }

    /// The descriptor's name in the directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Finds out whether these changes can be made at all. Changes nothing.
    pub fn try_edits(&self, edits: &[Edit]) -> Result<()> {
        self.edited(edits)?;
        self.spare_others(edits)
    }

    /// Refuses where another descriptor of the directory needs what would be lost: the files of the
    /// images that go, and that of one which takes their content and the name of one of them.
    fn spare_others(&self, edits: &[Edit]) -> Result<()> {
        let is_gone = |edit: &Edit| matches!(edit, Edit::RemoveImages(_));
        if !edits.iter().any(is_gone) {
            return Ok(());
        }
        let others = self.others(&self.directory.entries()?)?;
        let images = self.descriptor.parts.iter().flat_map(|part| &part.images);
        for image in images.filter(|image| !others.is_empty() && is_lost(edits, image)) {
            let file = last_name(image).unwrap_or_default();
            if let Some(other) = others.iter().find(|other| other.needs(file)) {
                let other = &other.name;
                let why = format!("{file} would be lost, and {other} in the bundle names it too");
                let fix = format!(
                    "nothing was changed; if nobody needs what {other} describes, move it out of \
                     the bundle, else `ploopfs copy` this disk first"
                );
                return Err(Error::why(ErrorKind::Usage, why).fix(fix));
            }
        }
        Ok(())
    }

    fn others(&self, there: &[String]) -> Result<Vec<OtherDescriptor>> {
        other_descriptors(self.directory, there, &self.name)
    }

    /// The bundle as these changes would leave it, for whoever plans what comes after them. Changes
    /// nothing.
    pub fn preview(&self, edits: &[Edit]) -> Result<Self> {
        Ok(Self {
            directory: self.directory,
            files: self.files,
            name: self.name.clone(),
            text: self.edited(edits)?,
            descriptor: self.descriptor.edited(edits),
        })
    }

    fn edited(&self, edits: &[Edit]) -> Result<Vec<u8>> {
        let new = edit(&self.text, edits).map_err(|e| edit_error(e, &self.name))?;
        if len_u64(new.len()) > xml::BYTES_MAX {
            let why = "the descriptor would be longer than 1 MiB";
            return Err(Error::why(ErrorKind::Unsupported, why).in_file(Path::new(&self.name)));
        }
        Ok(new)
    }

    /// Removes what an interrupted change has left: files that the descriptor does not name, and a
    /// descriptor that was not finished. Nothing that another program left is touched.
    ///
    /// The directory is synced before that: a change that failed at its last sync may have left a
    /// descriptor that a power cut takes back, and the old one needs those files.
    pub fn settle(&self) -> Result<()> {
        if !planted(Bug::RenameNotSynced) {
            self.directory.sync()?;
        }
        let there = self.directory.entries()?;
        let mut left = self.waste(&there)?;
        let ends = ["", BACKUP, names::OWN_END, ".lck", PENDING];
        let small = ends.map(|end| format!("{}{end}{NEW}", self.name));
        left.extend(small.into_iter().filter(|name| there.contains(name)));
        let list = format!("{}{PENDING}", self.name);
        let has_list = there.contains(&list);
        if left.is_empty() && !has_list {
            return Ok(());
        }
        self.files.claim()?;
        for name in &left {
            match self.directory.remove(name) {
                // The lock file had this name until it was locked.
                Err(e) if e.kind() == ErrorKind::Missing => {}
                other => other?,
            }
        }
        if has_list {
            if !left.is_empty() {
                self.directory.sync()?;
            }
            self.directory.remove(&list)?;
        }
        self.directory.sync()
    }

    /// Files that an interrupted change has left and that nothing names.
    fn waste(&self, there: &[String]) -> Result<Vec<String>> {
        let list = format!("{}{PENDING}", self.name);
        if !there.contains(&list) {
            return Ok(Vec::new());
        }
        let storage = self.directory.open(&list, false)?;
        let pending = Pending::decode(&read_small(&*storage, xml::BYTES_MAX)?);
        let (mut waste, others) = (Vec::new(), self.others(there)?);
        let is_needed = |name: &str| others.iter().any(|other| other.needs(name));
        for listed in pending.map(|pending| pending.names).unwrap_or_default() {
            let name = listed.name().to_owned();
            let is_left = there.contains(&name) && !self.names(&name) && !is_needed(&name);
            if is_left && self.is_meant(&listed)? {
                waste.push(name);
            }
        }
        Ok(waste)
    }

    /// True where the file of a listed name is the one that was listed.
    fn is_meant(&self, listed: &Listed) -> Result<bool> {
        match listed {
            Listed::Name(_) => Ok(true),
            Listed::Proven(name, ..) => match self.proven(name, name) {
                Ok(found) => Ok(found == *listed),
                Err(e) if e.kind() == ErrorKind::OutsideBundle => Ok(false),
                Err(e) => Err(e),
            },
        }
    }

    /// What is listed of a file that has one name and is to have another.
    fn proven(&self, there: &str, name: &str) -> Result<Listed> {
        let file = self.directory.open(there, false)?;
        let inode = file.file_id().map(|id| id.inode);
        Ok(Listed::Proven(name.to_owned(), inode, file.len()?.get()))
    }

    /// The names that no new file may have.
    pub fn taken(&self) -> Result<Vec<String>> {
        let mut there = self.directory.entries()?;
        let waste = self.waste(&there)?;
        there.retain(|name| !waste.contains(name));
        Ok(there)
    }

    /// True for the descriptor itself and for every file that it names.
    fn names(&self, name: &str) -> bool {
        let images = self.descriptor.parts.iter().flat_map(|part| &part.images);
        let mut last = images.filter_map(last_name);
        name.starts_with(&self.name) || last.any(|own| own == name)
    }

    /// Step 1: writes down which files come and go.
    pub fn announce(&self, names: &[String]) -> Result<()> {
        // The change begins, whether or not there is anything to write down.
        self.files.claim()?;
        if names.is_empty() || planted(Bug::NothingAnnounced) {
            return Ok(());
        }
        let list = format!("{}{PENDING}", self.name);
        let names = names.iter().cloned().map(Listed::Name);
        let pending = Pending {
            names: names.collect(),
        };
        self.write_new(&list, &pending.encode(), None)?;
        self.directory.sync()
    }

    /// The end of step 2 for new files whose names somebody has chosen. Until they are whole they
    /// have others, which nobody would choose, from `names`, what was announced. Now the list also
    /// has the chosen names with what their files are, and then the files get them, which is
    /// durable with the next step. A name that is listed by itself might come to be a user's.
    pub fn name_new(&self, names: &[String], pairs: &[(&str, &str)]) -> Result<()> {
        if pairs.is_empty() {
            return Ok(());
        }
        let mut listed: Vec<Listed> = names.iter().cloned().map(Listed::Name).collect();
        for (temporary, name) in pairs {
            listed.push(self.proven(temporary, name)?);
        }
        let pending = Pending { names: listed };
        self.put(PENDING, &pending.encode())?;
        let mut pairs = pairs.iter();
        pairs.try_for_each(|(temporary, name)| self.directory.rename_new(temporary, name))
    }

    /// Replaces a small file beside the descriptor, or removes it where there are no bytes.
    pub fn put(&self, end: &str, bytes: &[u8]) -> Result<()> {
        let name = format!("{}{end}", self.name);
        self.files.claim()?;
        let there = self.directory.entries()?;
        if bytes.is_empty() {
            if there.contains(&name) {
                self.directory.remove(&name)?;
            }
            return self.directory.sync();
        }
        let new = format!("{name}{NEW}");
        if there.contains(&new) {
            self.directory.remove(&new)?;
        }
        let like = self.directory.open(&self.name, false)?;
        self.write_new(&new, bytes, Some(&*like))?;
        self.directory.rename(&new, &name)?;
        self.directory.sync()
    }

    /// Makes a file of these bytes, durable but for its name, with the owner and the mode of
    /// another one.
    fn write_new(&self, name: &str, bytes: &[u8], like: Option<&dyn Storage>) -> Result<()> {
        let new = self.directory.create_new(name)?;
        let write = || -> Result<()> {
            if let Some(like) = like {
                take_after(&*new, like)?;
            }
            new.write_at(FileOffset::ZERO, bytes)?;
            if like.is_some() && planted(Bug::DescriptorNotSynced) {
                return Ok(());
            }
            new.sync_data()
        };
        write().map_err(|e| {
            // What stays is found by the next change.
            let _ = self.directory.remove(name);
            e.in_file(Path::new(name))
        })
    }

    /// Steps 3 to 6: the descriptor with these changes takes the place of the one that is there.
    pub fn replace(&mut self, edits: &[Edit]) -> Result<(), Failure> {
        let new = self.edited(edits).map_err(Failure::Before)?;
        let descriptor = self.descriptor.edited(edits);
        self.files.claim().map_err(Failure::Before)?;
        self.prepare(&new).map_err(Failure::Before)?;
        let name = format!("{}{NEW}", self.name);
        if let Err(e) = self.directory.rename(&name, &self.name) {
            let _ = self.directory.remove(&name);
            return Err(Failure::Before(e));
        }
        self.text = new;
        self.descriptor = descriptor;
        if planted(Bug::RenameNotSynced) {
            return Ok(());
        }
        self.directory.sync().map_err(Failure::Unsure)
    }

    fn prepare(&self, new: &[u8]) -> Result<()> {
        let there = self.directory.entries()?;
        let has = |name: &str| there.iter().any(|found| found == name);
        let backup = format!("{}{BACKUP}", self.name);
        let names = [format!("{}{NEW}", self.name), format!("{backup}{NEW}")];
        for name in names.iter().filter(|name| has(name)) {
            self.directory.remove(name)?;
        }
        let old = self.directory.open(&self.name, false)?;
        self.write_new(&names[0], new, Some(&*old))?;
        if has(&backup) {
            let like = self.directory.open(&backup, false)?;
            self.write_new(&names[1], &self.text, Some(&*like))?;
            self.directory.rename(&names[1], &backup)?;
        }
        if planted(Bug::NamesNotSynced) {
            return Ok(());
        }
        self.directory.sync()
    }
}

fn last_name(image: &Image) -> Option<&str> {
    Path::new(&image.file).file_name()?.to_str()
}

/// True where a change takes an image away, or what it holds: where some go and another one gets
/// the name of the last of them, it has taken their content.
fn is_lost(edits: &[Edit], image: &Image) -> bool {
    edits.iter().any(|edit| match edit {
        Edit::RemoveImages(guid) => *guid == image.guid,
        Edit::RenameImages { from, to } => {
            *from == image.guid && edits.contains(&Edit::RemoveImages(*to))
        }
        _ => false,
    })
}

fn edit_error(error: EditError, name: &str) -> Error {
    Error::new(ErrorKind::Descriptor)
        .because(error)
        .in_file(Path::new(name))
        .fix("nothing was changed; the disk can be copied to a new bundle instead")
}
