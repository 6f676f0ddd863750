//! Whatever is killed or fails while `attach` is at work, nothing of it stays.

use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need::{Fuse, Loop, Root, Strace};
use crate::support::{Outcome, PLOOPFS, command, rings, scratch};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const ROUNDS: u64 = 60;
/// Longer than a killed process takes to go, on a busy host.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "what_is_killed_during_attach_goes",
            &[Fuse, Root, Loop],
            what_is_killed_goes,
        ),
        trial(
            "a_device_that_cannot_be_looked_at_goes",
            &[Fuse, Root, Loop, Strace],
            what_cannot_be_looked_at_goes,
        ),
    ]
}

/// Whom it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The one who serves.
    Daemon,
    /// The one who sets the loop device up.
    Outside,
}

/// Processes that have this text in their command lines, with their parents and those lines. A
/// process that has ended counts while threads of it are left.
fn family(image: &str) -> Vec<(i32, i32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let (state, parent) = (fields.next(), fields.next());
        let parent = parent.and_then(|parent| parent.parse().ok()).unwrap_or(0);
        if line.contains(image) && state != Some("Z") {
            found.push((pid, parent, line));
        }
    }
    found
}

/// Loop devices over a file of this name.
fn devices(name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let is_its = |entry: &fs::DirEntry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file"));
        file.is_ok_and(|file| file.trim_end().ends_with(name))
    };
    entries
        .filter(is_its)
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect()
}

fn attach(image: &Path) -> Result<Child> {
    let way = rings::way().unwrap_or("fuser");
    let mut line = command::ploopfs(&["attach", "--transport", way]);
    line.arg(image).stdout(Stdio::piped()).stderr(Stdio::null());
    line.spawn().context("attach")
}

/// Waits for the command, and gives its status and what it printed.
fn ended(mut child: Child) -> Result<(bool, String)> {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            bail!("attach waits for a daemon that does not end");
        }
        thread::sleep(Duration::from_millis(2));
    };
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut said)?;
    }
    Ok((status.success(), said))
}

/// Kills one process of an attach after so long, or as soon as there is one. False if all was over.
fn strike(image: &str, parent: i32, victim: Victim, at: Instant) -> bool {
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < at {
        thread::sleep(Duration::from_micros(200));
    }
    while Instant::now() < deadline {
        let family = family(image);
        let daemon = family.iter().find(|(_, above, _)| *above == parent);
        let daemon = daemon.map(|(pid, ..)| *pid);
        let outside = family.iter().find(|(_, above, _)| Some(*above) == daemon);
        let found = match victim {
            Victim::Daemon => daemon,
            Victim::Outside => outside.map(|(pid, ..)| *pid),
        };
        if let Some(pid) = found {
            return kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok();
        }
        if !family.iter().any(|(pid, ..)| *pid == parent) {
            return false;
        }
    }
    false
}

fn what_is_killed_goes() -> Outcome {
    let dir = scratch()?;
    let way = rings::way().unwrap_or("fuser");
    let name = format!("killed-{way}-{}.hds", std::process::id());
    let image = dir.path().join(&name);
    let spec = ImageSpec::new(2, 2048, 2048 * 20).mapping(Mapped::Percent(50));
    spec.write(&image)?;
    let begun = Instant::now();
    let (_, said) = ended(attach(&image)?)?;
    let usual = begun.elapsed().min(Duration::from_secs(1));
    command::ok(command::ploopfs(&["detach"]).arg(said.trim()))?;
    let mut state = 20_u64;
    let mut hits = 0;
    for round in 0..ROUNDS {
        let part = crate::forge::content::splitmix(&mut state) % 1000;
        let after = usual * u32::try_from(part)? / 800;
        let victim = [Victim::Daemon, Victim::Outside][usize::from(round % 4 == 3)];
        let command = attach(&image)?;
        let parent = i32::try_from(command.id())?;
        hits += u64::from(strike(text(&image), parent, victim, Instant::now() + after));
        let told = |what: &str| format!("round {round}, {victim:?} after {after:?}: {what}");
        let (success, said) = ended(command).with_context(|| told("hangs"))?;
        if success {
            // It was too late: a device with a dead daemon stays, and is told of.
            let _ = command::run(command::ploopfs(&["detach"]).arg(said.trim()))?;
        }
        command::eventually(PATIENCE, || {
            let family = family(text(&image));
            ensure!(family.is_empty(), told(&format!("{family:?} are left")));
            let devices = devices(&name);
            ensure!(devices.is_empty(), told(&format!("{devices:?} are left")));
            Ok(())
        })
        .inspect_err(|_| {
            for device in devices(&name) {
                let _ = command::run(command::new("losetup").arg("-d").arg(device));
            }
        })?;
    }
    ensure!(hits > ROUNDS / 4, "only {hits} hits");
    Ok(())
}

/// The process that sets a device up asks for a free one, sets it up, and looks at it.
fn what_cannot_be_looked_at_goes() -> Outcome {
    let dir = scratch()?;
    let way = rings::way().unwrap_or("fuser");
    let name = format!("unseen-{way}-{}.hds", std::process::id());
    let image = dir.path().join(&name);
    ImageSpec::new(2, 2048, 2048 * 20).write(&image)?;
    let trace = dir.path().join("trace");
    let mut line = command::new("strace");
    line.args(["-qq", "-f", "-o", text(&trace), "-e", "trace=ioctl"]);
    line.args(["-e", "inject=ioctl:error=EIO:when=3", PLOOPFS, "attach"]);
    line.args(["--transport", way]).arg(&image);
    let child = line.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let said = ended(child?);
    let traced = fs::read_to_string(&trace)?;
    let looks = |line: &&str| line.contains("LOOP_GET_STATUS64") && line.contains("INJECTED");
    let result = said.and_then(|(success, _)| {
        ensure!(traced.lines().any(|line| looks(&line)), "{traced}");
        ensure!(!success, "nobody noticed");
        command::eventually(PATIENCE, || {
            let (family, devices) = (family(text(&image)), devices(&name));
            ensure!(
                family.is_empty() && devices.is_empty(),
                "{family:?}, {devices:?}"
            );
            Ok(())
        })
    });
    result.inspect_err(|_| {
        for device in devices(&name) {
            let _ = command::run(command::new("losetup").arg("-d").arg(device));
        }
        for (pid, ..) in family(text(&image)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    })
}
