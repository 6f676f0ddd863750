//! The other programs: ploop, and qemu-img with a chain told by hand.
//!
//! Imports: `disk`, `support`.
//! Never: lets another program near a file that is still needed, unless the test is about that.

use crate::disk::{self, View, XML};
use crate::forge::reader;
use crate::support::command::{self, Finished};
use crate::support::guards::text;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;

/// ploop asks its kernel module whether it may make images of version 2. Where there is none, it
/// finds the answer in a mount namespace of its own. `PATH` is set here: set for the child, it
/// would make every start copy the page tables of a large process.
const ASKED: &str = "\
    PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH; \
    if ! test -e /sys/module/ploop; then \
        mount -t tmpfs none /sys/module; \
        mkdir -p /sys/module/ploop/parameters; \
        echo 1 >/sys/module/ploop/parameters/large_disk_support; \
    fi; PLOOP_PADDING=$(printf %8192s x); export PLOOP_PADDING; exec ploop \"$@\"";

/// ploop, which crashes in a small environment, in this directory.
pub(crate) fn ploop_in(dir: &Path, args: &[&str]) -> Result<Finished> {
    let mut command = command::new("unshare");
    command.args(["-m", "sh", "-ec", ASKED, "ploop"]).args(args);
    command::run(command.current_dir(dir))
}

/// A verb of ploop on a bundle, which must succeed.
pub(crate) fn ploop(disk: &Path, args: &[&str]) -> Result<()> {
    let descriptor = disk.join(XML);
    let args = [args, &[text(&descriptor)]].concat();
    ploop_in(disk, &args)?.expect_code(0)?;
    Ok(())
}

/// ploop finds nothing to say about an image, and nothing to write to a copy of it. Its own verbs
/// set the flag that says "empty" on small images with data; where they may have, it is let be.
pub(crate) fn ploop_check(image: &Path, scratch: &Path, is_flag_excused: bool) -> Result<()> {
    let copy = scratch.join("ploop.copy");
    fs::copy(image, &copy)?;
    if is_flag_excused {
        disk::clear_empty(&copy)?;
    }
    let before = fs::read(&copy)?;
    let args = ["check", "-f", "-c", "-r", text(&copy)];
    let done = ploop_in(scratch, &args)?.expect_code(0)?;
    let same = before == fs::read(&copy)?;
    ensure!(same, "ploop had something to mend: {}", done.story());
    fs::remove_file(copy)?;
    Ok(())
}

/// ploop sees the same snapshots in the same files.
pub(crate) fn ploop_list(disk: &Path, view: &View) -> Result<()> {
    let fields = "parent_uuid,uuid,fname";
    let descriptor = disk.join(XML);
    let args = ["snapshot-list", "-H", "-o", fields, text(&descriptor)];
    let said = ploop_in(disk, &args)?.expect_code(0)?.text();
    let mut listed: Vec<String> = said
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect();
    let real = fs::canonicalize(disk)?;
    let mut wanted = Vec::new();
    for shot in &view.shots {
        let none = crate::forge::bundle::NONE;
        let parent = shot.parent.as_deref().unwrap_or(none);
        let name = shot.files[0].file_name().context("a name")?;
        let file = real.join(name);
        wanted.push(format!("{parent} {} {}", shot.guid, text(&file)));
    }
    listed.sort();
    wanted.sort();
    ensure!(listed == wanted, "ploop lists {listed:#?}, not {wanted:#?}");
    Ok(())
}

/// The blocks from the base up to a snapshot, as qemu is told of them.
fn node(view: &View, guid: &str) -> Result<Value> {
    let mut below = Value::Null;
    for shot in view.chain(guid)? {
        let file = &shot.files[0];
        let is_plain = reader::fields(&File::open(file)?)?.is_none();
        let driver = if is_plain { "raw" } else { "parallels" };
        let mut node = json!({
            "driver": driver,
            "file": {"driver": "file", "filename": text(file)},
        });
        if !below.is_null() {
            node["backing"] = below;
        }
        below = node;
    }
    Ok(below)
}

/// qemu-img finds an image right.
pub(crate) fn qemu_check(image: &Path) -> Result<()> {
    let mut command = command::new("qemu-img");
    command.args(["check", "-q", "-f", "parallels"]).arg(image);
    command::ok(&mut command)?;
    Ok(())
}

/// qemu-img reads the same from a snapshot as is in a plain file.
pub(crate) fn qemu_compare(view: &View, guid: &str, raw: &Path) -> Result<()> {
    let name = format!("json:{}", node(view, guid)?);
    let mut command = command::new("qemu-img");
    command.args(["compare", "-q", "-F", "raw", &name]).arg(raw);
    command::ok(&mut command).with_context(|| format!("qemu-img, {guid}"))?;
    Ok(())
}
