//! The commands as a user runs them, on the hvf backend: the tests of the command line, and what only this
//! backend has. A VM that does what the framework forbids ends with an exit code that no test expects.
#![cfg(not(target_os = "macos"))]

#[path = "../../../../cli/tests/vm/common.rs"]
mod common;
#[path = "../../../../cli/tests/vm/faults.rs"]
mod faults;
#[path = "../../../../cli/tests/vm/life.rs"]
mod life;
#[path = "../../../../cli/tests/vm/modes.rs"]
mod modes;
#[path = "../../../../cli/tests/vm/reboot.rs"]
mod reboot;

mod backends;
mod disks;

/// The program.
const SQUIB: &str = env!("CARGO_BIN_EXE_squib-hvf-linux");
/// What its VMs run on.
const BACKEND: &str = "hvf";
