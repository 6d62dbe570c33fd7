//! System registers: what the vCPU holds, and what MRS and MSR do with it.

use crate::{
    SysReg,
    debug::{written_bcr, written_wcr},
};

macro_rules! encodings {
    ($($name:ident = ($op0:literal, $op1:literal, $crn:literal, $crm:literal, $op2:literal);)*) => {
        $(pub(crate) const $name: SysReg = SysReg::new($op0, $op1, $crn, $crm, $op2);)*
    };
}

// Arm ARM D17.2 and D17.11, AArch64 System register descriptions.
encodings! {
    MDCCINT_EL1 = (2, 0, 0, 2, 0);
    MDSCR_EL1 = (2, 0, 0, 2, 2);
    OSDTRRX_EL1 = (2, 0, 0, 0, 2);
    OSDTRTX_EL1 = (2, 0, 0, 3, 2);
    OSECCR_EL1 = (2, 0, 0, 6, 2);
    MDRAR_EL1 = (2, 0, 1, 0, 0);
    OSLAR_EL1 = (2, 0, 1, 0, 4);
    OSLSR_EL1 = (2, 0, 1, 1, 4);
    OSDLR_EL1 = (2, 0, 1, 3, 4);
    DBGPRCR_EL1 = (2, 0, 1, 4, 4);
    DBGCLAIMSET_EL1 = (2, 0, 7, 8, 6);
    DBGCLAIMCLR_EL1 = (2, 0, 7, 9, 6);
    DBGAUTHSTATUS_EL1 = (2, 0, 7, 14, 6);
    MDCCSR_EL0 = (2, 3, 0, 1, 0);
    DBGDTR_EL0 = (2, 3, 0, 4, 0);
    // DBGDTRRX_EL0 for reads, DBGDTRTX_EL0 for writes.
    DBGDTRXX_EL0 = (2, 3, 0, 5, 0);
    MIDR_EL1 = (3, 0, 0, 0, 0);
    MPIDR_EL1 = (3, 0, 0, 0, 5);
    REVIDR_EL1 = (3, 0, 0, 0, 6);
    SCTLR_EL1 = (3, 0, 1, 0, 0);
    ACTLR_EL1 = (3, 0, 1, 0, 1);
    CPACR_EL1 = (3, 0, 1, 0, 2);
    TTBR0_EL1 = (3, 0, 2, 0, 0);
    TTBR1_EL1 = (3, 0, 2, 0, 1);
    TCR_EL1 = (3, 0, 2, 0, 2);
    SPSR_EL1 = (3, 0, 4, 0, 0);
    ELR_EL1 = (3, 0, 4, 0, 1);
    SP_EL0 = (3, 0, 4, 1, 0);
    SPSEL = (3, 0, 4, 2, 0);
    CURRENTEL = (3, 0, 4, 2, 2);
    PAN = (3, 0, 4, 2, 3);
    AFSR0_EL1 = (3, 0, 5, 1, 0);
    AFSR1_EL1 = (3, 0, 5, 1, 1);
    ESR_EL1 = (3, 0, 5, 2, 0);
    FAR_EL1 = (3, 0, 6, 0, 0);
    PAR_EL1 = (3, 0, 7, 4, 0);
    MAIR_EL1 = (3, 0, 10, 2, 0);
    AMAIR_EL1 = (3, 0, 10, 3, 0);
    VBAR_EL1 = (3, 0, 12, 0, 0);
    RVBAR_EL1 = (3, 0, 12, 0, 1);
    ISR_EL1 = (3, 0, 12, 1, 0);
    CONTEXTIDR_EL1 = (3, 0, 13, 0, 1);
    TPIDR_EL1 = (3, 0, 13, 0, 4);
    CNTKCTL_EL1 = (3, 0, 14, 1, 0);
    CCSIDR_EL1 = (3, 1, 0, 0, 0);
    CLIDR_EL1 = (3, 1, 0, 0, 1);
    AIDR_EL1 = (3, 1, 0, 0, 7);
    CSSELR_EL1 = (3, 2, 0, 0, 0);
    CTR_EL0 = (3, 3, 0, 0, 1);
    DCZID_EL0 = (3, 3, 0, 0, 7);
    NZCV = (3, 3, 4, 2, 0);
    DAIF = (3, 3, 4, 2, 1);
    FPCR = (3, 3, 4, 4, 0);
    FPSR = (3, 3, 4, 4, 1);
    TPIDR_EL0 = (3, 3, 13, 0, 2);
    TPIDRRO_EL0 = (3, 3, 13, 0, 3);
    CNTFRQ_EL0 = (3, 3, 14, 0, 0);
    CNTPCT_EL0 = (3, 3, 14, 0, 1);
    CNTVCT_EL0 = (3, 3, 14, 0, 2);
    CNTP_TVAL_EL0 = (3, 3, 14, 2, 0);
    CNTP_CTL_EL0 = (3, 3, 14, 2, 1);
    CNTP_CVAL_EL0 = (3, 3, 14, 2, 2);
    CNTV_TVAL_EL0 = (3, 3, 14, 3, 0);
    CNTV_CTL_EL0 = (3, 3, 14, 3, 1);
    CNTV_CVAL_EL0 = (3, 3, 14, 3, 2);
    ID_AA64PFR0_EL1 = (3, 0, 0, 4, 0);
    ID_AA64DFR0_EL1 = (3, 0, 0, 5, 0);
    ID_AA64ISAR0_EL1 = (3, 0, 0, 6, 0);
    ID_AA64MMFR0_EL1 = (3, 0, 0, 7, 0);
    ID_AA64MMFR1_EL1 = (3, 0, 0, 7, 1);
}

/// Breakpoints and watchpoints that are held (ID_AA64DFR0_EL1.BRPs and WRPs, plus one).
pub(crate) const DEBUG_PAIRS: usize = 2;

/// The registers that the vCPU holds and that a snapshot saves, but for those in
/// [`Regs`](crate::regs::Regs), PSTATE and the stack pointers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sys {
    pub(crate) sctlr: u64,
    pub(crate) actlr: u64,
    pub(crate) cpacr: u64,
    pub(crate) ttbr0: u64,
    pub(crate) ttbr1: u64,
    pub(crate) tcr: u64,
    pub(crate) spsr: u64,
    pub(crate) elr: u64,
    pub(crate) afsr0: u64,
    pub(crate) afsr1: u64,
    pub(crate) esr: u64,
    pub(crate) far: u64,
    pub(crate) par: u64,
    pub(crate) mair: u64,
    pub(crate) amair: u64,
    pub(crate) vbar: u64,
    pub(crate) contextidr: u64,
    pub(crate) tpidr_el1: u64,
    pub(crate) tpidr_el0: u64,
    pub(crate) tpidrro_el0: u64,
    pub(crate) csselr: u64,
    pub(crate) cntkctl: u64,
    pub(crate) cntv_ctl: u64,
    pub(crate) cntv_cval: u64,
    pub(crate) cntp_ctl: u64,
    pub(crate) cntp_cval: u64,
    pub(crate) mdscr: u64,
    pub(crate) mdccint: u64,
    pub(crate) oslsr: u64,
    pub(crate) osdlr: u64,
    pub(crate) oseccr: u64,
    pub(crate) dbgclaim: u64,
    pub(crate) dbgbvr: [u64; DEBUG_PAIRS],
    pub(crate) dbgbcr: [u64; DEBUG_PAIRS],
    pub(crate) dbgwvr: [u64; DEBUG_PAIRS],
    pub(crate) dbgwcr: [u64; DEBUG_PAIRS],
}

/// SCTLR_EL1's RES1 bits (LSMAOE, nTLSMD, SPAN, EIS, TSCXT, EOS) as without the features behind them.
const SCTLR_RESET: u64 = 0x30D0_0800 & !SCTLR_SPAN | SCTLR_SPAN;
/// SCTLR_EL1.SPAN: PSTATE.PAN is left alone on an exception to EL1.
pub(crate) const SCTLR_SPAN: u64 = 1 << 23;
/// OSLSR_EL1.OSLM: the OS lock is implemented (0b10).
const OSLSR_OSLM: u64 = 1 << 3;
/// OSLSR_EL1.OSLK: the OS lock is locked.
pub(crate) const OSLSR_OSLK: u64 = 1 << 1;

impl Sys {
    /// The state out of reset.
    pub(crate) fn new() -> Self {
        Self {
            sctlr: SCTLR_RESET,
            actlr: 0,
            cpacr: 0,
            ttbr0: 0,
            ttbr1: 0,
            tcr: 0,
            spsr: 0,
            elr: 0,
            afsr0: 0,
            afsr1: 0,
            esr: 0,
            far: 0,
            par: 0,
            mair: 0,
            amair: 0,
            vbar: 0,
            contextidr: 0,
            tpidr_el1: 0,
            tpidr_el0: 0,
            tpidrro_el0: 0,
            csselr: 0,
            cntkctl: 0,
            cntv_ctl: 0,
            cntv_cval: 0,
            cntp_ctl: 0,
            cntp_cval: 0,
            mdscr: 0,
            mdccint: 0,
            oslsr: OSLSR_OSLM | OSLSR_OSLK,
            osdlr: 0,
            oseccr: 0,
            dbgclaim: 0,
            dbgbvr: [0; DEBUG_PAIRS],
            dbgbcr: [0; DEBUG_PAIRS],
            dbgwvr: [0; DEBUG_PAIRS],
            dbgwcr: [0; DEBUG_PAIRS],
        }
    }

    /// Every register that is held, with its encoding, for saving and restoring. The one list, so
    /// that both directions agree.
    pub(crate) fn fields(&mut self) -> Vec<(SysReg, &mut u64)> {
        let Self {
            sctlr,
            actlr,
            cpacr,
            ttbr0,
            ttbr1,
            tcr,
            spsr,
            elr,
            afsr0,
            afsr1,
            esr,
            far,
            par,
            mair,
            amair,
            vbar,
            contextidr,
            tpidr_el1,
            tpidr_el0,
            tpidrro_el0,
            csselr,
            cntkctl,
            cntv_ctl,
            cntv_cval,
            cntp_ctl,
            cntp_cval,
            mdscr,
            mdccint,
            oslsr,
            osdlr,
            oseccr,
            dbgclaim,
            dbgbvr,
            dbgbcr,
            dbgwvr,
            dbgwcr,
        } = self;
        let mut list = vec![
            (SCTLR_EL1, sctlr),
            (ACTLR_EL1, actlr),
            (CPACR_EL1, cpacr),
            (TTBR0_EL1, ttbr0),
            (TTBR1_EL1, ttbr1),
            (TCR_EL1, tcr),
            (SPSR_EL1, spsr),
            (ELR_EL1, elr),
            (AFSR0_EL1, afsr0),
            (AFSR1_EL1, afsr1),
            (ESR_EL1, esr),
            (FAR_EL1, far),
            (PAR_EL1, par),
            (MAIR_EL1, mair),
            (AMAIR_EL1, amair),
            (VBAR_EL1, vbar),
            (CONTEXTIDR_EL1, contextidr),
            (TPIDR_EL1, tpidr_el1),
            (TPIDR_EL0, tpidr_el0),
            (TPIDRRO_EL0, tpidrro_el0),
            (CSSELR_EL1, csselr),
            (CNTKCTL_EL1, cntkctl),
            (CNTV_CTL_EL0, cntv_ctl),
            (CNTV_CVAL_EL0, cntv_cval),
            (CNTP_CTL_EL0, cntp_ctl),
            (CNTP_CVAL_EL0, cntp_cval),
            (MDSCR_EL1, mdscr),
            (MDCCINT_EL1, mdccint),
            (OSLSR_EL1, oslsr),
            (OSDLR_EL1, osdlr),
            (OSECCR_EL1, oseccr),
            (DBGCLAIMSET_EL1, dbgclaim),
        ];
        let debug = [(4, dbgbvr), (5, dbgbcr), (6, dbgwvr), (7, dbgwcr)];
        for (op2, registers) in debug {
            for (n, register) in (0..).zip(registers) {
                list.push((SysReg::new(2, 0, 0, n, op2), register));
            }
        }
        list.sort_by_key(|(reg, _)| *reg);
        list
    }

    /// Reads a register that has no effect beyond its value; `None` if it is not one of these.
    /// (Those that the run loop must know of are handled before, in `exec::system`.)
    pub(crate) fn read_plain(&self, reg: SysReg) -> Option<u64> {
        if let Some(value) = id_register(reg) {
            return Some(value);
        }
        if let Some((n, op2)) = debug_pair(reg) {
            return Some(match op2 {
                4 => self.dbgbvr[n],
                5 => self.dbgbcr[n],
                6 => self.dbgwvr[n],
                _ => self.dbgwcr[n],
            });
        }
        Some(match reg {
            SCTLR_EL1 => self.sctlr,
            ACTLR_EL1 => self.actlr,
            CPACR_EL1 => self.cpacr,
            TTBR0_EL1 => self.ttbr0,
            TTBR1_EL1 => self.ttbr1,
            TCR_EL1 => self.tcr,
            SPSR_EL1 => self.spsr,
            ELR_EL1 => self.elr,
            AFSR0_EL1 => self.afsr0,
            AFSR1_EL1 => self.afsr1,
            ESR_EL1 => self.esr,
            FAR_EL1 => self.far,
            PAR_EL1 => self.par,
            MAIR_EL1 => self.mair,
            AMAIR_EL1 => self.amair,
            VBAR_EL1 => self.vbar,
            CONTEXTIDR_EL1 => self.contextidr,
            TPIDR_EL1 => self.tpidr_el1,
            TPIDR_EL0 => self.tpidr_el0,
            TPIDRRO_EL0 => self.tpidrro_el0,
            CSSELR_EL1 => self.csselr,
            CNTKCTL_EL1 => self.cntkctl,
            MDSCR_EL1 => self.mdscr,
            MDCCINT_EL1 => self.mdccint,
            OSLSR_EL1 => self.oslsr,
            OSDLR_EL1 => self.osdlr,
            OSECCR_EL1 => self.oseccr,
            // The claim tags that can be set, and those that are.
            DBGCLAIMSET_EL1 => 0xff,
            DBGCLAIMCLR_EL1 => self.dbgclaim,
            // Separate caches of 32 KiB, 4 ways, 64-byte lines.
            CCSIDR_EL1 => 127 << 13 | 3 << 3 | 2,
            // There is no external debugger: nothing ever comes through the channel to it.
            DBGPRCR_EL1 | DBGAUTHSTATUS_EL1 | MDRAR_EL1 | RVBAR_EL1 | MDCCSR_EL0 | OSDTRRX_EL1
            | OSDTRTX_EL1 | DBGDTR_EL0 | DBGDTRXX_EL0 => 0,
            _ => return None,
        })
    }

    /// Writes a register that has no effect beyond its value; false if it is not one of these.
    pub(crate) fn write_plain(&mut self, reg: SysReg, value: u64) -> bool {
        if let Some((n, op2)) = debug_pair(reg) {
            match op2 {
                4 => self.dbgbvr[n] = value,
                5 => self.dbgbcr[n] = written_bcr(value),
                6 => self.dbgwvr[n] = value & !3,
                _ => self.dbgwcr[n] = written_wcr(value),
            }
            return true;
        }
        match reg {
            ACTLR_EL1 | DBGPRCR_EL1 | OSDTRRX_EL1 | OSDTRTX_EL1 | DBGDTR_EL0 | DBGDTRXX_EL0 => {}
            SPSR_EL1 => self.spsr = value & 0xffff_ffff,
            ELR_EL1 => self.elr = value,
            AFSR0_EL1 => self.afsr0 = value,
            AFSR1_EL1 => self.afsr1 = value,
            ESR_EL1 => self.esr = value & 0xffff_ffff,
            FAR_EL1 => self.far = value,
            PAR_EL1 => self.par = value,
            AMAIR_EL1 => self.amair = value,
            VBAR_EL1 => self.vbar = value & !0x7ff,
            CONTEXTIDR_EL1 => self.contextidr = value & 0xffff_ffff,
            TPIDR_EL1 => self.tpidr_el1 = value,
            TPIDR_EL0 => self.tpidr_el0 = value,
            TPIDRRO_EL0 => self.tpidrro_el0 = value,
            CSSELR_EL1 => self.csselr = value & 0xf,
            CNTKCTL_EL1 => self.cntkctl = value & 0x3ff,
            MDSCR_EL1 => self.mdscr = self.written_mdscr(value),
            MDCCINT_EL1 => self.mdccint = value & 0x6000_0000,
            OSLAR_EL1 => {
                self.oslsr = OSLSR_OSLM | if value & 1 != 0 { OSLSR_OSLK } else { 0 };
            }
            OSDLR_EL1 => self.osdlr = value & 1,
            OSECCR_EL1 => self.oseccr = value & 0xffff_ffff,
            DBGCLAIMSET_EL1 => self.dbgclaim |= value & 0xff,
            DBGCLAIMCLR_EL1 => self.dbgclaim &= !value,
            _ => return false,
        }
        true
    }
}

/// The number and op2 of DBGBVR<n> (4), DBGBCR<n> (5), DBGWVR<n> (6) or DBGWCR<n> (7).
fn debug_pair(reg: SysReg) -> Option<(usize, u16)> {
    let (n, op2) = (reg.0 >> 3 & 15, reg.0 & 7);
    let is_one = reg == SysReg::new(2, 0, 0, n, op2) && (4..=7).contains(&op2);
    (is_one && usize::from(n) < DEBUG_PAIRS).then_some((usize::from(n), op2))
}

/// The identification registers: what this CPU implements, no more and no less.
/// MPIDR_EL1 is the machine's to choose and not among them.
pub fn id_registers() -> Vec<(SysReg, u64)> {
    IDS.to_vec()
}

/// DCZID_EL0 where DC ZVA is allowed.
pub(crate) const DCZID: u64 = 4;

const IDS: [(SysReg, u64); 11] = [
    // Implementer 0 (software), architecture by ID registers, part 0x5B1.
    (MIDR_EL1, 0x000F_5B10),
    // EL0 and EL1 in AArch64 only; FP and AdvSIMD without FP16; GICv3 system registers; CSV2, CSV3.
    (ID_AA64PFR0_EL1, 1 << 60 | 1 << 56 | 1 << 24 | 0x11),
    // Armv8.0 debug, two breakpoints, two watchpoints, no PMU.
    (ID_AA64DFR0_EL1, 1 << 20 | 1 << 12 | 6),
    // LSE atomics, CRC32, SHA256, SHA1, AES with PMULL.
    (ID_AA64ISAR0_EL1, 2 << 20 | 1 << 16 | 1 << 12 | 1 << 8 | 2 << 4),
    // No 64 KiB granule, 16 KiB and 4 KiB granules, 16-bit ASIDs, 40-bit physical addresses.
    (ID_AA64MMFR0_EL1, 0xF << 24 | 1 << 20 | 2 << 4 | 2),
    // PAN.
    (ID_AA64MMFR1_EL1, 1 << 20),
    (REVIDR_EL1, 0),
    (AIDR_EL1, 0),
    // Separate level 1 caches, nothing to clean for unification (CTR_EL0.IDC), coherency at level 1.
    (CLIDR_EL1, 1 << 24 | 3),
    // 64-byte lines and granules, PIPT instruction cache; IDC: instruction fetch sees stores
    // without cleaning; DIC clear: IC IVAU is needed.
    (CTR_EL0, 1 << 31 | 1 << 28 | 4 << 24 | 4 << 20 | 4 << 16 | 3 << 14 | 4),
    // DC ZVA writes 64 bytes.
    (DCZID_EL0, DCZID),
];

/// An identification register's value. The unallocated ones of their space read as zero
/// (Arm ARM D17.1.1).
fn id_register(reg: SysReg) -> Option<u64> {
    if let Some((_, value)) = IDS.iter().find(|(id, _)| *id == reg) {
        return Some(*value);
    }
    let in_id_space = reg.0 >> 7 == SysReg::new(3, 0, 0, 0, 0).0 >> 7 && reg.0 >> 3 & 15 != 0;
    in_id_space.then_some(0)
}
