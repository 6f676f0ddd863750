//! Looks for lost and foreign sectors for as long as asked: kills of real daemons, or power cuts in
//! the simulation.
//!
//! `tools/soak --help`. Both are tests of the tree, run here in rounds with fresh seeds; what they
//! count is added up. The first failure ends it, with the command that repeats it.

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant, SystemTime};

#[derive(Parser)]
#[command(
    about = "Kills daemons or cuts the power for as long as asked, and adds up what is found"
)]
struct Cli {
    /// What to run
    #[arg(value_enum)]
    what: What,
    /// End after so many kills
    #[arg(long, value_name = "N")]
    kills: Option<u64>,
    /// End after so many seeds of each kind of disk (simulation)
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// End after so many hours
    #[arg(long, value_name = "HOURS")]
    hours: Option<f64>,
    /// The first seed [default: taken from the clock]
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Run only the tests whose name holds this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Build without optimisation: quick to start, and closer to what `cargo test` runs
    #[arg(long)]
    dev: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// kill -9 of real daemons under load; needs FUSE, and root for loop devices
    Kill,
    /// Power cuts, kills and failing hosts in the simulation
    Sim,
}

impl What {
    fn test(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Sim => "sim",
        }
    }

    /// What limits a round, and how much of it a round of a few minutes has.
    fn round(self) -> (&'static str, u64) {
        match self {
            Self::Kill => ("PLOOPFS_KILLS", 64),
            Self::Sim => ("PLOOPFS_SEEDS", 50),
        }
    }
}

/// Words before which a number in what a test prints is a count.
const COUNTS: [&str; 5] = ["kills", "sectors", "requests", "operations", "states"];

/// Set by a signal; the running round ends early and cleans up.
static STOP: AtomicBool = AtomicBool::new(false);

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

/// Builds a test and finds its program. It is run by itself, as cargo would die of a ^C before the
/// test has cleaned up.
fn build(cli: &Cli) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["test", "--locked", "--no-run", "--message-format=json"]);
    cargo.args(["--test", cli.what.test()]);
    if !cli.dev {
        cargo.arg("--release");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let built = cargo.current_dir(root).stderr(Stdio::inherit()).output()?;
    ensure!(built.status.success(), "the test does not build");
    for line in built.stdout.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            continue;
        };
        if message["target"]["name"] == cli.what.test() {
            if let Some(path) = message["executable"].as_str() {
                return Ok(PathBuf::from(path));
            }
        }
    }
    bail!("cargo names no program of the test {}", cli.what.test())
}

/// Adds the numbers of a line to the sums.
fn count(line: &str, sums: &mut BTreeMap<&'static str, u64>) {
    let words: Vec<&str> = line.split_whitespace().collect();
    for pair in words.windows(2) {
        let word = pair[1].trim_matches(',');
        let known = COUNTS.iter().find(|known| **known == word);
        if let (Ok(number), Some(known)) = (pair[0].parse::<u64>(), known) {
            *sums.entry(*known).or_insert(0) += number;
        }
    }
}

fn told(sums: &BTreeMap<&'static str, u64>) -> String {
    let each = sums.iter().map(|(word, sum)| format!("{sum} {word}"));
    each.collect::<Vec<_>>().join(", ")
}

fn pass_on(pipe: impl Read + Send + 'static, lines: Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = lines.send(line);
        }
    });
}

/// Runs the test once; gives its end and all that it printed.
fn round(cli: &Cli, program: &Path, seed: u64, size: u64) -> Result<(ExitStatus, Vec<String>)> {
    let mut test = Command::new(program);
    if cli.what == What::Sim {
        test.arg("--nocapture");
    }
    let (limit, _) = cli.what.round();
    let mut child = test
        .args(&cli.only)
        .env("PLOOPFS_SEED", seed.to_string())
        .env(limit, size.to_string())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| program.display().to_string())?;
    let (sender, lines) = channel();
    let out = child.stdout.take().context("no standard output")?;
    let err = child.stderr.take().context("no standard error")?;
    pass_on(out, sender.clone());
    pass_on(err, sender);
    let mut asked = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if STOP.load(Ordering::Relaxed) && !asked {
            asked = true;
            let pid = i32::try_from(child.id()).context("no process number")?;
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    // Whatever a left-over process might hold open is not waited for.
    let mut printed = Vec::new();
    while let Ok(line) = lines.recv_timeout(Duration::from_secs(1)) {
        printed.push(line);
    }
    Ok((status, printed))
}

fn run(cli: &Cli) -> Result<()> {
    let program = build(cli)?;
    catch_signals()?;
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let mut seed = cli.seed.unwrap_or(clock.as_secs());
    let (limit, usual) = cli.what.round();
    let wanted = match cli.what {
        What::Kill => cli.kills,
        What::Sim => cli.seeds,
    };
    let mut left = wanted.unwrap_or(u64::MAX);
    let mut sums = BTreeMap::new();
    let begun = Instant::now();
    let in_time = || {
        cli.hours
            .is_none_or(|hours| begun.elapsed().as_secs_f64() < hours * 3600.0)
    };
    let mut rounds = 0;
    while left > 0 && in_time() && !STOP.load(Ordering::Relaxed) {
        let size = left.min(usual);
        let before = sums.values().sum::<u64>();
        let killed = sums.get("kills").copied().unwrap_or(0);
        let (status, printed) = round(cli, &program, seed, size)?;
        for line in &printed {
            count(line, &mut sums);
        }
        if !status.success() && !STOP.load(Ordering::Relaxed) {
            println!("{}", printed.join("\n"));
            let test = cli.what.test();
            bail!(
                "seed {seed} failed after {}\nrepeat with: PLOOPFS_SEED={seed} {limit}={size} \
                 cargo test --test {test}",
                told(&sums)
            );
        }
        if STOP.load(Ordering::Relaxed) {
            // It may have failed before it was cut off: that is for the reader to see.
            println!("{}", printed.join("\n"));
            println!(
                "soak: round {} was cut off, its output is above; nothing lost, nothing foreign in \
                 the {rounds} before it",
                rounds + 1
            );
            return Ok(());
        }
        let after = sums.values().sum::<u64>();
        if after == before {
            println!("{}", printed.join("\n"));
            bail!("nothing was run");
        }
        rounds += 1;
        left -= match cli.what {
            // With `--only` the others' share of the kills is not used.
            What::Kill => left.min(sums.get("kills").copied().unwrap_or(0) - killed),
            What::Sim => size,
        };
        // The simulation takes so many seeds from the first one on.
        seed = seed.wrapping_add(if cli.what == What::Sim { size } else { 1 });
        let minutes = begun.elapsed().as_secs() / 60;
        println!("soak: {rounds} rounds, {minutes} min, {}", told(&sums));
    }
    println!("soak: nothing lost, nothing foreign");
    Ok(())
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
