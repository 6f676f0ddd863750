//! Runs programs with a time limit and keeps what they say for the text of a failure.
//!
//! Imports: std, `anyhow`.
//! Never: waits for ever, even for a pipe that a left-over process holds open.

use anyhow::{Context, Result, bail, ensure};
use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

/// Longest that any helper command may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// What a finished program left behind.
#[derive(Debug)]
pub(crate) struct Finished {
    /// As typed.
    pub(crate) line: String,
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Its standard output.
    pub(crate) stdout: Vec<u8>,
    /// Its standard error.
    pub(crate) stderr: String,
}

impl Finished {
    /// Exit code, or -1 after a signal.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The whole story, for a failure's text.
    pub(crate) fn story(&self) -> String {
        let mut out = self.text();
        out.truncate(4000);
        format!(
            "`{}` ended with {}\n{}{}",
            self.line, self.status, out, self.stderr
        )
    }

    /// Fails unless it exited with this code.
    pub(crate) fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(
            self.code() == code,
            "expected exit code {code}: {}",
            self.story()
        );
        Ok(self)
    }

    /// Fails unless standard error holds each of the words.
    pub(crate) fn expect_words(self, words: &[&str]) -> Result<Self> {
        let said = self.stderr.to_lowercase();
        for word in words {
            ensure!(
                said.contains(&word.to_lowercase()),
                "nothing about {word:?}: {}",
                self.story()
            );
        }
        Ok(self)
    }
}

/// A command without standard input, in the C locale.
pub(crate) fn new(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .env_remove("PLOOPFS_LOG")
        .env_remove("RUST_LOG");
    command
}

/// Our own program.
pub(crate) fn ploopfs(args: &[&str]) -> Command {
    let mut command = new(super::PLOOPFS);
    command.args(args);
    command
}

/// A shell script with arguments `$1`...
pub(crate) fn sh(script: &str, args: &[&str]) -> Command {
    let mut command = new("sh");
    command.args(["-ec", script, "sh"]).args(args);
    command
}

fn drain(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = send.send(bytes);
    });
    receive
}

/// Runs to the end, whatever the exit code.
pub(crate) fn run(command: &mut Command) -> Result<Finished> {
    run_within(command, LIMIT)
}

/// The same with a limit of one's own.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Result<Finished> {
    let line = format!("{command:?}").replace('"', "");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run `{line}`"))?;
    let stdout = child
        .stdout
        .take()
        .map(drain)
        .context("no pipe for standard output")?;
    let stderr = child
        .stderr
        .take()
        .map(drain)
        .context("no pipe for standard error")?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            let said = stderr
                .recv_timeout(Duration::from_secs(1))
                .unwrap_or_default();
            let said = String::from_utf8_lossy(&said).into_owned();
            bail!("`{line}` did not end within {} s\n{said}", limit.as_secs());
        }
        // Short programs are the rule, so the first waits are short.
        thread::sleep(
            (started.elapsed() / 4).clamp(Duration::from_millis(1), Duration::from_millis(50)),
        );
    };
    let grace = Duration::from_secs(10);
    let held = || format!("`{line}` ended, but something still holds its output open");
    let stdout = stdout.recv_timeout(grace).with_context(held)?;
    let stderr = stderr.recv_timeout(grace).with_context(held)?;
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    Ok(Finished {
        line,
        status,
        stdout,
        stderr,
    })
}

/// Runs, must succeed, gives standard output.
pub(crate) fn ok(command: &mut Command) -> Result<String> {
    let done = run(command)?;
    ensure!(done.status.success(), "{}", done.story());
    Ok(done.text())
}

/// Tries until it succeeds or the limit passes; for what another process finishes a moment later.
pub(crate) fn eventually<T>(limit: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match ask() {
            Ok(value) => return Ok(value),
            Err(error) if started.elapsed() > limit => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}
