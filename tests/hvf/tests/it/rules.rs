//! The stand-in notices what the framework forbids: otherwise the other tests would prove little.

use std::ptr;

use applevisor_sys::*;
use squib_hvf_stand_in::Session;

const PAGE: usize = 0x4000;
const BASE: u64 = 0x8000_0000;
const ALL: u64 = HV_MEMORY_READ | HV_MEMORY_WRITE | HV_MEMORY_EXEC;

/// A virtual machine; with an interrupt controller if wanted.
fn vm(gic: bool) {
    // SAFETY: pointers are to live values, objects are released once.
    unsafe {
        assert_eq!(hv_vm_create(ptr::null_mut()), 0);
        if gic {
            assert_eq!(create_gic(), 0);
        }
    }
}

unsafe fn create_gic() -> hv_return_t {
    // SAFETY: the configuration is a live one, and released once.
    unsafe {
        let config = hv_gic_config_create();
        hv_gic_config_set_distributor_base(config, 0x0800_0000);
        hv_gic_config_set_redistributor_base(config, 0x080a_0000);
        hv_gic_config_set_msi_region_base(config, 0x0802_0000);
        hv_gic_config_set_msi_interrupt_range(config, 900, 32);
        let created = hv_gic_create(config);
        os_release(config.cast());
        created
    }
}

fn vcpu() -> hv_vcpu_t {
    let (mut vcpu, mut exit) = (0, ptr::null());
    // SAFETY: pointers are to live values.
    assert_eq!(unsafe { hv_vcpu_create(&mut vcpu, &mut exit, ptr::null_mut()) }, 0);
    vcpu
}

/// The one thing that was noticed.
fn noticed(session: &Session, what: &str) {
    let found = session.violations();
    assert!(found.len() == 1 && found[0].contains(what), "{what}: {found:?}");
}

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
fn a_vcpu_belongs_to_its_thread_and_its_life() {
    let session = Session::begin();
    vm(true);
    let vcpu = vcpu();
    let mut value = 0;
    // SAFETY: pointers are to live values.
    unsafe {
        assert_ne!(hv_vcpu_run(vcpu), 0);
        noticed(&session, "without MPIDR_EL1");
        assert_ne!(hv_gic_set_state([0u8].as_ptr().cast(), 1), 0);
        noticed(&session, "before there are vCPUs");
        assert_eq!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::MPIDR_EL1, 0x8000_0000), 0);
        assert_ne!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::ID_AA64PFR0_EL1, 0), 0);
        noticed(&session, "identification register");
        assert_ne!(hv_gic_set_icc_reg(vcpu, hv_gic_icc_reg_t::RPR_EL1, 0), 0);
        noticed(&session, "read-only");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut value = 0;
                assert_ne!(hv_vcpu_get_reg(vcpu, hv_reg_t::PC, &mut value), 0);
            });
        });
        noticed(&session, "from another thread");
        assert_ne!(create_gic(), 0);
        noticed(&session, "after another one or after a vCPU");
        assert_ne!(hv_gic_set_spi(910, true), 0);
        noticed(&session, "has no line");
        assert_ne!(hv_vm_destroy(), 0);
        noticed(&session, "with vCPUs");
        assert_eq!(hv_vcpu_destroy(vcpu), 0);
        assert_ne!(hv_vcpu_get_reg(vcpu, hv_reg_t::PC, &mut value), 0);
        noticed(&session, "after it was destroyed");
        assert_eq!(hv_vm_destroy(), 0);
    }
}

#[test]
fn the_program_counter_stands_where_the_exit_leaves_it() {
    let session = Session::begin();
    vm(true);
    let vcpu = vcpu();
    let mut value = 0;
    // SAFETY: pointers are to live values; nothing is mapped.
    unsafe {
        assert_eq!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::MPIDR_EL1, 0x8000_0000), 0);
        assert_eq!(hv_vcpu_set_reg(vcpu, hv_reg_t::CPSR, 0x3c5), 0);
        assert_eq!(hv_vcpu_set_reg(vcpu, hv_reg_t::PC, BASE), 0);
        // Nothing is there: an instruction abort, after which the instruction is tried again.
        assert_eq!(hv_vcpu_run(vcpu), 0);
        assert_eq!(hv_vcpu_get_reg(vcpu, hv_reg_t::PC, &mut value), 0);
        assert_eq!(value, BASE);
        assert_eq!(hv_vcpu_set_reg(vcpu, hv_reg_t::PC, BASE + 4), 0);
        assert_ne!(hv_vcpu_run(vcpu), 0);
        noticed(&session, "must go on at");
        assert_ne!(hv_gic_set_state([0u8].as_ptr().cast(), 1), 0);
        noticed(&session, "after a vCPU has run");
        assert_eq!(hv_vcpu_destroy(vcpu), 0);
        assert_eq!(hv_vm_destroy(), 0);
    }
}
