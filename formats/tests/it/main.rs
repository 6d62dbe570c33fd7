//! Whole snapshots on disk: round trips, damage and publishing.

mod common;
mod damage;
mod publishing;
mod round_trip;
