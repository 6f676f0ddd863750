//! What is refused, what fails, what is stopped: nothing is left of it, and nothing is touched.

use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, scratch, scratch_tmpfs};
use crate::systems::names;
use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("refusals_touch_nothing", &[], refusals),
        trial("a_full_host_is_left_as_it_was", &[Need::Root], full),
        trial("signals_leave_nothing", &[Need::E2fsprogs], signals),
        trial("a_kill_leaves_a_temporary_name_at_most", &[], killed),
        trial("json_tells_what_was_made", &[], json),
        trial("odd_names_are_held_or_refused", &[], odd_names),
    ]
}

/// What is asked for, and a word of the refusal.
const REFUSED: &[(&str, &str)] = &[
    ("-s 1G file.hds", "there already"),
    ("-s 1G dir.hdd", "there already"),
    ("-s 1G link.hds", "there already"),
    ("-s 1G link.hdd", "there already"),
    ("-s 1G none/x.hdd", "No such file"),
    ("-s 1G file.hds/x.hdd", "Not a directory"),
    ("-s 1G x", ".hdd"),
    ("-s 1G x.img", ".hds"),
    ("-s 0K x.hds", "no bytes"),
    ("-s 2048 x.hds", "2048s"),
    ("-s 1G --cluster-size 48K x.hds", "power of two"),
    ("-s 1G --cluster-size 16K x.hds", "power of two"),
    ("-s 1G --cluster-size 128M x.hds", "power of two"),
    ("-s 1G --cluster-size 1000 x.hds", "power of two"),
    ("-s 3T --image-version 1 x.hds", "version 2"),
    ("-s 7E x.hds", "no size"),
    ("-s 4000000T x.hds", "larger clusters"),
    ("-s 1G --image-version 3 x.hds", "1..=2"),
    (
        "-s 1G --for parallels-desktop --image-version 2 x.hdd",
        "version 1",
    ),
    (
        "-s 1G --for parallels-desktop --cluster-size 64K x.hdd",
        "1 MiB",
    ),
    ("-s 3T --for parallels-desktop x.hdd", "2 TiB"),
    ("-s 1M --mkfs ext4 x.hdd", "no room"),
    ("-s 1G --label x x.hdd", "--mkfs"),
    (
        "-s 1G --mkfs ext4 --label 12345678901234567 x.hdd",
        "16 bytes",
    ),
    ("-s 1G --mkfs xfs --label 1234567890123 x.hdd", "12 bytes"),
    ("-s 1G -f plain x.hds", "descriptor"),
    ("-s 1G -f plain --image-version 1 x.hdd", "no version"),
    ("-s 1G pipe.hds", "no place for"),
    (
        "-s 1G --for parallels-desktop a\u{1}b.hdd",
        "cannot hold U+0001",
    ),
    (
        "-s 1G --for parallels-desktop --mkfs ext4 a\u{fffe}b.hdd",
        "cannot hold U+FFFE",
    ),
    // This one is tried, so it comes last.
    ("-s 64M --mkfs xfs x.hdd", "mkfs.xfs"),
];

fn refusals() -> Outcome {
    let dir = scratch()?;
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    fs::write(at("file.hds"), "somebody's")?;
    fs::create_dir(at("dir.hdd"))?;
    symlink("nowhere", at("link.hds"))?;
    symlink("nowhere", at("link.hdd"))?;
    mkfifo(Path::new(&at("pipe.hds")), Mode::S_IRWXU)?;
    let before = (names(dir.path())?, support::fingerprint(dir.path())?);
    let modified = fs::metadata(dir.path())?.modified()?;
    for (line, word) in REFUSED {
        let mut words: Vec<&str> = line.split(' ').collect();
        let path = at(words.pop().unwrap_or_default());
        let done = command::run(command::ploopfs(&["create"]).args(&words).arg(&path))?;
        let done = done.expect_code(1)?;
        ensure!(done.stderr.contains(word), "{line}: {}", done.story());
        ensure!(done.stdout.is_empty(), "{line}");
        let now = (names(dir.path())?, support::fingerprint(dir.path())?);
        ensure!(now == before, "{line}: {:?}", now.0);
        // A file system that its own program refuses was tried in a file without a name.
        if !word.starts_with("mkfs") {
            let now = fs::metadata(dir.path())?.modified()?;
            ensure!(now == modified, "{line}: the directory was changed");
        }
    }
    Ok(())
}

/// A small file system in memory, unmounted when dropped.
pub(crate) struct Small(pub(crate) PathBuf);

impl Small {
    pub(crate) fn new(at: &Path, size: &str) -> Result<Self> {
        fs::create_dir(at)?;
        let options = format!("size={size}");
        let mut mount = command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "small"]);
        command::ok(mount.arg(at))?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = command::run(command::new("umount").arg("-l").arg(&self.0));
    }
}

fn full() -> Outcome {
    let dir = scratch()?;
    let small = Small::new(&dir.path().join("small"), "8M")?;
    for line in [
        &["x.hds", "-f", "preallocated", "-s", "16M"][..],
        &["x.hdd", "-f", "preallocated", "-s", "16M"],
        &["x.hds", "-s", "4T"],
        &["x.hdd", "-s", "4T"],
        &["x.hdd", "-s", "200M", "--mkfs", "ext4"],
        &["x.hdd", "-s", "200G", "-f", "plain", "--mkfs", "ext4"],
    ] {
        let mut create = command::ploopfs(&["create"]);
        let done = command::run(create.args(&line[1..]).arg(small.0.join(line[0])))?;
        let done = done.expect_code(1)?;
        ensure!(names(&small.0)?.is_empty(), "{}", done.story());
        ensure!(done.stderr.contains("nothing was left"), "{}", done.story());
    }
    // With room it works there.
    let mut create = command::ploopfs(&["create", "-q", "-s", "10M"]);
    command::ok(create.arg(small.0.join("x.hdd")))?;
    ensure!(names(&small.0)? == ["x.hdd"]);
    Ok(())
}

/// Starts a command, sends it a signal after a while, and tells how it ended.
fn interrupted(
    dir: &Path,
    args: &[&str],
    signal: Signal,
    after: Duration,
) -> Result<std::process::ExitStatus> {
    let mut create = command::ploopfs(&["create", "-q"]);
    create.args(args).arg(dir.join("x.hdd"));
    let mut child = create.stderr(Stdio::null()).spawn()?;
    std::thread::sleep(after);
    let pid = i32::try_from(child.id())?;
    // It was not waited for, so the number is still its own.
    kill(Pid::from_raw(pid), signal)?;
    Ok(child.wait()?)
}

fn expect_whole(disk: &Path) -> Outcome {
    command::ok(command::ploopfs(&["check", "-q"]).arg(disk))?;
    fs::remove_dir_all(disk)?;
    Ok(())
}

fn signals() -> Outcome {
    let dir = scratch_tmpfs()?;
    let (mut whole, mut stopped) = (0, 0);
    for (number, signal) in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .cycle()
        .take(24)
        .enumerate()
    {
        // Later than the program takes to start, when the signals are its own.
        let after = Duration::from_millis(10 + 5 * number as u64);
        let args = ["-s", "64G", "--cluster-size", "32K", "--mkfs", "ext4"];
        let status = interrupted(dir.path(), &args, signal, after)?;
        let disk = dir.path().join("x.hdd");
        // Before the program listens, and after it has done, the signal ends it by itself.
        if status.success() || (status.code().is_none() && disk.exists()) {
            expect_whole(&disk)?;
            whole += 1;
        } else {
            let expected = status.code().is_none_or(|code| code == 128 + signal as i32);
            ensure!(expected, "{status}");
            stopped += u32::from(status.code().is_some());
        }
        ensure!(names(dir.path())?.is_empty(), "{:?}", names(dir.path())?);
    }
    eprintln!("{stopped} were stopped, {whole} were done before");
    ensure!(stopped > 0, "no signal came in time");
    Ok(())
}

fn killed() -> Outcome {
    let dir = scratch_tmpfs()?;
    let mut left = 0;
    for number in 0..24_u64 {
        let after = Duration::from_micros(500 + 1500 * number);
        let args = ["-s", "8T", "--cluster-size", "1M"];
        interrupted(dir.path(), &args, Signal::SIGKILL, after)?;
        for name in names(dir.path())? {
            let path = dir.path().join(&name);
            if name == "x.hdd" {
                expect_whole(&path)?;
                continue;
            }
            ensure!(name.starts_with("x.hdd.creating."), "{name}");
            left += 1;
        }
    }
    eprintln!("{left} temporary names were left");
    // Whichever was left, the next one has cleared it away.
    fs::create_dir(dir.path().join("x.hdd.creating.0123abcd"))?;
    fs::write(dir.path().join("x.hdd.creating.0123abcd/root.hds"), "x")?;
    fs::write(dir.path().join("x.hdd.creating.89abcdef.flat"), "x")?;
    let disk = dir.path().join("x.hdd");
    command::ok(command::ploopfs(&["create", "-q", "-s", "1G"]).arg(&disk))?;
    ensure!(names(dir.path())? == ["x.hdd"], "{:?}", names(dir.path())?);
    expect_whole(&disk)
}

fn json() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    let said = command::ok(command::ploopfs(&["create", "--json", "-s", "10M"]).arg(&path))?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    for (key, value) in [
        ("schema_version", serde_json::json!(1)),
        ("image", serde_json::json!(text(&path))),
        ("kind", serde_json::json!("bundle")),
        ("format", serde_json::json!("expanding")),
        ("size_bytes", serde_json::json!(10 << 20)),
        ("version", serde_json::json!(2)),
        ("cluster_bytes", serde_json::json!(1 << 20)),
    ] {
        ensure!(said[key] == value, "{key}: {said}");
    }
    let refused = command::run(command::ploopfs(&["create", "--json", "-s", "10M"]).arg(&path))?;
    let refused = refused.expect_code(1)?;
    let said: serde_json::Value = serde_json::from_str(&refused.stderr)?;
    ensure!(said["error"]["kind"] == "usage", "{said}");
    Ok(())
}

/// Any name makes a disk that opens; what XML cannot hold is in no descriptor.
fn odd_names() -> Outcome {
    let dir = scratch()?;
    let names = [
        "a&<>\"'b",
        " a ",
        "a\nb\tc\rd",
        "\u{7f}\u{85}",
        "\u{fffd}\u{1f600}",
        "]]>",
    ];
    let anybody = ["a\u{1}b", "\u{1b}[31m", "\u{fffe}"];
    let check = |path: &Path| command::ok(command::ploopfs(&["check", "-q"]).arg(path));
    for name in names {
        let path = dir.path().join(format!("{name}.hdd"));
        let product = ["-q", "-s", "3M", "--for", "parallels-desktop"];
        command::ok(command::ploopfs(&["create"]).args(product).arg(&path))?;
        check(&path)?;
        let other = dir.path().join(format!("{name}2.hdd"));
        let mut convert = command::ploopfs(&["convert", "-q", "--for", "parallels-desktop"]);
        command::ok(convert.arg(&path).arg(&other))?;
        check(&other)?;
    }
    for name in anybody {
        let path = dir.path().join(format!("{name}.hdd"));
        command::ok(command::ploopfs(&["create", "-q", "-s", "3M"]).arg(&path))?;
        check(&path)?;
        let before = support::fingerprint(dir.path())?;
        let mut convert = command::ploopfs(&["convert", "-q", "--for", "parallels-desktop"]);
        let refused = convert
            .arg(&path)
            .arg(dir.path().join(format!("{name}2.hdd")));
        let refused = command::run(refused)?.expect_code(1)?;
        refused.expect_words(&["cannot hold"])?;
        ensure!(support::fingerprint(dir.path())? == before, "{name:?}");
    }
    Ok(())
}
