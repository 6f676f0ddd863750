//! What all reading commands have in common: they change nothing, end when asked, and never panic.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::corrupt;
use crate::forge::image::{IN_USE, ImageSpec, Mapped};
use crate::support::guards::text;
use crate::support::{Outcome, PLOOPFS, command, fingerprint, scratch};
use anyhow::{Context, Result, ensure};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const VERBS: [&[&str]; 5] = [
    &["map", "--json"],
    &["map"],
    &["measure", "-O", "hds"],
    &["checksum"],
    &["compare"],
];

/// Runs a verb on a disk; `compare` gets it twice.
fn on(verb: &[&str], disk: &Path) -> Command {
    let mut command = command::ploopfs(verb);
    command.arg(disk);
    if verb[0] == "compare" {
        command.arg(disk);
    }
    command
}

pub(crate) fn reading_changes_nothing_however_broken() -> Outcome {
    let dir = scratch()?;
    for corruption in corrupt::ALL {
        let name = corruption.name;
        let disk = dir.path().join(if name.starts_with('x') {
            "x.hdd"
        } else {
            "x.hds"
        });
        let like = ImageSpec::new(2, 8, 237).mapping(Mapped::Percent(50));
        match fs::metadata(&disk) {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&disk)?,
            Ok(_) => fs::remove_file(&disk)?,
            Err(_) => {}
        }
        if name.starts_with('x') {
            BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {}).write(&disk)?;
        } else {
            like.write(&disk)?;
        }
        if corrupt::apply(name, &disk).is_err() {
            continue;
        }
        let before = fingerprint(&disk)?;
        for verb in VERBS {
            let done = command::run(&mut on(verb, &disk))?;
            ensure!((0..=2).contains(&done.code()), "{name}: {}", done.story());
            ensure!(
                !done.stderr.contains("panicked"),
                "{name}: {}",
                done.story()
            );
        }
        ensure!(fingerprint(&disk)? == before, "{name}: it was changed");
    }
    Ok(())
}

pub(crate) fn what_is_in_use_is_told_on_stderr() -> Outcome {
    let dir = scratch()?;
    let disk = dir.path().join("x.hds");
    let mut spec = ImageSpec::new(2, 64, 4096).mapping(Mapped::All);
    spec.mark = IN_USE;
    spec.write(&disk)?;
    for verb in VERBS {
        command::run(&mut on(verb, &disk))?
            .expect_code(0)?
            .expect_words(&["in-use mark"])?;
    }
    Ok(())
}

pub(crate) fn a_reader_that_goes_is_no_panic() -> Outcome {
    let dir = scratch()?;
    let disk = dir.path().join("x.hds");
    let every_other = Mapped::Every { step: 2, phase: 0 };
    let spec = ImageSpec::new(2, 8, 8 * 20_000).mapping(every_other);
    spec.write(&disk)?;
    let script = "{ \"$@\"; echo $? >\"$0\"; } | head -1 >/dev/null";
    let status = dir.path().join("status");
    // Half a manifest must not pass for one.
    let verbs = [
        (&["map", "--json"][..], "0"),
        (&["map"], "0"),
        (&["checksum"], "141"),
    ];
    for (verb, expected) in verbs {
        let mut shell = command::new("sh");
        shell
            .args(["-c", script, text(&status), PLOOPFS])
            .args(verb);
        let done = command::run(shell.arg(&disk))?.expect_code(0)?;
        ensure!(done.stderr.is_empty(), "{}", done.story());
        let found = fs::read_to_string(&status)?;
        ensure!(found.trim() == expected, "{verb:?}: {found}");
    }
    Ok(())
}

/// Disks that differ do so also where nobody reads what is said about it, or nobody can.
pub(crate) fn a_verdict_is_in_the_status() -> Outcome {
    let dir = scratch()?;
    let (a, b) = (dir.path().join("a.hds"), dir.path().join("b.hds"));
    ImageSpec::new(2, 64, 4096).mapping(Mapped::All).write(&a)?;
    ImageSpec::new(2, 64, 4096).write(&b)?;
    let script = "{ sleep 0.2; \"$@\"; echo $? >\"$0\"; } | true";
    let status = dir.path().join("status");
    let mut shell = command::new("sh");
    shell.args(["-c", script, text(&status), PLOOPFS, "compare"]);
    command::run(shell.arg(&a).arg(&b))?.expect_code(0)?;
    let found = fs::read_to_string(&status)?;
    ensure!(found.trim() == "1", "they differ: {found}");
    let mut shell = command::new("sh");
    shell.args(["-c", "exec \"$0\" compare \"$@\" >/dev/full", PLOOPFS]);
    command::run(shell.arg(&a).arg(&b))?.expect_code(2)?;
    Ok(())
}

/// A `qemu-img` that has a disk of 1 MiB and never gets done with it.
fn endless_qemu(dir: &Path) -> Outcome {
    let script = "#!/bin/sh\n\
        case $1 in\n\
        info) echo '{}';;\n\
        map) echo '[{\"start\":0,\"length\":1048576,\"depth\":0,\"present\":true,\
        \"zero\":false,\"data\":true}]';;\n\
        *) exec sleep 60;;\n\
        esac\n";
    let path = dir.join("qemu-img");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    fs::write(dir.join("x.qcow2"), b"QFI\xfb")?;
    Ok(())
}

fn checksum_for_ever(dir: &Path, stderr: Stdio, options: &[&str]) -> Result<Child> {
    endless_qemu(dir)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = command::ploopfs(&["checksum"]);
    command
        .args(options)
        .arg(dir.join("x.qcow2"))
        .env("PATH", format!("{}:{path}", dir.display()))
        .env("TMPDIR", dir)
        .env("TERM", "xterm")
        .stdout(Stdio::null())
        .stderr(stderr);
    Ok(command.spawn()?)
}

fn tell(child: &Child, signal: Signal) -> Outcome {
    Ok(kill(Pid::from_raw(i32::try_from(child.id())?), signal)?)
}

/// Waits until something is in a file that the program writes to.
fn until_said(path: &Path, word: &str) -> Result<String> {
    command::eventually(Duration::from_secs(20), || {
        let said = fs::read_to_string(path)?;
        ensure!(said.contains(word), "{said:?} has no {word:?}");
        Ok(said)
    })
}

pub(crate) fn signals_ask_and_stop() -> Outcome {
    let dir = scratch()?;
    let log = dir.path().join("log");
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut child = checksum_for_ever(dir.path(), File::create(&log)?.into(), &[])?;
        until_said(&log, "is read through qemu-img")?;
        thread::sleep(Duration::from_millis(300));
        tell(&child, Signal::SIGUSR1)?;
        let said = until_said(&log, "/s")?;
        ensure!(
            said.contains("reading through qemu-img: 0 B of 1 MiB (0 %)"),
            "{said}"
        );
        ensure!(child.try_wait()?.is_none(), "SIGUSR1 ended it");
        let began = Instant::now();
        tell(&child, signal)?;
        let status = child.wait()?;
        ensure!(status.code() == Some(code), "{status}");
        ensure!(
            began.elapsed() < Duration::from_secs(3),
            "{:?}",
            began.elapsed()
        );
        until_said(&log, "stopped by a signal")?;
    }
    let names: Result<Vec<_>, _> = fs::read_dir(dir.path())?.collect();
    ensure!(names?.len() == 3, "something is left behind");
    Ok(())
}

pub(crate) fn quiet_says_nothing_but_stops() -> Outcome {
    let dir = scratch()?;
    let log = dir.path().join("log");
    let mut child = checksum_for_ever(dir.path(), File::create(&log)?.into(), &["-q"])?;
    thread::sleep(Duration::from_millis(700));
    tell(&child, Signal::SIGUSR1)?;
    thread::sleep(Duration::from_millis(300));
    ensure!(
        fs::read(&log)?.is_empty(),
        "{:?}",
        fs::read_to_string(&log)?
    );
    tell(&child, Signal::SIGINT)?;
    ensure!(child.wait()?.code() == Some(130));
    Ok(())
}

pub(crate) fn an_ignored_signal_stays_ignored() -> Outcome {
    let dir = scratch()?;
    endless_qemu(dir.path())?;
    let path = std::env::var("PATH").unwrap_or_default();
    let script = "trap '' HUP; exec \"$@\"";
    let mut child = command::new("sh")
        .args(["-c", script, "sh", PLOOPFS, "checksum", "-q"])
        .arg(dir.path().join("x.qcow2"))
        .env("PATH", format!("{}:{path}", dir.path().display()))
        .env("TMPDIR", dir.path())
        .stdout(Stdio::null())
        .spawn()?;
    thread::sleep(Duration::from_millis(700));
    tell(&child, Signal::SIGHUP)?;
    thread::sleep(Duration::from_millis(300));
    let lives = child.try_wait()?.is_none();
    tell(&child, Signal::SIGTERM)?;
    let status = child.wait()?;
    ensure!(
        lives && status.code() == Some(143),
        "{status} {:?}",
        status.signal()
    );
    Ok(())
}

pub(crate) fn a_terminal_gets_a_bar() -> Outcome {
    let dir = scratch()?;
    let pty = openpty(None, None)?;
    let mut child = checksum_for_ever(dir.path(), Stdio::from(pty.slave), &[])?;
    let (send, seen) = std::sync::mpsc::channel();
    let mut master = File::from(pty.master);
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        // Ends with an error when the last one that writes is gone.
        while let Ok(count) = master.read(&mut bytes) {
            if send.send(bytes[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let began = Instant::now();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("0 B of 1.00 MiB") {
        let left = Duration::from_secs(20).saturating_sub(began.elapsed());
        said.extend(
            seen.recv_timeout(left)
                .with_context(|| format!("no bar: {:?}", String::from_utf8_lossy(&said)))?,
        );
    }
    ensure!(began.elapsed() > Duration::from_millis(400), "too early");
    tell(&child, Signal::SIGINT)?;
    ensure!(child.wait()?.code() == Some(130));
    Ok(())
}

pub(crate) fn examples_of_the_manual_run() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 8192).mapping(Mapped::Percent(30));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {});
    bundle.write(&dir.path().join("root.hdd"))?;
    let bytes = bundle.model().read(0, 8192 * 512);
    fs::write(dir.path().join("copy.raw"), bytes)?;
    let mut count = 0;
    for verb in ["map", "compare", "measure", "checksum"] {
        let page = format!("{}/man/ploopfs-{verb}.1", env!("CARGO_MANIFEST_DIR"));
        let page = fs::read_to_string(page)?;
        for line in page
            .lines()
            .filter_map(|line| line.strip_prefix("$ ploopfs "))
        {
            let script = format!("\"$1\" {line}");
            let done = command::run(command::sh(&script, &[PLOOPFS]).current_dir(dir.path()))?;
            done.expect_code(0).with_context(|| line.to_owned())?;
            count += 1;
        }
    }
    ensure!(count >= 8, "only {count} examples");
    Ok(())
}
