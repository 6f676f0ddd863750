//! The loads: short runs of fio, and requests one after the other of our own.
//!
//! Imports: `report`; std, `anyhow`, `nix`, `serde_json`.
//! Never: waits longer for fio than its samples can take.

use crate::report::Unit;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FallocateFlags, fallocate};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A load of fio that goes on for a time.
#[derive(Debug)]
pub(crate) struct Job {
    /// The name that `--jobs` takes.
    pub(crate) name: &'static str,
    /// What people read.
    pub(crate) title: &'static str,
    pub(crate) unit: Unit,
    /// Part of a quick run.
    pub(crate) quick: bool,
    rw: &'static str,
    bs: &'static str,
    depth: u32,
}

const fn iops(name: &'static str, title: &'static str, rw: &'static str, depth: u32) -> Job {
    Job {
        name,
        title,
        unit: Unit::Iops,
        quick: true,
        rw,
        bs: "4k",
        depth,
    }
}

const fn stream(
    name: &'static str,
    title: &'static str,
    rw: &'static str,
    bs: &'static str,
) -> Job {
    Job {
        name,
        title,
        unit: Unit::MibPerSecond,
        quick: true,
        rw,
        bs,
        depth: 4,
    }
}

/// All loads that go on for a time, in the order of the tables.
pub(crate) const ALL: [Job; 8] = [
    iops("rr1", "4 KiB random read, QD 1", "randread", 1),
    iops("rw1", "4 KiB random write, QD 1", "randwrite", 1),
    iops("rr32", "4 KiB random read, QD 32", "randread", 32),
    iops("rw32", "4 KiB random write, QD 32", "randwrite", 32),
    stream("sr128", "128 KiB read, QD 4", "read", "128k"),
    stream("sw128", "128 KiB write, QD 4", "write", "128k"),
    stream("sr1m", "1 MiB read, QD 4", "read", "1m"),
    stream("sw1m", "1 MiB write, QD 4", "write", "1m"),
];

/// One request of a load, and another when it is done; each cluster once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Walk {
    /// 1 MiB, four under way.
    Fill,
    /// 4 KiB.
    Write,
    /// 4 KiB, and an fsync.
    WriteSync,
    /// All of the cluster is discarded.
    Discard,
}

/// The place of a job in the tables.
pub(crate) fn rank(name: &str) -> usize {
    ALL.iter()
        .position(|job| job.name == name)
        .unwrap_or(ALL.len())
}

/// What people read of a job.
pub(crate) fn title(name: &str) -> &str {
    ALL.iter()
        .find(|job| job.name == name)
        .map_or(name, |job| job.title)
}

impl Job {
    /// True when nothing is written.
    pub(crate) fn only_reads(&self) -> bool {
        !self.rw.contains("write")
    }

    /// Runs it for so many seconds. Where the host is to have nothing in memory it ends sooner,
    /// with as many bytes as the target has: a second pass would find what the first has read.
    pub(crate) fn run(&self, target: &Path, seconds: f64, is_cold: bool) -> Result<f64> {
        let span = if is_cold {
            ""
        } else {
            "time_based=1\nramp_time=200ms\n"
        };
        let text = format!(
            "[a]\nfilename={}\nioengine=io_uring\ndirect=1\nthread=1\nnorandommap=1\n\
             randrepeat=0\n{span}runtime={}ms\n\
             rw={}\nbs={}\niodepth={}\n",
            target.display(),
            (seconds * 1000.0).round(),
            self.rw,
            self.bs,
            self.depth
        );
        let report = fio(&text, seconds)?;
        self.value(&report)
            .with_context(|| format!("fio reports nothing for {}", self.name))
    }

    fn value(&self, report: &Value) -> Option<f64> {
        let direction = if self.only_reads() { "read" } else { "write" };
        let said = &report["jobs"][0][direction];
        match self.unit {
            Unit::Iops => said["iops"].as_f64(),
            _ => said["bw_bytes"].as_f64().map(|bytes| bytes / 1048576.0),
        }
    }
}

/// Runs fio over a job file given by its text; ends it when it takes far too long.
fn fio(text: &str, seconds: f64) -> Result<Value> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let mut child = Command::new("fio")
        .arg("--output-format=json")
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // ^C is for us to see: fio ends by itself.
        .process_group(0)
        .spawn()
        .context("cannot run fio")?;
    let mut stdout = child.stdout.take().context("fio has no output")?;
    let reader = std::thread::spawn(move || {
        let mut said = String::new();
        stdout.read_to_string(&mut said).map(|_| said)
    });
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > Duration::from_secs_f64(3.0 * seconds + 30.0) {
            child.kill()?;
            child.wait()?;
            bail!("fio did not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let said = match reader.join() {
        Ok(said) => said?,
        Err(_) => bail!("the reader of fio's report panicked"),
    };
    ensure!(status.success(), "fio ended with {status}: {said}");
    // Notes may come before the document.
    let start = said.find('{').unwrap_or(0);
    serde_json::from_str(&said[start..]).context("fio's report is no JSON")
}

/// Memory whose first byte is where O_DIRECT wants it.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let bytes = vec![0x3c; len + 4096];
    let skip = bytes.as_ptr().align_offset(4096);
    (bytes, skip)
}

impl Walk {
    /// Visits `count` clusters of `cluster` bytes in order, and gives how many a second. The last
    /// thing that is waited for is an fsync, but for [`Walk::Fill`].
    pub(crate) fn run(self, target: &Path, cluster: u64, count: u64) -> Result<f64> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(target)
            .with_context(|| format!("cannot open {}", target.display()))?;
        let begun = Instant::now();
        match self {
            Self::Fill => fill(&file, cluster * count)?,
            Self::Discard => {
                let mode =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                for number in 0..count {
                    fallocate(&file, mode, (number * cluster) as i64, cluster as i64)?;
                }
                file.sync_data()?;
            }
            Self::Write | Self::WriteSync => {
                let (bytes, skip) = aligned(4096);
                for number in 0..count {
                    // Neither the start nor the end of a cluster: both sides must be filled.
                    file.write_all_at(&bytes[skip..skip + 4096], number * cluster + 8192)?;
                    if self == Self::WriteSync {
                        file.sync_data()?;
                    }
                }
                file.sync_data()?;
            }
        }
        Ok(count as f64 / begun.elapsed().as_secs_f64())
    }
}

/// Writes everything in pieces of 1 MiB, four threads at a time.
fn fill(file: &File, bytes: u64) -> Result<()> {
    let next = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let (memory, skip) = aligned(1 << 20);
                    loop {
                        let at = next.fetch_add(1 << 20, std::sync::atomic::Ordering::Relaxed);
                        if at >= bytes {
                            return Ok::<_, std::io::Error>(());
                        }
                        let len = (bytes - at).min(1 << 20) as usize;
                        file.write_all_at(&memory[skip..skip + len], at)?;
                    }
                })
            })
            .collect();
        for writer in writers {
            match writer.join() {
                Ok(result) => result?,
                Err(_) => bail!("a writer panicked"),
            }
        }
        Ok(())
    })
}
