//! Any bytes as a descriptor: no panic, no endless walk, and what is accepted is consistent.
//!
//! README.md says how to run it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ploopfs::format::descriptor::Descriptor;

fuzz_target!(|data: &[u8]| {
    let Ok(descriptor) = Descriptor::parse(data) else {
        return;
    };
    let mut next = descriptor.parts[0].start;
    for part in &descriptor.parts {
        assert!(part.start == next && part.end > part.start);
        next = part.end;
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
