//! Other sizes and fuller files: power cuts at every operation, refusals, other programs.
//!
//! A command is cut after each operation, with any of what was not durable kept or lost. What is
//! left must show the disk as it was or as it will be, must have nothing wrong but its mark and
//! wasted space, and the command repeated must end with the very bytes of an undisturbed one.

#[path = "resize/bundles.rs"]
mod bundles;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "resize/interop.rs"]
mod interop;
#[path = "resize/net.rs"]
mod net;
#[path = "resize/refusals.rs"]
mod refusals;
#[path = "sim/mod.rs"]
mod sim;
#[path = "resize/sizes.rs"]
mod sizes;
