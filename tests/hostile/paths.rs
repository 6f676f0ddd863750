//! Names that lead elsewhere: to devices, through links, out of the bundle, or nowhere.

use crate::answer::{expect_calm, expect_unchanged, opens, opens_with, room, selection, state};
use crate::descriptors::{broken, chain, edit};
use crate::forge::bundle::BundleSpec;
use crate::forge::image::ImageSpec;
use crate::support::guards::{is_mounted, text};
use crate::support::harness::{skip, trial};
use crate::support::probe::Need::{Root, Strace};
use crate::support::{Outcome, PLOOPFS, command, scratch};
use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use ploopfs::chain::bundle::Selection;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "named_images_are_plain_files",
            &[],
            named_images_are_plain_files,
        ),
        trial(
            "named_devices_are_refused",
            &[Root],
            named_devices_are_refused,
        ),
        trial("files_of_a_bundle_are_plain_files", &[], files_of_a_bundle),
        trial(
            "devices_in_a_bundle_are_refused",
            &[Root],
            devices_in_a_bundle,
        ),
        trial(
            "descriptors_are_plain_files",
            &[],
            descriptors_are_plain_files,
        ),
        trial(
            "helps_beside_a_bundle_are_plain_files",
            &[],
            helps_are_plain_files,
        ),
        trial(
            "lock_files_are_plain_files",
            &[],
            lock_files_are_plain_files,
        ),
        trial("a_linked_bundle_is_its_users_choice", &[], a_linked_bundle),
        trial("machines_name_no_links", &[], machines_name_no_links),
        trial(
            "links_lead_where_it_is_allowed",
            &[],
            links_lead_where_allowed,
        ),
        trial("names_paint_and_forge_nothing", &[], names_paint_nothing),
        trial("nothing_else_is_opened", &[Strace], nothing_else_is_opened),
    ]
}

/// Makes something odd at a place.
type Make = fn(&Path) -> Outcome;

/// Longest that a refusal may take; what hangs takes for ever.
const LIMIT: Duration = Duration::from_secs(30);

/// Makes a system call that old kernels lack fail as it does there, in a program that is started.
#[allow(unsafe_code)]
fn without_openat2(command: &mut Command) -> &mut Command {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const FAIL: u32 = 0x0005_0000;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = u32::try_from(libc::SYS_openat2).unwrap_or(u32::MAX);
    let lacking = FAIL | u32::try_from(libc::ENOSYS).unwrap_or(0);
    let steps = [
        step(LOAD, 0, 0, 0),
        step(JUMP_IF_EQUAL, 0, 1, number),
        step(RETURN, 0, 0, lacking),
        step(RETURN, 0, 0, ALLOW),
    ];
    let install = move || {
        let mut steps = steps;
        let program = libc::sock_fprog {
            len: 4,
            filter: steps.as_mut_ptr(),
        };
        // SAFETY: plain numbers, and a pointer to a filter that lives until the call returns.
        let set = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) == 0
        };
        if set {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: between fork and exec it makes two system calls and touches no memory of others.
    unsafe { command.pre_exec(install) }
}

/// Runs the program as the kernel is and as if it lacked `openat2`; nothing may be mounted, hang,
/// panic or change. Returns what was said by each run.
fn attempts(home: &Path, args: &[&str]) -> Result<Vec<command::Finished>> {
    let before = state(home)?;
    let mut all = Vec::new();
    for lacking in [false, true] {
        let mut command = command::ploopfs(args);
        if lacking {
            without_openat2(&mut command);
        }
        let done = command::run_within(&mut command, LIMIT)?;
        expect_calm(&done)?;
        if let Some(at) = args.iter().find(|arg| is_mounted(Path::new(arg))) {
            command::ok(&mut command::ploopfs(&["umount", at]))?;
            bail!("was mounted: {}", done.story());
        }
        expect_unchanged(home, &before).with_context(|| done.story())?;
        all.push(done);
    }
    Ok(all)
}

/// An image that cannot be mounted, in either way; each answer holds all the words.
fn no_mount(home: &Path, image: &Path, words: &[&str]) -> Outcome {
    let at = home.join("mnt");
    if !at.exists() {
        fs::create_dir(&at)?;
    }
    for options in [&["-r"][..], &[]] {
        let args = [&["mount"], options, &["--", text(image), text(&at)]].concat();
        for done in attempts(home, &args)? {
            let done = done.expect_code(1)?.expect_words(words)?;
            // Of what the host refused only the host can say so.
            if !done.stderr.contains("the host refused") {
                done.expect_words(&["nothing was changed"])?;
            }
        }
    }
    // A look goes as far as it can, and says what it met.
    for done in attempts(home, &["info", "--", text(image)])? {
        let all = format!("{}{}", done.text(), done.stderr);
        ensure!(!all.is_empty(), "info says nothing");
    }
    Ok(())
}

fn fifo(path: &Path) -> Outcome {
    Ok(nix::unistd::mkfifo(path, Mode::S_IRWXU)?)
}

fn device(path: &Path, kind: SFlag, major: u64, minor: u64) -> Outcome {
    mknod(path, kind, Mode::S_IRWXU, makedev(major, minor)).map_err(|errno| {
        skip(format!(
            "no device can be made in {}: {errno}",
            path.display()
        ))
    })
}

fn named_images_are_plain_files() -> Outcome {
    let dir = room()?;
    let home = dir.path();
    fifo(&home.join("fifo.hds"))?;
    fifo(&home.join("fifo.xml"))?;
    let _socket = UnixListener::bind(home.join("socket.hds"))?;
    symlink("nowhere", home.join("dangling.hds"))?;
    symlink("loop.hds", home.join("loop.hds"))?;
    for (name, words) in [
        ("fifo.hds", "an image must be a plain file"),
        ("fifo.xml", "must be plain files"),
        ("socket.hds", "an image must be a plain file"),
        ("dangling.hds", "missing"),
        ("loop.hds", "Too many levels of symbolic links"),
    ] {
        no_mount(home, &home.join(name), &[words]).with_context(|| name.to_string())?;
    }
    for path in [
        "/dev/null",
        "/dev/zero",
        "/dev/tty",
        "/proc/self/fd/0",
        "/proc/self/mem",
    ] {
        let at = home.join("mnt");
        for verb in [&["mount", "-r"][..], &["mount"], &["info"]] {
            let mut args = [verb, &[path]].concat();
            args.extend((verb[0] == "mount").then(|| text(&at)));
            for done in attempts(home, &args)? {
                ensure!(verb[0] == "info" || done.code() == 1, "{}", done.story());
            }
        }
    }
    Ok(())
}

fn named_devices_are_refused() -> Outcome {
    let dir = scratch()?;
    let home = dir.path();
    device(&home.join("char.hds"), SFlag::S_IFCHR, 1, 5)?;
    device(&home.join("block.hds"), SFlag::S_IFBLK, 7, 200)?;
    no_mount(
        home,
        &home.join("char.hds"),
        &["an image must be a plain file"],
    )?;
    // Whether the host has the device at all is its own matter.
    no_mount(home, &home.join("block.hds"), &["ploopfs: cannot mount"])
}

/// A bundle whose base has this name in the descriptor.
fn naming(dir: &Path, spec: &BundleSpec, name: &str) -> Result<PathBuf> {
    let path = broken(dir, spec, &[])?;
    let old = spec.file_name("d.hdd", 0, 0);
    edit(&path, |xml| {
        xml.replacen(&format!("<File>{old}<"), &format!("<File>{name}<"), 1)
    })?;
    Ok(path)
}

fn files_of_a_bundle() -> Outcome {
    let dir = room()?;
    // Each name with the words of the answer.
    let names = [
        ("fifo", "plain files"),
        ("socket", "plain files"),
        ("sub", "plain files"),
        (".", "plain files"),
        ("sub/..", "plain files"),
        ("to-fifo", "plain files"),
        ("to-zero", "is not in the bundle's directory"),
        ("to-proc", "a file"),
        ("to-root/etc/passwd", "is not in the bundle's directory"),
        ("/dev/zero", "is not in the bundle's directory"),
        ("/etc/passwd", "is not in the bundle's directory"),
        ("/proc/self/mem", "is not in the bundle's directory"),
        (
            "/proc/self/root/etc/passwd",
            "is not in the bundle's directory",
        ),
        ("/proc/1/environ", "is not in the bundle's directory"),
        (
            "../../../../../../../../../../etc/passwd",
            "is not in the bundle's directory",
        ),
        ("file/below", "missing"),
        ("self", "symbolic links"),
        ("none", "missing"),
    ];
    let spec = chain(2);
    for (name, words) in names {
        let path = naming(dir.path(), &spec, name)?;
        fifo(&path.join("fifo"))?;
        let _socket = UnixListener::bind(path.join("socket")).context("a socket")?;
        fs::create_dir(path.join("sub"))?;
        fs::write(path.join("file"), "x")?;
        symlink("fifo", path.join("to-fifo"))?;
        symlink("/dev/zero", path.join("to-zero"))?;
        symlink("/proc/self/fd/0", path.join("to-proc"))?;
        symlink("/", path.join("to-root"))?;
        symlink("self", path.join("self"))?;
        let home = path.parent().context("a home")?;
        no_mount(home, &path, &[words]).with_context(|| name.to_string())?;
    }
    Ok(())
}

fn devices_in_a_bundle() -> Outcome {
    let dir = scratch()?;
    for (kind, major, minor) in [(SFlag::S_IFCHR, 1, 5), (SFlag::S_IFBLK, 7, 0)] {
        let path = naming(dir.path(), &chain(2), "device")?;
        device(&path.join("device"), kind, major, minor)?;
        no_mount(
            path.parent().context("a home")?,
            &path,
            &["ploopfs: cannot mount"],
        )?;
    }
    Ok(())
}

fn descriptors_are_plain_files() -> Outcome {
    let dir = room()?;
    let spec = chain(2);
    let makes: [(&str, Make, &str); 5] = [
        ("a FIFO", fifo, "plain files"),
        (
            "a directory",
            |path| Ok(fs::create_dir(path)?),
            "plain files",
        ),
        (
            "a link out",
            |path| Ok(symlink("/etc/passwd", path)?),
            "is not in the bundle's directory",
        ),
        (
            "a link nowhere",
            |path| Ok(symlink("none", path)?),
            "missing",
        ),
        (
            "an endless link",
            |path| Ok(symlink("/dev/zero", path)?),
            "is not in the bundle's directory",
        ),
    ];
    for (what, make, words) in makes {
        let path = broken(dir.path(), &spec, &[])?;
        let descriptor = path.join("DiskDescriptor.xml");
        fs::remove_file(&descriptor)?;
        make(&descriptor)?;
        let home = path.parent().context("a home")?;
        no_mount(home, &path, &[words]).with_context(|| what.to_string())?;
    }
    // A link within the bundle is a name like any other.
    let path = broken(dir.path(), &spec, &[])?;
    fs::rename(path.join("DiskDescriptor.xml"), path.join("real.xml"))?;
    symlink("real.xml", path.join("DiskDescriptor.xml"))?;
    opens(&path, true)?.shows(&spec.model())?.unchanged()
}

/// What only helps must neither hang nor matter.
fn helps_are_plain_files() -> Outcome {
    let dir = room()?;
    let spec = chain(2);
    let path = broken(dir.path(), &spec, &[])?;
    let home = path.parent().context("a home")?;
    fifo(&home.join("Snapshots.xml"))?;
    fifo(&path.join("DiskDescriptor.xml.tmp"))?;
    opens(&path, false)?
        .tells(&[".tmp is there"])?
        .shows(&spec.model())?
        .unchanged()?;
    for done in attempts(home, &["info", text(&path)])? {
        done.expect_code(0)?;
    }
    // Beside an image that was named by itself.
    let image = home.join("a.hds");
    ImageSpec::new(2, 64, 640).write(&image)?;
    fifo(&home.join("DiskDescriptor.xml"))?;
    opens(&image, true)?.tells_nothing()?.unchanged()
}

fn lock_files_are_plain_files() -> Outcome {
    let dir = room()?;
    let spec = chain(2);
    let makes: [(&str, Make); 4] = [
        ("a FIFO", fifo),
        ("a directory", |path| Ok(fs::create_dir(path)?)),
        ("a link", |path| Ok(symlink("../precious", path)?)),
        ("a link nowhere", |path| Ok(symlink("../made", path)?)),
    ];
    for (what, make) in makes {
        let path = broken(dir.path(), &spec, &[])?;
        let home = path.parent().context("a home")?;
        fs::write(home.join("precious"), "x")?;
        make(&path.join("DiskDescriptor.xml.lck"))?;
        let at = home.join("mnt");
        fs::create_dir(&at)?;
        for done in attempts(home, &["mount", text(&path), text(&at)])? {
            let done = done.expect_code(1).with_context(|| what.to_string())?;
            done.expect_words(&["lock file is not a plain file", "DiskDescriptor.xml.lck"])?;
        }
        ensure!(!home.join("made").exists(), "made a file through a link");
        // Those who only read take no lock there.
        opens(&path, false)?.shows(&spec.model())?.unchanged()?;
    }
    Ok(())
}

fn a_linked_bundle() -> Outcome {
    let dir = room()?;
    let spec = chain(3);
    let path = broken(dir.path(), &spec, &[])?;
    let links = dir.path().join("links");
    fs::create_dir(&links)?;
    symlink(&path, links.join("bundle.hdd"))?;
    symlink(path.parent().context("a home")?, links.join("home"))?;
    for name in ["bundle.hdd", "home/d.hdd", "bundle.hdd/DiskDescriptor.xml"] {
        for write in [false, true] {
            let opened = opens(&links.join(name), write).with_context(|| name.to_string())?;
            opened.tells_nothing()?.shows(&spec.model())?.unchanged()?;
        }
    }
    // Locks are on what it is, whatever it is called.
    let opened = opens(&path, true)?;
    for name in ["bundle.hdd", "home/d.hdd/DiskDescriptor.xml"] {
        let second = opens_with(&links.join(name), &selection(true)).err();
        let said = format!("{:#}", second.context("opened twice")?);
        ensure!(said.contains("locked"), "{said}");
    }
    opened.unchanged()
}

fn machines_name_no_links() -> Outcome {
    let dir = room()?;
    let spec = chain(1);
    let real = broken(dir.path(), &spec, &[])?;
    let image = dir.path().join("old.hdd");
    ImageSpec::new(1, 64, 640).write(&image)?;
    for target in [&real, &image] {
        let machine = dir.path().join("m.pvm");
        fs::create_dir(&machine)?;
        symlink(target, machine.join("one.hdd"))?;
        no_mount(dir.path(), &machine, &["symbolic link", "name"])?;
        fs::remove_dir_all(&machine)?;
    }
    // A FIFO of that name, and one in a bundle of that name.
    let machine = dir.path().join("m.pvm");
    fs::create_dir(&machine)?;
    fifo(&machine.join("one.hdd"))?;
    no_mount(dir.path(), &machine, &["plain files"])?;
    fs::remove_file(machine.join("one.hdd"))?;
    spec.write(&machine.join("one.hdd"))?;
    opens(&machine, true)?
        .tells_nothing()?
        .shows(&spec.model())?
        .unchanged()
}

fn links_lead_where_allowed() -> Outcome {
    let dir = room()?;
    let spec = chain(2);
    let path = broken(dir.path(), &spec, &["x-file-symlink"])?;
    let home = path.parent().context("a home")?;
    let base = spec.file_name("d.hdd", 0, 0);
    let store = home.join("store");
    fs::create_dir(&store)?;
    fs::rename(home.join(format!("out-{base}")), store.join("base"))?;
    let relink = |target: &Path| -> Outcome {
        fs::remove_file(path.join(&base))?;
        Ok(symlink(target, path.join(&base))?)
    };
    let with = |allowed: &Path| Selection {
        allow_outside: vec![allowed.to_owned()],
        ..selection(true)
    };
    // Directly, by another link beside it, and by a link to the allowed directory itself.
    symlink("store", home.join("shop"))?;
    for (target, allowed) in [
        (store.join("base"), store.clone()),
        (PathBuf::from("../store/base"), store.clone()),
        (home.join("shop/base"), store.clone()),
        (store.join("base"), home.join("shop")),
    ] {
        relink(&target)?;
        let story = || format!("{} with {}", target.display(), allowed.display());
        let opened = opens_with(&path, &with(&allowed)).with_context(story)?;
        opened.shows(&spec.model())?.unchanged()?;
    }
    // Through the allowed directory and out of it again.
    fs::write(home.join("secret"), vec![b's'; 9000])?;
    symlink("../secret", store.join("leak"))?;
    for target in [
        store.join("leak"),
        store.join("../secret"),
        home.join("secret"),
    ] {
        relink(&target)?;
        let error = opens_with(&path, &with(&store)).err().context("led out")?;
        ensure!(
            format!("{error:#}").contains("secret is not in"),
            "{error:#}"
        );
    }
    // A directory that shares the beginning of its name is another one.
    relink(&home.join("secret"))?;
    let error = opens_with(&path, &with(&path)).err().context("led out")?;
    ensure!(
        format!("{error:#}").contains("secret is not in"),
        "{error:#}"
    );
    Ok(())
}

/// A name is a name: it makes no line of a message, and does nothing to a terminal.
fn names_paint_nothing() -> Outcome {
    let dir = room()?;
    let spec = chain(2);
    let forged = "  data: all was saved";
    // What XML allows in a text: line breaks, tabs, and controls from U+0080 on.
    let name = format!("x\n{forged}\nploopfs: warning: gone\u{9b}31m\u{85}\u{202e}y.hds");
    let path = naming(dir.path(), &spec, &name)?;
    let home = path.parent().context("a home")?;
    let at = home.join("mnt");
    fs::create_dir(&at)?;
    let expect_plain = |done: &command::Finished| -> Outcome {
        let all = format!("{}{}", done.text(), done.stderr);
        ensure!(
            all.contains("all was saved"),
            "the name is not shown: {}",
            done.story()
        );
        ensure!(
            !all.contains(['\u{9b}', '\u{85}', '\u{202e}', '\t']),
            "{}",
            done.story()
        );
        let lines = all.lines().map(str::trim_start);
        let mut made = lines.filter(|line| {
            line.starts_with("data: all") || line.starts_with("ploopfs: warning: gone")
        });
        ensure!(
            made.next().is_none(),
            "a name made a line: {}",
            done.story()
        );
        Ok(())
    };
    // Missing; then there, and called something that it is not; then one that is in use.
    for done in attempts(home, &["mount", "-r", text(&path), text(&at)])? {
        expect_plain(&done)?;
    }
    fs::write(path.join(&name), vec![0; 9000])?;
    for done in attempts(home, &["mount", "-r", text(&path), text(&at)])? {
        expect_plain(&done)?;
    }
    for done in attempts(home, &["info", text(&path)])? {
        expect_plain(&done)?;
    }
    Ok(())
}

/// The proof from outside: no file is opened that is neither of the bundle nor of the host's own.
fn nothing_else_is_opened() -> Outcome {
    let dir = room()?;
    let spec = chain(2);
    for name in ["../secret", "/etc/shadow", "link", "linked/secret"] {
        let path = naming(dir.path(), &spec, name)?;
        let home = fs::canonicalize(path.parent().context("a home")?)?;
        fs::write(home.join("secret"), "x")?;
        symlink("../secret", path.join("link"))?;
        symlink("..", path.join("linked"))?;
        let log = home.join("trace");
        let at = home.join("mnt");
        fs::create_dir(&at)?;
        let calls = "trace=open,openat,openat2,creat,open_by_handle_at";
        for verb in [&["mount", "-r"][..], &["mount"], &["info"]] {
            let mut traced = command::new("strace");
            traced
                .args(["-f", "-qq", "-e", calls, "-o", text(&log), PLOOPFS])
                .args(verb);
            traced.arg(&path);
            if verb[0] == "mount" {
                traced.arg(&at);
            }
            let done = command::run_within(&mut traced, LIMIT)?;
            if done.stderr.contains("ptrace") {
                return Err(skip("strace may not trace here"));
            }
            for line in fs::read_to_string(&log)?.lines() {
                let is_open = !line.contains(" = -1 ");
                let is_secret = line.contains("secret") || line.contains("shadow");
                ensure!(!(is_open && is_secret), "{name}: opened: {line}");
            }
        }
    }
    Ok(())
}
