//! Images whose blocks are shared with a copy, on a real file system that is full: what is mapped
//! already needs space to be written to.

use crate::caller::{flush, open, read, read_all, start_write, wait, write};
use crate::forge::image::{ImageSpec, Mapped};
use crate::forge::reader;
use crate::support::guards::{Xfs, text};
use crate::support::harness::trial;
use crate::support::probe::Need::{self, Loop as LoopDevices, Root};
use crate::support::{MIB, Outcome, command, sha256};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::fcntl::{FallocateFlags, fallocate};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, EnospcPolicy};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const HOST: &[Need] = &[Root, LoopDevices, Need::Xfs];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_write_in_place_to_shared_blocks_without_space",
            HOST,
            in_place_without_space,
        ),
        trial(
            "a_table_of_shared_blocks_waits_for_space",
            HOST,
            table_waits_for_space,
        ),
        trial(
            "a_cluster_that_is_copied_up_shares_its_blocks",
            HOST,
            copied_up_by_sharing,
        ),
    ]
}

const CLUSTER: u64 = 64 << 10;
/// Clusters whose entries are in the first page of the table.
const FIRST_PAGE: u64 = 1008;
/// Clusters that are copied up.
const COPIED: u64 = 500;

/// A file system that shares blocks, with an image and its twin.
struct Host {
    image: PathBuf,
    twin: PathBuf,
    before: String,
    ballast: PathBuf,
    xfs: Xfs,
}

impl Host {
    fn new(spec: &ImageSpec) -> Result<Self> {
        let xfs = Xfs::new(320 * MIB)?;
        let at = xfs.path();
        let [image, twin, ballast] = ["disk.hds", "twin.hds", "ballast"].map(|name| at.join(name));
        spec.write(&image)?;
        let mut copy = command::new("cp");
        command::ok(copy.arg("--reflink=always").arg(&image).arg(&twin))?;
        copy_single_blocks(&image)?;
        command::ok(command::new("sync").arg("-f").arg(text(at)))?;
        Ok(Self {
            before: sha256(&twin)?,
            image,
            twin,
            ballast,
            xfs,
        })
    }

    /// Takes all space that is left.
    fn fill(&self) -> Result<()> {
        let file = File::create(&self.ballast)?;
        let (mut at, mut step) = (0, 64 * MIB as i64);
        while step >= 4096 {
            match fallocate(&file, FallocateFlags::empty(), at, step) {
                Ok(()) => at += step,
                Err(nix::errno::Errno::ENOSPC) => step /= 2,
                Err(other) => return Err(other).context("the ballast"),
            }
        }
        file.sync_all()?;
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        fs::remove_file(&self.ballast).context("the ballast")
    }

    /// The image is sound, and nothing of the twin has changed.
    fn end(self) -> Outcome {
        let wrong = reader::check(&self.image)?;
        ensure!(wrong.is_empty(), "{wrong:?}");
        ensure!(sha256(&self.twin)? == self.before, "the twin has changed");
        self.xfs.end()
    }
}

fn options(enospc: EnospcPolicy) -> DiskOptions {
    DiskOptions {
        enospc,
        flush_interval_ms: 0,
        grow_step: 4 * MIB,
        ..DiskOptions::default()
    }
}

/// Every byte of a cluster is an old or a new one.
fn expect_old_or_new(disk: &Arc<Disk>, cluster: u64, old: &[u8], new: u8) -> Outcome {
    let mut buf = vec![0; CLUSTER as usize];
    let found = read(disk, cluster * CLUSTER, CLUSTER, &mut buf);
    let old = &old[(cluster * CLUSTER) as usize..][..CLUSTER as usize];
    let is_known =
        |(found, old): (&[u8], &[u8])| found == old || found.iter().all(|byte| *byte == new);
    let is_fit = found.chunks(512).zip(old.chunks(512)).all(is_known);
    ensure!(is_fit, "cluster {cluster} shows neither");
    Ok(())
}

fn in_place_without_space() -> Outcome {
    let clusters = 200;
    let host = Host::new(&ImageSpec::new(2, 128, clusters * 128).mapping(Mapped::All))?;
    let disk = open(&host.image, &options(EnospcPolicy::Fail));
    write(&disk, 0, &[1; 512])?;
    flush(&disk)?;
    let mut expected = read_all(&disk);
    host.fill()?;
    let data = vec![2; CLUSTER as usize];
    let mut refused = 0;
    for cluster in 100..140 {
        match write(&disk, cluster * CLUSTER, &data) {
            Ok(()) => expected[(cluster * CLUSTER) as usize..][..data.len()].fill(2),
            Err(error) => {
                ensure!(error.is_no_space(), "{error}");
                expect_old_or_new(&disk, cluster, &expected, 2)?;
                refused += 1;
            }
        }
    }
    ensure!(refused > 20, "only {refused} writes found no space");
    ensure!(disk.stats().latched.is_none(), "{:?}", disk.stats().latched);
    flush(&disk).context("what was written is durable")?;
    host.empty()?;
    for cluster in 100..140 {
        write(&disk, cluster * CLUSTER, &data).context("there is space again")?;
    }
    flush(&disk)?;
    expected[(100 * CLUSTER) as usize..(140 * CLUSTER) as usize].fill(2);
    ensure!(read_all(&disk) == expected, "other clusters have changed");
    disk.close()?;
    ensure!(
        shown(&host.image)? == expected,
        "the file says something else"
    );
    host.end()
}

fn table_waits_for_space() -> Outcome {
    // Few are mapped, so the file is small, and one of the second page, so that this is no hole.
    let mapped = (0..20).chain([1500]).collect();
    let spec = ImageSpec::new(2, 128, 2000 * 128).mapping(Mapped::List(mapped));
    let host = Host::new(&spec)?;
    let disk = open(&host.image, &options(EnospcPolicy::Seconds(120)));
    // The file grows by more than this one cluster.
    write(&disk, 30 * CLUSTER, &vec![3; CLUSTER as usize])?;
    flush(&disk)?;
    host.fill()?;
    let at = (FIRST_PAGE + 100) * CLUSTER;
    let fresh = start_write(&disk, at, &vec![4; CLUSTER as usize]);
    wait(&fresh, "a write to what the file has already")?;
    let flushing = {
        let disk = Arc::clone(&disk);
        std::thread::spawn(move || flush(&disk))
    };
    command::eventually(Duration::from_secs(30), || {
        ensure!(disk.stats().no_space_events > 0, "the table found space");
        Ok(())
    })?;
    let mut buf = vec![0; CLUSTER as usize];
    ensure!(
        read(&disk, at, CLUSTER, &mut buf) == [4; CLUSTER as usize],
        "reads go on"
    );
    ensure!(!flushing.is_finished(), "durable without its table");
    ensure!(disk.stats().latched.is_none(), "{:?}", disk.stats().latched);
    host.empty()?;
    let flushed = flushing.join();
    flushed.map_err(|_| anyhow::Error::msg("the flush panicked"))??;
    ensure!(disk.stats().latched.is_none(), "{:?}", disk.stats().latched);
    let expected = read_all(&disk);
    disk.close()?;
    ensure!(
        shown(&host.image)? == expected,
        "the file says something else"
    );
    host.end()
}

/// Else the copy of one block takes some of its neighbours along, with their space.
fn copy_single_blocks(image: &Path) -> Result<()> {
    let mut hint = command::new("xfs_io");
    command::ok(hint.args(["-c", "cowextsize 4096"]).arg(image)).map(drop)
}

/// Small writes to clusters that only a lower delta has: bytes of the file system that they take.
/// With `reflink` each new cluster is the lower one's blocks but for the page that was written.
fn bytes_taken_by_copying_up(host: &Host, reflink: bool) -> Result<u64> {
    let upper = host.image.with_extension(format!("{reflink}"));
    ImageSpec::new(2, 128, COPIED * 128).write(&upper)?;
    copy_single_blocks(&upper)?;
    let selection = Selection {
        write: true,
        lower: vec![host.image.clone()],
        ..Selection::default()
    };
    let free = || -> Result<u64> {
        let at = host.image.parent().context("a directory")?;
        command::ok(command::new("sync").arg("-f").arg(text(at)))?;
        let stat = nix::sys::statvfs::statvfs(at)?;
        Ok(stat.blocks_free() * stat.fragment_size())
    };
    let before = free()?;
    let options = DiskOptions {
        reflink,
        ..options(EnospcPolicy::Fail)
    };
    let images = bundle::open(&upper, &selection)?;
    let (disk, _) = disk::open(Arc::new(images), &options)?;
    let mut expected = read_all(&disk);
    for cluster in 0..COPIED {
        let at = cluster * CLUSTER + 4096;
        write(&disk, at, &[9; 4096])?;
        expected[at as usize..][..4096].fill(9);
    }
    flush(&disk)?;
    ensure!(read_all(&disk) == expected, "other bytes have changed");
    disk.close()?;
    let taken = before.saturating_sub(free()?);
    fs::remove_file(&upper)?;
    Ok(taken)
}

fn copied_up_by_sharing() -> Outcome {
    let host = Host::new(&ImageSpec::new(2, 128, COPIED * 128).mapping(Mapped::All))?;
    let whole = COPIED * CLUSTER;
    let shared = bytes_taken_by_copying_up(&host, true)?;
    let copied = bytes_taken_by_copying_up(&host, false)?;
    ensure!(shared < whole / 2, "{shared} of {whole} bytes: not shared");
    ensure!(
        copied >= whole / 10 * 9,
        "{copied} of {whole} bytes: shared"
    );
    host.end()
}

/// The disk as the reader that knows nothing of ploopfs sees it.
fn shown(image: &Path) -> Result<Vec<u8>> {
    let flat = reader::Flat::open(image)?;
    Ok(flat.read(0, flat.bytes() as usize)?)
}
