//! The hvf backend, unmodified, on the stand-in for its framework.
#![cfg(not(target_os = "macos"))]

mod common;
mod exits;
mod faults;
mod hosts;
mod log;
mod machine;
mod rules;
mod snapshots;
mod systems;
mod told;
mod transparency;
mod traps;

use squib_hvf_stand_in::Session;
