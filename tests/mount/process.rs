//! The daemon as a process of the host: what it asks of the kernel, and what it survives.

use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{Mounted, text};
use crate::support::harness::{skip_excused, trial};
use crate::support::probe::Need::{Fuse, Root};
use crate::support::{self, Outcome, command, expect_flat, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "memory_is_locked_when_asked",
            &[Fuse, Root],
            memory_is_locked,
        ),
        trial(
            "memory_that_cannot_be_locked_is_an_error",
            &[Fuse, Root],
            memory_cannot_be_locked,
        ),
        trial(
            "every_thread_is_an_io_flusher",
            &[Fuse, Root],
            every_thread_is_an_io_flusher,
        ),
        trial(
            "a_host_that_grants_nothing_is_enough",
            &[Fuse, Root],
            nothing_granted_is_enough,
        ),
    ]
}

fn image(dir: &Path) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, 9600).mapping(Mapped::Percent(50));
    let path = dir.join("a.hds");
    spec.write(&path)?;
    Ok((spec, path))
}

/// A line of a process's status, without its name.
fn status(pid: i32, name: &str) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    Ok(line
        .with_context(|| format!("no {name}"))?
        .trim()
        .to_owned())
}

fn kib_locked(mounted: &Mounted) -> Result<u64> {
    let words = status(mounted.pid(), "VmLck:")?;
    Ok(words.trim_end_matches(" kB").parse()?)
}

fn has_capability(number: u32) -> Result<bool> {
    let own = i32::try_from(std::process::id())?;
    let mask = u64::from_str_radix(&status(own, "CapEff:")?, 16)?;
    Ok(mask & (1 << number) != 0)
}

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_RESOURCE: u32 = 24;

fn memory_is_locked() -> Outcome {
    if !has_capability(CAP_IPC_LOCK)? {
        return Err(skip_excused("the capability CAP_IPC_LOCK is missing"));
    }
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let plain = Mounted::new(dir.path(), &path, &[])?;
    let none = kib_locked(&plain)?;
    plain.umount()?;
    ensure!(none == 0, "{none} KiB are locked although nobody asked");
    for words in [["--lock-memory"].as_slice(), &["-o", "lock_memory"]] {
        let mounted = Mounted::new(dir.path(), &path, words)?;
        // All that is mapped counts, the threads' stacks too, which are mapped later.
        let (locked, all) = (kib_locked(&mounted)?, status(mounted.pid(), "VmSize:")?);
        ensure!(locked > 16 << 10, "{locked} KiB of {all} are locked");
        // What has not been touched is not in memory.
        let resident = mounted.memory(false)? >> 10;
        ensure!(
            resident < locked / 2,
            "{resident} KiB of {locked} are resident"
        );
        expect_flat(&mounted.disk(), &Model::of(&spec))?;
        mounted.umount()?;
    }
    support::expect_clean(&path)
}

/// Runs a mount with fewer rights than this process has; it must not succeed.
fn with_less(script: &str, image: &Path, at: &Path) -> Result<command::Finished> {
    command::run(&mut command::sh(
        script,
        &[support::PLOOPFS, text(image), text(at)],
    ))
}

fn memory_cannot_be_locked() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let script = "ulimit -H -l 8192
        exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \
            \"$1\" mount --lock-memory \"$2\" \"$3\"";
    let done = with_less(script, &path, &at)?.expect_code(1)?;
    done.expect_words(&["RLIMIT_MEMLOCK", "ulimit -l"])?;
    ensure!(support::mark_of(&path)? == 0, "the image was touched");
    Ok(())
}

/// The flags of each thread of a process, as the kernel has them.
fn thread_flags(pid: i32) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let after = stat.rsplit_once(')').context("no name")?.1;
        let word = after.split_whitespace().nth(6).context("no flags")?;
        found.push(word.parse()?);
    }
    Ok(found)
}

/// What the prctl sets: memory is not gained by I/O, and writers are throttled by device.
const PF_MEMALLOC_NOIO: u64 = 0x0008_0000;
const PF_LOCAL_THROTTLE: u64 = 0x0010_0000;

fn every_thread_is_an_io_flusher() -> Outcome {
    if !has_capability(CAP_SYS_RESOURCE)? {
        return Err(skip_excused("the capability CAP_SYS_RESOURCE is missing"));
    }
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let both = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE;
    let flags = thread_flags(mounted.pid())?;
    ensure!(flags.len() > 8, "only {} threads", flags.len());
    ensure!(
        flags.iter().all(|flags| flags & both == both),
        "a thread is no I/O flusher: {flags:x?}"
    );
    let score = fs::read_to_string(format!("/proc/{}/oom_score_adj", mounted.pid()))?;
    ensure!(score.trim() == "-500", "the out-of-memory score is {score}");
    mounted.umount()
}

/// Without the capability the mount works all the same, and the log says what is missing.
fn nothing_granted_is_enough() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let script = "setpriv --bounding-set -sys_resource --inh-caps -sys_resource \
                  \"$1\" mount -f \"$2\" \"$3\" 2>\"$3.log\" &
                  for i in $(seq 100); do test -e \"$3/disk.img\" && break; sleep 0.1; done
                  cp \"$3/disk.img\" \"$3.copy\"; \"$1\" umount \"$3\"; wait";
    with_less(script, &path, &at)?.expect_code(0)?;
    expect_flat(&at.with_extension("copy"), &Model::of(&spec))?;
    let log = fs::read_to_string(at.with_extension("log"))?;
    for word in ["I/O flusher", "killed for memory"] {
        ensure!(log.contains(word), "nothing about {word:?}: {log}");
    }
    support::expect_clean(&path)
}
