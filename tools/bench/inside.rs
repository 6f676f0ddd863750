//! What a request costs inside the program: pin, look-up, plan, count, reply, without a kernel.
//!
//! Imports: `forge`, `jobs`, `table`; ploopfs's `disk` and below.
//! Never: measures a request that leaves the calling thread.
//!
//! A read of a hole is all of that and a `memset` of 512 bytes. A read of 4 KiB that is mapped has
//! a pread(2) of the page cache besides, which is measured alone for comparison.

use crate::forge::bundle::{BundleSpec, Style};
use crate::forge::content::{Level, splitmix};
use crate::forge::image::{ImageSpec, Mapped};
use crate::jobs::Measured;
use crate::table::Results;
use anyhow::{Context, Result, ensure};
use ploopfs::chain::bundle::{self, Selection};
use ploopfs::disk::{self, Disk, DiskOptions, DoneReply, ReadReply};
use ploopfs::units::DiskOffset;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Bytes of the disks.
const SIZE: u64 = 64 << 20;
/// Requests of one sample.
const REQUESTS: u32 = 200_000;
const SAMPLES: usize = 5;

/// A reply that goes nowhere.
struct Nobody;

impl ReadReply for Nobody {
    fn done(self, result: ploopfs::error::Result<&[u8]>) {
        let _ = black_box(result.map(<[u8]>::len));
    }
}

impl DoneReply for Nobody {
    fn done(self, result: ploopfs::error::Result<()>) {
        let _ = black_box(result.is_ok());
    }
}

/// Nanoseconds of one call, for random places of the disk.
fn time(mut call: impl FnMut(u64)) -> f64 {
    let mut state = 1;
    let begun = Instant::now();
    for _ in 0..REQUESTS {
        call(splitmix(&mut state) % (SIZE / 4096) * 4096);
    }
    begun.elapsed().as_nanos() as f64 / f64::from(REQUESTS)
}

fn open(dir: &Path, depth: usize, cluster: u32, mapped: &Mapped) -> Result<Arc<Disk>> {
    let like = ImageSpec::new(2, cluster, SIZE / 512);
    // All that is mapped is in the base, so that a look-up has the whole chain merged over it.
    let spec = BundleSpec::chain(Style::Parallels, &like, depth, |number, image| {
        if number == 0 {
            image.mapped = mapped.clone();
        }
    });
    ensure!(
        matches!(spec.parts[0].levels[0], Level::Image(_)),
        "no image"
    );
    spec.write(dir)?;
    let selection = Selection {
        write: depth == 1,
        ..Selection::default()
    };
    let options = DiskOptions {
        read_only: depth > 1,
        ..DiskOptions::default()
    };
    let images = Arc::new(bundle::open(dir, &selection)?);
    Ok(disk::open(images, &options)?.0)
}

/// Measures and adds to the results.
pub(crate) fn measure(place: &Path, cluster: u32, results: &mut Results) -> Result<()> {
    let dir = tempfile::TempDir::with_prefix_in("ploopfs-bench", place)
        .with_context(|| format!("cannot work in {}", place.display()))?;
    let raw = dir.path().join("raw");
    std::fs::write(&raw, vec![0x5a; SIZE as usize])?;
    let raw = File::options().read(true).write(true).open(&raw)?;
    let mapped = Mapped::All;
    let holes = open(&dir.path().join("a.hdd"), 1, cluster, &Mapped::Nothing)?;
    let one = open(&dir.path().join("b.hdd"), 1, cluster, &mapped)?;
    let chain = open(&dir.path().join("c.hdd"), 4, cluster, &mapped)?;
    let mut buf = vec![0; 4096];
    for disk in [&holes, &one, &chain] {
        for at in (0..SIZE).step_by(1 << 20) {
            disk.read_at(DiskOffset::new(at), &mut buf)?;
        }
    }
    // Sets the in-use mark.
    one.write_at(DiskOffset::new(0), &buf)?;
    for _ in 0..SAMPLES {
        let mut add = |row, nanoseconds| {
            let measured = Measured {
                row,
                unit: "ns",
                more: false,
            };
            results.add("inside the program", measured, "one request", nanoseconds);
        };
        let read = |disk: &Arc<Disk>, len, buf: &mut Vec<u8>| {
            time(|at| disk.read(DiskOffset::new(at), len, buf, Nobody))
        };
        add("512 bytes of a hole", read(&holes, 512, &mut buf));
        add("read 4 KiB", read(&one, 4096, &mut buf));
        add("read 4 KiB, 4 levels", read(&chain, 4096, &mut buf));
        add(
            "pread(2) of 4 KiB alone",
            time(|at| {
                let _ = black_box(raw.read_exact_at(&mut buf, at));
            }),
        );
        add(
            "write 4 KiB",
            time(|at| one.write(DiskOffset::new(at), &buf, Nobody)),
        );
        add(
            "pwrite(2) of 4 KiB alone",
            time(|at| {
                let _ = black_box(raw.write_all_at(&buf, at));
            }),
        );
    }
    let pooled = [&holes, &one, &chain].map(|disk| disk.stats().pooled_requests);
    ensure!(pooled == [0; 3], "requests went to the pool: {pooled:?}");
    for disk in [holes, one, chain] {
        disk.close()?;
    }
    Ok(())
}
