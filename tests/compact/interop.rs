//! The command on real files, and what other programs say of them.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::corrupt;
use crate::forge::extension::BitmapSpec;
use crate::forge::image::{ImageSpec, Layout, Mapped, V21};
use crate::forge::reader::Flat;
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{self, Outcome, command, fingerprint, scratch, scratch_tmpfs};
use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use nix::pty::openpty;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("images_and_bundles_keep_their_content", &[], kept),
        trial("qemu_agrees", &[Need::Qemu], qemu),
        trial("ploop_agrees", &[Need::Ploop], ploop_agrees),
        trial("zeros_are_given_back", &[], zeros),
        trial("holes_are_filled_on_request", &[], holes),
        trial("a_plan_is_shown_and_asked_for", &[], questions),
        trial("refusals_and_dry_runs_change_nothing", &[], refusals),
    ]
}

fn compact(path: &Path, args: &[&str]) -> Result<String> {
    let all = [&["compact", "--yes"], args].concat();
    command::ok(command::ploopfs(&all).arg(path))
}

fn specs() -> Vec<ImageSpec> {
    let mut specs = Vec::new();
    for version in [1, 2] {
        for (cluster, sectors) in [(128, 20_000), (2048, 100_001)] {
            for layout in [Layout::Gaps(2), Layout::Shuffled(4), Layout::Identity] {
                let mut spec = ImageSpec::new(version, cluster, sectors);
                spec.mapped = Mapped::Percent(40);
                spec.layout = layout;
                spec.tail = 3;
                specs.push(spec);
            }
        }
    }
    specs
}

fn each(dir: &Path, judge: impl Fn(&Path) -> Outcome) -> Outcome {
    for spec in specs() {
        for args in [&[][..], &["--defrag"], &["--zeroes"]] {
            let path = dir.join("x.hds");
            spec.write(&path)?;
            let (old, len) = (Flat::open(&path)?.sha256()?, fs::metadata(&path)?.len());
            let said = compact(&path, args)?;
            ensure!(fs::metadata(&path)?.len() < len, "{said}");
            ensure!(Flat::open(&path)?.sha256()? == old, "{said}");
            command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
            judge(&path)?;
            let said = compact(&path, args)?;
            ensure!(said.contains("nothing to do"), "{said}");
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn kept() -> Outcome {
    let dir = scratch_tmpfs()?;
    each(dir.path(), |_| Ok(()))?;
    let level = |version, percent| {
        let mut spec = ImageSpec::new(version, 64, 6400).mapping(Mapped::Percent(percent));
        spec.layout = Layout::Gaps(1);
        Level::Image(spec)
    };
    let plain = Level::Plain {
        seed: 5,
        level: 0,
        bytes: 5000 * 512,
    };
    let mut split = BundleSpec::new(Style::Parallels, vec![level(1, 50), level(1, 20)]);
    split.push_part(vec![level(1, 50), level(1, 30)]);
    let chain = vec![level(1, 40), level(2, 30), level(2, 20)];
    let bundles = [
        BundleSpec::new(Style::Ploop, chain),
        BundleSpec::new(Style::Ploop, vec![plain.clone(), level(2, 30)]),
        BundleSpec::new(Style::Parallels, vec![plain]),
        split,
    ];
    for (number, spec) in bundles.iter().enumerate() {
        let path = dir.path().join(format!("{number}.hdd"));
        spec.write(&path)?;
        let old = Flat::open(&path)?.sha256()?;
        let frozen = (0..spec.parts.len()).flat_map(|part| {
            let mut files = spec.files(&path, part);
            files.pop();
            files
        });
        let frozen: Vec<_> = frozen.collect();
        let before: Result<Vec<_>> = frozen.iter().map(|file| fingerprint(file)).collect();
        for args in [&["--zeroes"][..], &["--defrag"], &[]] {
            compact(&path, args)?;
            ensure!(Flat::open(&path)?.sha256()? == old, "{number}: {args:?}");
            command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
        }
        let after: Result<Vec<_>> = frozen.iter().map(|file| fingerprint(file)).collect();
        ensure!(before? == after?, "a frozen image was changed");
    }
    Ok(())
}

fn qemu() -> Outcome {
    let dir = scratch_tmpfs()?;
    each(dir.path(), |path| {
        let args = ["check", "-q", "-f", "parallels", text(path)];
        command::ok(command::new("qemu-img").args(args))?;
        Ok(())
    })
}

/// ploop crashes in a small environment.
fn ploop(args: &[&str], path: &Path) -> Command {
    let mut command = command::new("ploop");
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("PLOOP_PADDING", "x".repeat(8192))
        .args(args)
        .arg(path);
    command
}

/// It writes even when asked not to, so the bytes are compared.
fn expect_ploop(image: &Path) -> Outcome {
    let before = support::sha256(image)?;
    let done = command::run(&mut ploop(&["check", "-f", "-c", "-r"], image))?.expect_code(0)?;
    ensure!(before == support::sha256(image)?, "{}", done.story());
    Ok(())
}

fn ploop_agrees() -> Outcome {
    let dir = scratch_tmpfs()?;
    each(dir.path(), expect_ploop)
}

fn zeros() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    let spec = ImageSpec::new(2, 2048, 40 * 2048).mapping(Mapped::All);
    spec.write(&path)?;
    let file = fs::File::options().write(true).open(&path)?;
    for (_, slot) in spec.slots().into_iter().take(30) {
        file.write_all_at(&vec![0; 1 << 20], spec.slot_at(slot))?;
    }
    drop(file);
    let before = support::host_bytes(&path)?;
    let old = Flat::open(&path)?.sha256()?;
    let said = compact(&path, &["--zeroes"])?;
    ensure!(said.contains("freed: 30"), "{said}");
    let after = support::host_bytes(&path)?;
    ensure!(after + (29 << 20) < before, "{before} to {after}");
    ensure!(Flat::open(&path)?.sha256()? == old);
    Ok(())
}

fn holes() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    let mut spec = ImageSpec::new(2, 128, 20_000).mapping(Mapped::Percent(30));
    spec.no_data = true;
    spec.layout = Layout::Gaps(1);
    spec.write(&path)?;
    ensure!(support::host_bytes(&path)? < 1 << 20);
    compact(&path, &["--fill-holes"])?;
    let len = fs::metadata(&path)?.len();
    ensure!(support::host_bytes(&path)? >= len, "there are holes");
    let said = compact(&path, &["--fill-holes"])?;
    ensure!(said.contains("nothing to do"), "{said}");
    Ok(())
}

/// The command at a terminal where somebody types this.
fn answered(path: &Path, answer: &[u8]) -> Result<command::Finished> {
    let terminal = openpty(None, None)?;
    File::from(terminal.master.try_clone()?).write_all(answer)?;
    let mut line = command::ploopfs(&["compact", "--zeroes"]);
    let done = command::run(line.stdin(Stdio::from(terminal.slave)).arg(path));
    drop(terminal.master);
    done
}

fn questions() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hds");
    let mut spec = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    spec.layout = Layout::Gaps(1);
    spec.write(&path)?;
    let (before, len) = (fingerprint(&path)?, fs::metadata(&path)?.len());
    for args in [&[][..], &["--zeroes"], &["--fill-holes", "--json"]] {
        let all = [&["compact"], args].concat();
        let done = command::run(command::ploopfs(&all).arg(&path))?.expect_code(1)?;
        let done = done.expect_words(&["--yes", "nobody can be asked", "nothing was changed"])?;
        ensure!(done.stdout.is_empty(), "{}", done.story());
    }
    let plan = ["Compact now?", "would be", "not confirmed"];
    answered(&path, b"n\n")?
        .expect_code(1)?
        .expect_words(&plan)?;
    ensure!(fingerprint(&path)? == before);
    answered(&path, b"y\n")?.expect_code(0)?;
    ensure!(fs::metadata(&path)?.len() < len);
    // With nothing to do there is nothing to ask.
    let done = command::run(command::ploopfs(&["compact"]).arg(&path))?.expect_code(0)?;
    ensure!(done.text().contains("nothing to do"), "{}", done.story());
    Ok(())
}

fn refused(path: &Path, args: &[&str], words: &[&str]) -> Outcome {
    let before = fingerprint(path)?;
    let all = [&["compact", "--yes"], args].concat();
    let done = command::run(command::ploopfs(&all).arg(path))?.expect_code(1)?;
    done.expect_words(words)?;
    ensure!(
        fingerprint(path)? == before,
        "{args:?}: something was changed"
    );
    Ok(())
}

fn refusals() -> Outcome {
    let dir = scratch()?;
    let mut spec = ImageSpec::new(2, 64, 6400).mapping(Mapped::Percent(50));
    spec.layout = Layout::Gaps(1);
    for damage in ["t-duplicate", "t-past-eof", "t-slots-after-end", "h-magic"] {
        let path = dir.path().join(format!("{damage}.hds"));
        spec.write(&path)?;
        corrupt::apply(damage, &path)?;
        refused(&path, &[], &[])?;
    }
    let path = dir.path().join("bitmap.hds");
    spec.mark = V21;
    spec.bitmap = Some(BitmapSpec::new(vec![0, 3]));
    spec.write(&path)?;
    refused(&path, &[], &["--drop-bitmaps"])?;
    let before = fingerprint(&path)?;
    let args = ["-n", "--drop-bitmaps", "--zeroes", "--defrag", "--json"];
    let json: serde_json::Value = serde_json::from_str(&compact(&path, &args)?)?;
    ensure!(
        json["files"][0]["moved_clusters"].as_u64() > Some(10),
        "{json}"
    );
    ensure!(fingerprint(&path)? == before);
    compact(&path, &["--drop-bitmaps"])?;
    command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
    Ok(())
}
