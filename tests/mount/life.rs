//! From mount to unmount: what the caller sees, what signals do, what a crash leaves.

use super::disks::{expect_shadow, scribble};
use crate::forge::content::Model;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{FsMount, Loop, Mounted, is_gone, is_mounted, text};
use crate::support::harness::{skip, trial};
use crate::support::probe::Need::{self, E2fsprogs, Fuse};
use crate::support::{self, Outcome, PLOOPFS, command, expect_flat, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOOP: &[Need] = &[Fuse, Need::Root, Need::Loop, E2fsprogs];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "command_substitution_does_not_hang",
            &[Fuse],
            substitution_does_not_hang,
        ),
        trial(
            "clean_right_after_umount",
            &[Fuse],
            clean_right_after_umount,
        ),
        trial(
            "umount_names_what_is_no_mount",
            &[Fuse],
            umount_names_what_is_no_mount,
        ),
        trial(
            "idle_daemon_ends_on_sigterm",
            &[Fuse],
            idle_daemon_ends_on_sigterm,
        ),
        trial(
            "sigterm_under_ext4_loses_nothing",
            LOOP,
            sigterm_under_ext4_loses_nothing,
        ),
        trial(
            "dead_mountpoint_is_explained",
            &[Fuse],
            dead_mountpoint_is_explained,
        ),
        trial(
            "killed_daemon_leaves_what_was_synced",
            &[Fuse],
            killed_daemon_keeps_synced,
        ),
        trial("errors_reach_the_caller", &[Fuse], errors_reach_the_caller),
        trial(
            "helper_with_an_empty_environment",
            &[Fuse],
            helper_with_empty_environment,
        ),
        trial(
            "mount_t_fuse_ploopfs",
            &[Fuse, Need::Root],
            mount_t_fuse_ploopfs,
        ),
        trial("attach_and_detach", LOOP, attach_and_detach),
        trial(
            "foreign_mounts_stay",
            &[Fuse, Need::Root],
            foreign_mounts_stay,
        ),
        trial(
            "detach_leaves_other_images_alone",
            LOOP,
            detach_leaves_others,
        ),
        trial("detach_after_death", LOOP, detach_after_death),
        trial("list_shows_mounts", &[Fuse], list_shows_mounts),
        trial("foreground_stays", &[Fuse], foreground_stays),
    ]
}

fn image(dir: &Path) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, 9600).mapping(Mapped::Percent(50));
    let path = dir.join("a.hds");
    spec.write(&path)?;
    Ok((spec, path))
}

fn substitution_does_not_hang() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    // The daemon must let go of the pipe; `timeout` would say 124.
    let script = "timeout 5 sh -c 'x=$(\"$0\" mount --pid-file \"$1\" \"$2\" \"$3\"); exit $?' \
                  \"$1\" \"$2\" \"$3\" \"$4\"";
    let pid = at.with_extension("pid");
    let args = [PLOOPFS, text(&pid), text(&path), text(&at)];
    let done = command::run(&mut command::sh(script, &args))?;
    let mounted = is_mounted(&at);
    let shown = expect_flat(&at.join("disk.img"), &Model::of(&spec));
    let over = command::run(command::ploopfs(&["umount"]).arg(&at))?;
    ensure!(done.code() == 0, "{}", done.story());
    ensure!(mounted, "nothing was mounted: {}", done.story());
    shown?;
    over.expect_code(0)?;
    Ok(())
}

fn clean_right_after_umount() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let mut shadow = Model::of(&spec).read(0, 9600 * 512);
    for round in 0..10 {
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        scribble(&mounted.disk(), &mut shadow, round, 30)?;
        // Unsynced bytes, too, belong to the image when the command returns.
        let file = OpenOptions::new().write(true).open(mounted.disk())?;
        file.write_all_at(&[round as u8 + 1; 9000], 700)?;
        shadow[700..9700].fill(round as u8 + 1);
        drop(file);
        command::ok(command::ploopfs(&["umount"]).arg(mounted.path()))?;
        support::expect_clean(&path)?;
        expect_shadow(&path, &shadow)?;
        mounted.gone(Duration::from_secs(2))?;
    }
    Ok(())
}

fn umount_names_what_is_no_mount() -> Outcome {
    let dir = scratch()?;
    let done = command::run(command::ploopfs(&["umount"]).arg(dir.path()))?;
    done.expect_code(1)?.expect_words(&["mount"])?;
    Ok(())
}

fn idle_daemon_ends_on_sigterm() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let mut shadow = Model::of(&spec).read(0, 9600 * 512);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        scribble(&mounted.disk(), &mut shadow, signal as u64, 30)?;
        mounted.signal(signal)?;
        mounted.gone(Duration::from_secs(10))?;
        ensure!(!is_mounted(mounted.path()), "{signal} left the mount");
        support::expect_clean(&path)?;
        expect_shadow(&path, &shadow)?;
    }
    Ok(())
}

fn sigterm_under_ext4_loses_nothing() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 1 << 20).write(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let device = Loop::new(&mounted.disk())?;
    command::ok(
        command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(device.dev()),
    )?;
    let system = FsMount::new(device.dev(), &dir.path().join("fs"))?;
    let bytes = |number: u8| vec![number; 300_000 + usize::from(number) * 1000];
    for number in 0..40 {
        fs::write(system.path().join(format!("before{number}")), bytes(number))?;
    }
    mounted.signal(Signal::SIGTERM)?;
    std::thread::sleep(Duration::from_millis(500));
    // The file system does not notice: the daemon serves it until its last user is gone.
    for number in 0..40 {
        fs::write(system.path().join(format!("after{number}")), bytes(number))?;
    }
    command::ok(command::new("sync").arg("-f").arg(system.path()))?;
    system.umount()?;
    device.detach()?;
    mounted.gone(Duration::from_secs(30))?;
    drop(mounted);
    support::expect_clean(&path)?;
    let mounted = Mounted::new(dir.path(), &path, &["-r"])?;
    command::ok(command::new("e2fsck").arg("-fn").arg(mounted.disk()))?;
    let device = Loop::with(&mounted.disk(), &["-r"])?;
    let options = ["-o", "ro,noload"];
    let system = FsMount::with(device.dev(), &dir.path().join("fs"), &options)?;
    for number in 0..40 {
        for word in ["before", "after"] {
            let found = fs::read(system.path().join(format!("{word}{number}")))?;
            ensure!(found == bytes(number), "{word}{number} holds other bytes");
        }
    }
    system.umount()?;
    device.detach()?;
    mounted.umount()
}

fn dead_mountpoint_is_explained() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    mounted.signal(Signal::SIGKILL)?;
    mounted.gone(Duration::from_secs(5))?;
    ensure!(
        is_mounted(mounted.path()),
        "a killed daemon leaves its mount behind"
    );
    let mut command = command::ploopfs(&["mount"]);
    let done = command::run(command.arg(&path).arg(mounted.path()))?;
    let at = text(mounted.path()).to_string();
    // What to type must be there, with the path.
    done.expect_code(1)?.expect_words(&["umount", &at])?;
    // Our own umount clears it away.
    command::run(command::ploopfs(&["umount"]).arg(mounted.path()))?;
    ensure!(
        !is_mounted(mounted.path()),
        "`ploopfs umount` left the dead mount"
    );
    Ok(())
}

fn killed_daemon_keeps_synced() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let mut shadow = Model::of(&spec).read(0, 9600 * 512);
    for round in 0..5 {
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        // It ends with an fsync: all of it must survive.
        scribble(&mounted.disk(), &mut shadow, 50 + round, 40)?;
        mounted.signal(Signal::SIGKILL)?;
        mounted.gone(Duration::from_secs(5))?;
        drop(mounted);
        expect_shadow(&path, &shadow)?;
        let mark = support::mark_of(&path)?;
        ensure!(
            mark == crate::forge::image::IN_USE,
            "the mark is {mark:#x} after a crash"
        );
    }
    // The next mount mends what a crash leaves, and says so.
    let at = dir.path().join("mnt");
    let (mounted, said) = Mounted::telling(&at, &path, &[])?;
    ensure!(!said.stderr.is_empty(), "mending was not told");
    mounted.umount()?;
    support::expect_clean(&path)?;
    expect_shadow(&path, &shadow)
}

fn errors_reach_the_caller() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let missing = dir.path().join("missing.hds");
    Mounted::refused(dir.path(), &missing, &[])?.expect_words(&[text(&missing)])?;
    let junk = dir.path().join("junk");
    fs::write(&junk, vec![7; 100_000])?;
    Mounted::refused(dir.path(), &junk, &[])?.expect_words(&[text(&junk)])?;
    let mount = |at: &Path| command::run(command::ploopfs(&["mount"]).arg(&path).arg(at));
    mount(&dir.path().join("nowhere"))?
        .expect_code(1)?
        .expect_words(&["mkdir"])?;
    let full = dir.path().join("full");
    fs::create_dir(&full)?;
    fs::write(full.join("file"), b"x")?;
    mount(&full)?.expect_code(1)?.expect_words(&["empty"])?;
    let mounted = Mounted::new(dir.path(), &path, &["-o", "nonempty"])?;
    mounted.umount()?;
    let odd = Mounted::refused(dir.path(), &path, &["-o", "snapshat=1"])?;
    odd.expect_words(&["snapshat", "snapshot"])?;
    ensure!(
        support::mark_of(&path)? == 0,
        "a refused mount left the mark"
    );
    Ok(())
}

fn helper_with_empty_environment() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    for name in ["mount.ploopfs", "mount.fuse.ploopfs"] {
        let helper = dir.path().join(name);
        symlink(PLOOPFS, &helper)?;
        // Exactly what mount(8) and mount.fuse3 hand over.
        let mut command = command::new("env");
        command.arg("-i").arg(&helper).arg(&path).arg(&at);
        command.args(["-o", "rw,nofail,dev,suid,noauto,x-systemd.automount"]);
        let done = command::run(&mut command)?;
        let shown = expect_flat(&at.join("disk.img"), &Model::of(&spec));
        let unhelper = dir.path().join(name.replacen("mount", "umount", 1));
        symlink(PLOOPFS, &unhelper)?;
        let mut command = command::new("env");
        let over = command::run(command.arg("-i").arg(&unhelper).arg(&at))?;
        done.expect_code(0)?;
        shown.with_context(|| name.to_string())?;
        over.expect_code(0)?;
        ensure!(!is_mounted(&at), "the umount helper left the mount");
        support::expect_clean(&path)?;
        let mut command = command::new("env");
        command
            .arg("-i")
            .arg(&helper)
            .arg(dir.path().join("missing"))
            .arg(&at);
        command::run(&mut command)?
            .expect_code(32)?
            .expect_words(&["missing"])?;
    }
    Ok(())
}

fn mount_t_fuse_ploopfs() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    // A private mount namespace gets /usr/sbin with our helpers in it; the host's stays as it is.
    let script = "d=$1; mkdir $d/over; mount -t tmpfs none $d/over || exit 77
        mkdir $d/over/u $d/over/w $d/mnt
        o=lowerdir=/usr/sbin,upperdir=$d/over/u,workdir=$d/over/w
        mount -t overlay none -o $o /usr/sbin || exit 77
        ln -s $2 /usr/sbin/mount.fuse.ploopfs; ln -s $2 /usr/sbin/umount.fuse.ploopfs
        mount -t fuse.ploopfs -o ro,nofail $3 $d/mnt
        findmnt -n -t fuse.ploopfs $d/mnt >&2; cp $d/mnt/disk.img $d/copy; umount $d/mnt";
    let mut command = command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-ec", script, "sh"]);
    let done = command::run(command.arg(dir.path()).arg(PLOOPFS).arg(&path))?;
    if done.code() == 77 {
        return Err(skip(format!("no private overlay: {}", done.stderr.trim())));
    }
    done.expect_code(0)?;
    expect_flat(&dir.path().join("copy"), &Model::of(&spec))
}

fn attach_and_detach() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    ImageSpec::new(2, 2048, 1 << 18).write(&path)?;
    for by_device in [true, false] {
        let said = command::ok(command::ploopfs(&["attach"]).arg(&path))?;
        let device = PathBuf::from(said.trim());
        let work = || -> Outcome {
            ensure!(
                device.starts_with("/dev") && said.lines().count() == 1,
                "printed {said:?}"
            );
            let name = device
                .file_name()
                .context("no name")?
                .to_string_lossy()
                .into_owned();
            for (knob, value) in [("read_ahead_kb", "1024"), ("max_sectors_kb", "1024")] {
                let path = format!("/sys/block/{name}/queue/{knob}");
                let found = fs::read_to_string(&path)?;
                ensure!(found.trim() == value, "{knob} is {found}");
            }
            let direct = fs::read_to_string(format!("/sys/block/{name}/loop/dio"))?;
            ensure!(direct.trim() == "1", "direct I/O is off");
            command::ok(command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device))?;
            let listed = command::ok(&mut command::ploopfs(&["list"]))?;
            ensure!(
                listed.contains(said.trim()),
                "list does not show {said}: {listed}"
            );
            Ok(())
        };
        let worked = work();
        let which = if by_device { &device } else { &path };
        command::run(command::ploopfs(&["detach"]).arg(which))?.expect_code(0)?;
        worked?;
        support::expect_clean(&path)?;
        Mounted::new(dir.path(), &path, &["-r"])?.umount()?;
    }
    // With -m the file system is mounted as well, and detach undoes it all.
    let at = dir.path().join("fs");
    fs::create_dir(&at)?;
    let said = command::ok(command::ploopfs(&["attach", "-m"]).arg(&at).arg(&path))?;
    let wrote = fs::write(at.join("file"), b"through the file system");
    let was_mounted = is_mounted(&at);
    command::run(&mut command::ploopfs(&["detach", said.trim()]))?.expect_code(0)?;
    wrote?;
    ensure!(
        was_mounted && !is_mounted(&at),
        "mounted {was_mounted}, then still mounted"
    );
    support::expect_clean(&path)
}

/// What is mounted where one of ours was has the same device number more often than not.
fn foreign_mounts_stay() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        let mounted = Mounted::new(dir.path(), &path, &[])?;
        mounted.signal(signal)?;
        if signal == Signal::SIGKILL {
            mounted.gone(Duration::from_secs(5))?;
        }
        // The program umount would look at the mount, whose daemon does not answer.
        nix::mount::umount(mounted.path())?;
        let tmpfs = ["-t", "tmpfs"];
        let foreign = FsMount::with(Path::new("foreign"), mounted.path(), &tmpfs)?;
        if signal == Signal::SIGKILL {
            command::run(command::ploopfs(&["umount"]).arg(mounted.path()))?;
        } else {
            mounted.signal(Signal::SIGCONT)?;
            mounted.gone(Duration::from_secs(20))?;
        }
        ensure!(
            is_mounted(foreign.path()),
            "after {signal} the other file system was unmounted"
        );
        foreign.umount()?;
    }
    Ok(())
}

/// A killed daemon leaves a record of a device that another image of the same name has by now.
fn detach_leaves_others() -> Outcome {
    let dir = scratch()?;
    let attach = |name: &str| -> Result<(PathBuf, PathBuf, i32)> {
        let path = dir.path().join(name).join("root.hds");
        fs::create_dir_all(path.parent().context("no parent")?)?;
        ImageSpec::new(2, 2048, 1 << 14).write(&path)?;
        let pid_file = dir.path().join(format!("{name}.pid"));
        let mut command = command::ploopfs(&["attach", "--pid-file", text(&pid_file)]);
        let said = command::ok(command.arg(&path))?;
        let pid = fs::read_to_string(pid_file)?.trim().parse()?;
        Ok((path, PathBuf::from(said.trim()), pid))
    };
    let (dead, device, pid) = attach("dead")?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    command::eventually(Duration::from_secs(5), || {
        ensure!(is_gone(pid), "{pid} is still there");
        Ok(())
    })?;
    command::ok(command::new("losetup").arg("-d").arg(&device))?;
    let (_, other, _) = attach("living")?;
    command::run(command::ploopfs(&["detach"]).arg(&dead))?;
    let name = other.file_name().context("no name")?;
    let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
    let is_attached = backing.exists();
    command::run(command::ploopfs(&["detach"]).arg(&other))?.expect_code(0)?;
    ensure!(is_attached, "the other image was detached");
    Ok(())
}

fn detach_after_death() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("dead.hds");
    ImageSpec::new(2, 2048, 1 << 16).write(&path)?;
    let pid_file = dir.path().join("pid");
    let mut attach = command::ploopfs(&["attach", "--pid-file"]);
    let said = command::ok(attach.arg(&pid_file).arg(&path))?;
    let pid: i32 = fs::read_to_string(&pid_file)?.trim().parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
    // The kernel knows the file's attributes for a while; after that, looking at it fails.
    std::thread::sleep(Duration::from_secs(3));
    let done = command::run(command::ploopfs(&["detach"]).arg(&path))?;
    let name = said.trim().trim_start_matches("/dev/");
    let shown = fs::read(format!("/sys/block/{name}/loop/backing_file"));
    let stays = shown.is_ok_and(|shown| shown.starts_with(b"/dead.hds"));
    if stays {
        command::run(command::new("losetup").arg("-d").arg(said.trim()))?;
    }
    ensure!(!stays, "{name} still has the file: {}", done.story());
    done.expect_code(1)?.expect_words(&["died"])?;
    Ok(())
}

fn list_shows_mounts() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path())?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    let listed = command::ok(&mut command::ploopfs(&["list"]))?;
    ensure!(listed.contains(text(mounted.path())), "{listed}");
    let listed = command::ok(&mut command::ploopfs(&["list", "--json"]))?;
    let json: serde_json::Value = serde_json::from_str(&listed)?;
    ensure!(json.to_string().contains(text(mounted.path())), "{json}");
    mounted.umount()?;
    let listed = command::ok(&mut command::ploopfs(&["list"]))?;
    ensure!(!listed.contains(text(&path)), "{listed}");
    Ok(())
}

fn foreground_stays() -> Outcome {
    let dir = scratch()?;
    let (spec, path) = image(dir.path())?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let mut command = command::ploopfs(&["mount", "-f"]);
    let mut child = command.arg(&path).arg(&at).spawn()?;
    let look = command::eventually(Duration::from_secs(10), || {
        ensure!(is_mounted(&at), "nothing is mounted");
        expect_flat(&at.join("disk.img"), &Model::of(&spec))
    });
    let running = child.try_wait()?.is_none();
    let over = command::run(command::ploopfs(&["umount"]).arg(&at));
    let ended = command::eventually(Duration::from_secs(10), || {
        child
            .try_wait()?
            .context("the foreground program is still there")
    });
    if ended.is_err() {
        let _ = command::run(command::new("umount").args(["-i", "-l"]).arg(&at));
        let _ = child.kill();
        let _ = child.wait();
    }
    look?;
    ensure!(running, "mount -f did not stay");
    over?.expect_code(0)?;
    ensure!(ended?.success(), "mount -f ended with a failure");
    support::expect_clean(&path)
}
