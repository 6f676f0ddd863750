//! Who keeps a mount busy: loop devices and processes with a file of it open.
//!
//! Imports: nothing of this crate.
//! Never: looks into the mount itself; only at the host's tables, as far as this user may.

use std::fs;
use std::os::unix::ffi::OsStrExt;
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
        let backing = Path::new(std::ffi::OsStr::from_bytes(backing.trim_ascii_end()));
        below(backing, mountpoint).then(|| Path::new("/dev").join(entry.file_name()))
    };
    devices.flatten().filter_map(over).collect()
}

fn processes(mountpoint: &Path) -> Vec<String> {
    let own = std::process::id().to_string();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        if uses(&entry.path(), mountpoint) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(format!("{} (pid {pid})", name.trim_end()));
        }
    }
    found
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
