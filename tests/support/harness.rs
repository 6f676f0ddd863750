//! Turns functions into tests that are ignored, with a reason, where the host cannot run them.
//!
//! Imports: `probe`.
//! Never: lets a skip count as passed where `CI=true` or `PLOOPFS_REQUIRE` asks for the capability.

use super::probe::{self, Need};
use super::{Outcome, guards, rings};
use libtest_mimic::{Arguments, Completion, Trial};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Where all scratch directories of this run are.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("run-{}", std::process::id()))
}

/// The error by which a test says, while running, that this host cannot run it.
#[derive(Debug)]
struct Skip {
    reason: String,
    /// Not even CI can expect what is missing.
    excused: bool,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot run here: {}", self.reason)
    }
}

impl std::error::Error for Skip {}

/// Ends a test as ignored, with the reason; in CI as failed.
pub(crate) fn skip(reason: impl Into<String>) -> anyhow::Error {
    Skip {
        reason: reason.into(),
        excused: false,
    }
    .into()
}

/// The same for what is no part of the project and not to be had everywhere.
pub(crate) fn skip_excused(reason: impl Into<String>) -> anyhow::Error {
    Skip {
        reason: reason.into(),
        excused: true,
    }
    .into()
}

fn missing(need: Need) -> Option<&'static str> {
    static FOUND: OnceLock<BTreeMap<&'static str, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let asked = probe::ALL.iter().map(|need| (need.word(), need.missing()));
        asked
            .filter_map(|(word, missing)| missing.map(|why| (word, why)))
            .collect()
    });
    found.get(need.word()).map(String::as_str)
}

fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true")
}

fn required(need: Need) -> bool {
    let asked = std::env::var("PLOOPFS_REQUIRE").unwrap_or_default();
    in_ci()
        || asked
            .split(',')
            .any(|word| word.trim() == need.word() || word.trim() == "all")
}

/// Makes tests whose mounts go this way, with its name before theirs.
pub(crate) fn over(way: &'static str, trials: impl FnOnce() -> Vec<Trial>) -> Vec<Trial> {
    rings::over(Some(way), trials)
}

/// A test with what it needs.
pub(crate) fn trial(
    name: &str,
    needs: &'static [Need],
    test: impl FnOnce() -> Outcome + Send + 'static,
) -> Trial {
    let way = rings::way();
    let label = way.map_or(name.to_string(), |way| format!("{way}::{name}"));
    let more: &[Need] = way.map_or(&[], |_| &[Need::Root, Need::Rings]);
    Trial::ignorable_test(label.clone(), move || {
        for need in needs.iter().chain(more) {
            if let Some(why) = missing(*need) {
                let reason = format!("needs {}: {why}", need.word());
                if required(*need) {
                    return Err(format!("{reason} (and CI or PLOOPFS_REQUIRE asks for it)").into());
                }
                return Ok(skipped(&label, reason));
            }
        }
        let switched = way.map_or(Ok(()), |_| rings::on());
        match switched.and_then(|()| rings::over(way, test)) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => match error.downcast::<Skip>() {
                Ok(skip) if in_ci() && !skip.excused => Err(skip.to_string().into()),
                Ok(skip) => Ok(skipped(&label, skip.reason)),
                Err(error) => Err(format!("{error:#}").into()),
            },
        }
    })
}

fn skipped(name: &str, reason: String) -> Completion {
    // The usual output leaves the reason out, so it is said here.
    eprintln!("skipped {name}: {reason}");
    Completion::ignored_with(reason)
}

/// A test that needs nothing of the host and panics where it fails.
pub(crate) fn simulated(name: &str, test: fn()) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

/// Runs the tests, then fails if anything of theirs is left.
pub(crate) fn main(trials: Vec<Trial>) -> ! {
    main_then(trials, Vec::new)
}

/// The same with a last look at the whole, which tells what is wrong with it.
pub(crate) fn main_then(trials: Vec<Trial>, look: impl FnOnce() -> Vec<String>) -> ! {
    let mut args = Arguments::from_args();
    // Loop devices are few and most tests wait for a disk: more threads only make time limits lie.
    args.test_threads.get_or_insert(2);
    if !args.list {
        let can = probe::ALL.iter().map(|need| match missing(*need) {
            None => format!("{}=yes", need.word()),
            Some(why) => format!("{}=NO ({why})", need.word()),
        });
        eprintln!("capabilities: {}", can.collect::<Vec<_>>().join(" "));
    }
    let conclusion = libtest_mimic::run(&args, trials);
    let wrong = look();
    rings::off();
    let left = guards::leftovers();
    let _ = std::fs::remove_dir_all(root());
    if !wrong.is_empty() {
        eprintln!("wrong with the whole:\n  {}", wrong.join("\n  "));
        std::process::exit(101);
    }
    if !left.is_empty() {
        eprintln!("left over after the tests:\n  {}", left.join("\n  "));
        std::process::exit(102);
    }
    conclusion.exit()
}
