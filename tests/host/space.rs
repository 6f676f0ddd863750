//! Hosts without space: full file systems and a limit on the size of files.

use crate::caller::{flush, open, read, read_all, start_write, wait, write, zero};
use crate::forge::image::ImageSpec;
use crate::forge::reader;
use crate::support::guards::FsMount;
use crate::support::harness::{skip, trial};
use crate::support::probe::Need::Root;
use crate::support::{Outcome, scratch};
use libtest_mimic::Trial;
use ploopfs::disk::{Disk, DiskOptions, EnospcPolicy};
use ploopfs::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Names the image of the child of a test.
const LIMITED: &str = "PLOOPFS_LIMITED";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial(
            "a_full_host_fails_writes_and_nothing_else",
            &[Root],
            a_full_host_fails_writes_and_nothing_else,
        ),
        trial(
            "waiting_for_space_is_patient_and_ends_when_there_is_some",
            &[Root],
            waiting_for_space_is_patient_and_ends_when_there_is_some,
        ),
        trial(
            "writers_that_wait_for_space_end_with_the_disk",
            &[Root],
            writers_that_wait_for_space_end_with_the_disk,
        ),
        trial(
            "a_limit_on_the_file_size_is_used_up_and_then_an_error",
            &[],
            a_limit_on_the_file_size_is_used_up_and_then_an_error,
        ),
        trial(
            "entries_find_space_in_a_sparse_table_on_a_full_host",
            &[Root],
            entries_find_space_in_a_sparse_table_on_a_full_host,
        ),
    ]
}

/// A file system in memory of its own; unmounted when dropped.
struct Small {
    mount: FsMount,
    _dir: tempfile::TempDir,
}

impl Small {
    fn mount(bytes: u64) -> anyhow::Result<Self> {
        let dir = scratch()?;
        let size = format!("size={bytes}");
        let at = dir.path().join("small");
        let mounted = FsMount::with(Path::new("none"), &at, &["-t", "tmpfs", "-o", &size]);
        let mount = mounted.map_err(|why| skip(format!("cannot mount a tmpfs: {why:#}")))?;
        Ok(Self { mount, _dir: dir })
    }

    fn place(&self, name: &str) -> PathBuf {
        self.mount.path().join(name)
    }

    fn image(&self, sectors: u64) -> PathBuf {
        let path = self.place("disk.hds");
        ImageSpec::new(2, 128, sectors)
            .write(&path)
            .expect("an image");
        path
    }
}

fn is_no_space(result: &Result<()>) -> bool {
    result.as_ref().is_err_and(Error::is_no_space)
}

const CLUSTER: u64 = 64 << 10;

/// Writes cluster after cluster until the host is full; returns how many were written.
fn fill(disk: &Arc<Disk>, from: u64) -> u64 {
    let mut number = from;
    loop {
        let data = vec![number as u8 | 1; CLUSTER as usize];
        let written = write(disk, number * CLUSTER, &data);
        if is_no_space(&written) {
            return number;
        }
        written.expect("no other error");
        number += 1;
    }
}

fn check_filled(bytes: &[u8], count: u64) {
    for (number, cluster) in (0..count).zip(bytes.chunks_exact(CLUSTER as usize)) {
        assert!(
            cluster.iter().all(|byte| *byte == number as u8 | 1),
            "cluster {number}"
        );
    }
}

fn a_full_host_fails_writes_and_nothing_else() -> Outcome {
    let small = Small::mount(16 << 20)?;
    let path = small.image(64 << 11);
    let options = DiskOptions {
        enospc: EnospcPolicy::Fail,
        flush_interval_ms: 0,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let count = fill(&disk, 0);
    assert!(
        count >= 240,
        "only {count} clusters of 16 MiB could be used"
    );
    flush(&disk).expect("the table has its place already");
    // What a discard frees is used again, without anybody asking for a flush.
    zero(&disk, 8 * CLUSTER, 4 * CLUSTER).expect("discards need no space");
    for number in 8..12_u64 {
        let data = vec![number as u8 | 1; CLUSTER as usize];
        write(&disk, number * CLUSTER, &data).expect("the freed space is found");
    }
    check_filled(&read_all(&disk), count);
    disk.close().expect("the disk closes");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    let flat = reader::Flat::open(&path).expect("the reader opens");
    check_filled(
        &flat.read(0, (count * CLUSTER) as usize).expect("reads"),
        count,
    );
    Ok(())
}

fn waiting_for_space_is_patient_and_ends_when_there_is_some() -> Outcome {
    let small = Small::mount(16 << 20)?;
    let ballast = small.place("ballast");
    std::fs::write(&ballast, vec![1; 4 << 20]).expect("the ballast");
    let path = small.image(64 << 11);
    let options = DiskOptions {
        enospc: EnospcPolicy::Seconds(50),
        flush_interval_ms: 0,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let mut number = 0;
    let data = vec![7; CLUSTER as usize];
    let waiting = loop {
        let receiver = start_write(&disk, number * CLUSTER, &data);
        match receiver.recv_timeout(Duration::from_secs(2)) {
            Ok(result) => result.expect("no error while there is space"),
            Err(_) => break receiver,
        }
        number += 1;
    };
    let before = disk.stats().no_space_events;
    let mut buf = vec![0; 1 << 20];
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(read(&disk, 0, CLUSTER, &mut buf), data);
        std::thread::sleep(Duration::from_millis(20));
    }
    let tries = disk.stats().no_space_events - before;
    assert!(tries <= 10, "{tries} tries in three seconds");
    assert_eq!(disk.stats().waiting_for_space, 1);
    std::fs::remove_file(&ballast).expect("the ballast goes");
    wait(&waiting, "the waiting write").expect("there is space now");
    disk.close().expect("the disk closes");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    Ok(())
}

fn writers_that_wait_for_space_end_with_the_disk() -> Outcome {
    let small = Small::mount(16 << 20)?;
    let path = small.image(64 << 11);
    let options = DiskOptions {
        enospc: EnospcPolicy::Wait,
        pool_threads: 2,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let data = vec![7; CLUSTER as usize];
    let answers: Vec<_> = (0..400)
        .map(|number| start_write(&disk, number * CLUSTER, &data))
        .collect();
    let mut buf = vec![0; 1 << 20];
    assert_eq!(read(&disk, 0, CLUSTER, &mut buf), data);
    let begun = Instant::now();
    while disk.stats().waiting_for_space == 0 && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let begun = Instant::now();
    disk.close().expect("the disk closes");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let results: Vec<_> = answers.iter().map(|answer| wait(answer, "write")).collect();
    let good = results.iter().filter(|result| result.is_ok()).count();
    assert!(results.iter().all(|r| r.is_ok() || is_no_space(r)));
    assert!(good >= 240, "only {good} clusters of 16 MiB were used");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    Ok(())
}

fn a_limit_on_the_file_size_is_used_up_and_then_an_error() -> Outcome {
    let me = std::env::current_exe().expect("a path");
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("disk.hds");
    ImageSpec::new(2, 128, 64 << 11)
        .write(&path)
        .expect("an image");
    let child = Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 10240; exec \"$0\""])
        .arg(me)
        .env(LIMITED, &path)
        .output()
        .expect("bash runs");
    assert!(
        child.status.success(),
        "{}",
        String::from_utf8_lossy(&child.stderr)
    );
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    let flat = reader::Flat::open(&path).expect("the reader opens");
    check_filled(&flat.read(0, (150 * CLUSTER) as usize).expect("reads"), 150);
    Ok(())
}

/// The child of the test above, if this process is it.
pub(crate) fn child() -> Option<ExitCode> {
    let path = PathBuf::from(std::env::var_os(LIMITED)?);
    let disk = open(&path, &DiskOptions::default());
    let mut count = 0;
    let error = loop {
        let data = vec![count as u8 | 1; CLUSTER as usize];
        match write(&disk, count * CLUSTER, &data) {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ploopfs::error::ErrorKind::Io(27), "{error}");
    assert!(count >= 150, "only {count} clusters of 10 MiB were used");
    check_filled(&read_all(&disk), count);
    disk.close().expect("the disk closes");
    Some(ExitCode::SUCCESS)
}

fn entries_find_space_in_a_sparse_table_on_a_full_host() -> Outcome {
    let small = Small::mount(16 << 20)?;
    // A table of many pages, of which the file has only the first.
    let path = small.place("disk.hds");
    ImageSpec::new(2, 8, 128 << 11)
        .write(&path)
        .expect("an image");
    let options = DiskOptions {
        enospc: EnospcPolicy::Fail,
        flush_interval_ms: 0,
        grow_step: 4 << 20,
        ..DiskOptions::default()
    };
    let disk = open(&path, &options);
    let data = vec![7; 4096];
    write(&disk, 0, &data).expect("there is space");
    let ballast = std::fs::write(small.place("ballast"), vec![1; 16 << 20]);
    assert!(ballast.is_err(), "the host is full now");
    // Clusters that the file has already, entries in pages that it has not.
    for number in 1..20_u64 {
        write(&disk, number * (4 << 20), &data).expect("the file has free clusters");
    }
    flush(&disk).expect("the table has its space");
    disk.close().expect("the disk closes");
    assert_eq!(reader::check(&path).expect("runs"), Vec::<String>::new());
    Ok(())
}
