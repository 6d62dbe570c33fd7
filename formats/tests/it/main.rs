//! Whole snapshots on disk: round trips, damage, publishing, and the snapshots of released formats.

mod common;
mod damage;
mod diffs;
mod faults;
mod fuzz;
mod golden;
mod publishing;
mod raw;
mod reordering;
mod round_trip;
mod sparse;
mod working_set;
