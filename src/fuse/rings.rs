//! The door of our own on io_uring: one queue a CPU, one thread a queue.
//!
//! Imports: `disk`, `error`, `units`, `fuse::{answer, device, dispatch, errno, wire}`, `sys`.
//! Never: lets the kernel know of rings before all of them have shown that they work; allocates for
//! a READ or a WRITE below the threshold; waits for a request of another thread; leaves a mount
//! behind whose requests nobody serves.
//!
//! The kernel puts a request on the queue of the CPU that its task runs on, so the thread that
//! serves it is pinned there and nobody has to be woken elsewhere ([`layout`]). The bytes of a READ
//! or a WRITE are in the slot's payload, which starts a page and goes where the request goes: to
//! the pool, or to another thread.
//!
//! Where the disk goes past the host's page cache, a request that lies in one piece of one file is
//! carried out by the ring that it came through: what comes in goes on to the image, or from there,
//! without another thread ([`worker`]). All else that waits for the medium goes to the pool.
//!
//! How it starts:
//!
//! 1. memory, rings and threads are made, and each thread has shown that commands and messages
//!    reach its ring ([`prepare`]). Whatever the host forbids or lacks shows here, while another
//!    door can still be taken;
//! 2. INIT is answered ([`device::greet`]). From then on the kernel keeps every request until each
//!    queue has a slot, or until it refuses one: then it sends all to /dev/fuse;
//! 3. the threads register their slots, which only works now. If the kernel refuses any, the door
//!    on /dev/fuse gets as many threads, and the disk as many buffers, as without rings; should the
//!    kernel send requests to the rings all the same, they are served there.
//!
//! It ends when the device says that the mount has gone, or when a thread cannot go on. Then the
//! others would serve their queues while requests of that one wait for ever, so all of them end and
//! let go of the device. With its last descriptor the kernel ends the mount, and every request in
//! it fails. An answer that comes later goes nowhere, as nobody waits for it; its slot, and the
//! memory behind it, are left alone.
//!
//! Who gives an answer to the kernel copies its bytes to who asked. So large requests wait where
//! neighbouring threads can take them ([`share`]), and who takes one gives the answer from its own
//! ring; else one CPU would do all the copying. The slot then belongs to that ring, and the kernel
//! likes to use again what was given back last: so when a thread finds a small request in a slot of
//! another's queue, it serves it and has the queue's own thread answer.

mod layout;
mod pace;
mod reply;
mod share;
mod worker;

use super::WRITE_MAX;
use super::buffer::Buffers;
use super::device::{self, Start};
use super::wire::NAMES_MAX;
use crate::error::{Error, Result};
use crate::sys::uring::{self, Mailbox, Ring, Slot};
use crate::sys::{memory, process};
use crate::units::len_u64;
use layout::{DEPTH, Layout, cpus_of};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use pace::Pace;
use share::Share;
use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use worker::Worker;

/// Whether the kernel offers rings to new mounts; `Y` if it does.
pub(crate) const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Threads for each queue where there are more of them than CPUs: with two CPUs, more than are
/// [`NEIGHBOURS`].
const CROWD: usize = 5;
/// Commands that a thread can have ready for the kernel at a time; with more it calls more often.
const COMMANDS: u32 = 64;
/// Bytes of all payloads that have memory from the start, so that serving needs none from a host
/// that may be short of it: all of them on hosts with two CPUs, the beginning of each where there
/// are more. Most requests are small, and use the slots that were used last.
const BACKED: usize = 20 << 20;
/// The part of all memory that may be theirs before nobody should have them unasked.
const MEMORY_SHARE: u64 = 8;
/// Threads that take large requests from each other.
const NEIGHBOURS: usize = 8;
/// How long threads may take to show that their rings work.
const PROOF_MAX: Duration = Duration::from_secs(20);

/// True when the kernel offers rings to new mounts.
#[must_use]
pub(crate) fn are_offered() -> bool {
    fs::read(SWITCH).is_ok_and(|text| text.starts_with(b"Y") || text.starts_with(b"1"))
}

/// Says why rings should not be taken unasked. The kernel offers none; or their threads may not go
/// first, and as each is bound to its CPU, a program that keeps that busy would make every request
/// wait for a turn of the scheduler's, where others could be served elsewhere; or, as the memory of
/// the requests that each CPU's queue can let out stays with the queue, they could come to hold a
/// large part of what the host lets us have.
pub(crate) fn are_worth_it() -> io::Result<()> {
    if !are_offered() {
        let why = format!("the kernel offers no rings (see {SWITCH})");
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    let trial = thread::Builder::new().spawn(process::go_first)?;
    let goes_first = trial
        .join()
        .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
    goes_first.map_err(|e| io::Error::other(format!("rings may not go first: {e}")))?;
    let threads = plan(Shape::Usual)?.pins.len();
    match memory::most() {
        Some(most) if !is_affordable(threads, most) => Err(io::Error::other(format!(
            "{threads} rings could need {} MiB, and all memory is {} MiB",
            memory_max(threads) >> 20,
            most >> 20
        ))),
        _ => Ok(()),
    }
}

/// Bytes that the payloads of so many threads' queues come to have, if all are used to their ends.
fn memory_max(threads: usize) -> u64 {
    len_u64(threads * DEPTH) * u64::from(WRITE_MAX)
}

fn is_affordable(threads: usize, most: u64) -> bool {
    memory_max(threads) <= most / MEMORY_SHARE
}

/// What rings there are to be; all but `Usual` is for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// A thread for each CPU.
    Usual,
    /// More threads than CPUs.
    Crowded,
    /// As if all CPUs but one had been off at the start.
    Lame,
    /// Slots that the kernel refuses.
    Refused,
    /// A few slots that the kernel refuses among others.
    PartlyRefused,
}

/// What every thread and every answer can reach.
#[derive(Debug)]
struct Shared {
    /// The way to each thread.
    mailboxes: Vec<Mailbox>,
    /// The large requests of each [`NEIGHBOURS`] threads.
    shares: Vec<Share<Slot>>,
    tell: Sender<Told>,
}

impl Shared {
    /// Has the thread that the slot is at home with give the answer to the kernel. Waits for
    /// nothing: who answers may be the flusher, which others need.
    fn send_home(&self, slot: Slot) {
        if let Err(slot) = self.try_home(slot) {
            // The kernel may be out of memory for a moment; the one who waits for the answer is not
            // forgotten for that. Nobody listens any more after the session.
            let _ = self.tell.send(Told::Late(slot));
        }
    }

    fn try_home(&self, slot: Slot) -> std::result::Result<(), Slot> {
        let Some(home) = self.mailboxes.get(slot.home()) else {
            return Ok(());
        };
        home.post(slot).map_err(|(e, slot)| {
            log::debug!("an answer has to wait: {e}");
            slot
        })
    }
}

/// What threads tell the one who waits for them.
#[derive(Debug)]
enum Told {
    /// A thread's ring works.
    Ready,
    /// A thread on the device has ended.
    Device(io::Result<()>),
    /// The kernel does not want all slots.
    Refused(i32),
    /// A thread of a queue cannot go on.
    Failed(io::Error),
    /// An answer could not be given to the kernel yet.
    Late(Slot),
}

/// Rings, memory and threads, waiting for the kernel's greeting.
pub(crate) struct Prepared {
    shared: Arc<Shared>,
    rings: Vec<JoinHandle<()>>,
    /// One for each thread, that on the device included.
    gates: Vec<SyncSender<Start>>,
    told: Receiver<Told>,
}

impl Prepared {
    /// How many threads serve queues.
    pub(crate) fn count(&self) -> usize {
        self.rings.len()
    }
}

/// What the host's CPUs ask for.
fn plan(shape: Shape) -> io::Result<Layout> {
    let list = |path: &str| -> io::Result<BTreeSet<usize>> {
        let list = fs::read_to_string(path)?;
        cpus_of(&list).ok_or_else(|| io::Error::other(format!("{path}: {list}")))
    };
    let possible = list(POSSIBLE)?;
    let mut on = list(ONLINE).unwrap_or_else(|_| possible.clone());
    if shape == Shape::Lame {
        let first = on.first().copied();
        on.retain(|cpu| Some(*cpu) == first);
    }
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_| CpuSet::new());
    let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    let allowed = on.iter().copied().filter(is_allowed).collect();
    let crowd = if shape == Shape::Crowded { CROWD } else { 1 };
    let possible = u16::try_from(possible.len()).map_err(io::Error::other)?;
    Ok(Layout::new(possible, &on, &allowed, crowd))
}

/// The slots that a thread begins with, and the queues that have fewer than they may need.
fn slots_of(layout: &Layout, thread: usize, shape: Shape) -> io::Result<(Vec<Slot>, Vec<u16>)> {
    let payload = usize::try_from(WRITE_MAX).unwrap_or(1 << 20);
    let short = payload / 2;
    let backed = (BACKED / layout.slots()).next_multiple_of(4096);
    let (mut slots, mut shallow) = (Vec::new(), Vec::new());
    for queue in layout.queues.iter().filter(|queue| queue.home == thread) {
        let payload = if shape == Shape::Refused {
            short
        } else {
            payload
        };
        let (id, depth) = (queue.id, queue.depth);
        slots.extend(uring::slots(id, thread, depth, payload, backed)?);
        if shape == Shape::PartlyRefused {
            slots.extend(uring::slots(id, thread, 2, short, 0)?);
        }
        if queue.depth < DEPTH {
            shallow.push(queue.id);
        }
    }
    Ok((slots, shallow))
}

/// Makes everything that there will be, and has each thread show that its ring works. Nothing of it
/// is seen by the kernel's FUSE yet.
pub(crate) fn prepare(device: &impl AsFd, shape: Shape) -> io::Result<Prepared> {
    let layout = plan(shape)?;
    let (threads, all) = (layout.pins.len(), layout.slots_max());
    let events = u32::try_from(2 * all + 64).unwrap_or(u32::MAX);
    let ring = |_| Ring::new(device.as_fd(), COMMANDS, events);
    let rings = (0..threads).map(ring).collect::<io::Result<Vec<_>>>()?;
    let mailboxes = rings.iter().map(Ring::mailbox).collect::<io::Result<_>>()?;
    let shares = (0..threads.div_ceil(NEIGHBOURS))
        .map(|group| Share::new(NEIGHBOURS.min(threads - group * NEIGHBOURS), all))
        .collect();
    let (tell, told) = mpsc::channel();
    let mut prepared = Prepared {
        shared: Arc::new(Shared {
            mailboxes,
            shares,
            tell: tell.clone(),
        }),
        rings: Vec::with_capacity(threads),
        gates: Vec::with_capacity(threads + 1),
        told,
    };
    for (number, ring) in rings.into_iter().enumerate() {
        let (slots, shallow) = slots_of(&layout, number, shape)?;
        let worker = Worker {
            ring,
            number,
            cpu: layout.pins[number],
            slots,
            shallow,
            shared: Arc::clone(&prepared.shared),
            scratch: vec![0; NAMES_MAX],
            small: VecDeque::with_capacity(all),
            moving: Vec::with_capacity(all),
            pace: Pace::default(),
            troubles: 0,
        };
        // Half of the proof: its thread waits for this, and for a command of its own.
        prepared.shared.mailboxes[number].echo()?;
        let (gate, begin) = mpsc::sync_channel(1);
        let name = format!("ring-{number}");
        let thread = thread::Builder::new().name(name);
        prepared
            .rings
            .push(thread.spawn(move || worker.run(&begin, all))?);
        prepared.gates.push(gate);
    }
    start_reader(&mut prepared, tell)?;
    wait_for_proof(&prepared)?;
    Ok(prepared)
}

/// The thread on the device.
fn start_reader(prepared: &mut Prepared, tell: Sender<Told>) -> io::Result<()> {
    let buffers = Buffers::new(1);
    let (gate, begin) = mpsc::sync_channel(1);
    let run = move || {
        if let Ok(start) = begin.recv() {
            // Nobody listens any more after a failure elsewhere.
            let _ = tell.send(Told::Device(device::read_on(start, &buffers)));
        }
    };
    let name = "device-0".to_owned();
    thread::Builder::new().name(name).spawn(run)?;
    prepared.gates.push(gate);
    Ok(())
}

fn wait_for_proof(prepared: &Prepared) -> io::Result<()> {
    let end = Instant::now() + PROOF_MAX;
    for _ in 0..prepared.count() {
        let left = end.saturating_duration_since(Instant::now());
        match prepared.told.recv_timeout(left) {
            Ok(Told::Ready) => {}
            Ok(Told::Failed(e)) => return Err(e),
            Ok(_) | Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
    Ok(())
}

/// Serves until the mount has gone, once the kernel was told of the rings. If it does not want them
/// after all, so many threads serve on the device.
pub(crate) fn run(prepared: Prepared, start: Start, threads: usize) -> Result<()> {
    let Prepared {
        shared,
        rings,
        gates,
        told,
    } = prepared;
    for gate in gates {
        // A thread that has ended has said why.
        let _ = gate.send(start.clone());
    }
    let mut session = Session {
        shared,
        told,
        start,
        threads,
        readers: 1,
        has_fallen_back: false,
        late: Vec::new(),
    };
    let result = session.serve();
    session.end(rings, result).map_err(Error::from)
}

/// What goes on while threads serve.
struct Session {
    shared: Arc<Shared>,
    told: Receiver<Told>,
    start: Start,
    /// For the device, where there are no rings.
    threads: usize,
    /// Threads on the device now.
    readers: usize,
    has_fallen_back: bool,
    /// Answers that wait for the kernel to take them.
    late: Vec<Slot>,
}

impl Session {
    /// Until the mount has gone, or somebody cannot go on.
    fn serve(&mut self) -> io::Result<()> {
        loop {
            let told = if self.late.is_empty() {
                self.told.recv().map_err(RecvTimeoutError::from)
            } else {
                self.told.recv_timeout(Duration::from_millis(1))
            };
            match told {
                Ok(Told::Device(ended)) => {
                    self.readers -= 1;
                    return ended;
                }
                Ok(Told::Failed(e)) => return Err(e),
                Ok(Told::Refused(errno)) => self.fall_back(errno),
                Ok(Told::Late(slot)) => self.late.push(slot),
                Ok(Told::Ready) | Err(_) => {}
            }
            let late = std::mem::take(&mut self.late).into_iter();
            self.late = late
                .filter_map(|slot| self.shared.try_home(slot).err())
                .collect();
        }
    }

    fn fall_back(&mut self, errno: i32) {
        if std::mem::replace(&mut self.has_fallen_back, true) {
            return;
        }
        let e = io::Error::from_raw_os_error(errno);
        log::warn!("the kernel refused a ring, requests go through /dev/fuse: {e}");
        // What has come that way before was served alone.
        self.start.fs.restore_buffers();
        let more = self.threads.saturating_sub(1);
        if more == 0 {
            return;
        }
        let tell = self.shared.tell.clone();
        let tell = move |result| {
            let _ = tell.send(Told::Device(result));
        };
        match device::start(&self.start, more, tell) {
            Ok(count) => self.readers += count,
            // The one that there is serves all.
            Err(e) => log::warn!("one session thread, and no more: {e}"),
        }
    }

    /// Has all threads end, and waits for them. Nothing of the session serves or holds the device
    /// afterwards but what the caller has.
    fn end(mut self, rings: Vec<JoinHandle<()>>, result: io::Result<()>) -> io::Result<()> {
        self.start.device.stop();
        let mut result = result;
        for (ring, mailbox) in rings.into_iter().zip(&self.shared.mailboxes) {
            while !ring.is_finished() && mailbox.stop().is_err() {
                uring::wait_a_moment();
            }
            if ring.join().is_err() {
                result = result.and(Err(io::Error::other("the thread of a ring panicked")));
            }
        }
        while self.readers > 0 {
            match self.told.recv() {
                Ok(Told::Device(ended)) => {
                    self.readers -= 1;
                    result = result.and(ended);
                }
                Ok(Told::Failed(e)) => result = result.and(Err(e)),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_for_hosts_that_can_afford_them() {
        assert_eq!(memory_max(2), 20 << 20);
        assert!(is_affordable(2, 160 << 20));
        assert!(!is_affordable(2, (160 << 20) - 1));
        assert!(is_affordable(64, 8 << 30));
        assert!(!is_affordable(64, 4 << 30));
    }
}
