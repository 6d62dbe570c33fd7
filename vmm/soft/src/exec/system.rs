//! MRS, MSR, barriers, hints, and maintenance of caches and translations.

use std::{
    ptr,
    sync::atomic::{Ordering, fence},
};

use crate::{
    CNTFRQ_HZ, Exit, SysReg,
    cpu::Cpu,
    exception::{EL0T, EL1H, EL1T},
    mem::{Extend, Pending},
    op::Op,
    regs::SP,
    signals::{FIQ, IRQ},
    sys::{self, Sys},
};

// SCTLR_EL1 fields that open instructions to EL0 (Arm ARM D17.2.118).
const SCTLR_UMA: u64 = 1 << 9;
pub(super) const SCTLR_DZE: u64 = 1 << 14;
const SCTLR_UCT: u64 = 1 << 15;
const SCTLR_NTWI: u64 = 1 << 16;
/// MDSCR_EL1.TDCC: EL0 has no access to the debug communications channel.
const MDSCR_TDCC: u64 = 1 << 12;
/// DCZID_EL0.DZP: DC ZVA is prohibited.
const DCZID_DZP: u64 = 1 << 4;
// CNTKCTL_EL1 fields.
const CNTKCTL_EL0PCTEN: u64 = 1 << 0;
const CNTKCTL_EL0VCTEN: u64 = 1 << 1;
const CNTKCTL_EL0VTEN: u64 = 1 << 8;
const CNTKCTL_EL0PTEN: u64 = 1 << 9;

/// Direction in the syndrome of a trapped system instruction: a read.
const ISS_READ: u32 = 1;

/// MRS to slot `a` of the register in `imm`.
pub(crate) unsafe fn mrs(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let reg = SysReg(o.imm as u16);
    if !cpu.pstate.el1()
        && let Some(refused) = cpu.refuse_el0(o, reg, ISS_READ)
    {
        return refused;
    }
    let value = match reg {
        sys::SP_EL0 => cpu.sp_el0(),
        sys::SPSEL => u64::from(cpu.pstate.mode == EL1H),
        sys::CURRENTEL => u64::from(cpu.pstate.el1()) << 2,
        sys::PAN => u64::from(cpu.pstate.pan) << 22,
        sys::NZCV => u64::from(cpu.r.nzcv()),
        sys::DAIF => u64::from(cpu.pstate.daif),
        sys::FPCR | sys::FPSR if cpu.fp_trap => return cpu.op_fp_trap(o),
        sys::FPCR => u64::from(cpu.r.fpcr),
        sys::FPSR => u64::from(cpu.r.fpsr),
        sys::MPIDR_EL1 => cpu.mpidr,
        sys::DCZID_EL0 => {
            let prohibited = !cpu.pstate.el1() && cpu.sys.sctlr & SCTLR_DZE == 0;
            sys::DCZID | if prohibited { DCZID_DZP } else { 0 }
        }
        sys::ISR_EL1 => {
            let bits = cpu.signals.bits();
            u64::from(bits & IRQ != 0) << 7 | u64::from(bits & FIQ != 0) << 6
        }
        sys::CNTFRQ_EL0 => CNTFRQ_HZ,
        sys::CNTPCT_EL0 | sys::CNTVCT_EL0 => cpu.ticks_at(o),
        sys::CNTV_CTL_EL0 => cpu.read_ctl(cpu.sys.cntv_ctl, cpu.sys.cntv_cval, cpu.ticks_at(o)),
        sys::CNTP_CTL_EL0 => cpu.read_ctl(cpu.sys.cntp_ctl, cpu.sys.cntp_cval, cpu.ticks_at(o)),
        sys::CNTV_CVAL_EL0 => cpu.sys.cntv_cval,
        sys::CNTP_CVAL_EL0 => cpu.sys.cntp_cval,
        sys::CNTV_TVAL_EL0 => cpu.sys.cntv_cval.wrapping_sub(cpu.ticks_at(o)) & 0xffff_ffff,
        sys::CNTP_TVAL_EL0 => cpu.sys.cntp_cval.wrapping_sub(cpu.ticks_at(o)) & 0xffff_ffff,
        _ => match cpu.sys.read_plain(reg) {
            Some(value) => value,
            None if is_icc(reg) => {
                cpu.pending = Some(Pending { slot: o.a, size: 8, extend: Extend::Zero });
                return cpu.leave_with(o, Exit::SysRegRead { reg });
            }
            None => {
                tracing::debug!(%reg, "MRS of an unknown register");
                return cpu.op_undefined(o);
            }
        },
    };
    cpu.r.x[o.a as usize] = value;
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// MSR of slot `a` to the register in `imm`.
pub(crate) unsafe fn msr(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let reg = SysReg(o.imm as u16);
    let value = cpu.r.x[o.a as usize];
    if !cpu.pstate.el1()
        && let Some(refused) = cpu.refuse_el0(o, reg, 0)
    {
        return refused;
    }
    match reg {
        sys::SP_EL0 => {
            cpu.sp_el[0] = value;
            if cpu.pstate.mode != EL1H {
                cpu.r.x[SP as usize] = value;
            }
        }
        sys::SPSEL => cpu.select_sp(value & 1 != 0),
        sys::PAN => {
            cpu.pstate.pan = value >> 22 & 1 != 0;
            cpu.refresh();
        }
        sys::NZCV => cpu.r.set_nzcv(value as u32 & 0xf000_0000),
        sys::DAIF => return cpu.set_daif(op, o, value as u32 & 0x3c0),
        sys::FPCR | sys::FPSR if cpu.fp_trap => return cpu.op_fp_trap(o),
        sys::FPCR => cpu.r.fpcr = value as u32 & FPCR_BITS,
        sys::FPSR => cpu.r.fpsr = value as u32 & FPSR_BITS,
        sys::SCTLR_EL1 => {
            cpu.sys.sctlr = value;
            cpu.tlb.forget_all();
            cpu.refresh_space();
            return cpu.leave_after(o);
        }
        sys::CPACR_EL1 => {
            cpu.sys.cpacr = value & 3 << 20;
            cpu.refresh();
        }
        sys::TTBR0_EL1 => {
            cpu.sys.ttbr0 = value;
            cpu.space_changed = true;
        }
        sys::TTBR1_EL1 => {
            cpu.sys.ttbr1 = value;
            cpu.space_changed = true;
        }
        sys::TCR_EL1 | sys::MAIR_EL1 => {
            let register = if reg == sys::TCR_EL1 { &mut cpu.sys.tcr } else { &mut cpu.sys.mair };
            *register = value;
            cpu.tlb.forget_all();
            cpu.refresh_space();
            return cpu.leave_after(o);
        }
        sys::CNTV_CTL_EL0 => cpu.sys.cntv_ctl = Cpu::written_ctl(value),
        sys::CNTP_CTL_EL0 => cpu.sys.cntp_ctl = Cpu::written_ctl(value),
        sys::CNTV_CVAL_EL0 => cpu.sys.cntv_cval = value,
        sys::CNTP_CVAL_EL0 => cpu.sys.cntp_cval = value,
        sys::CNTV_TVAL_EL0 => {
            cpu.sys.cntv_cval = cpu.ticks_at(o).wrapping_add(value as i32 as u64);
        }
        sys::CNTP_TVAL_EL0 => {
            cpu.sys.cntp_cval = cpu.ticks_at(o).wrapping_add(value as i32 as u64);
        }
        _ if is_debug(reg) => {
            return cpu.write_debug(o, reg, value).unwrap_or_else(|| {
                tracing::debug!(%reg, "MSR to an unknown register");
                cpu.op_undefined(o)
            });
        }
        _ => {
            if !cpu.sys.write_plain(reg, value) {
                if is_icc(reg) {
                    return cpu.leave_with(o, Exit::SysRegWrite { reg, value });
                }
                tracing::debug!(%reg, "MSR to an unknown register");
                return cpu.op_undefined(o);
            }
        }
    }
    if is_timer(reg) {
        cpu.leave_after(o);
        cpu.end_slice();
        return ptr::null();
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// FPCR's bits: AHP, DN, FZ, RMode.
pub(crate) const FPCR_BITS: u32 = 0x07c0_0000;
/// FPSR's bits: QC, IDC, IXC, UFC, OFC, DZC, IOC.
pub(crate) const FPSR_BITS: u32 = 0x0800_009f;

/// MRS of SP_EL0, where Linux keeps the current task.
pub(crate) unsafe fn mrs_sp_el0(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        if !cpu.pstate.el1() {
            return cpu.op_undefined(&*op);
        }
        cpu.r.x[(*op).a as usize] = cpu.sp_el0();
        op.add(1)
    }
}

/// MRS of TPIDR_EL1, where Linux keeps the per-CPU offset.
pub(crate) unsafe fn mrs_tpidr_el1(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        if !cpu.pstate.el1() {
            return cpu.op_undefined(&*op);
        }
        cpu.r.x[(*op).a as usize] = cpu.sys.tpidr_el1;
        op.add(1)
    }
}

/// MRS of TPIDR_EL0, the thread pointer.
pub(crate) unsafe fn mrs_tpidr_el0(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        cpu.r.x[(*op).a as usize] = cpu.sys.tpidr_el0;
        op.add(1)
    }
}

/// MSR (immediate): `c` is op1 << 3 | op2, `d` the immediate.
pub(crate) unsafe fn msr_imm(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    let imm = u32::from(o.d);
    let (spsel, pan, daifset, daifclr) = (5, 4, 3 << 3 | 6, 3 << 3 | 7);
    if !cpu.pstate.el1() {
        let is_daif = o.c == daifset || o.c == daifclr;
        if !is_daif {
            return cpu.op_undefined(o);
        }
        if cpu.sys.sctlr & SCTLR_UMA == 0 {
            let iss = u32::from(o.c & 7) << 17 | 3 << 14 | 4 << 10 | 31 << 5 | imm << 1;
            return cpu.op_system_trap(o, iss);
        }
    }
    match o.c {
        c if c == daifset => {
            cpu.pstate.daif |= imm << 6;
            cpu.refresh_attention();
        }
        c if c == daifclr => {
            let daif = cpu.pstate.daif & !(imm << 6);
            return cpu.set_daif(op, o, daif);
        }
        c if c == spsel => cpu.select_sp(imm & 1 != 0),
        c if c == pan => {
            cpu.pstate.pan = imm & 1 != 0;
            cpu.refresh();
        }
        _ => return cpu.op_undefined(o),
    }
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// DMB: `d` is CRm, whose low two bits say which accesses.
pub(crate) unsafe fn dmb(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let _ = cpu;
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        match (*op).d & 3 {
            1 => fence(Ordering::Acquire),
            2 => fence(Ordering::Release),
            _ => fence(Ordering::SeqCst),
        }
        op.add(1)
    }
}

/// ISB: what was written to system registers takes effect.
pub(crate) unsafe fn isb(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if cpu.space_changed {
        cpu.refresh_space();
    }
    // SAFETY: `Exec`'s contract. The instructions behind may have changed: they are fetched anew.
    cpu.leave_after(unsafe { &*op })
}

pub(crate) unsafe fn clrex(cpu: &mut Cpu, op: *const Op) -> *const Op {
    cpu.exclusive = None;
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe { op.add(1) }
}

pub(crate) unsafe fn nop(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let _ = cpu;
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe { op.add(1) }
}

/// YIELD and WFE: WFE may complete at once (Arm ARM D1.6.1), which a spinning vCPU makes good by
/// giving its processor away.
pub(crate) unsafe fn wait_event(cpu: &mut Cpu, op: *const Op) -> *const Op {
    if !cpu.deterministic {
        std::thread::yield_now();
    }
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe { op.add(1) }
}

pub(crate) unsafe fn wfi(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if !cpu.pstate.el1() && cpu.sys.sctlr & SCTLR_NTWI == 0 {
        cpu.leave_at(o);
        cpu.take_wfx_trap();
        return ptr::null();
    }
    // A stepped WFI completes at once, as every WFI may (Arm ARM D1.6.2): the step's exception is due.
    cpu.waiting = !cpu.is_stepping();
    cpu.leave_after(o)
}

/// SEV and SEVL: nobody sleeps in WFE, so there is nobody to wake.
pub(crate) unsafe fn sev(cpu: &mut Cpu, op: *const Op) -> *const Op {
    let _ = cpu;
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe { op.add(1) }
}

pub(crate) unsafe fn svc(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    cpu.op_svc(unsafe { &*op })
}

pub(crate) unsafe fn hvc(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if !cpu.pstate.el1() {
        return cpu.op_undefined(o);
    }
    cpu.leave_with(o, Exit::Hvc { imm: o.imm as u16 })
}

pub(crate) unsafe fn smc(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if !cpu.pstate.el1() {
        return cpu.op_undefined(o);
    }
    cpu.leave_with(o, Exit::Smc { imm: o.imm as u16 })
}

pub(crate) unsafe fn brk(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    cpu.op_brk(unsafe { &*op })
}

pub(crate) unsafe fn eret(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if !cpu.pstate.el1() {
        return cpu.op_undefined(o);
    }
    cpu.op_eret(o)
}

pub(crate) unsafe fn undefined(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    cpu.op_undefined(unsafe { &*op })
}

/// FP and SIMD data processing: `imm` is the function, the register bytes hold the word.
pub(crate) unsafe fn simd(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    let o = unsafe { &*op };
    if cpu.fp_trap {
        return cpu.op_fp_trap(o);
    }
    // SAFETY: the decoder stored a `DataFn` here.
    let f: crate::simd::DataFn = unsafe { std::mem::transmute(o.imm as usize) };
    f(&mut cpu.r, o.insn());
    // SAFETY: another op follows.
    unsafe { op.add(1) }
}

/// A register of the debug system, op0 2 (Arm ARM D17.3).
fn is_debug(reg: SysReg) -> bool {
    reg.0 >> 14 == 2
}

fn is_timer(reg: SysReg) -> bool {
    matches!(
        reg,
        sys::CNTV_CTL_EL0
            | sys::CNTP_CTL_EL0
            | sys::CNTV_CVAL_EL0
            | sys::CNTP_CVAL_EL0
            | sys::CNTV_TVAL_EL0
            | sys::CNTP_TVAL_EL0
    )
}

/// ICC_*_EL1: the GIC's CPU interface (IHI 0069, 12.2), which the interrupt controller answers.
fn is_icc(reg: SysReg) -> bool {
    let (pmr, low, high) =
        (SysReg::new(3, 0, 4, 6, 0), SysReg::new(3, 0, 12, 8, 0), SysReg::new(3, 0, 12, 12, 7));
    reg == pmr || (low <= reg && reg <= high)
}

impl Cpu {
    fn sp_el0(&self) -> u64 {
        if self.pstate.mode == EL1H { self.sp_el[0] } else { self.r.x[SP as usize] }
    }

    fn select_sp(&mut self, sp_el1: bool) {
        self.bank_sp();
        if self.pstate.mode != EL0T {
            self.pstate.mode = if sp_el1 { EL1H } else { EL1T };
        }
        self.unbank_sp();
    }

    /// Sets PSTATE.DAIF; an interrupt or debug exception that this lets in is taken before the next
    /// instruction.
    fn set_daif(&mut self, op: *const Op, o: &Op, daif: u32) -> *const Op {
        self.pstate.daif = daif;
        self.refresh_attention();
        let lets_in = self.signals.bits() & self.attention != 0;
        if lets_in || self.is_debugged() {
            return self.leave_after(o);
        }
        // SAFETY: `op` is `o`, and another op follows.
        unsafe { op.add(1) }
    }

    /// Whether EL0 may not use `reg`, and the exception it then takes.
    fn refuse_el0(&mut self, o: &Op, reg: SysReg, direction: u32) -> Option<*const Op> {
        let Sys { sctlr, cntkctl, mdscr, .. } = self.sys;
        let read = direction == ISS_READ;
        let open = match reg {
            sys::NZCV | sys::FPCR | sys::FPSR | sys::TPIDR_EL0 => true,
            sys::TPIDRRO_EL0 | sys::DCZID_EL0 if read => true,
            sys::DAIF => sctlr & SCTLR_UMA != 0,
            sys::MDCCSR_EL0 if read => mdscr & MDSCR_TDCC == 0,
            sys::DBGDTR_EL0 | sys::DBGDTRXX_EL0 => mdscr & MDSCR_TDCC == 0,
            sys::CTR_EL0 if read => sctlr & SCTLR_UCT != 0,
            sys::CNTFRQ_EL0 if read => cntkctl & (CNTKCTL_EL0PCTEN | CNTKCTL_EL0VCTEN) != 0,
            sys::CNTPCT_EL0 if read => cntkctl & CNTKCTL_EL0PCTEN != 0,
            sys::CNTVCT_EL0 if read => cntkctl & CNTKCTL_EL0VCTEN != 0,
            sys::CNTV_CTL_EL0 | sys::CNTV_CVAL_EL0 | sys::CNTV_TVAL_EL0 => {
                cntkctl & CNTKCTL_EL0VTEN != 0
            }
            sys::CNTP_CTL_EL0 | sys::CNTP_CVAL_EL0 | sys::CNTP_TVAL_EL0 => {
                cntkctl & CNTKCTL_EL0PTEN != 0
            }
            _ => return Some(self.op_undefined(o)),
        };
        if open {
            return None;
        }
        let SysReg(r) = reg;
        let r = u32::from(r);
        let (op0, op1, crn, crm, op2) = (r >> 14, r >> 11 & 7, r >> 7 & 15, r >> 3 & 15, r & 7);
        let rt = u32::from(o.d);
        let iss = op0 << 20 | op2 << 17 | op1 << 14 | crn << 10 | rt << 5 | crm << 1 | direction;
        Some(self.op_system_trap(o, iss))
    }
}
