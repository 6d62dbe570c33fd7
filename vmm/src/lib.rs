//! One running machine: its configuration, boot, backends, vCPU threads, pause and resume.
//!
//! [`Machine::boot`](machine::Machine::boot) makes a paused machine from a [`MachineConfig`](config::MachineConfig);
//! [`Machine::restore`](machine::Machine::restore) makes one from the sections of a snapshot. Both are set
//! going by [`Machine::resume`](machine::Machine::resume).
#![warn(missing_docs)]

pub mod boot;
pub mod config;
pub mod hypervisor;
pub mod machine;
pub mod psci;
mod seed;
pub mod signals;
