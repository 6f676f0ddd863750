//! What people and programs get to read.
//!
//! Imports: `error`.
//! Never: panics because the reader has gone (`ploopfs list | head -1`).

use super::exit;
use crate::error::{Error, ErrorKind, Place, Shown};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};

/// A failed command: what it wanted to do, why it could not, what helps, and what state the data is
/// in. It can travel from a daemon to its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The stable word of the error's kind.
    pub kind: String,
    /// What could not be done, with the class of the reason.
    pub what: String,
    /// The reason.
    pub why: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// The state of the data.
    pub data: Option<String>,
    /// Exit status of the command.
    pub status: u8,
    /// Exit status of a mount(8) helper.
    pub helper_status: u8,
}

impl Report {
    /// A report from an error; `what` is the command, as `cannot mount disk.hdd`.
    #[must_use]
    pub fn new(what: &str, error: &Error) -> Box<Self> {
        let kind = error.kind();
        let place = place_text(error.place(), what);
        let why = match (error.why_text(), place) {
            (Some(why), Some(place)) => Some(format!("{why} ({place})")),
            (why, place) => why.or(place),
        };
        Box::new(Self {
            kind: kind.word().to_owned(),
            what: format!("{what}: {}", kind.phrase()),
            why,
            hint: error.fix_text().map(str::to_owned),
            data: None,
            status: exit::status(kind),
            helper_status: exit::helper_status(kind),
        })
    }

    /// The same, of a command that has not touched the data when the error is a refusal.
    #[must_use]
    pub fn refused(what: &str, error: &Error) -> Box<Self> {
        let mut report = Self::new(what, error);
        if exit::is_refusal(error.kind()) {
            report.data = Some("nothing was changed".into());
        }
        report
    }

    /// The same, of a command that is known not to have begun, whatever the error.
    #[must_use]
    pub fn unbegun(what: &str, error: &Error) -> Box<Self> {
        let mut report = Self::new(what, error);
        report.data = Some("nothing was changed".into());
        report
    }

    /// A report of wrong usage, which is found before anything is touched.
    #[must_use]
    pub fn usage(what: &str, why: impl Into<String>) -> Box<Self> {
        Self::refused(what, &Error::why(ErrorKind::Usage, why))
    }

    /// The text for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("ploopfs: {}\n", Shown(&self.what));
        // The reason holds names that others have chosen; a line break in one is no line of ours.
        if let Some(why) = &self.why {
            text.push_str(&format!("  why : {}\n", Shown(why)));
        }
        for (name, part) in [("fix ", &self.hint), ("data", &self.data)] {
            if let Some(part) = part {
                let lines: Vec<_> = part.lines().map(|line| Shown(line).to_string()).collect();
                text.push_str(&format!("  {name}: {}\n", lines.join("\n         ")));
            }
        }
        text
    }

    /// Prints it on stderr.
    pub fn print(&self, json: bool) {
        let text = if json {
            let Self {
                kind,
                what,
                why,
                hint,
                data,
                ..
            } = self;
            let error = serde_json::json!({
                "error": { "kind": kind, "what": what, "why": why, "hint": hint, "data": data }
            });
            format!("{error}\n")
        } else {
            self.text()
        };
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// Where it happened; a path that the command names already is left out.
fn place_text(place: &Place, what: &str) -> Option<String> {
    let mut parts = Vec::new();
    if let Some(level) = place.level {
        parts.push(format!("level {level}"));
    }
    if let Some(path) = &place.path {
        let path = path.display().to_string();
        if !what.contains(&path) {
            parts.push(path);
        }
    }
    if let Some(cluster) = place.cluster {
        parts.push(format!("cluster {cluster}"));
    }
    if let Some(offset) = place.offset {
        parts.push(format!("offset {:#x}", offset.get()));
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Writes to stdout. A reader that has gone ends the program quietly.
pub fn print(text: &str) {
    print_or_end(text, 0, exit::FAILED);
}

/// Writes a verdict to stdout, which the status gives as well: also where the reader has gone, and
/// where it cannot be written nothing passes for a verdict.
pub fn print_verdict(text: &str, status: u8) {
    print_or_end(text, status, exit::TROUBLE);
}

fn print_or_end(text: &str, gone: u8, failed: u8) {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(i32::from(gone)),
        Err(e) => {
            let _ = writeln!(io::stderr(), "ploopfs: cannot write the output: {e}");
            std::process::exit(i32::from(failed));
        }
    }
}

/// Writes a line to stderr that is no error.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "ploopfs: {text}");
}

/// What is said when a daemon takes its time.
#[must_use]
pub fn waiting(pid: i32) -> String {
    format!("waiting for process {pid} to close the image")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn an_error_says_what_why_fix_and_the_state_of_the_data() {
        let error = Error::why(ErrorKind::Locked, "pid 4711 writes to it")
            .in_file(Path::new("root.hds"))
            .fix("ploopfs umount /mnt/img\nor mount read-only: ploopfs mount -r ...");
        let report = Report::refused("cannot mount disk.hdd", &error);
        assert_eq!(
            report.text(),
            "ploopfs: cannot mount disk.hdd: the image is locked\n  \
             why : pid 4711 writes to it (root.hds)\n  \
             fix : ploopfs umount /mnt/img\n         \
             or mount read-only: ploopfs mount -r ...\n  \
             data: nothing was changed\n"
        );
        let io = Report::refused("cannot mount disk.hdd", &Error::errno(libc::EIO));
        assert_eq!(io.data, None, "after an I/O error nothing is promised");
        let usage = Report::usage("cannot mount disk.hdd", "unknown option 'x' after -o");
        assert_eq!(usage.data.as_deref(), Some("nothing was changed"));
    }
}
