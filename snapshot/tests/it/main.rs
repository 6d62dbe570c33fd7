//! Captures and restores: with a machine that exists only in the test, and with real ones.

mod captures;
mod checks;
mod diffs;
mod disks;
mod guest;
mod manage;
mod memory;
mod outside;
mod raw_disks;
mod restores;
// Holes are asked for on Linux only.
#[cfg(target_os = "linux")]
mod sparse;
