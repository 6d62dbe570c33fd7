//! Apple's Hypervisor.framework, with the interrupt controller inside it (macOS 15 and later).
//!
//! There is one virtual machine a process. A vCPU is used by the thread that made it, but for
//! `hv_vcpus_exit`. The framework has no dirty log and no page faults of its own: what a guest may touch is
//! kept at stage 2, and an access that is not allowed leaves the guest.
//!
//! On other systems the framework's symbols stay open. Whoever defines them, as the tests do, calls
//! [`use_stand_in`]; until then this backend is not available there.

mod chip;
mod counter;
mod error;
mod idle;
mod lifetime;
mod registers;
mod stage2;
mod state;
mod syndrome;
mod sys;
mod vcpu;

use std::sync::{Arc, OnceLock};

use applevisor::prelude::{FeatureReg, Vcpu as Cpu, VcpuConfig, VirtualMachineConfig};
use parking_lot::Mutex;
use squib_devices::{
    device::MachineDevice,
    irq::IrqChip,
    map::{self, Range},
    memory::GuestRam,
};
use squib_formats::persist::{Section, Versioned};

pub use error::HvfError;

use self::{
    chip::Lines,
    counter::HvfCounter,
    error::Doing,
    idle::Idle,
    lifetime::{Door, OwnedVm},
    registers::{FEATURES, PFR1_SME},
    stage2::Stage2,
    vcpu::HvfVcpu,
};
use super::{
    Backend, CpuIdentity, HostSystem, HvfGicState, HypervisorError, Limits, SystemCounter, Vcpu, Vm,
};
use crate::config::{BackendKind, MEMORY_MAX, MachineConfig};

/// The backend on the framework, or on a stand-in.
struct Hvf;

impl Backend for Hvf {
    fn create(
        &self,
        config: &MachineConfig,
        ram: &GuestRam,
    ) -> Result<Arc<dyn Vm>, HypervisorError> {
        create(config, ram)
    }

    fn identity(&self) -> Result<CpuIdentity, HypervisorError> {
        identity()
    }

    fn limits(&self) -> Result<Limits, HypervisorError> {
        limits()
    }

    fn host_build(&self) -> Option<String> {
        Some(sys::host_build())
    }
}

/// The backend, if the framework is there.
#[cfg(target_os = "macos")]
pub(super) fn backend() -> Option<&'static dyn Backend> {
    Some(&Hvf)
}

/// Set by [`use_stand_in`]: a program that never says so needs none of the framework's symbols.
#[cfg(not(target_os = "macos"))]
static STAND_IN: OnceLock<&'static dyn Backend> = OnceLock::new();

/// Makes the backend available where the operating system does not have the framework, and the program
/// defines its symbols itself.
#[cfg(not(target_os = "macos"))]
pub fn use_stand_in() {
    STAND_IN.get_or_init(|| &Hvf);
}

/// The backend, if a stand-in is there.
#[cfg(not(target_os = "macos"))]
pub(super) fn backend() -> Option<&'static dyn Backend> {
    STAND_IN.get().copied()
}

/// What all parts of one machine share. Its virtual machine goes away with the last of them, which is never
/// before its vCPUs: each of those keeps it.
struct Machine {
    vm: OwnedVm,
    stage2: Stage2,
    /// Asked for once: what the guest sees of its CPUs does not change, and a snapshot without it would be
    /// restored on any host.
    identity: CpuIdentity,
    counter: Arc<HvfCounter>,
    idle: Idle,
    vcpus: u32,
    /// Registers that cannot be read, as the first vCPU finds out.
    unreadable: OnceLock<Vec<u16>>,
    /// The ways to call the vCPUs out of the guest.
    doors: Mutex<Vec<Arc<Door>>>,
    /// Why a device's interrupt was lost: the next run of any vCPU says so and ends the machine.
    lost: Mutex<Option<HvfError>>,
}

impl Machine {
    /// Makes all vCPUs leave the guest, those too that sleep in a WFI there.
    fn call_out_all(&self) {
        self.idle.wake();
        self.doors.lock().iter().for_each(|door| self.call_out(door));
    }

    /// Makes one vCPU leave the guest now, or at once when it enters it next.
    fn call_out(&self, door: &Door) {
        if let Err(code) = door.call_out(&self.vm) {
            let vcpu = door.index;
            tracing::warn!(
                "vCPU {vcpu} does not leave the guest when called: {code}; it will fault"
            );
            // A guest that spins leaves by nothing else, and whoever waits for it would wait for ever.
            self.stage2.take_away();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stage2.take_away();
    }
}

/// A machine on the framework.
struct HvfVm(Arc<Machine>);

fn create(config: &MachineConfig, ram: &GuestRam) -> Result<Arc<dyn Vm>, HypervisorError> {
    let stage2 = Stage2::new(ram)?;
    let counter = Arc::new(HvfCounter::new(sys::host_frequency().ok_or(HvfError::NoFrequency)?));
    let most = most_vcpus()?;
    if config.vcpus > most {
        let (wanted, most) = (config.vcpus.into(), most.into());
        return Err(HvfError::Limit { what: "vCPUs", wanted, most }.into());
    }
    let vm_config = address_space(ram)?;
    let chip = chip::config()?;
    let identity = identity()?;
    let vm = OwnedVm::create(vm_config, chip, ram)?;
    Ok(Arc::new(HvfVm(Arc::new(Machine {
        vm,
        stage2,
        identity,
        counter,
        idle: Idle::default(),
        vcpus: config.vcpus,
        unreadable: OnceLock::new(),
        doors: Mutex::default(),
        lost: Mutex::default(),
    }))))
}

/// A configuration with guest-physical addresses wide enough for the end of RAM.
fn address_space(ram: &GuestRam) -> Result<VirtualMachineConfig, HvfError> {
    let wanted = u64::BITS - (ram.base() + ram.size() - 1).leading_zeros();
    let mut config = VirtualMachineConfig::new();
    if wanted > VirtualMachineConfig::get_default_ipa_size().doing(asking_for_width)? {
        let most = VirtualMachineConfig::get_max_ipa_size().doing(asking_for_width)?;
        if wanted > most {
            let (what, wanted, most) =
                ("bits of guest-physical address", wanted.into(), most.into());
            return Err(HvfError::Limit { what, wanted, most });
        }
        let setting = || format!("setting {most} bits of guest-physical address");
        config.set_ipa_size(most).doing(setting)?;
    }
    Ok(config)
}

fn limits() -> Result<Limits, HypervisorError> {
    let bits = VirtualMachineConfig::get_max_ipa_size().doing(asking_for_width)?;
    // What has no bit for RAM has no room for it.
    let end = 1u64.checked_shl(bits).unwrap_or(u64::MAX);
    let memory = end.saturating_sub(map::RAM_BASE).min(MEMORY_MAX);
    Ok(Limits { vcpus: most_vcpus()?.min(map::MAX_VCPUS), memory })
}

fn most_vcpus() -> Result<u32, HvfError> {
    Cpu::get_max_count().doing(|| "asking for the most vCPUs".to_owned())
}

fn asking_for_width() -> String {
    "asking for the width of guest-physical addresses".to_owned()
}

fn identity() -> Result<CpuIdentity, HypervisorError> {
    let counter_hz = sys::host_frequency().ok_or(HvfError::NoFrequency)?;
    let config = VcpuConfig::new();
    let mut id_registers = Vec::new();
    for (feature, register) in FEATURES {
        let value = config.get_feature_reg(feature).doing(|| format!("reading {feature:?}"))?;
        let hidden = if feature == FeatureReg::ID_AA64PFR1_EL1 { PFR1_SME } else { 0 };
        id_registers.push((register, value & !hidden));
    }
    id_registers.sort_unstable();
    Ok(CpuIdentity { backend: BackendKind::Hvf, counter_hz, id_registers })
}

impl Vm for HvfVm {
    fn identity(&self) -> CpuIdentity {
        self.0.identity.clone()
    }

    fn host_system(&self) -> Option<HostSystem> {
        let unreadable = self.0.unreadable.get().cloned().unwrap_or_default();
        Some(HostSystem { build: sys::host_build(), unreadable })
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError> {
        if index >= self.0.vcpus {
            let why = format!("vCPU {index} is none of this machine");
            return Err(HypervisorError::Call { call: "create_vcpu", why });
        }
        Ok(Box::new(HvfVcpu::new(&self.0, index)?))
    }

    fn irq_chip(&self) -> Arc<dyn IrqChip> {
        Arc::new(Lines(Arc::clone(&self.0)))
    }

    /// The framework has them.
    fn irq_chip_frames(&self) -> Vec<(Range, Arc<dyn MachineDevice>)> {
        Vec::new()
    }

    fn irq_chip_kind(&self) -> &'static str {
        HvfGicState::KIND
    }

    fn save_irq_chip(&self) -> Result<Section, HypervisorError> {
        chip::save(&self.0)
    }

    fn restore_irq_chip(&self, section: &Section) -> Result<(), HypervisorError> {
        chip::restore(section)
    }

    fn write_protect(&self) -> Result<(), HypervisorError> {
        Ok(self.0.stage2.write_protect()?)
    }

    fn grant(&self, range: Range, write: bool) -> Result<(), HypervisorError> {
        Ok(self.0.stage2.grant(range, write)?)
    }

    fn check(&self) -> Result<(), HypervisorError> {
        self.0.lost.lock().clone().map_or(Ok(()), |lost| Err(lost.into()))
    }

    fn counter(&self) -> Arc<dyn SystemCounter> {
        Arc::clone(&self.0.counter) as Arc<dyn SystemCounter>
    }
}

/// Where the redistributor of vCPU `index` must lie.
fn redistributor(index: u32) -> u64 {
    map::GICR.base + u64::from(index) * map::GICR_STRIDE
}
