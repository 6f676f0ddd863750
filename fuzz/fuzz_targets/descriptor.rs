//! Any bytes as a descriptor: no panic, no endless walk, and what is accepted is consistent.
//!
//! README.md says how to run it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ploopfs::format::descriptor::{Descriptor, IMAGES_MAX};
use ploopfs::units::SectorCount;

fuzz_target!(|data: &[u8]| {
    let descriptor = match Descriptor::parse(data) {
        Ok(descriptor) => descriptor,
        Err(error) => {
            assert!(error.to_string().len() < 1000, "errors are for people");
            return;
        }
    };
    // The bounds of an only part decide nothing.
    if descriptor.parts.len() > 1 {
        let mut next = SectorCount::ZERO;
        for part in &descriptor.parts {
            assert!(part.start == next && part.end > part.start);
            next = part.end;
        }
        assert_eq!(next, descriptor.disk_size);
    }
    let images = descriptor.parts.iter().map(|part| part.images.len());
    assert!(images.sum::<usize>() <= IMAGES_MAX && descriptor.snapshots.len() <= IMAGES_MAX);
    for oddity in &descriptor.oddities {
        assert!(oddity.to_string().len() < 1000);
    }
    assert!(
        descriptor
            .snapshots
            .iter()
            .any(|shot| shot.guid == descriptor.top)
    );
    assert!(descriptor.frozen().len() < descriptor.snapshots.len());
    // Every walk is as long as the descriptor, so a few of them will do.
    for shot in descriptor.snapshots.iter().take(16) {
        let Ok(chain) = descriptor.chain(shot.guid) else {
            continue;
        };
        assert!(chain.len() <= descriptor.snapshots.len());
        assert_eq!(chain.last(), Some(&shot.guid));
        for part in 0..descriptor.parts.len().min(16) {
            if let Ok(images) = descriptor.images(part, &chain) {
                let guids: Vec<_> = images.iter().map(|image| image.guid).collect();
                assert_eq!(guids, chain);
            }
        }
    }
});
