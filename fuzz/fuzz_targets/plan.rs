//! Any chain and any requests, planned: every byte of a plan for a read, a write or a discard is
//! what a per-byte oracle says of it.
//!
//! README.md says how to run it.
#![no_main]

#[path = "../../tests/plan/oracle.rs"]
mod oracle;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use oracle::{Recipe, check_discards, check_obstacles, check_reads, check_writes, range};

/// Bytes of a request: more than a plan has room for, where nothing merges.
const LEN_MAX: u64 = 5 << 10;

/// Small clusters and few of them, since the oracle looks at every byte.
fn recipe(input: &mut Unstructured<'_>) -> Result<Recipe> {
    let options = input.arbitrary::<u8>()?;
    let clusters = u64::from(input.arbitrary::<u8>()? % 13 + 1);
    let cut = u64::from(input.arbitrary::<u16>()? % 512);
    let depth = options >> 2 & 3;
    let mut level = || -> Result<_> {
        let end = u64::from(input.arbitrary::<u8>()? % 18);
        let mapped = input.arbitrary::<u16>()?;
        let mut map = Vec::new();
        for cluster in (0..clusters).filter(|cluster| mapped >> cluster & 1 == 1) {
            map.push((cluster, u64::from(input.arbitrary::<u8>()? % 24)));
        }
        Ok((map, end))
    };
    Ok(Recipe {
        sectors: [1, 1, 1, 3][usize::from(options & 3)],
        clusters,
        cut,
        levels: (0..=depth).map(|_| level()).collect::<Result<_>>()?,
        neighbours: options >> 4 & 1 == 1,
    })
}

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let Ok(recipe) = recipe(&mut input) else {
        return;
    };
    let chain = recipe.chain();
    check_discards(&chain);
    for _ in 0..2 {
        let Ok([a, b, zeros]) = input.arbitrary::<[u16; 3]>() else {
            return;
        };
        let (at, len) = range(&chain, a.into(), b.into());
        let len = len.min(LEN_MAX);
        check_reads(&chain, at, len);
        check_writes(&chain, at, len, zeros.into());
        check_obstacles(chain.clone(), at, len, u64::from(zeros >> 8) % 16);
    }
});
