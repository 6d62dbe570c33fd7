#![warn(missing_docs)]
//! What the end-to-end tests and the bench-side tools share.

#[cfg(all(feature = "hvf-hardware", not(all(target_os = "macos", target_arch = "aarch64"))))]
compile_error!(
    "hvf-hardware: these tests run on Hypervisor.framework, on a Mac with Apple silicon and macOS 15 or later \
     (docs/macos.md); `cargo test -p squib-hvf-stand-in` runs them on a stand-in anywhere"
);

pub mod console;
pub mod debian;
pub mod difftest;
pub mod hostile;
pub mod linux;
pub mod macho;
pub mod retime;
pub mod scenario;
pub mod tiny;
pub mod transparency;
pub mod versus;
