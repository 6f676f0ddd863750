//! Measures ploopfs beside a loop device over a flat raw file, to choose its defaults and to know
//! where it stands.
//!
//! `cargo run --release --example bench -- --help`. All subjects are up at once, each over a file
//! of its own, and every sample of one is followed at once by the same sample of the others, in an
//! order that is reversed from round to round: what the rest of the machine does meanwhile hits all
//! alike. What is told is the median over the rounds, and its ratio to the raw loop's.

#[path = "bench/inside.rs"]
mod inside;
#[path = "bench/jobs.rs"]
mod jobs;
#[path = "bench/stand.rs"]
mod stand;
#[path = "bench/table.rs"]
mod table;

// The images are made by the same code that serves the tests.
#[path = "forge/mod.rs"]
mod forge;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use jobs::Job;
use nix::sys::signal::{SigSet, Signal};
use stand::Stand;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use table::Results;

#[derive(Parser)]
#[command(about = "Measures ploopfs beside a loop device over a flat raw file (root only)")]
struct Cli {
    /// A directory to measure in (repeatable) [default: /dev/shm and the build directory]
    #[arg(long, value_name = "DIR")]
    on: Vec<PathBuf>,
    /// A subject: a name and the options of `ploopfs attach` (repeatable)
    #[arg(long, value_name = "NAME=OPTIONS")]
    set: Vec<String>,
    /// Run only these jobs (repeatable)
    #[arg(long, value_name = "NAME", value_parser = Job::names())]
    job: Vec<String>,
    /// MiB of each disk, of which there is one more than subjects. On a real disk, what is read
    /// twice in a sample comes from the page cache the second time, but not for the raw loop
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    size: u64,
    /// Sectors of a cluster
    #[arg(long, value_name = "SECTORS", default_value_t = 2048)]
    cluster: u32,
    /// Seconds of one sample
    #[arg(long, value_name = "N", default_value_t = 1)]
    seconds: u64,
    /// Samples of each subject and job
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Begin no sample after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    limit: u64,
    /// Print the results as JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Measure only what a request costs inside the program, without kernel and loop
    #[arg(long)]
    inside: bool,
    /// Leave that part out
    #[arg(long, conflicts_with = "inside")]
    no_inside: bool,
}

/// Subjects when none is named: thresholds from "all to the pool" to "nothing to the pool".
const SETS: [&str; 6] = [
    "order 0=--inline-order 0",
    "order 4=--inline-order 4",
    "order 6=--inline-order 6",
    "order 8=--inline-order 8",
    "order 9=--inline-order 9",
    "order 6, 2 threads=--inline-order 6 --threads 2",
];

/// Set by a signal; the run ends at the next sample and cleans up.
static STOP: AtomicBool = AtomicBool::new(false);

/// What limits a run.
struct Bounds {
    begun: Instant,
    limit: Duration,
}

impl Bounds {
    /// Fails when the user has had enough; false when there is no time for another sample.
    fn allow(&self) -> Result<bool> {
        if STOP.load(Ordering::Relaxed) {
            bail!("stopped by a signal");
        }
        Ok(self.begun.elapsed() < self.limit)
    }
}

/// Turns the signals that end a program into a flag, so that everything is taken down.
fn catch_signals() -> Result<()> {
    let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    set.thread_block()?;
    std::thread::spawn(move || {
        while set.wait().is_err() {}
        STOP.store(true, Ordering::Relaxed);
    });
    Ok(())
}

fn parse_set(text: &str) -> Result<(String, Vec<String>)> {
    let (name, options) = text
        .split_once('=')
        .with_context(|| format!("'{text}': a subject is NAME=OPTIONS"))?;
    let options = options.split_whitespace().map(str::to_owned).collect();
    Ok((name.to_owned(), options))
}

fn places(cli: &Cli) -> Result<Vec<PathBuf>> {
    if !cli.on.is_empty() {
        return Ok(cli.on.clone());
    }
    let built = std::env::current_exe()?;
    let disk = built.parent().context("the program is nowhere")?;
    Ok(vec![PathBuf::from("/dev/shm"), disk.to_owned()])
}

fn measure(cli: &Cli, place: &Path, bounds: &Bounds, results: &mut Results) -> Result<()> {
    let sets = if cli.set.is_empty() {
        SETS.map(str::to_owned).to_vec()
    } else {
        cli.set.clone()
    };
    let sets = sets
        .iter()
        .map(|text| parse_set(text))
        .collect::<Result<Vec<_>>>()?;
    let stand = Stand::new(place, cli.size << 20, cli.cluster, &sets)?;
    let wanted = |job: &&Job| cli.job.is_empty() || cli.job.iter().any(|name| name == job.name);
    let jobs: Vec<&Job> = jobs::ALL.iter().filter(wanted).collect();
    for round in 0..cli.rounds {
        for job in &jobs {
            let mut order: Vec<_> = stand.subjects().iter().collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for subject in order {
                if !bounds.allow()? {
                    eprintln!("out of time in round {}", round + 1);
                    return Ok(());
                }
                stand.forget(subject, job)?;
                for (measured, value) in job.run(&subject.device, cli.seconds)? {
                    results.add(&stand.place, measured, &subject.name, value);
                }
            }
        }
        eprintln!("{}: round {} of {}", stand.place, round + 1, cli.rounds);
    }
    Ok(())
}

fn run(cli: &Cli) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "loop devices need root");
    ensure!(
        cli.size >= 16 && cli.rounds >= 1 && cli.seconds >= 1,
        "too small to measure"
    );
    catch_signals()?;
    let bounds = Bounds {
        begun: Instant::now(),
        limit: Duration::from_secs(cli.limit),
    };
    let mut results = Results::default();
    if !cli.no_inside {
        inside::measure(&places(cli)?[0], cli.cluster, &mut results)?;
    }
    if !cli.inside {
        for place in places(cli)? {
            measure(cli, &place, &bounds, &mut results)?;
        }
    }
    if cli.json {
        println!("{:#}", results.json());
    } else {
        print!("{}", results.text());
    }
    Ok(())
}

fn main() -> ExitCode {
    if std::env::var_os(stand::AS_PLOOPFS).is_some() {
        return ploopfs::cli::main();
    }
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
