//! Makes a disk from another one of any kind.
//!
//! What is made is made as [`create`] does it: under a temporary name, synced, renamed. The source
//! is only read. Clusters of zeros, stored or not, get no place in the target; where source and
//! target share a file system that can, blocks are shared instead of copied (`copy`).
//!
//! qcow2 is written by `qemu-img`, from a flat file without a name that keeps the holes: no library
//! for it can be built by the compiler that this program promises.

mod copy;
mod qcow2;
mod runs;

pub use copy::stream;

use crate::admin::create::{self, Ids, Kind, Plan, Product, Request, create_in};
use crate::admin::progress::Progress;
use crate::admin::source::Source;
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::Version;
use crate::storage::Directory;
use std::path::{Path, PathBuf};

/// What a disk is converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The disk's bytes as they are, with holes.
    Raw,
    /// A single image.
    Image,
    /// A bundle.
    Bundle,
    /// QEMU's own format.
    Qcow2,
}

impl Output {
    /// What the target's name says.
    #[must_use]
    pub fn of_name(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "hdd" => Some(Self::Bundle),
            "hds" => Some(Self::Image),
            "qcow2" => Some(Self::Qcow2),
            "raw" | "img" => Some(Self::Raw),
            _ => None,
        }
    }

    const fn is_ours(self) -> bool {
        matches!(self, Self::Image | Self::Bundle)
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// What is made.
    pub output: Output,
    /// The version of an image.
    pub version: Option<Version>,
    /// Bytes of its clusters.
    pub cluster: Option<u64>,
    /// Who must be able to open it.
    pub product: Product,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Converted {
    /// Bytes of the new disk.
    pub size: u64,
    /// Things to tell the user.
    pub notes: Vec<String>,
}

/// Makes a disk of the content of a source, which people call `path`.
pub fn convert(
    source: &dyn Source,
    path: &Path,
    target: &Path,
    wanted: &Wanted,
    progress: &Progress,
) -> Result<Converted> {
    let (plan, made) = begin(source, wanted)?;
    let (parent, name) = create::place_for(target)?;
    create::check_name(name, &plan)?;
    let files: Vec<&Path> = source.files().iter().map(PathBuf::as_path).collect();
    create::refuse_within(&parent, path, &files)?;
    if wanted.output == Output::Qcow2 {
        source.prepare(progress)?;
        progress.check()?;
        qcow2::write(source, &parent, name, plan.shape.cluster, progress)?;
    } else {
        make(source, &parent, name, &plan, &Ids::new()?, progress)?;
    }
    Ok(made)
}

/// The same in any directory; only this program's own formats and raw files can be made there.
pub fn convert_in(
    source: &dyn Source,
    (parent, name): (&dyn Directory, &str),
    wanted: &Wanted,
    ids: &Ids,
    progress: &Progress,
) -> Result<Converted> {
    let (plan, made) = begin(source, wanted)?;
    if wanted.output == Output::Qcow2 {
        let why = "qcow2 is written by another program, which needs a directory of the host";
        return Err(Error::why(ErrorKind::Unsupported, why));
    }
    make(source, parent, name, &plan, ids, progress)?;
    Ok(made)
}

fn make(
    source: &dyn Source,
    parent: &dyn Directory,
    name: &str,
    plan: &Plan,
    ids: &Ids,
    progress: &Progress,
) -> Result<()> {
    source.prepare(progress)?;
    progress.check()?;
    create_in(parent, name, plan, ids, progress, |file| {
        copy::copy(source, file, plan.shape.cluster, progress)
    })
}

/// What the target will be; refuses what cannot be made.
fn begin(source: &dyn Source, wanted: &Wanted) -> Result<(Plan, Converted)> {
    let given = wanted.version.is_some() || wanted.cluster.is_some();
    if !wanted.output.is_ours() && (given || wanted.product != Product::Any) {
        let why = "a version, a cluster size or a product is for targets of ours only";
        return Err(Error::why(ErrorKind::Usage, why).fix("-O hds or -O hdd"));
    }
    if wanted.output.is_ours() && source.is_encrypted() {
        let why = "the disk is encrypted, and a new disk would lack what its key is made from";
        let fix = "`ploopfs copy` keeps it; -O raw gives the ciphertext";
        return Err(Error::why(ErrorKind::Unsupported, why).fix(fix));
    }
    let mut notes = Vec::new();
    let plan = plan(source.size(), wanted)?;
    let unaligned = plan.size_bytes() % plan.shape.cluster.bytes() != 0;
    if wanted.output.is_ours() && unaligned {
        notes.push(
            "the disk does not end with a cluster: ploop's check would drop the last one; \
             with --for virtuozzo the disk is made longer"
                .to_owned(),
        );
    }
    let size = plan.size_bytes();
    Ok((plan, Converted { size, notes }))
}

/// The target as a new disk. A named product gets whole clusters; else the size is kept, because
/// the second copy of a partition table lies at the end of a disk.
fn plan(size: u64, wanted: &Wanted) -> Result<Plan> {
    let request = Request {
        size,
        kind: match wanted.output {
            Output::Raw | Output::Qcow2 => Kind::Plain,
            Output::Image | Output::Bundle => Kind::Expanding,
        },
        version: wanted.version,
        cluster: wanted.cluster,
        product: wanted.product,
        file_system: None,
    };
    let is_bundle = wanted.output == Output::Bundle;
    create::plan_as(is_bundle, &request, wanted.product != Product::Any)
}
