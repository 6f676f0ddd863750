//! The planner against an oracle that thinks of one byte at a time.
//!
//! `fuzz/fuzz_targets/plan.rs` asks the same oracle about chains that a fuzzer thinks of.

#[path = "plan/oracle.rs"]
mod oracle;

use oracle::{Recipe, check_discards, check_obstacles, check_reads, check_writes, range};
use proptest::prelude::*;

prop_compose! {
    fn recipe()(
        sectors in prop::sample::select(vec![1_u32, 3, 8]),
        clusters in 1_u64..40,
        cut in 0_u64..512,
        levels in prop::collection::vec(
            (prop::collection::vec((0_u64..40, 0_u64..60), 0..40), 0_u64..45), 1..5),
        neighbours in any::<bool>(),
    ) -> Recipe {
        Recipe { sectors, clusters, cut, levels, neighbours }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn plans_agree_with_the_oracle(
        recipe in recipe(),
        requests in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..6),
    ) {
        let chain = recipe.chain();
        for (a, b, zeros) in requests {
            let (at, len) = range(&chain, a, b);
            check_reads(&chain, at, len);
            check_writes(&chain, at, len, zeros);
        }
        check_discards(&chain);
    }

    #[test]
    fn obstacles_stop_plans_where_they_are(
        recipe in recipe(),
        a in any::<u64>(), b in any::<u64>(), obstacle in 0_u64..40,
    ) {
        let chain = recipe.chain();
        let (at, len) = range(&chain, a, b);
        check_obstacles(chain, at, len, obstacle);
    }
}
