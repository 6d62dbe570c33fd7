//! What runs the guest's instructions, behind traits shaped like Hypervisor.framework, the strictest
//! of the backends.
//!
//! A [`Vcpu`] is made, used, saved and dropped on one thread, its own. Only its [`Kick`] may be used
//! from others. System registers go by their architectural encoding, so that every backend speaks the
//! same [`VcpuState`].

#[cfg(any(all(target_os = "macos", target_arch = "aarch64"), feature = "hvf"))]
pub mod hvf;
mod soft;
mod state;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use squib_devices::{
    device::MachineDevice, granules::Unavailable, irq::IrqChip, map::Range, memory::GuestRam,
};
use squib_formats::persist::{PersistError, Section};

pub use soft::SoftVm;
pub use state::{ExclusiveMonitor, HvfGicState, VcpuState};

use crate::config::{BackendKind, MachineConfig};

/// A virtual machine on the backend that `config` names, with `ram` at its place.
pub fn create(config: &MachineConfig, ram: &GuestRam) -> Result<Arc<dyn Vm>, HypervisorError> {
    backend(config.backend)?.create(config, ram)
}

/// What a machine of `config` would show its guest of its CPUs on this host, without making one: what
/// [`Vm::identity`] of that machine answers.
pub fn identity(config: &MachineConfig) -> Result<CpuIdentity, HypervisorError> {
    backend(config.backend)?.identity()
}

/// The build of the host's operating system, if the backend of `config` is a part of it: what
/// [`HostSystem::build`] of that machine answers.
pub fn host_build(config: &MachineConfig) -> Result<Option<String>, HypervisorError> {
    Ok(backend(config.backend)?.host_build())
}

/// The most that a machine on the backend of `config` can have on this host.
pub fn limits(config: &MachineConfig) -> Result<Limits, HypervisorError> {
    backend(config.backend)?.limits()
}

/// What makes machines.
trait Backend: Sync {
    fn create(
        &self,
        config: &MachineConfig,
        ram: &GuestRam,
    ) -> Result<Arc<dyn Vm>, HypervisorError>;
    fn identity(&self) -> Result<CpuIdentity, HypervisorError>;
    fn limits(&self) -> Result<Limits, HypervisorError>;
    /// The build of the host's operating system, if the backend is a part of it.
    fn host_build(&self) -> Option<String>;
}

/// The backend, if this build and host have it.
fn backend(kind: BackendKind) -> Result<&'static dyn Backend, HypervisorError> {
    let found: Option<&'static dyn Backend> = match kind {
        BackendKind::Soft => Some(&soft::Soft),
        #[cfg(any(all(target_os = "macos", target_arch = "aarch64"), feature = "hvf"))]
        BackendKind::Hvf => hvf::backend(),
        _ => None,
    };
    found.ok_or_else(|| unavailable(kind))
}

/// One virtual machine of a backend: guest-physical memory, the interrupt chip and the counter.
pub trait Vm: Send + Sync {
    /// What the guest sees of its CPUs.
    fn identity(&self) -> CpuIdentity;

    /// What is known of the host's operating system, if the backend is a part of it. Called when all vCPUs
    /// exist.
    fn host_system(&self) -> Option<HostSystem> {
        None
    }

    /// Makes vCPU `index` in its reset state. Called once for each, in their order, on the thread that will
    /// run it.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HypervisorError>;

    /// The shared interrupts' inputs.
    fn irq_chip(&self) -> Arc<dyn IrqChip>;

    /// The interrupt chip's registers where they are emulated here rather than in the backend.
    fn irq_chip_frames(&self) -> Vec<(Range, Arc<dyn MachineDevice>)>;

    /// Kind of the interrupt chip's section.
    fn irq_chip_kind(&self) -> &'static str;

    /// The interrupt chip's state as one section. Called while no vCPU runs.
    fn save_irq_chip(&self) -> Result<Section, HypervisorError>;

    /// Takes over the interrupt chip's state. Called when all vCPUs exist and none has run.
    fn restore_irq_chip(&self, section: &Section) -> Result<(), HypervisorError>;

    /// Makes the next write to any granule of RAM an [`Exit::MemoryFault`], unless the
    /// [`Granules`](squib_devices::granules::Granules) of the RAM allow it by then. They have taken the right
    /// to write away from all. Called while no vCPU runs.
    fn write_protect(&self) -> Result<(), HypervisorError>;

    /// Lets vCPUs read and execute `range` of RAM, which is one granule, and with `write` also write there:
    /// the granules allow it now. Called by the vCPU that met the fault, on its thread.
    fn grant(&self, range: Range, write: bool) -> Result<(), HypervisorError>;

    /// An error that nobody could be told of: a device has driven an interrupt, and the backend did not take
    /// it. The next run of a vCPU answers with it too.
    fn check(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// The counter behind CNTVCT_EL0.
    fn counter(&self) -> Arc<dyn SystemCounter>;
}

/// The system counter, one for a machine.
pub trait SystemCounter: Send + Sync {
    /// Ticks a second: CNTFRQ_EL0.
    fn frequency(&self) -> u64;
    /// The value now.
    fn now(&self) -> u64;
    /// Lets it run from its present value. Called while no vCPU runs. Idempotent.
    fn start(&self);
    /// Holds its present value. Called while no vCPU runs. Idempotent.
    fn stop(&self);
    /// Sets the value. Called while it is stopped.
    fn set(&self, ticks: u64);
    /// Lets it come `ticks` further than it is now, or than it is when it is started, and then stand still; one that
    /// stands at the end of its last lease goes on from there. So the guest sees nothing of the time in which this process was stopped. vCPUs
    /// may run. A counter of the hardware cannot be held while they do, and ignores it.
    fn lease(&self, _ticks: u64) {}
}

/// One vCPU, on its own thread.
pub trait Vcpu {
    /// What makes it leave the guest.
    fn kick(&self) -> Arc<dyn Kick>;

    /// Runs the guest until it needs something. `limit` is a count of retired instructions at which to
    /// stop exactly; only a deterministic machine has one.
    fn run(&mut self, limit: Option<u64>) -> Result<Exit, HypervisorError>;

    /// Completes [`Exit::MmioRead`] with the value, before the next [`run`](Self::run).
    fn complete_read(&mut self, value: u64) -> Result<(), HypervisorError>;

    /// Sleeps as [`Exit::WaitForInterrupt`] asks: until an interrupt, the timer's deadline or a kick.
    /// False if nothing but a kick or a device can ever end the wait and `block` is false; then it
    /// returns at once.
    fn wait(&mut self, block: bool) -> Result<bool, HypervisorError>;

    /// Whether a timer of the guest has fired and the guest has not set it anew. The counter is stopped.
    fn timer_due(&mut self) -> Result<bool, HypervisorError>;

    /// X0 to X30 by number.
    fn x(&mut self, n: u8) -> Result<u64, HypervisorError>;

    /// Sets X0 to X30 by number.
    fn set_x(&mut self, n: u8, value: u64) -> Result<(), HypervisorError>;

    /// Puts the vCPU into its reset state and lets it begin at `pc` with `x0`: EL1h, MMU off,
    /// interrupts masked.
    fn start(&mut self, pc: u64, x0: u64) -> Result<(), HypervisorError>;

    /// The next instruction's address, for messages.
    fn pc(&mut self) -> Result<u64, HypervisorError>;

    /// Instructions retired since the first start, where the backend counts them.
    fn retired(&mut self) -> Option<u64>;

    /// All of its state.
    fn save(&mut self) -> Result<VcpuState, HypervisorError>;

    /// Takes over `state`, which comes from disk and is hostile. On an error nothing has changed.
    fn restore(&mut self, state: &VcpuState) -> Result<(), HypervisorError>;
}

/// Makes a vCPU leave the guest, from any thread.
pub trait Kick: Send + Sync {
    /// The current or the next [`Vcpu::run`] or [`Vcpu::wait`] returns. Does not wait for it.
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A load from an address that is not RAM; see [`Vcpu::complete_read`].
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
    },
    /// A store to an address that is not RAM.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// The value, zero-extended.
        value: u64,
    },
    /// An access to RAM that its granules do not allow now. The next run executes the instruction again.
    MemoryFault {
        /// Guest-physical address of a byte in the granule.
        address: u64,
        /// It wants to write.
        write: bool,
    },
    /// HVC with the immediate. Arguments and results are in X0 to X17.
    Hypercall {
        /// The instruction's immediate.
        imm: u16,
    },
    /// Nothing to do: see [`Vcpu::wait`].
    WaitForInterrupt,
    /// [`Kick::kick`] was called.
    Cancelled,
    /// The count of retired instructions has reached the limit.
    Limit,
}

/// What a guest can learn about its CPUs; part of a snapshot's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuIdentity {
    /// The backend.
    pub backend: BackendKind,
    /// CNTFRQ_EL0.
    pub counter_hz: u64,
    /// ID registers (op0, op1, CRn, CRm, op2 packed as in MRS bits 20 to 5) and values, by encoding.
    pub id_registers: Vec<(u16, u64)>,
}

/// A backend that is a part of the host's operating system; part of a snapshot's manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSystem {
    /// Build of the operating system.
    pub build: String,
    /// Registers of the vCPUs that it does not let one read, by encoding in ascending order. They are no part
    /// of [`VcpuState`].
    pub unreadable: Vec<u16>,
}

/// The most that a machine can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
}

/// What a backend cannot do.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// This build or host has no such backend.
    #[error("the {backend} backend is not available: {why}")]
    Unavailable {
        /// The backend.
        backend: BackendKind,
        /// What is missing.
        why: String,
    },
    /// A call into the backend failed.
    #[error("{call} failed: {why}")]
    Call {
        /// What was called.
        call: &'static str,
        /// What it answered.
        why: String,
    },
    /// Hypervisor.framework refuses, or does what this backend cannot go on with.
    #[cfg(any(all(target_os = "macos", target_arch = "aarch64"), feature = "hvf"))]
    #[error(transparent)]
    Hvf(#[from] hvf::HvfError),
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] Unavailable),
    /// The backend reports a fault in RAM, and there is no RAM.
    #[error("a memory fault at {address:#x}, where no RAM is")]
    NotRam {
        /// Guest-physical address.
        address: u64,
    },
    /// A saved state that this backend cannot take over.
    #[error("{0}")]
    State(#[from] PersistError),
}

fn unavailable(backend: BackendKind) -> HypervisorError {
    let why = match backend {
        BackendKind::Hvf => "it needs macOS 15 or later on Apple silicon",
        BackendKind::Soft | BackendKind::Kvm => "this build does not have it",
    };
    HypervisorError::Unavailable { backend, why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use squib_devices::map;

    use super::*;

    #[test]
    fn the_identity_is_known_before_there_is_a_machine() {
        let config = MachineConfig::new("vm", "/boot/Image");
        let ram = GuestRam::new(map::RAM_MIN).unwrap();
        assert_eq!(identity(&config).unwrap(), create(&config, &ram).unwrap().identity());
        let kvm = MachineConfig { backend: BackendKind::Kvm, ..config };
        let refused = identity(&kvm).unwrap_err();
        assert!(matches!(refused, HypervisorError::Unavailable { backend: BackendKind::Kvm, .. }));
    }
}
