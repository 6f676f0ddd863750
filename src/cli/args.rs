//! The command line, as clap sees it.
//!
//! Imports: nothing but its siblings.
//! Never: does anything; a value that parses may still be impossible.

mod snapshot;

pub use snapshot::{
    DeleteArgs, MergeArgs, SnapshotArgs, SnapshotCreateArgs, SnapshotListArgs, SnapshotRenameArgs,
    SnapshotVerb, SwitchArgs,
};

use super::checksum::ChecksumArgs;
use super::compare::CompareArgs;
use super::convert::ConvertArgs;
use super::copy::CopyArgs;
use super::create::CreateArgs;
use super::map::MapArgs;
use super::measure::MeasureArgs;
use super::options::{
    Settings, parse_enospc, parse_order, parse_step, parse_threads, parse_transport,
};
use super::progress::When;
use super::size::{parse_change, parse_millis, parse_size};
use crate::admin::resize::disk::Change;
use crate::disk::EnospcPolicy;
use crate::fuse::session::Transport;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::ffi::OsString;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ploopfs mount disk.hdd /mnt/img            /mnt/img/disk.img is the disk
  losetup -f --show --direct-io=on /mnt/img/disk.img
  ploopfs umount /mnt/img                    returns when the image is closed

  ploopfs attach disk.hdd                    prints /dev/loopN
  ploopfs detach disk.hdd";

/// Ploop and Parallels disk images as flat files and loop devices.
#[derive(Debug, Parser)]
#[command(name = "ploopfs", version, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(subcommand_required = true, disable_help_flag = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// Print results and errors as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Show how far it is on standard error: auto, always, never, json
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    #[arg(hide_default_value = true, hide_possible_values = true)]
    pub progress: When,
    /// Print help
    #[arg(short, long, global = true, action = ArgAction::HelpShort)]
    pub help: Option<bool>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Mount an image: the disk appears as a flat file
    Mount(MountArgs),
    /// Unmount, and wait until the image is closed
    #[command(visible_alias = "unmount")]
    Umount(UmountArgs),
    /// Put a loop device on an image and print its name
    Attach(AttachArgs),
    /// Take the loop device away, and wait until the image is closed
    Detach(DetachArgs),
    /// Show what is mounted and attached
    List,
    /// Show what an image is made of
    Info(InfoArgs),
    /// Find what is wrong with an image, without changing it
    Check(CheckArgs),
    /// Mend an image that is not in use
    Repair(RepairArgs),
    /// Give a disk another size
    Resize(ResizeArgs),
    /// Make the file of an image as small as what it holds
    Compact(CompactArgs),
    /// Make a new disk
    #[command(alias = "init")]
    Create(CreateArgs),
    /// Make, list, delete snapshots, or go back to one
    Snapshot(SnapshotArgs),
    /// Merge images of a chain
    Merge(MergeArgs),
    /// Make a disk from one of any kind
    Convert(ConvertArgs),
    /// Copy a disk with its snapshots
    Copy(CopyArgs),
    /// Show where the bytes of a disk are
    Map(MapArgs),
    /// Tell whether two disks of any kind are equal
    Compare(CompareArgs),
    /// Tell what a conversion will need
    Measure(MeasureArgs),
    /// Sum up a disk, or hold it against its sums
    Checksum(ChecksumArgs),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Formats that cannot be recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A plain image, byte for byte the disk
    Raw,
}

/// Which disk.
#[derive(Args, Clone, Debug)]
pub struct SelectArgs {
    /// Show the disk as of a snapshot, read-only: GUID, name or `latest`
    #[arg(long, value_name = "ID", help_heading = "Which disk")]
    pub snapshot: Option<String>,
    /// A delta below IMAGE, base first (repeatable)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Which disk")]
    pub lower: Vec<PathBuf>,
    /// What a file without a magic number is
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Which disk")]
    pub format: Option<Format>,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Which disk")]
    pub allow_outside: Vec<PathBuf>,
}

impl SelectArgs {
    /// Adds these to the settings.
    pub fn apply(&self, settings: &mut Settings) {
        let selection = &mut settings.selection;
        if let Some(snapshot) = &self.snapshot {
            selection.snapshot = Some(snapshot.clone());
        }
        selection.lower.extend(self.lower.iter().cloned());
        selection
            .allow_outside
            .extend(self.allow_outside.iter().cloned());
        selection.raw |= self.format == Some(Format::Raw);
    }
}

/// How the disk is served.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// Nobody may write
    #[arg(short, long)]
    pub read_only: bool,
    /// Stay in the foreground
    #[arg(short, long)]
    pub foreground: bool,
    /// Stay in the foreground and log every detail
    #[arg(short, long)]
    pub debug: bool,
    /// Mount options, as in fstab (repeatable)
    #[arg(short, value_name = "OPT,...")]
    pub options: Vec<OsString>,
    /// Write the daemon's process id to this file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub pid_file: Option<PathBuf>,
    /// Clear away first what a dead daemon of ours left there
    #[arg(long)]
    pub replace_dead: bool,
    /// Drop dirty bitmaps, which writing would turn into a lie
    #[arg(long, help_heading = "Writing")]
    pub drop_bitmaps: bool,
    /// Where descriptor and header differ about the disk's size, the header is right
    #[arg(long, help_heading = "Writing")]
    pub trust_header: bool,
    /// Copy what lower deltas have, even where the host could share it
    #[arg(long, help_heading = "Writing")]
    pub no_reflink: bool,
    /// Bytes by which the file grows (16M)
    #[arg(long, value_name = "SIZE", value_parser = parse_step, help_heading = "Writing")]
    pub grow_step: Option<u64>,
    /// When the host is full: wait, fail, or seconds to wait (60)
    #[arg(long, value_name = "POLICY", value_parser = parse_enospc, help_heading = "Writing")]
    pub enospc: Option<EnospcPolicy>,
    /// Time after which writes become durable by themselves (5)
    #[arg(long, value_name = "SECONDS", value_parser = parse_millis, help_heading = "Writing")]
    pub flush_interval: Option<u64>,
    /// Memory for allocation tables (32M)
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Tuning")]
    pub bat_cache: Option<u64>,
    /// Requests below 4 KiB << N are served where they arrive (7)
    #[arg(long, value_name = "N", value_parser = parse_order, help_heading = "Tuning")]
    pub inline_order: Option<u32>,
    /// Read and write the image past the host's page cache
    #[arg(long, help_heading = "Tuning")]
    pub direct: bool,
    /// Threads that take requests (8)
    #[arg(long, value_name = "N", value_parser = parse_threads, help_heading = "Tuning")]
    pub threads: Option<usize>,
    /// Threads that serve what does not stay where it arrives (4)
    #[arg(long, value_name = "N", value_parser = parse_threads, help_heading = "Tuning")]
    pub pool_threads: Option<usize>,
    /// How requests come in: fuser, uring, or auto: uring where the kernel offers it (auto)
    #[arg(long, value_name = "WAY", value_parser = parse_transport, help_heading = "Tuning")]
    pub transport: Option<Transport>,
    /// With -r: let the kernel read a flat clone, which shares the image's blocks (XFS, btrfs)
    #[arg(long, help_heading = "Tuning")]
    pub linearize: bool,
    /// Never let the daemon's memory be swapped out
    #[arg(long, help_heading = "Tuning")]
    pub lock_memory: bool,
    /// Which disk.
    #[command(flatten)]
    pub select: SelectArgs,
}

impl ServeArgs {
    /// The settings that result; long options win over `-o`.
    pub fn settings(&self) -> Result<Settings, String> {
        let mut settings = Settings::default();
        for text in &self.options {
            settings.apply(text)?;
        }
        self.select.apply(&mut settings);
        if self.read_only {
            settings.set_read_only(true);
        }
        let disk = &mut settings.disk;
        disk.drop_bitmaps |= self.drop_bitmaps;
        disk.reflink &= !self.no_reflink;
        disk.direct |= self.direct;
        settings.selection.trust_header |= self.trust_header;
        disk.grow_step = self.grow_step.unwrap_or(disk.grow_step);
        disk.enospc = self.enospc.unwrap_or(disk.enospc);
        disk.flush_interval_ms = self.flush_interval.unwrap_or(disk.flush_interval_ms);
        disk.bat_cache = self.bat_cache.unwrap_or(disk.bat_cache);
        disk.inline_order = self.inline_order.unwrap_or(disk.inline_order);
        disk.pool_threads = self.pool_threads.unwrap_or(disk.pool_threads);
        settings.replace_dead |= self.replace_dead;
        settings.lock_memory |= self.lock_memory;
        settings.linearize |= self.linearize;
        settings.transport = self.transport.unwrap_or(settings.transport);
        settings.threads = self.threads.unwrap_or(settings.threads);
        // A snapshot is frozen; nobody asked to write to it.
        if settings.selection.snapshot.is_some() {
            settings.set_read_only(true);
        }
        Ok(settings)
    }
}

/// `ploopfs mount`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs mount disk.hdd /mnt/img                  a directory: /mnt/img/disk.img and more
  touch disk.img; ploopfs mount disk.hdd disk.img  a file: the disk itself
  ploopfs mount -r --snapshot latest disk.hdd /mnt/img
  ploopfs mount -o allow_other,uid=1000 root.hds /mnt/img")]
pub struct MountArgs {
    /// How.
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// A directory, or a regular file to mount over
    #[arg(value_hint = ValueHint::AnyPath)]
    pub mountpoint: PathBuf,
}

/// `ploopfs umount`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs umount /mnt/img
  ploopfs umount disk.hdd            by the image
  ploopfs umount --lazy /mnt/img     although it is in use: its users may go on")]
pub struct UmountArgs {
    /// Take it out of sight at once and do not wait for its users
    #[arg(short, long)]
    pub lazy: bool,
    /// Wait so long for the image to be closed
    #[arg(long, value_name = "SECONDS", value_parser = parse_millis)]
    pub timeout: Option<u64>,
    /// Where it is mounted, or the image
    #[arg(value_name = "MOUNTPOINT", value_hint = ValueHint::AnyPath)]
    pub target: PathBuf,
}

/// `ploopfs attach`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  dev=$(ploopfs attach disk.hdd) && fsck -n \"$dev\"p1
  ploopfs attach -r -m /mnt disk.hdd      and mount its only file system
  ploopfs attach -m /mnt -p 2 disk.hdd    or that of partition 2")]
pub struct AttachArgs {
    /// How.
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Also mount the file system on the disk here
    #[arg(short, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub mount: Option<PathBuf>,
    /// The partition that -m mounts
    #[arg(short, value_name = "N", requires = "mount")]
    pub partition: Option<u32>,
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// `ploopfs detach`.
#[derive(Args, Clone, Debug)]
pub struct DetachArgs {
    /// Wait so long for the image to be closed
    #[arg(long, value_name = "SECONDS", value_parser = parse_millis)]
    pub timeout: Option<u64>,
    /// The loop device, or the image
    #[arg(value_name = "DEV|IMAGE", value_hint = ValueHint::AnyPath)]
    pub target: PathBuf,
}

/// `ploopfs info`.
#[derive(Args, Clone, Debug)]
pub struct InfoArgs {
    /// Which disk.
    #[command(flatten)]
    pub select: SelectArgs,
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// `ploopfs check`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Exit status: 0 clean, 2 corrupt, 3 space is wasted but the data is safe, 1 could not check

Examples:
  ploopfs check disk.hdd
  ploopfs check --json root.hds | jq .state")]
pub struct CheckArgs {
    /// Look although a program has the image open for writing
    #[arg(long)]
    pub no_lock: bool,
    /// Say nothing; the exit status tells
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// `ploopfs repair`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Exit status: 0 clean now, 2 still corrupt, 1 could not repair;
with --dry-run that of a check: 0 nothing to do, 2 corrupt, 3 leaks only

Examples:
  ploopfs repair --dry-run disk.hdd       what would be done, and what is lost
  ploopfs repair --yes disk.hdd
  ploopfs repair --undo root.hds.undo disk.hdd")]
pub struct RepairArgs {
    /// Show what would be done and change nothing
    #[arg(short = 'n', long, conflicts_with = "undo")]
    pub dry_run: bool,
    /// Give wasted space back and change nothing else
    #[arg(long, conflicts_with = "undo")]
    pub leaks_only: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Take a repair back with the undo file that it left
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub undo: Option<PathBuf>,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

/// `ploopfs resize`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs resize disk.hdd 100G            this size
  ploopfs resize disk.hdd +20G            so much more
  ploopfs resize --shrink disk.hdd 50G    and no data may be in what is cut off")]
pub struct ResizeArgs {
    /// The disk may become smaller
    #[arg(long)]
    pub shrink: bool,
    /// Lose the data in what is cut off
    #[arg(long, requires = "shrink")]
    pub force_discard: bool,
    /// Drop dirty bitmaps, which the change would turn into a lie
    #[arg(long)]
    pub drop_bitmaps: bool,
    /// Show what would be done and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Say nothing when it worked
    #[arg(short, long)]
    pub quiet: bool,
    /// What a file without a magic number is
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<Format>,
    /// Let the descriptor name files in this directory outside the bundle (repeatable)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub allow_outside: Vec<PathBuf>,
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
    /// The size, or with + or - before it the difference
    #[arg(value_parser = parse_change, allow_hyphen_values = true)]
    pub size: Change,
}

/// `ploopfs compact`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Examples:
  ploopfs compact disk.hdd
  ploopfs compact --zeroes disk.hdd       and free clusters that hold only zeros
  ploopfs compact --trim --yes disk.hdd   and what its file systems do not use
  ploopfs compact --dry-run --zeroes disk.hdd")]
pub struct CompactArgs {
    /// First let the file systems on the disk discard what they do not use (root only)
    #[arg(long)]
    pub trim: bool,
    /// Trim file systems that were not unmounted, too
    #[arg(long, requires = "trim")]
    pub force: bool,
    /// Free clusters that hold nothing but zeros
    #[arg(long)]
    pub zeroes: bool,
    /// Bring the clusters into the order of the disk
    #[arg(long)]
    pub defrag: bool,
    /// Write zeros to all holes, as ploop 1.15 wants it on ext4
    #[arg(long)]
    pub fill_holes: bool,
    /// Drop dirty bitmaps, which the change would turn into a lie
    #[arg(long)]
    pub drop_bitmaps: bool,
    /// Show what would be done and change nothing
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
    /// A .hdd bundle, its DiskDescriptor.xml, a .pvm with one disk, or an image file
    #[arg(value_hint = ValueHint::AnyPath)]
    pub image: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn long_options_win_over_words() {
        let line = [
            "ploopfs",
            "mount",
            "-o",
            "rw,threads=2",
            "--threads",
            "4",
            "-r",
            "a",
            "b",
        ];
        let Verb::Mount(args) = Cli::try_parse_from(line).unwrap().verb else {
            panic!("mount")
        };
        let settings = args.serve.settings().unwrap();
        assert_eq!(settings.threads, 4);
        assert!(settings.disk.read_only && settings.mount.read_only);
    }

    #[test]
    fn a_snapshot_is_read_only() {
        let line = ["ploopfs", "mount", "--snapshot", "latest", "a", "b"];
        let Verb::Mount(args) = Cli::try_parse_from(line).unwrap().verb else {
            panic!("mount")
        };
        assert!(!args.serve.settings().unwrap().selection.write);
    }
}
