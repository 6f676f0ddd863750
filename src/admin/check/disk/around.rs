//! What lies beside the images of a disk: left-overs, undo files, images that nothing names.

use super::Look;
use crate::admin::bundle;
use crate::admin::repair::{Saved, saved_names, saved_of};
use crate::chain;
use crate::chain::bundle::{OtherDescriptor, other_descriptors, unfinished};
use crate::delta::image::version_of;
use crate::error::{ErrorKind, Result, Shown};
use crate::format::descriptor::Descriptor;
use crate::journal::{self, RUNNING, is_journal};
use crate::plan::repair::Severity;
use crate::storage::Directory;
use crate::storage::beside::Home;
use crate::storage::directory::HostDirectory;
use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

/// Names of a directory that are looked at.
const NAMES_MAX: usize = 10_000;

impl Look<'_> {
    /// What lies beside an image, whatever name it was found by.
    pub(super) fn beside_image(&mut self, home: &Home) -> Result<()> {
        let Some(name) = home.name.to_str() else {
            return Ok(());
        };
        let saved = home.with(RUNNING);
        if saved.symlink_metadata().is_ok() {
            let text = self.interrupted(home, &format!("{name}{RUNNING}"), &saved);
            self.found(Severity::Corrupt, "left-over", text);
        }
        if !self.is_alone {
            return Ok(());
        }
        let directory = HostDirectory::open(&home.directory)?;
        let names = directory.entries()?;
        self.saved(&directory, name, &names);
        self.unfinished(&directory, &names, Some(name));
        for end in [".tmp", ".idx"] {
            if names.contains(&format!("{name}{end}")) {
                let text = format!("{name}{end} is left over from an operation of ploop");
                self.found(Severity::Leak, "left-over", text);
            }
        }
        Ok(())
    }

    /// What was interrupted, and what ends it.
    fn interrupted(&self, home: &Home, name: &str, path: &Path) -> String {
        let (image, path) = (self.image.display().to_string(), path.display().to_string());
        let (image, path) = (Shown(&image), Shown(&path));
        let repair = format!("`ploopfs repair {image}`");
        let undo = format!("`ploopfs repair --undo {path} {image}`");
        let directory = HostDirectory::open(&home.directory);
        let saved = directory.and_then(|directory| directory.open(name, false));
        match saved.and_then(|saved| journal::is_undoing(&*saved)) {
            Ok(true) => format!(
                "{path}: the undo of a repair was interrupted: {undo} goes on with it, {repair} \
                 mends the image instead"
            ),
            Ok(false) => format!(
                "{path}: a repair was interrupted: {repair} goes on with it, {undo} takes it back"
            ),
            Err(e) if e.kind() == ErrorKind::NotAnImage => format!(
                "{path}: a repair was interrupted before it changed anything: {repair} begins anew"
            ),
            Err(e) => {
                format!("{path}: a repair or an undo was interrupted: {repair} ends it ({e})")
            }
        }
    }

    /// What is left of the making of disks that was killed. What is not left of the making of this
    /// one, but of others in the same directory, is only told.
    fn unfinished(&mut self, directory: &HostDirectory, names: &[String], own: Option<&str>) {
        let of_own = own.map(|own| unfinished(names, Some(own)));
        for name in unfinished(names, None).into_iter().take(NAMES_MAX) {
            if own == Some(name) {
                continue;
            }
            // Whoever makes it has it locked.
            let is_left = || matches!(directory.hold(name, Instant::now()), Ok(Some(_)));
            if !self.options.no_lock && !is_left() {
                continue;
            }
            let is_own = of_own.as_ref().is_none_or(|own| own.contains(&name));
            let (severity, place) = match is_own {
                true => (Severity::Leak, name.to_owned()),
                false => (
                    Severity::Note,
                    directory.path().join(name).display().to_string(),
                ),
            };
            let text = format!(
                "{place}: the making of a disk was interrupted; making it again clears that away, \
                 and it can be removed"
            );
            self.found(severity, "left-over", text);
        }
    }

    /// The same around the directory of a bundle, as far as that can be seen.
    fn unfinished_around(&mut self, home: &Path) {
        let Ok(real) = std::fs::canonicalize(home) else {
            return;
        };
        let (Some(parent), Some(name)) = (real.parent(), real.file_name()) else {
            return;
        };
        let directory = HostDirectory::open(parent);
        if let Ok((directory, names)) = directory.and_then(|d| d.entries().map(|n| (d, n))) {
            self.unfinished(&directory, &names, Some(&name.to_string_lossy()));
        }
    }

    /// The undo files of repairs that were completed.
    fn saved(&mut self, directory: &HostDirectory, name: &str, names: &[String]) {
        for (file, saved) in saved_names(name, names) {
            // Nobody is told to remove what only has such a name.
            let is_one = || {
                directory
                    .open(file, false)
                    .is_ok_and(|file| is_journal(&*file))
            };
            if saved == Saved::Complete && is_one() {
                let text = format!("{file}: the undo file of a repair, to be removed at will");
                self.found(Severity::Note, "undo-file", text);
            }
        }
    }

    /// The undo file of an image that is none of the disk's, as of one that went with a snapshot.
    fn saved_of_strange(
        &mut self,
        directory: &HostDirectory,
        name: &str,
        is_known: impl Fn(&str) -> bool,
    ) {
        let Some((image, _)) = saved_of(name).filter(|(image, _)| !is_known(image)) else {
            return;
        };
        let file = directory.open(name, false);
        if file.is_ok_and(|file| is_journal(&*file)) {
            let text = format!(
                "{name}: the undo file of a repair of {image}, which is no image of this disk: to \
                 be removed at will"
            );
            self.found(Severity::Note, "undo-file", text);
        }
    }

    /// The other descriptors in a bundle's directory; none where they cannot be told.
    fn others(
        &mut self,
        directory: &HostDirectory,
        names: &[String],
        own: &str,
    ) -> Option<Vec<OtherDescriptor>> {
        match other_descriptors(directory, names, own) {
            Ok(others) => {
                for other in &others {
                    let text = format!(
                        "{} is a descriptor too; this is the disk of {own}, and files that the \
                         other one names are not removed",
                        other.name
                    );
                    self.found(Severity::Note, "other-descriptor", text);
                }
                Some(others)
            }
            Err(e) => {
                let text = format!("which files other descriptors need cannot be told: {e}");
                self.found(Severity::Note, "other-descriptor", text);
                None
            }
        }
    }

    /// Images that no snapshot names, and left-overs, in a bundle's directory.
    pub(super) fn beside_descriptor(
        &mut self,
        home: &Path,
        path: &Path,
        descriptor: &Descriptor,
    ) -> Result<()> {
        let directory = HostDirectory::open(home)?;
        let names = directory.entries()?;
        let images = descriptor.parts.iter().flat_map(|part| &part.images);
        let known: HashSet<&str> = images
            .filter_map(|image| Path::new(&image.file).file_name()?.to_str())
            .collect();
        for name in &known {
            self.saved(&directory, name, &names);
        }
        let own = path.file_name().and_then(|name| name.to_str());
        let descriptor_name = own.unwrap_or_default();
        let others = self.others(&directory, &names, descriptor_name);
        let is_needed = |name: &str| others.iter().flatten().any(|other| other.needs(name));
        let is_strange = |name: &&String| {
            !known.contains(name.as_str()) && own != Some(name) && !is_needed(name)
        };
        let strange: Vec<String> = names.iter().filter(is_strange).cloned().collect();
        for name in strange.iter().take(NAMES_MAX) {
            self.saved_of_strange(&directory, name, |image| {
                known.contains(image) || is_needed(image)
            });
        }
        self.unfinished(&directory, &strange, None);
        self.unfinished_around(home);
        for going in chain::bundle::going(home, descriptor_name, descriptor) {
            match going.waits {
                true => self.found(Severity::Note, "going", going.text),
                false => self.found(Severity::Leak, "left-over", going.text),
            }
        }
        let beside = [chain::bundle::NEW_LOCK, ".Backup.new", ".names.new"];
        let ends = [[bundle::NEW, bundle::PENDING].as_slice(), &beside].concat();
        let unfinished = unfinished(&strange, None);
        for name in strange.iter().take(NAMES_MAX) {
            if unfinished.contains(&name.as_str()) {
                continue;
            }
            let is_left = [".tmp", ".idx"].iter().any(|end| name.ends_with(end));
            if is_left {
                let text = format!("{name} is left over from an operation of ploop");
                self.found(Severity::Leak, "left-over", text);
            } else if ends
                .iter()
                .any(|end| *name == format!("{descriptor_name}{end}"))
            {
                let text = format!(
                    "{name}: a change of the bundle runs or was interrupted; repeating the \
                     command, or the next change, clears that away"
                );
                self.found(Severity::Leak, "left-over", text);
            } else if others.is_some() && is_image(&directory, name) {
                let text = format!("{name} is an image that no snapshot names");
                self.found(Severity::Leak, "orphan", text);
            }
        }
        Ok(())
    }
}

fn is_image(directory: &HostDirectory, name: &str) -> bool {
    let file = directory.open(name, false);
    file.is_ok_and(|file| matches!(version_of(&file), Ok(Some(_))))
}
