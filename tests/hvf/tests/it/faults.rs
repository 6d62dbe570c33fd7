//! What happens when the framework fails.

use std::path::Path;

use anyhow::{Result, bail};
use squib_hvf_stand_in::{Session, hv_error_t};
use squib_snapshot::{
    Durability,
    capture::{CaptureOptions, capture},
    restore::{MemoryLoad, RestoreOptions, restore},
};
use squib_tests::console::Capture;
use squib_vmm::machine::{Machine, Outcome};

use crate::common::{PATIENCE, lines, power_off, tiny, wait};

/// Every code but success.
const CODES: [hv_error_t; 9] = [
    hv_error_t::HV_ERROR,
    hv_error_t::HV_BUSY,
    hv_error_t::HV_BAD_ARGUMENT,
    hv_error_t::HV_ILLEGAL_GUEST_STATE,
    hv_error_t::HV_NO_RESOURCES,
    hv_error_t::HV_NO_DEVICE,
    hv_error_t::HV_DENIED,
    hv_error_t::HV_FAULT,
    hv_error_t::HV_UNSUPPORTED,
];

/// Calls that leave nobody to tell when they fail: the machine is going away, or a vCPU stays in the guest.
const QUIET: [&str; 4] = ["hv_vcpus_exit", "hv_vcpu_destroy", "hv_vm_destroy", "hv_vm_unmap"];

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
fn a_call_that_fails_ends_in_an_error_that_names_it() {
    let session = Session::begin();
    fresh_life().unwrap();
    let calls = session.calls();
    assert!(calls.len() > 35, "{calls:?}");
    for (n, (call, times)) in calls.into_iter().enumerate() {
        if QUIET.contains(&call) {
            continue;
        }
        // The first one, and one in the middle of a life.
        for after in [0, times / 2] {
            let code = CODES[(n + after as usize) % CODES.len()];
            session.inject(call, after, code);
            let result = fresh_life();
            session.heal();
            let error = format!("{:#}", result.expect_err(call));
            let named = error.contains("Hypervisor.framework") || error.contains("panicked");
            assert!(named && !error.contains("panicked"), "{call} after {after}: {error}");
        }
    }
    assert_eq!(session.violations(), Vec::<String>::new());
    fresh_life().unwrap();
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

#[test]
fn an_access_that_the_cpu_does_not_describe_ends_the_machine_with_its_place() {
    let session = Session::begin();
    let folder = tempfile::tempdir().unwrap();
    let console = Capture::default();
    let machine = Machine::boot(tiny(folder.path()), Box::new(console.clone())).unwrap();
    machine.resume().unwrap();
    lines(&machine, &console, 1).unwrap();
    session.hide_next_access();
    let ended = wait(&machine, &console, |_| false).unwrap_err().to_string();
    assert!(ended.contains("cannot be emulated"), "{ended}");
    let Some(Outcome::Crashed(crash)) = machine.wait_timeout(PATIENCE) else {
        panic!("it goes on")
    };
    assert!(crash.pc.is_some());
}

#[test]
fn a_machine_that_the_host_cannot_have_is_refused() -> Result<()> {
    let _session = Session::begin();
    let folder = tempfile::tempdir()?;
    let mut config = tiny(folder.path());
    config.vcpus = 33;
    if Machine::boot(config, Box::new(std::io::sink())).is_ok() {
        bail!("33 vCPUs");
    }
    Ok(())
}
