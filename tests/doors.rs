//! Power cuts behind a real mount: clients write, discard and fsync through the kernel, by each way
//! that requests can take, to a disk over simulated files. What fsync returned for must be there
//! after a cut at any moment, and every sector hold its old or its new content.
//!
//! The files and what is asked of them are those of the simulation (`tests/sim`), whose threads
//! take turns as a seed says. Here they are real, so a seed fixes only what the clients ask for:
//! a failure can be repeated from the log alone, within the run that made it. With
//! `PLOOPFS_SEEDS=N` each kind of disk gets so many seeds, from `PLOOPFS_SEED` on.

#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "sim/mod.rs"]
mod sim;
mod support;

#[path = "doors/clients.rs"]
mod clients;
#[path = "doors/life.rs"]
mod life;
#[path = "doors/plants.rs"]
mod plants;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use life::Run;
use ploopfs::disk::Resources;
use ploopfs::fuse::session::Transport;
use sim::kinds::{self, DiskKind};
use sim::replay::{Cuts, Found, replay};
use sim::storage::Manners;
use support::harness::{self, trial};
use support::probe::Need::{self, Fuse, Rings, Root};
use support::{Outcome, rings};

/// Seeds of each kind of disk where nobody says otherwise.
const SEEDS: u64 = 3;
/// States that they must reach by each way.
const STATES: u64 = 2000;

/// A way that requests can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Door {
    name: &'static str,
    transport: Transport,
    needs: &'static [Need],
}

const CLASSIC: &[Need] = &[Fuse, Root];
const RINGS: &[Need] = &[Fuse, Root, Rings];

const fn door(name: &'static str, transport: Transport, needs: &'static [Need]) -> Door {
    Door {
        name,
        transport,
        needs,
    }
}

const DOORS: [Door; 5] = [
    door("fuser", Transport::Fuser, CLASSIC),
    door("device", Transport::Device, CLASSIC),
    door("uring", Transport::Uring, RINGS),
    door("crowded", Transport::Crowded, RINGS),
    door("lame", Transport::Lame, RINGS),
];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Works on a disk through a door, and cuts the power at every moment of that. Where nothing is
/// ever durable each state takes long to make, so there are fewer.
fn found(door: Door, kind: &DiskKind, seed: u64, manners: Manners) -> Result<Found> {
    if door.needs == RINGS {
        rings::on()?;
    }
    let resources = Resources::new(1)?;
    let run = Run::new(kind, door.transport, seed, manners)?;
    let complaints = run.live()?;
    let cuts = Cuts {
        states: 1,
        from: 0,
        every: if manners.lying_syncs { 16 } else { 1 },
    };
    let mut found = replay(kind, &run.log(), cuts, seed, &resources);
    found.complaints.extend(complaints);
    for complaint in &mut found.complaints {
        *complaint = format!("{}, {}, seed {seed}: {complaint}", door.name, kind.name);
    }
    Ok(found)
}

fn nothing_is_lost(door: Door) -> Outcome {
    let first = number("PLOOPFS_SEED").unwrap_or(1);
    let count = number("PLOOPFS_SEEDS");
    let mut all = Found::default();
    for kind in kinds::of_mounts() {
        for seed in first..first + count.unwrap_or(SEEDS) {
            let manners = Manners {
                poor_host: seed % 2 == 0,
                ..Manners::default()
            };
            all.add(found(door, kind, seed, manners)?);
            ensure!(all.complaints.is_empty(), "{:#?}", all.complaints);
        }
    }
    eprintln!("{}: {} states, none wrong", door.name, all.states);
    ensure!(count.is_some() || all.states >= STATES, "too few states");
    Ok(())
}

/// Files whose syncs do nothing must be found out, or none of this says anything.
fn a_host_that_lies_is_noticed(door: Door) -> Outcome {
    let manners = Manners {
        lying_syncs: true,
        ..Manners::default()
    };
    let kind = &kinds::of_mounts()[0];
    for seed in 1..10 {
        if !found(door, kind, seed, manners)?.complaints.is_empty() {
            return Ok(());
        }
    }
    anyhow::bail!("nobody noticed")
}

fn main() {
    // A bug is planted in the whole process.
    let planted = plants::trials();
    if !planted.is_empty() {
        harness::main(planted);
    }
    let mut trials: Vec<Trial> = Vec::new();
    for door in DOORS {
        let name = format!("{}::nothing_is_lost", door.name);
        trials.push(trial(&name, door.needs, move || nothing_is_lost(door)));
        let name = format!("{}::a_host_that_lies_is_noticed", door.name);
        trials.push(trial(&name, door.needs, move || {
            a_host_that_lies_is_noticed(door)
        }));
    }
    harness::main(trials)
}
