//! Requests of any place and length, against the same bytes in memory.

use super::*;
use crate::storage::aligned::Aligned;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const LEN: usize = 3 << 20;

/// A step of splitmix64.
fn dice(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A file that is read and written directly, in blocks of this size, if the host can do that: in
/// the directory for temporary files, or beside the program, which is on a medium.
fn file(block: u64, content: &[u8]) -> Option<(tempfile::TempDir, File, Direct)> {
    let program = std::env::current_exe().unwrap();
    let mut why = Vec::new();
    for place in [&*std::env::temp_dir(), program.parent().unwrap()] {
        let dir = tempfile::tempdir_in(place).unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        match crate::sys::file::go_direct(&file) {
            Ok(limits) if limits.block <= block => {
                return Some((dir, file, Direct::new(limits.memory, block).unwrap()));
            }
            other => why.push(format!("{}: {other:?}", place.display())),
        }
    }
    // A medium may have larger blocks than the smallest ones; each has the larger.
    let must = block == 4096 && std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!must, "no direct I/O in blocks of {block}: {why:?}");
    println!("skipped: no direct I/O in blocks of {block} here: {why:?}");
    None
}

#[test]
fn any_bytes_come_and_go() {
    for block in [512, 4096] {
        let mut model: Vec<u8> = (0..LEN + 700).map(|at| (at / 512) as u8).collect();
        let Some((_dir, file, direct)) = file(block, &model) else {
            continue;
        };
        let mut seed = block;
        for round in 0..400 {
            let at = dice(&mut seed) as usize % LEN;
            let most = [600, 9000, 200_000, 2 << 20][round % 4];
            let len = (dice(&mut seed) as usize % most + 1).min(LEN - at);
            let unit = [1, 512, 4096][dice(&mut seed) as usize % 3];
            let (at, len) = (at / unit * unit, len.next_multiple_of(unit));
            let len = len.min(LEN - at);
            let mut memory = Aligned::new(len + 80).unwrap();
            let skip = [0, 80, 16][dice(&mut seed) as usize % 3];
            let buf = &mut memory[skip..skip + len];
            if dice(&mut seed) % 2 == 0 {
                buf.fill(dice(&mut seed) as u8);
                direct.write(&file, at as u64, buf).unwrap();
                model[at..at + len].copy_from_slice(buf);
            } else {
                direct.read(&file, at as u64, buf).unwrap();
                assert!(*buf == model[at..at + len], "{len} at {at}");
            }
        }
        // The last bytes are less than a block: they are read, and not written.
        let mut end = vec![0; 1000];
        direct.read(&file, LEN as u64 - 300, &mut end).unwrap();
        assert!(end == model[LEN - 300..]);
        assert!(direct.read(&file, LEN as u64, &mut end).is_err());
        if block == 4096 {
            assert!(direct.write(&file, LEN as u64, &end[..3]).is_err());
        }
        assert_eq!(file.metadata().unwrap().len(), LEN as u64 + 700);
        let mut all = vec![0; model.len()];
        direct.read(&file, 0, &mut all).unwrap();
        assert!(all == model);
    }
}

#[test]
fn neighbours_in_one_block_do_not_lose_bytes() {
    const BLOCK: usize = 4096;
    const ROUNDS: u8 = 60;
    let Some((_dir, file, direct)) = file(BLOCK as u64, &[0; 4 * BLOCK]) else {
        return;
    };
    let (file, direct) = (Arc::new(file), Arc::new(direct));
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Each has sectors of its own in the first two blocks; one has the blocks behind them, in
        // one write with nobody else's.
        let writers: Vec<_> = (0..8)
            .map(|number| {
                let (file, direct) = (Arc::clone(&file), Arc::clone(&direct));
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        let at = (number * 1024) as u64;
                        direct.write(&file, at, &[round; 512]).unwrap();
                        let mut back = [0; 512];
                        direct.read(&file, at, &mut back).unwrap();
                        assert_eq!(back, [round; 512], "writer {number}");
                    }
                })
            })
            .collect();
        let (file, direct, is_over) = (&file, &direct, &is_over);
        scope.spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                direct
                    .write(file, 2 * BLOCK as u64, &[9; 2 * BLOCK])
                    .unwrap();
            }
        });
        let went = writers.into_iter().map(|writer| writer.join().is_ok());
        let went: Vec<bool> = went.collect();
        is_over.store(true, Ordering::SeqCst);
        assert!(went.iter().all(|went| *went));
    });
    let mut all = [0; 2 * BLOCK];
    direct.read(&file, 0, &mut all).unwrap();
    for (number, sectors) in all.chunks(1024).enumerate() {
        assert!(
            sectors[..512] == [ROUNDS; 512],
            "writer {number} lost bytes"
        );
        assert!(sectors[512..] == [0; 512]);
    }
}

#[test]
fn a_part_of_a_block_and_the_whole_of_it_keep_each_others_bytes() {
    const BLOCK: usize = 4096;
    let Some((_dir, file, direct)) = file(BLOCK as u64, &[0; 2 * BLOCK]) else {
        return;
    };
    for round in 1..=100_u8 {
        std::thread::scope(|scope| {
            scope.spawn(|| direct.write(&file, 512, &[200; 512]).unwrap());
            scope.spawn(|| direct.write(&file, 0, &[round; BLOCK]).unwrap());
        });
        let mut block = [0; BLOCK];
        direct.read(&file, 0, &mut block).unwrap();
        let (both, rest) = block.split_at(1024);
        assert!(rest == [round; BLOCK - 1024], "round {round}");
        assert!(both[..512] == [round; 512]);
        assert!(both[512..] == [200; 512] || both[512..] == [round; 512]);
    }
}

#[test]
fn only_whole_blocks_are_lent() {
    let Some((_dir, _file, direct)) = file(4096, &[0; 8192]) else {
        return;
    };
    let memory = Aligned::new(3 * 4096).unwrap();
    for way in [Way::Read, Way::Write] {
        assert!(!direct.lend(512, &memory[..4096], way));
        assert!(!direct.lend(0, &memory[..512], way));
        assert!(!direct.lend(0, &memory[1..4097], way));
        assert!(direct.lend(4096, &memory[..4096], way));
        direct.give_back(4096, 4096, way);
    }
}

#[test]
fn who_has_less_than_a_block_waits_for_what_is_lent() {
    let Some((_dir, file, direct)) = file(4096, &[3; 2 << 20]) else {
        return;
    };
    let memory = Aligned::new(2 * 4096).unwrap();
    let border = STRIPE - 4096;
    // Readers are in nobody's way.
    assert!(direct.lend(border, &memory, Way::Read));
    direct.write(&file, border + 512, &[4; 512]).unwrap();
    direct.give_back(border, 8192, Way::Read);
    for at in [border + 512, border + 4096 + 512] {
        assert!(direct.lend(border, &memory, Way::Write));
        assert!(
            direct.lend(border, &memory[..4096], Way::Write),
            "they share"
        );
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                direct.write(&file, at, &[5; 512]).unwrap();
                is_over.store(true, Ordering::SeqCst);
            });
            // Who waits keeps others from being counted, or he might wait for ever.
            while direct.lend(at - 512, &memory[..4096], Way::Write) {
                direct.give_back(at - 512, 4096, Way::Write);
                std::thread::yield_now();
            }
            assert!(!direct.lend(border, &memory, Way::Write));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!is_over.load(Ordering::SeqCst), "he did not wait");
            direct.give_back(border, 4096, Way::Write);
            direct.give_back(border, 8192, Way::Write);
        });
        let mut back = [0; 512];
        direct.read(&file, at, &mut back).unwrap();
        assert_eq!(back, [5; 512]);
    }
    // What was refused has left nothing behind.
    for stripe in &direct.stripes {
        assert_eq!(*stripe.lent.lock(), 0);
    }
}
