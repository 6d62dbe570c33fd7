//! Data processing on general registers.

use super::plain;
use crate::{op::Op, regs::Regs};

/// Second operand: the immediate.
pub(crate) const IMM: u8 = 0;
/// Second operand: slot `c` as it is.
pub(crate) const REG: u8 = 1;
/// Second operand: slot `c` shifted left by `d`.
pub(crate) const LSL: u8 = 2;
/// Second operand: slot `c` shifted right by `d`.
pub(crate) const LSR: u8 = 3;
/// Second operand: slot `c` shifted right arithmetically by `d`.
pub(crate) const ASR: u8 = 4;
/// Second operand: slot `c` rotated right by `d`.
pub(crate) const ROR: u8 = 5;
/// Second operand: slot `c` extended as `d` bits 2 to 0 say, shifted left by `d` bits 5 to 3.
pub(crate) const EXT: u8 = 6;

#[inline(always)]
fn operand<const SF: bool, const SRC: u8>(r: &Regs, o: &Op) -> u64 {
    let value = r.x[o.c as usize];
    let d = u32::from(o.d);
    match (SRC, SF) {
        (IMM, _) => o.imm,
        (REG, true) => value,
        (REG, false) => u64::from(value as u32),
        (LSL, true) => value << (d & 63),
        (LSL, false) => u64::from((value as u32) << (d & 31)),
        (LSR, true) => value >> (d & 63),
        (LSR, false) => u64::from(value as u32 >> (d & 31)),
        (ASR, true) => (value as i64 >> (d & 63)) as u64,
        (ASR, false) => u64::from((value as i32 >> (d & 31)) as u32),
        (ROR, true) => value.rotate_right(d),
        (ROR, false) => u64::from((value as u32).rotate_right(d)),
        _ => extend(value, d & 7) << (d >> 3 & 7),
    }
}

/// ExtendReg(): `option` is UXTB, UXTH, UXTW, UXTX, SXTB, SXTH, SXTW, SXTX.
#[inline(always)]
pub(crate) fn extend(value: u64, option: u32) -> u64 {
    match option & 7 {
        0 => u64::from(value as u8),
        1 => u64::from(value as u16),
        2 => u64::from(value as u32),
        4 => value as i8 as u64,
        5 => value as i16 as u64,
        6 => value as i32 as u64,
        _ => value,
    }
}

#[inline(always)]
fn add_with_flags<const SF: bool>(r: &mut Regs, a: u64, b: u64, carry: bool) -> u64 {
    if SF {
        let (sum, c1) = a.overflowing_add(b);
        let (sum, c2) = sum.overflowing_add(u64::from(carry));
        r.nf = sum;
        r.zf = sum;
        r.cf = c1 | c2;
        r.vf = (!(a ^ b) & (a ^ sum)) >> 63 != 0;
        sum
    } else {
        let (a, b) = (a as u32, b as u32);
        let (sum, c1) = a.overflowing_add(b);
        let (sum, c2) = sum.overflowing_add(u32::from(carry));
        r.nf = u64::from(sum) << 32;
        r.zf = u64::from(sum);
        r.cf = c1 | c2;
        r.vf = (!(a ^ b) & (a ^ sum)) >> 31 != 0;
        u64::from(sum)
    }
}

#[inline(always)]
fn sub_with_flags<const SF: bool>(r: &mut Regs, a: u64, b: u64) -> u64 {
    if SF {
        let difference = a.wrapping_sub(b);
        r.nf = difference;
        r.zf = difference;
        r.cf = a >= b;
        r.vf = ((a ^ b) & (a ^ difference)) >> 63 != 0;
        difference
    } else {
        let (a, b) = (a as u32, b as u32);
        let difference = a.wrapping_sub(b);
        r.nf = u64::from(difference) << 32;
        r.zf = u64::from(difference);
        r.cf = a >= b;
        r.vf = ((a ^ b) & (a ^ difference)) >> 31 != 0;
        u64::from(difference)
    }
}

#[inline(always)]
fn logic_flags<const SF: bool>(r: &mut Regs, value: u64) {
    r.nf = if SF { value } else { value << 32 };
    r.zf = value;
    r.cf = false;
    r.vf = false;
}

#[inline(always)]
fn width<const SF: bool>(value: u64) -> u64 {
    if SF { value } else { u64::from(value as u32) }
}

plain!(
    /// ADD, ADDS, SUB, SUBS in every form.
    add_sub<const SF: bool, const SUB: bool, const S: bool, const SRC: u8>, |r, o| {
    let a = r.x[o.b as usize];
    let b = operand::<SF, SRC>(r, o);
    r.x[o.a as usize] = match (SUB, S) {
        (false, false) => width::<SF>(a.wrapping_add(b)),
        (true, false) => width::<SF>(a.wrapping_sub(b)),
        (false, true) => add_with_flags::<SF>(r, a, b, false),
        (true, true) => sub_with_flags::<SF>(r, a, b),
    };
});

plain!(
    /// ADC, ADCS, SBC, SBCS.
    add_carry<const SF: bool, const SUB: bool, const S: bool>, |r, o| {
    let a = r.x[o.b as usize];
    let b = if SUB { !r.x[o.c as usize] } else { r.x[o.c as usize] };
    r.x[o.a as usize] = if S {
        add_with_flags::<SF>(r, a, b, r.cf)
    } else {
        width::<SF>(a.wrapping_add(b).wrapping_add(u64::from(r.cf)))
    };
});

plain!(
    /// AND, ORR, EOR, ANDS (0 to 3), and with INVERT also BIC, ORN, EON, BICS.
    logic<const SF: bool, const INVERT: bool, const OPC: u8, const SRC: u8>, |r, o| {
    let a = r.x[o.b as usize];
    let b = operand::<SF, SRC>(r, o);
    let b = if INVERT { !b } else { b };
    let value = width::<SF>(match OPC {
        0 | 3 => a & b,
        1 => a | b,
        _ => a ^ b,
    });
    if OPC == 3 {
        logic_flags::<SF>(r, value);
    }
    r.x[o.a as usize] = value;
});

plain!(
    /// A constant: MOVZ, MOVN, ORR immediate from the zero register.
    constant, |r, o| { r.x[o.a as usize] = o.imm; });

plain!(
    /// A copy of a 64-bit register.
    copy, |r, o| { r.x[o.a as usize] = r.x[o.b as usize]; });

plain!(
    /// MOVK: `imm` are the new bits, `d` their position.
    movk<const SF: bool>, |r, o| {
    let keep = r.x[o.b as usize] & !(0xffff << (o.d & 63));
    r.x[o.a as usize] = width::<SF>(keep | o.imm);
});

plain!(
    /// UBFM, which is also LSL, LSR, UXTB, UXTH, UBFX, UBFIZ: `c` is immr, `d` imms.
    bfm_unsigned<const SF: bool>, |r, o| {
    let (immr, imms) = (u32::from(o.c), u32::from(o.d));
    let (value, size) = (width::<SF>(r.x[o.b as usize]), if SF { 64 } else { 32 });
    r.x[o.a as usize] = if imms >= immr {
        value >> immr & ones(imms - immr + 1)
    } else {
        (value & ones(imms + 1)) << (size - immr)
    };
});

plain!(
    /// SBFM, which is also ASR, SXTB, SXTH, SXTW, SBFX, SBFIZ.
    bfm_signed<const SF: bool>, |r, o| {
    let (immr, imms) = (u32::from(o.c), u32::from(o.d));
    let (value, size) = (r.x[o.b as usize], if SF { 64 } else { 32 });
    // The field's top bit goes to bit 63, then everything comes down arithmetically.
    let field = (value << (63 - imms)) as i64;
    let result = if imms >= immr {
        field >> (63 - imms + immr)
    } else {
        (field >> (63 - imms)) << (size - immr)
    };
    r.x[o.a as usize] = width::<SF>(result as u64);
});

plain!(
    /// BFM, which is also BFI, BFXIL.
    bfm_insert<const SF: bool>, |r, o| {
    let (immr, imms) = (u32::from(o.c), u32::from(o.d));
    let (value, size) = (width::<SF>(r.x[o.b as usize]), if SF { 64 } else { 32 });
    let old = r.x[o.a as usize];
    r.x[o.a as usize] = width::<SF>(if imms >= immr {
        let mask = ones(imms - immr + 1);
        old & !mask | value >> immr & mask
    } else {
        let mask = ones(imms + 1) << (size - immr);
        old & !mask | value << (size - immr) & mask
    });
});

#[inline(always)]
fn ones(count: u32) -> u64 {
    u64::MAX >> (64 - count)
}

plain!(
    /// EXTR, which is also ROR by an immediate: `d` is the lowest bit.
    extr<const SF: bool>, |r, o| {
    let (high, low) = (r.x[o.b as usize], r.x[o.c as usize]);
    r.x[o.a as usize] = if SF {
        ((u128::from(high) << 64 | u128::from(low)) >> (o.d & 63)) as u64
    } else {
        u64::from((((high << 32) | low & 0xffff_ffff) >> (o.d & 31)) as u32)
    };
});

/// ConditionHolds() for a condition known when the code is compiled.
#[inline(always)]
pub(crate) fn holds<const COND: u8>(r: &Regs) -> bool {
    let n = (r.nf as i64) < 0;
    match COND {
        0 => r.zf == 0,
        1 => r.zf != 0,
        2 => r.cf,
        3 => !r.cf,
        4 => n,
        5 => !n,
        6 => r.vf,
        7 => !r.vf,
        8 => r.cf && r.zf != 0,
        9 => !(r.cf && r.zf != 0),
        10 => n == r.vf,
        11 => n != r.vf,
        12 => n == r.vf && r.zf != 0,
        13 => !(n == r.vf && r.zf != 0),
        _ => true,
    }
}

plain!(
    /// CSEL, CSINC, CSINV, CSNEG (KIND 0 to 3).
    select<const SF: bool, const KIND: u8, const COND: u8>, |r, o| {
    let value = if holds::<COND>(r) {
        r.x[o.b as usize]
    } else {
        let other = r.x[o.c as usize];
        match KIND {
            0 => other,
            1 => other.wrapping_add(1),
            2 => !other,
            _ => other.wrapping_neg(),
        }
    };
    r.x[o.a as usize] = width::<SF>(value);
});

plain!(
    /// CCMP and CCMN: `d` is the NZCV otherwise; the operand is `imm` or slot `c`.
    compare_if<const SF: bool, const SUB: bool, const IMMEDIATE: bool, const COND: u8>, |r, o| {
    if holds::<COND>(r) {
        let a = r.x[o.b as usize];
        let b = if IMMEDIATE { o.imm } else { r.x[o.c as usize] };
        if SUB {
            sub_with_flags::<SF>(r, a, b);
        } else {
            add_with_flags::<SF>(r, a, b, false);
        }
    } else {
        r.set_nzcv(u32::from(o.d) << 28);
    }
});

plain!(
    /// UDIV and SDIV: by zero gives zero, and the one overflow wraps.
    divide<const SF: bool, const SIGNED: bool>, |r, o| {
    let (a, b) = (r.x[o.b as usize], r.x[o.c as usize]);
    r.x[o.a as usize] = match (SF, SIGNED) {
        (true, false) => a.checked_div(b).unwrap_or(0),
        (false, false) => u64::from((a as u32).checked_div(b as u32).unwrap_or(0)),
        (true, true) => if b == 0 { 0 } else { (a as i64).wrapping_div(b as i64) as u64 },
        (false, true) => {
            let quotient = if b as u32 == 0 { 0 } else { (a as i32).wrapping_div(b as i32) };
            u64::from(quotient as u32)
        }
    };
});

plain!(
    /// LSLV, LSRV, ASRV, RORV (KIND 0 to 3).
    shift_by<const SF: bool, const KIND: u8>, |r, o| {
    let (value, by) = (r.x[o.b as usize], r.x[o.c as usize] as u32);
    r.x[o.a as usize] = if SF {
        let by = by & 63;
        match KIND {
            0 => value << by,
            1 => value >> by,
            2 => (value as i64 >> by) as u64,
            _ => value.rotate_right(by),
        }
    } else {
        let (value, by) = (value as u32, by & 31);
        u64::from(match KIND {
            0 => value << by,
            1 => value >> by,
            2 => (value as i32 >> by) as u32,
            _ => value.rotate_right(by),
        })
    };
});

plain!(
    /// RBIT, REV16, REV32 (REV for 32 bits), REV, CLZ, CLS (KIND 0 to 5).
    one_source<const SF: bool, const KIND: u8>, |r, o| {
    let value = r.x[o.b as usize];
    r.x[o.a as usize] = match (KIND, SF) {
        (0, true) => value.reverse_bits(),
        (0, false) => u64::from((value as u32).reverse_bits()),
        (1, _) => {
            let swapped = (value >> 8 & 0x00ff_00ff_00ff_00ff) | (value & 0x00ff_00ff_00ff_00ff) << 8;
            width::<SF>(swapped)
        }
        (2, true) => value.swap_bytes().rotate_left(32),
        (2 | 3, false) => u64::from((value as u32).swap_bytes()),
        (3, true) => value.swap_bytes(),
        (4, true) => u64::from(value.leading_zeros()),
        (4, false) => u64::from((value as u32).leading_zeros()),
        (_, true) => u64::from(((value ^ (value as i64 >> 63) as u64) << 1 | 1).leading_zeros()),
        (_, false) => {
            let value = value as u32;
            u64::from(((value ^ (value as i32 >> 31) as u32) << 1 | 1).leading_zeros())
        }
    };
});

plain!(
    /// MADD and MSUB: `d` is the addend.
    multiply_add<const SF: bool, const SUB: bool>, |r, o| {
    let product = r.x[o.b as usize].wrapping_mul(r.x[o.c as usize]);
    let addend = r.x[o.d as usize];
    let value = if SUB { addend.wrapping_sub(product) } else { addend.wrapping_add(product) };
    r.x[o.a as usize] = width::<SF>(value);
});

plain!(
    /// SMADDL, SMSUBL, UMADDL, UMSUBL.
    multiply_add_long<const SIGNED: bool, const SUB: bool>, |r, o| {
    let (a, b) = (r.x[o.b as usize], r.x[o.c as usize]);
    let product = if SIGNED {
        i64::from(a as i32).wrapping_mul(i64::from(b as i32)) as u64
    } else {
        u64::from(a as u32).wrapping_mul(u64::from(b as u32))
    };
    let addend = r.x[o.d as usize];
    r.x[o.a as usize] =
        if SUB { addend.wrapping_sub(product) } else { addend.wrapping_add(product) };
});

plain!(
    /// SMULH and UMULH.
    multiply_high<const SIGNED: bool>, |r, o| {
    let (a, b) = (r.x[o.b as usize], r.x[o.c as usize]);
    r.x[o.a as usize] = if SIGNED {
        ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64
    } else {
        ((u128::from(a) * u128::from(b)) >> 64) as u64
    };
});

plain!(
    /// CRC32 (POLY false) and CRC32C of 1 << SIZE bytes.
    crc32<const C: bool, const SIZE: u8>, |r, o| {
    let mut crc = r.x[o.b as usize] as u32;
    let data = r.x[o.c as usize].to_le_bytes();
    let table = if C { &CRC32C } else { &CRC32 };
    for byte in &data[..1 << SIZE] {
        crc = crc >> 8 ^ table[usize::from(crc as u8 ^ byte)];
    }
    r.x[o.a as usize] = u64::from(crc);
});

static CRC32: [u32; 256] = crc_table(0xedb8_8320);
static CRC32C: [u32; 256] = crc_table(0x82f6_3b78);

const fn crc_table(reflected: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ reflected } else { crc >> 1 };
            bit += 1;
        }
        table[n] = crc;
        n += 1;
    }
    table
}
