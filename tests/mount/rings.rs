//! Requests that come through rings of io_uring: when they do, and what happens where they cannot.

use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{Mounted, is_mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, Fuse, Rings, Root, Strace};
use crate::support::{self, Outcome, PLOOPFS, command, expect_flat, rings, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NEEDS: &[Need] = &[Fuse, Root, Rings];
const TRACED: &[Need] = &[Fuse, Root, Rings, Strace];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("rings_are_taken_when_asked_for", NEEDS, rings_are_taken),
        trial("fuser_is_taken_when_asked_for", NEEDS, fuser_is_taken),
        trial(
            "rings_are_taken_unasked_where_the_kernel_offers_them",
            TRACED,
            rings_are_taken_unasked,
        ),
        trial(
            "rings_are_not_taken_unasked_past_the_page_cache",
            NEEDS,
            direct_is_fusers,
        ),
        trial(
            "rings_that_nobody_asked_for_may_fail",
            TRACED,
            rings_or_fuser,
        ),
        trial(
            "rings_that_were_asked_for_and_fail_are_an_error",
            TRACED,
            rings_or_nothing,
        ),
        trial("no_other_transport_is_known", &[Fuse], no_other_transport),
        trial(
            "rings_stay_where_they_may_run",
            NEEDS,
            stay_where_they_may_run,
        ),
        trial("rings_take_little_memory", NEEDS, take_little_memory),
    ]
}

fn image(dir: &Path) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, 9600).mapping(Mapped::Percent(50));
    let path = dir.join("a.hds");
    spec.write(&path)?;
    Ok((spec, path))
}

/// How many threads of the daemon have a name that begins so.
fn threads(mounted: &Mounted, prefix: &str) -> Result<usize> {
    let mut count = 0;
    for task in fs::read_dir(format!("/proc/{}/task", mounted.pid()))? {
        let name = fs::read_to_string(task?.path().join("comm"))?;
        count += usize::from(name.starts_with(prefix));
    }
    Ok(count)
}

/// CPUs that the host may have.
fn cpus() -> Result<usize> {
    let list = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let ends = |range: &str| -> Option<usize> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()? - first.parse::<usize>().ok()? + 1)
    };
    let counts = list.trim().split(',').map(ends);
    counts.sum::<Option<usize>>().context("an odd list of CPUs")
}

/// Each thread is bound to its CPU, so nobody else may keep it from that for long.
fn expect_to_go_first(mounted: &Mounted) -> Outcome {
    for task in fs::read_dir(format!("/proc/{}/task", mounted.pid()))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        // The name may hold anything; what follows it is counted from the third field.
        let (name, fields) = stat.rsplit_once(") ").context("an odd line")?;
        let nice = fields.split(' ').nth(16).context("too few fields")?;
        let wanted = if name.contains("(ring-") { "-10" } else { "0" };
        ensure!(nice == wanted, "{name} has {nice}");
    }
    Ok(())
}

fn rings_are_taken() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    for options in [["--transport", "uring"], ["-o", "transport=uring"]] {
        let mounted = Mounted::new(dir.path(), &path, &options)?;
        let found = (threads(&mounted, "ring-")?, threads(&mounted, "fuser-")?);
        ensure!(found == (cpus()?, 0), "{options:?}: {found:?} threads");
        expect_to_go_first(&mounted)?;
        expect_flat(&mounted.disk(), &Model::of(&spec))?;
        mounted.umount()?;
    }
    support::expect_clean(&path)
}

fn fuser_is_taken() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    // A kernel that offers rings is no reason to take them then.
    for options in [["--transport", "fuser"], ["-o", "transport=fuser"]] {
        let mounted = Mounted::new(dir.path(), &path, &options)?;
        // The mount is there before the last of its threads.
        command::eventually(Duration::from_secs(10), || {
            let found = (threads(&mounted, "ring-")?, threads(&mounted, "fuser-")?);
            ensure!(found == (0, 8), "{options:?}: {found:?} threads");
            Ok(())
        })?;
        expect_flat(&mounted.disk(), &Model::of(&spec))?;
        mounted.umount()?;
    }
    Ok(())
}

/// A copy of the whole disk that was made through the mount of [`with_failing`].
fn expect_copy(dir: &Path, spec: &ImageSpec) -> Outcome {
    expect_flat(&dir.join("mnt.copy"), &Model::of(spec))
}

fn rings_are_taken_unasked() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    for how in ["", "--transport=auto", "-otransport=auto"] {
        // The call that fails is one that nobody makes.
        let done = with_failing(dir.path(), &path, ("acct", "error=EPERM"), how)?;
        let words = format!("requests come through {} rings", cpus()?);
        done.expect_code(0)?.expect_words(&[&words])?;
        expect_copy(dir.path(), &spec)?;
    }
    Ok(())
}

/// Each request would go through the pool there; fuser has more threads that can wait.
fn direct_is_fusers() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    for (way, rings) in [("auto", 0), ("uring", cpus()?)] {
        let mounted = Mounted::new(dir.path(), &path, &["--direct", "--transport", way])?;
        let found = threads(&mounted, "ring-")?;
        ensure!(found == rings, "{way}: {found} rings");
        expect_flat(&mounted.disk(), &Model::of(&spec))?;
        mounted.umount()?;
    }
    support::expect_clean(&path)
}

/// Whatever the host forbids, the mount is there, and says how requests come and why.
fn rings_or_fuser() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let messages = format!("error=EINVAL:when={}+", cpus()? + 1);
    for (call, how) in [
        ("io_uring_setup", "error=EPERM"),
        ("io_uring_setup", "error=ENOMEM:when=2"),
        ("io_uring_enter", "error=EPERM"),
        ("io_uring_register", "error=ENOSYS"),
        ("io_uring_register", &messages),
        ("socketpair", "error=EMFILE:when=1"),
        // Threads that are bound to a CPU and have to wait for it are worse than none.
        ("setpriority", "error=EACCES"),
    ] {
        let done = with_failing(dir.path(), &path, (call, how), "")?.expect_code(0)?;
        done.expect_words(&["requests come from /dev/fuse, by fuser: "])?;
        expect_copy(dir.path(), &spec)?;
    }
    support::expect_clean(&path)
}

/// Runs a mount with this option, if any, for which a call fails. Copies the disk and unmounts, if
/// it is there; what it said comes back.
fn with_failing(
    dir: &Path,
    image: &Path,
    (call, how): (&str, &str),
    option: &str,
) -> Result<command::Finished> {
    rings::on()?;
    let at = dir.join("mnt");
    fs::create_dir_all(&at)?;
    let script = "strace -qq -f -o \"$3.trace\" -e trace=$4 -e inject=$4:$5 \
                  \"$1\" mount -f $6 \"$2\" \"$3\" 2>\"$3.log\" &
                  for i in $(seq 100); do
                      test -e \"$3/disk.img\" && break; kill -0 $! || break; sleep 0.1
                  done
                  if test -e \"$3/disk.img\"; then
                      cp \"$3/disk.img\" \"$3.copy\"; \"$1\" umount \"$3\"
                  fi
                  status=0; wait $! || status=$?; cat \"$3.log\" >&2; exit $status";
    let args = [PLOOPFS, text(image), text(&at), call, how, option];
    let done = command::run(&mut command::sh(script, &args))?;
    ensure!(!is_mounted(&at), "it is still mounted: {}", done.story());
    Ok(done)
}

/// Whatever the host forbids shows while the mount can still be refused.
fn rings_or_nothing() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let before = support::fingerprint(&path)?;
    // Each ring has told of its device by then; what follows are the messages.
    let messages = format!("error=EINVAL:when={}+", cpus()? + 1);
    for (call, how) in [
        ("io_uring_setup", "error=EPERM"),
        ("io_uring_enter", "error=EPERM"),
        ("io_uring_register", &messages),
    ] {
        let done = with_failing(dir.path(), &path, (call, how), "--transport=uring")?;
        let done = done.expect_code(1)?;
        done.expect_words(&["no rings can be had", "--transport"])?;
    }
    let after = support::fingerprint(&path)?;
    ensure!(before == after, "a refused mount changed the image");
    Ok(())
}

fn no_other_transport() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    for option in [["--transport", "tcp"], ["-o", "transport=tcp"]] {
        let done = Mounted::refused(dir.path(), &path, &option)?;
        done.expect_words(&["auto, fuser or uring"])?;
    }
    Ok(())
}

/// The CPUs that each thread of the daemon with such a name may use.
fn places(mounted: &Mounted, prefix: &str) -> Result<Vec<String>> {
    let mut places = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", mounted.pid()))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
                .context("no such field")
        };
        if field("Name:")?.starts_with(prefix) {
            places.push(field("Cpus_allowed_list:")?);
        }
    }
    places.sort();
    Ok(places)
}

fn stay_where_they_may_run() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let uring = ["--transport", "uring"];
    let mounted = Mounted::new(dir.path(), &path, &uring)?;
    let all: Vec<String> = (0..cpus()?).map(|cpu| cpu.to_string()).collect();
    let found = places(&mounted, "ring-")?;
    // Where a CPU is off, its thread is missing.
    ensure!(found.iter().all(|place| all.contains(place)), "{found:?}");
    mounted.umount()?;
    // The daemon inherits what its caller may use.
    let before = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
    let mut only = nix::sched::CpuSet::new();
    only.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &only)?;
    let mounted = Mounted::new(dir.path(), &path, &uring);
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &before)?;
    let mounted = mounted?;
    let found = places(&mounted, "ring-")?;
    ensure!(found.iter().all(|place| place == "0"), "{found:?}");
    expect_flat(&mounted.disk(), &Model::of(&spec))?;
    mounted.umount()
}

/// A disk of 16 TiB, idle and after small requests from everywhere.
fn take_little_memory() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 1 << 35).write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &["--transport", "uring"])?;
    let idle = mounted.memory(false)? >> 20;
    for number in 0..64 {
        support::read_at(&mounted.disk(), number << 30, 4096)?;
    }
    let used = mounted.memory(false)? >> 20;
    ensure!(used < 40, "{idle} MiB idle, {used} MiB after small reads");
    mounted.umount()
}
