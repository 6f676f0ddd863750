//! Has the mounts of a test go through rings, which the kernel must be told to offer.
//!
//! Imports: `command`, `harness` (to skip).
//! Never: leaves the kernel's switch other than it was, however this program ends.
//!
//! The switch is one for the whole host. A helper has a lock while it is on, so that no two runs
//! are in each other's way; it puts the switch back when it reads the end of its input, which comes
//! with the end of this program. Mounts that are made meanwhile and say nothing go through rings.

use super::harness::skip;
use anyhow::{Context, Result};
use parking_lot::Mutex;
use std::cell::Cell;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Whether the kernel offers rings to new mounts.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Waits for the lock, turns the switch on, and back when its input ends. The lock goes with it.
/// The file may be another user's: not even root may open it in a way that would make it
/// (`fs.protected_regular`), so that is done only where there is none.
const HELPER: &str = "trap '' HUP INT PIPE QUIT TERM
    lock=\"${TMPDIR:-/tmp}/ploopfs-enable-uring.lock\"
    test -e \"$lock\" || : >>\"$lock\"
    exec 9<\"$lock\" || exit 1
    flock -w 1500 9 || exit 1
    old=$(cat \"$1\") && echo Y >\"$1\" || exit 1
    echo on
    while read -r word; do :; done
    echo \"$old\" >\"$1\"";

static ON: Mutex<Option<Child>> = Mutex::new(None);

thread_local! {
    static WAY: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Why the host cannot do it; `None` where it can.
pub(crate) fn missing() -> Option<String> {
    let writable = nix::unistd::access(SWITCH, nix::unistd::AccessFlags::W_OK);
    writable.err().map(|errno| format!("{SWITCH}: {errno}"))
}

/// Has the kernel offer rings until [`off`] or the end of this program.
pub(crate) fn on() -> Result<()> {
    let mut helper = ON.lock();
    if helper.is_some() {
        return Ok(());
    }
    let mut child = Command::new("sh")
        .args(["-c", HELPER, "sh", SWITCH])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let stdout = child.stdout.take().context("no pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line != "on\n" {
        let _ = child.wait();
        return Err(skip(format!(
            "{SWITCH} cannot be turned on, or others have it"
        )));
    }
    *helper = Some(child);
    Ok(())
}

/// Puts the switch back.
pub(crate) fn off() {
    if let Some(mut child) = ON.lock().take() {
        drop(child.stdin.take());
        let _ = child.wait();
    }
}

/// Runs a test whose mounts go this way.
pub(crate) fn over<T>(way: Option<&'static str>, test: impl FnOnce() -> T) -> T {
    let before = WAY.replace(way);
    let done = test();
    WAY.set(before);
    done
}

/// What a command that mounts is told, so that no mount goes another way because the switch happens
/// to be on.
pub(crate) fn option() -> String {
    format!("--transport={}", way().unwrap_or("fuser"))
}

/// True where everything is asked for over rings as well.
pub(crate) fn are_asked_for() -> bool {
    std::env::var_os("PLOOPFS_TEST_RINGS").is_some()
}

/// The way that mounts of this thread go.
pub(crate) fn way() -> Option<&'static str> {
    WAY.get()
}
