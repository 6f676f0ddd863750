//! What a daemon that was killed leaves behind: replaced when asked, and nothing else with it.

use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::command::Finished;
use crate::support::guards::{FsMount, Loop, Mounted, is_gone, is_mounted, text};
use crate::support::harness::{skip, trial};
use crate::support::probe::Need::{self, E2fsprogs, Fuse, Root};
use crate::support::{self, Outcome, PLOOPFS, command, expect_flat, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

const LOOP: &[Need] = &[Fuse, Root, Need::Loop, E2fsprogs];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("a_dead_mount_is_replaced", &[Fuse], replaced),
        trial(
            "replace_dead_leaves_what_lives",
            &[Fuse, Root],
            what_lives_stays,
        ),
        trial(
            "replace_dead_leaves_what_is_not_ours",
            &[Fuse, Root],
            what_is_not_ours_stays,
        ),
        trial(
            "umount_clears_what_is_left_of_a_mountpoint_that_is_gone",
            &[Fuse, Root],
            records_of_gone_places,
        ),
        trial(
            "who_cannot_see_a_dead_mount_does_not_forget_it",
            &[Fuse, Root],
            seen_from_elsewhere,
        ),
        trial(
            "replace_dead_leaves_what_covers",
            &[Fuse, Root],
            what_covers_stays,
        ),
        trial(
            "a_user_replaces_only_own_dead_mounts",
            &[Fuse, Root],
            users_replace_their_own,
        ),
        trial("replace_dead_names_its_loops", LOOP, loops_are_named),
        trial(
            "attach_refuses_or_replaces_a_dead_mount",
            LOOP,
            attach_over_a_dead_mount,
        ),
        trial(
            "attach_replaces_a_dead_attachment",
            LOOP,
            attach_over_a_dead_attachment,
        ),
    ]
}

fn image(dir: &Path) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, 9600).mapping(Mapped::Percent(50));
    let path = dir.join("a.hds");
    spec.write(&path)?;
    Ok((spec, path))
}

/// How many mounts there are at a place, over each other.
fn mounts_at(at: &Path) -> Result<usize> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let places = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(places.filter(|place| Path::new(place) == at).count())
}

/// A mount whose daemon was killed.
fn dead(at: &Path, image: &Path, options: &[&str]) -> Result<Mounted> {
    let mounted = Mounted::at(at, image, options)?;
    mounted.signal(Signal::SIGKILL)?;
    mounted.gone(Duration::from_secs(5))?;
    ensure!(is_mounted(at), "a killed daemon leaves its mount behind");
    Ok(mounted)
}

fn mount(words: &[&str], image: &Path, at: &Path) -> Result<Finished> {
    let mut command = command::ploopfs(&["mount"]);
    command::run(command.args(words).arg(image).arg(at))
}

fn replaced() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let (as_dir, as_file) = (dir.path().join("mnt"), dir.path().join("file"));
    fs::create_dir(&as_dir)?;
    fs::write(&as_file, "")?;
    for at in [&as_dir, &as_file] {
        for word in [
            ["--replace-dead"].as_slice(),
            &["-o", "replace_dead,noatime"],
        ] {
            let gone = dead(at, &path, &[])?;
            let refused = mount(&[], &path, at)?.expect_code(1)?;
            refused.expect_words(&["--replace-dead", "ploopfs umount", text(at)])?;
            let mounted = Mounted::at(at, &path, word)?;
            ensure!(mounts_at(at)? == 1, "{} mounts", mounts_at(at)?);
            expect_flat(&mounted.disk(), &Model::of(&spec))?;
            let listed = command::ok(&mut command::ploopfs(&["list"]))?;
            ensure!(!listed.contains(&gone.pid().to_string()), "{listed}");
            mounted.umount()?;
            support::expect_clean(&path)?;
        }
    }
    // Where nothing is dead the word does nothing, and a subtype hides no mount from it.
    let gone = Mounted::new(
        dir.path(),
        &path,
        &["--replace-dead", "-o", "subtype=other"],
    )?;
    gone.signal(Signal::SIGKILL)?;
    gone.gone(Duration::from_secs(5))?;
    let mounted = Mounted::at(gone.path(), &path, &["--replace-dead"])?;
    ensure!(mounts_at(mounted.path())? == 1, "the hidden one is there");
    mounted.umount()
}

fn what_lives_stays() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let other = dir.path().join("other.hds");
    spec.write(&other)?;
    let living = Mounted::new(dir.path(), &path, &[])?;
    // One that does not answer is not dead, and must not make us wait for it either.
    for signal in [Signal::SIGCONT, Signal::SIGSTOP] {
        living.signal(signal)?;
        let refused = mount(&["--replace-dead"], &other, living.path());
        if signal == Signal::SIGSTOP {
            living.signal(Signal::SIGCONT)?;
        }
        refused?.expect_code(1)?.expect_words(&["already"])?;
        ensure!(is_mounted(living.path()), "the living mount is gone");
    }
    expect_flat(&living.disk(), &Model::of(&spec))?;
    living.umount()?;
    // Over a file system of another type one may mount, and it is there afterwards.
    let at = dir.path().join("tmpfs");
    let foreign = FsMount::with(Path::new("none"), &at, &["-t", "tmpfs"])?;
    let over = Mounted::at(&at, &path, &["--replace-dead"])?;
    ensure!(mounts_at(&at)? == 2, "not mounted over it");
    command::run(command::ploopfs(&["umount"]).arg(&at))?.expect_code(0)?;
    over.gone(Duration::from_secs(2))?;
    ensure!(mounts_at(&at)? == 1, "the tmpfs was unmounted");
    drop(over);
    drop(foreign);
    Ok(())
}

/// A mount that goes with this value.
struct Raw(PathBuf);

impl Raw {
    /// A FUSE mount whose daemon, this process, lets go of it at once.
    fn dead(at: &Path, kind: &str, user: u32) -> Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let data = format!(
            "fd={},rootmode=40000,user_id={user},group_id={user},allow_other",
            device.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        nix::mount::mount(Some("x"), at, Some(kind), flags, Some(data.as_str()))?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// `major:minor` of what is mounted at a place.
fn device_at(at: &Path) -> Result<String> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mut lines = table.lines().map(|line| line.split(' '));
    let found = lines.find_map(|mut words| {
        let device = words.nth(2)?;
        (Path::new(words.nth(1)?) == at).then(|| device.to_owned())
    });
    found.context("nothing is mounted there")
}

/// A file that goes with this value.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn what_is_not_ours_stays() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let cases = [
        ("fuse.stranger", 0, "fuse.stranger"),
        ("fuse.ploopfs", 4711, "user"),
    ];
    // What a daemon of ours had there once does not make ours what has its number by now.
    let registry = Path::new("/run/ploopfs");
    let past = registry.join("0.json");
    let _removed = Removed(past.clone());
    for (kind, user, word) in cases {
        let raw = Raw::dead(&at, kind, user)?;
        if registry.is_dir() {
            let line = format!(
                r#"{{"pid":0,"start":0,"image":"{}","mountpoint":"{}","mount_device":"{}",
                "device":null,"file_system":null,"read_only":false,"since":0,"error":"x"}}"#,
                text(&path),
                text(&at),
                device_at(&at)?
            );
            fs::write(&past, line)?;
        }
        for flag in ["--replace-dead", "-q"] {
            let refused = mount(&[flag], &path, &at)?.expect_code(1)?;
            refused.expect_words(&[word, "daemon has died", text(&at)])?;
            ensure!(mounts_at(&at)? == 1, "{kind} of {user} was touched");
        }
        drop(raw);
    }
    Ok(())
}

/// Says what a daemon says that could not close its image.
fn leave_an_error(pid: i32) -> Result<()> {
    let path = Path::new("/run/ploopfs").join(format!("{pid}.json"));
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    record["error"] = "the cable was pulled".into();
    fs::write(&path, record.to_string()).context("the record is written")
}

/// The reason why an image was not closed is kept until it has been told, however the user names
/// the mount, and whatever has been removed since.
fn records_of_gone_places() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link)?;
    let at = dir.path().join("gone");
    let names = [
        at.clone(),
        link.join("gone"),
        path.clone(),
        link.join("a.hds"),
    ];
    for (number, name) in names.iter().enumerate() {
        if number == 3 {
            // The image, too.
            fs::remove_file(&path)?;
            image(dir.path())?;
        }
        fs::create_dir(&at)?;
        let mounted = dead(&at, &path, &[])?;
        leave_an_error(mounted.pid())?;
        let mut over = command::new("umount");
        command::ok(over.arg("-l").arg(&at))?;
        fs::remove_dir(&at)?;
        if number == 3 {
            fs::remove_file(&path)?;
        }
        let list = || command::ok(&mut command::ploopfs(&["list"]));
        let listed = list()?;
        ensure!(listed.contains(text(&at)), "it was forgotten: {listed}");
        let told = command::run(command::ploopfs(&["umount"]).arg(name))?.expect_code(1)?;
        told.expect_words(&["the cable was pulled"])?;
        let listed = list()?;
        ensure!(!listed.contains(text(&at)), "it is still there: {listed}");
        let again = command::run(command::ploopfs(&["umount"]).arg(&at))?.expect_code(1)?;
        again.expect_words(&["No such file"])?;
    }
    Ok(())
}

/// Root's commands share their records, and a service may have mounts of its own.
fn seen_from_elsewhere() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let mut elsewhere = command::new("unshare");
    elsewhere.args(["-m", "--propagation", "private", "sh", "-ec"]);
    elsewhere.args(["echo; read go; \"$1\" list", "sh", PLOOPFS]);
    let (stdin, stdout) = (Stdio::piped(), Stdio::piped());
    let mut elsewhere = elsewhere.stdin(stdin).stdout(stdout).spawn()?;
    let mut said = BufReader::new(elsewhere.stdout.take().context("its output")?);
    said.read_line(&mut String::new())?;
    let gone = dead(&at, &path, &[])?;
    elsewhere
        .stdin
        .take()
        .context("its input")?
        .write_all(b"\n")?;
    let mut listed = String::new();
    said.read_to_string(&mut listed)?;
    ensure!(elsewhere.wait()?.success(), "list failed");
    ensure!(!listed.contains(text(&at)), "the mount is there: {listed}");
    let here = command::ok(&mut command::ploopfs(&["list"]))?;
    let row = here.lines().find(|row| row.contains(text(&at)));
    ensure!(row.is_some_and(|row| row.contains("(dead)")), "{here}");
    drop(gone);
    Ok(())
}

fn what_covers_stays() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let file = dir.path().join("file");
    fs::write(&file, "over it")?;
    let inner = mounted.path().join("stats.json");
    let none: Option<&str> = None;
    nix::mount::mount(Some(&file), &inner, none, MsFlags::MS_BIND, none)?;
    let _inner = Raw(inner.clone());
    mounted.signal(Signal::SIGKILL)?;
    mounted.gone(Duration::from_secs(5))?;
    let refused = mount(&["--replace-dead"], &path, mounted.path())?.expect_code(1)?;
    refused.expect_words(&["in it", "findmnt"])?;
    ensure!(mounts_at(&inner)? == 1, "what was mounted in it is gone");
    Ok(())
}

/// Without root all goes through fusermount3. The user gets a door of the kernel in a name space of
/// its own; what the host's lets users do stays as it is.
fn users_replace_their_own() -> Outcome {
    const USER: u32 = 65534;
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    for owned in [dir.path(), &path, &at] {
        std::os::unix::fs::chown(owned, Some(USER), Some(USER))?;
    }
    let script = "mknod -m 666 $1/fuse c 10 229 && mount --bind $1/fuse /dev/fuse || exit 77
        user() { setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"; }
        dead() { kill -9 $(cat $1/pid); sleep 0.2; rm $1/pid; }
        user $2 mount --pid-file $1/pid $1/a.hds $1/mnt; dead $1
        user $2 mount $1/a.hds $1/mnt && exit 1
        $2 mount --replace-dead $1/a.hds $1/mnt && exit 2
        user $2 mount --replace-dead --pid-file $1/pid $1/a.hds $1/mnt
        grep -c \" $1/mnt \" /proc/self/mountinfo
        user cp $1/mnt/disk.img $1/copy; user $2 umount $1/mnt";
    let mut command = command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-ec", script, "sh"]);
    let done = command::run(command.arg(dir.path()).arg(PLOOPFS))?;
    if done.code() == 77 {
        return Err(skip(format!("no private device: {}", done.stderr.trim())));
    }
    let done = done.expect_code(0)?;
    ensure!(done.text() == "1\n", "{}", done.story());
    done.expect_words(&["--replace-dead", "already"])?;
    expect_flat(&dir.path().join("copy"), &Model::of(&spec))?;
    support::expect_clean(&path)
}

fn loops_are_named() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let gone = Mounted::new(dir.path(), &path, &[])?;
    let device = Loop::new(&gone.disk())?;
    gone.signal(Signal::SIGKILL)?;
    gone.gone(Duration::from_secs(5))?;
    let (mounted, said) = Mounted::telling(gone.path(), &path, &["--replace-dead"])?;
    said.expect_words(&[text(device.dev()), "losetup -d"])?;
    expect_flat(&mounted.disk(), &Model::of(&spec))?;
    // The old device has nothing to do with the new mount.
    device.detach()?;
    mounted.umount()
}

/// A disk with ext4 on it, made through a mount.
fn with_ext4(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("a.hds");
    ImageSpec::new(2, 2048, 1 << 17).write(&path)?;
    let mounted = Mounted::new(dir, &path, &[])?;
    command::ok(
        command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(mounted.disk()),
    )?;
    mounted.umount()?;
    Ok(path)
}

fn attach(words: &[&str], path: &Path) -> Result<Finished> {
    command::run(command::ploopfs(&["attach"]).args(words).arg(path))
}

fn detach(what: &Path) -> Result<Finished> {
    command::run(command::ploopfs(&["detach"]).arg(what))
}

fn attach_over_a_dead_mount() -> Outcome {
    let dir = scratch()?;
    let path = with_ext4(dir.path())?;
    let at = dir.path().join("mnt");
    let _gone = dead(&at, &path, &[])?;
    let refused = attach(&["-m", text(&at)], &path)?.expect_code(1)?;
    refused.expect_words(&["died", "--replace-dead", text(&at)])?;
    let done = attach(&["--replace-dead", "-m", text(&at)], &path)?;
    let kinds = command::run(
        command::new("findmnt")
            .args(["-n", "-o", "FSTYPE"])
            .arg(&at),
    );
    let over = detach(&path);
    done.expect_code(0)?;
    ensure!(kinds?.text().trim() == "ext4", "no ext4, or not alone");
    over?.expect_code(0)?;
    ensure!(!is_mounted(&at), "something is left");
    // A living one is refused.
    let living = Mounted::new(dir.path(), &path, &[])?;
    let other = dir.path().join("b.hds");
    ImageSpec::new(2, 2048, 1 << 14).write(&other)?;
    let refused = attach(&["--replace-dead", "-m", text(&at)], &other)?.expect_code(1)?;
    refused.expect_words(&["already"])?;
    living.umount()
}

/// What is behind a device that `attach` printed, if anything.
fn backing(device: &Path) -> Option<String> {
    let name = device.file_name()?;
    let path = Path::new("/sys/block").join(name).join("loop/backing_file");
    fs::read_to_string(path).ok()
}

fn attach_over_a_dead_attachment() -> Outcome {
    let dir = scratch()?;
    let path = with_ext4(dir.path())?;
    let at = dir.path().join("fs");
    fs::create_dir(&at)?;
    let pid_file = dir.path().join("pid");
    let words = ["--pid-file", text(&pid_file), "-m", text(&at)];
    let first = attach(&words, &path)?.expect_code(0)?;
    let device = PathBuf::from(first.text().trim());
    let pid: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    command::eventually(Duration::from_secs(5), || {
        ensure!(is_gone(pid), "{pid} is still there");
        Ok(())
    })?;
    let _left = Raw(at.clone());
    let refused = attach(&["-m", text(&at)], &path)?;
    let again = attach(&["--replace-dead", "-m", text(&at)], &path)?;
    let new = PathBuf::from(again.text().trim());
    let wrote = fs::write(at.join("file"), "through the new one");
    let count = mounts_at(&at);
    let over = detach(&path);
    if again.code() != 0 && backing(&device).is_some_and(|file| file.starts_with("/a.hds")) {
        let _ = command::run(command::new("losetup").arg("-d").arg(&device));
    }
    refused
        .expect_code(1)?
        .expect_words(&["--replace-dead", text(&device)])?;
    again
        .expect_code(0)?
        .expect_words(&[text(&device), "detached"])?;
    wrote.context("nothing can be written")?;
    ensure!(count? == 1, "the old file system is still mounted");
    over?.expect_code(0)?;
    for device in [&device, &new] {
        let left = backing(device).filter(|file| file.starts_with("/a.hds"));
        ensure!(left.is_none(), "{} has {left:?}", device.display());
    }
    ensure!(!is_mounted(&at), "detach left the file system");
    support::expect_clean(&path)
}
