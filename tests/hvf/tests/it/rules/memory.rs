//! Memory, the virtual machine and its interrupt controller.

use std::ptr;

use applevisor_sys::*;
use squib_hvf_stand_in::Session;

use super::{ALL, BASE, PAGE, Raw, create_gic, noticed, vcpu, vm};

#[test]
fn memory_lies_on_whole_pages_and_does_not_overlap() {
    let session = Session::begin();
    let memory = vec![0u8; 4 * PAGE];
    let host = memory.as_ptr().wrapping_add(memory.as_ptr().align_offset(PAGE)).cast();
    // SAFETY: no vCPU runs, so nobody uses the memory.
    unsafe {
        assert_ne!(hv_vm_map(host, BASE, PAGE, ALL), 0);
        noticed(&session, "without a virtual machine");
        vm(false);
        assert_ne!(hv_vm_map(host, BASE + 0x1000, PAGE, ALL), 0);
        noticed(&session, "not whole pages");
        assert_ne!(hv_vm_map(host, BASE, PAGE, HV_MEMORY_READ | HV_MEMORY_WRITE), 0);
        noticed(&session, "rights");
        assert_eq!(hv_vm_map(host, BASE, PAGE, ALL), 0);
        assert_ne!(hv_vm_map(host, BASE, PAGE, ALL), 0);
        noticed(&session, "something is mapped there");
        assert_ne!(hv_vm_protect(BASE + PAGE as u64, PAGE, ALL), 0);
        noticed(&session, "nothing is mapped there");
        assert_ne!(hv_vm_create(ptr::null_mut()), 0);
        noticed(&session, "a second virtual machine");
        assert_eq!(hv_vm_unmap(BASE, PAGE), 0);
        assert_eq!(hv_vm_destroy(), 0);
    }
}

#[test]
fn memory_is_taken_from_a_vcpu_that_rests_and_goes_before_the_virtual_machine() {
    let session = Session::begin();
    let raw = Raw::new(&[0x1400_0000]); // b .
    let vcpu = raw.vcpu;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while session.calls().get("hv_vcpu_run").is_none_or(|runs| *runs < 1) {
                std::thread::yield_now();
            }
            // Until the run has begun it is allowed, and gives the rights that it has.
            const READ_EXEC: u64 = HV_MEMORY_READ | HV_MEMORY_EXEC;
            // SAFETY: the calls take no pointers but one identifier.
            unsafe {
                while hv_vm_protect(BASE, PAGE, READ_EXEC) == 0 {
                    assert_eq!(hv_vm_protect(BASE, PAGE, ALL), 0);
                    std::thread::yield_now();
                }
                assert_eq!(hv_vcpus_exit(&vcpu, 1), 0);
            }
        });
        assert_eq!(raw.run(), 0);
    });
    noticed(&session, "takes rights away from a running vCPU");
    // SAFETY: the calls take no pointers.
    unsafe {
        assert_eq!(hv_vcpu_destroy(raw.vcpu), 0);
        assert_eq!(hv_vm_destroy(), 0);
    }
    noticed(&session, "with memory mapped");
}

#[test]
fn an_interrupt_controller_needs_all_its_places_apart() {
    let session = Session::begin();
    vm(false);
    // SAFETY: the configurations are live ones, and released once.
    unsafe {
        let config = hv_gic_config_create();
        hv_gic_config_set_distributor_base(config, 0x0800_0000);
        hv_gic_config_set_redistributor_base(config, 0x080a_0000);
        assert_ne!(hv_gic_create(config), 0);
        noticed(&session, "without distributor, redistributors or messages");
        // Into the redistributors.
        hv_gic_config_set_msi_region_base(config, 0x0810_0000);
        hv_gic_config_set_msi_interrupt_range(config, 900, 32);
        assert_ne!(hv_gic_create(config), 0);
        noticed(&session, "with regions");
        hv_gic_config_set_msi_region_base(config, 0x0802_1000);
        assert_ne!(hv_gic_create(config), 0);
        noticed(&session, "with regions");
        hv_gic_config_set_msi_region_base(config, 0x0802_0000);
        hv_gic_config_set_msi_interrupt_range(config, 1000, 32);
        assert_ne!(hv_gic_create(config), 0);
        noticed(&session, "with regions");
        hv_gic_config_set_msi_interrupt_range(config, 900, 32);
        assert_eq!(hv_gic_create(config), 0);
        os_release(config.cast());
        assert_ne!(create_gic(), 0);
        noticed(&session, "after another one or after a vCPU");
        assert_eq!(hv_vm_destroy(), 0);
    }
    vm(false);
    let vcpu = vcpu();
    // SAFETY: the calls take no pointers.
    unsafe {
        assert_ne!(create_gic(), 0);
        noticed(&session, "after another one or after a vCPU");
        assert_eq!(hv_vcpu_destroy(vcpu), 0);
        assert_eq!(hv_vm_destroy(), 0);
    }
}

#[test]
fn guest_physical_addresses_are_as_wide_as_was_asked_for() {
    let session = Session::begin();
    // SAFETY: the configuration is a live one, and released once.
    unsafe {
        let config = hv_vm_config_create();
        assert_ne!(hv_vm_config_set_ipa_size(config, 41), 0);
        noticed(&session, "41 bits of guest-physical address");
        assert_eq!(hv_vm_config_set_ipa_size(config, 31), 0);
        assert_eq!(hv_vm_create(config), 0);
        os_release(config.cast());
        let memory = vec![0u8; 2 * PAGE];
        let host = memory.as_ptr().wrapping_add(memory.as_ptr().align_offset(PAGE)).cast();
        assert_ne!(hv_vm_map(host, BASE, PAGE, ALL), 0);
        noticed(&session, "outside");
        assert_eq!(hv_vm_destroy(), 0);
    }
}
