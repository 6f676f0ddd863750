//! Copies of whole disks: every byte, every snapshot, every hole.

use crate::convert::{convert, disks, expect};
use crate::ends::Small;
use crate::forge::bundle::{BundleSpec, Style, TOP};
use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Mapped};
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, scratch};
use crate::systems::{names, run_examples};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("copies_are_the_same_in_every_byte", &[], every_byte),
        trial("holes_stay_holes", &[], holes),
        trial("new_guids_are_new_and_fit_together", &[], new_guids),
        trial("refused_copies_touch_nothing", &[], refusals),
        trial("every_image_is_locked_and_looked_at", &[], every_image),
        trial("names_of_snapshots_are_not_lost", &[], names_kept),
        trial("a_descriptor_of_another_name", &[], another_name),
        trial("masks_and_long_names_are_no_reason_to_fail", &[], odd_hosts),
        trial("failed_copies_leave_nothing", &[Need::Root], failures),
        trial("examples_of_copy_run", &[], examples),
    ]
}

fn copy(source: &Path, target: &Path, args: &[&str]) -> Outcome {
    let mut line = command::ploopfs(&["copy", "-q"]);
    command::ok(line.args(args).arg(source).arg(target)).map(|_| ())
}

/// The names in a bundle with their bytes; the empty file of its own name has a common one.
fn content(disk: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    if disk.is_file() {
        return Ok(vec![(String::new(), fs::read(disk)?)]);
    }
    let own = disk
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let mut found = Vec::new();
    for name in names(disk)? {
        let bytes = fs::read(disk.join(&name))?;
        let is_own = Some(&name) == own.as_ref();
        found.push((if is_own { "own".to_owned() } else { name }, bytes));
    }
    found.sort();
    Ok(found)
}

fn every_byte() -> Outcome {
    let dir = scratch()?;
    let made = disks(dir.path())?;
    let before = support::fingerprint(dir.path())?;
    let out = scratch()?;
    let elsewhere = scratch()?;
    for (source, model) in &made {
        let name = source.file_name().context("a name")?;
        let target = out.path().join(format!("copy-{}", name.to_string_lossy()));
        copy(source, &target, &[])?;
        ensure!(
            content(source)? == content(&target)?,
            "{}",
            target.display()
        );
        expect(&target, model)?;
        let mut line = command::ploopfs(&["copy", "--to"]);
        command::ok(line.arg(elsewhere.path()).arg(source))?;
        let target = elsewhere.path().join(name);
        ensure!(
            content(source)? == content(&target)?,
            "{}",
            target.display()
        );
    }
    ensure!(names(out.path())?.len() == made.len());
    ensure!(
        support::fingerprint(dir.path())? == before,
        "a source was changed"
    );
    Ok(())
}

fn holes() -> Outcome {
    let dir = scratch()?;
    let disk = |name: &str| dir.path().join(name);
    let mut create = command::ploopfs(&["create", "-q", "-s", "20G", "-f", "plain"]);
    command::ok(create.args(["--mkfs", "ext4"]).arg(disk("a.hdd")))?;
    copy(&disk("a.hdd"), &disk("b.hdd"), &[])?;
    let of = |name: &str| support::host_bytes(&disk(name).join("root.hds"));
    let (old, new) = (of("a.hdd")?, of("b.hdd")?);
    ensure!(new <= old + (1 << 20), "{new} bytes of {old}");
    let mut line = command::ploopfs(&["compare", "-q"]);
    command::ok(line.arg(disk("a.hdd")).arg(disk("b.hdd"))).map(|_| ())
}

/// The GUIDs of the frozen snapshots, oldest first.
fn guids(disk: &Path) -> Result<Vec<String>> {
    let said = command::ok(command::ploopfs(&["info", "--json"]).arg(disk))?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let snapshots = said["snapshots"].as_array().context("snapshots")?;
    let guid = |one: &serde_json::Value| one["guid"].as_str().map(str::to_owned);
    Ok(snapshots.iter().filter_map(guid).collect())
}

/// Snapshots keep the names that people gave them.
fn called_as_before() -> Outcome {
    let dir = scratch()?;
    let disk = |name: &str| dir.path().join(name);
    let mut create = command::ploopfs(&["create", "-q", "-s", "10M"]);
    command::ok(create.arg(disk("a.hdd")))?;
    let mut snapshot = command::ploopfs(&["snapshot", "create", "--name", "before"]);
    command::ok(snapshot.arg(disk("a.hdd")))?;
    for (name, args) in [("b.hdd", &[][..]), ("c.hdd", &["--new-guids"][..])] {
        copy(&disk("a.hdd"), &disk(name), args)?;
        let mut back = command::ploopfs(&["snapshot", "switch", "--yes"]);
        command::ok(back.arg(disk(name)).arg("before")).context(name)?;
    }
    Ok(())
}

fn new_guids() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 64 * 200).mapping(Mapped::Percent(40));
    for style in [Style::Ploop, Style::Parallels] {
        let bundle = BundleSpec::chain(style, &like, 3, |_, _| {});
        let at = |name: &str| dir.path().join(format!("{name}{}.hdd", style as u8));
        let (source, target) = (at("old"), at("new"));
        bundle.write(&source)?;
        copy(&source, &target, &["--new-guids"])?;
        let (old, new) = (guids(&source)?, guids(&target)?);
        ensure!(old.len() == new.len() && new.len() >= 2, "{new:?}");
        let frozen = old.iter().zip(&new).filter(|(old, _)| *old != TOP);
        ensure!(frozen.clone().all(|(old, new)| old != new), "{new:?}");
        for (level, (_, guid)) in frozen.take(2).enumerate() {
            let flat = at(&format!("flat{level}")).with_extension("raw");
            convert(&target, &flat, &["--snapshot", guid])?;
            expect(&flat, &bundle.model().frozen(level + 1)).with_context(|| guid.clone())?;
        }
        expect(&target, &bundle.model())?;
    }
    called_as_before()?;
    let (source, target) = (dir.path().join("d.hdd"), dir.path().join("e.hdd"));
    let mut create = command::ploopfs(&["create", "-q", "-s", "10M"]);
    command::ok(create.args(["--for", "parallels-desktop"]).arg(&source))?;
    copy(&source, &target, &["--new-guids"])?;
    let read = |disk: &PathBuf| fs::read_to_string(disk.join("DiskDescriptor.xml"));
    let (old, new) = (read(&source)?, read(&target)?);
    let different: Vec<_> = old
        .lines()
        .zip(new.lines())
        .filter(|(a, b)| a != b)
        .collect();
    ensure!(
        different.len() == 1 && different[0].1.contains("<UID>"),
        "{different:?}"
    );
    ensure!(target.join("e.hdd").exists() && !target.join("d.hdd").exists());
    Ok(())
}

fn refusals() -> Outcome {
    let dir = scratch()?;
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {});
    for name in [
        "a.hdd",
        "x-left-tmp",
        "x-file-missing",
        "x-file-dotdot",
        "x-empty",
    ] {
        bundle.write(Path::new(&at(name)))?;
        if name.starts_with("x-") {
            corrupt::apply(name, Path::new(&at(name)))?;
        }
    }
    like.write(Path::new(&at("a.hds")))?;
    like.write(Path::new(&at("half.hds")))?;
    fs::write(at("half.hds.repair"), "")?;
    fs::write(at("there"), "somebody's")?;
    let before = (names(dir.path())?, support::fingerprint(dir.path())?);
    for (line, word) in [
        ("a.hdd there", "there already"),
        ("a.hdd a.hdd", "there already"),
        ("a.hdd a.hdd/in", "lie in the disk"),
        ("a.hdd none/x.hdd", "No such file"),
        ("none.hdd x.hdd", "cannot copy"),
        ("x-left-tmp x.hdd", "interrupted"),
        ("x-file-missing x.hdd", "missing"),
        ("x-file-dotdot x.hdd", "bundle"),
        ("x-empty x.hdd", "descriptor"),
        ("a.hds x.hds --new-guids", "no GUIDs"),
        ("half.hds x.hds", "interrupted"),
    ] {
        let mut words = line.split(' ');
        let paths = words.by_ref().take(2).map(at).collect::<Vec<_>>();
        let mut refused = command::ploopfs(&["copy"]);
        let done = command::run(refused.args(words).args(paths))?.expect_code(1)?;
        ensure!(done.stderr.contains(word), "{line}: {}", done.story());
        let now = (names(dir.path())?, support::fingerprint(dir.path())?);
        ensure!(now == before, "{line}: {:?}", now.0);
    }
    Ok(())
}

/// A disk with a branch: the base, two on it, and the top on one of them; the images by their
/// snapshots' order in the list.
fn branched(at: &Path) -> Result<Vec<PathBuf>> {
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    BundleSpec::chain(Style::Ploop, &like, 3, |_, _| {}).write(at)?;
    let base = guids(at)?.first().cloned().context("a base")?;
    let mut switch = command::ploopfs(&["snapshot", "switch", "-q", "--keep"]);
    command::ok(switch.arg(at).arg(base))?;
    let said = command::ok(command::ploopfs(&["snapshot", "list", "--json"]).arg(at))?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let rows = said["snapshots"].as_array().context("a list")?;
    let file = |row: &serde_json::Value| row["files"][0].as_str().map(|name| at.join(name));
    Ok(rows.iter().filter_map(file).collect())
}

fn expect_refused(dir: &Path, source: &Path, word: &str) -> Outcome {
    let before = (names(dir)?, support::fingerprint(dir)?);
    let mut line = command::ploopfs(&["copy"]);
    let done = command::run(line.arg(source).arg(dir.join("copy.hdd")))?.expect_code(1)?;
    ensure!(done.stderr.contains(word), "{word}: {}", done.story());
    let now = (names(dir)?, support::fingerprint(dir)?);
    ensure!(now == before, "{word}: something was changed: {:?}", now.0);
    Ok(())
}

/// Every image counts, not only those that the disk shows now.
fn every_image() -> Outcome {
    use ploopfs::storage::lock::{self, Purpose};
    let dir = scratch()?;
    let source = dir.path().join("a.hdd");
    let images = branched(&source)?;
    ensure!(images.len() == 4, "{images:?}");
    for image in &images {
        let what = image.display();
        let file = fs::OpenOptions::new().read(true).write(true).open(image)?;
        let now = std::time::Instant::now();
        let locked = lock::image(&file, image, Purpose::Write, now);
        locked.map(|_| ()).with_context(|| what.to_string())?;
        expect_refused(dir.path(), &source, "locked").with_context(|| what.to_string())?;
        drop(file);
        let bytes = fs::read(image)?;
        let mut marked = bytes.clone();
        marked[44..48].copy_from_slice(&0x746f_6e59_u32.to_le_bytes());
        fs::write(image, &marked)?;
        expect_refused(dir.path(), &source, "in-use mark").with_context(|| what.to_string())?;
        fs::write(image, &bytes)?;
        let left = PathBuf::from(format!("{}.repair", text(image)));
        fs::write(&left, "")?;
        expect_refused(dir.path(), &source, "interrupted").with_context(|| what.to_string())?;
        fs::remove_file(&left)?;
    }
    for end in ["new", "pending", "tmp", "lck.new"] {
        let left = source.join(format!("DiskDescriptor.xml.{end}"));
        fs::write(&left, "")?;
        expect_refused(dir.path(), &source, "interrupted").context(end)?;
        fs::remove_file(&left)?;
    }
    let held = fs::File::open(&source)?;
    let other = nix::fcntl::Flock::lock(held, nix::fcntl::FlockArg::LockExclusiveNonblock);
    let other = other.map_err(|(_, e)| e)?;
    expect_refused(dir.path(), &source, "working on the bundle")?;
    drop(other);
    copy(&source, &dir.path().join("copy.hdd"), &[])
}

/// What is not understood is copied as it is, or not at all.
fn names_kept() -> Outcome {
    let dir = scratch()?;
    let at = |name: &str| dir.path().join(name);
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {}).write(&at("a.hdd"))?;
    let file = "a.hdd/DiskDescriptor.xml.names";
    let backup = vec![b'x'; (1 << 20) + 4096];
    fs::write(at("a.hdd/DiskDescriptor.xml.Backup"), &backup)?;
    fs::write(at(file), "precious")?;
    copy(&at("a.hdd"), &at("b.hdd"), &[])?;
    ensure!(fs::read(at("b.hdd/DiskDescriptor.xml.names"))? == b"precious");
    ensure!(fs::read(at("b.hdd/DiskDescriptor.xml.Backup"))? == backup);
    let mut line = command::ploopfs(&["copy", "--new-guids"]);
    let refused = command::run(line.arg(at("a.hdd")).arg(at("c.hdd")))?.expect_code(1)?;
    ensure!(
        refused.stderr.contains("--new-guids"),
        "{}",
        refused.story()
    );
    fs::remove_file(at(file))?;
    nix::unistd::mkfifo(&at(file), nix::sys::stat::Mode::S_IRWXU)?;
    let mut line = command::ploopfs(&["copy"]);
    let refused = command::run(line.arg(at("a.hdd")).arg(at("c.hdd")))?.expect_code(1)?;
    ensure!(refused.stderr.contains("plain file"), "{}", refused.story());
    ensure!(names(dir.path())? == ["a.hdd", "b.hdd"]);
    Ok(())
}

fn another_name() -> Outcome {
    let dir = scratch()?;
    let (source, target) = (dir.path().join("a.hdd"), dir.path().join("b.hdd"));
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {});
    bundle.write(&source)?;
    let other = source.join("other.xml");
    fs::rename(source.join("DiskDescriptor.xml"), &other)?;
    fs::write(source.join("other.xml.Backup"), "before")?;
    copy(&other, &target, &[])?;
    let found = names(&target)?;
    ensure!(
        found.contains(&"DiskDescriptor.xml".to_owned()),
        "{found:?}"
    );
    ensure!(
        found.contains(&"DiskDescriptor.xml.Backup".to_owned()),
        "{found:?}"
    );
    expect(&target, &bundle.model())?;
    fs::write(source.join("other.xml.pending"), "")?;
    expect_refused(dir.path(), &other, "interrupted")
}

fn odd_hosts() -> Outcome {
    use std::os::unix::fs::PermissionsExt;
    let dir = scratch()?;
    let at = |name: &str| dir.path().join(name);
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {});
    bundle.write(&at("a.hdd"))?;
    let source = at("a.hdd");
    for mask in ["0777", "0377"] {
        let target = at(&format!("{mask}.hdd"));
        let script = "umask $1; shift; exec \"$@\"";
        let args = [
            mask,
            support::PLOOPFS,
            "copy",
            "-q",
            text(&source),
            text(&target),
        ];
        command::ok(&mut command::sh(script, &args)).context(mask)?;
        let args = [
            mask,
            support::PLOOPFS,
            "snapshot",
            "create",
            "-q",
            text(&target),
        ];
        command::ok(&mut command::sh(script, &args)).context(mask)?;
        let mode =
            |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o777) };
        ensure!(mode(&target)? == 0o700, "{mask}");
        for name in names(&target)? {
            let own = mode(&target.join(&name))?;
            ensure!(own == 0o600, "{mask}: {name} has {own:o}");
        }
    }
    let long = |end: &str| at(&format!("{}{end}", "y".repeat(255 - end.len())));
    copy(&at("a.hdd"), &long("copy.hdd"), &[])?;
    expect(&long("copy.hdd"), &bundle.model())?;
    let accents = at(&format!("{}.hdd", "\u{e9}".repeat(125)));
    copy(&at("a.hdd"), &accents, &[])?;
    for name in ["made.hds", "made.hdd"] {
        let mut line = command::ploopfs(&["create", "-q", "-s", "64M", "--mkfs", "ext4"]);
        command::ok(line.arg(long(name)))?;
    }
    convert(&at("a.hdd"), &long("flat.raw"), &[])?;
    // The bundle keeps to the names of its images.
    let image = long("made.hds");
    let inner = long("made.hdd").join(image.file_name().context("a name")?);
    fs::rename(long("made.hdd").join("root.hds"), &inner)?;
    let xml = long("made.hdd").join("DiskDescriptor.xml");
    let new = fs::read_to_string(&xml)?.replace(
        "root.hds",
        text(Path::new(inner.file_name().context("a name")?)),
    );
    fs::write(&xml, new)?;
    command::ok(command::ploopfs(&["snapshot", "create", "-q"]).arg(long("made.hdd")))?;
    Ok(())
}

fn failures() -> Outcome {
    let dir = scratch()?;
    let source = dir.path().join("a.hdd");
    let like = ImageSpec::new(2, 2048, 2048 * 15).mapping(Mapped::All);
    BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {}).write(&source)?;
    let small = Small::new(&dir.path().join("small"), "20M")?;
    let mut line = command::ploopfs(&["copy"]);
    let done = command::run(line.arg(&source).arg(small.0.join("x.hdd")))?.expect_code(1)?;
    ensure!(names(&small.0)?.is_empty(), "{}", done.story());
    ensure!(done.stderr.contains("nothing was left"), "{}", done.story());
    Ok(())
}

fn examples() -> Outcome {
    let dir = scratch()?;
    let like = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    let bundle = BundleSpec::chain(Style::Ploop, &like, 2, |_, _| {});
    bundle.write(&dir.path().join("disk.hdd"))?;
    let ran = run_examples("ploopfs-copy.1", dir.path())?;
    ensure!(
        ran >= 2 && names(dir.path())?.len() == ran + 1,
        "{ran} examples"
    );
    Ok(())
}
