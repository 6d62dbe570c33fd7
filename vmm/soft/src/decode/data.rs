//! Data processing: immediate and register (Arm ARM C4.1.92, C4.1.95).

use super::{bit, destination, field, or_sp, signed, source};
use crate::{
    exec::{
        alu::{self, ASR, EXT, IMM, LSL, LSR, REG, ROR},
        branch::adr,
        instance,
    },
    op::{Exec, Op},
    regs::{SINK, ZERO},
};

pub(super) fn immediate(insn: u32) -> Option<Op> {
    let sf = bit(insn, 31);
    match field(insn, 23, 3) {
        0b000 | 0b001 => {
            let imm = signed(insn, 5, 19) << 2 | i64::from(field(insn, 29, 2));
            let op = if bit(insn, 31) {
                Op::new(adr::<true>).imm((imm << 12) as u64)
            } else {
                Op::new(adr::<false>).imm(imm as u64)
            };
            Some(op.regs(destination(insn, 0), 0, 0))
        }
        0b010 => {
            let shift = if bit(insn, 22) { 12 } else { 0 };
            let imm = u64::from(field(insn, 10, 12)) << shift;
            let set_flags = bit(insn, 29);
            let rd = if set_flags { destination(insn, 0) } else { or_sp(insn, 0) };
            let exec = add_sub(sf, bit(insn, 30), set_flags, IMM);
            Some(Op::new(exec).imm(imm).regs(rd, or_sp(insn, 5), 0))
        }
        0b100 => logical_immediate(insn, sf),
        0b101 => move_wide(insn, sf),
        0b110 => {
            let (immr, imms) = (field(insn, 16, 6), field(insn, 10, 6));
            if sf != bit(insn, 22) || (!sf && (immr > 31 || imms > 31)) {
                return None;
            }
            let exec: Exec = match field(insn, 29, 2) {
                0 => instance!(bfm_signed [] bool sf),
                1 => instance!(bfm_insert [] bool sf),
                2 => instance!(bfm_unsigned [] bool sf),
                _ => return None,
            };
            // BFM reads its destination, which must not be the sink then.
            let rd = destination(insn, 0);
            Some(Op::new(exec).regs(rd, source(insn, 5), immr as u8).d(imms as u8))
        }
        0b111 => {
            let lsb = field(insn, 10, 6);
            if field(insn, 29, 2) != 0 || sf != bit(insn, 22) || bit(insn, 21) || (!sf && lsb > 31)
            {
                return None;
            }
            let exec = instance!(extr [] bool sf);
            let op = Op::new(exec).regs(destination(insn, 0), source(insn, 5), source(insn, 16));
            Some(op.d(lsb as u8))
        }
        _ => None,
    }
}

use alu::{bfm_insert, bfm_signed, bfm_unsigned, extr};

fn logical_immediate(insn: u32, sf: bool) -> Option<Op> {
    let n = field(insn, 22, 1);
    if !sf && n != 0 {
        return None;
    }
    let imm = bit_mask(n, field(insn, 10, 6), field(insn, 16, 6))?;
    let imm = if sf { imm } else { imm & 0xffff_ffff };
    let opc = field(insn, 29, 2);
    let rd = if opc == 3 { destination(insn, 0) } else { or_sp(insn, 0) };
    let rn = source(insn, 5);
    if opc == 1 && rn == ZERO {
        return Some(Op::new(alu::constant).imm(imm).regs(rd, 0, 0));
    }
    Some(Op::new(logic(sf, false, opc, IMM)).imm(imm).regs(rd, rn, 0))
}

/// DecodeBitMasks() for a logical immediate.
fn bit_mask(n: u32, imms: u32, immr: u32) -> Option<u64> {
    let len = 31u32.checked_sub((n << 6 | !imms & 0x3f).leading_zeros())?;
    if len == 0 {
        return None;
    }
    let size = 1u32 << len;
    let (s, r) = (imms & (size - 1), immr & (size - 1));
    if s == size - 1 {
        return None;
    }
    let ones = (1u64 << (s + 1)) - 1;
    let element_mask = u64::MAX >> (64 - size);
    let rotated = if r == 0 { ones } else { (ones >> r | ones << (size - r)) & element_mask };
    let mut mask = rotated;
    let mut width = size;
    while width < 64 {
        mask |= mask << width;
        width *= 2;
    }
    Some(mask)
}

fn move_wide(insn: u32, sf: bool) -> Option<Op> {
    let shift = field(insn, 21, 2) * 16;
    if !sf && shift > 16 {
        return None;
    }
    let imm = u64::from(field(insn, 5, 16)) << shift;
    let rd = destination(insn, 0);
    match field(insn, 29, 2) {
        0 => {
            let value = if sf { !imm } else { u64::from(!imm as u32) };
            Some(Op::new(alu::constant).imm(value).regs(rd, 0, 0))
        }
        2 => Some(Op::new(alu::constant).imm(imm).regs(rd, 0, 0)),
        3 => {
            let exec = instance!(movk [] bool sf);
            Some(Op::new(exec).imm(imm).regs(rd, source(insn, 0), 0).d(shift as u8))
        }
        _ => None,
    }
}

use alu::movk;

pub(super) fn register(insn: u32) -> Option<Op> {
    let sf = bit(insn, 31);
    let (rd, rn, rm) = (destination(insn, 0), source(insn, 5), source(insn, 16));
    if !bit(insn, 28) {
        let amount = field(insn, 10, 6);
        if !bit(insn, 24) {
            // Logical (shifted register).
            if !sf && amount > 31 {
                return None;
            }
            let (opc, invert) = (field(insn, 29, 2), bit(insn, 21));
            let src = shifted(field(insn, 22, 2), amount);
            if sf && opc == 1 && !invert && rn == ZERO && src == REG {
                return Some(Op::new(alu::copy).regs(rd, rm, 0));
            }
            return Some(Op::new(logic(sf, invert, opc, src)).regs(rd, rn, rm).d(amount as u8));
        }
        let (sub, set_flags) = (bit(insn, 30), bit(insn, 29));
        if !bit(insn, 21) {
            // Add/subtract (shifted register).
            let shift = field(insn, 22, 2);
            if shift == 3 || (!sf && amount > 31) {
                return None;
            }
            let exec = add_sub(sf, sub, set_flags, shifted(shift, amount));
            return Some(Op::new(exec).regs(rd, rn, rm).d(amount as u8));
        }
        // Add/subtract (extended register).
        let (option, shift) = (field(insn, 13, 3), field(insn, 10, 3));
        if field(insn, 22, 2) != 0 || shift > 4 {
            return None;
        }
        let rd = if set_flags { rd } else { or_sp(insn, 0) };
        let exec = add_sub(sf, sub, set_flags, EXT);
        return Some(Op::new(exec).regs(rd, or_sp(insn, 5), rm).d((shift << 3 | option) as u8));
    }
    if bit(insn, 24) {
        return three_source(insn, sf);
    }
    let (sub, set_flags) = (bit(insn, 30), bit(insn, 29));
    match field(insn, 21, 3) {
        0b000 if field(insn, 10, 6) == 0 => {
            let exec = instance!(add_carry [] bool sf, bool sub, bool set_flags);
            Some(Op::new(exec).regs(rd, rn, rm))
        }
        0b010 => {
            // Conditional compare.
            if !set_flags || bit(insn, 10) || bit(insn, 4) {
                return None;
            }
            let (cond, immediate) = (field(insn, 12, 4), bit(insn, 11));
            let exec: Exec = instance!(compare_if [] bool sf, bool sub, bool immediate, of16 cond);
            let imm = u64::from(field(insn, 16, 5));
            Some(Op::new(exec).imm(imm).regs(SINK, rn, rm).d(field(insn, 0, 4) as u8))
        }
        0b100 => {
            // Conditional select.
            if set_flags || bit(insn, 11) {
                return None;
            }
            let cond = field(insn, 12, 4);
            let kind = u32::from(sub) << 1 | field(insn, 10, 1);
            let exec: Exec = match kind {
                0 => instance!(select0 [] bool sf, of16 cond),
                1 => instance!(select1 [] bool sf, of16 cond),
                2 => instance!(select2 [] bool sf, of16 cond),
                _ => instance!(select3 [] bool sf, of16 cond),
            };
            Some(Op::new(exec).regs(rd, rn, rm))
        }
        0b110 if sub => {
            // Data-processing (1 source).
            if set_flags || field(insn, 16, 5) != 0 {
                return None;
            }
            let kind = field(insn, 10, 6);
            if kind > 5 || (!sf && kind == 3) {
                return None;
            }
            let exec = instance!(one_source [] bool sf, of8 kind);
            Some(Op::new(exec).regs(rd, rn, 0))
        }
        0b110 => {
            // Data-processing (2 source).
            if set_flags {
                return None;
            }
            let kind = field(insn, 10, 6);
            let exec: Exec = match kind {
                2 => instance!(divide [] bool sf, bool false),
                3 => instance!(divide [] bool sf, bool true),
                8..=11 => instance!(shift_by [] bool sf, of4 kind),
                16..=23 => {
                    let (c, size) = (kind & 4 != 0, kind & 3);
                    // The 64-bit form takes a 64-bit operand, the others a 32-bit one.
                    if sf != (size == 3) {
                        return None;
                    }
                    instance!(crc32 [] bool c, of4 size)
                }
                _ => return None,
            };
            Some(Op::new(exec).regs(rd, rn, rm))
        }
        _ => None,
    }
}

use alu::{add_carry, compare_if, crc32, divide, one_source, select, shift_by};

/// [`select`] by kind, with the parameters that vary most first.
use select_kinds::{select0, select1, select2, select3};
mod select_kinds {
    use super::select;
    use crate::{cpu::Cpu, op::Op};

    macro_rules! kinds {
        ($($name:ident = $kind:literal;)*) => {$(
            pub(super) unsafe fn $name<const SF: bool, const COND: u8>(
                cpu: &mut Cpu,
                op: *const Op,
            ) -> *const Op {
                // SAFETY: the same contract.
                unsafe { select::<SF, $kind, COND>(cpu, op) }
            }
        )*};
    }
    kinds! { select0 = 0; select1 = 1; select2 = 2; select3 = 3; }
}

fn three_source(insn: u32, sf: bool) -> Option<Op> {
    if field(insn, 29, 2) != 0 {
        return None;
    }
    let sub = bit(insn, 15);
    let exec: Exec = match (field(insn, 21, 3), sf) {
        (0b000, _) => instance!(multiply_add [] bool sf, bool sub),
        (0b001, true) => instance!(multiply_add_long [] bool true, bool sub),
        (0b101, true) => instance!(multiply_add_long [] bool false, bool sub),
        (0b010, true) if !sub => alu::multiply_high::<true>,
        (0b110, true) if !sub => alu::multiply_high::<false>,
        _ => return None,
    };
    let op = Op::new(exec).regs(destination(insn, 0), source(insn, 5), source(insn, 16));
    Some(op.d(source(insn, 10)))
}

use alu::{multiply_add, multiply_add_long};

/// How a shifted register is fetched.
fn shifted(shift: u32, amount: u32) -> u8 {
    match (shift, amount) {
        (_, 0) => REG,
        (0, _) => LSL,
        (1, _) => LSR,
        (2, _) => ASR,
        _ => ROR,
    }
}

fn add_sub(sf: bool, sub: bool, set_flags: bool, src: u8) -> Exec {
    use alu::add_sub;
    instance!(add_sub [] bool sf, bool sub, bool set_flags, of8 src)
}

fn logic(sf: bool, invert: bool, opc: u32, src: u8) -> Exec {
    use logic_kinds::{logic0, logic1, logic2, logic3};
    match opc {
        0 => instance!(logic0 [] bool sf, bool invert, of8 src),
        1 => instance!(logic1 [] bool sf, bool invert, of8 src),
        2 => instance!(logic2 [] bool sf, bool invert, of8 src),
        _ => instance!(logic3 [] bool sf, bool invert, of8 src),
    }
}

/// [`alu::logic`] by operation, with the parameter that varies most last.
mod logic_kinds {
    use crate::{cpu::Cpu, exec::alu::logic, op::Op};

    macro_rules! kinds {
        ($($name:ident = $opc:literal;)*) => {$(
            pub(super) unsafe fn $name<const SF: bool, const INVERT: bool, const SRC: u8>(
                cpu: &mut Cpu,
                op: *const Op,
            ) -> *const Op {
                // SAFETY: the same contract.
                unsafe { logic::<SF, INVERT, $opc, SRC>(cpu, op) }
            }
        )*};
    }
    kinds! { logic0 = 0; logic1 = 1; logic2 = 2; logic3 = 3; }
}
