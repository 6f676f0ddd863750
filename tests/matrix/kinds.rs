//! The disks that every command is tried on: who made them, and how they are kept.
//!
//! Imports: `disk`, `forge`, `peers`, `support`.
//! Never: gives two snapshots of a disk the same content.

use crate::disk::{self, XML};
use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::Level;
use crate::forge::extension::BitmapSpec;
use crate::forge::image::{ImageSpec, Layout, Mapped, PD17, V21};
use crate::peers;
use crate::support::command;
use crate::support::guards::text;
use anyhow::{Context, Result};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// The frozen snapshots of a disk that has some: `SIDE` is beside the chain of the others.
const BASE: &str = "{0c2f3f0e-0001-4a55-8f2e-6a1f3d0b9c11}";
const SIDE: &str = "{0c2f3f0e-0002-4a55-8f2e-6a1f3d0b9c11}";
const FIRST: &str = "{0c2f3f0e-0003-4a55-8f2e-6a1f3d0b9c11}";
const SECOND: &str = "{0c2f3f0e-0004-4a55-8f2e-6a1f3d0b9c11}";

/// What a disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// An image by itself.
    Bare,
    /// An image by itself, with a dirty bitmap of a backup.
    Bitmap,
    /// A bundle of one image.
    Single,
    /// The same with every cluster in its place from the start.
    Preallocated,
    /// Base, two snapshots and the top over each other, and one snapshot beside them.
    Chain,
    /// The same over a plain base.
    OverPlain,
    /// The same in two parts.
    Split,
    /// A bundle of a plain file.
    Plain,
}

/// Whose disk it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    /// The program under test.
    Ploopfs,
    /// ploop.
    Ploop,
    /// qemu-img.
    Qemu,
    /// Parallels Desktop, or what its samples tell of it.
    Parallels,
}

/// A kind of disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) form: Form,
    /// Of its images.
    pub(crate) version: u8,
    /// KiB of a cluster.
    pub(crate) cluster: u64,
    pub(crate) maker: Maker,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            form,
            version,
            cluster,
            maker,
        } = self;
        write!(f, "{form:?}-v{version}-{cluster}K-{maker:?}")
    }
}

/// Every kind.
pub(crate) fn all() -> Vec<Kind> {
    use Form::{Bare, Bitmap, Chain, OverPlain, Plain, Preallocated, Single, Split};
    use Maker::{Parallels, Ploop, Ploopfs, Qemu};
    const EACH: [(u8, u64); 4] = [(1, 64), (1, 1024), (2, 64), (2, 1024)];
    const V1: [(u8, u64); 2] = [(1, 64), (1, 1024)];
    const V2: [(u8, u64); 2] = [(2, 64), (2, 1024)];
    type Row = (Form, Maker, &'static [(u8, u64)]);
    let rows: [Row; 17] = [
        (Chain, Ploopfs, &EACH),
        (Chain, Ploop, &EACH),
        (Chain, Parallels, &[(1, 1024), (2, 64)]),
        (Split, Parallels, &EACH),
        (OverPlain, Ploopfs, &V2),
        (OverPlain, Ploop, &V2),
        (OverPlain, Parallels, &V1),
        (Plain, Ploopfs, &[(2, 1024)]),
        (Plain, Ploop, &[(1, 64)]),
        (Plain, Parallels, &[(1, 1024)]),
        (Single, Parallels, &[(1, 1024)]),
        (Preallocated, Ploopfs, &[(2, 1024)]),
        (Preallocated, Ploop, &[(1, 64)]),
        (Bare, Ploopfs, &EACH),
        (Bare, Qemu, &V2),
        (Bare, Parallels, &V1),
        (Bitmap, Parallels, &[(2, 64)]),
    ];
    // Each form is there in each of its shapes; who made it is varied in all of them only when
    // `PLOOPFS_MATRIX=all` asks for that, since each kind takes seconds.
    let is_whole = std::env::var_os("PLOOPFS_MATRIX").is_some_and(|word| word == "all");
    let mut kinds: Vec<Kind> = Vec::new();
    for (form, maker, shapes) in rows {
        let known = kinds.iter().filter(|kind| kind.form == form);
        let known: Vec<_> = known.map(|kind| (kind.version, kind.cluster)).collect();
        // Of each further maker one of those shapes will do.
        let again = shapes.iter().filter(|shape| known.contains(shape)).nth(1);
        let drops = |shape: &&(u8, u64)| {
            !is_whole && known.contains(shape) && again.is_some_and(|again| again != *shape)
        };
        let wanted: Vec<_> = shapes.iter().filter(|shape| !drops(shape)).collect();
        kinds.extend(wanted.into_iter().map(|&(version, cluster)| Kind {
            form,
            version,
            cluster,
            maker,
        }));
    }
    kinds
}

/// What happens to a disk of many snapshots.
enum Step {
    Write(u64),
    Freeze(&'static str),
    Back(&'static str),
}

const LIFE: [Step; 10] = [
    Step::Write(50),
    Step::Freeze(BASE),
    Step::Write(20),
    Step::Freeze(SIDE),
    Step::Back(BASE),
    Step::Write(30),
    Step::Freeze(FIRST),
    Step::Write(20),
    Step::Freeze(SECOND),
    Step::Write(25),
];

fn ours(args: &[&str]) -> Result<()> {
    command::ok(&mut command::ploopfs(args)).map(|_| ())
}

impl Kind {
    /// Bytes of its disk.
    pub(crate) fn size(&self) -> u64 {
        if self.cluster == 64 {
            8 << 20
        } else {
            16 << 20
        }
    }

    /// A bundle, and no image by itself.
    pub(crate) fn is_bundle(&self) -> bool {
        !matches!(self.form, Form::Bare | Form::Bitmap)
    }

    /// There are snapshots.
    pub(crate) fn has_snapshots(&self) -> bool {
        matches!(self.form, Form::Chain | Form::OverPlain | Form::Split)
    }

    /// The name that the disk has.
    pub(crate) fn file_name(&self) -> &'static str {
        if self.is_bundle() { "d.hdd" } else { "d.hds" }
    }

    /// Makes such a disk in a directory.
    pub(crate) fn make(&self, dir: &Path) -> Result<PathBuf> {
        let disk = dir.join(self.file_name());
        match self.maker {
            Maker::Ploopfs => self.by_ploopfs(&disk),
            Maker::Ploop => self.by_ploop(&disk),
            Maker::Qemu => self.by_qemu(&disk),
            Maker::Parallels => self.forged(&disk),
        }?;
        Ok(disk)
    }

    fn live(&self, disk: &Path, step: impl Fn(&Step) -> Result<()>) -> Result<()> {
        let steps = if self.has_snapshots() {
            &LIFE[..]
        } else {
            &LIFE[..1]
        };
        for (number, one) in (1..).zip(steps) {
            let Step::Write(percent) = one else {
                step(one)?;
                continue;
            };
            disk::scribble(&disk::view(disk)?.top_file()?, number, *percent, 0)?;
        }
        Ok(())
    }

    fn by_ploopfs(&self, disk: &Path) -> Result<()> {
        let format = match self.form {
            Form::Preallocated => "preallocated",
            Form::Plain | Form::OverPlain => "plain",
            _ => "expanding",
        };
        let (version, cluster) = (self.version.to_string(), format!("{}K", self.cluster));
        let size = format!("{}K", self.size() >> 10);
        let args = ["create", "-q", "-s", &size, "-f", format];
        let shape = ["--image-version", &version, "--cluster-size", &cluster];
        // A plain disk has no version.
        let shape = if format == "plain" {
            &shape[2..]
        } else {
            &shape[..]
        };
        ours(&[&args[..], shape, &[text(disk)]].concat())?;
        self.live(disk, |step| match step {
            Step::Freeze(id) => ours(&["snapshot", "create", "-q", "--uuid", id, text(disk)]),
            Step::Back(id) => ours(&["snapshot", "switch", "-qy", text(disk), id]),
            Step::Write(_) => Ok(()),
        })
    }

    fn by_ploop(&self, disk: &Path) -> Result<()> {
        fs::create_dir(disk)?;
        let format = match self.form {
            Form::Preallocated => "preallocated",
            Form::Plain | Form::OverPlain => "raw",
            _ => "expanded",
        };
        let (version, cluster) = (self.version.to_string(), (self.cluster * 2).to_string());
        let size = format!("{}K", self.size() >> 10);
        let args = ["init", "-s", &size, "-f", format, "-t", "none"];
        let shape = ["-v", &version, "-b", &cluster, "root.hds"];
        peers::ploop_in(disk, &[&args[..], &shape].concat())?.expect_code(0)?;
        self.live(disk, |step| match step {
            Step::Freeze(id) => peers::ploop(disk, &["snapshot", "-u", id]),
            Step::Back(id) => peers::ploop(disk, &["snapshot-switch", "-u", id]),
            Step::Write(_) => Ok(()),
        })
    }

    /// qemu-img writes what is in a plain file.
    fn by_qemu(&self, disk: &Path) -> Result<()> {
        let raw = disk.with_extension("raw");
        fs::File::create(&raw)?.set_len(self.size())?;
        disk::scribble(&raw, 1, 50, 0)?;
        let cluster = format!("cluster_size={}K", self.cluster);
        let mut command = command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "parallels", "-o", &cluster]);
        command::ok(command.arg(&raw).arg(disk))?;
        fs::remove_file(raw)?;
        Ok(())
    }

    fn image(&self, percent: u64) -> ImageSpec {
        let cluster = u32::try_from(self.cluster * 2).unwrap_or(128);
        let mut spec = ImageSpec::new(self.version, cluster, self.size() / 512);
        spec.mapped = Mapped::Percent(percent);
        spec.layout = Layout::Shuffled(3);
        spec
    }

    fn forged(&self, disk: &Path) -> Result<()> {
        let mut spec = self.image(50);
        match self.form {
            Form::Bare => return Ok(spec.write(disk)?),
            Form::Bitmap => {
                spec.mark = V21;
                spec.bitmap = Some(BitmapSpec::new(vec![0, 3]));
                return Ok(spec.write(disk)?);
            }
            Form::Single => {
                spec.mark = PD17;
                let levels = vec![Level::Image(spec)];
                return Ok(BundleSpec::new(Style::Parallels, levels).write(disk)?);
            }
            _ => {}
        }
        let base = if matches!(self.form, Form::Plain | Form::OverPlain) {
            let (seed, level, bytes) = (5, 0, self.size());
            Level::Plain { seed, level, bytes }
        } else {
            Level::Image(spec)
        };
        let mut levels = vec![base];
        if self.form != Form::Plain {
            levels.extend([30, 20, 25].map(|percent| Level::Image(self.image(percent))));
        }
        let mut bundle = BundleSpec::new(Style::Parallels, levels.clone());
        if self.form == Form::Split {
            bundle.push_part(levels);
        }
        bundle.write(disk)?;
        if self.form != Form::Plain {
            self.add_side(&bundle, disk)?;
        }
        Ok(())
    }

    /// A snapshot beside the chain, by hand.
    fn add_side(&self, bundle: &BundleSpec, disk: &Path) -> Result<()> {
        let text = fs::read_to_string(disk.join(XML))?;
        let mut parts = text.split("    </Storage>\n");
        let mut whole = parts.next().context("a part")?.to_owned();
        for (number, rest) in parts.enumerate() {
            let name = format!("d.hdd.{number}.{SIDE}.hds");
            let mut spec = self.image(20);
            spec.seed = 77;
            spec.disk_start = bundle.parts[number].start;
            spec.write(&disk.join(&name))?;
            whole += &format!(
                "      <Image>\n        <GUID>{SIDE}</GUID>\n        <Type>Compressed</Type>\n\
                 \x20       <File>{name}</File>\n      </Image>\n    </Storage>\n{rest}"
            );
        }
        let parent = bundle.guid(0);
        let shot = format!(
            "    <Shot>\n      <GUID>{SIDE}</GUID>\n      \
             <ParentGUID>{parent}</ParentGUID>\n    </Shot>\n"
        );
        let whole = whole.replace("  </Snapshots>\n", &format!("{shot}  </Snapshots>\n"));
        fs::write(disk.join(XML), whole)?;
        Ok(())
    }
}
