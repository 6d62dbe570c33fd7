//! The commands as a user runs them, with the tiny guest in them.

mod answers;
mod common;
mod console;
mod faults;
mod inputs;
mod life;
mod limits;
mod modes;
mod reboot;
mod stdio;
mod trust;

/// The program.
const SQUIB: &str = env!("CARGO_BIN_EXE_squib");
/// What its VMs run on: on a Mac it can be hvf, see docs/macos.md.
const BACKEND: &str = match option_env!("SQUIB_TEST_BACKEND") {
    Some(backend) => backend,
    None => "soft",
};
