//! The whole `squib` program with the stand-in in it, for tests: `--backend hvf` works on any host.
//!
//! It ends with 70 where squib did something that the framework forbids, whatever squib's own exit code.
//! With a call's name in `SQUIB_HVF_DENY` that call is denied each time; with `SQUIB_HVF_BREAK_A_RULE` it destroys
//! a virtual machine that is not there.

use std::process::ExitCode;

/// EX_SOFTWARE of sysexits.h, which squib does not use.
#[cfg(not(target_os = "macos"))]
const VIOLATION: u8 = 70;

#[cfg(not(target_os = "macos"))]
fn main() -> ExitCode {
    eprintln!(
        "squib-hvf-linux: for tests only: a stand-in is in the place of Hypervisor.framework"
    );
    let session = squib_hvf_stand_in::Session::begin();
    if let Ok(call) = std::env::var("SQUIB_HVF_DENY") {
        session.inject(call.leak(), 0, squib_hvf_stand_in::hv_error_t::HV_DENIED);
    }
    if std::env::var_os("SQUIB_HVF_BREAK_A_RULE").is_some() {
        // SAFETY: the call takes nothing, and there is nothing that it could destroy.
        unsafe { applevisor_sys::hv_vm_destroy() };
    }
    let code = squib::main();
    let found = session.violations();
    // A virtual machine ends with its process, as the framework's does: one that is left is no violation.
    std::mem::forget(session);
    if found.is_empty() {
        return code;
    }
    eprintln!("squib-hvf-linux: against the framework's rules:");
    found.iter().for_each(|what| eprintln!("  {what}"));
    ExitCode::from(VIOLATION)
}

#[cfg(target_os = "macos")]
fn main() -> ExitCode {
    eprintln!("squib-hvf-linux: here is the framework itself: use squib");
    ExitCode::FAILURE
}
