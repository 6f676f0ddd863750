//! Clients at work on a disk, several times opened and ended: closed, killed, or cut off.
//!
//! What happens is a function of the seed alone. While it runs, all reads are held against the
//! model; the log of it goes to [`super::replay`].

use crate::forge::content::splitmix;
use crate::sim::faults::{Failures, Request};
use crate::sim::heap::{self, Ration};
use crate::sim::kinds::DiskKind;
use crate::sim::model::{Model, SECTOR, Stamp};
use crate::sim::pool::SimPool;
use crate::sim::scheduler;
use crate::sim::storage::{Event, Manners, World};
use ploopfs::disk::{
    self, Disk, DiskOptions, DoneReply, EnospcPolicy, InlineMax, ReadReply, Resources,
};
use ploopfs::error::{Error, ErrorKind, Result};
use ploopfs::sync::{self, Condvar, Mutex};
use ploopfs::units::DiskOffset;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Longest that a client waits for an answer, in the time of the scheduler. Longer than any wait of
/// the disk that has an end.
const PATIENCE: Duration = Duration::from_secs(600);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) manners: Manners,
    /// Times that the disk is opened.
    pub(crate) lives: u64,
    /// Requests of all clients together in one life.
    pub(crate) requests: u64,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) world: Arc<World>,
    pub(crate) memory: &'static Ration,
    pub(crate) complaints: Vec<String>,
    /// The order in which the threads ran.
    pub(crate) trace: u64,
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Close,
    Kill,
    Cut,
}

/// What all clients share.
struct Scene {
    world: Arc<World>,
    disk: Arc<Disk>,
    model: parking_lot::Mutex<Model>,
    complaints: parking_lot::Mutex<Vec<String>>,
    process: u64,
    ration: Option<&'static Ration>,
    /// Requests wait for space, and have a buffer to do so.
    patient: bool,
    /// Requests that were told an error of the host.
    failed: AtomicU64,
    next: AtomicU64,
    windows: Vec<std::ops::Range<u64>>,
}

/// Runs a plan on a disk of a kind.
pub(crate) fn run(kind: &DiskKind, plan: Plan, resources: &Resources, story: &str) -> Outcome {
    let world = World::new(kind.files(), plan.manners, true);
    let mut dice = plan.seed;
    let restless = [8, 40, 128, 256][(splitmix(&mut dice) % 4) as usize];
    let ration = Ration::new(plan.manners.memory);
    let scheduler::Run {
        result: mut complaints,
        trace,
        panicked,
    } = scheduler::run(plan.seed, restless, Some(ration), story, || {
        let mut complaints = Vec::new();
        let ids = AtomicU64::new(1);
        for life in 0..plan.lives {
            let last = life + 1 == plan.lives;
            live(
                kind,
                &plan,
                &world,
                ration,
                resources,
                &mut dice,
                &ids,
                last,
                &mut complaints,
            );
            if complaints.len() > 3 {
                break;
            }
            if world.failures().count > 0 {
                // The host is well again, and so must the disk be.
                world.mend();
                let mut plan = plan;
                plan.requests = 4;
                live(
                    kind,
                    &plan,
                    &world,
                    ration,
                    resources,
                    &mut dice,
                    &ids,
                    true,
                    &mut complaints,
                );
                break;
            }
        }
        complaints
    });
    complaints.extend(panicked.iter().map(|name| format!("a {name} panicked")));
    Outcome {
        world,
        memory: ration,
        complaints,
        trace,
    }
}

fn options(dice: &mut u64) -> DiskOptions {
    DiskOptions {
        inline_order: [0, 2, 7][(splitmix(dice) % 3) as usize],
        bat_cache: [1, 1 << 20][(splitmix(dice) % 2) as usize],
        grow_step: [1, 1 << 15][(splitmix(dice) % 2) as usize],
        enospc: [EnospcPolicy::Fail, EnospcPolicy::Seconds(2)][(splitmix(dice) % 2) as usize],
        flush_interval_ms: [0, 3, 20][(splitmix(dice) % 3) as usize],
        large_inline: InlineMax {
            reads: (*dice % 3) as usize,
            writes: (*dice % 3) as usize,
        },
        ..DiskOptions::default()
    }
}

/// One life of the disk, from open to its end.
#[allow(clippy::too_many_arguments)]
fn live(
    kind: &DiskKind,
    plan: &Plan,
    world: &Arc<World>,
    ration: &'static Ration,
    resources: &Resources,
    dice: &mut u64,
    ids: &AtomicU64,
    last: bool,
    complaints: &mut Vec<String>,
) {
    let end = match splitmix(dice) % 4 {
        0 | 1 => End::Close,
        2 => End::Kill,
        _ => End::Cut,
    };
    let pool = SimPool::start(1 + splitmix(dice) % 2, Some(ration));
    let has_buffers = splitmix(dice) % 6 != 0;
    let resources = if !has_buffers {
        Resources::without_buffers(pool.clone())
    } else {
        resources.with_pool(pool.clone())
    };
    let options = options(dice);
    if end != End::Close {
        world.kill_after(splitmix(dice) % (plan.requests * 8));
    }
    let process = world.process();
    let patient = has_buffers && options.enospc != EnospcPolicy::Fail;
    let before = world.failures();
    match disk::open_with(kind.open(world), &options, resources) {
        Ok((disk, _)) => {
            let clients = 1 + splitmix(dice) % 4;
            work(
                kind, plan, world, ration, process, patient, disk, dice, ids, clients, complaints,
            );
        }
        Err(error) if world.explains(Request::Open, &error, process, before, patient) => {}
        Err(error) => complaints.push(format!("cannot be opened: {error}")),
    }
    pool.stop();
    if !world.is_dead(process) {
        world.kill();
    }
    if end == End::Cut && !last {
        world.cut(world.media().after_cut(dice).0);
    }
}

#[allow(clippy::too_many_arguments)]
fn work(
    kind: &DiskKind,
    plan: &Plan,
    world: &Arc<World>,
    ration: &'static Ration,
    process: u64,
    patient: bool,
    disk: Arc<Disk>,
    dice: &mut u64,
    ids: &AtomicU64,
    clients: u64,
    complaints: &mut Vec<String>,
) {
    let mut bytes = vec![0; disk.size_bytes() as usize];
    let before = world.failures();
    match heap::with(Some(ration), || disk.read_at(DiskOffset::ZERO, &mut bytes)) {
        Ok(()) => {}
        Err(error) if world.explains(Request::Read, &error, process, before, patient) => {
            drop(disk.close());
            return;
        }
        Err(error) => return complaints.push(format!("cannot be read after the open: {error}")),
    }
    let shows = Arc::new(bytes);
    world.note(Event::Opened {
        shows: Arc::clone(&shows),
    });
    let scene = Arc::new(Scene {
        world: Arc::clone(world),
        disk,
        process,
        ration: Some(ration),
        patient,
        failed: AtomicU64::new(0),
        model: parking_lot::Mutex::new(Model::new(shows)),
        complaints: parking_lot::Mutex::default(),
        next: AtomicU64::new(ids.load(Ordering::SeqCst)),
        windows: kind.windows(),
    });
    let start = |_| {
        let scene = Arc::clone(&scene);
        let mut dice = splitmix(dice);
        let requests = plan.requests / clients;
        sync::spawn("client", move || {
            for _ in 0..requests {
                scene.request(&mut dice);
            }
        })
        .expect("a thread")
    };
    let threads: Vec<_> = (0..clients).map(start).collect();
    threads.into_iter().for_each(|thread| {
        thread.join();
    });
    let scene = Arc::into_inner(scene).expect("the clients have ended");
    ids.store(scene.next.load(Ordering::SeqCst), Ordering::SeqCst);
    scene.check_served(plan.manners.fault.is_some_and(|fault| fault.for_ever));
    scene.close(ids.fetch_add(1, Ordering::SeqCst));
    complaints.append(&mut scene.complaints.into_inner());
}

/// The answer to a request, when it comes.
struct Answer<T> {
    result: Mutex<Option<Result<T>>>,
    came: Condvar,
}

struct Reply<T>(Arc<Answer<T>>);

impl<T> Answer<T> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            result: Mutex::new(None),
            came: Condvar::new(),
        })
    }

    /// Waits for it; `None` when it does not come.
    fn wait(&self) -> Option<Result<T>> {
        let until = sync::now() + PATIENCE;
        let mut result = self.result.lock();
        while result.is_none() && sync::now() < until {
            self.came.wait_until(&mut result, until);
        }
        result.take()
    }
}

impl<T> Reply<T> {
    fn give(&self, result: impl FnOnce() -> Result<T>) {
        let result = heap::with(None, result);
        let twice = self.0.result.lock().replace(result).is_some();
        assert!(!twice, "a request is answered once");
        self.0.came.notify_all();
    }
}

impl ReadReply for Reply<Vec<u8>> {
    fn done(self, result: Result<&[u8]>) {
        self.give(|| result.map(<[u8]>::to_vec));
    }
}

impl DoneReply for Reply<()> {
    fn done(self, result: Result<()>) {
        self.give(|| result);
    }
}

impl Scene {
    fn complain(&self, why: String) {
        self.complaints.lock().push(why);
    }

    /// One request of a client.
    fn request(&self, dice: &mut u64) {
        let window = &self.windows[(splitmix(dice) % self.windows.len() as u64) as usize];
        let longest = [1, 4, 20, 48][(splitmix(dice) % 4) as usize];
        let len = 1 + splitmix(dice) % longest.min(window.end - window.start);
        let mut first = window.start + splitmix(dice) % (window.end - window.start - len + 1);
        let mut len = len;
        // Whole clusters, now and then, for those that must be whole to be dropped.
        if splitmix(dice) % 3 == 0 {
            first = first / 8 * 8;
            len = len.next_multiple_of(8).min(window.end - first);
        }
        match splitmix(dice) % 12 {
            0 | 1 => self.change(first, len, Stamp::ZERO, true),
            2 => self.change(first, len, Stamp::ZERO, false),
            3 | 4 => self.flush(),
            5 | 6 => self.read(first, len),
            _ => self.change(first, len, Stamp(1 + splitmix(dice) % (1 << 31)), false),
        }
    }

    fn change(&self, first: u64, len: u64, stamp: Stamp, as_zero: bool) {
        let sectors = first..first + len;
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let began = self.world.note(Event::Issued {
            id,
            sectors: sectors.clone(),
            stamp,
        });
        self.model.lock().issue(id, sectors.clone(), stamp, began);
        let before = self.world.failures();
        let answer = Answer::new();
        let at = DiskOffset::new(first * SECTOR);
        if as_zero {
            let reply = Reply(Arc::clone(&answer));
            heap::with(self.ration, || self.disk.zero(at, len * SECTOR, reply));
        } else {
            let data = stamp.bytes(sectors.clone());
            let reply = Reply(Arc::clone(&answer));
            heap::with(self.ration, || self.disk.write(at, &data, reply));
        }
        let Some(result) = answer.wait() else {
            return self.complain(format!("a change of {sectors:?} is never answered"));
        };
        let ok = result.is_ok();
        let ended = self.world.note(Event::Ended { id, ok });
        self.model.lock().end(id, sectors.clone(), ok, ended);
        if let Err(error) = result {
            self.check_error(Request::Change, &error, before);
        }
    }

    fn read(&self, first: u64, len: u64) {
        let began = self.world.time();
        let before = self.world.failures();
        let answer = Answer::new();
        let mut buffer = vec![0xee; (len * SECTOR) as usize];
        let at = DiskOffset::new(first * SECTOR);
        let reply = Reply(Arc::clone(&answer));
        heap::with(self.ration, || {
            self.disk.read(at, buffer.len(), &mut buffer, reply);
        });
        match answer.wait() {
            None => self.complain(format!("a read at {first} is never answered")),
            Some(Ok(bytes)) => {
                if bytes.len() as u64 != len * SECTOR {
                    self.complain(format!("a read at {first} is short: {}", bytes.len()));
                }
                if let Some(why) = self.model.lock().complaint(first, &bytes, began) {
                    self.complain(format!("a read: {why}"));
                }
            }
            Some(Err(error)) => self.check_error(Request::Read, &error, before),
        }
    }

    fn flush(&self) {
        let flush = self.next.fetch_add(1, Ordering::SeqCst);
        let before = self.world.failures();
        self.world.note(Event::FlushBegan { flush });
        let answer = Answer::new();
        let reply = Reply(Arc::clone(&answer));
        heap::with(self.ration, || self.disk.flush(reply));
        match answer.wait() {
            None => self.complain("a flush is never answered".to_owned()),
            Some(Ok(())) => {
                self.world.note(Event::FlushDone { flush });
                if before.lost_sync {
                    self.complain("a flush after a failed sync succeeds".to_owned());
                }
            }
            Some(Err(error)) => self.check_error(Request::Flush, &error, before),
        }
    }

    /// Nothing fails but what the world made fail.
    fn check_error(&self, request: Request, error: &Error, before: Failures) {
        let (world, process) = (&self.world, self.process);
        if !world.explains(request, error, process, before, self.patient) {
            self.complain(format!(
                "a {request:?} fails: {error}; failed before it {before:?}, by now {:?}",
                world.failures()
            ));
        }
        if matches!(error.kind(), ErrorKind::Io(_)) && !world.is_dead(process) {
            self.failed.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// All requests are answered: what failed once was one request's error, and the disk is not
    /// latched for anything but what must latch it.
    fn check_served(&self, for_ever: bool) {
        let failed = self.failed.load(Ordering::SeqCst);
        if failed > 1 && !for_ever {
            self.complain(format!("{failed} requests fail by one failure"));
        }
        if let Some(why) = self.disk.stats().latched {
            let is_fit = self.world.failures().may_latch && !why.contains("panicked");
            if !is_fit && !self.world.is_dead(self.process) {
                self.complain(format!("latched for no reason: {why}"));
            }
        }
    }

    /// Closes the disk. What must latch it has, by then.
    fn close(&self, flush: u64) {
        let (world, process) = (&self.world, self.process);
        // A close that succeeds has made everything durable.
        world.note(Event::FlushBegan { flush });
        let before = world.failures();
        match heap::with(self.ration, || Arc::clone(&self.disk).close()) {
            Ok(()) if world.is_dead(process) => {}
            Ok(()) => {
                world.note(Event::FlushDone { flush });
            }
            Err(error) if world.explains(Request::Close, &error, process, before, self.patient) => {
            }
            Err(error) => self.complain(format!("cannot be closed: {error}")),
        }
        let is_latched = self.disk.stats().latched.is_some();
        if world.failures().lost_sync && !is_latched && !world.is_dead(process) {
            self.complain("a failed sync latches nothing".to_owned());
        }
    }
}
