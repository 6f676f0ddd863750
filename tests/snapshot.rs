//! Snapshots and merges: what every state of the disk shows before, after, and after a power cut
//! at any operation; and the commands, beside other programs.

#[path = "snapshot/commands.rs"]
mod commands;
#[path = "snapshot/cuts.rs"]
mod cuts;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "snapshot/manners.rs"]
mod manners;
#[path = "snapshot/plans.rs"]
mod plans;
#[path = "sim/mod.rs"]
mod sim;
#[path = "snapshot/sizes.rs"]
mod sizes;
#[path = "snapshot/steps.rs"]
mod steps;
#[path = "snapshot/world.rs"]
mod world;
