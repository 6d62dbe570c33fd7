//! The stand-in notices what the framework forbids: otherwise the other tests would prove little.

mod memory;
mod objects;
mod vcpu;

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

/// A virtual machine with one vCPU that is about to execute `code` at [`BASE`].
struct Raw {
    vcpu: hv_vcpu_t,
    exit: *const hv_vcpu_exit_t,
    /// Mapped to the guest.
    _memory: Vec<u8>,
}

impl Raw {
    fn new(code: &[u32]) -> Self {
        let mut memory = vec![0u8; 2 * PAGE];
        let at = memory.as_ptr().align_offset(PAGE);
        for (n, word) in code.iter().enumerate() {
            memory[at + 4 * n..][..4].copy_from_slice(&word.to_le_bytes());
        }
        vm(true);
        let (mut vcpu, mut exit) = (0, ptr::null());
        // SAFETY: pointers are to live values, and the memory outlives its mapping.
        unsafe {
            assert_eq!(hv_vm_map(memory.as_ptr().wrapping_add(at).cast(), BASE, PAGE, ALL), 0);
            assert_eq!(hv_vcpu_create(&mut vcpu, &mut exit, ptr::null_mut()), 0);
            assert_eq!(hv_vcpu_set_sys_reg(vcpu, hv_sys_reg_t::MPIDR_EL1, 0x8000_0000), 0);
        }
        let raw = Self { vcpu, exit, _memory: memory };
        raw.again();
        raw
    }

    /// Puts it where it began.
    fn again(&self) {
        self.set_pc(BASE);
        // SAFETY: the call takes no pointers. Whoever sets PSTATE may set PC too.
        assert_eq!(unsafe { hv_vcpu_set_reg(self.vcpu, hv_reg_t::CPSR, 0x3c5) }, 0);
    }

    fn run(&self) -> hv_return_t {
        // SAFETY: what is mapped lives as long as this.
        unsafe { hv_vcpu_run(self.vcpu) }
    }

    /// Class of the exception that ended the last run.
    fn class(&self) -> u64 {
        // SAFETY: it lives as long as the vCPU, which does not run.
        let exit = unsafe { *self.exit };
        assert_eq!(exit.reason, hv_exit_reason_t::EXCEPTION);
        exit.exception.syndrome >> 26
    }

    fn pc(&self) -> u64 {
        let mut pc = 0;
        // SAFETY: the pointer is to a live value.
        assert_eq!(unsafe { hv_vcpu_get_reg(self.vcpu, hv_reg_t::PC, &mut pc) }, 0);
        pc
    }

    fn set_pc(&self, pc: u64) {
        // SAFETY: the call takes no pointers.
        assert_eq!(unsafe { hv_vcpu_set_reg(self.vcpu, hv_reg_t::PC, pc) }, 0);
    }

    /// Takes everything back.
    fn end(self) {
        // SAFETY: the calls take no pointers.
        unsafe {
            assert_eq!(hv_vcpu_destroy(self.vcpu), 0);
            assert_eq!(hv_vm_unmap(BASE, PAGE), 0);
            assert_eq!(hv_vm_destroy(), 0);
        }
    }
}
