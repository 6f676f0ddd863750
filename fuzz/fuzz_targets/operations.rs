//! Any sequence of requests, closes, kills, power cuts and faults of the host, held against a model
//! of what each sector may hold.
//!
//! The files and the model are those of `tests/sim`, where a seed makes several clients work at
//! once; here one client does what the input says, and then the power is cut, on copies, at moments
//! that the input chooses. README.md says how to run it.
#![no_main]

#[path = "../../tools/forge/mod.rs"]
mod forge;
#[path = "../../tests/sim/mod.rs"]
mod sim;
mod support;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy};
use ploopfs::error::ErrorKind;
use ploopfs::units::DiskOffset;
use sim::faults::Fault;
use sim::kinds::{self, DiskKind};
use sim::model::{Model, SECTOR, Stamp};
use sim::replay::{Cuts, replay};
use sim::storage::{Event, Kind, Manners, World};
use std::sync::Arc;

/// Steps of one sequence.
const STEPS: usize = 16;
/// Moments of one run at which the power is cut.
const CUTS: usize = 2;

/// One step.
#[derive(Clone, Copy, Debug)]
struct Step {
    what: u8,
    at: u8,
    len: u8,
}

/// All that the input says.
#[derive(Debug)]
struct Script {
    kind: &'static DiskKind,
    manners: Manners,
    options: u8,
    /// Which moments, and which of the states that a cut may leave.
    cuts: u16,
    steps: Vec<Step>,
}

impl Script {
    fn read(input: &mut Unstructured<'_>) -> Result<Self> {
        let (kind, manners, options): (u8, u8, u8) = input.arbitrary()?;
        let cuts = input.arbitrary()?;
        // A large disk costs as much as all others together; `tests/sim` works on one.
        let small = || kinds::all().iter().filter(|kind| kind.sectors() < 1000);
        let kind = small().nth(usize::from(kind) % small().count());
        let kind = kind.expect("one of them");
        let fault = if manners & 2 == 0 {
            None
        } else {
            let (which, nth): (u8, u8) = input.arbitrary()?;
            Some(Fault {
                kind: Kind::ALL[usize::from(which >> 2) % Kind::ALL.len()],
                nth: nth.into(),
                errno: [libc::EIO, libc::ENOSPC][usize::from(which & 1)],
                for_ever: which & 2 != 0,
            })
        };
        let mut steps = Vec::new();
        while steps.len() < STEPS && !input.is_empty() {
            let (what, at, len) = input.arbitrary()?;
            steps.push(Step { what, at, len });
        }
        Ok(Self {
            kind,
            manners: Manners {
                fault,
                poor_host: manners & 1 != 0,
                ..Manners::default()
            },
            options,
            cuts,
            steps,
        })
    }

    fn options(&self) -> DiskOptions {
        let bit = |number: u8| usize::from(self.options >> number & 1);
        DiskOptions {
            bat_cache: [1, 1 << 20][bit(0)],
            grow_step: [1, 1 << 15][bit(1)],
            enospc: [EnospcPolicy::Fail, EnospcPolicy::Seconds(2)][bit(2)],
            flush_interval_ms: 0,
            ..DiskOptions::default()
        }
    }
}

/// The disk while it is open.
struct Life {
    disk: Arc<Disk>,
    model: Model,
    process: u64,
}

struct Run<'a> {
    script: &'a Script,
    world: Arc<World>,
    life: Option<Life>,
    next: u64,
}

impl Run<'_> {
    /// Nothing fails but what the world made fail.
    fn may_fail(&self, process: u64) -> bool {
        self.world.failures().count > 0 || self.world.is_dead(process)
    }

    fn open(&mut self) {
        if self.world.failures().count > 0 {
            self.world.mend();
        }
        let process = self.world.process();
        let images = self.script.kind.open(&self.world);
        let opened = disk::open_with(images, &self.script.options(), support::resources());
        let disk = match opened {
            Ok((disk, _)) => disk,
            Err(_) if self.may_fail(process) => return,
            Err(error) => panic!("cannot be opened: {error}"),
        };
        let mut bytes = vec![0; disk.size_bytes() as usize];
        if let Err(error) = disk.read_at(DiskOffset::ZERO, &mut bytes) {
            assert!(self.may_fail(process), "cannot be read: {error}");
            return;
        }
        let shows = Arc::new(bytes);
        self.world.note(Event::Opened {
            shows: Arc::clone(&shows),
        });
        self.life = Some(Life {
            disk,
            model: Model::new(shows),
            process,
        });
    }

    fn close(&mut self) {
        let Some(life) = self.life.take() else {
            return;
        };
        // A close that succeeds has made everything durable.
        self.next += 1;
        let flush = self.next;
        self.world.note(Event::FlushBegan { flush });
        match life.disk.close() {
            Ok(()) if self.world.is_dead(life.process) => {}
            Ok(()) => {
                self.world.note(Event::FlushDone { flush });
            }
            Err(error) => assert!(self.may_fail(life.process), "cannot be closed: {error}"),
        }
    }

    fn step(&mut self, step: Step) {
        let windows = self.script.kind.windows();
        let window = &windows[usize::from(step.at) % windows.len()];
        let sectors = window.end - window.start;
        let first = window.start + u64::from(step.at) % sectors;
        let longest = [1, 4, 20, 48][usize::from(step.len & 3)];
        let len = (1 + u64::from(step.len >> 2) % longest).min(window.end - first);
        match step.what % 16 {
            0..=5 => self.change(first, len, Stamp(1 + self.next), false),
            6 => self.change(first, len, Stamp::ZERO, false),
            7 => self.change(first, len, Stamp::ZERO, true),
            // Whole clusters are dropped.
            8 | 9 => {
                let start = window.start.max(first / 16 * 16);
                let len = (16 + len / 16 * 16).min(window.end - start);
                self.change(start, len, Stamp::ZERO, true);
            }
            10 | 11 => self.flush(),
            12 => self.read(first, len),
            13 => self.close(),
            14 => self.world.kill_after(step.at.into()),
            _ => {
                let mut dice = u64::from(step.at) << 8 | u64::from(step.len);
                let (left, _) = self.world.media().after_cut(&mut dice);
                self.world.cut(left);
            }
        }
        let is_over = self
            .life
            .as_ref()
            .is_some_and(|life| self.world.is_dead(life.process));
        if is_over {
            self.close();
        }
        if self.life.is_none() {
            self.open();
        }
    }

    fn change(&mut self, first: u64, len: u64, stamp: Stamp, as_zero: bool) {
        self.next += 1;
        let id = self.next;
        let Some(life) = &mut self.life else {
            return;
        };
        let sectors = first..first + len;
        let issued = Event::Issued {
            id,
            sectors: sectors.clone(),
            stamp,
        };
        let began = self.world.note(issued);
        life.model.issue(id, sectors.clone(), stamp, began);
        let at = DiskOffset::new(first * SECTOR);
        let result = if as_zero {
            life.disk.zero_at(at, len * SECTOR)
        } else {
            life.disk.write_at(at, &stamp.bytes(sectors.clone()))
        };
        let ok = result.is_ok();
        let ended = self.world.note(Event::Ended { id, ok });
        life.model.end(id, sectors, ok, ended);
        self.check(result, "a change");
    }

    fn flush(&mut self) {
        self.next += 1;
        let flush = self.next;
        let Some(life) = &self.life else {
            return;
        };
        let must_fail = self.world.failures().lost_sync;
        self.world.note(Event::FlushBegan { flush });
        let result = life.disk.flush_now();
        if result.is_ok() {
            self.world.note(Event::FlushDone { flush });
            assert!(!must_fail, "a flush after a failed sync succeeds");
        }
        self.check(result, "a flush");
    }

    fn read(&self, first: u64, len: u64) {
        let Some(life) = &self.life else {
            return;
        };
        let began = self.world.time();
        let mut bytes = vec![0xee; (len * SECTOR) as usize];
        let result = life
            .disk
            .read_at(DiskOffset::new(first * SECTOR), &mut bytes);
        if result.is_ok() {
            let wrong = life.model.complaint(first, &bytes, began);
            assert_eq!(wrong, None, "what was written is read");
        }
        self.check(result, "a read");
    }

    fn check(&self, result: ploopfs::error::Result<()>, what: &str) {
        let process = self.life.as_ref().map_or(0, |life| life.process);
        if let Err(error) = result {
            let is_known = self.may_fail(process) && error.kind() != ErrorKind::Corrupt;
            assert!(is_known, "{what} fails: {error}");
        }
    }
}

fn run(script: &Script) {
    let world = World::new(script.kind.files(), script.manners, true);
    let mut run = Run {
        script,
        world: Arc::clone(&world),
        life: None,
        next: 0,
    };
    run.open();
    for step in &script.steps {
        run.step(*step);
    }
    run.close();
    let log = world.log();
    let from = usize::from(script.cuts) % log.len().max(1);
    let cuts = Cuts {
        states: 1,
        from,
        every: (log.len() - from).div_ceil(CUTS).max(1),
    };
    let seed = script.cuts.into();
    let found = replay(script.kind, &log, cuts, seed, &support::resources());
    assert_eq!(found.complaints, Vec::<String>::new());
}

fuzz_target!(|data: &[u8]| {
    if let Ok(script) = Script::read(&mut Unstructured::new(data)) {
        support::alone::run(|| run(&script));
    }
});
