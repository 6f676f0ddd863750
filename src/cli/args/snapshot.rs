//! The command line of `ploopfs snapshot` and `ploopfs merge`.

use clap::{Args, Subcommand, ValueHint};
use std::path::PathBuf;

/// `ploopfs snapshot`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs snapshot create --name before disk.hdd
  ploopfs snapshot list disk.hdd
  ploopfs snapshot switch --yes disk.hdd before
  ploopfs snapshot delete disk.hdd before")]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: SnapshotVerb,
}

/// What can be done with snapshots.
#[derive(Clone, Debug, Subcommand)]
pub enum SnapshotVerb {
    /// Freeze the disk as it is, and print the snapshot's GUID
    Create(SnapshotCreateArgs),
    /// List the snapshots
    List(SnapshotListArgs),
    /// Draw the snapshots as a tree
    Tree(SnapshotListArgs),
    /// Let the disk be what it was in a snapshot
    Switch(SwitchArgs),
    /// Give a snapshot a name
    Rename(SnapshotRenameArgs),
    /// Delete a snapshot; all others show what they did
    Delete(DeleteArgs),
}

/// `ploopfs snapshot create`.
#[derive(Args, Clone, Debug)]
pub struct SnapshotCreateArgs {
    /// What people call it
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Its GUID, where it must not be a random one
    #[arg(long, value_name = "GUID")]
    pub uuid: Option<String>,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, or a .pvm with one disk
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// `ploopfs snapshot list` and `tree`.
#[derive(Args, Clone, Debug)]
pub struct SnapshotListArgs {
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, or a .pvm with one disk
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// `ploopfs snapshot switch`.
#[derive(Args, Clone, Debug)]
pub struct SwitchArgs {
    /// What was written since becomes a snapshot instead of being lost
    #[arg(long)]
    pub keep: bool,
    /// Say what would be done and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, or a .pvm with one disk
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// GUID, name or `latest`
    pub snapshot: String,
}

/// `ploopfs snapshot rename`.
#[derive(Args, Clone, Debug)]
pub struct SnapshotRenameArgs {
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, or a .pvm with one disk
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// GUID, name or `latest`
    pub snapshot: String,
    /// The new name
    pub name: String,
}

/// `ploopfs snapshot delete`.
#[derive(Args, Clone, Debug)]
pub struct DeleteArgs {
    /// Lose dirty bitmaps of the top, where it is merged
    #[arg(long)]
    pub drop_bitmaps: bool,
    /// Lose the data that the child's disk ends before, where it is merged
    #[arg(long)]
    pub force_discard: bool,
    /// Say what would be done and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, or a .pvm with one disk
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// GUID, name or `latest`
    pub snapshot: String,
}

/// `ploopfs merge`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs merge disk.hdd             the top into the snapshot below it
  ploopfs merge --all disk.hdd       the whole chain into the base
  ploopfs merge --all --into-new all.hds disk.hdd
  ploopfs merge upper.hds lower.hds  images by themselves, the uppermost first
  ploopfs merge --format raw upper.hds base.raw")]
pub struct MergeArgs {
    /// Merge all that is below too, into the base
    #[arg(long)]
    pub all: bool,
    /// Make a new file, in the bundle if IMAGE is one, instead of changing the lower image
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub into_new: Option<PathBuf>,
    /// Lose dirty bitmaps
    #[arg(long)]
    pub drop_bitmaps: bool,
    /// Lose the data that the upper disk ends before
    #[arg(long)]
    pub force_discard: bool,
    /// What the lowest of the images is, if it has no magic number
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<super::Format>,
    /// Say what would be done and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A bundle; or the uppermost of images by themselves
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// The snapshot of the bundle that goes into its parent, instead of the top; or the other
    /// images, the lowest last
    #[arg(value_name = "SNAPSHOT|LOWER", value_hint = ValueHint::FilePath)]
    pub lower: Vec<PathBuf>,
}
