//! Rings that stop working while they are in use: the kernel is short of memory, or a thread of the
//! daemon cannot go on.

use super::disks::{expect_shadow, scribble};
use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{Mounted, is_mounted, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, Fuse, Rings, Root, Strace};
use crate::support::{self, Outcome, PLOOPFS, command, rings, scratch};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const NEEDS: &[Need] = &[Fuse, Root, Rings, Strace];
const ATTACH: &[Need] = &[Fuse, Root, Rings, Strace, Need::Loop];
const URING: &[&str] = &["--transport", "uring"];
const SECTORS: u64 = 9600;
const BYTES: usize = 9600 * 512;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_short_time_of_memory_ends_no_ring",
            NEEDS,
            short_of_memory,
        ),
        trial("a_ring_that_breaks_ends_the_mount", NEEDS, ends_the_mount),
        trial("a_ring_that_breaks_ends_an_attach", ATTACH, ends_an_attach),
        trial(
            "an_answer_waits_for_no_slow_request",
            NEEDS,
            waits_for_no_slow_request,
        ),
        trial("mounts_on_rings_come_and_go", NEEDS, come_and_go),
    ]
}

fn image(dir: &Path) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, SECTORS).mapping(Mapped::Percent(50));
    let path = dir.join("a.hds");
    spec.write(&path)?;
    Ok((spec, path))
}

/// A tracer of the daemon, or of one of its threads, that makes calls fail or take long.
struct Tracer(Child);

impl Tracer {
    fn new(target: &[&str], call: &str, how: &str) -> Result<Self> {
        let mut command = command::new("strace");
        command.args(target).args(["-o", "/dev/null"]);
        command.args([
            "-e",
            &format!("trace={call}"),
            "-e",
            &format!("inject={call}:{how}"),
        ]);
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(child.stderr.take().context("no stderr")?);
        let mut line = String::new();
        while !line.contains("attached") {
            line.clear();
            if said.read_line(&mut line)? == 0 {
                bail!("strace {target:?} did not begin");
            }
        }
        // Somebody must go on reading what it says.
        thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Ok(Self(child))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // It lets go of what it traces when it is asked to end.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}

/// The threads that serve queues.
fn ring_threads(mounted: &Mounted) -> Result<Vec<String>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", mounted.pid()))? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.starts_with("ring-") {
            threads.push(
                task.file_name()
                    .context("no name")?
                    .to_string_lossy()
                    .into_owned(),
            );
        }
    }
    Ok(threads)
}

/// What io_uring itself refuses for a moment was not FUSE's answer.
fn short_of_memory() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let mut shadow = Model::of(&spec).read(0, BYTES);
    let mounted = Mounted::new(dir.path(), &path, URING)?;
    let pid = mounted.pid().to_string();
    for (seed, errno) in (1..).zip(["EAGAIN", "ENOMEM", "EBUSY", "EINTR"]) {
        let how = format!("error={errno}:when=1+3");
        let tracer = Tracer::new(&["-f", "-p", &pid], "io_uring_enter", &how)?;
        scribble(&mounted.disk(), &mut shadow, seed, 20)?;
        drop(tracer);
    }
    // Nor are answers from other threads lost, which reach a ring by messages.
    let how = "error=ENOMEM:when=1+2";
    let tracer = Tracer::new(&["-f", "-p", &pid], "io_uring_register", how)?;
    scribble(&mounted.disk(), &mut shadow, 5, 40)?;
    drop(tracer);
    mounted.umount()?;
    support::expect_clean(&path)?;
    expect_shadow(&path, &shadow)
}

/// Reads from everywhere until it fails, and says how long that went well.
fn read_until_it_fails(disk: &Path) -> Result<thread::JoinHandle<Duration>> {
    let file = File::open(disk)?;
    Ok(thread::spawn(move || {
        let (begun, mut at) = (Instant::now(), 0);
        let mut buf = [0; 4096];
        while file.read_exact_at(&mut buf, at).is_ok() {
            at = (at + 36_864) % (BYTES as u64 - 4096);
            // What the page cache has is no request.
            let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            let _ = nix::fcntl::posix_fadvise(&file, 0, 0, advice);
        }
        begun.elapsed()
    }))
}

/// One thread of a queue fails: all who use the mount are told, and the image is closed.
fn ends_the_mount() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let mut shadow = Model::of(&spec).read(0, BYTES);
    let mounted = Mounted::new(dir.path(), &path, URING)?;
    scribble(&mounted.disk(), &mut shadow, 1, 30)?;
    let readers = [0; 4].map(|_| read_until_it_fails(&mounted.disk()));
    thread::sleep(Duration::from_millis(200));
    let threads = ring_threads(&mounted)?;
    let one = threads.first().context("no threads of rings")?;
    let tracer = Tracer::new(&["-p", one], "io_uring_enter", "error=EBADF")?;
    mounted.gone(Duration::from_secs(20))?;
    for reader in readers {
        let took = reader?.join();
        ensure!(took.is_ok(), "a reader panicked");
    }
    drop(tracer);
    ensure!(
        !is_mounted(mounted.path()),
        "the dead mount was left behind"
    );
    drop(mounted);
    support::expect_clean(&path)?;
    expect_shadow(&path, &shadow)
}

/// The same while a loop device is being set up, whose open waits in the kernel.
fn ends_an_attach() -> Outcome {
    rings::on()?;
    let dir = scratch()?;
    let (spec, _) = image(dir.path())?;
    // The host shows the name of what is under a loop device.
    let name = format!("broken-{}.hds", std::process::id());
    let path = dir.path().join(&name);
    spec.write(&path)?;
    for when in ["when=3+", "when=5+", "when=8+"] {
        let how = format!("inject=io_uring_enter:error=EBADF:{when}");
        let mut command = command::new("strace");
        command.args([
            "-qq",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            "trace=io_uring_enter",
            "-e",
            &how,
        ]);
        command.args([PLOOPFS, "attach", "-f", "--transport", "uring", text(&path)]);
        let done = command::run_within(&mut command, Duration::from_secs(60))?;
        ensure!(done.code() == 1, "{when}: {}", done.story());
        support::expect_clean(&path)?;
        command::eventually(Duration::from_secs(5), || {
            let all = command::ok(command::new("losetup").args(["-n", "-O", "BACK-FILE"]))?;
            ensure!(
                !all.contains(&name),
                "{when}: a dead device was left: {all}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn waits_for_no_slow_request() -> Outcome {
    let mut seen = Vec::new();
    for _ in 0..8 {
        match try_slow_requests()? {
            None => return Ok(()),
            Some(other) => seen.push(other),
        }
    }
    bail!("they never waited for each other: {seen:?}")
}

/// Requests of one queue whose bytes come slowly: each is answered when it is served, not with the
/// last of those that came with it. What was seen comes back if too few of them waited for each
/// other to tell.
fn try_slow_requests() -> Result<Option<String>> {
    const SLOW: Duration = Duration::from_millis(200);
    const COUNT: u64 = 6;
    rings::on()?;
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    // A hole would be answered at once, and nothing told.
    let spec = ImageSpec::new(2, 64, SECTORS).mapping(Mapped::Percent(100));
    spec.write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, URING)?;
    let disk = mounted.disk();
    // The map is in memory then.
    support::read_at(&disk, 0, 1 << 20)?;
    let pid = mounted.pid().to_string();
    let how = format!("delay_enter={}", SLOW.as_micros());
    let tracer = Tracer::new(&["-f", "-p", &pid], "pread64", &how)?;
    let read = |number: u64| {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&disk)?;
        let place = number * 65_536;
        Ok::<_, anyhow::Error>(thread::spawn(move || -> Result<Duration> {
            let mut only = nix::sched::CpuSet::new();
            only.set(0)?;
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &only)?;
            let begun = Instant::now();
            let mut buf = vec![0; 12_288];
            let skip = buf.as_ptr().align_offset(4096);
            file.read_exact_at(&mut buf[skip..skip + 4096], place)?;
            Ok(begun.elapsed())
        }))
    };
    let readers = (0..COUNT).map(read).collect::<Result<Vec<_>>>()?;
    let took = readers.into_iter().map(|reader| {
        let joined = reader.join();
        joined.map_err(|_| anyhow::anyhow!("a reader panicked"))?
    });
    let mut took = took.collect::<Result<Vec<_>>>()?;
    drop(tracer);
    took.sort();
    let pooled = mounted.json("stats.json")?["pooled_requests"].clone();
    mounted.umount()?;
    let last = took.last().copied().unwrap_or_default();
    if last < SLOW * 3 {
        return Ok(Some(format!("{took:?}, {pooled} of all in the pool")));
    }
    // The first may have come alone; the second, held, would come with the last.
    ensure!(last - took[1] > SLOW * 2, "answers were held: {took:?}");
    Ok(None)
}

/// Mounts that are used while they end, in every way in which they may: `PLOOPFS_RING_ROUNDS` says
/// how often.
fn come_and_go() -> Outcome {
    rings::on()?;
    let rounds = std::env::var("PLOOPFS_RING_ROUNDS").ok();
    let rounds: u64 = rounds.map_or(Ok(6), |text| text.parse())?;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let mut shadow = Model::of(&spec).read(0, BYTES);
    let mut longest = Duration::ZERO;
    for round in 0..rounds {
        let way = ["uring", "crowd", "lame"][usize::try_from(round / 3 % 3)?];
        let mounted = Mounted::new(dir.path(), &path, &["--transport", way])?;
        scribble(&mounted.disk(), &mut shadow, round, 10)?;
        let begun = Instant::now();
        match round % 3 {
            // Right after the last close, whose RELEASE is under way.
            0 => mounted.umount()?,
            1 => {
                let reader = read_until_it_fails(&mounted.disk())?;
                let mut end = command::new("umount");
                command::ok(end.arg("-f").arg("-l").arg(mounted.path()))?;
                ensure!(reader.join().is_ok(), "the reader panicked");
                mounted.gone(Duration::from_secs(60))?;
            }
            _ => {
                let readers = [0; 4].map(|_| read_until_it_fails(&mounted.disk()));
                mounted.signal(nix::sys::signal::Signal::SIGKILL)?;
                for reader in readers {
                    ensure!(reader?.join().is_ok(), "a reader panicked");
                }
                mounted.gone(Duration::from_secs(60))?;
            }
        }
        let took = begun.elapsed();
        longest = longest.max(took);
        ensure!(
            took < Duration::from_secs(30),
            "round {round} took {took:?}"
        );
    }
    eprintln!("{rounds} rounds, the longest took {longest:?}");
    // The last daemon may have been killed; this one closes the image.
    Mounted::new(dir.path(), &path, URING)?.umount()?;
    support::expect_clean(&path)?;
    expect_shadow(&path, &shadow)
}
