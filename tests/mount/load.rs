//! Many requests at once, with enough memory and with little.

use super::tree::small_tree;
use crate::forge::image::ImageSpec;
use crate::support::command::Finished;
use crate::support::guards::{FsMount, Loop, Mounted, is_gone};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, E2fsprogs, Fio, Fuse};
use crate::support::{self, MIB, Outcome, command, rings, scratch};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

const NEEDS: &[Need] = &[Fuse, Need::Root, Need::Loop, Fio, E2fsprogs];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("fio_verify_with_discards", NEEDS, fio_verify_with_discards),
        trial("fio_verify_on_a_chain", NEEDS, fio_verify_on_a_chain),
        trial(
            "fio_verify_with_little_memory",
            NEEDS,
            fio_verify_with_little_memory,
        ),
    ]
}

/// Threads for each CPU's queue where a mount goes by the way `crowd`.
const CROWD: u64 = 5;

/// Size of the disk: the first GiB is verified, discards happen after it.
pub(crate) const SECTORS: u64 = 3 << 20;

/// Four jobs with their own ranges write and verify; two more discard and write elsewhere
/// meanwhile, so that clusters are freed and taken again all the time.
pub(crate) fn fio(dir: &Path, device: &Path, mib_a_job: u64, seconds: u64) -> Result<Finished> {
    let job = format!(
        "[global]\nfilename={}\nioengine=libaio\ndirect=1\nthread=1\nrandrepeat=1\n\
         [verified]\nrw=randwrite\nbsrange=512-1m\niodepth=32\nnumjobs=4\noffset_increment=256m\n\
         size={mib_a_job}m\nverify=crc32c\nverify_fatal=1\nverify_state_save=0\ndo_verify=1\n\
         [discards]\nrw=randtrim\nbsrange=64k-4m\niodepth=8\noffset=1g\nsize=500m\n\
         time_based=1\nruntime={seconds}\n\
         [refills]\nrw=randwrite\nbsrange=4k-1m\niodepth=8\noffset=1g\nsize=500m\n\
         rate=100m\ntime_based=1\nruntime={seconds}\n",
        device.display()
    );
    let path = dir.join("job.fio");
    fs::write(&path, job)?;
    let done = command::run(command::new("fio").arg("--output-format=terse").arg(&path))?;
    ensure!(done.code() == 0, "{}", done.story());
    for word in ["verify:", "bad magic", "err=", "error"] {
        ensure!(!done.stderr.contains(word), "{}", done.story());
    }
    Ok(done)
}

fn fio_verify_with_discards() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        let image = dir.path().join(format!("{version}.hds"));
        ImageSpec::new(version, 2048, SECTORS).write(&image)?;
        let mounted = Mounted::new(dir.path(), &image, &[])?;
        let device = Loop::new(&mounted.disk())?;
        fio(dir.path(), device.dev(), 128, 10)?;
        device.detach()?;
        mounted.umount()?;
        support::expect_clean(&image)?;
    }
    Ok(())
}

/// The same where most writes must copy from a lower delta first.
fn fio_verify_on_a_chain() -> Outcome {
    let dir = scratch()?;
    let base = dir.path().join("base.raw");
    fs::File::create(&base)?.set_len(SECTORS * 512)?;
    // Real bytes below, for a part of the range.
    let file = fs::OpenOptions::new().write(true).open(&base)?;
    for mib in 0..512 {
        file.write_all_at(&vec![0x77; MIB as usize], mib * 2 * MIB)?;
    }
    let before = support::sha256(&base)?;
    let top = dir.path().join("top.hds");
    ImageSpec::new(2, 512, SECTORS).write(&top)?;
    let lower = base.display().to_string();
    let mounted = Mounted::new(dir.path(), &top, &["--format", "raw", "--lower", &lower])?;
    let device = Loop::new(&mounted.disk())?;
    fio(dir.path(), device.dev(), 96, 8)?;
    device.detach()?;
    mounted.umount()?;
    support::expect_clean(&top)?;
    ensure!(before == support::sha256(&base)?, "the base was written to");
    Ok(())
}

/// A limit on the daemon's memory.
enum Limit {
    /// A memory cgroup: its directory, the files of its use and its limit.
    Cgroup {
        dir: PathBuf,
        used: &'static str,
        most: &'static str,
    },
    /// No cgroup can be made: the address space is limited.
    AddressSpace,
}

impl Limit {
    fn new() -> Self {
        let name = format!("ploopfs-test-{}", std::process::id());
        let v1 = (
            "/sys/fs/cgroup/memory",
            "memory.usage_in_bytes",
            "memory.limit_in_bytes",
        );
        let v2 = ("/sys/fs/cgroup", "memory.current", "memory.max");
        for (root, used, most) in [v1, v2] {
            let dir = Path::new(root).join(&name);
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            // Version 2 hands the controller down only on request; asking may be refused.
            let _ = fs::write(Path::new(root).join("cgroup.subtree_control"), "+memory");
            if dir.join(most).exists() {
                return Self::Cgroup { dir, used, most };
            }
            let _ = fs::remove_dir(&dir);
        }
        Self::AddressSpace
    }

    /// Puts the daemon under control, before it has used anything worth counting.
    fn adopt(&self, pid: i32) -> Outcome {
        if let Self::Cgroup { dir, .. } = self {
            fs::write(dir.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    /// What is used now, plus 16 MiB, is the most from now on. Rings have memory for their requests
    /// from the start where there are two of them, as is usual here; more need more.
    fn tighten(&self, mounted: &Mounted) -> Result<String> {
        let cpus = thread::available_parallelism()?.get() as u64;
        let threads = match rings::way() {
            Some("crowd") => CROWD * cpus,
            Some("uring") => cpus,
            _ => 2,
        };
        let more = 16 * MIB + threads.saturating_sub(2) * 10 * MIB;
        match self {
            Self::Cgroup { dir, used, most } => {
                // Memory taken before the adoption is charged elsewhere, so only growth counts.
                let now: u64 = fs::read_to_string(dir.join(used))?.trim().parse()?;
                fs::write(dir.join(most), (now + more).to_string())?;
                Ok(format!("cgroup: {} KiB and {} MiB", now / 1024, more / MIB))
            }
            Self::AddressSpace => {
                let path = format!("/proc/{}/statm", mounted.pid());
                let pages = fs::read_to_string(path)?;
                let pages: u64 = pages.split(' ').next().context("no number")?.parse()?;
                let most = pages * 4096 + more;
                let pid = mounted.pid().to_string();
                let limit = format!("--as={most}:{most}");
                command::ok(command::new("prlimit").args(["--pid", &pid, &limit]))?;
                Ok(format!("address space of {} MiB", most / MIB))
            }
        }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Self::Cgroup { dir, .. } = self {
            let removed = command::eventually(Duration::from_secs(5), || {
                fs::remove_dir(&*dir).context("the cgroup is still in use")
            });
            if let Err(error) = removed {
                eprintln!("{}: {error:#}", dir.display());
            }
        }
    }
}

fn fio_verify_with_little_memory() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, SECTORS).write(&image)?;
    // Declared first, so that it is dropped after the daemon, whose end empties the cgroup.
    let limit = Limit::new();
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    limit.adopt(mounted.pid())?;
    let device = Loop::new(&mounted.disk())?;
    // Idle is what it uses after the first 64 requests.
    let read = "dd if=\"$1\" of=/dev/null bs=4k count=32 iflag=direct
                dd if=/dev/zero of=\"$1\" bs=4k count=32 oflag=direct";
    command::ok(&mut command::sh(
        read,
        &[&device.dev().display().to_string()],
    ))?;
    let told = limit.tighten(&mounted)?;
    let work = || -> Outcome {
        fio(dir.path(), device.dev(), 64, 6)?;
        command::ok(
            command::new("mkfs.ext4")
                .args(["-q", "-F"])
                .arg(device.dev()),
        )?;
        let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
        small_tree(system.path(), 3000)?;
        fs::write(system.path().join("large"), vec![0x3c; 200 << 20])?;
        command::ok(command::new("sync").arg("-f").arg(system.path()))?;
        fs::remove_file(system.path().join("large"))?;
        command::ok(command::new("fstrim").arg(system.path()))?;
        system.umount()
    };
    let worked = work().with_context(|| told.clone());
    if is_gone(mounted.pid()) {
        bail!("the daemon did not survive ({told}): {worked:?}");
    }
    worked?;
    device.detach()?;
    mounted.umount()?;
    support::expect_clean(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
    command::ok(command::new("e2fsck").arg("-fn").arg(mounted.disk()))?;
    mounted.umount()?;
    // Which limit it was matters to whoever reads the log.
    eprintln!("fio_verify_with_little_memory: {told}");
    Ok(())
}
