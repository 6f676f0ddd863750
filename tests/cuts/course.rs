//! One command on one disk, and all that may happen to it.

use crate::sim::directory::SimDirectory;
use crate::sim::faults::Nth;
use crate::sim::media::Media;
use crate::sim::storage::Manners;
use crate::world::{expect_sound, shows};
use ploopfs::admin::progress::Progress;
use ploopfs::error::{ErrorKind, Result};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a power cut leaves is tried so often at each moment.
const ATTEMPTS: u64 = 3;
/// What is between a target's name and the end of the one that it has until it is whole.
const UNFINISHED: &str = ".creating.";

/// Files and directories below a root, by path.
pub(crate) type Tree = BTreeMap<String, Option<Vec<u8>>>;
/// A command in a root directory.
pub(crate) type Act = dyn Fn(&SimDirectory, &Progress) -> Result<()> + Send + Sync;

/// What a command promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// It makes what has a name that begins with `dst`, of what is there before.
    Makes {
        /// Always the same bytes: nothing in it is random.
        same: bool,
    },
    /// It changes the bundle that is there.
    Changes,
    /// It changes the bundle, which was broken and could still be read.
    Mends,
}

/// A command on a disk.
pub(crate) struct Course {
    pub(crate) verb: &'static str,
    pub(crate) kind: String,
    pub(crate) old: Media,
    pub(crate) rule: Rule,
    pub(crate) manners: Manners,
    pub(crate) act: Box<Act>,
}

/// How much was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tally {
    pub(crate) cuts: u64,
    pub(crate) failures: u64,
    pub(crate) stops: u64,
}

/// What does not hold.
pub(crate) type Verdict = std::result::Result<(), String>;

fn hold(holds: bool, why: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(why()) }
}

/// The checks of a bundle panic; here that is a verdict like others.
fn told(check: impl FnOnce()) -> Verdict {
    catch_unwind(AssertUnwindSafe(check)).map_err(|why| {
        let text = why.downcast::<String>().map(|text| *text);
        text.unwrap_or_else(|_| "it fails".to_owned())
    })
}

impl Course {
    fn start(&self) -> SimDirectory {
        SimDirectory::with(&self.old, self.manners)
    }

    fn act(&self, host: &SimDirectory) -> Result<()> {
        (self.act)(host, &Progress::default())
    }

    /// Cuts, failures and wishes to stop at each operation.
    pub(crate) fn run(&self) -> std::result::Result<Tally, String> {
        let host = self.start();
        let done = self.act(&host);
        done.map_err(|e| format!("undisturbed: {e}"))?;
        let good = host.media();
        hold(self.differs(&good), || "nothing is done at all".to_owned())?;
        let mut tally = Tally::default();
        let mut dice = 1;
        let changes = host.world().changes();
        let operations = host.world().total();
        let last = host.world().moments().count() - 1;
        for (number, moment) in host.world().moments().enumerate() {
            for attempt in 0..ATTEMPTS {
                let left = moment.cut(&mut dice);
                let judged = self.judge(&left, &good, number == last);
                judged.map_err(|why| format!("cut {attempt} after change {number}: {why}"))?;
                tally.cuts += 1;
            }
        }
        // Anything can fail to be read or written; only what changes something can lack space.
        let failing = (0..operations).map(|number| self.failing(number, libc::EIO));
        let full = (0..changes).map(|number| self.full(number));
        for manners in failing.chain(full) {
            let judged = self.fail(manners, &good, &mut dice);
            judged.map_err(|why| format!("{:?}: {why}", manners.nth))?;
            tally.failures += 1;
        }
        for number in 0..changes {
            let stopped = self.stop(number, &good);
            let stopped = stopped.map_err(|why| format!("stopped at change {number}: {why}"))?;
            tally.stops += u64::from(stopped);
        }
        Ok(tally)
    }

    /// True for what moves or makes data: what changes no more than a table and a header may come
    /// out right whatever the order.
    pub(crate) fn is_safe_by_syncs(&self) -> bool {
        match self.verb {
            "compact" => self.kind.contains("defrag"),
            "resize" => self.kind.ends_with("grows") && !self.kind.starts_with("plain"),
            "repair" => self.kind.contains("shared"),
            _ => true,
        }
    }

    /// True when power cuts show that the host of these manners does not do as it says.
    pub(crate) fn notices(&self, manners: Manners) -> bool {
        let host = SimDirectory::with(&self.old, manners);
        if self.act(&host).is_err() {
            return false;
        }
        let good = host.media();
        let last = host.world().moments().count() - 1;
        let mut dice = 1;
        host.world().moments().enumerate().any(|(number, moment)| {
            let is_over = number == last;
            (0..2 * ATTEMPTS).any(|_| self.judge(&moment.cut(&mut dice), &good, is_over).is_err())
        })
    }

    fn failing(&self, number: u64, errno: i32) -> Manners {
        Manners {
            nth: Some(Nth {
                nth: number,
                errno,
                for_ever: false,
                of_all: true,
            }),
            ..self.manners
        }
    }

    /// The host has no space for this change.
    fn full(&self, number: u64) -> Manners {
        Manners {
            nth: Some(Nth {
                nth: number,
                errno: libc::ENOSPC,
                for_ever: false,
                of_all: false,
            }),
            ..self.manners
        }
    }

    fn differs(&self, good: &Media) -> bool {
        good.tree() != self.old.tree()
    }

    /// What must hold of what a cut has left.
    fn judge(&self, left: &Media, good: &Media, is_over: bool) -> Verdict {
        match self.rule {
            Rule::Makes { same } => self.judge_made(left, good, same, is_over),
            Rule::Changes | Rule::Mends => self.judge_changed(left, good, is_over),
        }
    }

    fn judge_made(&self, left: &Media, good: &Media, same: bool, is_over: bool) -> Verdict {
        let (made, rest) = parted(left.tree());
        let (whole, _) = parted(good.tree());
        self.expect_source(&rest)?;
        let is_there = like(&made, &whole, same);
        hold(is_there || made.is_empty() && !is_over, || {
            format!("a part of it: {:?}", made.keys())
        })?;
        for path in rest
            .keys()
            .filter(|path| !self.old.tree().contains_key(*path))
        {
            hold(
                path.starts_with("/dst") && path.contains(UNFINISHED),
                || format!("{path} is left"),
            )?;
        }
        let host = SimDirectory::on(left);
        match (is_there, self.act(&host)) {
            (true, Ok(())) => Err("it is made a second time".to_owned()),
            (true, Err(e)) => {
                hold(e.kind() == ErrorKind::Usage, || format!("repeated: {e}"))?;
                hold(host.media().tree() == left.tree(), || {
                    "a refused command changes something".to_owned()
                })
            }
            (false, Ok(())) => {
                let (made, rest) = parted(host.media().tree());
                self.expect_source(&rest)?;
                let mut left = rest.keys().filter(|path| path.contains(UNFINISHED));
                hold(left.next().is_none(), || {
                    "repeated, it leaves what was left".to_owned()
                })?;
                hold(like(&made, &whole, same), || {
                    "repeated, it ends otherwise".to_owned()
                })
            }
            (false, Err(e)) => Err(format!("repeated: {e}")),
        }
    }

    fn expect_source(&self, rest: &Tree) -> Verdict {
        for (path, bytes) in self.old.tree() {
            hold(rest.get(&path) == Some(&bytes), || {
                format!("{path} of the source is another")
            })?;
        }
        Ok(())
    }

    fn judge_changed(&self, left: &Media, good: &Media, is_over: bool) -> Verdict {
        self.judge_bundle(left, good, is_over, false)?;
        let host = SimDirectory::on(left);
        self.act(&host).map_err(|e| format!("repeated: {e}"))?;
        let now = host.media();
        self.judge_bundle(&now, good, true, true)
    }

    /// Every snapshot shows what it did before, or what it is to show.
    fn judge_bundle(&self, left: &Media, good: &Media, is_over: bool, closed: bool) -> Verdict {
        told(|| {
            if closed || self.rule == Rule::Changes {
                expect_sound(left, closed, "a check");
            }
            let (before, after) = (shows(&self.old, "before"), shows(good, "after"));
            let now = shows(left, "left");
            for (guid, bytes) in &now {
                let is_old = before.get(guid) == Some(bytes) && !is_over;
                let is_known = is_old || after.get(guid) == Some(bytes);
                assert!(is_known, "{guid} shows something else");
            }
            for guid in after.keys() {
                assert!(now.contains_key(guid), "{guid} is gone");
            }
            if closed {
                assert_eq!(plain_names(left), plain_names(good), "left over");
            }
        })
    }

    /// One operation fails.
    fn fail(&self, manners: Manners, good: &Media, dice: &mut u64) -> Verdict {
        let errno = manners.nth.map_or(0, |nth| nth.errno);
        let host = SimDirectory::with(&self.old, manners);
        let ended = self.act(&host);
        let left = host.media();
        if errno == libc::EIO {
            self.repeat(&left, good, ended.is_ok(), dice)?;
        }
        if let Rule::Makes { .. } = self.rule {
            return self.judge_failed_make(ended, errno, &left, good);
        }
        match ended {
            Ok(()) if self.is_announced(&left, good) => self.judge_bundle(&left, good, true, false),
            Ok(()) => self.judge_bundle(&left, good, true, true),
            Err(e) => {
                hold(e.kind() == ErrorKind::Io(errno), || format!("told as {e}"))?;
                self.judge_changed(&seen(&left), good, false)?;
                self.judge_changed(&left.cut(dice), good, false)
            }
        }
    }

    /// Repeated by a new process, which sees what the host has given up to write as if it were
    /// there; and when that is told to be done, it is, whatever the power does.
    fn repeat(&self, failed: &Media, good: &Media, is_done: bool, dice: &mut u64) -> Verdict {
        let host = SimDirectory::on(failed);
        let makes = matches!(self.rule, Rule::Makes { .. });
        match self.act(&host) {
            Err(e) if makes && is_done && e.kind() == ErrorKind::Usage => return Ok(()),
            done => done.map_err(|e| format!("repeated in the host's cache: {e}"))?,
        }
        let now = host.media();
        for attempt in 0..ATTEMPTS {
            let left = now.cut(dice);
            let judged = match makes {
                true => self.judge(&left, good, true),
                false => self.judge_repeated(&left, good),
            };
            judged.map_err(|why| format!("repeated, then cut {attempt}: {why}"))?;
        }
        Ok(())
    }

    /// What failed when all was done is told, and stays until the next change: the list of it is
    /// there, or the undo file of a repair.
    fn is_announced(&self, left: &Media, good: &Media) -> bool {
        let (now, good) = (plain_names(left), plain_names(good));
        let is_listed = now.iter().any(|name| name.ends_with(".pending"));
        (is_listed || self.rule == Rule::Mends) && good.iter().all(|name| now.contains(name))
    }

    /// A mark whose removal was the last thing that failed comes back with the cut. It tells
    /// nobody anything wrong: all that was done under it lasts.
    fn judge_repeated(&self, left: &Media, good: &Media) -> Verdict {
        told(|| expect_sound(left, false, "a check"))?;
        let is_clear = plain_names(left) == plain_names(good);
        hold(is_clear || self.is_announced(left, good), || {
            "left over".to_owned()
        })?;
        self.judge_bundle(left, good, true, false)
    }

    fn judge_failed_make(
        &self,
        ended: Result<()>,
        errno: i32,
        left: &Media,
        good: &Media,
    ) -> Verdict {
        let Err(e) = ended else {
            return self.judge_made(&seen(left), good, true, true);
        };
        hold(e.kind() == ErrorKind::Io(errno), || format!("told as {e}"))?;
        hold(left.tree() == self.old.tree(), || {
            format!("left: {:?}", left.names())
        })
    }

    /// The user asks to stop. True when that was in time.
    fn stop(&self, number: u64, good: &Media) -> std::result::Result<bool, String> {
        let host = self.start();
        let progress = Arc::new(Progress::default());
        host.world().cancel_after(number, &progress);
        let ended = (self.act)(&host, &progress);
        let left = seen(&host.media());
        let Err(e) = ended else {
            self.judge(&left, good, true)?;
            return Ok(false);
        };
        hold(e.kind() == ErrorKind::Interrupted, || {
            format!("told as {e}")
        })?;
        match self.rule {
            Rule::Makes { .. } => hold(left.tree() == self.old.tree(), || {
                format!("left: {:?}", left.names())
            })?,
            Rule::Changes => {
                told(|| expect_sound(&left, true, "a check"))?;
                self.judge_changed(&left, good, false)?;
            }
            Rule::Mends => self.judge_changed(&left, good, false)?,
        }
        Ok(true)
    }
}

/// What another process finds while the host goes on.
fn seen(media: &Media) -> Media {
    Media::of(&media.files(), media.trees())
}

/// The names but those of undo files, of which a repeated repair may make one more.
fn plain_names(media: &Media) -> Vec<String> {
    let names = media.names().into_iter().map(str::to_owned);
    names.filter(|name| !name.contains(".undo")).collect()
}

/// What is made, and the rest.
fn parted(tree: Tree) -> (Tree, Tree) {
    tree.into_iter()
        .partition(|(path, _)| path.starts_with("/dst") && !path.contains(UNFINISHED))
}

/// The same files, and where they are always the same, the same bytes.
fn like(made: &Tree, whole: &Tree, same: bool) -> bool {
    let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(Vec::len);
    match same {
        true => made == whole,
        false => {
            made.len() == whole.len()
                && made
                    .iter()
                    .zip(whole)
                    .all(|(a, b)| a.0 == b.0 && len(a.1) == len(b.1))
        }
    }
}
