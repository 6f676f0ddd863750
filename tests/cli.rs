//! The program's words: help, exit codes, errors, and that reading never writes.
//!
//! Nothing is mounted here; see the tests of `mount` for that.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

use anyhow::{Context, Result, ensure};
use forge::bundle::{BundleSpec, Style};
use forge::content::Level;
use forge::corrupt;
use forge::extension::BitmapSpec;
use forge::image::{IN_USE, ImageSpec, Mapped, V21};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use support::command::Finished;
use support::guards::text;
use support::harness::{self, trial};
use support::{Outcome, PLOOPFS, command, scratch};

const VERBS: [&str; 8] = [
    "mount", "umount", "attach", "detach", "list", "info", "check", "repair",
];

fn main() {
    harness::main(vec![
        trial("help_fits_a_screen", &[], help_fits_a_screen),
        trial(
            "wrong_usage_is_exit_code_1",
            &[],
            wrong_usage_is_exit_code_1,
        ),
        trial(
            "errors_say_what_why_fix_and_data",
            &[],
            errors_say_what_why_fix_and_data,
        ),
        trial("json_errors_have_a_kind", &[], json_errors_have_a_kind),
        trial("info_tells_a_bundle", &[], info_tells_a_bundle),
        trial("info_tells_an_image", &[], info_tells_an_image),
        trial("info_tells_a_split_disk", &[], info_tells_a_split_disk),
        trial(
            "info_never_writes_nor_panics",
            &[],
            info_never_writes_nor_panics,
        ),
        trial("mount_refuses_bad_bundles", &[], mount_refuses_bad_bundles),
        trial(
            "pvm_and_descriptor_name_the_disk",
            &[],
            pvm_and_descriptor_name_the_disk,
        ),
        trial("a_closed_pipe_is_no_panic", &[], a_closed_pipe_is_no_panic),
        trial("odd_names_are_names", &[], odd_names_are_names),
        trial("random_bytes_never_panic", &[], random_bytes_never_panic),
    ])
}

fn say(args: &[&str]) -> Result<Finished> {
    command::run(&mut command::ploopfs(args))
}

/// No panic, no abort, no backtrace: an exit code of 0 or 1, and a reason where it is 1.
fn expect_calm(done: &Finished) -> Outcome {
    let code = done.code();
    ensure!(code == 0 || code == 1, "neither 0 nor 1: {}", done.story());
    ensure!(!done.stderr.contains("panicked"), "{}", done.story());
    ensure!(
        code == 0 || done.stderr.contains("ploopfs: "),
        "no reason given: {}",
        done.story()
    );
    Ok(())
}

fn help_fits_a_screen() -> Outcome {
    for args in [&["--help"][..], &["-h"], &["help"]] {
        let done = say(args)?.expect_code(0)?;
        let help = done.text();
        ensure!(help.contains("Examples:"), "no examples: {help}");
        ensure!(
            help.lines().count() <= 40,
            "{} lines of help",
            help.lines().count()
        );
        for verb in VERBS {
            ensure!(help.contains(verb), "{verb} is not in the help");
        }
    }
    for verb in VERBS {
        let help = say(&[verb, "--help"])?.expect_code(0)?.text();
        ensure!(help.contains("Usage: "), "{help}");
        ensure!(
            help.lines().all(|line| line.len() <= 120),
            "wide lines: {help}"
        );
    }
    let version = say(&["--version"])?.expect_code(0)?.text();
    ensure!(
        version.trim() == concat!("ploopfs ", env!("CARGO_PKG_VERSION")),
        "{version}"
    );
    Ok(())
}

fn wrong_usage_is_exit_code_1() -> Outcome {
    // 2 would read as "corrupt", so it must never mean wrong usage.
    let wrong: [&[&str]; 8] = [
        &[],
        &["mont"],
        &["mount"],
        &["mount", "image"],
        &["mount", "--no-such-option", "a", "b"],
        &["info"],
        &["mount", "--inline-order", "x", "a", "b"],
        &["info", "a", "b", "c"],
    ];
    for args in wrong {
        let done = say(args)?.expect_code(1)?;
        ensure!(!done.stderr.is_empty(), "nothing said: {}", done.story());
    }
    say(&["mont"])?.expect_words(&["mount"])?;
    Ok(())
}

fn image(dir: &Path, name: &str) -> Result<(ImageSpec, PathBuf)> {
    let spec = ImageSpec::new(2, 64, 6403).mapping(Mapped::Percent(50));
    let path = dir.join(name);
    spec.write(&path)?;
    Ok((spec, path))
}

fn errors_say_what_why_fix_and_data() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path(), "a.hds")?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let gone = dir.path().join("gone.hds");
    let junk = dir.path().join("junk.hds");
    fs::write(&junk, vec![b'j'; 9000])?;
    let hollow = dir.path().join("hollow.hdd");
    fs::create_dir(&hollow)?;
    fs::write(hollow.join("root.hds"), b"x")?;
    let nowhere = dir.path().join("nowhere");
    // What is opened, where it is mounted, and words that the answer must hold.
    let cases: [(&Path, &Path, &[&str]); 4] = [
        (&gone, &at, &["gone.hds"]),
        (&junk, &at, &["junk.hds", "--format"]),
        (&hollow, &at, &["DiskDescriptor.xml"]),
        (&path, &nowhere, &["nowhere", "mkdir"]),
    ];
    let before = support::fingerprint(dir.path())?;
    for (image, at, words) in cases {
        let done = say(&["mount", text(image), text(at)])?
            .expect_code(1)?
            .expect_words(words)?;
        let said = &done.stderr;
        ensure!(said.starts_with("ploopfs: cannot mount "), "{said}");
        ensure!(
            said.contains("\n  data: "),
            "nothing about the data: {said}"
        );
        ensure!(said.lines().count() <= 8, "too long: {said}");
        ensure!(
            done.stdout.is_empty(),
            "an error on standard output: {}",
            done.story()
        );
    }
    ensure!(
        before == support::fingerprint(dir.path())?,
        "refused commands changed files"
    );
    Ok(())
}

fn json_errors_have_a_kind() -> Outcome {
    let dir = scratch()?;
    let junk = dir.path().join("junk.hds");
    fs::write(&junk, vec![b'j'; 9000])?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    let done = say(&["--json", "mount", text(&junk), text(&at)])?.expect_code(1)?;
    let json: Value = serde_json::from_str(&done.stderr)
        .with_context(|| format!("no JSON on standard error: {}", done.stderr))?;
    let error = &json["error"];
    ensure!(error["kind"] == "not-an-image", "{json}");
    ensure!(
        error["what"].is_string() && error["why"].is_string(),
        "{json}"
    );
    let done = say(&["--json", "mount"])?.expect_code(1)?;
    let json: Value = serde_json::from_str(&done.stderr)?;
    let why = json["error"]["why"].as_str().unwrap_or_default();
    ensure!(why.ends_with("<IMAGE> <MOUNTPOINT>"), "{json}");
    Ok(())
}

fn info_json(path: &Path, options: &[&str]) -> Result<Value> {
    let mut args = vec!["info", "--json"];
    args.extend(options);
    args.push(text(path));
    let done = say(&args)?.expect_code(0)?;
    let json: Value = serde_json::from_str(&done.text())?;
    ensure!(json["schema_version"] == 1, "schema_version of {json}");
    Ok(json)
}

fn info_tells_a_bundle() -> Outcome {
    let dir = scratch()?;
    let base = Level::Plain {
        seed: 1,
        level: 0,
        bytes: 2_000_000,
    };
    let upper = Level::Image(ImageSpec::new(1, 64, 6403).mapping(Mapped::Percent(50)));
    let spec = BundleSpec::new(Style::Parallels, vec![base, upper.clone(), upper]);
    let path = dir.path().join("d.hdd");
    spec.write(&path)?;
    let before = support::fingerprint(&path)?;
    let json = info_json(&path, &[])?;
    ensure!(json["kind"] == "bundle", "{json}");
    ensure!(json["size_bytes"] == 6403 * 512, "{json}");
    ensure!(json["top"] == spec.guid(2), "{json}");
    let files = json["parts"][0]["files"].as_array().context("no files")?;
    ensure!(files.len() == 3, "{} files", files.len());
    ensure!(
        files[0]["format"] == "plain" && files[1]["format"] == "expanding",
        "{json}"
    );
    ensure!(
        files[1]["version"] == 1 && files[1]["cluster_bytes"] == 32768,
        "{json}"
    );
    ensure!(files[1]["bat_entries"] == 101, "{json}");
    let mapped = (0..101)
        .filter(|cluster| match &spec.parts[0].levels[1] {
            Level::Image(image) => image.maps(*cluster),
            Level::Plain { .. } => false,
        })
        .count();
    ensure!(files[1]["mapped_clusters"] == mapped, "{json}");
    ensure!(
        files[1]["in_use"] == false && files[1]["bad_entries"] == 0,
        "{json}"
    );
    let snapshots = json["snapshots"].as_array().context("no snapshots")?;
    ensure!(snapshots.len() == 2, "{} snapshots", snapshots.len());
    ensure!(snapshots[0]["guid"] == spec.guid(0), "{json}");
    ensure!(json["problems"] == Value::Array(Vec::new()), "{json}");
    let human = say(&["info", text(&path)])?.expect_code(0)?.text();
    for word in [&spec.guid(0), "32 KiB"] {
        ensure!(human.contains(word), "no {word} in {human}");
    }
    let json = info_json(&path, &["--snapshot", &spec.guid(0)])?;
    ensure!(json["selected"] == spec.guid(0), "{json}");
    ensure!(
        before == support::fingerprint(&path)?,
        "info changed the bundle"
    );
    Ok(())
}

fn info_tells_an_image() -> Outcome {
    let dir = scratch()?;
    let path = dir.path().join("a.hds");
    let mut spec = ImageSpec::new(2, 64, 6403).mapping(Mapped::Percent(50));
    spec.mark = V21;
    spec.bitmap = Some(BitmapSpec::new(vec![1, 5]));
    spec.write(&path)?;
    let json = info_json(&path, &[])?;
    ensure!(json["kind"] == "image", "{json}");
    let file = &json["parts"][0]["files"][0];
    ensure!(file["extension"]["valid"] == true, "{json}");
    let bitmap = &file["extension"]["bitmaps"][0];
    ensure!(bitmap["granularity_bytes"] == 65536, "{json}");
    corrupt::apply("e-md5", &path)?;
    let json = info_json(&path, &[])?;
    ensure!(
        json["parts"][0]["files"][0]["extension"]["valid"] == false,
        "{json}"
    );
    let (_, path) = image(dir.path(), "b.hds")?;
    corrupt::apply("h-in-use", &path)?;
    ensure!(
        support::mark_of(&path)? == IN_USE,
        "forge did not set the mark"
    );
    let json = info_json(&path, &[])?;
    ensure!(json["parts"][0]["files"][0]["in_use"] == true, "{json}");
    corrupt::apply("t-past-eof", &path)?;
    let json = info_json(&path, &[])?;
    ensure!(json["parts"][0]["files"][0]["bad_entries"] == 1, "{json}");
    Ok(())
}

fn info_tells_a_split_disk() -> Outcome {
    let dir = scratch()?;
    let part = |cluster, sectors| vec![Level::Image(ImageSpec::new(1, cluster, sectors))];
    let mut spec = BundleSpec::new(Style::Parallels, part(2048, 10_001));
    spec.push_part(part(64, 77));
    spec.push_part(part(128, 5000));
    let path = dir.path().join("s.hdd");
    spec.write(&path)?;
    let json = info_json(&path, &[])?;
    let parts = json["parts"].as_array().context("no parts")?;
    ensure!(parts.len() == 3, "{} parts", parts.len());
    ensure!(
        parts[1]["start_sector"] == 10_001 && parts[1]["end_sector"] == 10_078,
        "{json}"
    );
    ensure!(json["size_bytes"] == 15_078 * 512, "{json}");
    Ok(())
}

/// An image or bundle broken in a named way; the directory that holds all of it.
fn broken(dir: &Path, name: &str) -> Result<(PathBuf, PathBuf)> {
    let mut spec = ImageSpec::new(1, 64, 6403).mapping(Mapped::Percent(50));
    if name.starts_with("e-") {
        spec.mark = V21;
        spec.bitmap = Some(BitmapSpec::new(vec![1, 9]));
    }
    let home = dir.join(name);
    fs::create_dir(&home)?;
    let target = if name.starts_with("x-") {
        let style = if name == "x-engine" {
            Style::Parallels
        } else {
            Style::Ploop
        };
        let path = home.join("d.hdd");
        BundleSpec::chain(style, &spec, 3, |_, _| {}).write(&path)?;
        path
    } else {
        let path = home.join("a.hds");
        spec.write(&path)?;
        path
    };
    corrupt::apply(name, &target).with_context(|| name.to_string())?;
    Ok((home, target))
}

fn info_never_writes_nor_panics() -> Outcome {
    let dir = scratch()?;
    for corruption in corrupt::ALL {
        let (home, target) = broken(dir.path(), corruption.name)?;
        let before = support::fingerprint(&home)?;
        for options in [&[][..], &["--json"]] {
            let done = command::run(command::ploopfs(&["info"]).args(options).arg(&target))?;
            expect_calm(&done).with_context(|| corruption.name.to_string())?;
        }
        let after = support::fingerprint(&home)?;
        ensure!(before == after, "info changed {}", corruption.name);
        fs::remove_dir_all(&home)?;
    }
    Ok(())
}

fn mount_refuses_bad_bundles() -> Outcome {
    let dir = scratch()?;
    let at = dir.path().join("mnt");
    fs::create_dir(&at)?;
    // Refused before anything is mounted, reading or writing.
    let always = [
        "x-empty",
        "x-truncated",
        "x-no-snapshots",
        "x-unknown-top",
        "x-shot-without-image",
        "x-duplicate-guid",
        "x-parent-missing",
        "x-cycle",
        "x-bad-guid",
        "x-size-garbage",
        "x-blocksize",
        "x-file-missing",
        "x-file-empty",
        "x-file-dotdot",
        "x-file-absolute",
        "x-file-symlink",
        "x-same-file",
        "x-entities",
        "x-huge",
        "x-deep",
    ];
    // The files can be read for what they are, but nobody may write to them.
    let writing = ["x-plain-above", "x-size", "x-start", "x-end-large"];
    for name in always.into_iter().chain(writing) {
        let (home, target) = broken(dir.path(), name)?;
        let before = support::fingerprint(&home)?;
        for options in [&["-r"][..], &[]] {
            let mut command = command::ploopfs(&["mount"]);
            let done = command::run(command.args(options).arg(&target).arg(&at))?;
            let may = options == ["-r"] && writing.contains(&name);
            if support::guards::is_mounted(&at) {
                let _ = command::run(command::ploopfs(&["umount"]).arg(&at));
            }
            expect_calm(&done).with_context(|| name.to_string())?;
            ensure!(
                may || done.code() == 1,
                "{name} {options:?} was not refused"
            );
        }
        // Only ploop's own lock file may stay of an attempt to write, as it does with ploop.
        let _ = fs::remove_file(target.join("DiskDescriptor.xml.lck"));
        let after = support::fingerprint(&home)?;
        ensure!(before == after, "{name}: a refused mount changed it");
    }
    Ok(())
}

fn pvm_and_descriptor_name_the_disk() -> Outcome {
    let dir = scratch()?;
    let machine = dir.path().join("m.pvm");
    fs::create_dir(&machine)?;
    let spec = ImageSpec::new(1, 64, 6403).mapping(Mapped::Percent(50));
    let bundle = BundleSpec::chain(Style::Parallels, &spec, 1, |_, _| {});
    bundle.write(&machine.join("one.hdd"))?;
    let size = |path: &Path| Ok::<_, anyhow::Error>(info_json(path, &[])?["size_bytes"].clone());
    let want = Value::from(6403 * 512);
    ensure!(size(&machine)? == want, "by the .pvm");
    ensure!(size(&machine.join("one.hdd"))? == want, "by the bundle");
    ensure!(
        size(&machine.join("one.hdd/DiskDescriptor.xml"))? == want,
        "by the descriptor"
    );
    bundle.write(&machine.join("two.hdd"))?;
    let done = say(&["info", text(&machine)])?.expect_code(1)?;
    done.expect_words(&["one.hdd", "two.hdd"])?;
    // A link was not named by the user, and may lead to somebody else's disk.
    let other = dir.path().join("other.pvm");
    fs::create_dir(&other)?;
    std::os::unix::fs::symlink("../m.pvm/one.hdd", other.join("one.hdd"))?;
    let done = say(&["info", text(&other)])?.expect_code(1)?;
    done.expect_words(&["link", "name"])?;
    ensure!(size(&other.join("one.hdd"))? == want, "by the link itself");
    Ok(())
}

fn a_closed_pipe_is_no_panic() -> Outcome {
    let dir = scratch()?;
    let (_, path) = image(dir.path(), "a.hds")?;
    let verbs = "--help; \"$0\" info \"$1\"; \"$0\" info --json \"$1\"; \"$0\" list";
    for verb in verbs.split("; ") {
        let verb = verb.trim_start_matches("\"$0\" ");
        let script = format!("\"$0\" {verb} | head -n 1; \"$0\" {verb} >&-; exit 0");
        let mut command = command::new("sh");
        command.args(["-c", &script, PLOOPFS]).arg(&path);
        let done = command::run(command.stdin(Stdio::null()))?;
        ensure!(
            !done.stderr.contains("panicked"),
            "{verb}: {}",
            done.story()
        );
    }
    Ok(())
}

fn odd_names_are_names() -> Outcome {
    use std::os::unix::ffi::OsStrExt;
    let dir = scratch()?;
    let names: [&[u8]; 4] = [
        b"a,b c.hds",
        b"caf\xe9.hds",
        b"-r.hds",
        b"line\nbreak\x1b[31m.hds",
    ];
    for name in names {
        let path = dir.path().join(std::ffi::OsStr::from_bytes(name));
        ImageSpec::new(2, 64, 6400).write(&path)?;
        let mut command = command::ploopfs(&["info", "--"]);
        let done = command::run(
            command
                .current_dir(dir.path())
                .arg(path.file_name().context("")?),
        )?;
        expect_calm(&done)?;
        ensure!(done.code() == 0, "{}", done.story());
        // A name must not paint the terminal.
        ensure!(
            !done.text().contains('\x1b'),
            "an escape got through: {}",
            done.story()
        );
    }
    Ok(())
}

fn random_bytes_never_panic() -> Outcome {
    let dir = scratch()?;
    let seed = std::env::var("PLOOPFS_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let mut state: u64 = seed.unwrap_or(20_260);
    for round in 0..60 {
        let at = state;
        let path = dir.path().join(format!("{round}.hds"));
        let spec = ImageSpec::new(1 + (round % 2) as u8, 64, 6403).mapping(Mapped::Percent(50));
        spec.write(&path)?;
        let mut bytes = fs::read(&path)?;
        for _ in 0..1 + round % 8 {
            let place = forge::content::splitmix(&mut state) as usize % 500;
            bytes[place] = forge::content::splitmix(&mut state) as u8;
        }
        fs::write(&path, bytes)?;
        let done = say(&["info", text(&path)])?;
        expect_calm(&done).with_context(|| format!("PLOOPFS_SEED={at}"))?;
        fs::remove_file(&path)?;
    }
    Ok(())
}
