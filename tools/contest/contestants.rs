//! The contestants: one line each in a table, and how each is brought up.
//!
//! Imports: `host`, `identity`, `stage`; std, `anyhow`, `nix`.
//! Never: lets two contestants share a file.
//!
//! A contestant gives a file to be read and written. In a scene with loop devices it is the file
//! behind one: `ploopfs attach` makes its own, as users have it; the others get one of the same
//! settings.

use crate::host::{self, Loop, Ours, Server, apart, has, ploopfs, said};
use crate::identity::{self, Setup};
use crate::stage::{self, Files, Stage, View, shuffle};
use anyhow::{Context, Result, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// What stands between the load and the bytes.
#[derive(Clone, Debug)]
enum Way {
    /// Nothing: the file is raw.
    Raw,
    /// The identity file.
    Identity,
    /// ploopfs over this transport.
    Ploopfs(&'static str),
    /// ploopfs with options that the user gave.
    Options(Vec<String>),
    /// qemu-storage-daemon's FUSE export of the same image.
    Qemu,
    /// qemu-nbd of the same image, and nbdfuse.
    Nbd,
}

/// Who takes part.
#[derive(Clone, Debug)]
pub(crate) struct Contestant {
    /// Column of the tables.
    pub(crate) name: String,
    way: Way,
}

/// Threads of our sessions by default.
const THREADS: usize = 8;

/// All that are known, in the order of the tables. The second identity is the same server over
/// another file: how far it is from the first is what a difference between two others is worth.
fn table() -> [(&'static str, Way); 8] {
    [
        (RAW, Way::Raw),
        (IDENTITY, Way::Identity),
        ("identity2", Way::Identity),
        (PLOOPFS, Way::Ploopfs("fuser")),
        ("dev", Way::Ploopfs("dev")),
        (RINGS, Way::Ploopfs("uring")),
        (QEMU, Way::Qemu),
        ("nbd", Way::Nbd),
    ]
}

/// The raw file.
pub(crate) const RAW: &str = "raw";
/// The ceiling of the classic transport.
pub(crate) const IDENTITY: &str = "identity";
/// ploopfs on /dev/fuse.
pub(crate) const PLOOPFS: &str = "ploopfs";
/// ploopfs over io_uring.
pub(crate) const RINGS: &str = "uring";
/// qemu-storage-daemon.
pub(crate) const QEMU: &str = "qemu";

/// The place of a contestant in the tables.
pub(crate) fn rank(name: &str) -> usize {
    let known = table();
    known
        .iter()
        .position(|(known, _)| *known == name)
        .unwrap_or(known.len())
}

/// The named contestants, or all. `NAME=OPTIONS` is ploopfs with options of `ploopfs attach`, and
/// `NAME=KIND` another one of a known kind.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<Contestant>> {
    let known = || table().into_iter();
    let contestant = |(name, way): (&str, Way)| Contestant {
        name: name.to_owned(),
        way,
    };
    if names.is_empty() {
        return Ok(known().map(contestant).collect());
    }
    let kinds: Vec<_> = known().map(|(name, _)| name).collect();
    let mut all: Vec<Contestant> = Vec::new();
    for wanted in names {
        let (name, kind) = wanted.split_once('=').unwrap_or((wanted, wanted));
        let way = match known().find(|(known, _)| *known == kind) {
            Some((_, way)) => way,
            None if wanted.contains('=') => {
                Way::Options(kind.split_whitespace().map(str::to_owned).collect())
            }
            None => bail!(
                "'{wanted}' is none of {}, and not NAME=OPTIONS",
                kinds.join(", ")
            ),
        };
        if all.iter().any(|other| other.name == name) {
            bail!("'{name}' is there twice; call one of them OTHER={kind}");
        }
        all.push(contestant((name, way)));
    }
    Ok(all)
}

/// A contestant that is up.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) name: String,
    /// What the load reads and writes.
    pub(crate) target: PathBuf,
    file: PathBuf,
    is_in_memory: bool,
    /// The daemon, where it is ours.
    pub(crate) pid: Option<i32>,
    // Dropped in this order: the device before what serves the file behind it, then the files.
    _device: Option<Loop>,
    _ours: Option<Ours>,
    _servers: Vec<Server>,
    _dir: TempDir,
}

/// Makes the files of all, which lie in one directory, fills them together, and brings all up, in
/// an order that is shuffled.
pub(crate) fn all_up(
    contestants: &[(&Contestant, &Stage)],
    random: &mut u64,
) -> Result<Vec<Subject>> {
    let mut ready = Vec::new();
    for (contestant, stage) in contestants {
        let holder = TempDir::with_prefix_in("c.", &stage.dir)?;
        let dir = fs::canonicalize(holder.path())?;
        let files = contestant.make(stage, &dir)?;
        ready.push((contestant, stage, holder, dir, files));
    }
    let Some((_, first)) = contestants.first() else {
        return Ok(Vec::new());
    };
    let is_in_memory = first.is_in_memory()?;
    let files = ready.iter_mut().map(|(.., files)| files).collect();
    stage::fill(files, is_in_memory, random)?;
    shuffle(&mut ready, random);
    let mut up = Vec::new();
    for (contestant, stage, holder, dir, files) in ready {
        let mut subject = Subject {
            name: contestant.name.clone(),
            target: files.path.clone(),
            is_in_memory,
            file: files.path,
            pid: None,
            _device: None,
            _ours: None,
            _servers: Vec::new(),
            _dir: holder,
        };
        contestant
            .serve(stage, &dir, &mut subject)
            .with_context(|| format!("cannot bring up {}", contestant.name))?;
        up.push(subject);
    }
    Ok(up)
}

impl Contestant {
    /// ploopfs with these options.
    pub(crate) fn ploopfs_with(name: &str, options: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            way: Way::Options(options.iter().map(|word| (*word).to_owned()).collect()),
        }
    }

    /// Why it cannot take part, if it cannot.
    pub(crate) fn obstacle(&self, stage: &Stage) -> Option<String> {
        let missing = |program| (!has(program)).then(|| format!("{program} is not installed"));
        let is_chain = stage.content.is_chain();
        match &self.way {
            Way::Identity | Way::Raw if is_chain => Some("has no lower image".into()),
            Way::Identity | Way::Raw => None,
            Way::Qemu | Way::Nbd if is_chain || stage.direct => {
                Some("is not measured in this scene".into())
            }
            Way::Qemu => missing("qemu-storage-daemon"),
            Way::Nbd => missing("qemu-nbd").or_else(|| missing("nbdfuse")),
            Way::Options(_) => None,
            Way::Ploopfs(transport) => {
                let knows = |word| knows_option(word).unwrap_or(false);
                if *transport != "fuser" && !knows("--transport") {
                    Some(format!("this ploopfs has no transport '{transport}'"))
                } else if stage.direct && !knows("--direct") {
                    Some("this ploopfs has no --direct".into())
                } else {
                    None
                }
            }
        }
    }

    fn options(&self, stage: &Stage) -> Result<Vec<String>> {
        let mut options = match &self.way {
            Way::Options(options) => options.clone(),
            Way::Ploopfs(transport) if knows_option("--transport")? => {
                vec!["--transport".into(), (*transport).into()]
            }
            _ => Vec::new(),
        };
        if stage.direct {
            options.push("--direct".into());
        }
        Ok(options)
    }

    /// Makes its files, without their data.
    fn make(&self, stage: &Stage, dir: &Path) -> Result<Files> {
        match self.way {
            Way::Raw | Way::Identity => stage.make_raw(dir),
            _ => stage.make_image(dir),
        }
    }

    /// Makes its files and brings it up.
    pub(crate) fn up(&self, stage: &Stage, random: &mut u64) -> Result<Subject> {
        let up = all_up(&[(self, stage)], random)?;
        up.into_iter().next().context("nobody came up")
    }

    fn serve(&self, stage: &Stage, dir: &Path, subject: &mut Subject) -> Result<()> {
        let mountpoint = dir.join("m");
        fs::create_dir(&mountpoint)?;
        let file = subject.file.clone();
        match &self.way {
            Way::Raw => {}
            Way::Identity => {
                let setup = Setup {
                    file,
                    mountpoint: mountpoint.clone(),
                    threads: THREADS,
                    for_loop: stage.view == View::Loop,
                    direct: stage.direct,
                };
                let mut command = apart(std::env::current_exe()?);
                command.env(identity::AS_IDENTITY, "1").args(setup.words());
                subject
                    ._servers
                    .push(Server::start(command, &mountpoint, dir)?);
                subject.target = mountpoint.join(identity::FILE);
            }
            Way::Ploopfs(_) | Way::Options(_) => {
                let options = self.options(stage)?;
                let ours = match stage.view {
                    View::Loop => Ours::attach(&file, &options, dir)?,
                    View::File => Ours::mount(&file, &mountpoint, &options, dir)?,
                };
                subject.pid = Some(ours.pid);
                subject.target = match stage.view {
                    View::Loop => ours.place().to_owned(),
                    View::File => mountpoint.join("disk.img"),
                };
                subject._ours = Some(ours);
                return Ok(());
            }
            Way::Qemu => {
                subject.target = dir.join("export");
                File::create_new(&subject.target)?;
                let server = Server::start(qemu(&file, &subject.target), &subject.target, dir)?;
                subject._servers.push(server);
            }
            Way::Nbd => {
                subject._servers = nbd(&file, &mountpoint, dir)?;
                subject.target = mountpoint.join("nbd");
            }
        }
        if stage.view == View::Loop {
            let device = Loop::over(&subject.target)?;
            subject.target = device.device().to_owned();
            subject._device = Some(device);
        }
        Ok(())
    }
}

/// qemu-storage-daemon with a parallels image as a file.
pub(crate) fn qemu(image: &Path, mountpoint: &Path) -> Command {
    // The daemon's options are separated by commas, so a path must not have one.
    let word = |path: &Path| path.display().to_string().replace(',', ",,");
    let mut command = apart("qemu-storage-daemon");
    command.args([
        "--blockdev",
        &format!("file,node-name=f,filename={}", word(image)),
    ]);
    command.args(["--blockdev", "parallels,node-name=p,file=f"]);
    let export = format!(
        "fuse,id=e,node-name=p,mountpoint={},writable=on",
        word(mountpoint)
    );
    command.args(["--export", &export]);
    command
}

/// qemu-nbd with a parallels image, and its export as a file; the last server goes first.
fn nbd(image: &Path, mountpoint: &Path, dir: &Path) -> Result<Vec<Server>> {
    let socket = dir.join("s");
    let mut command = apart("qemu-nbd");
    command.args(["-f", "parallels", "-t", "-e", "8", "-k"]);
    command.arg(&socket).arg(image);
    let export = Server::start_for(command, &socket, dir)?;
    let mut command = apart("nbdfuse");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    command.arg(mountpoint).arg(uri);
    let mounted = Server::start(command, mountpoint, dir)?;
    // Dropped in this order.
    Ok(vec![mounted, export])
}

/// True when the ploopfs that is measured has a long option.
fn knows_option(option: &str) -> Result<bool> {
    static HELP: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    if HELP.get().is_none() {
        let _ = HELP.set(said(ploopfs()?.args(["mount", "--help"]))?);
    }
    let help = HELP.get().context("no help")?;
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
    Ok(help.split(option).skip(1).any(ends))
}

impl Subject {
    /// Makes the host forget what it has of the file, so that the next reads are cold. The raw
    /// loop goes past the page cache, so it has no advantage by this.
    pub(crate) fn forget(&self) -> Result<()> {
        let file = File::open(&self.file)?;
        if self.file.is_dir() {
            bail!("a bundle cannot be forgotten");
        }
        file.sync_all()?;
        if !self.is_in_memory {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }

    /// Processor time that serving has taken so far, and requests that were served by it; `None`
    /// where the kernel serves, or no device counts.
    pub(crate) fn spent(&self) -> Result<Option<(u64, u64)>> {
        let servers = self._servers.iter().map(Server::pid).chain(self.pid);
        let mut ran = 0;
        for pid in servers {
            ran += host::ran_ns(pid)?;
        }
        if ran == 0 || !self.target.starts_with("/dev") || self.target.starts_with("/dev/shm") {
            return Ok(None);
        }
        Ok(Some((ran, host::answered(&self.target)?)))
    }

    /// Waits until the file is on the medium, so that the next one's sample does not pay for it.
    pub(crate) fn settle(&self) -> Result<()> {
        if !self.is_in_memory && !self.file.is_dir() {
            File::open(&self.file)?.sync_all()?;
        }
        Ok(())
    }
}

/// Turns the kernel's switch on when somebody needs it.
pub(crate) fn enable_rings(all: &[Contestant]) -> Option<Result<host::Rings>> {
    let wants = |c: &Contestant| match &c.way {
        Way::Ploopfs(transport) => *transport == "uring",
        Way::Options(options) => options.iter().any(|word| word.contains("uring")),
        _ => false,
    };
    let is_known = knows_option("--transport").unwrap_or(false);
    (is_known && all.iter().any(wants)).then(host::Rings::enable)
}
