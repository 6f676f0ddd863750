//! What each sector of a disk may hold, by what was asked of it and what was answered.
//!
//! Imports: `forge` (content); std, `anyhow`, `smallvec`.
//! Never: does I/O, or reads a wall clock: what is earlier is told by a counter.
//!
//! A request is *issued*, and later *done* or *failed*. Between requests that run at the same time
//! no order is owed; a request that is issued after another was done comes after it. So a sector
//! may hold what any request wrote that no later one has overwritten for certain:
//!
//! - a read sees what is not overwritten by a request that was done before the read began;
//! - after a kill or a power cut the sector may hold that, or any older content back to what a
//!   flush covered: a request covered by a flush was done before the flush was issued, and the
//!   flush returned 0.
//!
//! A failed request may have been carried out in part, or not at all: it counts as issued, but
//! overwrites nothing for certain. The same is true of a discard that may be ignored.
//!
//! A read that runs at the same time as a write of its sector may see bytes of both: the host's
//! page cache copies to one and from the other without a lock, below any loop device. What is read
//! later is whole.

use crate::forge::content::{Model, SECTOR, mix, splitmix};
use anyhow::{Result, bail, ensure};
use smallvec::{SmallVec, smallvec};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a request leaves in the sectors that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// What the image held at first.
    Start,
    /// The stamp of this request in each sector.
    Stamp,
    /// Zeros.
    Zeros,
}

/// Still running.
const RUNNING: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Request {
    content: Content,
    issued: u64,
    done: u64,
    /// It may have been carried out in part, or not at all.
    unsure: bool,
}

/// Numbers of requests, oldest first.
type Fate = SmallVec<[u32; 2]>;

#[derive(Debug)]
struct Inner {
    clock: u64,
    requests: Vec<Request>,
    fates: Vec<Fate>,
    /// Sectors that more than one request may have reached, each once.
    touched: Vec<u32>,
    is_touched: Vec<bool>,
    /// When the running reads began.
    reads: BTreeSet<u64>,
    judged: u64,
}

/// The books of one disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    seed: u64,
    start: Model,
    inner: Mutex<Inner>,
}

/// The bytes of a sector that a request wrote: no two requests or sectors have the same.
pub(crate) fn stamp(seed: u64, request: u32, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&u64::from(request).to_le_bytes());
    bytes[16..24].copy_from_slice(&sector.to_le_bytes());
    // All that follows depends on the three, so every byte is checked.
    let mut state = mix(&[seed, u64::from(request), sector]);
    for word in bytes[24..].chunks_exact_mut(8) {
        word.copy_from_slice(&splitmix(&mut state).to_le_bytes());
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn get(&self, number: u32) -> Request {
        self.requests[number as usize]
    }

    /// Was the request overwritten for certain before this time?
    fn is_over(&self, fate: &Fate, number: u32, bound: u64) -> bool {
        let done = self.get(number).done;
        fate.iter().any(|later| {
            let later = self.get(*later);
            !later.unsure && later.issued > done && later.done < bound
        })
    }

    /// Those of a sector that are not overwritten before this time.
    fn left(&self, sector: usize, bound: u64) -> Fate {
        let fate = &self.fates[sector];
        let left = fate.iter().copied();
        left.filter(|number| !self.is_over(fate, *number, bound))
            .collect()
    }
}

impl Ledger {
    /// The books of a disk that holds this now.
    pub(crate) fn new(seed: u64, start: Model) -> Self {
        let sectors = (start.bytes() / SECTOR) as usize;
        let first = Request {
            content: Content::Start,
            issued: 0,
            done: 0,
            unsure: false,
        };
        Self {
            seed,
            start,
            inner: Mutex::new(Inner {
                clock: 0,
                requests: vec![first],
                fates: vec![smallvec![0]; sectors],
                touched: Vec::new(),
                is_touched: vec![false; sectors],
                reads: BTreeSet::new(),
                judged: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sectors of the disk.
    pub(crate) fn sectors(&self) -> u64 {
        self.start.bytes() / SECTOR
    }

    /// Sectors judged so far.
    pub(crate) fn judged(&self) -> u64 {
        self.lock().judged
    }

    /// Requests issued so far.
    pub(crate) fn issued(&self) -> u64 {
        self.lock().requests.len() as u64 - 1
    }

    /// A write, discard or zero request begins; its number.
    pub(crate) fn issue(&self, content: Content, sectors: Range<u64>) -> u32 {
        let mut inner = self.lock();
        let issued = inner.tick();
        let number = inner.requests.len() as u32;
        inner.requests.push(Request {
            content,
            issued,
            done: RUNNING,
            unsure: false,
        });
        for sector in sectors {
            let at = sector as usize;
            inner.fates[at].push(number);
            if !std::mem::replace(&mut inner.is_touched[at], true) {
                inner.touched.push(sector as u32);
            }
        }
        number
    }

    /// The bytes for a write of these sectors.
    pub(crate) fn fill(&self, number: u32, first: u64, bytes: &mut [u8]) {
        for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(512)) {
            bytes.copy_from_slice(&stamp(self.seed, number, sector));
        }
    }

    /// A request was answered well.
    pub(crate) fn done(&self, number: u32) {
        let mut inner = self.lock();
        let now = inner.tick();
        inner.requests[number as usize].done = now;
    }

    /// A request was answered with an error, or may be ignored by those below.
    pub(crate) fn failed(&self, number: u32) {
        let mut inner = self.lock();
        let now = inner.tick();
        let request = &mut inner.requests[number as usize];
        request.done = now;
        request.unsure = true;
    }

    /// A flush begins.
    pub(crate) fn flush(&self) -> u64 {
        self.lock().tick()
    }

    /// The flush that began then returned 0.
    pub(crate) fn flushed(&self, begun: u64) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let oldest = inner.reads.first().copied().unwrap_or(u64::MAX);
        let bound = begun.min(oldest);
        let touched = std::mem::take(&mut inner.touched);
        for sector in touched {
            let at = sector as usize;
            inner.fates[at] = inner.left(at, bound);
            if inner.fates[at].len() > 1 {
                inner.touched.push(sector);
            } else {
                inner.is_touched[at] = false;
            }
        }
    }

    /// A read begins.
    pub(crate) fn read(&self) -> u64 {
        let mut inner = self.lock();
        let now = inner.tick();
        inner.reads.insert(now);
        now
    }

    /// The read that began then failed.
    pub(crate) fn not_read(&self, begun: u64) {
        self.lock().reads.remove(&begun);
    }

    /// The read that began then returned these bytes: an error if it should not have.
    pub(crate) fn seen(&self, begun: u64, first: u64, bytes: &[u8]) -> Result<()> {
        let fates = {
            let mut inner = self.lock();
            inner.reads.remove(&begun);
            let end = first as usize + bytes.len() / 512;
            let fates = (first as usize..end).map(|sector| inner.left(sector, begun));
            fates.collect::<Vec<_>>()
        };
        self.judge(first, bytes, &fates, Some(begun)).map(drop)
    }

    /// After a restart: these bytes are there. From now on nothing older and nothing that failed
    /// may appear any more.
    pub(crate) fn settle(&self, first: u64, bytes: &[u8]) -> Result<()> {
        let range = first as usize..first as usize + bytes.len() / 512;
        let fates = self.lock().fates[range.clone()].to_vec();
        let found = self.judge(first, bytes, &fates, None)?;
        let mut inner = self.lock();
        for (sector, number) in range.zip(found) {
            let running = inner.get(number).done == RUNNING;
            ensure!(!running, "request {number} was never answered");
            inner.fates[sector] = smallvec![number];
        }
        Ok(())
    }

    /// Which of the candidates each sector holds; `begun` is when the read began that may have run
    /// beside them.
    fn judge(
        &self,
        first: u64,
        bytes: &[u8],
        fates: &[Fate],
        begun: Option<u64>,
    ) -> Result<Vec<u32>> {
        let contents: Vec<SmallVec<[(u32, Content); 2]>> = {
            let mut inner = self.lock();
            inner.judged += fates.len() as u64;
            let of = |number: &u32| (*number, inner.get(*number).content);
            let fates = fates.iter();
            fates.map(|fate| fate.iter().map(of).collect()).collect()
        };
        let mut found = Vec::with_capacity(fates.len());
        let sectors = (first..).zip(bytes.chunks_exact(512)).zip(&contents);
        for ((sector, bytes), candidates) in sectors {
            // The latest first: two zero requests look alike.
            let fits = |(number, content): &&(u32, Content)| match content {
                Content::Stamp if word(bytes, 8) != u64::from(*number) => false,
                _ => bytes == self.content(*number, *content, sector),
            };
            let whole = candidates.iter().rev().find(fits);
            match (whole, candidates.last()) {
                (Some((number, _)), _) => found.push(*number),
                (None, Some((last, _))) if self.is_mixed(sector, bytes, candidates, begun) => {
                    found.push(*last);
                }
                _ => bail!("{}", self.tell(sector, bytes, candidates)),
            }
        }
        Ok(found)
    }

    /// The sector as this request leaves it.
    fn content(&self, number: u32, content: Content, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        match content {
            Content::Zeros => {}
            Content::Start => bytes.copy_from_slice(&self.start.read(sector * SECTOR, 512)),
            Content::Stamp => bytes = stamp(self.seed, number, sector),
        }
        bytes
    }

    /// Does a sector have each byte from one of the candidates, while one of them was running?
    fn is_mixed(
        &self,
        sector: u64,
        bytes: &[u8],
        candidates: &[(u32, Content)],
        begun: Option<u64>,
    ) -> bool {
        let Some(begun) = begun else { return false };
        let is_running = |(number, _): &(u32, Content)| self.lock().get(*number).done > begun;
        if !candidates.iter().any(is_running) {
            return false;
        }
        let of = |(number, content): &(u32, Content)| self.content(*number, *content, sector);
        let contents: Vec<[u8; 512]> = candidates.iter().map(of).collect();
        let mut bytes = bytes.iter().enumerate();
        bytes.all(|(at, byte)| contents.iter().any(|content| content[at] == *byte))
    }

    /// What is wrong with a sector, for the text of a failure.
    fn tell(&self, sector: u64, bytes: &[u8], candidates: &[(u32, Content)]) -> String {
        let inner = self.lock();
        let place = word(bytes, 16);
        let stamped = u32::try_from(word(bytes, 8)).ok().filter(|number| {
            word(bytes, 0) == self.seed && (*number as usize) < inner.requests.len()
        });
        let holds = match stamped {
            Some(number) if bytes != stamp(self.seed, number, place) => {
                format!("a torn stamp of request {number} for sector {place}")
            }
            Some(number) => format!(
                "what request {number} ({:?}) wrote to sector {place}",
                inner.get(number)
            ),
            None => crate::forge::content::describe(bytes),
        };
        let may = candidates.iter().map(|(number, content)| {
            let request = inner.get(*number);
            let (from, to) = (request.issued, request.done);
            let word = if request.unsure { "perhaps " } else { "" };
            format!("{word}{content:?} of request {number} ({from}..{to})")
        });
        let may = may.collect::<Vec<_>>().join(", ");
        format!("sector {sector} holds {holds}, but may only hold: {may}")
    }
}

/// The judge itself is tried: what it should refuse, and what it should not.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    use crate::support::harness::trial;
    vec![
        trial("ledger_order", &[], ledger_order),
        trial("ledger_restart", &[], ledger_restart),
        trial("ledger_reads", &[], ledger_reads),
        trial("ledger_mixed_reads", &[], ledger_mixed_reads),
    ]
}

fn books() -> Ledger {
    let spec = crate::forge::image::ImageSpec::new(2, 8, 64);
    Ledger::new(5, Model::of(&spec))
}

fn bytes_of(ledger: &Ledger, number: u32) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    ledger.fill(number, 3, &mut bytes);
    bytes
}

/// Without a flush old and new are right, after one only the new; another sector's never.
fn ledger_order() -> Result<()> {
    let ledger = books();
    let first = ledger.issue(Content::Stamp, 3..5);
    let content = bytes_of(&ledger, first);
    ledger.done(first);
    let flush = ledger.flush();
    let second = ledger.issue(Content::Stamp, 3..5);
    ledger.done(second);
    ensure!(ledger.settle(3, &[0; 1024]).is_ok(), "the start was lost");
    let ledger = books();
    let first = ledger.issue(Content::Stamp, 3..5);
    ensure!(first == 1, "numbers start at 1");
    ledger.done(first);
    let covered = ledger.flush();
    ledger.flushed(covered);
    ensure!(ledger.settle(3, &[0; 1024]).is_err(), "a lost write passed");
    ensure!(
        ledger.settle(4, &content).is_err(),
        "a shifted sector passed"
    );
    let mut torn = content.clone();
    torn[511] ^= 1;
    ensure!(ledger.settle(3, &torn).is_err(), "a torn sector passed");
    ensure!(ledger.settle(3, &content).is_ok(), "what is durable failed");
    ensure!(flush > 0, "time stands still");
    Ok(())
}

/// What was seen after a restart stays; what failed before it may have been carried out.
fn ledger_restart() -> Result<()> {
    let ledger = books();
    let first = ledger.issue(Content::Stamp, 3..5);
    ledger.done(first);
    let flush = ledger.flush();
    ledger.flushed(flush);
    let zeros = ledger.issue(Content::Zeros, 3..4);
    ledger.failed(zeros);
    let flush = ledger.flush();
    ledger.flushed(flush);
    let content = bytes_of(&ledger, first);
    let mut half = content.clone();
    half[..512].fill(0);
    ensure!(ledger.settle(3, &half).is_ok(), "what failed may be there");
    ensure!(
        ledger.settle(3, &content).is_err(),
        "what was seen after a restart has gone"
    );
    Ok(())
}

/// A read that began before a write was answered may see the old content, a later one not; a flush
/// meanwhile does not change that.
fn ledger_reads() -> Result<()> {
    let ledger = books();
    let number = ledger.issue(Content::Stamp, 3..5);
    let content = bytes_of(&ledger, number);
    let early = ledger.read();
    let other = ledger.read();
    ledger.done(number);
    let flush = ledger.flush();
    ledger.flushed(flush);
    let late = ledger.read();
    ensure!(ledger.seen(early, 3, &[0; 1024]).is_ok(), "old is right");
    ensure!(ledger.seen(other, 3, &content).is_ok(), "new is right");
    ensure!(ledger.seen(late, 3, &[0; 1024]).is_err(), "a stale read");
    Ok(())
}

/// Bytes of the old and of the new content are right while the request runs, and never later; nor
/// are any others.
fn ledger_mixed_reads() -> Result<()> {
    let ledger = books();
    let number = ledger.issue(Content::Stamp, 3..5);
    let mut mixed = bytes_of(&ledger, number);
    mixed[100..200].fill(0);
    let mut foreign = mixed.clone();
    foreign[150] = 1;
    let [early, other] = [ledger.read(), ledger.read()];
    ensure!(ledger.seen(early, 3, &mixed).is_ok(), "the request runs");
    ensure!(ledger.seen(other, 3, &foreign).is_err(), "a foreign byte");
    ledger.done(number);
    let late = ledger.read();
    ensure!(
        ledger.seen(late, 3, &mixed).is_err(),
        "the request was done"
    );
    ensure!(ledger.settle(3, &mixed).is_err(), "torn after a restart");
    Ok(())
}
