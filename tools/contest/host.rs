//! The host's side: commands, processes, loop devices, mounts, and that none of them stays.
//!
//! Imports: std, `anyhow`, `nix`, `tempfile`.
//! Never: ends a process or takes away a device or mount that it did not make.
//!
//! Everything that outlives a call is held by a guard that takes it down when dropped. Below them
//! is a net: a note of every directory and of the kernel's switch is kept while they are ours, each
//! process that serves leaves its number in the directory of its contestant, and tools/bench, which
//! has started this program, takes down what a kill has left.

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI8, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// With this variable in its environment the program is `ploopfs`.
pub(crate) const AS_PLOOPFS: &str = "PLOOPFS_BENCH_SERVES";

/// The directory in which tools/bench looks for what must be taken down.
const NOTES: &str = "PLOOPFS_BENCH_NOTES";

/// How long anything may take to come up or to go.
const PATIENCE: Duration = Duration::from_secs(20);

/// The switch of the kernel that offers FUSE over io_uring.
const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";

/// This program as `ploopfs`, so that what is measured is what has just been built.
pub(crate) fn ploopfs() -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(AS_PLOOPFS, "1");
    Ok(command)
}

/// Runs a command that must succeed and gives what it printed.
pub(crate) fn said(command: &mut Command) -> Result<String> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    let complaint = String::from_utf8_lossy(&out.stderr);
    ensure!(
        out.status.success(),
        "{command:?} ended with {}: {}",
        out.status,
        complaint.trim()
    );
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

/// True when a program is installed.
pub(crate) fn has(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()))
}

/// Calls until it is true; an error after [`PATIENCE`].
fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_so()? {
        ensure!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// True when something is mounted at exactly this place.
fn is_mounted(place: &Path) -> Result<bool> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table
        .lines()
        .any(|line| line.split(' ').nth(4).map(OsStr::new) == Some(place.as_os_str())))
}

/// Says what went wrong while something was taken down.
fn tell(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("bench: {error:#}");
    }
}

/// A loop device with direct I/O, tuned as `ploopfs attach` tunes its own.
#[derive(Debug)]
pub(crate) struct Loop {
    device: PathBuf,
}

impl Loop {
    /// Over a file. Others may take the device that was found free, so it is tried again.
    pub(crate) fn over(file: &Path) -> Result<Self> {
        let mut tries = 0;
        let device = loop {
            let mut losetup = Command::new("losetup");
            losetup
                .args(["--find", "--show", "--direct-io=on"])
                .arg(file);
            match said(&mut losetup) {
                Ok(device) => break PathBuf::from(device),
                Err(error) if tries > 20 => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
            tries += 1;
        };
        let made = Self { device };
        let name = made.device.file_name().context("losetup names no device")?;
        let queue = Path::new("/sys/block").join(name).join("queue");
        fs::write(queue.join("read_ahead_kb"), "1024")?;
        fs::write(queue.join("max_sectors_kb"), "1024")?;
        Ok(made)
    }

    /// Its node.
    pub(crate) fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tell(said(Command::new("losetup").arg("-d").arg(&self.device)).map(|_| ()));
    }
}

/// A new file system that can share blocks, mounted.
#[derive(Debug)]
pub(crate) struct Xfs {
    mountpoint: PathBuf,
    // Dropped in this order, after the unmount.
    _device: Loop,
    _dir: TempDir,
}

impl Xfs {
    /// With room for so many MiB, below a directory.
    pub(crate) fn new(place: &Path, mib: u64) -> Result<Self> {
        let holder = TempDir::with_prefix_in("xfs.", place)?;
        let dir = fs::canonicalize(holder.path())?;
        let (file, mountpoint) = (dir.join("xfs"), dir.join("m"));
        fs::create_dir(&mountpoint)?;
        fs::File::create_new(&file)?.set_len((mib + 512) << 20)?;
        said(
            Command::new("mkfs.xfs")
                .args(["-q", "-m", "reflink=1"])
                .arg(&file),
        )?;
        let device = Loop::over(&file)?;
        said(Command::new("mount").arg(device.device()).arg(&mountpoint))?;
        Ok(Self {
            mountpoint,
            _device: device,
            _dir: holder,
        })
    }

    /// Where it is.
    pub(crate) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Waits until everything is on the medium.
    pub(crate) fn settle(&self) -> Result<()> {
        said(Command::new("sync").arg("-f").arg(&self.mountpoint)).map(|_| ())
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        tell(umount2(&self.mountpoint, MntFlags::empty()).map_err(Into::into));
    }
}

/// A process that serves, and what has to be unmounted before it ends.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    mountpoint: Option<PathBuf>,
}

impl Server {
    /// Starts it; it is ready when something is mounted at `mountpoint`.
    pub(crate) fn start(mut command: Command, mountpoint: &Path, dir: &Path) -> Result<Self> {
        let mut server = Self::start_unready(&mut command, dir)?;
        server.mountpoint = Some(mountpoint.to_owned());
        let shown = format!("{command:?} mounts nothing");
        wait_until(&shown, || {
            if let Some(status) = server.child.try_wait()? {
                bail!("{command:?} ended with {status}");
            }
            is_mounted(mountpoint)
        })?;
        weigh(server.pid())?;
        Ok(server)
    }

    /// Starts it; it is ready when a file appears.
    pub(crate) fn start_for(mut command: Command, appears: &Path, dir: &Path) -> Result<Self> {
        let server = Self::start_unready(&mut command, dir)?;
        wait_until("a server makes no socket", || Ok(appears.exists()))?;
        weigh(server.pid())?;
        Ok(server)
    }

    /// Its number.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn start_unready(command: &mut Command, dir: &Path) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        fs::write(
            dir.join(format!("{}.pid", child.id())),
            child.id().to_string(),
        )?;
        Ok(Self {
            child,
            mountpoint: None,
        })
    }

    fn end(&mut self) -> Result<()> {
        if let Some(mountpoint) = self.mountpoint.take() {
            // A loop device lets go of its file a moment after it is gone.
            let mut tries = 0;
            while is_mounted(&mountpoint)? && umount2(&mountpoint, MntFlags::empty()).is_err() {
                tries += 1;
                if tries > 200 {
                    umount2(&mountpoint, MntFlags::MNT_DETACH)?;
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        } else {
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
        }
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > PATIENCE {
                self.child.kill()?;
                self.child.wait()?;
                bail!("a server had to be killed");
            }
            if begun.elapsed() > Duration::from_millis(500) {
                // Not every server ends with its mount.
                let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        tell(self.end());
    }
}

/// A disk of ours that `ploopfs mount` or `ploopfs attach` has brought up.
#[derive(Debug)]
pub(crate) struct Ours {
    /// The device of `attach`, the mountpoint of `mount`.
    at: PathBuf,
    verb: &'static str,
    /// The daemon.
    pub(crate) pid: i32,
}

impl Ours {
    /// `ploopfs attach`.
    pub(crate) fn attach(image: &Path, options: &[String], dir: &Path) -> Result<Self> {
        let mut command = ploopfs()?;
        let pid_file = dir.join("attach.pid");
        command.arg("attach").args(options).arg("--pid-file");
        let device = said(command.arg(&pid_file).arg(image))?;
        let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
        weigh(pid)?;
        Ok(Self {
            at: device.into(),
            verb: "detach",
            pid,
        })
    }

    /// `ploopfs mount`.
    pub(crate) fn mount(image: &Path, at: &Path, options: &[String], dir: &Path) -> Result<Self> {
        let mut command = ploopfs()?;
        let pid_file = dir.join("mount.pid");
        command.arg("mount").args(options).arg("--pid-file");
        said(command.arg(&pid_file).arg(image).arg(at))?;
        let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
        weigh(pid)?;
        Ok(Self {
            at: at.to_owned(),
            verb: "umount",
            pid,
        })
    }

    /// The device or the mountpoint.
    pub(crate) fn place(&self) -> &Path {
        &self.at
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let ended = ploopfs().and_then(|mut it| said(it.arg(self.verb).arg(&self.at)));
        tell(ended.map(|_| ()));
    }
}

/// Resident memory of a process in MiB: now.
pub(crate) fn resident_mib(pid: i32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.trim().parse::<f64>().ok())
        .context("no resident size")?;
    Ok(kib / 1024.0)
}

/// Nanoseconds that all threads of a process have run so far.
pub(crate) fn ran_ns(pid: i32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile, and take what it has run along.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += text
            .split(' ')
            .next()
            .and_then(|ns| ns.parse().ok())
            .unwrap_or(0_u64);
    }
    Ok(sum)
}

/// Requests that a block device has answered so far.
pub(crate) fn answered(device: &Path) -> Result<u64> {
    let name = device.file_name().context("no device")?;
    let text = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
    let numbers: Vec<u64> = text
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    match numbers.as_slice() {
        [reads, _, _, _, writes, ..] => Ok(reads + writes),
        _ => bail!("{}: no statistics", device.display()),
    }
}

/// Weight of the run's processes among all of the machine; 0 is everybody's.
pub(crate) static WEIGHT: AtomicI8 = AtomicI8::new(0);

/// Gives a process, with all that share its session, the weight of the run.
pub(crate) fn weigh(pid: i32) -> Result<()> {
    let weight = WEIGHT.load(Ordering::Relaxed);
    if weight == 0 {
        return Ok(());
    }
    fs::write(format!("/proc/{pid}/autogroup"), weight.to_string())
        .context("the kernel has no groups of processes by session")
}

/// A command in a session of its own, as daemons are: the kernel shares the processors out by
/// session, and ^C is for this program to see.
pub(crate) fn apart(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setsid");
    command.arg(program);
    command
}

/// A line for tools/bench, for as long as this lives.
#[derive(Debug)]
struct Note(Option<PathBuf>);

impl Note {
    fn leave(name: &str, text: &str) -> Result<Self> {
        // Nobody wants it where this program was started alone.
        let Some(notes) = std::env::var_os(NOTES) else {
            return Ok(Self(None));
        };
        let path = Path::new(&notes).join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(Some(path)))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            tell(fs::remove_file(path).map_err(Into::into));
        }
    }
}

/// A directory below another one that goes with the run.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
    // Dropped in this order.
    _dir: TempDir,
    _note: Note,
}

impl WorkDir {
    /// Makes it.
    pub(crate) fn below(place: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix_in("ploopfs-bench.", place)
            .with_context(|| format!("cannot work in {}", place.display()))?;
        let path = fs::canonicalize(dir.path())?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let note = Note::leave(&format!("dir.{name}"), &path.display().to_string())?;
        Ok(Self {
            path,
            _dir: dir,
            _note: note,
        })
    }

    /// Where it is, without links.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// FUSE over io_uring is offered by the kernel for as long as this lives.
///
/// The switch is one for the whole host: whoever turns it has a lock on a file for as long, and so
/// have the tests of ploopfs.
#[derive(Debug)]
pub(crate) struct Rings {
    before: Option<(String, Note)>,
    _lock: Flock<File>,
}

impl Rings {
    /// Turns the switch on; an error tells why that cannot be.
    pub(crate) fn enable() -> Result<Self> {
        let path = std::env::temp_dir().join("ploopfs-enable-uring.lock");
        let mut options = OpenOptions::new();
        let file = options.create(true).append(true).open(&path)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let before = fs::read_to_string(ENABLE_URING)
            .with_context(|| format!("this kernel has no {ENABLE_URING}"))?;
        if before.trim() == "Y" {
            return Ok(Self {
                before: None,
                _lock: lock,
            });
        }
        let note = Note::leave("enable_uring", &before)?;
        fs::write(ENABLE_URING, "Y").with_context(|| format!("cannot write {ENABLE_URING}"))?;
        Ok(Self {
            before: Some((before, note)),
            _lock: lock,
        })
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        if let Some((before, _)) = &self.before {
            tell(fs::write(ENABLE_URING, before).map_err(Into::into));
        }
    }
}

/// Kind of the file system that holds a path.
pub(crate) fn file_system(path: &Path) -> Result<String> {
    said(Command::new("stat").args(["-f", "-c", "%T"]).arg(path))
}
