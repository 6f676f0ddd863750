//! What the program asks of the heap, seen by a heap of this test's own.
//!
//! Two promises are kept here. A small request to what is mapped is served without any allocation
//! ([`count`]). And when memory is so short that no allocation over 4 KiB succeeds, on any thread,
//! every request is still served to its end ([`busy`]). Both run in a child process that is this
//! program again: the first because no other thread may allocate meanwhile, the second because it
//! is the daemon.

#[path = "../tools/forge/mod.rs"]
mod forge;
mod support;

#[path = "allocation/busy.rs"]
mod busy;
#[path = "allocation/count.rs"]
mod count;
#[path = "allocation/heap.rs"]
mod heap;

use std::process::ExitCode;
use support::harness;

#[global_allocator]
static HEAP: support::heap::Heap<heap::Counting> = heap::HEAP;

fn main() -> ExitCode {
    if let Some(status) = count::child().or_else(busy::child) {
        return status;
    }
    let mut trials = count::trials();
    trials.extend(busy::trials());
    harness::main(trials)
}
