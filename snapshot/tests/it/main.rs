//! Captures and restores: with a machine that exists only in the test, and with real ones.

mod captures;
mod diffs;
mod disks;
mod guest;
mod memory;
mod restores;
