//! The framework's interrupt controller: where it lies, its inputs, and its state.

use std::sync::Arc;

use applevisor::prelude::{GicConfig, GicIntId};
use squib_devices::{
    irq::IrqChip,
    map::{self, Range},
};
use squib_formats::persist::{PersistError, Section, Versioned};

use super::{
    Machine,
    error::{Doing, HvfError},
    sys,
};
use crate::hypervisor::{HvfGicState, HypervisorError};

/// Message-signalled interrupts, which no device here sends; without a region for them the distributor does
/// not work. It lies between the distributor and the redistributors.
const MSI: Range = Range { base: 0x0802_0000, size: 0x8_0000 };
/// Interrupts that messages raise, at the top of the SPIs: `hv_gic_set_spi` refuses them.
const MSI_INTIDS: u32 = 32;

const _: () = assert!(map::GICD.end() <= MSI.base && MSI.end() <= map::GICR.base);

/// A controller at the addresses of the machine's memory map, if the framework's fits there.
pub(super) fn config() -> Result<GicConfig, HvfError> {
    let asking = || "asking for the interrupt controller's geometry".to_owned();
    let fits = |[size_of, alignment_of]: [_; 2], range: Range, size: usize, alignment: usize| {
        let (size, alignment) = (size as u64, alignment as u64);
        if size > range.size {
            return Err(HvfError::Chip { what: size_of, found: size, needed: range.size });
        }
        if alignment == 0 || !range.base.is_multiple_of(alignment) {
            // What its address is a multiple of.
            let needed = 1 << range.base.trailing_zeros();
            return Err(HvfError::Chip { what: alignment_of, found: alignment, needed });
        }
        Ok(())
    };
    fits(
        ["the distributor's size", "the distributor's alignment"],
        map::GICD,
        GicConfig::get_distributor_size().doing(asking)?,
        GicConfig::get_distributor_base_alignment().doing(asking)?,
    )?;
    fits(
        ["the redistributors' size", "the redistributors' alignment"],
        map::GICR,
        GicConfig::get_redistributor_region_size().doing(asking)?,
        GicConfig::get_redistributor_base_alignment().doing(asking)?,
    )?;
    fits(
        ["the message region's size", "the message region's alignment"],
        MSI,
        GicConfig::get_msi_region_size().doing(asking)?,
        GicConfig::get_msi_region_base_alignment().doing(asking)?,
    )?;
    let stride = GicConfig::get_redistributor_size().doing(asking)? as u64;
    if stride != map::GICR_STRIDE {
        let what = "the size of a redistributor";
        return Err(HvfError::Chip { what, found: stride, needed: map::GICR_STRIDE });
    }
    let timer = GicConfig::get_intid(GicIntId::EL1_VIRTUAL_TIMER).doing(asking)?;
    if timer != map::CNTV_INTID {
        let (found, needed) = (timer.into(), map::CNTV_INTID.into());
        return Err(HvfError::Chip { what: "the virtual timer's interrupt", found, needed });
    }
    let (first, count) = GicConfig::get_spi_interrupt_range().doing(asking)?;
    let end = first.saturating_add(count);
    let messages = end.saturating_sub(MSI_INTIDS);
    if first > map::SPI_BASE || messages < map::INTIDS {
        let (found, needed) = (end.into(), (map::INTIDS + MSI_INTIDS).into());
        return Err(HvfError::Chip { what: "the end of the shared interrupts", found, needed });
    }

    let placing = || "placing the interrupt controller".to_owned();
    let mut config = GicConfig::new();
    config.set_distributor_base(map::GICD.base).doing(placing)?;
    config.set_redistributor_base(map::GICR.base).doing(placing)?;
    config.set_msi_region_base(MSI.base).doing(placing)?;
    config.set_msi_interrupt_range(messages, MSI_INTIDS).doing(placing)?;
    Ok(config)
}

/// The inputs of the shared interrupts.
pub(super) struct Lines(pub(super) Arc<Machine>);

impl IrqChip for Lines {
    fn set_spi(&self, intid: u32, level: bool) {
        let Self(machine) = self;
        let driven = machine.vm.gic_set_spi(intid, level);
        if let Err(error) = driven.doing(|| format!("driving interrupt {intid} to {level}")) {
            // A device cannot do anything about it, and the guest must not go on without.
            machine.lost.lock().get_or_insert(error);
            machine.call_out_all();
        }
        if level {
            machine.idle.wake();
        }
    }
}

/// The controller's state but for the CPU interfaces, which only their vCPUs' threads can read: those stand
/// with the system registers of the vCPUs.
pub(super) fn save(machine: &Machine) -> Result<Section, HypervisorError> {
    let saving = || "saving the interrupt controller's state".to_owned();
    let mut state = machine.vm.gic_state_create().doing(saving)?;
    let mut bytes = vec![0; state.size().doing(saving)?];
    state.get(&mut bytes).doing(saving)?;
    let backend = "hvf".to_owned();
    Ok(Section::encode("0", &HvfGicState { backend, host_build: sys::host_build(), bytes })?)
}

pub(super) fn restore(section: &Section) -> Result<(), HypervisorError> {
    let HvfGicState { backend, host_build, bytes } = section.decode()?;
    if backend != "hvf" {
        let why = format!("`{backend}`, here it is `hvf`");
        return Err(PersistError::invalid(HvfGicState::KIND, "backend", why).into());
    }
    if bytes.is_empty() {
        return Err(PersistError::invalid(HvfGicState::KIND, "bytes", "none".to_owned()).into());
    }
    sys::set_gic_state(&bytes).map_err(|code| {
        let (made_on, here) = (host_build, sys::host_build());
        HvfError::ChipState { made_on, here, code }.into()
    })
}
