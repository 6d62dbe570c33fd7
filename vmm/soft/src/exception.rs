//! Exceptions: taking them to EL1 and returning from them (Arm ARM D1.3).

use crate::{cpu::Cpu, op::Op, regs::Regs, sys::SCTLR_SPAN};

/// PSTATE but for the condition flags, which are in [`Regs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pstate {
    /// M[3:0]: [`EL0T`], [`EL1T`] or [`EL1H`].
    pub(crate) mode: u8,
    /// D, A, I and F in bits 9 to 6, as in SPSR_EL1.
    pub(crate) daif: u32,
    pub(crate) pan: bool,
    pub(crate) il: bool,
    pub(crate) ss: bool,
}

/// M[3:0] of EL0.
pub(crate) const EL0T: u8 = 0b0000;
/// M[3:0] of EL1 on SP_EL0.
pub(crate) const EL1T: u8 = 0b0100;
/// M[3:0] of EL1 on SP_EL1.
pub(crate) const EL1H: u8 = 0b0101;

const SPSR_D: u32 = 1 << 9;
const SPSR_I: u32 = 1 << 7;
const SPSR_F: u32 = 1 << 6;
const SPSR_DAIF: u32 = 0xf << 6;
const SPSR_IL: u32 = 1 << 20;
const SPSR_SS: u32 = 1 << 21;
const SPSR_PAN: u32 = 1 << 22;
const SPSR_NZCV: u32 = 0xf << 28;
/// M[4]: AArch32, which is not implemented.
const SPSR_M4: u32 = 1 << 4;

impl Pstate {
    /// Out of reset: EL1h, everything masked.
    pub(crate) fn reset() -> Self {
        Self { mode: EL1H, daif: SPSR_DAIF, pan: false, il: false, ss: false }
    }

    #[inline(always)]
    pub(crate) fn el1(self) -> bool {
        self.mode != EL0T
    }

    #[inline(always)]
    pub(crate) fn masks_debug(self) -> bool {
        self.daif & SPSR_D != 0
    }

    #[inline(always)]
    pub(crate) fn masks_irq(self) -> bool {
        self.daif & SPSR_I != 0
    }

    #[inline(always)]
    pub(crate) fn masks_fiq(self) -> bool {
        self.daif & SPSR_F != 0
    }

    /// Which bank holds the stack pointer in use: SP_EL0 or SP_EL1.
    pub(crate) fn sp_bank(self) -> usize {
        usize::from(self.mode == EL1H)
    }

    /// In the format of SPSR_EL1, with the flags of `r`.
    pub(crate) fn to_spsr(self, r: &Regs) -> u32 {
        r.nzcv()
            | u32::from(self.mode)
            | self.daif
            | if self.pan { SPSR_PAN } else { 0 }
            | if self.il { SPSR_IL } else { 0 }
            | if self.ss { SPSR_SS } else { 0 }
    }

    /// From the format of SPSR_EL1; `None` if it names a mode that does not exist. The flags are
    /// [`nzcv_of`].
    pub(crate) fn from_spsr(spsr: u32) -> Option<Self> {
        let mode = (spsr & 0xf) as u8;
        let exists = spsr & SPSR_M4 == 0 && matches!(mode, EL0T | EL1T | EL1H);
        exists.then_some(Self {
            mode,
            daif: spsr & SPSR_DAIF,
            pan: spsr & SPSR_PAN != 0,
            il: spsr & SPSR_IL != 0,
            ss: spsr & SPSR_SS != 0,
        })
    }
}

/// The condition flags of a value in the format of SPSR_EL1.
pub(crate) fn nzcv_of(spsr: u32) -> u32 {
    spsr & SPSR_NZCV
}

// Exception classes, Arm ARM D17.2.37, ESR_EL1.EC.
const EC_UNKNOWN: u32 = 0x00;
const EC_WFX: u32 = 0x01;
const EC_FP_ACCESS: u32 = 0x07;
const EC_ILLEGAL_STATE: u32 = 0x0e;
const EC_SVC: u32 = 0x15;
const EC_SYSTEM: u32 = 0x18;
const EC_INSTRUCTION_ABORT: u32 = 0x20;
const EC_PC_ALIGNMENT: u32 = 0x22;
const EC_DATA_ABORT: u32 = 0x24;
const EC_SP_ALIGNMENT: u32 = 0x26;
const EC_BREAKPOINT: u32 = 0x30;
const EC_SOFTWARE_STEP: u32 = 0x32;
const EC_WATCHPOINT: u32 = 0x34;
const EC_BRK: u32 = 0x3c;
/// ESR_ELx.IL: a 32-bit instruction, or an exception for which it is always set.
const ESR_IL: u32 = 1 << 25;
/// ISS.WnR of a data abort.
const ISS_WNR: u32 = 1 << 6;
/// ISS.CM of a data abort: a cache maintenance or address translation instruction.
const ISS_CM: u32 = 1 << 8;

/// ISS.ISV of a software step: EX is valid.
const ISS_ISV: u32 = 1 << 24;
/// ISS.EX of a software step: a load-exclusive was stepped.
const ISS_EX: u32 = 1 << 6;
/// ISS.IFSC or ISS.DFSC of a debug exception.
const FSC_DEBUG: u32 = 0b10_0010;

/// Offset of the IRQ vector from its group.
const VECTOR_IRQ: u64 = 0x80;
/// Offset of the FIQ vector from its group.
const VECTOR_FIQ: u64 = 0x100;

impl Cpu {
    /// Takes an exception to EL1 that returns to `pc`.
    fn take(&mut self, vector: u64, preferred_return: u64) {
        let group = match self.pstate.mode {
            EL0T => 0x400,
            EL1T => 0x000,
            _ => 0x200,
        };
        self.sys.spsr = u64::from(self.pstate.to_spsr(&self.r));
        self.sys.elr = preferred_return;
        self.bank_sp();
        self.pstate = Pstate {
            mode: EL1H,
            daif: SPSR_DAIF,
            pan: self.pstate.pan || self.sys.sctlr & SCTLR_SPAN == 0,
            il: false,
            ss: false,
        };
        self.unbank_sp();
        self.waiting = false;
        self.advance = false;
        self.branch_to(self.sys.vbar.wrapping_add(group + vector));
        self.refresh();
    }

    /// Takes a synchronous exception of class `ec` whose lower-EL form is one less for aborts.
    fn take_synchronous(&mut self, ec: u32, iss: u32, preferred_return: u64) {
        self.sys.esr = u64::from(ec << 26 | ESR_IL | iss);
        self.take(0, preferred_return);
    }

    pub(crate) fn take_irq(&mut self) {
        self.budget -= 1;
        self.take(VECTOR_IRQ, self.pc);
    }

    pub(crate) fn take_fiq(&mut self) {
        self.budget -= 1;
        self.take(VECTOR_FIQ, self.pc);
    }

    pub(crate) fn take_pc_alignment(&mut self) {
        self.budget -= 1;
        self.sys.far = self.pc;
        self.take_synchronous(EC_PC_ALIGNMENT, 0, self.pc);
    }

    /// A load or store at `pc` by a stack pointer that is not aligned.
    pub(crate) fn take_sp_alignment(&mut self) {
        self.take_synchronous(EC_SP_ALIGNMENT, 0, self.pc);
    }

    /// WFI at EL0 with SCTLR_EL1.nTWI clear.
    pub(crate) fn take_wfx_trap(&mut self) {
        self.take_synchronous(EC_WFX, 1 << 24 | 0xe << 20, self.pc);
    }

    pub(crate) fn take_illegal_state(&mut self) {
        self.budget -= 1;
        self.take_synchronous(EC_ILLEGAL_STATE, 0, self.pc);
    }

    pub(crate) fn take_instruction_abort(&mut self, va: u64, fsc: u32) {
        self.budget -= 1;
        self.sys.far = va;
        let ec = EC_INSTRUCTION_ABORT + u32::from(self.pstate.el1());
        self.take_synchronous(ec, fsc, va);
    }

    /// A data abort of the instruction at `pc`. `cache` for cache maintenance, which reports as a
    /// write.
    pub(crate) fn take_data_abort(&mut self, va: u64, fsc: u32, write: bool, cache: bool) {
        self.sys.far = va;
        let ec = EC_DATA_ABORT + u32::from(self.pstate.el1());
        let mut iss = fsc;
        if write {
            iss |= ISS_WNR;
        }
        if cache {
            iss |= ISS_CM;
        }
        self.take_synchronous(ec, iss, self.pc);
    }

    /// A breakpoint at `pc`.
    pub(crate) fn take_breakpoint(&mut self) {
        self.budget -= 1;
        let ec = EC_BREAKPOINT + u32::from(self.pstate.el1());
        self.take_synchronous(ec, FSC_DEBUG, self.pc);
    }

    /// A software step exception before the instruction at `pc`; `stepped` says whether the one executed
    /// last was a load-exclusive, if that was stepped. It counts as no instruction: one that was stepped or
    /// that changed PSTATE or a debug register has come before it.
    pub(crate) fn take_step(&mut self, stepped: Option<bool>) {
        let ec = EC_SOFTWARE_STEP + u32::from(self.pstate.el1());
        let iss = match stepped {
            None => 0,
            Some(false) => ISS_ISV,
            Some(true) => ISS_ISV | ISS_EX,
        };
        self.take_synchronous(ec, iss | FSC_DEBUG, self.pc);
    }

    /// A watchpoint that the access of the instruction at `pc` to `va` has met. `cache` for cache
    /// maintenance.
    pub(crate) fn take_watchpoint(&mut self, va: u64, write: bool, cache: bool) {
        self.sys.far = va;
        let ec = EC_WATCHPOINT + u32::from(self.pstate.el1());
        let iss = if write { ISS_WNR } else { 0 } | if cache { ISS_CM } else { 0 };
        self.take_synchronous(ec, iss | FSC_DEBUG, self.pc);
    }

    /// The instruction before `pc` does not exist: for an exit that nobody could answer.
    pub fn undefined(&mut self) {
        self.pending = None;
        self.undo_step();
        self.pc = self.pc.wrapping_sub(4);
        self.take_synchronous(EC_UNKNOWN, 0, self.pc);
    }

    pub(crate) fn op_undefined(&mut self, op: &Op) -> *const Op {
        self.leave_at(op);
        tracing::debug!(
            pc = format_args!("{:#x}", self.pc),
            el1 = self.pstate.el1(),
            "undefined instruction"
        );
        self.take_synchronous(EC_UNKNOWN, 0, self.pc);
        std::ptr::null()
    }

    pub(crate) fn op_fp_trap(&mut self, op: &Op) -> *const Op {
        self.leave_at(op);
        // CV set, COND 0b1110, as for every AArch64 instruction.
        self.take_synchronous(EC_FP_ACCESS, 1 << 24 | 0xe << 20, self.pc);
        std::ptr::null()
    }

    /// A trapped MRS, MSR or system instruction; `iss` describes it.
    pub(crate) fn op_system_trap(&mut self, op: &Op, iss: u32) -> *const Op {
        self.leave_at(op);
        self.take_synchronous(EC_SYSTEM, iss, self.pc);
        std::ptr::null()
    }

    pub(crate) fn op_svc(&mut self, op: &Op) -> *const Op {
        self.leave_after(op);
        // A step ends with the call (SSAdvance).
        self.pstate.ss = false;
        self.take_synchronous(EC_SVC, op.imm as u32, self.pc);
        std::ptr::null()
    }

    pub(crate) fn op_brk(&mut self, op: &Op) -> *const Op {
        self.leave_at(op);
        self.take_synchronous(EC_BRK, op.imm as u32, self.pc);
        std::ptr::null()
    }

    /// ERET: back to what SPSR_EL1 and ELR_EL1 say.
    pub(crate) fn op_eret(&mut self, op: &Op) -> *const Op {
        self.leave_after(op);
        let spsr = self.sys.spsr as u32;
        let was_stepping = self.is_stepping();
        self.bank_sp();
        match Pstate::from_spsr(spsr) {
            Some(pstate) => self.pstate = pstate,
            // An illegal return: the mode stays, and the next instruction takes the exception.
            None => {
                self.pstate.il = true;
                self.pstate.pan = spsr & SPSR_PAN != 0;
                self.pstate.daif = spsr & SPSR_DAIF;
            }
        }
        // A step begins by a return from where it is not active (DebugExceptionReturnSS).
        self.pstate.ss = spsr & SPSR_SS != 0 && !was_stepping && self.is_stepping();
        self.advance = false;
        self.r.set_nzcv(nzcv_of(spsr));
        self.unbank_sp();
        self.exclusive = None;
        self.branch_to(self.sys.elr);
        self.refresh();
        std::ptr::null()
    }
}
