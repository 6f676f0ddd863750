//! Shows how far a long command is, and takes the signals that ask for it or stop it.
//!
//! Imports: `admin`.
//! Never: writes to standard output; ends the program before a second wish to stop.
//!
//! [`Shown::start`] blocks the signals for the threads that start later and begins one thread of
//! its own, which waits for signals and draws ten times a second. So it comes before the first
//! other thread of the command, and after a fork. A bar appears on standard error after half a
//! second, where that is a terminal; `--progress` has it elsewhere too, as a line each second, or
//! not at all ([`When`]). SIGUSR1 prints one line wherever it leads. SIGINT, SIGTERM and SIGHUP set
//! the flag that the operation looks at, and their second one ends the program as if nobody had
//! taken it: what is on the disk is fit for that at any moment.
//!
//! Dropping it takes the bar away and lets signals do again what they did.

use super::size::show_size;
use crate::admin::progress::{Progress, Seen};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// When and how progress is shown: `--progress`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum When {
    /// A bar, on a terminal
    #[default]
    Auto,
    /// Also where there is no terminal, as lines
    Always,
    /// Not at all
    Never,
    /// As lines of JSON
    Json,
}

/// What the command line says.
static WHEN: OnceLock<When> = OnceLock::new();

/// Says how progress is shown from now on. Only the first word counts.
pub fn choose(when: When) {
    let _ = WHEN.set(when);
}

/// Between two lines.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Until here a command is no long one.
const SHOWN_AFTER: Duration = Duration::from_millis(500);
/// Between two looks.
const TICK_MS: u16 = 100;
const WITH_TOTAL: &str = "{msg} [{bar:30}] {percent:>3} %  {binary_bytes} of \
                          {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
const WITHOUT_TOTAL: &str = "{msg} {spinner}  {binary_bytes}  {binary_bytes_per_sec}";

/// The signal that stopped the command.
static STOPPED_BY: AtomicI32 = AtomicI32::new(libc::SIGINT);

/// The exit status of a command that a signal stopped.
#[must_use]
pub fn signal_status() -> u8 {
    u8::try_from(STOPPED_BY.load(Ordering::Relaxed))
        .unwrap_or(0)
        .saturating_add(128)
}

/// A progress that is being shown.
#[derive(Debug)]
pub struct Shown {
    progress: Arc<Progress>,
    /// Closed to end the thread.
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    before: Option<SigSet>,
}

impl Shown {
    /// Begins. With `quiet` nothing is written that `--progress` does not ask for by name, and
    /// signals stop the command all the same.
    ///
    /// Where the host has no descriptors or threads for it the command runs without.
    #[must_use]
    pub fn start(quiet: bool) -> Self {
        let mut this = Self {
            progress: Arc::default(),
            end: None,
            thread: None,
            before: None,
        };
        if let Err(e) = this.watch(quiet) {
            log::debug!("progress is not shown: {e}");
        }
        this
    }

    /// What the operation counts into.
    #[must_use]
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    fn watch(&mut self, quiet: bool) -> io::Result<()> {
        let taken = [
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGUSR1,
        ];
        let ignored = ignored()?;
        // Who started the program by nohup(1) does not want it to end by SIGHUP.
        let heeded = |signal: &Signal| !ignored.contains(signal);
        let signals: SigSet = taken.into_iter().filter(heeded).collect();
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let source = SignalFd::with_flags(&signals, flags)?;
        let (end, other_end) = UnixStream::pair()?;
        self.before = Some(SigSet::thread_get_mask()?);
        signals.thread_block()?;
        let mut watcher = Watcher {
            progress: Arc::clone(&self.progress),
            quiet,
            way: Way::of(WHEN.get().copied().unwrap_or_default(), quiet),
            told: None,
            began: Instant::now(),
            step_began: Instant::now(),
            step: 0,
            wishes: 0,
            bar: None,
        };
        let run = move || watcher.run(&source, &other_end);
        let name = std::thread::Builder::new().name("progress".into());
        self.thread = Some(name.spawn(run)?);
        self.end = Some(end);
        Ok(())
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Some(before) = self.before.take() {
            let _ = before.thread_set_mask();
        }
    }
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Nothing,
    Bar,
    Lines,
    Json,
}

impl Way {
    fn of(when: When, quiet: bool) -> Self {
        let is_terminal = io::stderr().is_terminal();
        match when {
            When::Never => Self::Nothing,
            When::Auto if quiet || !is_terminal => Self::Nothing,
            When::Auto => Self::Bar,
            When::Always if is_terminal => Self::Bar,
            When::Always => Self::Lines,
            When::Json => Self::Json,
        }
    }
}

/// What the thread has.
struct Watcher {
    progress: Arc<Progress>,
    quiet: bool,
    way: Way,
    /// When the last line was written.
    told: Option<Instant>,
    began: Instant,
    step_began: Instant,
    step: u64,
    /// How often somebody asked to stop.
    wishes: u32,
    bar: Option<ProgressBar>,
}

impl Watcher {
    /// Until the other end is closed. A signal that is pending then has its usual effect, once
    /// it is let through again.
    fn run(&mut self, signals: &SignalFd, end: &UnixStream) {
        loop {
            let mut waits = [
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(end.as_fd(), PollFlags::POLLIN),
            ];
            let woken = poll(&mut waits, PollTimeout::from(TICK_MS));
            let is_over = waits[1].revents().is_some_and(|what| !what.is_empty());
            if let Err(e) = woken {
                log::debug!("waiting for signals: {e}");
            }
            if is_over {
                break;
            }
            while let Ok(Some(signal)) = signals.read_signal() {
                let number = i32::try_from(signal.ssi_signo).unwrap_or(0);
                if let Ok(signal) = Signal::try_from(number) {
                    self.take(signal);
                }
            }
            self.draw();
        }
        self.tell();
        self.clear();
    }

    /// Writes a line, where lines are wanted.
    fn tell(&mut self) {
        let seen = self.seen();
        let render = match self.way {
            Way::Lines => line,
            Way::Json => json_line,
            Way::Nothing | Way::Bar => return,
        };
        if seen.step > 0 {
            let text = render(&seen, self.step_began.elapsed());
            let _ = io::stderr().write_all(text.as_bytes());
            self.told = Some(Instant::now());
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn take(&mut self, signal: Signal) {
        if signal == Signal::SIGUSR1 {
            let line = line(&self.seen(), self.step_began.elapsed());
            if !self.quiet {
                let write = || {
                    let _ = io::stderr().write_all(line.as_bytes());
                };
                match &self.bar {
                    Some(bar) => bar.suspend(write),
                    None => write(),
                }
            }
            return;
        }
        self.wishes = self.wishes.saturating_add(1);
        if self.wishes > 1 {
            self.clear();
            end_by(signal);
        }
        // The enumeration's own numbers are the host's.
        #[allow(clippy::as_conversions)]
        STOPPED_BY.store(signal as i32, Ordering::Relaxed);
        self.progress.cancel();
    }

    /// A look that notes when a step began.
    fn seen(&mut self) -> Seen {
        let seen = self.progress.seen();
        if seen.step != self.step {
            self.step = seen.step;
            self.step_began = Instant::now();
            if let Some(bar) = &self.bar {
                bar.reset();
            }
        }
        seen
    }

    fn draw(&mut self) {
        let seen = self.seen();
        if seen.step == 0 || self.began.elapsed() < SHOWN_AFTER {
            return;
        }
        match self.way {
            Way::Nothing => return,
            Way::Bar => {}
            Way::Lines | Way::Json => {
                if self.told.is_none_or(|told| told.elapsed() >= LINE_EVERY) {
                    self.tell();
                }
                return;
            }
        }
        let step_began = self.step_began;
        let bar = self.bar.get_or_insert_with(|| {
            let target = ProgressDrawTarget::stderr();
            ProgressBar::with_draw_target(None, target).with_elapsed(step_began.elapsed())
        });
        let (template, total) = match seen.total {
            0 => (WITHOUT_TOTAL, None),
            // Some steps find out as they go that there is more.
            total => (WITH_TOTAL, Some(total.max(seen.done))),
        };
        if bar.length() != total {
            let style = match total {
                Some(_) => ProgressStyle::default_bar(),
                None => ProgressStyle::default_spinner(),
            };
            // A template that does not parse is found by the test below.
            if let Ok(style) = style.template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            match total {
                Some(total) => bar.set_length(total),
                None => bar.unset_length(),
            }
        }
        if bar.message() != seen.what {
            bar.set_message(seen.what);
        }
        bar.set_position(seen.done);
        bar.tick();
    }
}

/// The signals that the program was started to ignore. Blocked, they would arrive all the same.
fn ignored() -> io::Result<Vec<Signal>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    let mask = mask.unwrap_or(0);
    // The enumeration's own numbers are the host's, and count from 1.
    #[allow(clippy::as_conversions)]
    let is_ignored = |signal: &Signal| mask >> (*signal as u32 - 1) & 1 == 1;
    Ok(Signal::iterator().filter(is_ignored).collect())
}

/// Ends the program as the signal would have, had nobody taken it.
fn end_by(signal: Signal) -> ! {
    let only: SigSet = [signal].into_iter().collect();
    let _ = raise(signal).and_then(|()| only.thread_unblock());
    // Only if the signal does not end programs here.
    std::process::exit(i32::from(signal_status()));
}

/// Bytes in a second, and the seconds that are left where the end is known.
fn pace(seen: &Seen, since: Duration) -> (u64, Option<u64>) {
    let millis = since.as_millis().max(1);
    let rate = u128::from(seen.done) * 1000 / millis;
    let rate = u64::try_from(rate).unwrap_or(u64::MAX);
    let rest = seen.total.saturating_sub(seen.done);
    (rate, rest.checked_div(rate).filter(|_| seen.total > 0))
}

/// What SIGUSR1 prints, and `--progress always` where there is no terminal.
fn line(seen: &Seen, since: Duration) -> String {
    let Seen {
        what, done, total, ..
    } = seen;
    if seen.step == 0 {
        return "ploopfs: nothing is done yet\n".to_owned();
    }
    let (rate, left) = pace(seen, since);
    let mut text = format!("ploopfs: {what}: {}", show_size(*done));
    if let Some(percent) = (u128::from(*done) * 100).checked_div(u128::from(*total)) {
        text.push_str(&format!(
            " of {} ({} %)",
            show_size(*total),
            percent.min(100)
        ));
    }
    text.push_str(&format!(", {}/s", show_size(rate)));
    if let Some(seconds) = left {
        text.push_str(&format!(", {seconds} s left"));
    }
    text.push('\n');
    text
}

/// What `--progress json` prints: one document a line.
fn json_line(seen: &Seen, since: Duration) -> String {
    let (rate, left) = pace(seen, since);
    let document = serde_json::json!({ "progress": {
        "what": seen.what,
        "done_bytes": seen.done,
        "total_bytes": (seen.total > 0).then_some(seen.total),
        "bytes_per_second": rate,
        "seconds_left": left,
    }});
    format!("{document}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_rate_and_time_left() {
        let seen = |done, total| Seen {
            step: 1,
            what: "copying".to_owned(),
            done,
            total,
        };
        let second = Duration::from_secs(1);
        assert_eq!(
            line(&seen(1 << 20, 4 << 20), second),
            "ploopfs: copying: 1 MiB of 4 MiB (25 %), 1 MiB/s, 3 s left\n"
        );
        assert_eq!(
            line(&seen(1 << 20, 0), second),
            "ploopfs: copying: 1 MiB, 1 MiB/s\n"
        );
        assert_eq!(
            line(&seen(0, 8), Duration::ZERO),
            "ploopfs: copying: 0 B of 8 B (0 %), 0 B/s\n"
        );
        let huge = line(&seen(u64::MAX, u64::MAX), Duration::ZERO);
        assert!(huge.contains("(100 %)"), "{huge}");
        assert!(line(&Seen::default(), second).contains("nothing"));
    }

    #[test]
    fn lines_of_json_have_the_same_numbers() {
        let seen = Seen {
            step: 1,
            what: "merging".to_owned(),
            done: 1000,
            total: 4000,
        };
        let text = json_line(&seen, Duration::from_secs(2));
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        let told = &found["progress"];
        assert_eq!(
            (&told["what"], &told["done_bytes"]),
            (&"merging".into(), &1000.into())
        );
        assert_eq!(
            (&told["bytes_per_second"], &told["seconds_left"]),
            (&500.into(), &6.into())
        );
        let open = json_line(&Seen { total: 0, ..seen }, Duration::from_secs(2));
        assert!(
            open.contains("\"total_bytes\":null") && open.ends_with("}}\n"),
            "{open}"
        );
    }

    #[test]
    fn progress_is_shown_where_it_is_wanted() {
        // Tests have no terminal, or one that is not written to.
        assert_eq!(Way::of(When::Never, false), Way::Nothing);
        assert_eq!(Way::of(When::Auto, true), Way::Nothing);
        for quiet in [false, true] {
            assert_eq!(Way::of(When::Json, quiet), Way::Json);
            assert_ne!(Way::of(When::Always, quiet), Way::Nothing);
        }
    }

    #[test]
    fn the_templates_parse() {
        for template in [WITH_TOTAL, WITHOUT_TOTAL] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }
}
