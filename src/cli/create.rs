//! `ploopfs create`.
//!
//! Imports: `admin`, `error`, `format`.
//! Never: writes over anything that is there.

use super::args::{CreateArgs, For, NewFs, NewKind};
use super::output::{Report, note, print};
use super::progress::Shown;
use super::size::show_size;
use crate::admin::create::mkfs::{FileSystem, FsKind};
use crate::admin::create::{self, Kind, Plan, Product, Request};
use crate::format::header::Version;

/// Version of the JSON document.
const SCHEMA_VERSION: u32 = 1;

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
        version: args.image_version.map(|version| match version {
            1 => Version::V1,
            _ => Version::V2,
        }),
        cluster: args.cluster_size,
        product: match args.product {
            None => Product::Any,
            Some(For::ParallelsDesktop) => Product::Desktop,
            Some(For::Virtuozzo) => Product::Virtuozzo,
        },
        file_system: args.mkfs.map(|kind| FileSystem {
            kind: match kind {
                NewFs::Ext4 => FsKind::Ext4,
                NewFs::Xfs => FsKind::Xfs,
            },
            label: args.label.clone(),
        }),
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
