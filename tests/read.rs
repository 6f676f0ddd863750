//! The commands that only read: every kind of disk, against a dumb oracle and `qemu-img`.

#[path = "read/compare.rs"]
mod compare;
#[path = "../tools/forge/mod.rs"]
mod forge;
#[path = "read/kinds.rs"]
mod kinds;
#[path = "read/manners.rs"]
mod manners;
#[path = "read/map.rs"]
mod map;
#[path = "read/source.rs"]
mod source;
mod support;

use libtest_mimic::Trial;
use support::harness::{self, trial};
use support::probe::Need;

/// The test of that name, which needs these.
macro_rules! test {
    ($module:ident :: $name:ident $(, $need:ident)*) => {
        trial(stringify!($name), &[$(Need::$need),*], $module::$name)
    };
}

fn main() {
    harness::main(
        [sources(), commands(), manners()]
            .into_iter()
            .flatten()
            .collect(),
    );
}

fn sources() -> Vec<Trial> {
    vec![
        test!(source::sources_of_ours_hold_what_the_model_says),
        test!(source::raw_files_are_sources),
        test!(source::the_name_of_a_raw_disk_decides),
        test!(source::block_devices_are_sources, Root, Loop),
        test!(source::other_formats_are_read_through_qemu, Qemu),
        test!(source::what_other_formats_name_lies_beside_them, Qemu),
        test!(source::samples_are_sources),
        test!(source::what_is_in_use_is_read_and_told),
    ]
}

fn commands() -> Vec<Trial> {
    vec![
        test!(map::map_agrees_with_qemu, Qemu),
        test!(map::map_of_a_chain_agrees_with_qemu, Qemu),
        test!(map::map_of_chains_and_parts_agrees_with_the_model),
        test!(map::deltas_named_by_hand_are_mapped),
        test!(map::huge_disks_are_mapped_at_once),
        test!(map::a_million_extents_are_no_trouble),
        test!(map::measure_agrees_with_qemu, Qemu),
        test!(map::measure_counts_what_images_need),
        test!(compare::equal_disks_are_equal_and_a_byte_is_found),
        test!(compare::sizes_are_compared_as_qemu_does, Qemu),
        test!(compare::trouble_is_no_difference),
        test!(compare::the_partition_of_a_difference_is_named, Qemu),
        test!(compare::snapshots_are_compared),
        test!(compare::a_manifest_proves_a_copy_of_any_kind),
        test!(compare::bit_rot_is_found_and_named),
        test!(compare::a_spoilt_manifest_is_trouble),
        test!(compare::samples_are_compared_and_summed_up),
    ]
}

fn manners() -> Vec<Trial> {
    vec![
        test!(manners::reading_changes_nothing_however_broken),
        test!(manners::what_is_in_use_is_told_on_stderr),
        test!(manners::a_reader_that_goes_is_no_panic),
        test!(manners::a_verdict_is_in_the_status),
        test!(manners::signals_ask_and_stop),
        test!(manners::quiet_says_nothing_but_stops),
        test!(manners::an_ignored_signal_stays_ignored),
        test!(manners::a_terminal_gets_a_bar),
        test!(manners::examples_of_the_manual_run),
    ]
}
