//! Branches, and the way out of a block.

use crate::{cpu::Cpu, exec::alu::holds, op::Op};

/// Takes the branch of `op` to `imm` bytes from it.
///
/// # Safety
///
/// `op` is the op that executes.
#[inline(always)]
unsafe fn go(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: promised by the caller.
    let o = unsafe { &*op };
    let target = cpu.pc_of(o).wrapping_add(o.imm);
    cpu.budget += i64::from(o.rem);
    // SAFETY: the budget behind `op` was given back.
    unsafe { cpu.jump(target) }
}

pub(crate) unsafe fn b(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    unsafe { go(cpu, op) }
}

pub(crate) unsafe fn bl(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    unsafe {
        cpu.r.x[30] = cpu.pc_of(&*op).wrapping_add(4);
        go(cpu, op)
    }
}

pub(crate) unsafe fn b_cond<const COND: u8>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe { if holds::<COND>(&cpu.r) { go(cpu, op) } else { op.add(1) } }
}

/// CBZ and CBNZ of slot `b`.
pub(crate) unsafe fn cb<const SF: bool, const NONZERO: bool>(
    cpu: &mut Cpu,
    op: *const Op,
) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        let value = cpu.r.x[(*op).b as usize];
        let zero = if SF { value == 0 } else { value as u32 == 0 };
        if zero != NONZERO { go(cpu, op) } else { op.add(1) }
    }
}

/// TBZ and TBNZ of bit `d` of slot `b`.
pub(crate) unsafe fn tb<const NONZERO: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        let bit = cpu.r.x[(*op).b as usize] >> ((*op).d & 63) & 1;
        if (bit != 0) == NONZERO { go(cpu, op) } else { op.add(1) }
    }
}

/// BR and RET to slot `b`, and with LINK BLR.
pub(crate) unsafe fn br<const LINK: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract.
    unsafe {
        let o = &*op;
        let target = cpu.r.x[o.b as usize];
        if LINK {
            cpu.r.x[30] = cpu.pc_of(o).wrapping_add(4);
        }
        cpu.budget += i64::from(o.rem);
        cpu.jump(target)
    }
}

/// ADR: `imm` bytes from here. ADRP: `imm` bytes from this page.
pub(crate) unsafe fn adr<const PAGE: bool>(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; another op follows.
    unsafe {
        let o = &*op;
        let pc = cpu.pc_of(o);
        let base = if PAGE { pc & !0xfff } else { pc };
        cpu.r.x[o.a as usize] = base.wrapping_add(o.imm);
        op.add(1)
    }
}

/// The op behind the last instruction of a block that does not end with a branch: goes on at the
/// next instruction. It is not an instruction itself.
pub(crate) unsafe fn leave_block(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: `Exec`'s contract; nothing of the block is left to be given back.
    unsafe {
        let next = cpu.pc_of(&*op);
        cpu.jump(next)
    }
}
