//! A journalling file system on a disk whose daemon is killed: what it synced is there after its
//! own recovery, and it finds nothing wrong with itself.
//!
//! Imports: `stage`, `subject`, `forge`, `support`; std, `anyhow`.
//! Never: expects a file that was not synced together with its directory.

use super::stage::Stage;
use super::subject::{Door, Made};
use super::{KILLS, STOP, number, seed};
use crate::forge::content::{Model, mix, splitmix};
use crate::forge::image::ImageSpec;
use crate::support::guards::FsMount;
use crate::support::harness::trial;
use crate::support::probe::Need::{E2fsprogs, Fuse, Loop, Root};
use crate::support::{Outcome, command, scratch};
use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial(
        "ext4_recovers_after_kills",
        &[Fuse, Root, Loop, E2fsprogs],
        ext4_recovers,
    )]
}

/// Names of files with the length and the seed of their content.
type Synced = Mutex<BTreeMap<String, (usize, u64)>>;

fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let words = (0..len.div_ceil(8)).flat_map(|_| splitmix(&mut state).to_le_bytes());
    words.take(len).collect()
}

/// Makes, syncs and removes files until the device fails.
fn work(dir: &Path, mut dice: u64, synced: &Synced, dying: &AtomicBool) -> Outcome {
    let own = dir.join(format!("{dice:016x}"));
    let step = |dice: &mut u64| -> Result<()> {
        let len = (splitmix(dice) % 300_000) as usize;
        let seed = splitmix(dice);
        let path = own.join(format!("{seed:016x}"));
        let mut file = File::create_new(&path)?;
        file.write_all(&content(len, seed))?;
        if splitmix(dice) % 3 > 0 {
            file.sync_all()?;
            File::open(&own)?.sync_all()?;
            let name = path.strip_prefix(dir)?.display().to_string();
            let mut synced = synced.lock().unwrap_or_else(PoisonError::into_inner);
            synced.insert(name, (len, seed));
        } else if splitmix(dice) % 2 == 0 {
            fs::remove_file(&path)?;
        }
        Ok(())
    };
    let mut all = || -> Result<()> {
        fs::create_dir(&own)?;
        File::open(dir)?.sync_all()?;
        while !dying.load(Ordering::SeqCst) {
            step(&mut dice)?;
        }
        Ok(())
    };
    match all() {
        Err(_) if dying.load(Ordering::SeqCst) => Ok(()),
        other => other,
    }
}

fn verify(at: &Path, synced: &Synced) -> Result<u64> {
    let synced = synced.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, (len, seed)) in synced.iter() {
        let found = fs::read(at.join(name)).with_context(|| format!("{name} is lost"))?;
        ensure!(found == content(*len, *seed), "{name} holds other bytes");
    }
    Ok(synced.len() as u64)
}

fn ext4_recovers() -> Outcome {
    let dir = scratch()?;
    let image = dir.path().join("a.hds");
    let spec = ImageSpec::new(2, 128, 256 << 11);
    spec.write(&image)?;
    let made = Made::single(image, Model::of(&spec));
    let synced = Synced::default();
    let mut dice = mix(&[seed(), 404]);
    let kills = (number("PLOOPFS_KILLS").unwrap_or(KILLS) / 10).max(1);
    let at = dir.path().join("fs");
    for round in 0..=kills {
        let (stage, _) = Stage::start(Door::Loop, dir.path(), &made.image, &[])?;
        if round == 0 {
            command::ok(
                command::new("mkfs.ext4")
                    .args(["-q", "-F"])
                    .arg(&stage.path),
            )?;
        }
        let system = FsMount::with(&stage.path, &at, &["-o", "discard"])?;
        let files = verify(&at, &synced).with_context(|| format!("after kill {round}"))?;
        if round == kills {
            system.umount()?;
            command::ok(command::new("e2fsck").arg("-fn").arg(&stage.path))?;
            stage.close()?;
            eprintln!("killed ext4_recovers_after_kills : {kills} kills, {files} files synced");
            return made.expect_closed();
        }
        if files > 400 {
            let mut synced = synced.lock().unwrap_or_else(PoisonError::into_inner);
            for name in synced.keys() {
                fs::remove_file(at.join(name))?;
            }
            synced.clear();
        }
        let dying = AtomicBool::new(false);
        let seeds: Vec<u64> = (0..3).map(|_| splitmix(&mut dice)).collect();
        let pause = Duration::from_millis(100 + splitmix(&mut dice) % 900);
        let worked = std::thread::scope(|scope| {
            let (at, synced, dying) = (&at, &synced, &dying);
            let each = seeds
                .iter()
                .map(|seed| scope.spawn(move || work(at, *seed, synced, dying)));
            let threads: Vec<_> = each.collect();
            std::thread::sleep(pause / 2);
            // A daemon that was asked to end serves on, as long as it is used.
            let asked = match pause.as_millis() % 3 {
                0 => stage.terminate(),
                _ => Ok(()),
            };
            std::thread::sleep(pause);
            dying.store(true, Ordering::SeqCst);
            let killed = stage.kill();
            let ends = threads.into_iter().map(|thread| thread.join());
            let ends: Result<Vec<_>, _> = ends.collect();
            let ends = ends.map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            asked?;
            ensure!(killed?, "the daemon has gone by itself");
            ends.into_iter().collect::<Outcome>()
        });
        // The file system has nothing below it any more, and goes without a word to it.
        drop(system);
        worked?;
        stage.clear_away()?;
        made.expect_sound()?;
        ensure!(!STOP.load(Ordering::Relaxed), "stopped by a signal");
    }
    Ok(())
}
