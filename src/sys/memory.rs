//! How much memory the host lets this process have.
//!
//! Looked at from the path of writes, so nothing here uses the heap.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Where the two versions of control groups are found, and what they call the limit.
const V1: (&str, &str) = ("/sys/fs/cgroup/memory", "/memory.limit_in_bytes");
const V2: (&str, &str) = ("/sys/fs/cgroup", "/memory.max");

/// The least memory limit, in bytes, of the control groups that this process is in; `None` where
/// there is none or it cannot be read. Read anew at each call: limits change, and processes move.
#[must_use]
pub fn cgroup_limit() -> Option<u64> {
    let mut text = [0; 4096];
    let groups = read_text(Path::new("/proc/self/cgroup"), &mut text)?;
    groups.lines().filter_map(limit_of_line).min()
}

/// The most bytes of memory that this process can ever have: all of the host's, or what its control
/// groups leave it. `None` where the host does not tell.
#[must_use]
pub fn most() -> Option<u64> {
    let all = nix::sys::sysinfo::sysinfo().ok();
    let all = all.map(|all| all.ram_total());
    all.into_iter().chain(cgroup_limit()).min()
}

/// True if one of the limits is of version 1. There, who asks for memory in a full group may have
/// to wait until other memory of the group has been written back.
#[must_use]
pub fn waits_for_write_back() -> bool {
    let mut text = [0; 4096];
    let groups = read_text(Path::new("/proc/self/cgroup"), &mut text);
    let mut lines = groups.unwrap_or_default().lines();
    lines.any(|line| !line.starts_with("0:") && limit_of_line(line).is_some())
}

/// Reads a small file; what does not fit is cut off.
fn read_text<'a>(path: &Path, text: &'a mut [u8]) -> Option<&'a str> {
    let mut file = File::open(path).ok()?;
    let mut len = 0;
    while len < text.len() {
        match file.read(&mut text[len..]).ok()? {
            0 => break,
            more => len += more,
        }
    }
    std::str::from_utf8(&text[..len]).ok()
}

/// A line is `number:controllers:path`; version 2 has number 0 and no controllers.
fn limit_of_line(line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (root, file) = if controllers.split(',').any(|name| name == "memory") {
        V1
    } else if number == "0" && controllers.is_empty() {
        V2
    } else {
        return None;
    };
    let mut least: Option<u64> = None;
    let mut group = path.trim_end_matches('/');
    loop {
        // In a container the path may be told from outside; what does not exist has no limit here.
        if let Some(limit) = read_limit(root, group, file) {
            least = Some(least.map_or(limit, |least| least.min(limit)));
        }
        match group.rfind('/') {
            Some(parent) => group = &group[..parent],
            None => return least,
        }
    }
}

fn read_limit(root: &str, group: &str, file: &str) -> Option<u64> {
    // Longer paths would not fit what the standard library opens without the heap either.
    let mut place = [0; 380];
    let mut rest = &mut place[..];
    write!(rest, "{root}{group}{file}").ok()?;
    let unused = rest.len();
    let path = OsStr::from_bytes(&place[..380 - unused]);
    let mut text = [0; 32];
    // "max", and numbers near the end of the number space, mean that there is no limit.
    let limit = read_text(Path::new(path), &mut text)?
        .trim()
        .parse::<u64>()
        .ok()?;
    (limit < 1 << 60).then_some(limit)
}
