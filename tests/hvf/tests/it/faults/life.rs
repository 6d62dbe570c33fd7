//! Whole lives in which a call fails somewhere, or is cut short for no reason.

use std::path::Path;

use anyhow::Result;
use squib_hvf_stand_in::{Session, hv_error_t};
use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    restore::{MemoryLoad, RestoreOptions, restore},
};
use squib_tests::console::Capture;
use squib_vmm::machine::Machine;

use super::{CODES, calls, somewhere};
use crate::common::{PATIENCE, lines, power_off, tiny};

/// Boots, saves, restores with memory brought by faults, saves a moment while the guest goes on.
fn life(folder: &Path) -> Result<()> {
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder), Box::new(console.clone()))?;
    machine.resume()?;
    lines(&machine, &console, 2)?;
    machine.pause(PATIENCE)?;
    let path = folder.join("snap");
    let options = CaptureOptions { durability: Durability::None, ..CaptureOptions::default() };
    capture(&machine, &path, &options)?;
    drop(machine);
    let options = RestoreOptions {
        disk_dir: Some(folder.join("disks")),
        memory: MemoryLoad::Record,
        ..RestoreOptions::default()
    };
    std::fs::create_dir(folder.join("disks"))?;
    let machine = restore(&path, &options, Box::new(console.clone()))?.machine;
    machine.resume()?;
    lines(&machine, &console, 2)?;
    machine.pause(PATIENCE)?;
    let _frozen = machine.freeze(1 << 30)?;
    machine.resume()?;
    lines(&machine, &console, 2)?;
    power_off(&machine)
}

fn fresh_life() -> Result<()> {
    life(tempfile::tempdir()?.path())
}

#[test]
fn a_call_that_fails_somewhere_in_a_life_ends_in_an_error_that_names_it() {
    let session = Session::begin();
    let (found, lived) = calls(&session, fresh_life);
    lived.unwrap();
    assert!(found.len() > 35, "{found:?}");
    for (n, (call, times)) in found.into_iter().enumerate() {
        let code = CODES[n % CODES.len()];
        // Lives are not of equal length.
        let after = somewhere(times.div_ceil(2), call);
        session.inject(call, after, code);
        let result = fresh_life();
        session.heal();
        let error = format!("{:#}", result.expect_err(call));
        let named = error.contains("Hypervisor.framework") && !error.contains("panicked");
        assert!(named, "{call} after {after}: {error}");
    }
    assert_eq!(session.violations(), Vec::<String>::new());
    fresh_life().unwrap();
}

#[test]
fn a_call_that_fails_once_ends_in_an_error_that_names_it_or_costs_nothing() {
    let session = Session::begin();
    let (found, lived) = calls(&session, fresh_life);
    lived.unwrap();
    for (n, (call, times)) in found.into_iter().enumerate() {
        let code = CODES[(n + 4) % CODES.len()];
        let after = somewhere(times.div_ceil(2), (call, "once"));
        session.inject_once(call, after, code);
        if let Err(error) = fresh_life() {
            let error = format!("{error:#}");
            let named = error.contains("Hypervisor.framework") && !error.contains("panicked");
            assert!(named, "{call} after {after}: {error}");
        }
        session.heal();
    }
    assert_eq!(session.violations(), Vec::<String>::new());
}

#[test]
fn a_life_whose_runs_are_cancelled_for_no_reason_loses_nothing() {
    let session = Session::begin();
    for every in [2, 3] {
        session.cancel_every(every);
        fresh_life().unwrap();
    }
}

#[test]
fn an_error_says_what_usually_helps() {
    let session = Session::begin();
    let said = |call, code| {
        session.inject(call, 0, code);
        let error = format!("{:#}", fresh_life().unwrap_err());
        session.heal();
        error
    };
    let denied = said("hv_vm_create", hv_error_t::HV_DENIED);
    assert!(denied.contains("com.apple.security.hypervisor"), "{denied}");
    let busy = said("hv_vm_create", hv_error_t::HV_BUSY);
    assert!(busy.contains("one virtual machine a process"), "{busy}");
    let refused = said("hv_gic_set_state", hv_error_t::HV_BAD_ARGUMENT);
    assert!(refused.contains("it was made on this build"), "{refused}");
    let register = said("hv_vcpu_set_simd_fp_reg", hv_error_t::HV_ERROR);
    assert!(register.contains("vCPU 0: setting Q"), "{register}");
    let memory = said("hv_vm_map", hv_error_t::HV_NO_RESOURCES);
    assert!(memory.contains("bytes of RAM at 0x80000000"), "{memory}");
}
