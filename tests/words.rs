//! The built program's words: help, errors and exit codes, as far as they need no mount.

use std::fs;
use std::process::{Command, Output, Stdio};

fn ploopfs(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("the program was built for this test")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("messages are UTF-8")
}

#[test]
fn wrong_usage_is_status_1_and_help_is_0() {
    for args in [
        &[][..],
        &["mont"],
        &["mount"],
        &["mount", "--threads", "0", "a", "b"],
    ] {
        let output = ploopfs(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{args:?}"
        );
    }
    for args in [
        &["--help"][..],
        &["mount", "-h"],
        &["--version"],
        &["help", "attach"],
    ] {
        let output = ploopfs(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{args:?}"
        );
    }
    assert!(
        stderr(&ploopfs(&["mont"])).contains("mount"),
        "a suggestion is made"
    );
}

/// As with cmp(1), 1 would read as "they differ".
#[test]
fn wrong_usage_of_a_judge_is_status_2() {
    for verb in ["compare", "checksum"] {
        for before in [
            &[][..],
            &["--json"],
            &["--progress", "never"],
            &["--progress=json", "--json"],
            &["--progress", "compare"],
        ] {
            let args = [before, &[verb, "--no-such-option"]].concat();
            assert_eq!(ploopfs(&args).status.code(), Some(2), "{args:?}");
        }
    }
    let other = ploopfs(&["--progress", "compare", "check"]);
    assert_eq!(other.status.code(), Some(1));
}

#[test]
fn help_fits_lines_of_a_terminal() {
    let verbs = [
        "mount", "umount", "attach", "detach", "list", "info", "check", "repair", "create",
        "resize", "compact", "snapshot", "merge", "convert", "copy", "map", "compare", "measure",
        "checksum",
    ];
    for verb in verbs {
        let output = ploopfs(&[verb, "--help"]);
        let text = String::from_utf8(output.stdout).expect("help is UTF-8");
        assert!(text.lines().all(|line| line.len() <= 100), "{verb}");
    }
}

#[test]
fn a_mountpoint_that_cannot_be_used_says_what_to_do() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let place = directory.path().join("no such place");
    let place = place.to_str().expect("temporary names are UTF-8");
    let image = directory.path().join("x.hds");
    fs::write(&image, [0; 4096]).expect("a small file");
    let image = image.to_str().expect("temporary names are UTF-8");

    let output = ploopfs(&["mount", image, place]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains(&format!("mkdir -p '{place}'")), "{text}");
    assert!(text.contains("data: nothing was changed"), "{text}");

    let output = ploopfs(&["mount", "-o", "snapshto=1", image, place]);
    assert!(
        stderr(&output).contains("did you mean 'snapshot'"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn errors_are_one_json_object_on_request() {
    for args in [
        &["--json", "mount", "/nonexistent/x.hds", "/"][..],
        &["--json", "mont"],
    ] {
        let output = ploopfs(args);
        let value: serde_json::Value =
            serde_json::from_slice(&output.stderr).expect("one JSON document");
        let error = value.get("error").expect("an error object");
        for key in ["kind", "what", "why", "hint"] {
            assert!(error.get(key).is_some(), "{key} in {error}");
        }
    }
}

#[test]
fn what_is_not_ours_is_left_alone() {
    for args in [["umount", "/proc"], ["detach", "/dev/null"]] {
        let output = ploopfs(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
    }
    assert!(fs::metadata("/proc/self").is_ok());
}

#[test]
fn a_reader_that_has_gone_is_no_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ploopfs"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program was built for this test");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert!(output.stderr.is_empty(), "{}", stderr(&output));
}

#[test]
fn progress_is_told_as_it_is_wanted() {
    let dir = tempfile::tempdir().expect("a directory");
    let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.hds"));
    fs::write(&from, vec![7; 3 << 20]).expect("it can be written");
    let (from, to) = (from.to_str().expect("UTF-8"), to.to_str().expect("UTF-8"));
    for (when, begins) in [
        ("json", "{\"progress\":"),
        ("always", "ploopfs: "),
        ("never", ""),
    ] {
        let args = ["convert", "-q", "--progress", when, "-O", "hds", from, to];
        let output = ploopfs(&args);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let said = stderr(&output);
        assert_eq!(said.is_empty(), begins.is_empty(), "{when}: {said}");
        assert!(said.lines().all(|line| line.starts_with(begins)), "{said}");
        fs::remove_file(to).expect("it was made");
    }
    assert_eq!(
        ploopfs(&["list", "--progress", "yes"]).status.code(),
        Some(1)
    );
}
