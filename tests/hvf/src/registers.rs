//! The system registers that the framework gives and takes.

use applevisor_sys as hv;
use squib_devices::map;
use squib_soft::SysReg;

use crate::{
    cpu::Local,
    host::host,
    rules::{Answer, BAD_ARGUMENT, violation},
    system,
};

const CNTP_CVAL: u16 = hv::hv_sys_reg_t::CNTP_CVAL_EL0 as u16;
const PFR1: u16 = hv::hv_sys_reg_t::ID_AA64PFR1_EL1 as u16;
const PFR1_SME: u64 = 0xf << 24;

impl Local {
    pub(crate) fn sys_reg(&mut self, reg: u16) -> Answer<u64> {
        if reg == hv::hv_sys_reg_t::MPIDR_EL1 as u16 {
            return Ok(self.mpidr.unwrap_or(0));
        }
        if is_refused(reg) || system::is_secret(reg) {
            return Err(BAD_ARGUMENT);
        }
        if let Some(value) = id_register(reg) {
            return Ok(if self.sme_hidden && reg == PFR1 { value & !PFR1_SME } else { value });
        }
        let offset = self.offset;
        let regs = self.regs();
        Ok(match reg {
            _ if reg == hv::hv_sys_reg_t::SP_EL0 as u16 => regs.sp_el0,
            _ if reg == hv::hv_sys_reg_t::SP_EL1 as u16 => regs.sp_el1,
            _ => match regs.sysregs.iter().find(|(found, _)| found.0 == reg) {
                Some((_, value)) if reg == CNTP_CVAL => value.wrapping_add(offset),
                Some((_, value)) => *value,
                None => self.extra.get(&reg).copied().unwrap_or(0),
            },
        })
    }

    /// Moves the virtual counter. The physical timer stays where it is by the host's, as the software CPU, which
    /// has one counter for both, must be told.
    pub(crate) fn set_offset(&mut self, offset: u64) {
        let moved = offset.wrapping_sub(std::mem::replace(&mut self.offset, offset));
        for (reg, value) in &mut self.regs_mut().sysregs {
            if reg.0 == CNTP_CVAL {
                *value = value.wrapping_sub(moved);
            }
        }
    }

    pub(crate) fn set_sys_reg(&mut self, reg: u16, value: u64) -> Answer {
        if reg == hv::hv_sys_reg_t::MPIDR_EL1 as u16 {
            return self.set_mpidr(value);
        }
        if is_refused(reg) || system::is_secret(reg) {
            return Err(BAD_ARGUMENT);
        }
        // op0 = 3, op1 = 0, CRn = 0.
        if reg >> 7 == 0xc000 >> 7 {
            let hides = id_register(reg).is_some_and(|old| value == old & !PFR1_SME);
            if reg == PFR1 && hides && self.cpu.is_none() {
                self.sme_hidden = true;
                return Ok(());
            }
            return Err(violation(format!("identification register {} is set", SysReg(reg))));
        }
        let offset = self.offset;
        let regs = self.regs_mut();
        match reg {
            _ if reg == hv::hv_sys_reg_t::SP_EL0 as u16 => regs.sp_el0 = value,
            _ if reg == hv::hv_sys_reg_t::SP_EL1 as u16 => regs.sp_el1 = value,
            _ => match regs.sysregs.iter_mut().find(|(found, _)| found.0 == reg) {
                Some((_, old)) if reg == CNTP_CVAL => *old = value.wrapping_sub(offset),
                Some((_, old)) => *old = value,
                None => drop(self.extra.insert(reg, value)),
            },
        }
        Ok(())
    }

    fn set_mpidr(&mut self, value: u64) -> Answer {
        let affinity = value & 0xff_ffff;
        let index = (affinity >> 8) * 16 + (affinity & 0xff);
        if index >= u64::from(map::MAX_VCPUS) || affinity & 0xf0 != 0 || value & 1 << 31 == 0 {
            return Err(violation(format!("MPIDR_EL1 {value:#x}")));
        }
        if self.cpu.is_some() {
            return Err(violation("MPIDR_EL1 is set after a run"));
        }
        // The redistributors are numbered in that order whatever MPIDR_EL1 says.
        if self.mpidr.is_none() && index != self.entry.order {
            let order = self.entry.order;
            return Err(violation(format!("vCPU {index} is made as number {order}")));
        }
        self.mpidr = Some(value);
        self.entry.set_index(index as u32);
        for (reg, old) in &mut self.regs_mut().sysregs {
            if reg.0 == hv::hv_sys_reg_t::MPIDR_EL1 as u16 {
                *old = value;
            }
        }
        Ok(())
    }
}

/// Registers that the framework does not give: those that are there with EL2 only, the PMU's, the OS locks
/// and CNTFRQ_EL0.
fn is_refused(reg: u16) -> bool {
    const OSLAR: u16 = 0x8084;
    const OSDLR: u16 = 0x809c;
    const CNTFRQ: u16 = 0xdf00;
    let (op0, op1, crn, crm) = (reg >> 14, reg >> 11 & 7, reg >> 7 & 15, reg >> 3 & 15);
    let needs_el2 = op1 == 4 && reg != hv::hv_sys_reg_t::SP_EL1 as u16;
    let is_cntp = (hv::hv_sys_reg_t::CNTP_TVAL_EL0 as u16..=hv::hv_sys_reg_t::CNTP_CVAL_EL0 as u16)
        .contains(&reg);
    // PMCR_EL0 to PMOVSSET_EL0, PMINTENSET_EL1; PMEVCNTRn_EL0 to PMCCFILTR_EL0.
    let is_pmu = op0 == 3
        && (crn == 9 && (12..=14).contains(&crm) && matches!(op1, 0 | 3)
            || crn == 14 && crm >= 8 && op1 == 3);
    needs_el2
        || is_cntp && !host().physical_timer
        || is_pmu
        || [OSLAR, OSDLR, CNTFRQ].contains(&reg)
}

/// Value of an identification register as this host's CPU has it.
pub(crate) fn id_register(reg: u16) -> Option<u64> {
    let found = squib_soft::id_registers().into_iter().find(|(id, _)| id.0 == reg);
    match found.map(|(_, value)| value) {
        value if reg == PFR1 && host().sme => Some(value.unwrap_or(0) | 1 << 24),
        value => value,
    }
}
