//! Branches, and the way out of a block.

use crate::{
    cpu::Cpu,
    exec::alu::holds,
    op::{Exec, Op},
};

/// Takes the branch of `op` to `imm` bytes from it. A target on the same page is remembered in the op,
/// which from then on is `linked`: a page's blocks come and go together, and where the page is mapped
/// is looked up when it is entered.
///
/// # Safety
///
/// `op` is the op that executes, and `linked` is the form of it for [`go_linked`].
#[inline(always)]
unsafe fn go(cpu: &mut Cpu, op: *const Op, linked: Exec) -> *const Op {
    // SAFETY: promised by the caller.
    let o = unsafe { &*op };
    let pc = cpu.pc_of(o);
    let target = pc.wrapping_add(o.imm);
    cpu.budget += i64::from(o.rem);
    // SAFETY: the budget behind `op` was given back.
    let first = unsafe { cpu.jump(target) };
    if (pc ^ target) & !0xfff == 0 && !first.is_null() {
        let op = op.cast_mut();
        // SAFETY: ops lie in memory that the code cache owns as mutable and that no reference is held
        // to over this call; only this vCPU uses it.
        unsafe {
            (*op).imm = first as u64;
            (*op).aux = (target & 0xfff) as u16;
            (*op).exec = linked;
        }
    }
    first
}

/// Takes the branch of `op` to the block in `imm`, which begins at byte `aux` of the same page.
///
/// # Safety
///
/// `op` is the op that executes, and [`go`] has linked it.
#[inline(always)]
unsafe fn go_linked(cpu: &mut Cpu, op: *const Op) -> *const Op {
    // SAFETY: promised by the caller. The blocks of a page are freed together, so a linked block lives
    // as long as one that leads to it.
    unsafe {
        let o = &*op;
        let target = cpu.block_va & !0xfff | u64::from(o.aux);
        cpu.budget += i64::from(o.rem);
        cpu.enter(o.imm as *const Op, target)
    }
}

/// Defines a branch and its linked form; the expression says whether it is taken.
macro_rules! branch {
    (
        $(#[$doc:meta])* $name:ident / $linked:ident
        $(<$(const $c:ident: $t:ty),*>)?, |$cpu:ident, $o:ident| $taken:expr
    ) => {
        $(#[$doc])*
        pub(crate) unsafe fn $name $(<$(const $c: $t),*>)? ($cpu: &mut Cpu, op: *const Op) -> *const Op {
            // SAFETY: `Exec`'s contract; another op follows one that is not taken.
            unsafe {
                let $o = &*op;
                if $taken { go($cpu, op, $linked $(::<$($c),*>)?) } else { op.add(1) }
            }
        }

        unsafe fn $linked $(<$(const $c: $t),*>)? ($cpu: &mut Cpu, op: *const Op) -> *const Op {
            // SAFETY: as above, and `go` has linked the op.
            unsafe {
                let $o = &*op;
                if $taken { go_linked($cpu, op) } else { op.add(1) }
            }
        }
    };
}

branch!(
    /// B.
    b / b_linked, |cpu, _o| true);

branch!(
    /// BL.
    bl / bl_linked, |cpu, o| {
    cpu.r.x[30] = cpu.pc_of(o).wrapping_add(4);
    true
});

branch!(
    /// B.cond.
    b_cond / b_cond_linked<const COND: u8>, |cpu, _o| holds::<COND>(&cpu.r));

branch!(
    /// CBZ and CBNZ of slot `b`.
    cb / cb_linked<const SF: bool, const NONZERO: bool>, |cpu, o| {
    let value = cpu.r.x[o.b as usize];
    (if SF { value == 0 } else { value as u32 == 0 }) != NONZERO
});

branch!(
    /// TBZ and TBNZ of bit `d` of slot `b`.
    tb / tb_linked<const NONZERO: bool>, |cpu, o| {
    (cpu.r.x[o.b as usize] >> (o.d & 63) & 1 != 0) == NONZERO
});

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
