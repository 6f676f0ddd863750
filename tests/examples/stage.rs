//! Where an example is played: what must be there, the terminal, and the clearing away.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Model;
use crate::forge::corrupt;
use crate::forge::image::{ImageSpec, Layout, Mapped};
use crate::page::Line;
use crate::support::guards::text;
use crate::support::{self, MIB, Outcome, PLOOPFS, command};
use anyhow::{Context, Result, ensure};
use nix::pty::openpty;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Something that must be there before; names may be below `/`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Thing {
    Dir(&'static str),
    /// A bundle of three levels, of 4 MiB.
    Chain(&'static str),
    /// A chain, and the same disk as a raw file.
    Twins(&'static str, &'static str),
    /// An empty bundle of this size.
    Empty(&'static str, &'static str),
    /// A bundle with a file system on the first partition.
    Container(&'static str),
    /// A bundle whose whole disk is a file system.
    Unpartitioned(&'static str),
    /// A bundle with so many partitions, a file system on each.
    Partitions(&'static str, u8),
    /// Three images, base first.
    Levels([&'static str; 3]),
    /// A bundle with wasted space in it.
    Wasted(&'static str),
    /// A single image, mounted.
    Mounted(&'static str, &'static str),
    /// A container's bundle, attached.
    Attached(&'static str),
}

/// A directory that stands for the root directory and the home, and is the current one.
pub(crate) struct Stage {
    dir: tempfile::TempDir,
    /// The loop device that stands for `/dev/loop0`.
    device: Option<String>,
}

const CLUSTER: u32 = 64;

fn spec() -> ImageSpec {
    let mut spec = ImageSpec::new(2, CLUSTER, 8192).mapping(Mapped::Percent(30));
    spec.layout = Layout::Gaps(1);
    spec
}

fn ploopfs(args: &[&str]) -> Result<String> {
    command::ok(&mut command::ploopfs(args))
}

impl Stage {
    pub(crate) fn new(things: &[Thing]) -> Result<Self> {
        let mut stage = Self {
            dir: support::scratch()?,
            device: None,
        };
        for thing in things {
            stage.put(*thing).with_context(|| format!("{thing:?}"))?;
        }
        Ok(stage)
    }

    fn at(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(name.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a name")?)?;
        Ok(path)
    }

    fn put(&mut self, thing: Thing) -> Outcome {
        match thing {
            Thing::Dir(name) => fs::create_dir_all(self.at(name)?)?,
            Thing::Chain(name) => {
                chain().write(&self.at(name)?)?;
            }
            Thing::Twins(name, raw) => {
                let model: Model = chain().model();
                chain().write(&self.at(name)?)?;
                fs::write(self.at(raw)?, model.read(0, 8192 * 512))?;
            }
            Thing::Empty(name, size) => {
                ploopfs(&["create", "-q", "-s", size, text(&self.at(name)?)])?;
            }
            Thing::Container(name) => {
                let path = self.at(name)?;
                ploopfs(&["create", "-q", "-s", "64M", "--mkfs", "ext4", text(&path)])?;
            }
            Thing::Unpartitioned(name) => self.partitioned(name, 0)?,
            Thing::Partitions(name, count) => self.partitioned(name, count)?,
            Thing::Levels(names) => {
                let bundle = self.at("levels.hdd")?;
                let chain = chain();
                chain.write(&bundle)?;
                for (from, to) in chain.files(&bundle, 0).iter().zip(names) {
                    fs::rename(from, self.at(to)?)?;
                }
            }
            Thing::Wasted(name) => {
                let path = self.at(name)?;
                let bundle = BundleSpec::chain(Style::Ploop, &spec(), 1, |_, _| {});
                bundle.write(&path)?;
                corrupt::apply("t-leak-tail", &bundle.files(&path, 0)[0])?;
            }
            Thing::Mounted(name, place) => {
                let (image, place) = (self.at(name)?, self.at(place)?);
                spec().write(&image)?;
                fs::create_dir_all(&place)?;
                ploopfs(&["mount", text(&image), text(&place)])?;
            }
            Thing::Attached(name) => {
                self.put(Thing::Container(name))?;
                let said = ploopfs(&["attach", text(&self.at(name)?)])?;
                self.device = Some(said.trim().to_owned());
            }
        }
        Ok(())
    }

    /// A disk with an MBR, and 8 MiB of ext4 in each partition; without any, all is one.
    fn partitioned(&self, name: &str, count: u8) -> Outcome {
        let raw = self.at("disk.raw")?;
        let file = File::create(&raw)?;
        file.set_len((8 * u64::from(count.max(1)) + 1) * MIB)?;
        let starts = (0..u64::from(count)).map(|n| (8 * n + 1) * MIB);
        for (start, entry) in starts.clone().zip((446..).step_by(16)) {
            let mut bytes = [0; 16];
            bytes[4] = 0x83;
            bytes[8..12].copy_from_slice(&u32::try_from(start / 512)?.to_le_bytes());
            bytes[12..].copy_from_slice(&u32::try_from(8 * MIB / 512)?.to_le_bytes());
            file.write_all_at(&bytes, entry)?;
        }
        if count > 0 {
            file.write_all_at(&[0x55, 0xaa], 510)?;
        }
        for start in starts.chain((count == 0).then_some(0)) {
            let offset = format!("offset={start}");
            let mut mkfs = command::new("mkfs.ext4");
            mkfs.args(["-q", "-F", "-E", &offset]).arg(&raw).arg("8M");
            command::ok(&mut mkfs)?;
        }
        ploopfs(&["convert", "-q", text(&raw), text(&self.at(name)?)])?;
        Ok(fs::remove_file(&raw)?)
    }

    /// What the line is here.
    fn here(&self, typed: &str) -> String {
        let root = text(self.dir.path());
        let mut line = typed.to_owned();
        for top in ["/mnt", "/vz"] {
            line = line.replace(&format!(" {top}"), &format!(" {root}{top}"));
        }
        match &self.device {
            Some(device) => line.replace("/dev/loop0", device),
            None => line,
        }
    }

    /// Types a line, and holds the answer against the page's.
    pub(crate) fn play(&mut self, line: &Line, code: i32) -> Outcome {
        let here = self.here(&line.typed);
        let bin = Path::new(PLOOPFS).parent().context("a directory")?;
        let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let terminal = openpty(None, None)?;
        // One yes for each question that may come.
        File::from(terminal.master.try_clone()?).write_all(b"y\ny\n")?;
        let mut shell = command::new("bash");
        shell
            .args(["-ec", &here])
            .env("PATH", format!("{}:{usual}", text(bin)))
            .env("HOME", self.dir.path())
            .stdin(Stdio::from(terminal.slave))
            .current_dir(self.dir.path());
        let done = command::run(&mut shell)?;
        drop(terminal.master);
        let done = done.expect_code(code)?;
        let answer = done.text();
        if here.contains("attach ") && answer.starts_with("/dev/loop") {
            self.device = Some(answer.trim().to_owned());
        }
        if here.contains("losetup --find") {
            self.device = Some(answer.trim().to_owned());
        }
        if !line.answer.is_empty() {
            let wanted = self.here(&line.answer.join(" "));
            let words = |text: &str| -> Vec<String> {
                text.split_whitespace().map(ToOwned::to_owned).collect()
            };
            ensure!(
                words(&wanted) == words(&answer),
                "not {wanted:?}: {}",
                done.story()
            );
        }
        Ok(())
    }
}

fn chain() -> BundleSpec {
    BundleSpec::chain(Style::Ploop, &spec(), 3, |_, _| {})
}

impl Drop for Stage {
    /// Undoes what the example left mounted or attached, and nothing else.
    fn drop(&mut self) {
        let root = text(self.dir.path()).to_owned();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let places = table
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(4));
        for place in places.filter(|place| place.starts_with(&root)) {
            let unmounted = command::run(command::ploopfs(&["umount"]).arg(place));
            if !unmounted.is_ok_and(|done| done.status.success()) {
                let _ = command::run(command::new("umount").arg(place));
            }
        }
        let listed = ploopfs(&["list", "--json"]).unwrap_or_default();
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap_or_default();
        for one in listed["mounts"].as_array().into_iter().flatten() {
            let image = one["image"].as_str().unwrap_or_default();
            if image.starts_with(&root) {
                let _ = ploopfs(&["detach", image]);
            }
        }
    }
}
