//! Who keeps a mount busy: loop devices and processes with a file of it open.
//!
//! Imports: nothing of this crate.
//! Never: looks into the mount itself; only at the host's tables, as far as this user may.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Names are for people, so a long list helps nobody.
const NAMED_MAX: usize = 8;

fn below(path: &Path, mountpoint: &Path) -> bool {
    path.starts_with(mountpoint)
}

/// Loop devices over files of the mount, as `/dev/loop3`.
#[must_use]
pub fn loops(mountpoint: &Path) -> Vec<PathBuf> {
    let Ok(devices) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let over = |entry: fs::DirEntry| {
        let backing = fs::read(entry.path().join("loop/backing_file")).ok()?;
        let backing = Path::new(OsStr::from_bytes(backing.trim_ascii_end()));
        below(backing, mountpoint).then(|| Path::new("/dev").join(entry.file_name()))
    };
    devices.flatten().filter_map(over).collect()
}

/// The other processes of the host, with their directories in `/proc`.
fn others() -> impl Iterator<Item = (i32, PathBuf)> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let name = entry.file_name();
        let name = name.to_str().filter(|name| *name != own)?;
        Some((name.parse().ok()?, entry.path()))
    })
}

fn name_of(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

fn processes(mountpoint: &Path) -> Vec<String> {
    others()
        .filter(|(_, process)| uses(process, mountpoint))
        .map(|(pid, process)| format!("{} (pid {pid})", name_of(&process)))
        .collect()
}

/// Process ids and names of those who have this very file open, by whatever path.
#[must_use]
pub fn of_file(path: &Path) -> Vec<(i32, String)> {
    let Ok(wanted) = fs::metadata(path) else {
        return Vec::new();
    };
    let is_it = |process: &Path, number: &OsStr| {
        // Looking at a file of a stuck mount would hang, so ask the kernel for the inode first.
        let info = fs::read_to_string(process.join("fdinfo").join(number)).unwrap_or_default();
        inode_in(&info).is_some_and(|inode| inode == wanted.ino())
            && fs::metadata(process.join("fd").join(number))
                .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
    };
    let has_it = |process: &Path| {
        let mut files = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        files.any(|file| is_it(process, &file.file_name()))
    };
    others()
        .filter(|(_, process)| has_it(process))
        .map(|(pid, process)| (pid, name_of(&process)))
        .collect()
}

fn uses(process: &Path, mountpoint: &Path) -> bool {
    let leads_in = |link: &Path| fs::read_link(link).is_ok_and(|path| below(&path, mountpoint));
    if ["cwd", "root"]
        .iter()
        .any(|link| leads_in(&process.join(link)))
    {
        return true;
    }
    let Ok(files) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    files.flatten().any(|file| leads_in(&file.path()))
}

/// The inode of an open file, as kernels from 5.14 on tell it.
fn inode_in(info: &str) -> Option<u64> {
    info.lines()
        .find_map(|line| line.strip_prefix("ino:"))?
        .trim()
        .parse()
        .ok()
}

/// All who are known to use the mount, for a sentence; empty when nobody could be found.
#[must_use]
pub fn describe(mountpoint: &Path) -> String {
    let loops = loops(mountpoint);
    let mut names: Vec<String> = loops
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.extend(processes(mountpoint));
    let more = names.len().saturating_sub(NAMED_MAX);
    names.truncate(NAMED_MAX);
    if more > 0 {
        names.push(format!("{more} more"));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_its_inode() {
        assert_eq!(
            inode_in("pos:\t0\nflags:\t02\nmnt_id:\t9\nino:\t1063\n"),
            Some(1063)
        );
        assert_eq!(inode_in("pos:\t0\n"), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(
            of_file(file.path()).is_empty(),
            "this process itself does not count"
        );
        assert!(of_file(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn a_process_with_an_open_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = fs::File::create(directory.path().join("x")).unwrap();
        let process = PathBuf::from(format!("/proc/{}", std::process::id()));
        assert!(uses(&process, directory.path()));
        drop(file);
        assert!(!uses(&process, directory.path()));
        assert_eq!(describe(directory.path()), "");
    }
}
