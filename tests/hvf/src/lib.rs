//! A stand-in for Hypervisor.framework: the C symbols that `applevisor-sys` leaves open where the framework
//! is not, on the software CPU and the GICv3 model. With it the hvf backend is linked and run, unmodified, on
//! any host.
//!
//! It is strict: what the framework forbids, and what it would bear but no backend
//! should do, is a [violation](Session::violations) that fails the test. Calls fail, vCPUs leave the guest
//! and aborts are described otherwise [when told to](Session::inject), and [hosts](Host) differ.
//!
//! There is one virtual machine a process, so a test begins with a [`Session`], of which there is one at a
//! time.
#![cfg(not(target_os = "macos"))]

mod cpu;
mod decode;
mod gic;
mod host;
mod object;
mod registers;
mod rules;
mod system;
mod time;
mod vcpu;
mod vm;

pub use applevisor_sys::{hv_error_t, hv_exit_reason_t};
pub use host::{Geometry, Host};
pub use rules::{Exit, Report, Session, Walk};
