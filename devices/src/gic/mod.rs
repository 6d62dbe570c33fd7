//! GICv3 interrupt controller (Arm IHI 0069H): distributor, redistributors, and the CPU interface by
//! system registers. One Security state, affinity routing always on, no LPIs, 32 priority levels.
//!
//! Devices drive SPIs through [`IrqChip`], timers drive PPIs through [`Gic::set_ppi`], vCPUs reach
//! their interface through [`Gic::icc_read`] and [`Gic::icc_write`], and the memory-mapped registers
//! are behind [`GicDistributor`] and [`GicRedistributors`]. The GIC answers by driving the IRQ and
//! FIQ inputs of the vCPUs ([`CpuOutputs`]).
//!
//! Group 1 interrupts are signalled as IRQ, Group 0 as FIQ (section 4.6.2, GICD_CTLR.DS set).
//!
//! An SPI routed to "any participating vCPU" goes to the lowest-numbered one that is awake and has
//! the interrupt's group enabled, so that a deterministic machine stays so.

mod bank;
mod core;
mod icc;
mod mmio;
mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;
use squib_formats::persist::{PersistError, Section, Versioned};

pub use spec::icc as reg;
pub use state::{BankState, CpuState, GicState, IccState};

use self::core::Core;
use crate::{
    device::{MachineDevice, PauseError},
    irq::IrqChip,
    map::MAX_VCPUS,
};

/// Affinity of vCPU `n` as MPIDR_EL1 and GICD_IROUTER hold it: Aff0 = n % 16, Aff1 = n / 16, since
/// the target list of an SGI names 16 vCPUs of one Aff1.
pub const fn affinity(n: u32) -> u64 {
    (((n / 16) << 8) | (n % 16)) as u64
}

/// The interrupt inputs of the vCPUs.
///
/// Called with the GIC locked, so that levels arrive in order: an implementation must not call back
/// into the GIC and must not block.
pub trait CpuOutputs: Send + Sync {
    /// The IRQ input of `vcpu` changes to `level`.
    fn set_irq(&self, vcpu: u32, level: bool);
    /// The FIQ input of `vcpu` changes to `level`.
    fn set_fiq(&self, vcpu: u32, level: bool);
}

/// Interrupt group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Zero = 0,
    One = 1,
}

/// The interrupt controller of a machine.
pub struct Gic {
    core: Mutex<Core>,
}

impl Gic {
    /// A GIC in its reset state for `vcpus` vCPUs, which must be 1 to [`MAX_VCPUS`]; all outputs are low.
    pub fn new(vcpus: u32, outputs: Arc<dyn CpuOutputs>) -> Arc<Self> {
        assert!((1..=MAX_VCPUS).contains(&vcpus), "{vcpus} vCPUs: 1 to {MAX_VCPUS} are possible");
        Arc::new(Self { core: Mutex::new(Core::new(vcpus, outputs)) })
    }

    /// Drives the input of PPI `intid` (16 to 31) of `vcpu`.
    pub fn set_ppi(&self, vcpu: u32, intid: u32, level: bool) {
        self.core.lock().set_ppi(vcpu as usize, intid, level);
    }

    /// MRS of the ICC register `reg` (see [`reg`] for the encoding) on `vcpu`. `None` if there is no
    /// such register or it is write-only: the instruction is UNDEFINED.
    pub fn icc_read(&self, vcpu: u32, reg: u16) -> Option<u64> {
        self.core.lock().icc_read(vcpu as usize, reg)
    }

    /// MSR of the ICC register `reg` on `vcpu`. False if there is no such register or it is
    /// read-only: the instruction is UNDEFINED.
    #[must_use]
    pub fn icc_write(&self, vcpu: u32, reg: u16, value: u64) -> bool {
        self.core.lock().icc_write(vcpu as usize, reg, value)
    }

    /// The state as the guest sees it. The machine saves the GIC once, not by its MMIO frames.
    pub fn save(&self) -> GicState {
        self.core.lock().save()
    }

    /// Takes over `state`, and drives every output to the level that follows from it. On an error
    /// nothing has changed.
    pub fn restore(&self, state: GicState) -> Result<(), PersistError> {
        self.core.lock().restore(state)
    }

    /// The state as the section of `instance`.
    pub fn save_section(&self, instance: &str) -> Result<Section, PersistError> {
        Section::encode(instance, &self.save())
    }

    /// Takes over the state in `section`.
    pub fn restore_section(&self, section: &Section) -> Result<(), PersistError> {
        self.restore(state::decode(section)?)
    }
}

impl IrqChip for Gic {
    fn set_spi(&self, intid: u32, level: bool) {
        self.core.lock().set_spi(intid, level);
    }
}

/// The registers of the distributor, at [`GICD`](crate::map::GICD).
pub struct GicDistributor(pub Arc<Gic>);

/// The registers of the redistributors, at [`GICR`](crate::map::GICR).
pub struct GicRedistributors(pub Arc<Gic>);

macro_rules! frame {
    ($frame:ty, $read:ident, $write:ident) => {
        /// One of the two windows into a GIC: its section is that of the whole GIC.
        impl MachineDevice for $frame {
            fn mmio_read(&self, offset: u64, size: u8) -> u64 {
                self.0.core.lock().$read(offset, size)
            }

            fn mmio_write(&self, offset: u64, size: u8, value: u64) {
                self.0.core.lock().$write(offset, size, value);
            }

            // All work is done inside register accesses.
            fn pause(&self, _deadline: Instant) -> Result<(), PauseError> {
                Ok(())
            }

            fn resume(&self) {}

            fn kind(&self) -> &'static str {
                GicState::KIND
            }

            fn save(&self, instance: &str) -> Result<Section, PersistError> {
                self.0.save_section(instance)
            }

            fn restore(&self, section: &Section) -> Result<(), PersistError> {
                self.0.restore_section(section)
            }
        }
    };
}

frame!(GicDistributor, gicd_read, gicd_write);
frame!(GicRedistributors, gicr_read, gicr_write);
