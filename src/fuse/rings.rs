//! The door of our own on io_uring: one queue a CPU, one thread a queue.
//!
//! Imports: `disk`, `error`, `units`, `fuse::{answer, device, dispatch, errno, wire}`, `sys`.
//! Never: lets the kernel know of rings before all of them are there; allocates for a READ or a
//! WRITE below the threshold; waits for a request of another thread.
//!
//! The kernel puts a request on the queue of the CPU that its task runs on, so the thread that
//! serves it is pinned there and nobody has to be woken elsewhere. The bytes of a READ or a WRITE
//! are in the slot's payload, which starts a page and goes where the request goes: to the pool, or
//! to another thread.
//!
//! How it starts, so that everything that can fail does so before the kernel is told:
//!
//! 1. memory, rings and threads are made ([`prepare`]);
//! 2. INIT is answered ([`device::greet`]). From then on the kernel keeps every request until each
//!    queue has a slot, or until one registration fails: then it sends all to /dev/fuse;
//! 3. the threads register their slots, which only works now. If that fails, the door on /dev/fuse
//!    gets as many threads as it would have had without rings.
//!
//! It ends when the device says that the mount has gone: the threads are told to stop. An answer
//! that comes later goes nowhere, as nobody waits for it; its slot, and the memory behind it, are
//! left alone.
//!
//! Who gives an answer to the kernel copies its bytes to who asked. So of the large requests that
//! come together a thread keeps some and hands the others to other threads, which give the answers
//! from their own rings; else one CPU would do all the copying. The slot then belongs to that ring,
//! and the kernel likes to use again what was given back last: so when a thread finds a small
//! request in a slot of another's queue, it serves it and has the queue's own thread answer.

mod reply;
mod worker;

use super::device::{self, Device};
use super::dispatch::Guard;
use super::wire::NAMES_MAX;
use super::{PloopFs, WRITE_MAX};
use crate::error::{Error, Result};
use crate::sys::uring::{self, Mailbox, Message, Ring, Slot};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use worker::{Start, Worker};

/// Whether the kernel offers rings to new mounts; `Y` if it does.
pub(crate) const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// Requests that a queue lets out at a time. More than may wait for space on the host, so that
/// other requests get through meanwhile.
const DEPTH: usize = 16;
/// Commands that a thread can have ready for the kernel at a time; with more it calls more often.
const COMMANDS: u32 = 64;
/// Bytes of all payloads that are touched at the start, so that serving needs no memory from a host
/// that may be short of it: all of them on hosts with four CPUs, the beginning of each where there
/// are more. Most requests are small, and use the slots that were used last.
const TOUCHED: usize = 64 << 20;

/// How often, a millisecond apart, an answer that no ring takes is tried again.
const POST_TRIES: usize = 60_000;

/// True when the kernel offers rings to new mounts.
#[must_use]
pub(crate) fn are_offered() -> bool {
    fs::read(SWITCH).is_ok_and(|text| text.starts_with(b"Y") || text.starts_with(b"1"))
}

/// What every thread and every answer can reach.
#[derive(Debug)]
struct Shared {
    /// The way to each thread.
    mailboxes: Vec<Mailbox>,
}

impl Shared {
    /// Has the thread that the slot is at home with give the answer to the kernel.
    fn send_home(&self, mut slot: Slot) {
        let Some(home) = self.mailboxes.get(slot.home()) else {
            return;
        };
        // The kernel may be out of memory for a moment; the one who waits for the answer is not
        // forgotten for that.
        for _ in 0..POST_TRIES {
            match home.post(slot, Message::Answer) {
                Ok(()) => return,
                Err((e, back)) => {
                    log::debug!("an answer has to wait: {e}");
                    slot = back;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
        log::error!("an answer could not be given to the kernel");
    }
}

/// What threads tell the one who waits for them.
#[derive(Debug)]
enum Told {
    /// A thread on the device has ended.
    Device(io::Result<()>),
    /// The kernel does not want rings after all.
    Refused(i32),
    /// A thread of a queue cannot go on.
    Failed(io::Error),
}

/// Rings, memory and threads, waiting for the kernel's greeting.
pub(crate) struct Prepared {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// One for each thread.
    gates: Vec<SyncSender<Start>>,
    tell: Sender<Told>,
    told: Receiver<Told>,
}

impl Prepared {
    /// How many threads there are.
    pub(crate) fn count(&self) -> usize {
        self.threads.len()
    }
}

/// The numbers of CPUs that there can be, from the kernel's list: `0-3,8`.
fn cpus_of(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last > usize::from(u16::MAX) {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Makes everything that there will be, with so many threads for each queue. Nothing of it is seen
/// by the kernel's FUSE yet.
pub(crate) fn prepare(device: &impl AsFd, crowd: usize) -> io::Result<Prepared> {
    let list = fs::read_to_string(POSSIBLE)?;
    let cpus = cpus_of(&list).ok_or_else(|| io::Error::other(format!("{POSSIBLE}: {list}")))?;
    let threads = cpus.len() * crowd;
    let all = threads * DEPTH;
    let events = u32::try_from(2 * all + 64).unwrap_or(u32::MAX);
    let payload = usize::try_from(WRITE_MAX).unwrap_or(1 << 20);
    let ring = |_| Ring::new(device.as_fd(), COMMANDS, events);
    let rings = (0..threads).map(ring).collect::<io::Result<Vec<_>>>()?;
    let mailboxes = rings.iter().map(Ring::mailbox).collect::<io::Result<_>>()?;
    let shared = Arc::new(Shared { mailboxes });
    let (tell, told) = mpsc::channel();
    let mut prepared = Prepared {
        shared: Arc::clone(&shared),
        threads: Vec::with_capacity(threads),
        gates: Vec::with_capacity(threads),
        tell,
        told,
    };
    for (number, ring) in rings.into_iter().enumerate() {
        let queue = number % cpus.len();
        let id = u16::try_from(queue).map_err(io::Error::other)?;
        let worker = Worker {
            ring,
            number,
            cpu: cpus[queue],
            slots: uring::slots(id, number, DEPTH, payload)?,
            touched: TOUCHED / all,
            shared: Arc::clone(&shared),
            scratch: vec![0; NAMES_MAX],
            fresh: Vec::with_capacity(all),
            handed: Vec::with_capacity(all),
            tell: prepared.tell.clone(),
        };
        let (gate, begin) = mpsc::sync_channel(1);
        let run = move || worker.run(&begin, all);
        let name = format!("ring-{number}");
        let thread = thread::Builder::new().name(name).spawn(run)?;
        prepared.threads.push(thread);
        prepared.gates.push(gate);
    }
    Ok(prepared)
}

/// Serves until the mount has gone, once the kernel was told of the rings. If it does not want them
/// after all, so many threads serve on the device.
pub(crate) fn run(
    prepared: Prepared,
    fs: &Arc<PloopFs>,
    device: &Arc<Device>,
    (guard, threads): (Guard, usize),
) -> Result<()> {
    let Prepared {
        shared,
        threads: rings,
        gates,
        tell,
        told,
    } = prepared;
    let readers = |count| {
        let tell = tell.clone();
        device::start(fs, device, guard, count, move |result| {
            // Nobody listens any more after a failure elsewhere.
            let _ = tell.send(Told::Device(result));
        })
    };
    let mut reading = readers(1)?;
    for gate in &gates {
        let fs = Arc::clone(fs);
        // A thread that has ended has said why.
        let _ = gate.send(Start { fs, guard });
    }
    drop(gates);
    let mut result = Ok(());
    let mut has_fallen_back = false;
    while reading > 0 {
        match told.recv() {
            Ok(Told::Device(ended)) => {
                reading -= 1;
                result = result.and(ended);
            }
            Ok(Told::Refused(_)) if has_fallen_back => {}
            Ok(Told::Refused(errno)) => {
                has_fallen_back = true;
                let e = io::Error::from_raw_os_error(errno);
                log::warn!("the kernel refused a ring, requests go through /dev/fuse: {e}");
                reading += readers(threads.saturating_sub(1))?;
            }
            Ok(Told::Failed(e)) => {
                // Those on the device wait for a kernel that says no more: they end with us.
                result = Err(e);
                break;
            }
            Err(_) => break,
        }
    }
    for mailbox in &shared.mailboxes {
        result = result.and(mailbox.stop());
    }
    for ring in rings {
        if ring.join().is_err() {
            result = result.and(Err(io::Error::other("the thread of a ring panicked")));
        }
    }
    result.map_err(Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_cpus_is_read() {
        assert_eq!(
            cpus_of(
                "0
"
            ),
            Some(vec![0])
        );
        assert_eq!(
            cpus_of(
                "0-3
"
            ),
            Some(vec![0, 1, 2, 3])
        );
        assert_eq!(cpus_of("0-1,8,10-11"), Some(vec![0, 1, 8, 10, 11]));
        for bad in ["", "x", "3-1", "0-99999999", "1-"] {
            assert_eq!(cpus_of(bad), None, "{bad}");
        }
    }
}
