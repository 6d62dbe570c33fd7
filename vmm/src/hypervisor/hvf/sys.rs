//! The calls into the framework that `applevisor` has no safe form for.

use std::ffi::{c_char, c_int, c_void};

use applevisor::prelude::{HypervisorError as Code, SimdFpReg, Vcpu};
use applevisor_sys as hv;

/// What a vCPU may do with mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    /// Read and execute.
    ReadExec,
    /// Read, write and execute.
    All,
}

impl Rights {
    // Not by `applevisor::MemPerms as u64`: that is the number of the variant, not the framework's bits.
    fn flags(self) -> hv::hv_memory_flags_t {
        match self {
            Self::ReadExec => hv::HV_MEMORY_READ | hv::HV_MEMORY_EXEC,
            Self::All => hv::HV_MEMORY_READ | hv::HV_MEMORY_WRITE | hv::HV_MEMORY_EXEC,
        }
    }
}

/// Maps `size` bytes at `host` to guest-physical `ipa`.
///
/// # Safety
///
/// The bytes must stay mapped in this process until the VM is destroyed, and no Rust reference to them may
/// exist while a vCPU runs.
pub(super) unsafe fn map(host: *mut u8, ipa: u64, size: u64, rights: Rights) -> Result<(), Code> {
    // SAFETY: as the caller promises.
    checked(unsafe { hv::hv_vm_map(host.cast(), ipa, size as usize, rights.flags()) })
}

/// Changes the rights of mapped memory.
pub(super) fn protect(ipa: u64, size: u64, rights: Rights) -> Result<(), Code> {
    // SAFETY: the call takes no pointers; it only changes what vCPUs may do.
    checked(unsafe { hv::hv_vm_protect(ipa, size as usize, rights.flags()) })
}

/// Takes memory out of the guest-physical address space.
pub(super) fn unmap(ipa: u64, size: u64) -> Result<(), Code> {
    // SAFETY: the call takes no pointers; it only takes away what vCPUs can reach.
    checked(unsafe { hv::hv_vm_unmap(ipa, size as usize) })
}

/// Destroys a vCPU of this thread, which must not be used any more.
pub(super) fn destroy_vcpu(vcpu: &Vcpu) -> Result<(), Code> {
    // SAFETY: the call takes no pointers; what it frees, the last exit's description, only `vcpu` points to.
    checked(unsafe { hv::hv_vcpu_destroy(vcpu.id()) })
}

/// Destroys the virtual machine of the process.
pub(super) fn destroy_vm() -> Result<(), Code> {
    // SAFETY: the call takes no pointers, and whoever still makes others is answered with an error.
    checked(unsafe { hv::hv_vm_destroy() })
}

/// Gives the interrupt controller the state in `bytes`, which the framework checks.
pub(super) fn set_gic_state(bytes: &[u8]) -> Result<(), Code> {
    // SAFETY: pointer and length are those of a live slice, which is only read.
    checked(unsafe { hv::hv_gic_set_state(bytes.as_ptr().cast(), bytes.len()) })
}

/// Sets a vector register. The framework takes the value in a vector register; a `u128`, as `applevisor`
/// declares it for stable compilers, goes into two general registers there.
#[cfg(target_os = "macos")]
pub(super) fn set_vector(vcpu: &Vcpu, register: SimdFpReg, value: u128) -> Result<(), Code> {
    let code: u64;
    // SAFETY: this is a call by the procedure call standard: vCPU and register in x0 and x1, the value in
    // v0, the result in x0; everything that a callee may change is declared.
    unsafe {
        std::arch::asm!(
            "ldr q0, [{value}]",
            "bl {call}",
            value = in(reg) &raw const value,
            call = sym hv::hv_vcpu_set_simd_fp_reg,
            inlateout("x0") vcpu.id() => code,
            in("x1") register as u64,
            clobber_abi("C"),
        );
    }
    checked(code as hv::hv_return_t)
}

/// Sets a vector register. A stand-in takes the value as `applevisor` declares it.
#[cfg(not(target_os = "macos"))]
pub(super) fn set_vector(vcpu: &Vcpu, register: SimdFpReg, value: u128) -> Result<(), Code> {
    vcpu.set_simd_fp_reg(register, value)
}

#[repr(C)]
#[derive(Default)]
struct Timebase {
    numer: u32,
    denom: u32,
}

unsafe extern "C" {
    safe fn mach_absolute_time() -> u64;
    fn mach_timebase_info(info: *mut Timebase) -> i32;
    fn sysctlbyname(
        name: *const c_char,
        old: *mut c_void,
        old_len: *mut usize,
        new: *const c_void,
        new_len: usize,
    ) -> c_int;
}

/// The host's counter, from which the framework derives the virtual one.
pub(super) fn host_ticks() -> u64 {
    mach_absolute_time()
}

/// Ticks of the host's counter a second; none if the host does not say.
pub(super) fn host_frequency() -> Option<u64> {
    let mut timebase = Timebase::default();
    // SAFETY: the pointer is to a live structure of that layout.
    let code = unsafe { mach_timebase_info(&raw mut timebase) };
    let Timebase { numer, denom } = timebase;
    // One tick is numer / denom nanoseconds.
    let ticks = (1_000_000_000 * u64::from(denom)).checked_div(numer.into());
    ticks.filter(|ticks| code == 0 && *ticks > 0)
}

/// Keeps the thread on fast cores and its timers exact: the guest is what somebody waits for. It is only a wish. A
/// Mach policy for the thread, of whatever kind, would take it back.
pub(super) fn prefer_fast_cores() {
    #[cfg(target_os = "macos")]
    {
        /// <sys/qos.h>
        const QOS_CLASS_USER_INTERACTIVE: u32 = 0x21;

        unsafe extern "C" {
            safe fn pthread_set_qos_class_self_np(class: u32, relative_priority: i32) -> i32;
        }

        let code = pthread_set_qos_class_self_np(QOS_CLASS_USER_INTERACTIVE, 0);
        if code != 0 {
            tracing::debug!("the vCPU's thread keeps its quality of service: error {code}");
        }
    }
}

/// Which build of the operating system this is: the framework's own state is only for the build that wrote it.
pub(super) fn host_build() -> String {
    let mut text = [0u8; 64];
    let mut len = text.len();
    // SAFETY: the buffer has `len` bytes, the name ends with a zero byte, and nothing is set.
    let code = unsafe {
        let (name, none) = (c"kern.osversion".as_ptr(), std::ptr::null());
        sysctlbyname(name, text.as_mut_ptr().cast(), &raw mut len, none, 0)
    };
    if code != 0 {
        return "unknown".to_owned();
    }
    let text = text[..len.min(text.len())].split(|byte| *byte == 0).next();
    String::from_utf8_lossy(text.unwrap_or_default()).into_owned()
}

fn checked(code: hv::hv_return_t) -> Result<(), Code> {
    if code == hv::hv_error_t::HV_SUCCESS as hv::hv_return_t { Ok(()) } else { Err(code.into()) }
}
