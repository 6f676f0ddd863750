//! `ploopfs merge` as people type it.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, Model};
use crate::forge::extension::BitmapSpec;
use crate::forge::image::{IN_USE, ImageSpec, Mapped, V21};
use crate::forge::reader::Flat;
use crate::support::guards::text;
use crate::support::harness::trial;
use crate::support::probe::Need;
use crate::support::{Outcome, command, fingerprint, scratch};
use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("images_by_themselves_are_merged", &[], loose),
        trial("a_plain_base_is_asked_for", &[], over_plain),
        trial("a_new_file_takes_it_all", &[], into_new),
        trial("the_wrong_order_is_refused", &[], orders),
        trial("refusals_change_nothing", &[], refusals),
        trial("split_disks_get_a_new_file_for_each_part", &[], split),
        trial("a_dry_run_needs_little_memory", &[], little_memory),
        trial("qemu_agrees", &[Need::Qemu], qemu_agrees),
    ]
}

fn merge(args: &[&str]) -> Result<String> {
    let all = [&["merge"], args].concat();
    command::ok(&mut command::ploopfs(&all))
}

/// A chain, and its files by other names: the lowest first.
fn chain(dir: &Path, spec: &BundleSpec) -> Result<(Vec<PathBuf>, Model)> {
    let bundle = dir.join("x.hdd");
    spec.write(&bundle)?;
    let mut files = Vec::new();
    for (number, file) in spec.files(&bundle, 0).into_iter().enumerate() {
        let to = dir.join(format!("level{number}.hds"));
        fs::rename(file, &to)?;
        files.push(to);
    }
    fs::remove_dir_all(bundle)?;
    Ok((files, spec.model()))
}

fn like(version: u8, cluster: u32) -> ImageSpec {
    ImageSpec::new(version, cluster, 64 * 100).mapping(Mapped::Percent(40))
}

fn expect_content(path: &Path, model: &Model) -> Outcome {
    let disk = Flat::open(path)?;
    ensure!(disk.bytes() == model.bytes(), "{} bytes", disk.bytes());
    let mut at = 0;
    while at < model.bytes() {
        let len = (model.bytes() - at).min(1 << 20) as usize;
        let is_equal = disk.read(at, len)? == model.read(at, len);
        ensure!(is_equal, "{}: other bytes after {at}", path.display());
        at += len as u64;
    }
    command::ok(command::ploopfs(&["check", "-q"]).arg(path))?;
    Ok(())
}

fn loose() -> Outcome {
    for (version, cluster) in [(1, 64), (2, 128), (2, 2048)] {
        let dir = scratch()?;
        let spec = BundleSpec::chain(Style::Ploop, &like(version, cluster), 3, |_, _| {});
        let (files, model) = chain(dir.path(), &spec)?;
        let names: Vec<&str> = files.iter().rev().map(|file| text(file)).collect();
        let before = fingerprint(dir.path())?;
        let said = merge(&[&["-n"], &names[..]].concat())?;
        ensure!(said.contains("level0.hds takes what"), "{said}");
        ensure!(
            fingerprint(dir.path())? == before,
            "a dry run changed something"
        );
        let uppers = (fingerprint(&files[1])?, fingerprint(&files[2])?);
        let said = merge(&[&["--json", "-y"], &names[..]].concat())?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        ensure!(
            said["into"] == text(&files[0]) && said["action"] == "merged",
            "{said}"
        );
        ensure!(said["disk_size_bytes"] == model.bytes(), "{said}");
        expect_content(&files[0], &model)?;
        ensure!((fingerprint(&files[1])?, fingerprint(&files[2])?) == uppers);
        // Again it changes nothing that the disk shows.
        merge(&[&["-y", "-q"], &names[..]].concat())?;
        expect_content(&files[0], &model)?;
    }
    Ok(())
}

fn over_plain() -> Outcome {
    let dir = scratch()?;
    let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.hds"));
    let bytes: Vec<u8> = (0..3_200_001_u32)
        .map(|at| (at / 512 % 255) as u8)
        .collect();
    fs::write(&base, &bytes)?;
    like(2, 64).write(&top)?;
    let (top_name, base_name) = (text(&top), text(&base));
    let refused = ["merge", "-y", top_name, base_name];
    let done = command::run(&mut command::ploopfs(&refused))?.expect_code(1)?;
    done.expect_words(&["--format raw"])?;
    let new = dir.path().join("new.hds");
    merge(&[
        "--format",
        "raw",
        "--into-new",
        text(&new),
        top_name,
        base_name,
    ])?;
    ensure!(fs::read(&base)? == bytes, "the base was changed");
    merge(&["-y", "--format", "raw", top_name, base_name])?;
    let merged = fs::read(&base)?;
    let (own, over) = (Flat::open(&top)?, Flat::open(&new)?);
    ensure!(merged.len() as u64 == own.bytes() && over.bytes() == own.bytes());
    let spec = like(2, 64);
    for cluster in 0..spec.entries() {
        let at = cluster as usize * 32768;
        let len = 32768.min(merged.len() - at);
        let expected = if spec.maps(cluster) {
            own.read(at as u64, len)?
        } else {
            let mut below = bytes.get(at..).unwrap_or_default().to_vec();
            below.resize(len, 0);
            below
        };
        ensure!(merged[at..at + len] == expected, "cluster {cluster}");
        ensure!(
            over.read(at as u64, len)? == expected,
            "cluster {cluster} of the new"
        );
    }
    Ok(())
}

fn into_new() -> Outcome {
    let dir = scratch()?;
    let spec = BundleSpec::chain(Style::Ploop, &like(2, 128), 3, |level, image| {
        image.version = if level == 1 { 1 } else { 2 };
    });
    let (files, model) = chain(dir.path(), &spec)?;
    let names: Vec<&str> = files.iter().rev().map(|file| text(file)).collect();
    let before: Vec<_> = files
        .iter()
        .map(|f| fingerprint(f))
        .collect::<Result<_>>()?;
    let new = dir.path().join("new.hds");
    let said = merge(&[&["--into-new", text(&new)], &names[..]].concat())?;
    ensure!(!said.contains("not needed"), "{said}");
    expect_content(&new, &model)?;
    let after: Vec<_> = files
        .iter()
        .map(|f| fingerprint(f))
        .collect::<Result<_>>()?;
    ensure!(before == after, "an image was changed");
    let again = [&["merge", "--into-new", text(&new)], &names[..]].concat();
    let done = command::run(&mut command::ploopfs(&again))?.expect_code(1)?;
    done.expect_words(&["is there already"])?;
    expect_content(&new, &model)?;
    ensure!(fs::read_dir(dir.path())?.count() == 4, "something was left");
    Ok(())
}

fn refused(dir: &Path, args: &[&str], words: &[&str]) -> Outcome {
    let before = fingerprint(dir)?;
    let all = [&["merge"], args].concat();
    let done = command::run(&mut command::ploopfs(&all))?.expect_code(1)?;
    done.expect_words(words)?;
    ensure!(
        fingerprint(dir)? == before,
        "{args:?}: something was changed"
    );
    Ok(())
}

fn orders() -> Outcome {
    let dir = scratch()?;
    let path = |name: &str| dir.path().join(name);
    let guid = "{11111111-2222-3333-4444-555555555555}";
    let top = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
    let names = [
        ("root.hds".to_owned(), format!("root.hds.{guid}")),
        (format!("a.hdd.0.{top}.hds"), format!("a.hdd.0.{guid}.hds")),
    ];
    for (lower, upper) in names {
        let (lower, upper) = (path(&lower), path(&upper));
        like(2, 64).write(&lower)?;
        like(2, 64).write(&upper)?;
        let words = ["uppermost image comes first", "names say the opposite"];
        refused(dir.path(), &["-y", text(&lower), text(&upper)], &words)?;
        merge(&["-n", text(&upper), text(&lower)])?;
    }
    let (small, large) = (path("small.hds"), path("large.hds"));
    like(2, 64).write(&small)?;
    ImageSpec::new(2, 64, 64 * 200)
        .mapping(Mapped::Percent(30))
        .write(&large)?;
    let (small, large) = (text(&small), text(&large));
    let words = ["uppermost image comes first", "--into-new"];
    refused(dir.path(), &["-y", small, large], &words)?;
    let new = path("new.hds");
    let into_new = ["--into-new", text(&new), small, large];
    let words = ["large.hds", "ends at byte 3276800", "--force-discard"];
    refused(dir.path(), &into_new, &words)?;
    refused(dir.path(), &[&["-n"], &into_new[..]].concat(), &words)?;
    let said = merge(&[&["--force-discard"], &into_new[..]].concat())?;
    let is_told = said.contains("the end is left out") && said.contains("which is lost from byte");
    ensure!(is_told, "{said}");
    ensure!(Flat::open(&new)?.bytes() == 64 * 100 * 512);
    let said = merge(&["--json", "-y", "--force-discard", small, large])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    ensure!(said["discards"][0]["file"] == large, "{said}");
    let first = said["discards"][0]["from_byte"].as_u64();
    ensure!(first.is_some_and(|byte| byte >= 64 * 100 * 512), "{said}");
    let (large, new) = (Flat::open(Path::new(large))?, Flat::open(&new)?);
    ensure!(large.bytes() == new.bytes());
    for at in (0..new.bytes()).step_by(1 << 20) {
        let len = (new.bytes() - at).min(1 << 20) as usize;
        ensure!(large.read(at, len)? == new.read(at, len)?, "after {at}");
    }
    Ok(())
}

fn refusals() -> Outcome {
    let dir = scratch()?;
    let path = |name: &str| dir.path().join(name);
    let (one, two, other) = (path("one.hds"), path("two.hds"), path("other.hds"));
    like(2, 64).write(&one)?;
    like(2, 64).write(&two)?;
    like(2, 128).write(&other)?;
    let (one_name, two_name) = (text(&one), text(&two));
    let mut marked = like(2, 64);
    marked.mark = IN_USE;
    marked.write(&path("marked.hds"))?;
    let mut tracked = like(2, 64);
    tracked.mark = V21;
    tracked.bitmap = Some(BitmapSpec::new(vec![0, 3]));
    tracked.write(&path("tracked.hds"))?;
    fs::write(path("plain.raw"), vec![1; 1 << 20])?;
    std::os::unix::fs::symlink("two.hds", path("link.hds"))?;
    fs::hard_link(&two, path("hard.hds"))?;
    let bundle = path("b.hdd");
    BundleSpec::chain(Style::Ploop, &like(2, 64), 1, |_, _| {}).write(&bundle)?;
    let inside = bundle.join("root.hds");
    for (args, words) in [
        (&[one_name][..], &["single image"][..]),
        (&["-y", "--all", one_name, two_name], &["--all"]),
        (&["-y", one_name, text(&other)], &["clusters of"]),
        (
            &["-y", text(&path("marked.hds")), two_name],
            &["in-use mark"],
        ),
        (
            &["-y", text(&path("tracked.hds")), two_name],
            &["--drop-bitmaps"],
        ),
        (
            &["-y", text(&path("plain.raw")), two_name],
            &["--format raw"],
        ),
        (&["-y", "--format", "raw", one_name, two_name], &["magic"]),
        (&["-y", one_name, one_name], &["same file"]),
        (&["-y", two_name, text(&path("link.hds"))], &["same file"]),
        (&["-y", two_name, text(&path("hard.hds"))], &["same file"]),
        (&["-y", one_name, text(&inside)], &["name the bundle"]),
        (&["-y", one_name, text(&bundle)], &["bundle"]),
        (&["-y", one_name, text(&path("none.hds"))], &["none.hds"]),
        (&[one_name, two_name], &["--yes"]),
        (&["-y", "--format", "raw", text(&bundle)], &["descriptor"]),
        (
            &["--into-new", two_name, one_name, two_name],
            &["there already"],
        ),
    ] {
        refused(dir.path(), args, words)?;
    }
    Ok(())
}

fn split() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    let mut spec = BundleSpec::chain(Style::Parallels, &like(1, 64), 3, |_, _| {});
    spec.parts.clear();
    for sectors in [64 * 50, 64 * 70] {
        let levels = (0..3).map(|_| {
            let image = ImageSpec::new(1, 64, sectors).mapping(Mapped::Percent(40));
            Level::Image(image)
        });
        spec.push_part(levels.collect());
    }
    spec.write(&path)?;
    let before = command::ok(command::ploopfs(&["checksum"]).arg(&path))?;
    let args = [
        "-y",
        "--json",
        "--all",
        "--into-new",
        "all.hds",
        text(&path),
    ];
    let said: serde_json::Value = serde_json::from_str(&merge(&args)?)?;
    ensure!(
        said["made"] == serde_json::json!(["all.0.hds", "all.1.hds"]),
        "{said}"
    );
    let after = command::ok(command::ploopfs(&["checksum"]).arg(&path))?;
    ensure!(before == after, "{before} {after}");
    command::ok(command::ploopfs(&["check", "-q"]).arg(&path))?;
    for part in 0..2 {
        for file in spec.files(&path, part) {
            ensure!(!file.exists(), "{}", file.display());
        }
    }
    Ok(())
}

/// The table of the new image would have 256 MiB.
fn little_memory() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("x.hdd");
    let spec = ImageSpec::new(2, 64, 1000).mapping(Mapped::Percent(50));
    BundleSpec::chain(Style::Ploop, &spec, 2, |_, _| {}).write(&path)?;
    command::ok(&mut command::ploopfs(&["resize", "-q", text(&path), "2T"]))?;
    let ploopfs = env!("CARGO_BIN_EXE_ploopfs");
    let line = "ulimit -v 190000; exec \"$0\" merge -n --all --into-new new.hds \"$1\"";
    let mut limited = command::new("sh");
    limited.args(["-c", line, ploopfs, text(&path)]);
    let said = command::ok(&mut limited)?;
    ensure!(said.contains("clusters"), "{said}");
    Ok(())
}

fn qemu_agrees() -> Outcome {
    let dir = scratch()?;
    let spec = BundleSpec::chain(Style::Ploop, &like(2, 2048), 2, |_, _| {});
    let (files, model) = chain(dir.path(), &spec)?;
    merge(&["-y", text(&files[1]), text(&files[0])])?;
    expect_content(&files[0], &model)?;
    let mut check = command::new("qemu-img");
    command::ok(check.args(["check", "-f", "parallels", text(&files[0])]))?;
    let raw = dir.path().join("x.raw");
    fs::write(&raw, model.read(0, model.bytes() as usize))?;
    let mut compare = command::new("qemu-img");
    compare.args(["compare", "-f", "parallels", "-F", "raw"]);
    command::ok(compare.args([text(&files[0]), text(&raw)]))?;
    Ok(())
}
