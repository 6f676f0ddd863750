//! Hosts with several users: what a mount lets others see and do, and where a user may mount.

use crate::answer::expect_calm;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::{Mounted, text};
use crate::support::harness::{skip, skip_excused, trial};
use crate::support::probe::Need::{Fuse, Root};
use crate::support::{Outcome, PLOOPFS, command, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "mounts_are_their_users_alone",
            &[Fuse],
            mounts_are_their_users_alone,
        ),
        trial(
            "options_cannot_let_devices_in",
            &[Fuse],
            options_cannot_let_devices_in,
        ),
        trial("others_see_nothing", &[Fuse, Root], others_see_nothing),
        trial(
            "others_see_what_the_modes_allow",
            &[Fuse, Root],
            others_see_what_is_allowed,
        ),
        trial(
            "users_mount_where_they_may_write",
            &[Root],
            users_mount_where_they_may_write,
        ),
        trial(
            "users_mount_on_places_of_their_own",
            &[Fuse, Root],
            users_mount_on_places_of_their_own,
        ),
    ]
}

fn image(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("a.hds");
    ImageSpec::new(2, 64, 6403)
        .mapping(Mapped::Percent(40))
        .write(&path)?;
    Ok(path)
}

/// Options of a mount in a table: those of the place, and those of the file system.
fn options_in(table: &str, at: &Path) -> Result<(Vec<String>, Vec<String>)> {
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(4) == at.to_str())
        .context("not in the table")?;
    let (place, rest) = line.split_once(" - ").context("an odd line")?;
    let words = |text: Option<&str>| -> Vec<String> {
        text.unwrap_or_default()
            .split(',')
            .map(str::to_owned)
            .collect()
    };
    Ok((
        words(place.split(' ').nth(5)),
        words(rest.split(' ').nth(2)),
    ))
}

fn expect_safe(at: &Path, others: bool) -> Outcome {
    expect_safe_in(&fs::read_to_string("/proc/self/mountinfo")?, at, others)
}

fn expect_safe_in(table: &str, at: &Path, others: bool) -> Outcome {
    let (place, system) = options_in(table, at)?;
    for word in ["nosuid", "nodev"] {
        ensure!(
            place.iter().any(|option| option == word),
            "no {word}: {place:?}"
        );
    }
    ensure!(
        system.iter().any(|o| o == "default_permissions"),
        "{system:?}"
    );
    ensure!(
        system.iter().any(|o| o == "allow_other") == others,
        "{system:?}"
    );
    Ok(())
}

fn mode_of(path: &Path) -> Result<u32> {
    Ok(fs::symlink_metadata(path)?.mode() & 0o7777)
}

fn mounts_are_their_users_alone() -> Outcome {
    let dir = scratch()?;
    let path = image(dir.path())?;
    for (options, file) in [(&[][..], 0o600), (&["-r"], 0o400)] {
        let mounted = Mounted::new(dir.path(), &path, options)?;
        expect_safe(mounted.path(), false)?;
        let own = (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        );
        let names = [
            ("", 0o700),
            ("disk.img", file),
            ("info.json", 0o400),
            ("stats.json", 0o400),
        ];
        for (name, mode) in names.into_iter().chain([("snapshots", 0o700)]) {
            let found = mounted.path().join(name);
            ensure!(mode_of(&found)? == mode, "{name}: {:o}", mode_of(&found)?);
            let meta = fs::metadata(&found)?;
            ensure!(
                (meta.uid(), meta.gid()) == own,
                "{name} belongs to {}",
                meta.uid()
            );
        }
        mounted.umount()?;
    }
    // Over a file.
    let at = dir.path().join("flat");
    fs::write(&at, "")?;
    let mounted = Mounted::at(&at, &path, &[])?;
    expect_safe(&at, false)?;
    ensure!(mode_of(&at)? == 0o600, "{:o}", mode_of(&at)?);
    mounted.umount()
}

fn options_cannot_let_devices_in() -> Outcome {
    let dir = scratch()?;
    let path = image(dir.path())?;
    let mounted = Mounted::new(dir.path(), &path, &["-o", "dev,suid,exec,rw"])?;
    expect_safe(mounted.path(), false)?;
    // A file system of ours has no way to be given a device or a set-user-id bit.
    let disk = mounted.disk();
    let device = nix::sys::stat::mknod(
        &mounted.path().join("zero"),
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::S_IRUSR,
        nix::sys::stat::makedev(1, 5),
    );
    ensure!(device.is_err(), "a device was made");
    let suid = fs::set_permissions(&disk, fs::Permissions::from_mode(0o4755));
    ensure!(suid.is_err() && mode_of(&disk)? == 0o600, "a mode was set");
    mounted.umount()
}

/// A command of a user who is nobody.
fn as_nobody(program: &str, args: &[&str]) -> Result<command::Finished> {
    let mut line = vec![
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--",
        program,
    ];
    line.extend(args);
    command::run(command::new("setpriv").args(line).current_dir("/"))
}

fn others_see_nothing() -> Outcome {
    let dir = scratch()?;
    open_up(dir.path())?;
    let path = image(dir.path())?;
    let mounted = Mounted::new(dir.path(), &path, &[])?;
    for name in ["", "disk.img", "info.json"] {
        let target = mounted.path().join(name);
        let done = as_nobody("stat", &[text(&target)])?;
        ensure!(done.code() != 0, "{}", done.story());
        done.expect_words(&["permission denied"])?;
    }
    mounted.umount()
}

fn others_see_what_is_allowed() -> Outcome {
    let dir = scratch()?;
    open_up(dir.path())?;
    let path = image(dir.path())?;
    // Let in, they meet the modes: still the user's alone.
    let mounted = Mounted::new(dir.path(), &path, &["-o", "allow_other"])?;
    expect_safe(mounted.path(), true)?;
    let disk = mounted.disk();
    as_nobody("cat", &[text(&disk)])?.expect_words(&["permission denied"])?;
    mounted.umount()?;
    let mounted = Mounted::new(dir.path(), &path, &["-o", "allow_other,umask=022"])?;
    let disk = mounted.disk();
    let done = as_nobody("cat", &[text(&disk)])?;
    ensure!(
        done.code() == 0 && done.stdout.len() == 6403 * 512,
        "{}",
        done.story()
    );
    let script = "echo x 1<> \"$1\"";
    as_nobody("sh", &["-c", script, "sh", text(&disk)])?.expect_words(&["permission denied"])?;
    mounted.umount()
}

/// Makes the directories down to here passable for everybody, as far as they are ours.
fn open_up(path: &Path) -> Outcome {
    let root = crate::support::harness::root();
    for place in path
        .ancestors()
        .take_while(|place| place.starts_with(&root))
    {
        fs::set_permissions(place, fs::Permissions::from_mode(0o755))?;
    }
    let done = as_nobody("stat", &[text(path)]);
    match done {
        Ok(done) if done.code() == 0 => Ok(()),
        Ok(done) => Err(skip_excused(format!(
            "another user cannot look here: {}",
            done.stderr
        ))),
        Err(error) => Err(skip(format!("nobody else can be tried: {error}"))),
    }
}

fn users_mount_where_they_may_write() -> Outcome {
    let dir = scratch()?;
    open_up(dir.path())?;
    // A copy of the program where the user may run it.
    let program = dir.path().join("ploopfs");
    fs::copy(PLOOPFS, &program)?;
    let path = image(dir.path())?;
    chown(&path, Some(65534), Some(65534))?;
    let places = dir.path().join("places");
    fs::create_dir(&places)?;
    let place = |name: &str, mode, own: bool, is_file| -> Result<PathBuf> {
        let at = places.join(name);
        if is_file {
            fs::write(&at, "")?;
        } else {
            fs::create_dir(&at)?;
        }
        fs::set_permissions(&at, fs::Permissions::from_mode(mode))?;
        if own {
            chown(&at, Some(65534), Some(65534))?;
        }
        Ok(at)
    };
    for at in [
        place("roots-directory", 0o755, false, false)?,
        place("roots-file", 0o644, false, true)?,
        place("everybodys-directory", 0o1777, false, false)?,
        place("own-but-locked", 0o555, true, false)?,
    ] {
        let done = as_nobody(text(&program), &["mount", text(&path), text(&at)])?;
        expect_calm(&done)?;
        ensure!(
            !crate::support::guards::is_mounted(&at),
            "mounted: {}",
            done.story()
        );
        let done = done.expect_code(1)?;
        done.expect_words(&["cannot use the mountpoint", "you may not write there"])?;
    }
    Ok(())
}

/// The user of the test, with a device that is open to all, in a namespace of its own: hosts differ
/// in whom they let have theirs.
const AS_USER: &str = r#"
    if ! mknod -m 666 "$4" c 10 229 || ! mount --bind "$4" /dev/fuse; then
        echo "no device of one's own" >&2
        exit 77
    fi
    as() { setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"; }
    as "$1" mount "$2" "$3"
    cat /proc/self/mountinfo
    as "$1" umount "$3" || { umount -l "$3"; exit 1; }
"#;

fn users_mount_on_places_of_their_own() -> Outcome {
    let dir = scratch()?;
    open_up(dir.path())?;
    let program = dir.path().join("ploopfs");
    fs::copy(PLOOPFS, &program)?;
    let path = image(dir.path())?;
    chown(&path, Some(65534), Some(65534))?;
    for (name, is_file) in [("own", false), ("own-file", true)] {
        let at = dir.path().join(name);
        if is_file {
            fs::write(&at, "")?;
        } else {
            fs::create_dir(&at)?;
        }
        chown(&at, Some(65534), Some(65534))?;
        let device = dir.path().join(format!("{name}.fuse"));
        let mut apart = command::new("unshare");
        apart
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                AS_USER,
                "sh",
            ])
            .args([&program, &path, &at, &device]);
        let done = command::run(&mut apart)?;
        expect_calm(&done)?;
        if done.code() == 77 || done.stderr.contains("unshare failed") {
            return Err(skip(done.stderr));
        }
        let done = done.expect_code(0)?;
        expect_safe_in(&done.text(), &at, false).with_context(|| done.story())?;
    }
    Ok(())
}
