//! Scalar floating point: arithmetic, comparison, selection, immediates and conversions.

use core::cmp::Ordering;

use super::DataFn;
use super::host::{self, Host};
use super::ops::{self, Binary, Ternary, Unary, expand_imm};
use super::softfloat::{self as soft, Double, Env, Format, Half, Rounding, Single};
use super::{ra, rd, rm, rn, scalar, set_scalar};
use crate::regs::Regs;

/// Decodes `x0x1 111x`: bits 30 and 28 are known.
pub(super) fn decode(insn: u32) -> Option<DataFn> {
    if insn >> 29 & 1 != 0 {
        return None;
    }
    let sf = insn >> 31 != 0;
    if insn >> 24 & 1 != 0 {
        return if sf { None } else { decode_three_source(insn) };
    }
    if insn >> 21 & 1 == 0 {
        return decode_fixed_point(insn);
    }
    if insn >> 10 & 0x3f == 0 {
        return decode_integer(insn);
    }
    if sf {
        return None;
    }
    if insn >> 10 & 0x1f == 0b10000 {
        return decode_one_source(insn);
    }
    let double = precision(insn)?;
    if insn >> 10 & 0xf == 0b1000 {
        // The two low bits of opcode2 and op are zero in all allocated comparisons.
        return (insn >> 14 & 3 == 0 && insn & 7 == 0).then_some(by!(double, compare));
    }
    if insn >> 10 & 7 == 0b100 {
        return (insn >> 5 & 31 == 0).then_some(by!(double, immediate));
    }
    match insn >> 10 & 3 {
        0b01 => Some(by!(double, conditional_compare)),
        0b11 => Some(by!(double, select)),
        0b10 => decode_two_source(insn, double),
        _ => None,
    }
}

fn decode_two_source(insn: u32, double: bool) -> Option<DataFn> {
    Some(match insn >> 12 & 15 {
        0 => by!(double, binary, ops::Mul),
        1 => by!(double, binary, ops::Div),
        2 => by!(double, binary, ops::Add),
        3 => by!(double, binary, ops::Sub),
        4 => by!(double, binary, ops::Max),
        5 => by!(double, binary, ops::Min),
        6 => by!(double, binary, ops::MaxNum),
        7 => by!(double, binary, ops::MinNum),
        8 => by!(double, binary, ops::NegMul),
        _ => return None,
    })
}

fn decode_three_source(insn: u32) -> Option<DataFn> {
    let double = precision(insn)?;
    Some(match (insn >> 21 & 1, insn >> 15 & 1) {
        (0, 0) => by!(double, ternary, ops::MulAdd),
        (0, _) => by!(double, ternary, ops::MulSub),
        (_, 0) => by!(double, ternary, ops::NegMulAdd),
        _ => by!(double, ternary, ops::NegMulSub),
    })
}

fn decode_one_source(insn: u32) -> Option<DataFn> {
    let opcode = insn >> 15 & 0x3f;
    match (insn >> 22 & 3, opcode) {
        (0, 5) => return Some(single_to_double),
        (0, 7) => return Some(convert::<Single, Half>),
        (1, 4) => return Some(double_to_single),
        (1, 7) => return Some(convert::<Double, Half>),
        (3, 4) => return Some(convert::<Half, Single>),
        (3, 5) => return Some(convert::<Half, Double>),
        _ => {}
    }
    let double = precision(insn)?;
    Some(match opcode {
        0 => by!(double, unary, ops::Move),
        1 => by!(double, unary, ops::Abs),
        2 => by!(double, unary, ops::Neg),
        3 => by!(double, unary, ops::Sqrt),
        8 => by!(double, unary, ops::RintN),
        9 => by!(double, unary, ops::RintP),
        10 => by!(double, unary, ops::RintM),
        11 => by!(double, unary, ops::RintZ),
        12 => by!(double, unary, ops::RintA),
        14 => by!(double, unary, ops::RintX),
        15 => by!(double, unary, ops::RintI),
        _ => return None,
    })
}

fn decode_fixed_point(insn: u32) -> Option<DataFn> {
    let double = precision(insn)?;
    // A 32-bit register has no more than 32 fraction bits.
    if insn >> 31 == 0 && insn >> 15 & 1 == 0 {
        return None;
    }
    match insn >> 16 & 31 {
        0b00_010 | 0b00_011 => Some(by!(double, fixed_to_float)),
        0b11_000 | 0b11_001 => Some(by!(double, float_to_fixed)),
        _ => None,
    }
}

fn decode_integer(insn: u32) -> Option<DataFn> {
    let sf = insn >> 31 != 0;
    let double = insn >> 22 & 3 == 1;
    match (insn >> 22 & 3, insn >> 16 & 31) {
        (0 | 1, 0b11_000 | 0b11_001) => Some(by!(double, float_to_int_zero)),
        (0 | 1, 0b00_000 | 0b01_000 | 0b10_000 | 0b00_001 | 0b01_001 | 0b10_001) => {
            Some(by!(double, float_to_int))
        }
        (0 | 1, 0b00_100 | 0b00_101) => Some(by!(double, float_to_int)),
        (0 | 1, 0b00_010 | 0b00_011) => Some(by!(double, int_to_float)),
        (0 | 1, 0b00_110) if sf == double => Some(by!(double, move_to_general)),
        (0 | 1, 0b00_111) if sf == double => Some(by!(double, move_from_general)),
        (2, 0b01_110) if sf => Some(move_top_to_general),
        (2, 0b01_111) if sf => Some(move_top_from_general),
        _ => None,
    }
}

/// Whether ptype says double; `None` for half precision and the reserved value.
fn precision(insn: u32) -> Option<bool> {
    match insn >> 22 & 3 {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn unary<F: Host, O: Unary>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = O::apply::<F>(&mut env, scalar::<F>(regs, rn(insn)));
    env.store(regs);
    set_scalar(regs, insn, value);
}

fn binary<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let (a, b) = (scalar::<F>(regs, rn(insn)), scalar::<F>(regs, rm(insn)));
    let value = O::apply::<F>(&mut env, a, b);
    env.store(regs);
    set_scalar(regs, insn, value);
}

fn ternary<F: Host, O: Ternary>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let acc = scalar::<F>(regs, ra(insn));
    let (a, b) = (scalar::<F>(regs, rn(insn)), scalar::<F>(regs, rm(insn)));
    let value = O::apply::<F>(&mut env, acc, a, b);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// FCMP, FCMPE and their forms with zero.
fn compare<F: Host>(regs: &mut Regs, insn: u32) {
    let b = if insn >> 3 & 1 != 0 { 0 } else { scalar::<F>(regs, rm(insn)) };
    set_flags::<F>(regs, insn, b);
}

/// FCCMP and FCCMPE.
fn conditional_compare<F: Host>(regs: &mut Regs, insn: u32) {
    if holds(regs, insn >> 12 & 15) {
        let b = scalar::<F>(regs, rm(insn));
        set_flags::<F>(regs, insn, b);
    } else {
        regs.set_nzcv((insn & 15) << 28);
    }
}

/// `FPCompare` of Rn with `b`; bit 4 makes a quiet NaN invalid as well.
#[inline(always)]
fn set_flags<F: Host>(regs: &mut Regs, insn: u32, b: u64) {
    let mut env = Env::load(regs);
    let a = scalar::<F>(regs, rn(insn));
    let relation = host::relation::<F>(&mut env, a, b, insn >> 4 & 1 != 0);
    env.store(regs);
    regs.nf = u64::from(relation == Some(Ordering::Less)) << 63;
    regs.zf = u64::from(relation != Some(Ordering::Equal));
    regs.cf = relation != Some(Ordering::Less);
    regs.vf = relation.is_none();
}

/// FCSEL.
fn select<F: Host>(regs: &mut Regs, insn: u32) {
    let chosen = if holds(regs, insn >> 12 & 15) { rn(insn) } else { rm(insn) };
    let value = scalar::<F>(regs, chosen);
    set_scalar(regs, insn, value);
}

/// FMOV (scalar, immediate).
fn immediate<F: Host>(regs: &mut Regs, insn: u32) {
    set_scalar(regs, insn, expand_imm::<F>(insn >> 13 & 0xff));
}

fn single_to_double(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = host::widen(&mut env, scalar::<Single>(regs, rn(insn)));
    env.store(regs);
    set_scalar(regs, insn, value);
}

fn double_to_single(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = host::narrow(&mut env, scalar::<Double>(regs, rn(insn)));
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// FCVT to or from half precision.
fn convert<S: Format, D: Format>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let rounding = env.rounding();
    let value = soft::convert::<S, D>(&mut env, scalar::<S>(regs, rn(insn)), rounding);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// SCVTF and UCVTF (scalar, integer).
fn int_to_float<F: Host>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = host::from_int::<F>(&mut env, integer(regs, insn), is_unsigned(insn));
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// SCVTF and UCVTF (scalar, fixed-point).
fn fixed_to_float<F: Host>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let (value, rounding) = (integer(regs, insn), env.rounding());
    let fbits = 64 - (insn >> 10 & 63);
    let value = soft::from_fixed::<F>(&mut env, value, is_unsigned(insn), fbits, rounding);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// FCVTZS and FCVTZU (scalar, integer).
fn float_to_int_zero<F: Host>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let a = scalar::<F>(regs, rn(insn));
    let value = host::to_int_zero::<F>(&mut env, a, width(insn), is_unsigned(insn));
    env.store(regs);
    regs.set_x(insn, value);
}

/// FCVT{N,P,M,A}{S,U} (scalar).
fn float_to_int<F: Host>(regs: &mut Regs, insn: u32) {
    let rounding = match insn >> 18 & 7 {
        0b000 => Rounding::TieEven,
        0b010 => Rounding::PosInf,
        0b100 => Rounding::NegInf,
        // opcode 10x beside rmode 00.
        _ => Rounding::TieAway,
    };
    float_to_fixed_rounded::<F>(regs, insn, 0, rounding);
}

/// FCVTZS and FCVTZU (scalar, fixed-point).
fn float_to_fixed<F: Host>(regs: &mut Regs, insn: u32) {
    float_to_fixed_rounded::<F>(regs, insn, 64 - (insn >> 10 & 63), Rounding::Zero);
}

/// FMOV from a scalar to a general register.
fn move_to_general<F: Host>(regs: &mut Regs, insn: u32) {
    let value = scalar::<F>(regs, rn(insn));
    regs.set_x(insn, value);
}

/// FMOV from a general register to a scalar.
fn move_from_general<F: Host>(regs: &mut Regs, insn: u32) {
    let value = regs.x(insn >> 5) & F::MASK;
    set_scalar(regs, insn, value);
}

/// FMOV Xd, Vn.D[1].
fn move_top_to_general(regs: &mut Regs, insn: u32) {
    let value = (regs.v[rn(insn)] >> 64) as u64;
    regs.set_x(insn, value);
}

/// FMOV Vd.D[1], Xn: the low half stays.
fn move_top_from_general(regs: &mut Regs, insn: u32) {
    let value = regs.x(insn >> 5);
    let low = regs.v[rd(insn)] as u64;
    regs.v[rd(insn)] = u128::from(value) << 64 | u128::from(low);
}

fn float_to_fixed_rounded<F: Host>(regs: &mut Regs, insn: u32, fbits: u32, rounding: Rounding) {
    let mut env = Env::load(regs);
    let a = scalar::<F>(regs, rn(insn));
    let unsigned = is_unsigned(insn);
    let value = soft::to_fixed::<F>(&mut env, a, width(insn), unsigned, fbits, rounding);
    env.store(regs);
    regs.set_x(insn, value);
}

/// Width of the general register.
#[inline(always)]
fn width(insn: u32) -> u32 {
    32 << (insn >> 31)
}

/// Bit 0 of opcode tells the unsigned from the signed conversions.
#[inline(always)]
fn is_unsigned(insn: u32) -> bool {
    insn >> 16 & 1 != 0
}

/// The general source register, extended to 64 bits by the conversion's sign.
#[inline(always)]
fn integer(regs: &Regs, insn: u32) -> u64 {
    let value = regs.x(insn >> 5);
    match (insn >> 31 != 0, is_unsigned(insn)) {
        (true, _) => value,
        (false, true) => u64::from(value as u32),
        (false, false) => i64::from(value as i32) as u64,
    }
}

/// `ConditionHolds`.
fn holds(regs: &Regs, condition: u32) -> bool {
    let nzcv = regs.nzcv() >> 28;
    let (n, z, c, v) = (nzcv >> 3 & 1, nzcv >> 2 & 1, nzcv >> 1 & 1, nzcv & 1);
    let base = match condition >> 1 {
        0 => z != 0,
        1 => c != 0,
        2 => n != 0,
        3 => v != 0,
        4 => c != 0 && z == 0,
        5 => n == v,
        6 => n == v && z == 0,
        // AL, and 0b1111 is the same.
        _ => return true,
    };
    base != (condition & 1 != 0)
}
