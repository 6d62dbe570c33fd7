//! The calls that concern one vCPU, on its own thread.

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use applevisor_sys as hv;
use parking_lot::Mutex;
use squib_soft::Signals;

use crate::{
    cpu::Local,
    object::Object,
    registers,
    rules::{self, Answer, begin, code, give, has_failed, violation},
    vm,
};

thread_local! {
    /// The vCPUs that this thread has made.
    static OWN: Own = Own::default();
}

#[derive(Default)]
struct Own(RefCell<HashMap<u64, Local>>);

impl Own {
    fn take(&self, vcpu: u64) {
        if let Some(local) = self.0.borrow_mut().remove(&vcpu) {
            // SAFETY: it is from `create`, and the caller does not use it any more.
            drop(unsafe { Box::from_raw(local.exit) });
        }
        vm::remove_vcpu(vcpu);
    }
}

impl Drop for Own {
    /// The kernel ends the vCPUs of a thread that ends.
    fn drop(&mut self) {
        let left: Vec<u64> = self.0.borrow().keys().copied().collect();
        for vcpu in left {
            if !has_failed("hv_vcpu_destroy") {
                violation(format!("the thread of vCPU {vcpu} ends before it is destroyed"));
            }
            self.take(vcpu);
        }
    }
}

/// A vCPU as all threads see it.
#[derive(Default)]
pub(crate) struct Entry {
    index: OnceLock<u32>,
    /// How many vCPUs were made before it.
    pub(crate) order: u64,
    pub(crate) running: AtomicBool,
    pub(crate) exit_requested: AtomicBool,
    /// In a WFI in the guest.
    pub(crate) asleep: AtomicBool,
    signals: Mutex<Option<Arc<Signals>>>,
}

impl Entry {
    /// Its number by MPIDR_EL1, once that is set.
    pub(crate) fn index(&self) -> Option<u32> {
        self.index.get().copied()
    }

    pub(crate) fn set_index(&self, index: u32) {
        if *self.index.get_or_init(|| index) != index {
            violation("MPIDR_EL1 is set twice");
        }
    }

    pub(crate) fn connect(&self, signals: Arc<Signals>) {
        let mut connected = self.signals.lock();
        // Whoever has asked just now has found nobody here.
        if self.exit_requested.load(Ordering::SeqCst) {
            signals.kick();
        }
        *connected = Some(signals);
    }

    fn request_exit(&self) {
        if self.asleep.load(Ordering::SeqCst) && rules::lose_exit() {
            return;
        }
        self.exit_requested.store(true, Ordering::SeqCst);
        if let Some(signals) = &*self.signals.lock() {
            signals.kick();
        }
    }
}

/// Does `work` on a vCPU of this thread.
fn with<T>(vcpu: u64, work: impl FnOnce(&mut Local) -> Answer<T>) -> Answer<T> {
    OWN.with(|own| match own.0.borrow_mut().get_mut(&vcpu) {
        Some(local) => work(local),
        None => {
            let found = vm::with(|vm| Ok(vm.vcpus.get(&vcpu).map(Arc::clone)))?;
            let idle = AtomicBool::new(false);
            Err(vm::bad_vcpu(
                vcpu,
                found.is_some(),
                found.as_ref().map_or(&idle, |entry| &entry.running),
            ))
        }
    })
}

/// The number of a vCPU of this thread, which must have MPIDR_EL1.
pub(crate) fn index(vcpu: u64) -> Answer<u32> {
    with(vcpu, |local| {
        local.entry.index().ok_or_else(|| violation("a redistributor without MPIDR_EL1"))
    })
}

fn create(vcpu: *mut u64, exit: *mut *const hv::hv_vcpu_exit_t) -> Answer {
    let (id, entry, counter) = vm::with(|vm| {
        let id = vm.next_vcpu;
        vm.next_vcpu += 1;
        let entry = Arc::new(Entry { order: id, ..Entry::default() });
        vm.vcpus.insert(id, Arc::clone(&entry));
        Ok((id, entry, Arc::clone(&vm.counter)))
    })?;
    let none =
        hv::hv_vcpu_exit_exception_t { syndrome: 0, virtual_address: 0, physical_address: 0 };
    let shown = hv::hv_vcpu_exit_t { reason: hv::hv_exit_reason_t::UNKNOWN, exception: none };
    let shown = Box::into_raw(Box::new(shown));
    OWN.with(|own| own.0.borrow_mut().insert(id, Local::new(entry, shown, counter)));
    // SAFETY: the caller gives places for both answers.
    unsafe {
        vcpu.write(id);
        exit.write(shown);
    }
    Ok(())
}

fn destroy(vcpu: u64) -> Answer {
    with(vcpu, |_| Ok(()))?;
    OWN.with(|own| own.take(vcpu));
    Ok(())
}

fn exit_all(ids: &[u64]) -> Answer {
    let entries = vm::with(|vm| {
        let found: Vec<_> = ids.iter().filter_map(|id| vm.vcpus.get(id).map(Arc::clone)).collect();
        Ok(found)
    })?;
    if entries.len() != ids.len() || ids.is_empty() {
        return Err(violation(format!("hv_vcpus_exit of {ids:?}")));
    }
    entries.iter().for_each(|entry| entry.request_exit());
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_create(
    vcpu: *mut u64,
    exit: *mut *const hv::hv_vcpu_exit_t,
    _config: *mut c_void,
) -> hv::hv_return_t {
    code(begin("hv_vcpu_create").and_then(|()| create(vcpu, exit)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_destroy(vcpu: u64) -> hv::hv_return_t {
    code(begin("hv_vcpu_destroy").and_then(|()| destroy(vcpu)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_run(vcpu: u64) -> hv::hv_return_t {
    code(begin("hv_vcpu_run").and_then(|()| with(vcpu, Local::run)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpus_exit(ids: *const u64, count: u32) -> hv::hv_return_t {
    // SAFETY: the caller gives that many identifiers; a slice of none needs no memory.
    let ids = unsafe { std::slice::from_raw_parts(ids, count as usize) };
    code(begin("hv_vcpus_exit").and_then(|()| exit_all(ids)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_config_create() -> *mut c_void {
    Object::VcpuConfig.give()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_config_get_feature_reg(
    _config: *mut c_void,
    feature: hv::hv_feature_reg_t,
    value: *mut u64,
) -> hv::hv_return_t {
    use hv::hv_feature_reg_t as F;
    let register: u16 = match feature {
        F::ID_AA64DFR0_EL1 => 0xc028,
        F::ID_AA64DFR1_EL1 => 0xc029,
        F::ID_AA64ISAR0_EL1 => 0xc030,
        F::ID_AA64ISAR1_EL1 => 0xc031,
        F::ID_AA64MMFR0_EL1 => 0xc038,
        F::ID_AA64MMFR1_EL1 => 0xc039,
        F::ID_AA64MMFR2_EL1 => 0xc03a,
        F::ID_AA64PFR0_EL1 => 0xc020,
        F::ID_AA64PFR1_EL1 => 0xc021,
        F::CTR_EL0 => 0xd801,
        F::CLIDR_EL1 => 0xc801,
        F::DCZID_EL0 => 0xd807,
    };
    let found = registers::id_register(register).unwrap_or(0);
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vcpu_config_get_feature_reg", value, || Ok(found)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_reg(
    vcpu: u64,
    reg: hv::hv_reg_t,
    value: *mut u64,
) -> hv::hv_return_t {
    let answer = || {
        with(vcpu, |local| {
            Ok(match reg {
                hv::hv_reg_t::PC => local.pc(),
                hv::hv_reg_t::FPCR => local.regs().fpcr.into(),
                hv::hv_reg_t::FPSR => local.regs().fpsr.into(),
                hv::hv_reg_t::CPSR => local.regs().pstate,
                general => local.x(general as usize),
            })
        })
    };
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vcpu_get_reg", value, answer) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_reg(vcpu: u64, reg: hv::hv_reg_t, value: u64) -> hv::hv_return_t {
    let set = |local: &mut Local| {
        match reg {
            hv::hv_reg_t::PC => local.set_pc(value),
            hv::hv_reg_t::FPCR => local.regs_mut().fpcr = value as u32,
            hv::hv_reg_t::FPSR => local.regs_mut().fpsr = value as u32,
            hv::hv_reg_t::CPSR => local.set_pstate(value),
            general => local.set_x(general as usize, value),
        }
        Ok(())
    };
    code(begin("hv_vcpu_set_reg").and_then(|()| with(vcpu, set)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_simd_fp_reg(
    vcpu: u64,
    reg: hv::hv_simd_fp_reg_t,
    value: *mut u128,
) -> hv::hv_return_t {
    let answer = || with(vcpu, |local| Ok(local.regs().v[reg as usize]));
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vcpu_get_simd_fp_reg", value, answer) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_simd_fp_reg(
    vcpu: u64,
    reg: hv::hv_simd_fp_reg_t,
    value: u128,
) -> hv::hv_return_t {
    let set = |local: &mut Local| {
        local.regs_mut().v[reg as usize] = value;
        Ok(())
    };
    code(begin("hv_vcpu_set_simd_fp_reg").and_then(|()| with(vcpu, set)))
}

/// `hv_sys_reg_t`, any number of it: a caller may try one that has no name.
type SysRegNumber = u32;

#[unsafe(no_mangle)]
unsafe extern "C" fn hv_vcpu_get_sys_reg(
    vcpu: u64,
    reg: SysRegNumber,
    value: *mut u64,
) -> hv::hv_return_t {
    let answer = || with(vcpu, |local| local.sys_reg(reg as u16));
    // SAFETY: the caller gives a place for the answer.
    unsafe { give("hv_vcpu_get_sys_reg", value, answer) }
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_sys_reg(vcpu: u64, reg: SysRegNumber, value: u64) -> hv::hv_return_t {
    let set = |local: &mut Local| local.set_sys_reg(reg as u16, value);
    code(begin("hv_vcpu_set_sys_reg").and_then(|()| with(vcpu, set)))
}

/// Nothing is trapped here anyway.
#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_trap_debug_exceptions(vcpu: u64, trapped: bool) -> hv::hv_return_t {
    let set = |_: &mut Local| if trapped { Err(violation("a debugged guest")) } else { Ok(()) };
    code(begin("hv_vcpu_set_trap_debug_exceptions").and_then(|()| with(vcpu, set)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_trap_debug_reg_accesses(vcpu: u64, trapped: bool) -> hv::hv_return_t {
    let set = |_: &mut Local| if trapped { Err(violation("a debugged guest")) } else { Ok(()) };
    code(begin("hv_vcpu_set_trap_debug_reg_accesses").and_then(|()| with(vcpu, set)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_vtimer_mask(vcpu: u64, masked: bool) -> hv::hv_return_t {
    let set = |local: &mut Local| {
        local.timer_masked = masked;
        Ok(())
    };
    code(begin("hv_vcpu_set_vtimer_mask").and_then(|()| with(vcpu, set)))
}

#[unsafe(no_mangle)]
extern "C" fn hv_vcpu_set_vtimer_offset(vcpu: u64, offset: u64) -> hv::hv_return_t {
    let set = |local: &mut Local| {
        local.set_offset(offset);
        Ok(())
    };
    code(begin("hv_vcpu_set_vtimer_offset").and_then(|()| with(vcpu, set)))
}
