//! Concurrency against the public `Disk`: what no order of requests may break.
//!
//! Every sector that a test writes carries the number of its request. A sector read must hold what
//! some request put there that had begun by then and was not overwritten by a whole later one; no
//! other byte may ever show. After the run the same must hold for the disk, for the reader of the
//! forge on the closed files, and for a disk that was left without being closed after a flush.
//! A failing seed is tried again with `PLOOPFS_SEED=N` (threads take turns as they please), and
//! `PLOOPFS_TIMES=N` makes the runs so many times longer.

#[path = "hazards/caller.rs"]
mod caller;
#[path = "hazards/edges.rs"]
mod edges;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "hazards/odd.rs"]
mod odd;
#[path = "hazards/spoilt.rs"]
mod spoilt;
#[path = "hazards/stress.rs"]
mod stress;
#[path = "hazards/stuck.rs"]
mod stuck;

use caller::{Answer, chain, check_files, fast_dir, image, open, split, start_write, tiny, wait};
use forge::bundle::{BundleSpec, Style};
use forge::content::splitmix;
use ploopfs::disk::DiskOptions;
use ploopfs::units::DiskOffset;
use std::sync::mpsc::channel;
use stress::{run, run_abandoned};

const SECTOR: u64 = 512;

#[test]
fn one_image_keeps_every_sector_in_order() {
    let spec = BundleSpec::new(Style::Ploop, vec![image(2, 8, 18_001, 20)]);
    run("one page, one pool thread", &spec, &tiny(1, 6), 8, 300);
    let usual = DiskOptions {
        pool_threads: 3,
        flush_interval_ms: 1,
        ..DiskOptions::default()
    };
    run("usual", &spec, &usual, 6, 800);
    let full = BundleSpec::new(Style::Parallels, vec![image(1, 8, 803, 100)]);
    run("full, no room to grow", &full, &tiny(2, 6), 6, 400);
}

#[test]
fn a_chain_keeps_every_sector_in_order() {
    run(
        "chain, all pooled, one thread",
        &chain(),
        &tiny(1, 0),
        6,
        300,
    );
    let inline = DiskOptions {
        bat_cache: 64 << 10,
        ..tiny(2, 20)
    };
    run("chain, all tried inline", &chain(), &inline, 6, 600);
}

#[test]
fn a_split_disk_keeps_every_sector_in_order() {
    run("split", &split(), &tiny(2, 4), 6, 400);
}

#[test]
fn an_abandoned_disk_has_what_was_flushed() {
    let options = DiskOptions {
        flush_interval_ms: 0,
        ..tiny(2, 6)
    };
    run_abandoned("chain", &chain(), &options);
    run_abandoned("split", &split(), &options);
    let full = BundleSpec::new(Style::Parallels, vec![image(1, 8, 803, 100)]);
    run_abandoned("full", &full, &options);
    let roomy = DiskOptions {
        bat_cache: 1 << 20,
        ..options
    };
    let one = BundleSpec::new(Style::Ploop, vec![image(2, 8, 18_001, 20)]);
    run_abandoned("one", &one, &roomy);
}

#[test]
fn a_close_under_load_answers_everybody() {
    let home = fast_dir();
    for round in 0..10_u64 {
        let dir = home.path().join(format!("disk{round}.hdd"));
        let spec = chain();
        spec.write(&dir).expect("the bundle is forged");
        let disk = open(&dir, &tiny(1 + round as usize % 2, 0));
        let data = vec![9; 5000];
        let mut answers = Vec::new();
        for number in 0..200_u64 {
            let at = splitmix(&mut (number + round * 1000)) % (18_000 * SECTOR - 5000);
            answers.push(start_write(&disk, at, &data));
            let (sender, receiver) = channel();
            disk.zero(DiskOffset::new(at / 4096 * 4096), 4096, Answer(sender));
            answers.push(receiver);
        }
        disk.close().expect("the disk closes");
        for answer in &answers {
            wait(answer, "a request").expect("it was made before the close");
        }
        check_files("close", &spec, &dir);
    }
}
