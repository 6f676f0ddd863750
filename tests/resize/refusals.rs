//! What is refused, and that nothing is changed by it.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::extension::BitmapSpec;
use crate::forge::image::{IN_USE, ImageSpec, Mapped, V21};
use crate::forge::{corrupt, reader::Flat};
use crate::interop::resize;
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::{Outcome, command, fingerprint, scratch};
use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use std::path::Path;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("refusals_change_nothing", &[], refusals),
        trial("a_dry_run_changes_nothing", &[], dry_runs),
        trial("bitmaps_are_dropped_on_request_only", &[], bitmaps),
        trial("a_relative_size_needs_a_closed_image", &[], relative),
        trial("frozen_data_does_not_come_up_again", &[], hidden),
        trial("other_snapshots_keep_their_ends", &[], others),
        trial("what_cannot_be_cleared_away_refuses", &[], unsettled),
        trial("two_sizes_are_made_one", &[], contradiction),
    ]
}

fn refused(path: &Path, args: &[&str], words: &[&str]) -> Outcome {
    let before = fingerprint(path)?;
    let mut all = vec!["resize", text(path)];
    all.extend(args);
    let done = command::run(&mut command::ploopfs(&all))?.expect_code(1)?;
    done.expect_words(words)?;
    ensure!(
        fingerprint(path)? == before,
        "{args:?}: something was changed"
    );
    Ok(())
}

fn spec(version: u8) -> ImageSpec {
    ImageSpec::new(version, 64, 6400).mapping(Mapped::Percent(50))
}

fn made(dir: &Path, name: &str, spec: &ImageSpec) -> Result<std::path::PathBuf> {
    let path = dir.join(name);
    spec.write(&path)?;
    Ok(path)
}

fn refusals() -> Outcome {
    let dir = scratch()?;
    for version in [1, 2] {
        let path = made(dir.path(), &format!("{version}.hds"), &spec(version))?;
        refused(&path, &["1M"], &["--shrink"])?;
        refused(&path, &["--shrink", "1M"], &["--force-discard"])?;
        refused(&path, &["--shrink", "--force-discard", "1M"], &["--yes"])?;
        refused(&path, &["0"], &["size"])?;
        refused(&path, &["-1G"], &["size"])?;
        refused(&path, &["40T", "--shrink"], &["cannot hold"])?;
        refused(&path, &["999999T"], &[])?;
    }
    for damage in [
        "t-duplicate",
        "t-past-eof",
        "t-slots-after-end",
        "h-type",
        "h-magic",
    ] {
        let path = made(dir.path(), &format!("{damage}.hds"), &spec(2))?;
        corrupt::apply(damage, &path)?;
        refused(&path, &["1G"], &[])?;
    }
    let small = ImageSpec::new(2, 7, 700).mapping(Mapped::All);
    refused(
        &made(dir.path(), "small.hds", &small)?,
        &["1G"],
        &["multiple of 8"],
    )?;
    let bundle = dir.path().join("b.hdd");
    let chain = BundleSpec::chain(Style::Ploop, &spec(2), 2, |_, _| {});
    chain.write(&bundle)?;
    for file in chain.files(&bundle, 0) {
        refused(&file, &["1G"], &[])?;
    }
    let alone = dir.path().join("c.hdd");
    BundleSpec::chain(Style::Ploop, &spec(2), 1, |_, _| {}).write(&alone)?;
    refused(&alone.join("root.hds"), &["1G"], &["name the bundle"])?;
    locked(dir.path())
}

fn locked(dir: &Path) -> Outcome {
    use ploopfs::storage::lock::{self, Purpose};
    let path = made(dir, "locked.hds", &spec(2))?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)?;
    let _locked = lock::image(&file, &path, Purpose::Write, std::time::Instant::now())?;
    refused(&path, &["1G"], &["locked"])
}

fn dry_runs() -> Outcome {
    let dir = scratch()?;
    let path = made(dir.path(), "x.hds", &spec(2))?;
    let before = fingerprint(&path)?;
    let said = resize(&path, &["-n", "900M"])?;
    ensure!(
        said.contains("would be 900 MiB") && said.contains("moved: 3"),
        "{said}"
    );
    let said = resize(&path, &["-n", "--shrink", "--force-discard", "1M"])?;
    ensure!(said.contains("cut off"), "{said}");
    let said = resize(&path, &["-n", "--json", "900M"])?;
    let json: serde_json::Value = serde_json::from_str(&said)?;
    ensure!(
        json["after_bytes"] == 900 << 20 && json["schema_version"] == 1,
        "{json}"
    );
    ensure!(fingerprint(&path)? == before);
    let said = resize(&path, &["6400s"])?;
    ensure!(said.contains("already"), "{said}");
    ensure!(fingerprint(&path)? == before);
    Ok(())
}

fn bitmaps() -> Outcome {
    let dir = scratch()?;
    let mut spec = spec(2);
    spec.mark = V21;
    spec.bitmap = Some(BitmapSpec::new(vec![0, 3, 40]));
    let path = made(dir.path(), "x.hds", &spec)?;
    refused(&path, &["900M"], &["--drop-bitmaps"])?;
    resize(&path, &["-y", "--drop-bitmaps", "900M"])?;
    command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
    Ok(())
}

fn relative() -> Outcome {
    let dir = scratch()?;
    let mut spec = spec(2);
    spec.mark = IN_USE;
    let path = made(dir.path(), "x.hds", &spec)?;
    refused(&path, &["+1G"], &["interrupted"])?;
    resize(&path, &["1G"])?;
    ensure!(Flat::open(&path)?.bytes() == 1 << 30);
    resize(&path, &["+1G"])?;
    ensure!(Flat::open(&path)?.bytes() == 2 << 30);
    Ok(())
}

fn hidden() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    let levels = BundleSpec::chain(Style::Ploop, &spec(2), 2, |level, spec| {
        spec.disk_sectors = if level == 0 { 6400 } else { 3200 };
    });
    levels.write(&path)?;
    refused(&path, &["1G"], &["level below"])
}

fn others() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    let levels = BundleSpec::chain(Style::Ploop, &spec(2), 2, |level, spec| {
        spec.mapped = Mapped::List(if level == 0 { vec![0, 1] } else { vec![0, 90] });
    });
    levels.write(&path)?;
    let ploopfs = |args: &[&str]| command::ok(&mut command::ploopfs(args));
    let args = ["snapshot", "switch", "--json", "--keep"];
    let said = ploopfs(&[&args[..], &[text(&path), "latest"]].concat())?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let kept = said["kept"].as_str().unwrap_or_default();
    ensure!(!kept.is_empty(), "{said}");
    for more in [&["-n"][..], &["-y"], &["-y", "--force-discard"]] {
        let args = [&["--shrink", "1M"], more].concat();
        refused(&path, &args, &[kept, "at byte 2949120", "delete such"])?;
    }
    // What it does not need may go, and so may all once it is gone.
    resize(&path, &["-y", "--shrink", "5824s"])?;
    ploopfs(&["snapshot", "delete", "-y", text(&path), kept])?;
    resize(&path, &["-y", "--shrink", "1M"])?;
    ploopfs(&["check", "-q", text(&path)])?;
    Ok(())
}

fn unsettled() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    BundleSpec::chain(Style::Ploop, &spec(2), 1, |_, _| {}).write(&path)?;
    // Not even root can remove a directory as if it were a file.
    let left = path.join("DiskDescriptor.xml.new");
    std::fs::create_dir(&left)?;
    // Nothing is cleared away without ploop's lock, whose file stays.
    std::fs::write(path.join("DiskDescriptor.xml.lck"), "")?;
    refused(&path, &["1G"], &["cannot resize"])?;
    refused(&path, &["-y", "--shrink", "--force-discard", "1M"], &[])?;
    std::fs::remove_dir(&left)?;
    resize(&path, &["1G"])?;
    command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
    Ok(())
}

fn contradiction() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    BundleSpec::chain(Style::Ploop, &spec(2), 1, |_, _| {}).write(&path)?;
    let xml = path.join("DiskDescriptor.xml");
    let wrong = std::fs::read_to_string(&xml)?.replace(">6400<", ">8448<");
    std::fs::write(&xml, wrong)?;
    refused(&path, &["1G"], &["if the header is right"])?;
    // The size that the header says: only the descriptor changes.
    let image = path.join("root.hds");
    let before = fingerprint(&image)?;
    let done = command::run(&mut command::ploopfs(&[
        "resize",
        "-y",
        "--shrink",
        text(&path),
        "6400s",
    ]))?;
    done.expect_code(0)?;
    ensure!(fingerprint(&image)? == before);
    command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
    Ok(())
}
