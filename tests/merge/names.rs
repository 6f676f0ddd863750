//! Names that somebody has chosen for new files of a bundle.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::harness::trial;
use crate::support::{Outcome, scratch};
use anyhow::ensure;
use libtest_mimic::Trial;
use ploopfs::admin::bundle::{Bundle, Files};
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::format::descriptor::Image;
use ploopfs::storage::SharedStorage;
use ploopfs::storage::directory::HostDirectory;
use std::fs;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("files_of_the_user_stay", &[], files_of_the_user_stay)]
}

#[derive(Debug)]
struct NoFiles;

impl Files for NoFiles {
    fn image(&self, _: &Image) -> Result<SharedStorage> {
        Err(Error::new(ErrorKind::Unsupported))
    }

    fn own_name(&self, _: &Image) -> Option<String> {
        None
    }
}

/// A merge into a new file was killed at some moment; then the user makes a file of that name.
fn files_of_the_user_stay() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    let spec = ImageSpec::new(2, 8, 240).mapping(Mapped::Percent(50));
    BundleSpec::chain(Style::Ploop, &spec, 2, |_, _| {}).write(&path)?;
    let host = HostDirectory::open(&path)?;
    let bundle = Bundle::open(&host, "DiskDescriptor.xml", &NoFiles)?;
    let list = path.join("DiskDescriptor.xml.pending");
    let (own, temporary) = (path.join("all.hds"), path.join("merging.x"));
    let names = ["merging.x".to_owned()];
    let begin = || -> Outcome {
        bundle.announce(&names)?;
        fs::write(&temporary, "half of it")?;
        Ok(())
    };
    // While it was filled.
    begin()?;
    fs::write(&own, "the user's")?;
    bundle.settle()?;
    ensure!(own.exists() && !temporary.exists() && !list.exists());
    fs::remove_file(&own)?;
    // When it had its name: it goes where it is the file that was listed.
    begin()?;
    bundle.name_new(&names, &[("merging.x", "all.hds")])?;
    ensure!(own.exists() && !temporary.exists() && list.exists());
    ensure!(!bundle.taken()?.contains(&"all.hds".to_owned()));
    bundle.settle()?;
    ensure!(!own.exists() && !list.exists());
    // And stays where the user has put another one in its place.
    begin()?;
    bundle.name_new(&names, &[("merging.x", "all.hds")])?;
    fs::remove_file(&own)?;
    fs::write(&own, "what the user has made")?;
    ensure!(bundle.taken()?.contains(&"all.hds".to_owned()));
    bundle.settle()?;
    ensure!(own.exists() && !list.exists());
    // A name that is taken meanwhile is not taken over.
    begin()?;
    let taken = bundle.name_new(&names, &[("merging.x", "all.hds")]);
    ensure!(taken.is_err_and(|e| e.kind() == ErrorKind::Io(libc::EEXIST)));
    bundle.settle()?;
    ensure!(own.exists() && !temporary.exists() && !list.exists());
    Ok(())
}
