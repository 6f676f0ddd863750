//! Memory that is short for the daemon and for those who write through it: what is dirty above a
//! loop device can only be written back by the daemon, which needs memory for that.

use super::load::SECTORS;
use crate::forge::image::ImageSpec;
use crate::support::guards::{FsMount, Loop, Mounted, is_gone, text};
use crate::support::harness::{skip, skip_excused, trial};
use crate::support::probe::Need::{self, E2fsprogs, Fuse};
use crate::support::{self, MIB, Outcome, command, scratch};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NEEDS: &[Need] = &[Fuse, Need::Root, Need::Loop, E2fsprogs];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "dirty_memory_is_written_back_from_two_groups",
            NEEDS,
            from_two_groups,
        ),
        trial(
            "dirty_memory_is_written_back_from_one_group",
            NEEDS,
            from_one_group,
        ),
    ]
}

/// A memory control group of our own.
struct Group {
    dir: PathBuf,
    version: u32,
}

impl Group {
    fn new(name: &str) -> Result<Self> {
        let name = format!("ploopfs-test-{}-{name}", std::process::id());
        for (version, root) in [(1, "/sys/fs/cgroup/memory"), (2, "/sys/fs/cgroup")] {
            let dir = Path::new(root).join(&name);
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            // Version 2 hands the controller down only on request; asking may be refused.
            let _ = fs::write(Path::new(root).join("cgroup.subtree_control"), "+memory");
            let group = Self { dir, version };
            if group.file("memory.limit_in_bytes", "memory.max").exists() {
                return Ok(group);
            }
        }
        Err(skip("no memory control group can be made"))
    }

    /// A file of the group, by its names in the two versions.
    fn file(&self, first: &str, second: &str) -> PathBuf {
        self.dir
            .join(if self.version == 1 { first } else { second })
    }

    fn used(&self) -> Result<u64> {
        let file = self.file("memory.usage_in_bytes", "memory.current");
        Ok(fs::read_to_string(file)?.trim().parse()?)
    }

    fn limit(&self, bytes: u64) -> Outcome {
        let file = self.file("memory.limit_in_bytes", "memory.max");
        fs::write(&file, bytes.to_string()).with_context(|| file.display().to_string())
    }

    /// How often the limit was met, and how many processes it has cost.
    fn met(&self) -> Result<(u64, u64)> {
        let number = |text: &str, name: &str| -> Result<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(line
                .with_context(|| format!("no {name}: {text}"))?
                .trim()
                .parse()?)
        };
        if self.version == 1 {
            let met = fs::read_to_string(self.dir.join("memory.failcnt"))?;
            let killed = fs::read_to_string(self.dir.join("memory.oom_control"))?;
            return Ok((met.trim().parse()?, number(&killed, "oom_kill ")?));
        }
        let events = fs::read_to_string(self.dir.join("memory.events"))?;
        Ok((number(&events, "max ")?, number(&events, "oom_kill ")?))
    }

    fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let removed = command::eventually(Duration::from_secs(5), || {
            fs::remove_dir(&self.dir).context("the group is still in use")
        });
        if let Err(error) = removed {
            eprintln!("{}: {error:#}", self.dir.display());
        }
    }
}

/// Dirties much more than the writer's group may have, in one large file and many small ones; with
/// few processes, which cost much on slow hosts.
const WRITE: &str = "echo $$ >\"$1\"
    head -c 128M /dev/urandom | tee \"$2/large\" | sha256sum >\"$2.sum\"
    head -c 10M \"$2/large\" | split -a 3 -b 20000 - \"$2/small\"
    sync -f \"$2\"";

/// A standstill lasts for ever; all else has ended by then, on an emulated processor too.
const STANDSTILL: Duration = Duration::from_secs(180);

/// Daemon and writer in their groups. The limit of the daemon's is what it uses and 16 MiB.
fn write_back(daemon: &Group, writer: Option<&Group>) -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, SECTORS).write(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &[])?;
    fs::write(daemon.procs(), mounted.pid().to_string())?;
    let device = Loop::new(&mounted.disk())?;
    let mkfs =
        |device: &Path| command::ok(command::new("mkfs.ext4").args(["-q", "-F"]).arg(device));
    mkfs(device.dev())?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    daemon.limit(daemon.used()? + 16 * MIB)?;
    if let Some(writer) = writer {
        writer.limit(32 * MIB)?;
    }
    let group = writer.unwrap_or(daemon);
    let procs = group.procs();
    let mut command = command::sh(WRITE, &[text(&procs), text(system.path())]);
    let wrote = command::run_within(&mut command, STANDSTILL);
    if wrote.is_err() {
        // A standstill: ending the connection ends all waits, and nothing else does.
        let mut end = command::new("umount");
        let ended = command::run_within(end.arg("-f").arg(mounted.path()), Duration::from_secs(20));
        eprintln!("the standstill was ended: {ended:?}");
    }
    wrote?.expect_code(0)?;
    ensure!(!is_gone(mounted.pid()), "the daemon did not survive");
    let stats = mounted.json("stats.json")?;
    ensure!(stats["latched"].is_null(), "a request failed: {stats}");
    let (met, killed) = group.met()?;
    ensure!(
        met > 0 && killed == 0,
        "limit met {met} times, {killed} killed"
    );
    ensure!(daemon.met()?.1 == 0, "something of the daemon's was killed");
    // Nothing of it may come from memory.
    system.umount()?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    let large = fs::File::open(system.path().join("large"))?;
    let again = command::ok(command::new("sha256sum").stdin(large))?;
    let sum = fs::read_to_string(dir.path().join("fs.sum"))?;
    ensure!(sum == again, "the file holds {again}, not {sum}");
    system.umount()?;
    device.detach()?;
    mounted.umount()?;
    support::expect_clean(&image)?;
    let mounted = Mounted::new(dir.path(), &image, &["-r"])?;
    command::ok(command::new("e2fsck").arg("-fn").arg(mounted.disk()))?;
    mounted.umount()
}

fn from_two_groups() -> Outcome {
    let (daemon, writer) = (Group::new("daemon")?, Group::new("writer")?);
    write_back(&daemon, Some(&writer))
}

/// Version 1 has no limit of what is dirty in a group. Who then asks for memory waits for the
/// daemon's own write-back; and a daemon that is an I/O flusher, which may not wait, gets killed.
fn from_one_group() -> Outcome {
    let both = Group::new("both")?;
    if both.version == 1 {
        return Err(skip_excused(
            "a group of version 1 cannot hold daemon and writer: the daemon warns of it",
        ));
    }
    write_back(&both, None).or_else(|error| bail!("version {}: {error:#}", both.version))
}
