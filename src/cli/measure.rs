//! `ploopfs measure`.
//!
//! Imports: `admin`.
//! Never: reads what is on the disk; its map is enough.

use super::output::{Report, print};
use super::size::parse_size;
use super::source::{self, ReadArgs};
use crate::admin::measure::{CLUSTER_DEFAULT, Measured, Target, measure, measure_size};
use crate::units::{ClusterSize, SECTOR};
use clap::{Args, ValueEnum, ValueHint};
use std::path::PathBuf;

/// Targets, as they are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// The disk's bytes as they are
    Raw,
    /// A single ploop or Parallels image
    Hds,
    /// A bundle
    Hdd,
    /// QEMU
    Qcow2,
}

/// `ploopfs measure`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs measure -O qcow2 disk.hdd
  ploopfs measure -O hdd vm.qcow2
  ploopfs measure -O hds --size 100G")]
pub struct MeasureArgs {
    /// What it would be converted to
    #[arg(short = 'O', value_enum, value_name = "FORMAT", default_value = "raw")]
    pub output: Output,
    /// Cluster size of an hds or hdd (1M)
    #[arg(long, value_name = "SIZE", value_parser = parse_cluster)]
    pub cluster_size: Option<u64>,
    /// An empty disk of this size instead of an image
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "image")]
    pub size: Option<u64>,
    /// Which disk.
    #[command(flatten)]
    pub select: ReadArgs,
    /// A disk of any kind
    #[arg(value_hint = ValueHint::AnyPath, required_unless_present = "size")]
    pub image: Option<PathBuf>,
}

fn parse_cluster(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    let sectors = u32::try_from(bytes / SECTOR).ok();
    let is_known = sectors.is_some_and(|sectors| ClusterSize::from_sectors(sectors).is_some());
    if is_known && bytes % SECTOR == 0 {
        return Ok(bytes);
    }
    Err(format!("{text} is no cluster size: it takes whole sectors"))
}

/// Runs the command.
pub fn run(args: &MeasureArgs, json: bool) -> Result<(), Box<Report>> {
    let cluster = args.cluster_size.unwrap_or(CLUSTER_DEFAULT);
    let target = match args.output {
        Output::Raw => Target::Raw,
        Output::Hds => Target::Image(cluster),
        Output::Hdd => Target::Bundle(cluster),
        Output::Qcow2 => Target::Qcow2,
    };
    let (what, measured) = match (&args.image, args.size) {
        (Some(image), _) => {
            let what = format!("cannot measure {}", image.display());
            let source = source::open(image, &args.select.asked_for_map(), &what, false)?;
            let measured = measure(source.as_ref(), target);
            (what, measured)
        }
        (None, size) => {
            let measured = measure_size(size.unwrap_or(0), target);
            ("cannot measure such a disk".to_owned(), measured)
        }
    };
    let measured = measured.map_err(|e| Report::refused(&what, &e))?;
    if json {
        print(&source::document(&measured, &what)?);
    } else {
        print(&text(&measured));
    }
    Ok(())
}

fn text(measured: &Measured) -> String {
    let Measured {
        required,
        fully_allocated,
        data,
    } = measured;
    format!(
        "required size: {required}\nfully allocated size: {fully_allocated}\ndata size: {data}\n"
    )
}
