//! Measures ploopfs beside other ways to the same bytes, and judges its targets.
//!
//! `tools/bench --help`. The contestants of a scene are up at once, each over a file of its own,
//! and every job goes over all of them in an order that a seed shuffles, for several rounds: what
//! the rest of the machine does meanwhile hits all alike. What is told is medians, and how many
//! times as good as a named other a contestant was.

#[path = "contest/contestants.rs"]
mod contestants;
#[path = "contest/host.rs"]
mod host;
#[path = "contest/identity.rs"]
mod identity;
#[path = "contest/jobs.rs"]
mod jobs;
#[path = "contest/opening.rs"]
mod opening;
#[path = "contest/plot.rs"]
mod plot;
#[path = "contest/races.rs"]
mod races;
#[path = "contest/render.rs"]
mod render;
#[path = "contest/report.rs"]
mod report;
#[path = "contest/stage.rs"]
mod stage;
#[path = "contest/verdicts.rs"]
mod verdicts;

// The images are made by the same code that serves the tests.
#[path = "forge/mod.rs"]
mod forge;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use report::{About, Report, Unit};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Debug, Parser)]
#[command(
    name = "tools/bench",
    about = "Measures ploopfs beside other ways to the same bytes (root only)"
)]
struct Cli {
    /// Three rounds of half a second over the image in the page cache, and one of the rest
    #[arg(long)]
    quick: bool,
    /// Only these jobs of the races, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    jobs: Vec<String>,
    /// Only these scenes: loop, file, cold, direct, fresh, sync, cow, reflink, depth, open,
    /// inside
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    scenes: Vec<String>,
    /// Only these contestants: raw, identity, identity2 (the same server over another file),
    /// ploopfs, dev, uring, qemu, nbd; or ploopfs with options, as NAME=OPTIONS, or one more of
    /// these, as NAME=KIND
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    contestants: Vec<String>,
    /// Samples of each contestant and job [default: 5]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Seconds of one sample [default: 1]
    #[arg(long, value_name = "N")]
    seconds: Option<f64>,
    /// MiB of each disk
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    size: u64,
    /// Sectors of a cluster
    #[arg(long, value_name = "SECTORS", default_value_t = 2048)]
    cluster: u32,
    /// Where images are made that are read from the page cache
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    image_dir: PathBuf,
    /// Where images are made for the scenes that need a real disk
    #[arg(long, value_name = "DIR", default_value = "target")]
    disk_dir: PathBuf,
    /// Decides the order of everything [default: the time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Begin no sample after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    limit: u64,
    /// Where bench.json and bench.svg go
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Weight of all processes of the run, -20 to 19, on a machine that does other things as well
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    nice: Option<i8>,
    /// Put the tables into README.md
    #[arg(long)]
    readme: bool,
    /// Measure nothing; show a report that was written before
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Where the micro-benchmark has left its estimates
    #[arg(long, value_name = "DIR", hide = true)]
    criterion: Option<PathBuf>,
}

impl Cli {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 3 } else { 5 })
    }

    fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 0.5 } else { 1.0 })
    }

    /// True for a scene that is asked for; a quick run leaves out what needs a real disk.
    fn wants(&self, scene: &str) -> bool {
        if self.scenes.is_empty() {
            return !(self.quick && ["file", "cold", "direct"].contains(&scene));
        }
        self.scenes.iter().any(|name| name == scene)
    }
}

/// What limits a run.
struct Bounds {
    begun: Instant,
    limit: Duration,
    /// Set by a signal; the run ends at the next sample and cleans up.
    stop: Arc<AtomicBool>,
}

impl Bounds {
    /// Fails when the user has had enough; false when there is no time for another sample.
    fn allow(&self) -> Result<bool> {
        if self.stop.load(Ordering::Relaxed) {
            bail!("stopped by a signal");
        }
        Ok(self.begun.elapsed() < self.limit)
    }
}

/// Turns the signals that end a program into a flag, so that everything is taken down. Handlers are
/// not inherited by programs that are started, as blocked signals would be.
fn catch_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

fn about(cli: &Cli, seed: u64) -> Result<About> {
    // Where the results go is nobody's business.
    let mut words = vec!["tools/bench".to_owned()];
    let mut typed = std::env::args().skip(1);
    while let Some(word) = typed.next() {
        match word.as_str() {
            "--criterion" | "--out" => drop(typed.next()),
            "--readme" => {}
            _ => words.push(word),
        }
    }
    Ok(About {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        date: host::said(Command::new("date").arg("+%Y-%m-%d"))?,
        kernel: host::said(Command::new("uname").arg("-r"))?,
        cpus: std::thread::available_parallelism()?.get(),
        command: words.join(" "),
        seed,
        rounds: cli.rounds(),
        seconds: cli.seconds(),
        size_mib: cli.size,
        image_fs: host::file_system(&cli.image_dir)?,
        disk_fs: host::file_system(&cli.disk_dir)?,
        load: vec![load()],
    })
}

/// Takes up what the micro-benchmark has found out: nanoseconds of a request inside the program.
fn add_inside(dir: &Path, report: &mut Report) -> Result<()> {
    let estimate = |name: &str| -> Result<f64> {
        let path = dir.join("request").join(name).join("new/estimates.json");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let all: serde_json::Value = serde_json::from_str(&text)?;
        all["median"]["point_estimate"]
            .as_f64()
            .context("no median")
    };
    let mut add = |job: &str, value| {
        let key = (verdicts::INSIDE, job, verdicts::OURS);
        report.add(key, Unit::Nanoseconds, 0, value);
    };
    for name in ["hole", "read", "read_4_levels", "pread", "write", "pwrite"] {
        add(name, estimate(name)?);
    }
    let beside = |own, bare| Ok::<_, anyhow::Error>(estimate(own)? - estimate(bare)?);
    add("read of 4 KiB beside its pread", beside("read", "pread")?);
    add(
        "write of 4 KiB beside its pwrite",
        beside("write", "pwrite")?,
    );
    Ok(())
}

fn measure(cli: &Cli) -> Result<Report> {
    ensure!(nix::unistd::geteuid().is_root(), "loop devices need root");
    ensure!(
        cli.size >= 16 && cli.rounds() >= 1 && cli.seconds() > 0.0,
        "too small to measure"
    );
    let known = |list: &[String], names: &[&str]| {
        let stray = list.iter().find(|name| !names.contains(&name.as_str()));
        stray.map_or(Ok(()), |name| {
            bail!("'{name}' is none of {}", names.join(", "))
        })
    };
    let mut scenes: Vec<&str> = races::ALL.iter().map(|scene| scene.name).collect();
    scenes.push(verdicts::INSIDE);
    known(&cli.scenes, &scenes)?;
    known(&cli.jobs, &jobs::ALL.map(|job| job.name))?;
    let contestants = contestants::chosen(&cli.contestants)?;
    let stop = catch_signals()?;
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = cli.seed.unwrap_or(time.as_secs());
    let mut report = Report {
        schema_version: 2,
        about: about(cli, seed)?,
        ..Report::default()
    };
    if let Some(nice) = cli.nice {
        host::WEIGHT.store(nice, Ordering::Relaxed);
        host::weigh(std::process::id() as i32)?;
    }
    let image_dir = host::WorkDir::below(&cli.image_dir)?;
    let disk_dir = host::WorkDir::below(&cli.disk_dir)?;
    let _rings = match contestants::enable_rings(&contestants) {
        Some(Ok(rings)) => Some(rings),
        Some(Err(error)) => {
            report.skip(format!("uring: {error:#}"));
            None
        }
        None => None,
    };
    let bounds = Bounds {
        begun: Instant::now(),
        limit: Duration::from_secs(cli.limit),
        stop,
    };
    let mut run = races::Run {
        cli,
        bounds: &bounds,
        report: &mut report,
        contestants,
        random: seed,
        image_dir: image_dir.path(),
        disk_dir: disk_dir.path(),
    };
    for scene in races::ALL.iter().filter(|scene| cli.wants(scene.name)) {
        if let Err(error) = run.play(scene) {
            bounds.allow()?;
            run.report.skip(format!("the rest of {error:#}"));
        }
    }
    if let Some(dir) = cli
        .criterion
        .as_ref()
        .filter(|_| cli.wants(verdicts::INSIDE))
    {
        add_inside(dir, &mut report)?;
    }
    report.about.load.push(load());
    Ok(report)
}

fn run(cli: &Cli) -> Result<()> {
    let mut report = match &cli.from {
        Some(file) => serde_json::from_str(&fs::read_to_string(file)?)
            .with_context(|| format!("{} is no report", file.display()))?,
        None => measure(cli)?,
    };
    report.verdicts = verdicts::judge(&report);
    print!("{}", render::text(&report));
    if cli.from.is_none() {
        fs::create_dir_all(&cli.out)?;
        let json = cli.out.join("bench.json");
        fs::write(&json, serde_json::to_string_pretty(&report)?)?;
        eprintln!("written: {}", json.display());
    }
    let svg = cli.out.join("bench.svg");
    plot::draw(&report, &svg)?;
    if cli.readme {
        let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
        render::readme(&report, &readme)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let is = |variable| std::env::var_os(variable).is_some();
    if is(host::AS_PLOOPFS) {
        return ploopfs::cli::main();
    }
    let result = if is(identity::AS_IDENTITY) {
        identity::main()
    } else if is(opening::AS_OPENER) {
        opening::main()
    } else {
        run(&Cli::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
