//! Lets one thread run at a time; the seed says which.
//!
//! The threads are real, but only the one that holds the baton goes on. It gives the baton away
//! where the code under test comes to a point at which another could go first: at locks, at
//! operations on files, and where it waits. Time stands still but for a little at each such point;
//! when everybody waits for something, it jumps to the first of the times they wait for.

use super::heap::{self, Ration};
use crate::forge::content::splitmix;
use parking_lot::{Condvar, Mutex};
use ploopfs::sync::{self, Scheduler};
use std::cell::Cell;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Points without an end of the run after which it counts as hung.
const POINTS_MAX: u64 = 3_000_000;

/// Of 256 points, how many hold the thread up for long.
const SLOW: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ready,
    /// Cannot go on before another thread has run.
    Blocked,
    Waits {
        event: usize,
        until: Option<Duration>,
    },
    Ended,
}

#[derive(Debug)]
struct State {
    dice: u64,
    /// Of 256 points, how many change the thread.
    restless: u64,
    now: Duration,
    threads: Vec<Status>,
    running: usize,
    points: u64,
    /// All decisions so far, in one number.
    trace: u64,
}

/// The scheduler of one run.
#[derive(Debug)]
pub(crate) struct Baton {
    start: Instant,
    state: Mutex<State>,
    turns: Mutex<Vec<Arc<Condvar>>>,
    /// What to say when nothing goes on any more.
    story: String,
    ration: Option<&'static Ration>,
    /// Threads that panicked.
    panicked: Mutex<Vec<String>>,
    me: Weak<Baton>,
}

/// How a run went.
#[derive(Debug)]
pub(crate) struct Run<T> {
    /// What its first thread returned.
    pub(crate) result: T,
    /// All decisions as one number.
    pub(crate) trace: u64,
    /// The other threads that panicked.
    pub(crate) panicked: Vec<String>,
}

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Runs `body` on a new first thread under a new baton, until all threads have ended. The disk's
/// own thread gets its memory from `ration`.
pub(crate) fn run<T: Send>(
    seed: u64,
    restless: u64,
    ration: Option<&'static Ration>,
    story: &str,
    body: impl FnOnce() -> T + Send,
) -> Run<T> {
    let baton = Arc::new_cyclic(|me| Baton {
        start: Instant::now(),
        state: Mutex::new(State {
            dice: seed ^ 0x5eed,
            restless,
            now: Duration::ZERO,
            threads: vec![Status::Ready],
            running: 0,
            points: 0,
            trace: 0,
        }),
        turns: Mutex::new(vec![Arc::default()]),
        story: story.to_owned(),
        ration,
        panicked: Mutex::default(),
        me: Weak::clone(me),
    });
    let first = Arc::clone(&baton);
    let result = std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            first.enter(0);
            let result = body();
            while first.others_left() {
                first.wait(0, Some(first.now() + Duration::from_millis(1)));
            }
            sync::set_scheduler(None);
            result
        });
        thread.join()
    });
    let result = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let trace = baton.state.lock().trace;
    let panicked = std::mem::take(&mut *baton.panicked.lock());
    Run {
        result,
        trace,
        panicked,
    }
}

impl Baton {
    /// Makes the calling thread one of those that this baton runs.
    fn enter(self: &Arc<Self>, number: usize) {
        NUMBER.set(number);
        sync::set_scheduler(Some(Arc::clone(self) as Arc<dyn Scheduler>));
    }

    fn others_left(&self) -> bool {
        let state = self.state.lock();
        state.threads[1..]
            .iter()
            .any(|status| *status != Status::Ended)
    }

    /// The calling thread is now `status`; whoever is next goes on.
    fn give_way(&self, status: Status) {
        heap::with(None, || self.change(status));
    }

    fn change(&self, status: Status) {
        let me = NUMBER.get();
        let mut state = self.state.lock();
        debug_assert_eq!(state.running, me, "only one thread runs");
        state.threads[me] = status;
        if status != Status::Blocked {
            for other in &mut state.threads {
                if *other == Status::Blocked {
                    *other = Status::Ready;
                }
            }
        }
        self.count_point(&mut state);
        let next = self.choose(&mut state);
        state.trace = state.trace.wrapping_mul(0x100_0000_01b3) ^ next as u64;
        state.running = next;
        state.threads[next] = Status::Ready;
        if next == me {
            return;
        }
        let turn = Arc::clone(&self.turns.lock()[next]);
        turn.notify_one();
        if status == Status::Ended {
            return;
        }
        let mine = Arc::clone(&self.turns.lock()[me]);
        while state.running != me {
            mine.wait(&mut state);
        }
    }

    fn count_point(&self, state: &mut State) {
        state.points += 1;
        if state.points > POINTS_MAX {
            self.give_up("it never ends", state);
        }
        state.now += Duration::from_micros(splitmix(&mut state.dice) % 200);
        for status in &mut state.threads {
            if let Status::Waits {
                until: Some(until), ..
            } = status
            {
                if *until <= state.now {
                    *status = Status::Ready;
                }
            }
        }
    }

    /// Any thread that can go on; if there is none, the first whose time comes.
    fn choose(&self, state: &mut State) -> usize {
        let ready = |state: &State| {
            let threads = state.threads.iter().enumerate();
            threads
                .filter(|(_, status)| **status == Status::Ready)
                .count()
        };
        if ready(state) == 0 {
            let times = state.threads.iter().filter_map(|status| match status {
                Status::Waits { until, .. } => *until,
                _ => None,
            });
            let Some(first) = times.min() else {
                self.give_up("nobody can go on", state);
            };
            state.now = state.now.max(first);
            for status in &mut state.threads {
                if matches!(status, Status::Waits { until: Some(until), .. } if *until <= first) {
                    *status = Status::Ready;
                }
            }
        }
        let nth = (splitmix(&mut state.dice) % ready(state) as u64) as usize;
        let mut threads = state.threads.iter().enumerate();
        let chosen = threads
            .by_ref()
            .filter(|(_, status)| **status == Status::Ready);
        chosen
            .map(|(number, _)| number)
            .nth(nth)
            .expect("one of them")
    }

    /// Other threads hold what they hold for ever, so the program ends here.
    fn give_up(&self, why: &str, state: &State) -> ! {
        eprintln!("{}: {why}: {:?}", self.story, state.threads);
        std::process::exit(101);
    }
}

impl Scheduler for Baton {
    fn now(&self) -> Instant {
        self.start + self.state.lock().now
    }

    fn step(&self) {
        let status = {
            let mut state = self.state.lock();
            let restless = state.restless;
            match splitmix(&mut state.dice) % 256 {
                // Slow enough for the others to get whole requests done.
                0..SLOW => {
                    let long = Duration::from_micros(splitmix(&mut state.dice) % 60_000);
                    let until = Some(state.now + long);
                    Some(Status::Waits { event: 0, until })
                }
                dice => (dice < restless).then_some(Status::Ready),
            }
        };
        if let Some(status) = status {
            self.give_way(status);
        }
    }

    fn blocked(&self) {
        self.give_way(Status::Blocked);
    }

    fn wait(&self, event: usize, until: Option<Instant>) {
        let until = until.map(|until| until.saturating_duration_since(self.start));
        self.give_way(Status::Waits { event, until });
    }

    fn tell(&self, event: usize) {
        let mut state = self.state.lock();
        for status in &mut state.threads {
            if matches!(status, Status::Waits { event: own, .. } if *own == event) {
                *status = Status::Ready;
            }
        }
    }

    fn tell_one(&self, event: usize) {
        let mut state = self.state.lock();
        let waits =
            |status: &Status| matches!(status, Status::Waits { event: own, .. } if *own == event);
        let count = state.threads.iter().filter(|status| waits(status)).count();
        if count > 0 {
            let nth = (splitmix(&mut state.dice) % count as u64) as usize;
            let mut waiting = state.threads.iter_mut().filter(|status| waits(status));
            *waiting.nth(nth).expect("one of them") = Status::Ready;
        }
    }

    fn spawn(&self, name: &str, ended: usize, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        let baton = self.me.upgrade().expect("a thread that it runs holds it");
        let turn: Arc<Condvar> = Arc::default();
        let number = {
            let mut state = self.state.lock();
            state.threads.push(Status::Ready);
            self.turns.lock().push(Arc::clone(&turn));
            state.threads.len() - 1
        };
        // The disk's own thread. The others say for themselves what they do for the disk.
        let ration = self.ration.filter(|_| name == "flusher");
        let name = name.to_owned();
        let builder = std::thread::Builder::new().name(name.clone());
        let run = move || {
            baton.enter(number);
            let mut state = baton.state.lock();
            while state.running != number {
                turn.wait(&mut state);
            }
            drop(state);
            // What panics is told by the usual hook, and the others go on.
            let body = || heap::with(ration, body);
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_err() {
                baton.panicked.lock().push(name);
            }
            baton.tell(ended);
            sync::set_scheduler(None);
            baton.give_way(Status::Ended);
        };
        builder.spawn(run).map(drop)
    }
}
