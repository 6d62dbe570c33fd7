//! The registers of GICD and GICR (Arm IHI 0069H, sections 12.8 to 12.10).
//!
//! Registers are accessed with their own size: 32 bits, bytes too for priorities, and 64 bits (or
//! halves of 32) for IROUTER and GICR_TYPER. Other accesses read as zero and write nothing, as do
//! registers that an implementation without LPIs, message-based SPIs and a second Security state lacks.

use super::{
    affinity,
    bank::BankRegister,
    core::{Core, SGI_MASK, SPI_BANKS, SPIS},
    spec::{ID_REGISTERS, ID_VALUES, IIDR, gicd, gicr},
};
use crate::map::{GICR_STRIDE, INTIDS, SPI_BASE};

impl Core {
    pub(super) fn gicd_read(&self, offset: u64, size: u8) -> u64 {
        if !offset.is_multiple_of(u64::from(size.max(1))) {
            return 0;
        }
        if let Some((bank, register)) = BankRegister::decode(offset, size) {
            // Bank 0 is in the redistributors.
            let bank = bank.checked_sub(1).and_then(|bank| self.spis.get(bank));
            return bank.map_or(0, |bank| bank.read(register, size)).into();
        }
        if let Some(index) = router_index(offset) {
            return part(self.routers[index], offset, size);
        }
        match (offset, size) {
            (gicd::CTLR, 4) => u64::from(self.ctlr | gicd::CTLR_ARE | gicd::CTLR_DS),
            (gicd::TYPER, 4) => {
                u64::from(gicd::TYPER_A3V | gicd::TYPER_ID_BITS | (INTIDS / 32 - 1))
            }
            (gicd::IIDR, 4) => IIDR.into(),
            _ => id_register(offset, size),
        }
    }

    pub(super) fn gicd_write(&mut self, offset: u64, size: u8, value: u64) {
        if !offset.is_multiple_of(u64::from(size.max(1))) {
            return;
        }
        if let Some((bank, register)) = BankRegister::decode(offset, size) {
            let Some(bank) = bank.checked_sub(1).filter(|bank| *bank < SPI_BANKS) else { return };
            self.spis[bank].write(register, size, value as u32, 0);
            match register {
                // The group decides which vCPUs a 1-of-N interrupt can go to.
                BankRegister::Group => self.reroute(),
                _ => self.refresh_all(),
            }
        } else if let Some(index) = router_index(offset) {
            let router = with_part(self.routers[index], offset, size, value);
            self.routers[index] = router & gicd::IROUTER_MASK;
            self.reroute();
        } else if (offset, size) == (gicd::CTLR, 4) {
            self.ctlr = value as u32 & gicd::CTLR_WRITABLE;
            self.refresh_all();
        }
    }

    pub(super) fn gicr_read(&self, offset: u64, size: u8) -> u64 {
        let (vcpu, offset) = ((offset / GICR_STRIDE) as usize, offset % GICR_STRIDE);
        let Some(cpu) = self.cpus.get(vcpu) else { return 0 };
        if !offset.is_multiple_of(u64::from(size.max(1))) {
            return 0;
        }
        if let Some(offset) = offset.checked_sub(gicr::SGI_BASE) {
            return match BankRegister::decode(offset, size) {
                Some((0, register)) => cpu.private.read(register, size).into(),
                _ => id_register(offset, size),
            };
        }
        match (offset, size) {
            // No LPIs to enable, and writes take effect at once (RWP and UWP clear).
            (gicr::CTLR, 4) => 0,
            (gicr::IIDR, 4) => IIDR.into(),
            (gicr::TYPER, 4 | 8) | (0x0c, 4) => {
                let last = if vcpu + 1 == self.cpus.len() { gicr::TYPER_LAST } else { 0 };
                let typer = affinity(vcpu as u32) << 32 | (vcpu as u64) << 8 | last;
                part(typer, offset, size)
            }
            (gicr::WAKER, 4) if cpu.processor_sleep => {
                u64::from(gicr::WAKER_PROCESSOR_SLEEP | gicr::WAKER_CHILDREN_ASLEEP)
            }
            (gicr::WAKER, 4) => 0,
            _ => id_register(offset, size),
        }
    }

    pub(super) fn gicr_write(&mut self, offset: u64, size: u8, value: u64) {
        let (vcpu, offset) = ((offset / GICR_STRIDE) as usize, offset % GICR_STRIDE);
        let Some(cpu) = self.cpus.get_mut(vcpu) else { return };
        if !offset.is_multiple_of(u64::from(size.max(1))) {
            return;
        }
        if let Some(offset) = offset.checked_sub(gicr::SGI_BASE) {
            if let Some((0, register)) = BankRegister::decode(offset, size) {
                cpu.private.write(register, size, value as u32, SGI_MASK);
                self.refresh(vcpu);
            }
        } else if (offset, size) == (gicr::WAKER, 4) {
            cpu.processor_sleep = value as u32 & gicr::WAKER_PROCESSOR_SLEEP != 0;
            self.reroute();
        }
    }
}

/// Index of the SPI whose GICD_IROUTER holds `offset`; those of SGIs and PPIs do not exist.
fn router_index(offset: u64) -> Option<usize> {
    let index = (offset.checked_sub(gicd::IROUTER)? / 8).checked_sub(SPI_BASE.into())? as usize;
    (index < SPIS).then_some(index)
}

/// What an access of `size` bytes at `offset` reads of a 64-bit register.
fn part(register: u64, offset: u64, size: u8) -> u64 {
    match (offset % 8, size) {
        (0, 8) => register,
        (0, 4) => register & 0xffff_ffff,
        (4, 4) => register >> 32,
        _ => 0,
    }
}

/// A 64-bit register after a write of `size` bytes at `offset`.
fn with_part(register: u64, offset: u64, size: u8, value: u64) -> u64 {
    match (offset % 8, size) {
        (0, 8) => value,
        (0, 4) => register & !0xffff_ffff | value & 0xffff_ffff,
        (4, 4) => register & 0xffff_ffff | value << 32,
        _ => register,
    }
}

fn id_register(offset: u64, size: u8) -> u64 {
    let index = offset.checked_sub(ID_REGISTERS).map(|past| (past / 4) as usize);
    match (index.and_then(|index| ID_VALUES.get(index)), size) {
        (Some(value), 4) => u64::from(*value),
        _ => 0,
    }
}
