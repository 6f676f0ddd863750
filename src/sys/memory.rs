//! How much memory the host lets this process have.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the two versions of control groups are found, and what they call the limit.
const V1: (&str, &str) = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes");
const V2: (&str, &str) = ("/sys/fs/cgroup", "memory.max");

/// The least memory limit, in bytes, of the control groups that this process is in; `None` where
/// there is none or it cannot be read. Read anew at each call: limits change, and processes move.
#[must_use]
pub fn cgroup_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().filter_map(limit_of_line).min()
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
    let mut least = None;
    let mut group = PathBuf::from(path.trim_start_matches('/'));
    loop {
        // In a container the path may be told from outside; what does not exist has no limit here.
        if let Some(limit) = read_limit(&Path::new(root).join(&group).join(file)) {
            least = Some(least.map_or(limit, |least: u64| least.min(limit)));
        }
        if !group.pop() {
            return least;
        }
    }
}

fn read_limit(path: &Path) -> Option<u64> {
    // "max", and numbers near the end of the number space, mean that there is no limit.
    let limit = fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()?;
    (limit < 1 << 60).then_some(limit)
}
