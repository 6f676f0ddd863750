//! The loads: short runs of fio on a block device, and what is read from their reports.
//!
//! Imports: std, `anyhow`, `serde_json`.
//! Never: waits longer for fio than its samples can take.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What one number of a job's report means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Measured {
    /// Row of the table.
    pub(crate) row: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// True when more is better.
    pub(crate) more: bool,
}

const fn more(row: &'static str, unit: &'static str) -> Measured {
    Measured {
        row,
        unit,
        more: true,
    }
}

const fn less(row: &'static str, unit: &'static str) -> Measured {
    Measured {
        row,
        unit,
        more: false,
    }
}

/// One load.
#[derive(Debug)]
pub(crate) struct Job {
    /// The name that `--job` takes.
    pub(crate) name: &'static str,
    /// What it does, as jobs of a fio file.
    text: &'static str,
    /// Which numbers are read from the report: job, direction, and path below it.
    numbers: &'static [(Measured, usize, &'static str, &'static str)],
}

/// All loads, in the order of the table.
pub(crate) const ALL: [Job; 8] = [
    Job {
        name: "randread-4k-1",
        text: "[a]\nrw=randread\nbs=4k\niodepth=1\n",
        numbers: &[
            (more("4k randread QD1", "IOPS"), 0, "read", "/iops"),
            (
                less("4k randread QD1 p50", "us"),
                0,
                "read",
                "/clat_ns/percentile/50.000000",
            ),
        ],
    },
    Job {
        name: "randread-4k-32",
        text: "[a]\nrw=randread\nbs=4k\niodepth=32\n",
        numbers: &[(more("4k randread QD32", "IOPS"), 0, "read", "/iops")],
    },
    Job {
        name: "randwrite-4k-32",
        text: "[a]\nrw=randwrite\nbs=4k\niodepth=32\n",
        numbers: &[(more("4k randwrite QD32", "IOPS"), 0, "write", "/iops")],
    },
    Job {
        name: "read-128k-4",
        text: "[a]\nrw=read\nbs=128k\niodepth=4\n",
        numbers: &[(more("128k read QD4", "MiB/s"), 0, "read", "/bw_bytes")],
    },
    Job {
        name: "read-256k-4",
        text: "[a]\nrw=read\nbs=256k\niodepth=4\n",
        numbers: &[(more("256k read QD4", "MiB/s"), 0, "read", "/bw_bytes")],
    },
    Job {
        name: "read-1m-4",
        text: "[a]\nrw=read\nbs=1m\niodepth=4\n",
        numbers: &[(more("1M read QD4", "MiB/s"), 0, "read", "/bw_bytes")],
    },
    Job {
        name: "write-1m-4",
        text: "[a]\nrw=write\nbs=1m\niodepth=4\n",
        numbers: &[(more("1M write QD4", "MiB/s"), 0, "write", "/bw_bytes")],
    },
    Job {
        name: "mixed",
        text: "[stream]\nrw=read\nbs=1m\niodepth=4\n[small]\nrw=randread\nbs=4k\niodepth=1\n",
        numbers: &[
            (more("mixed: 1M read QD4", "MiB/s"), 0, "read", "/bw_bytes"),
            (more("mixed: 4k randread QD1", "IOPS"), 1, "read", "/iops"),
            (
                less("mixed: 4k p50", "us"),
                1,
                "read",
                "/clat_ns/percentile/50.000000",
            ),
            (
                less("mixed: 4k p99", "us"),
                1,
                "read",
                "/clat_ns/percentile/99.000000",
            ),
        ],
    },
];

impl Job {
    /// The names of all loads.
    pub(crate) fn names() -> Vec<&'static str> {
        ALL.iter().map(|job| job.name).collect()
    }

    /// True when nothing is written.
    pub(crate) fn only_reads(&self) -> bool {
        !self.text.contains("write")
    }

    /// Runs it for so many seconds.
    pub(crate) fn run(&self, device: &Path, seconds: u64) -> Result<Vec<(Measured, f64)>> {
        let global = format!(
            "[global]\nfilename={}\nioengine=libaio\ndirect=1\nthread=1\nnorandommap=1\n\
             randrepeat=0\ntime_based=1\nruntime={seconds}\nramp_time=200ms\n",
            device.display()
        );
        let report = fio(&format!("{global}{}", self.text), seconds)?;
        let mut found = Vec::new();
        for (measured, job, direction, path) in self.numbers {
            let value = report["jobs"][job][direction]
                .pointer(path)
                .and_then(Value::as_f64)
                .with_context(|| format!("fio reports no {path} for {}", self.name))?;
            let scale = match measured.unit {
                "us" => 1e3,
                "MiB/s" => 1024.0 * 1024.0,
                _ => 1.0,
            };
            found.push((*measured, value / scale));
        }
        Ok(found)
    }
}

/// Runs fio over a job file given by its text; ends it when it takes far too long.
fn fio(text: &str, seconds: u64) -> Result<Value> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let mut child = Command::new("fio")
        .arg("--output-format=json")
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
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
        if begun.elapsed() > Duration::from_secs(3 * seconds + 30) {
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
