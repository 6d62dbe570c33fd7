//! What a snapshot holds of a vCPU.

use crate::{
    SysReg,
    cpu::{Cpu, Exclusive},
    exception::{Pstate, nzcv_of},
    exec::system::{FPCR_BITS, FPSR_BITS},
    regs::SP,
    sys::{self, Sys},
    timer::TimerLines,
};

/// Everything of a vCPU that its guest can observe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// x0 to x30.
    pub x: [u64; 31],
    /// SP_EL0.
    pub sp_el0: u64,
    /// SP_EL1.
    pub sp_el1: u64,
    /// Address of the next instruction.
    pub pc: u64,
    /// PSTATE in the format of SPSR_EL1.
    pub pstate: u64,
    /// V0 to V31.
    pub v: [u128; 32],
    /// FPCR.
    pub fpcr: u32,
    /// FPSR.
    pub fpsr: u32,
    /// Every system register that the vCPU holds, in ascending order, and MPIDR_EL1.
    pub sysregs: Vec<(SysReg, u64)>,
    /// Instructions retired.
    pub retired: u64,
    /// Address, size in bytes and value of the exclusive monitor.
    pub exclusive: Option<(u64, u8, u128)>,
    /// The vCPU sleeps in WFI.
    pub waiting: bool,
}

/// Why a state was refused. Nothing has changed then.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// PSTATE names a mode that this CPU does not have, or sets reserved bits.
    #[error("pstate {0:#x} is not one of AArch64 EL0 or EL1")]
    Pstate(u64),
    /// FPCR or FPSR has bits that are not implemented.
    #[error("{register} {value:#x} has bits outside {allowed:#x}")]
    Fp {
        /// "FPCR" or "FPSR".
        register: &'static str,
        /// The value met.
        value: u32,
        /// The bits that exist.
        allowed: u32,
    },
    /// A system register of the state does not exist here.
    #[error("system register {0} is unknown")]
    Unknown(SysReg),
    /// A system register is missing from the state.
    #[error("system register {0} is missing")]
    Missing(SysReg),
    /// A system register stands in the state twice, or the list is out of order.
    #[error("system register {0} is out of order")]
    Order(SysReg),
    /// The state belongs to another vCPU.
    #[error("MPIDR_EL1 is {found:#x}, this vCPU's is {expected:#x}")]
    Mpidr {
        /// In the state.
        found: u64,
        /// This vCPU's.
        expected: u64,
    },
    /// The exclusive monitor's size is not 1, 2, 4, 8 or 16.
    #[error("an exclusive monitor of {0} bytes does not exist")]
    Exclusive(u8),
}

impl Cpu {
    /// The state; called between two runs.
    pub fn state(&mut self) -> CpuState {
        self.finish_step();
        self.bank_sp();
        let mut x = [0; 31];
        x.copy_from_slice(&self.r.x[..31]);
        let pstate = u64::from(self.pstate.to_spsr(&self.r));
        let mut sysregs: Vec<_> =
            self.sys.fields().into_iter().map(|(reg, value)| (reg, *value)).collect();
        sysregs.push((sys::MPIDR_EL1, self.mpidr));
        sysregs.sort();
        CpuState {
            x,
            sp_el0: self.sp_el[0],
            sp_el1: self.sp_el[1],
            pc: self.pc,
            pstate,
            v: self.r.v,
            fpcr: self.r.fpcr,
            fpsr: self.r.fpsr,
            sysregs,
            retired: self.retired(),
            exclusive: self.exclusive.map(|e| (e.address, e.size, e.value)),
            waiting: self.waiting,
        }
    }

    /// Takes over a state; called between two runs. A deterministic machine has set its counter
    /// before.
    pub fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        let CpuState {
            x,
            sp_el0,
            sp_el1,
            pc,
            pstate,
            v,
            fpcr,
            fpsr,
            ref sysregs,
            retired,
            exclusive,
            waiting,
        } = *state;
        let spsr = u32::try_from(pstate).map_err(|_| StateError::Pstate(pstate))?;
        let new_pstate = Pstate::from_spsr(spsr).ok_or(StateError::Pstate(pstate))?;
        for (register, value, allowed) in [("FPCR", fpcr, FPCR_BITS), ("FPSR", fpsr, FPSR_BITS)] {
            if value & !allowed != 0 {
                return Err(StateError::Fp { register, value, allowed });
            }
        }
        if let Some((_, size, _)) = exclusive
            && !matches!(size, 1 | 2 | 4 | 8 | 16)
        {
            return Err(StateError::Exclusive(size));
        }
        let mut new_sys = Sys::new();
        self.fill(&mut new_sys, sysregs)?;

        self.sys = new_sys;
        self.pstate = new_pstate;
        self.r.x[..31].copy_from_slice(&x);
        self.sp_el = [sp_el0, sp_el1];
        self.r.x[SP as usize] = self.sp_el[self.pstate.sp_bank()];
        self.r.set_nzcv(nzcv_of(spsr));
        (self.r.v, self.r.fpcr, self.r.fpsr) = (v, fpcr, fpsr);
        self.pc = pc;
        self.exclusive = exclusive.map(|(address, size, value)| Exclusive { address, size, value });
        self.waiting = waiting;
        self.set_retired(retired);
        self.skipped = self.shared.counter.now().wrapping_sub(retired);
        // The interrupt controller's inputs come back with its own state: the first run tells it of
        // a timer that fires now.
        self.lines = TimerLines::default();
        self.pending = None;
        self.step_due = false;
        self.exit = None;
        self.tlb.forget_all();
        self.code.drop_all();
        self.refresh();
        self.refresh_space();
        Ok(())
    }

    /// Puts `sysregs`, which must be exactly those that [`state`](Self::state) lists, into `sys`.
    fn fill(&self, sys: &mut Sys, sysregs: &[(SysReg, u64)]) -> Result<(), StateError> {
        let mut given = sysregs.iter().copied().peekable();
        if let Some(pair) = sysregs.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            return Err(StateError::Order(pair[1].0));
        }
        let mut mpidr = self.mpidr;
        let mut expected: Vec<(SysReg, &mut u64)> = sys.fields();
        expected.push((sys::MPIDR_EL1, &mut mpidr));
        expected.sort_by_key(|(reg, _)| *reg);
        for (reg, slot) in expected {
            match given.next() {
                Some((found, value)) if found == reg => *slot = value,
                Some((found, _)) if found < reg => return Err(StateError::Unknown(found)),
                _ => return Err(StateError::Missing(reg)),
            }
        }
        if let Some((reg, _)) = given.next() {
            return Err(StateError::Unknown(reg));
        }
        if mpidr != self.mpidr {
            return Err(StateError::Mpidr { found: mpidr, expected: self.mpidr });
        }
        Ok(())
    }
}
