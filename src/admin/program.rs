//! Other programs, run to their end.

use crate::error::{Error, ErrorKind, Result};
use crate::sys::process::with_plain_signals;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Between two looks at a running program.
const LOOK: Duration = Duration::from_millis(20);
/// What is kept of what a program says about a failure.
const SAID_MAX: u64 = 4096;

/// Another program, and what to do where it is missing.
pub(super) struct Program<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// The way to get it.
    pub(super) fix: &'a str,
}

/// What reads and writes the formats of others.
pub(super) const QEMU_IMG: Program<'_> = Program {
    name: "qemu-img",
    fix: "install it (Debian: qemu-utils), or use another format",
};

/// Runs a program, looking after it in between; a look that fails ends it. What it says to standard
/// error is the reason of a failure.
pub(super) fn run(
    command: &mut Command,
    program: &Program<'_>,
    mut look: impl FnMut(&mut Child) -> Result<()>,
) -> Result<()> {
    let name = program.name;
    command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let spawned = with_plain_signals(command).spawn();
    let mut child = spawned.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            Error::why(ErrorKind::Host, format!("{name} is not installed")).fix(program.fix)
        }
        _ => Error::why(ErrorKind::Host, format!("cannot run {name}")).because(e),
    })?;
    let said = child
        .stderr
        .take()
        .map(|pipe| std::thread::spawn(move || listen(pipe)));
    let mut end = || -> Result<ExitStatus> {
        loop {
            look(&mut child)?;
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(LOOK);
        }
    };
    let ended = end();
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let status = ended?;
    if status.success() {
        return Ok(());
    }
    // A signal from the terminal ends the program, too, and sooner than it is heard here.
    if status.signal().is_some() {
        std::thread::sleep(LOOK);
    }
    look(&mut child)?;
    let said = said.and_then(|thread| thread.join().ok());
    let said = said.unwrap_or_default();
    let said: Vec<&str> = said.lines().map(str::trim).collect();
    let why = format!("{name} failed ({status}): {}", said.join("; "));
    Err(Error::why(ErrorKind::Host, why))
}

/// The beginning of what a program says, which is read to its end so that it never has to wait.
fn listen(mut pipe: impl Read) -> String {
    let mut said = Vec::new();
    let _ = pipe.by_ref().take(SAID_MAX).read_to_end(&mut said);
    let _ = io::copy(&mut pipe, &mut io::sink());
    String::from_utf8_lossy(&said).trim().to_owned()
}
