//! fio as a second witness: it writes checksummed blocks before a kill and verifies them after it.
//!
//! Imports: `support` (command); std, `anyhow`.
//! Never: verifies what fio did not get to write and sync to its end.

use crate::support::command;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The part of a disk that fio has for itself.
#[derive(Debug)]
pub(crate) struct Fio {
    first: u64,
    sectors: u64,
    /// Seed of the last job that wrote and synced all of it.
    synced: Option<u64>,
}

/// A running job.
#[derive(Debug)]
pub(crate) struct Job {
    seed: u64,
    child: Mutex<Child>,
}

impl Job {
    /// Waits until fio has written and synced all.
    pub(crate) fn wait(&self) -> Result<()> {
        let begun = Instant::now();
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        while child.try_wait()?.is_none() {
            ensure!(begun.elapsed() < command::LIMIT, "fio does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Fio {
    /// These sectors.
    pub(crate) fn new(first: u64, sectors: u64) -> Self {
        Self {
            first,
            sectors,
            synced: None,
        }
    }

    /// The first of them.
    pub(crate) fn start(&self) -> u64 {
        self.first
    }

    fn command(&self, path: &Path, seed: u64) -> Command {
        let mut command = command::new("fio");
        let seed = seed % 1_000_000_007;
        command
            .args(["--name=witness", "--rw=randwrite", "--bs=16k", "--direct=1"])
            .args(["--ioengine=libaio", "--iodepth=8", "--verify=crc32c"])
            .args(["--verify_state_save=0", "--verify_fatal=1", "--minimal"])
            .args(["--allow_file_create=0", "--end_fsync=1"])
            .arg(format!("--randseed={seed}"))
            .arg(format!("--offset={}", self.first * 512))
            .arg(format!("--size={}", self.sectors * 512))
            .arg(format!("--filename={}", path.display()));
        command
    }

    /// Writes all of it, in an order that the seed gives.
    pub(crate) fn start_writing(&mut self, path: &Path, seed: u64) -> Result<Job> {
        self.synced = None;
        let mut command = self.command(path, seed);
        command.arg("--do_verify=0");
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Job {
            seed,
            child: Mutex::new(child.context("cannot run fio")?),
        })
    }

    /// The daemon has been killed.
    pub(crate) fn ended(&mut self, job: &Job) -> Result<()> {
        job.wait()?;
        let mut child = job.child.lock().unwrap_or_else(PoisonError::into_inner);
        if child.wait()?.success() {
            self.synced = Some(job.seed);
        }
        Ok(())
    }

    /// Verifies what the last job wrote; false where there is nothing to verify.
    pub(crate) fn verify(&self, path: &Path) -> Result<bool> {
        let Some(seed) = self.synced else {
            return Ok(false);
        };
        let mut command = self.command(path, seed);
        let done = command::run(command.arg("--verify_only=1"))?;
        ensure!(done.code() == 0, "{}", done.story());
        for word in ["verify:", "bad magic", "error"] {
            ensure!(!done.stderr.contains(word), "{}", done.story());
        }
        Ok(true)
    }
}
