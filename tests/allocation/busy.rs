//! Every allocation over 4 KiB fails, on all threads, while ext4 on the loop is busy: each request
//! is served all the same, and all that was written is there.
//!
//! The daemon is this program in the foreground. It is armed from outside, after the first 64
//! requests, by a file for which a thread of it looks; that thread has every signal blocked, so
//! that none is lost to it.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{self, Level};
use crate::forge::image::{ImageSpec, Mapped};
use crate::heap;
use crate::support::command::{Finished, eventually};
use crate::support::guards::{FsMount, Loop, is_mounted, text};
use crate::support::harness::{self, trial};
use crate::support::probe::Need::{self, E2fsprogs, Fio, Fuse, Qemu};
use crate::support::{self, MIB, Outcome, command, rings, scratch, scratch_tmpfs};
use anyhow::{Context, Result, bail, ensure};
use gpt::GptConfig;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types::LINUX_FS;
use libtest_mimic::Trial;
use nix::sys::signal::SigSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::thread;
use std::time::Duration;

/// Makes the program the daemon, and names the file that arms its heap.
const ARM: &str = "PLOOPFS_ARM_HEAP";

const NEEDS: &[Need] = &[Fuse, Need::Root, Need::Loop, Fio, E2fsprogs, Qemu];

/// Size of the disk: 1 GiB for the file system, 1 GiB that fio verifies, the rest for its trims.
const SECTORS: u64 = 5 << 20;
const FILES: u64 = 2000;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = either_way();
    trials.extend(harness::over("uring", either_way));
    trials
}

/// What must be true whichever way requests come.
fn either_way() -> Vec<Trial> {
    vec![
        trial("no_memory_for_ext4", NEEDS, no_memory_for_ext4),
        trial(
            "no_memory_for_ext4_on_a_chain_with_a_tiny_cache",
            NEEDS,
            no_memory_for_ext4_on_a_chain_with_a_tiny_cache,
        ),
        trial(
            "requests_through_the_kernel_allocate_nothing",
            &[Fuse, Need::Root],
            || requests_through_the_kernel_allocate_nothing(&[]),
        ),
        trial(
            "direct_requests_through_the_kernel_allocate_nothing",
            &[Fuse, Need::Root],
            || requests_through_the_kernel_allocate_nothing(&["--direct"]),
        ),
        trial(
            "no_memory_for_the_curious",
            NEEDS,
            no_memory_for_the_curious,
        ),
    ]
}

/// Where the daemon says that its heap is armed, and in the end how often it refused.
fn told(arm: &Path, what: &str) -> PathBuf {
    arm.with_extension(what)
}

/// What this process is to do if it was started by [`Daemon::start`].
pub(crate) fn child() -> Option<ExitCode> {
    let arm = PathBuf::from(std::env::var_os(ARM)?);
    let watch = arm.clone();
    let usual = SigSet::thread_get_mask().ok()?;
    SigSet::all().thread_block().ok()?;
    thread::spawn(move || {
        while !watch.exists() {
            thread::sleep(Duration::from_millis(10));
        }
        // Not before each session thread has made its buffers.
        let mut before = None;
        while before != Some(heap::Counts::now().all) {
            before = Some(heap::Counts::now().all);
            thread::sleep(Duration::from_millis(100));
        }
        heap::arm();
        let too_much = Vec::<u8>::new().try_reserve_exact(heap::MOST + 1);
        let enough = Vec::<u8>::new().try_reserve_exact(heap::MOST);
        let said = format!("{} {}", too_much.is_err(), enough.is_ok());
        fs::write(told(&watch, "armed"), said).expect("the daemon tells that it is armed");
        let (ask, count) = (told(&watch, "ask"), told(&watch, "count"));
        loop {
            if fs::remove_file(&ask).is_ok() {
                let all = heap::Counts::now().all;
                fs::write(&count, all.to_string()).expect("the daemon tells its count");
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    usual.thread_set_mask().ok()?;
    let status = ploopfs::cli::main();
    fs::write(told(&arm, "refused"), heap::refused().to_string())
        .expect("the daemon tells what it refused");
    Some(status)
}

/// A mount whose daemon is this program.
struct Daemon {
    at: PathBuf,
    arm: PathBuf,
    log: PathBuf,
    child: Child,
}

impl Daemon {
    fn start(dir: &Path, image: &Path, options: &[&str]) -> Result<Self> {
        let (at, arm, log) = (dir.join("mnt"), dir.join("arm"), dir.join("log"));
        fs::create_dir(&at)?;
        let program = std::env::current_exe()?;
        let mut again = command::new(text(&program));
        again
            .args(["mount", "-f"])
            .arg(rings::option())
            .args(options)
            .arg(image)
            .arg(&at);
        // A program that prints its own end needs memory for it, and would hang instead.
        again.env(ARM, &arm).env("RUST_BACKTRACE", "0");
        again.stderr(File::create(&log)?);
        let child = again.spawn()?;
        let mut daemon = Self {
            at,
            arm,
            log,
            child,
        };
        eventually(Duration::from_secs(60), || {
            ensure!(daemon.has_ended() || is_mounted(&daemon.at), "no mount");
            Ok(())
        })?;
        ensure!(!daemon.has_ended(), "no daemon: {}", daemon.said());
        Ok(daemon)
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The end of what it said: how it came to its end, if it did.
    fn said(&self) -> String {
        let said = fs::read(&self.log).unwrap_or_default();
        let start = said.len().saturating_sub(6000);
        String::from_utf8_lossy(&said[start..]).into_owned()
    }

    fn arm(&self) -> Outcome {
        fs::write(&self.arm, "")?;
        let armed = told(&self.arm, "armed");
        let said = eventually(Duration::from_secs(60), || {
            let said = fs::read_to_string(&armed)?;
            ensure!(!said.is_empty(), "nothing said yet");
            Ok(said)
        })?;
        ensure!(said == "true true", "the heap is not as armed: {said}");
        Ok(())
    }

    /// Runs a piece of work; when it fails, the daemon's last words are part of the story.
    fn while_armed(&mut self, work: impl FnOnce(&Path) -> Outcome) -> Outcome {
        let done = work(&self.at.join("disk.img"));
        if self.has_ended() {
            bail!("the daemon did not survive: {done:?}\n{}", self.said());
        }
        done.with_context(|| self.said())
    }

    /// Allocations of all threads of the daemon so far.
    fn allocations(&self) -> Result<u64> {
        let count = told(&self.arm, "count");
        let _ = fs::remove_file(&count);
        fs::write(told(&self.arm, "ask"), "")?;
        eventually(Duration::from_secs(60), || {
            Ok(fs::read_to_string(&count)?.parse()?)
        })
    }

    fn stats(&self) -> Result<serde_json::Value> {
        let text = fs::read_to_string(self.at.join("stats.json"))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Unmounts; the daemon must end well. Returns the number of refused allocations.
    fn umount(mut self) -> Result<u64> {
        let mut umount = command::ploopfs(&["umount"]);
        command::run(umount.arg(&self.at))?.expect_code(0)?;
        eventually(Duration::from_secs(60), || {
            ensure!(self.has_ended(), "the daemon does not end: {}", self.said());
            Ok(())
        })?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {}", self.said());
        Ok(fs::read_to_string(told(&self.arm, "refused"))?.parse()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if is_mounted(&self.at) {
            let mut umount = command::new("umount");
            let _ = command::run(umount.args(["-i", "-l"]).arg(&self.at));
        }
        if !self.has_ended() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A tree of [`FILES`] files, about 200 MiB.
fn plant(root: &Path) -> Outcome {
    for number in 0..FILES {
        let dir = root.join(format!("d{}", number / 100));
        fs::create_dir_all(&dir)?;
        let word = content::mix(&[number]).to_le_bytes();
        let len = content::mix(&[number, 1]) % (200 << 10);
        let bytes: Vec<u8> = word.iter().copied().cycle().take(len as usize).collect();
        fs::write(dir.join(format!("f{number}")), bytes)?;
    }
    Ok(())
}

/// Four jobs write and verify ranges of their own; a fifth trims and writes elsewhere until they
/// are done. The device begins where the file system's ends.
fn fio(dir: &Path, device: &Path) -> Result<Finished> {
    let job = format!(
        "[global]\nfilename={}\nioengine=libaio\ndirect=1\nthread=1\nrandrepeat=1\n\
         [verified]\nrw=randrw\nbsrange=512-1m\niodepth=32\nnumjobs=4\noffset_increment=256m\n\
         size=96m\nverify=crc32c\nverify_fatal=1\nverify_state_save=0\ndo_verify=1\n\
         [trims]\nrw=randtrimwrite\nbsrange=64k-4m\niodepth=8\noffset=1g\nsize=500m\n\
         time_based=1\nruntime=10\n",
        device.display()
    );
    let path = dir.join("job.fio");
    fs::write(&path, job)?;
    let mut command = command::new("fio");
    let done = command::run(command.arg("--output-format=terse").arg(&path))?.expect_code(0)?;
    for word in ["verify:", "bad magic", "err=", "error"] {
        ensure!(!done.stderr.contains(word), "{}", done.story());
    }
    Ok(done)
}

/// The first requests, after which the daemon is as it will be.
fn first_requests(device: &Path) -> Outcome {
    let script = "dd if=\"$1\" of=/dev/null bs=4k count=32 iflag=direct
                  dd if=/dev/zero of=\"$1\" bs=4k count=32 oflag=direct conv=notrunc";
    command::ok(&mut command::sh(script, &[text(device)]))?;
    Ok(())
}

/// ext4 on one loop device and fio on another of the same disk, at the same time.
fn work(dir: &Path, system_dev: &Path, fio_dev: &Path) -> Outcome {
    let source = dir.join("source");
    plant(&source)?;
    thread::scope(|scope| -> Outcome {
        let load = scope.spawn(|| fio(dir, fio_dev));
        command::ok(command::new("mkfs.ext4").args(["-q", "-F"]).arg(system_dev))?;
        let system = FsMount::new(system_dev, &dir.join("fs"))?;
        let script = "cp -a \"$1\" \"$2/a\"; sync -f \"$2\"; cp -a \"$1\" \"$2/b\"
                      sync -f \"$2\"; rm -r \"$2/a\"; sync -f \"$2\"; fstrim -v \"$2\"";
        let paths = [text(&source), text(system.path())];
        command::ok(&mut command::sh(script, &paths))?;
        match load.join() {
            Ok(done) => drop(done?),
            Err(_) => bail!("the thread of fio panicked"),
        }
        // Nothing of it may come from the page cache.
        system.umount()?;
        let system = FsMount::new(system_dev, &dir.join("fs"))?;
        let copy = system.path().join("b");
        command::ok(command::new("diff").arg("-r").arg(&source).arg(&copy))?;
        system.umount()
    })
}

/// Mounts, arms, works, unmounts, and has others judge what is left.
fn no_memory(dir: &Path, image: &Path, below: &[&str], options: &[&str]) -> Outcome {
    let mut daemon = Daemon::start(dir, image, &[below, options].concat())?;
    let disk = daemon.at.join("disk.img");
    let device = Loop::with(&disk, &["--sizelimit", "1GiB"])?;
    let other = Loop::with(&disk, &["--offset", "1GiB"])?;
    first_requests(device.dev())?;
    daemon.arm()?;
    daemon.while_armed(|_| work(dir, device.dev(), other.dev()))?;
    let stats = daemon.stats()?;
    ensure!(stats["latched"].is_null(), "a request failed: {stats}");
    let said = daemon.said();
    ensure!(
        !said.contains("ploopfs: error:"),
        "a request failed: {said}"
    );
    device.detach()?;
    other.detach()?;
    let refused = daemon.umount()?;
    ensure!(refused > 0, "nothing was ever refused");
    ensure!(
        stats["pooled_requests"].as_u64() > Some(0),
        "nothing was ever pooled: {stats}"
    );
    support::expect_clean(image)?;
    let mut check = command::new("qemu-img");
    command::ok(check.args(["check", "-q", "-f", "parallels"]).arg(image))?;
    e2fsck(dir, image, below)
}

/// Asks e2fsck through a mount without any limit.
fn e2fsck(dir: &Path, image: &Path, below: &[&str]) -> Outcome {
    let again = dir.join("again");
    fs::create_dir(&again)?;
    let mounted = support::guards::Mounted::new(&again, image, &[&["-r"], below].concat())?;
    command::ok(command::new("e2fsck").arg("-fn").arg(mounted.disk()))?;
    mounted.umount()
}

fn no_memory_for_ext4() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, SECTORS).write(&image)?;
    no_memory(dir.path(), &image, &[], &[])
}

/// The cache holds one page of the map's three, and most writes copy from below first: from another
/// file system where there is one, so that the host cannot do it.
fn no_memory_for_ext4_on_a_chain_with_a_tiny_cache() -> Outcome {
    let dir = scratch()?;
    let memory = scratch_tmpfs().ok();
    let base = memory.as_ref().unwrap_or(&dir).path().join("base.raw");
    let file = File::create_new(&base)?;
    file.set_len(SECTORS * 512)?;
    for mib in 0..256 {
        file.write_all_at(&[0x77; MIB as usize], mib * 8 * MIB)?;
    }
    let image = dir.path().join("top.hds");
    ImageSpec::new(2, 2048, SECTORS).write(&image)?;
    let below = ["--format", "raw", "--lower", text(&base)];
    let small = ["--bat-cache", "4K", "--threads", "24"];
    no_memory(dir.path(), &image, &below, &small)
}

/// Writes a table of 99 partitions.
fn partition(disk: &Path) -> Outcome {
    let mut device = OpenOptions::new().read(true).write(true).open(disk)?;
    let sectors = u32::try_from(SECTORS).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors - 1).overwrite_lba0(&mut device)?;
    let mut table = GptConfig::new()
        .writable(true)
        .create_from_device(device, None)?;
    for number in 1..100 {
        let name = format!("number {number}");
        table.add_partition(&name, MIB, LINUX_FS, 0, None)?;
    }
    table.write()?.sync_all()?;
    Ok(())
}

/// The transport adds nothing to what a request asks of the heap: far fewer allocations than
/// requests, by all threads together.
fn requests_through_the_kernel_allocate_nothing(options: &[&str]) -> Outcome {
    const REQUESTS: u64 = 2000;
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 20 * 2048)
        .mapping(Mapped::All)
        .write(&image)?;
    let daemon = Daemon::start(dir.path(), &image, options)?;
    let disk = daemon.at.join("disk.img");
    first_requests(&disk)?;
    daemon.arm()?;
    let [path, count] = [text(&disk), &format!("count={REQUESTS}")];
    for [from, to, flag] in [
        [path, "/dev/null", "iflag=direct"],
        ["/dev/zero", path, "oflag=direct"],
    ] {
        let dd = || {
            let files = [format!("if={from}"), format!("of={to}")];
            let mut dd = command::new("dd");
            dd.args(files).args(["bs=4k", "conv=notrunc", count, flag]);
            command::ok(&mut dd)
        };
        // The first time the page of the map is loaded and the in-use mark set.
        dd()?;
        let before = daemon.allocations()?;
        dd()?;
        let found = daemon.allocations()? - before;
        ensure!(
            found < REQUESTS / 10,
            "{found} allocations for {REQUESTS} requests from {from} to {to}"
        );
    }
    let stats = daemon.stats()?;
    let count = |name: &str| stats[name].as_u64().unwrap_or(0);
    ensure!(
        count("inline_requests") + count("ring_io_requests") > 3 * REQUESTS,
        "not served where they arrive: {stats}"
    );
    daemon.umount()?;
    Ok(())
}

/// Looking at what else the mount shows may fail while memory is short, but ends nobody.
fn no_memory_for_the_curious() -> Outcome {
    let dir = scratch()?;
    let bundle = dir.path().join("many.hdd");
    let like = ImageSpec::new(2, 2048, SECTORS).mapping(Mapped::Percent(1));
    let spec = BundleSpec::chain(Style::Parallels, &like, 60, |number, image| {
        image.seed = number as u64;
        image.no_data = true;
        if number == 59 {
            image.mapped = Mapped::List(vec![0]);
        }
    });
    ensure!(
        matches!(spec.parts[0].levels[0], Level::Image(_)),
        "no image"
    );
    spec.write(&bundle)?;
    let mut daemon = Daemon::start(dir.path(), &bundle, &[])?;
    let root = daemon.at.clone();
    partition(&root.join("disk.img"))?;
    let names =
        || -> Result<usize> { Ok(fs::read_dir(&root)?.collect::<io::Result<Vec<_>>>()?.len()) };
    ensure!(names()? == 99 + 4, "{} names", names()?);
    daemon.arm()?;
    daemon.while_armed(|disk| {
        ensure!(names()? == 99 + 4, "{} names", names()?);
        // After this the partitions must be read anew.
        drop(OpenOptions::new().write(true).open(disk)?);
        let script = "ls -lR \"$1\"; stat -f \"$1\"; cat \"$1/info.json\" \"$1/stats.json\"
                      cat \"$1\"/part1.img \"$1\"/part99.img
                      for file in \"$1\"/snapshots/*/disk.img; do head -c 1M \"$file\"; done
                      touch \"$1/disk.img\"; touch \"$1/none\"";
        let tolerant = format!("({}) >/dev/null 2>&1 || true", script.replace('\n', ";"));
        command::ok(&mut command::sh(
            &format!("set +e; {tolerant}"),
            &[text(&root)],
        ))?;
        // What is no luxury works.
        for name in ["info.json", "stats.json"] {
            let text = fs::read(root.join(name)).with_context(|| name.to_string())?;
            serde_json::from_slice::<serde_json::Value>(&text)?;
        }
        let snapshots = fs::read_dir(root.join("snapshots"))?.count();
        ensure!(snapshots == 59 + 1, "{snapshots} snapshots");
        Ok(())
    })?;
    daemon.umount()?;
    Ok(())
}
