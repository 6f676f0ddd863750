//! The commands that only read: every kind of disk, against a dumb oracle and `qemu-img`.

#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "read/kinds.rs"]
mod kinds;
#[path = "read/source.rs"]
mod source;
mod support;

use support::harness::{self, trial};
use support::probe::Need;

fn main() {
    harness::main(vec![
        trial(
            "sources_of_ours_hold_what_the_model_says",
            &[],
            source::sources_of_ours_hold_what_the_model_says,
        ),
        trial("raw_files_are_sources", &[], source::raw_files_are_sources),
        trial(
            "block_devices_are_sources",
            &[Need::Root, Need::Loop],
            source::block_devices_are_sources,
        ),
        trial(
            "other_formats_are_read_through_qemu",
            &[Need::Qemu],
            source::other_formats_are_read_through_qemu,
        ),
        trial("samples_are_sources", &[], source::samples_are_sources),
        trial(
            "what_is_in_use_is_read_and_told",
            &[],
            source::what_is_in_use_is_read_and_told,
        ),
    ])
}
