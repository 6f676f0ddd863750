//! Makes odd disk images, breaks them in named ways, and reads them in the simplest way there is.
//!
//! `cargo run --example forge -- --help`; the same code serves the tests as their oracle.

#[path = "forge/mod.rs"]
mod forge;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use forge::bundle::{BundleSpec, Style};
use forge::content::Level;
use forge::corrupt;
use forge::extension::BitmapSpec;
use forge::image::{FirstBlock, ImageSpec, Layout, Mapped};
use forge::reader::{self, Flat};
use std::io::Write;
use std::path::PathBuf;

#[derive(Parser)]
#[command(about = "Makes odd ploop and Parallels images, breaks them, reads them")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Writes one image file.
    Image {
        path: PathBuf,
        #[command(flatten)]
        image: ImageArgs,
    },
    /// Writes a bundle: a chain, or a split disk of several such chains.
    Bundle {
        dir: PathBuf,
        #[command(flatten)]
        image: ImageArgs,
        /// Levels of the chain, the base included.
        #[arg(long, default_value_t = 1)]
        depth: usize,
        /// The base is plain, of so many bytes.
        #[arg(long)]
        plain_base: Option<u64>,
        /// Cluster sizes of further parts, in sectors.
        #[arg(long, value_delimiter = ',')]
        more_parts: Vec<u32>,
        #[arg(long, value_enum, default_value = "ploop")]
        style: StyleArg,
        /// Write no TopGUID (Parallels style never does).
        #[arg(long)]
        no_top_guid: bool,
    },
    /// Breaks an image or a bundle.
    Corrupt { path: PathBuf, name: String },
    /// Lists the names that `corrupt` knows, with their rows in the table of malformed input.
    Names,
    /// Prints the flat bytes of an image, a bundle, or a chain of files (base first).
    Read {
        paths: Vec<PathBuf>,
        #[arg(long)]
        snapshot: Option<String>,
        #[arg(long, default_value_t = 0)]
        at: u64,
        #[arg(long)]
        len: Option<u64>,
        /// Print the sha256 of the whole disk instead.
        #[arg(long)]
        sha256: bool,
    },
    /// Tells everything that a closed image should not be.
    Check { path: PathBuf },
}

#[derive(Clone, Copy, ValueEnum)]
enum StyleArg {
    Ploop,
    Parallels,
}

#[derive(Clone, Copy, ValueEnum)]
enum LayoutArg {
    Packed,
    Identity,
    Shuffled,
    Gaps,
    Reversed,
}

#[derive(Clone, Copy, ValueEnum)]
enum FirstArg {
    Minimum,
    Extra,
    Zero,
    Unaligned,
}

#[derive(Args)]
struct ImageArgs {
    /// Version of the format, 1 or 2.
    #[arg(long = "format-version", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=2))]
    version: u8,
    /// Cluster size in sectors.
    #[arg(long, default_value_t = 2048)]
    cluster: u32,
    /// Size of the disk in sectors.
    #[arg(long, default_value_t = 204_800)]
    size: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Percentage of clusters that are mapped.
    #[arg(long, default_value_t = 50)]
    fill: u64,
    #[arg(long, value_enum, default_value = "packed")]
    layout: LayoutArg,
    #[arg(long, value_enum, default_value = "minimum")]
    first_block: FirstArg,
    /// Unused clusters at the end.
    #[arg(long, default_value_t = 0)]
    tail: u64,
    /// In-use mark: 0, 1, Ynot, v2.1, pd17 or pd22.
    #[arg(long, default_value = "0")]
    mark: String,
    #[arg(long)]
    garbage: bool,
    #[arg(long)]
    no_data: bool,
    /// Dirty bits of a bitmap in a format extension.
    #[arg(long, value_delimiter = ',')]
    bitmap: Option<Vec<u64>>,
    /// Break the result in this way.
    #[arg(long)]
    corrupt: Vec<String>,
}

impl ImageArgs {
    fn spec(&self) -> anyhow::Result<ImageSpec> {
        let mut spec = ImageSpec::new(self.version, self.cluster, self.size);
        spec.seed = self.seed;
        spec.mapped = match self.fill {
            0 => Mapped::Nothing,
            1..=99 => Mapped::Percent(self.fill),
            _ => Mapped::All,
        };
        spec.layout = match self.layout {
            LayoutArg::Packed => Layout::Packed,
            LayoutArg::Identity => Layout::Identity,
            LayoutArg::Shuffled => Layout::Shuffled(self.seed),
            LayoutArg::Gaps => Layout::Gaps(1),
            LayoutArg::Reversed => Layout::Reversed,
        };
        spec.first_block = match self.first_block {
            FirstArg::Minimum => FirstBlock::Minimum,
            FirstArg::Extra => FirstBlock::Extra(2),
            FirstArg::Zero => FirstBlock::Zero,
            FirstArg::Unaligned => FirstBlock::Unaligned,
        };
        spec.tail = self.tail;
        spec.garbage = self.garbage;
        spec.no_data = self.no_data;
        spec.bitmap = self.bitmap.clone().map(BitmapSpec::new);
        spec.mark = match self.mark.as_str() {
            "0" if spec.bitmap.is_some() => forge::image::V21,
            "0" => 0,
            "1" => 1,
            word => match word.as_bytes() {
                [a, b, c, d] => u32::from_le_bytes([*a, *b, *c, *d]),
                _ => bail!("a mark is 0, 1 or four letters, not {word}"),
            },
        };
        Ok(spec)
    }
}

fn bundle(
    image: &ImageArgs,
    depth: usize,
    plain_base: Option<u64>,
    more: &[u32],
    style: StyleArg,
) -> anyhow::Result<BundleSpec> {
    let style = match style {
        StyleArg::Ploop => Style::Ploop,
        StyleArg::Parallels => Style::Parallels,
    };
    let levels = |cluster: u32| -> anyhow::Result<Vec<Level>> {
        let mut spec = image.spec()?;
        spec.cluster_sectors = cluster;
        let mut levels = vec![Level::Image(spec); depth];
        if let (Some(bytes), Some(base)) = (plain_base, levels.first_mut()) {
            *base = Level::Plain {
                seed: image.seed,
                level: 0,
                bytes,
            };
        }
        Ok(levels)
    };
    let mut spec = BundleSpec::new(style, levels(image.cluster)?);
    for cluster in more {
        spec.push_part(levels(*cluster)?);
    }
    Ok(spec)
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().verb {
        Verb::Image { path, image } => {
            image
                .spec()?
                .write(&path)
                .with_context(|| path.display().to_string())?;
            for name in &image.corrupt {
                corrupt::apply(name, &path)?;
            }
        }
        Verb::Bundle {
            dir,
            image,
            depth,
            plain_base,
            more_parts,
            style,
            no_top_guid,
        } => {
            let mut spec = bundle(&image, depth, plain_base, &more_parts, style)?;
            spec.top_guid &= !no_top_guid;
            spec.write(&dir)
                .with_context(|| dir.display().to_string())?;
            for name in &image.corrupt {
                corrupt::apply(name, &dir)?;
            }
        }
        Verb::Corrupt { path, name } => corrupt::apply(&name, &path)?,
        Verb::Names => {
            for corruption in corrupt::ALL {
                writeln!(
                    std::io::stdout(),
                    "{:24} {}",
                    corruption.name,
                    corruption.row
                )?;
            }
        }
        Verb::Read {
            paths,
            snapshot,
            at,
            len,
            sha256,
        } => {
            let flat = match &paths[..] {
                [one] => Flat::open_at(one, snapshot.as_deref())?,
                many => Flat::chain(many)?,
            };
            if sha256 {
                writeln!(std::io::stdout(), "{}", flat.sha256()?)?;
            } else if let Some(len) = len {
                std::io::stdout().write_all(&flat.read(at, usize::try_from(len)?)?)?;
            } else {
                flat.copy_to(&mut std::io::stdout().lock())?;
            }
        }
        Verb::Check { path } => {
            let wrong = reader::check(&path)?;
            for line in &wrong {
                writeln!(std::io::stdout(), "{line}")?;
            }
            if !wrong.is_empty() {
                bail!("{} is not a clean image", path.display());
            }
        }
    }
    Ok(())
}
