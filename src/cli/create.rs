//! `ploopfs create`.
//!
//! Imports: `admin`, `error`, `format`.
//! Never: writes over anything that is there.

use super::output::{Report, note, print};
use super::progress::Shown;
use super::size::{parse_disk_size, parse_size, show_size};
use crate::admin::create::mkfs::{FileSystem, FsKind};
use crate::admin::create::{self, Kind, Plan, Product, Request};
use crate::format::header::Version;
use clap::{Args, ValueEnum, ValueHint};
use std::path::PathBuf;

/// Version of the JSON document.
const SCHEMA_VERSION: u32 = 1;

/// How a new disk's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NewKind {
    /// The image grows with what is written.
    #[value(alias = "expanded")]
    Expanding,
    /// Every cluster has its place, and the host's blocks, from the start.
    Preallocated,
    /// The disk byte for byte, with holes.
    #[value(alias = "raw")]
    Plain,
}

/// Whose programs must be able to open a new disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum For {
    /// Parallels Desktop.
    ParallelsDesktop,
    /// Virtuozzo and OpenVZ: ploop.
    Virtuozzo,
}

/// A file system that a new disk can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NewFs {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

/// `ploopfs create`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs create -s 64G disk.hdd                          a bundle
  ploopfs create -s 64G disk.hds                          a single image
  ploopfs create -s 10G --mkfs ext4 --label data disk.hdd
  ploopfs create -s 64G --for parallels-desktop disk.hdd")]
pub struct CreateArgs {
    /// Size of the disk: 64G, 1.5T, 20480s (sectors)
    #[arg(short, long, value_name = "SIZE", value_parser = parse_disk_size)]
    pub size: u64,
    /// How its bytes are kept: expanding, preallocated or plain [default: expanding]
    #[arg(
        short,
        long,
        value_enum,
        value_name = "FORMAT",
        hide_possible_values = true
    )]
    pub format: Option<NewKind>,
    /// Version of the image, 1 or 2 [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=2))]
    pub image_version: Option<u8>,
    /// Bytes of a cluster, a power of two from 32K to 64M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub cluster_size: Option<u64>,
    /// Write what this product opens: parallels-desktop or virtuozzo
    #[arg(
        long = "for",
        value_enum,
        value_name = "PRODUCT",
        hide_possible_values = true
    )]
    pub product: Option<For>,
    /// Make a partition with a file system on it: ext4 or xfs
    #[arg(long, value_enum, value_name = "FS", hide_possible_values = true)]
    pub mkfs: Option<NewFs>,
    /// Label of the file system
    #[arg(long, value_name = "LABEL", requires = "mkfs")]
    pub label: Option<String>,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// NAME.hdd for a bundle, NAME.hds for a single image
    #[arg(value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
}

/// Runs the command.
pub fn run(args: &CreateArgs, json: bool) -> Result<(), Box<Report>> {
    let what = format!("cannot create {}", args.path.display());
    let shown = Shown::start(args.quiet || json);
    let made = create::create(&args.path, &request(args), shown.progress());
    drop(shown);
    let plan = made.map_err(|e| {
        let mut report = Report::refused(&what, &e);
        if e.fix_text().is_none_or(|fix| !fix.starts_with("remove ")) {
            report.data.get_or_insert("nothing was left behind".into());
        }
        report
    })?;
    if plan.size_bytes() != args.size && !args.quiet {
        let size = plan.size_bytes();
        note(&format!(
            "the size is rounded up to whole clusters: {size} bytes"
        ));
    }
    if json {
        print(&document(args, &plan));
    } else if !args.quiet {
        print(&text(args, &plan));
    }
    Ok(())
}

fn request(args: &CreateArgs) -> Request {
    Request {
        size: args.size,
        kind: match args.format {
            None | Some(NewKind::Expanding) => Kind::Expanding,
            Some(NewKind::Preallocated) => Kind::Preallocated,
            Some(NewKind::Plain) => Kind::Plain,
        },
        version: args.image_version.map(version),
        cluster: args.cluster_size,
        product: product(args.product),
        file_system: args.mkfs.map(|kind| FileSystem {
            kind: match kind {
                NewFs::Ext4 => FsKind::Ext4,
                NewFs::Xfs => FsKind::Xfs,
            },
            label: args.label.clone(),
        }),
    }
}

/// The version of this number.
pub(super) fn version(number: u8) -> Version {
    match number {
        1 => Version::V1,
        _ => Version::V2,
    }
}

/// The product that the user has named.
pub(super) fn product(named: Option<For>) -> Product {
    match named {
        None => Product::Any,
        Some(For::ParallelsDesktop) => Product::Desktop,
        Some(For::Virtuozzo) => Product::Virtuozzo,
    }
}

fn text(args: &CreateArgs, plan: &Plan) -> String {
    let name = args.path.display().to_string();
    let name = crate::error::Shown(&name);
    let (size, kind) = (show_size(plan.size_bytes()), plan.kind.word());
    if plan.kind == Kind::Plain {
        return format!("{name}: {size}, {kind}\n");
    }
    let cluster = show_size(plan.shape.cluster.bytes());
    let version = plan.shape.version.number();
    format!("{name}: {size}, {kind}, version {version}, clusters of {cluster}\n")
}

fn document(args: &CreateArgs, plan: &Plan) -> String {
    let is_plain = plan.kind == Kind::Plain;
    let document = serde_json::json!({
        "schema_version": SCHEMA_VERSION,
        "image": args.path.display().to_string(),
        "kind": if plan.is_bundle { "bundle" } else { "image" },
        "format": plan.kind.word(),
        "size_bytes": plan.size_bytes(),
        "version": (!is_plain).then(|| plan.shape.version.number()),
        "cluster_bytes": (!is_plain).then(|| plan.shape.cluster.bytes()),
    });
    format!("{document:#}\n")
}
