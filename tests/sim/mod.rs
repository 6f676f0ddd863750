//! A disk in a world where everything comes from a seed: which thread runs, what the clock says,
//! which operation fails, when the process is killed, and what a power cut leaves of the files.
//!
//! [`scheduler`] lets one thread run at a time. [`storage`] and [`directory`] are files and names
//! of one [`world`], which knows what has been synced, and logs all that is done to them.
//! [`workload`] makes clients work on a disk over such files. [`media`] is what the log leaves on
//! the medium, and what a power cut makes of that; [`replay`] goes through the log and cuts the
//! power after every operation. [`model`] says what each sector may then hold, and [`faults`] which
//! errors may follow from an operation that fails.
//!
//! Imports: `ploopfs`, the forge.
//! Never: asks the real clock, or anything else that a seed does not fix.

// Each test program that includes this uses a part of it.
#![allow(dead_code)]

pub(crate) mod directory;
pub(crate) mod event;
pub(crate) mod faults;
pub(crate) mod heap;
pub(crate) mod kinds;
pub(crate) mod media;
pub(crate) mod model;
pub(crate) mod pool;
pub(crate) mod replay;
pub(crate) mod scheduler;
pub(crate) mod storage;
pub(crate) mod workload;
pub(crate) mod world;
