//! Where log lines go: stderr while somebody reads it, syslog afterwards.
//!
//! Imports: `error` (its `Shown`).
//! Never: blocks or fails because nobody takes a log line; prints information lines at a user who
//! waits for a command.

use crate::error::Shown;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Record};
use parking_lot::Mutex;
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU8, Ordering};

const SYSLOG: &str = "/dev/log";
/// The facility `daemon`, shifted into its place.
const FACILITY: u8 = 3 << 3;

/// Stderr of a command: warnings and worse, for people.
const PLAIN: u8 = 0;
/// Stderr of a foreground daemon: everything that the level lets through.
const VERBOSE: u8 = 1;
/// Stderr that the journal reads: a priority in front of each line.
const JOURNAL: u8 = 2;
/// The syslog socket.
const DATAGRAM: u8 = 3;

static SINK: AtomicU8 = AtomicU8::new(PLAIN);

#[derive(Debug, Default)]
struct Pipe {
    socket: Mutex<Option<UnixDatagram>>,
}

impl Pipe {
    /// Sends one line; a syslog that was restarted is found again at the next line.
    fn send(&self, line: &[u8]) {
        let mut socket = self.socket.lock();
        if socket.is_none() {
            let connect = || -> io::Result<UnixDatagram> {
                let socket = UnixDatagram::unbound()?;
                socket.set_nonblocking(true)?;
                socket.connect(SYSLOG)?;
                Ok(socket)
            };
            *socket = connect().ok();
        }
        let result = socket.as_ref().map(|socket| socket.send(line));
        if let Some(Err(e)) = result {
            if e.kind() != io::ErrorKind::WouldBlock {
                *socket = None;
            }
        }
    }
}

impl Write for Pipe {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if SINK.load(Ordering::Relaxed) == DATAGRAM {
            self.send(line.trim_ascii_end());
        } else {
            // A closed stderr is no reason to fail.
            let _ = io::stderr().write_all(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// The text of a record as one harmless line: it holds names that others have chosen, and these
/// must not make lines of their own or paint a terminal.
struct OneLine<'a>(&'a fmt::Arguments<'a>);

struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write!(self.0, "{}", Shown(text))
    }
}

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaping(f).write_fmt(*self.0)
    }
}

fn format(out: &mut dyn Write, record: &Record<'_>, sink: u8) -> io::Result<()> {
    let severity = severity(record.level());
    let text = OneLine(record.args());
    match sink {
        DATAGRAM => {
            let (priority, pid) = (FACILITY | severity, std::process::id());
            writeln!(out, "<{priority}>ploopfs[{pid}]: {text}")
        }
        JOURNAL => writeln!(out, "<{severity}>{text}"),
        _ => match record.level() {
            Level::Error => writeln!(out, "ploopfs: error: {text}"),
            Level::Warn => writeln!(out, "ploopfs: warning: {text}"),
            _ if sink == PLAIN => Ok(()),
            _ => writeln!(out, "ploopfs: {text}"),
        },
    }
}

/// Starts logging. A foreground daemon shows all lines of its level on stderr, anything else only
/// warnings and errors until [`to_syslog`]. `PLOOPFS_LOG`, or `RUST_LOG`, overrides the level.
pub fn start(level: LevelFilter, foreground: bool) {
    let mut builder = Builder::new();
    builder
        .filter_level(level)
        .parse_env("RUST_LOG")
        .parse_env("PLOOPFS_LOG");
    let sink = match foreground {
        true if stderr_is_the_journal() => JOURNAL,
        true => VERBOSE,
        false => PLAIN,
    };
    SINK.store(sink, Ordering::Relaxed);
    builder.format(|out, record| format(out, record, SINK.load(Ordering::Relaxed)));
    builder.target(Target::Pipe(Box::new(Pipe::default())));
    // A second start in one process keeps the first.
    let _ = builder.try_init();
}

/// From now on log lines go to syslog: stderr belongs to somebody else again.
pub fn to_syslog() {
    SINK.store(DATAGRAM, Ordering::Relaxed);
}

fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else {
        return false;
    };
    stream == format!("{}:{}", stderr.dev(), stderr.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: Level, sink: u8) -> String {
        line_of(level, sink, "text")
    }

    fn line_of(level: Level, sink: u8, name: &str) -> String {
        let mut out = Vec::new();
        format(
            &mut out,
            &Record::builder()
                .level(level)
                .args(format_args!("{name}"))
                .build(),
            sink,
        )
        .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn names_make_no_lines() {
        for sink in [PLAIN, VERBOSE, JOURNAL, DATAGRAM] {
            let line = line_of(Level::Warn, sink, "a\n<0>b\u{1b}[31m\u{9b}1m\u{202e}c");
            let end = "a\\n<0>b\\u{1b}[31m\\u{9b}1m\\u{202e}c\n";
            assert!(line.ends_with(end), "{line:?}");
        }
    }

    #[test]
    fn lines_look_as_their_reader_expects() {
        let pid = std::process::id();
        assert_eq!(
            line(Level::Info, DATAGRAM),
            format!("<30>ploopfs[{pid}]: text\n")
        );
        assert_eq!(
            line(Level::Error, DATAGRAM),
            format!("<27>ploopfs[{pid}]: text\n")
        );
        assert_eq!(line(Level::Warn, JOURNAL), "<4>text\n");
        assert_eq!(line(Level::Warn, PLAIN), "ploopfs: warning: text\n");
        assert_eq!(line(Level::Info, PLAIN), "");
        assert_eq!(line(Level::Info, VERBOSE), "ploopfs: text\n");
    }

    #[test]
    fn nobody_listening_is_no_error() {
        SINK.store(DATAGRAM, Ordering::Relaxed);
        let written = Pipe::default().write(b"<30>ploopfs[1]: test\n");
        SINK.store(PLAIN, Ordering::Relaxed);
        assert_eq!(written.unwrap(), 21);
    }
}
