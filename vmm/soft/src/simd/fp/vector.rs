//! Advanced SIMD floating point, and the scalar forms in the Advanced SIMD encodings.

use super::DataFn;
use super::host::Host;
use super::ops::{self, Binary, Ternary, Unary, sign_extend};
use super::softfloat::{self as soft, Double, Env, Format, Half, Rounding, Single};
use super::{rd, rm, rn, scalar, set_scalar};
use crate::regs::Regs;

/// Decodes `0xx0 111x` (vector) and `01x1 111x` (scalar).
pub(super) fn decode(insn: u32) -> Option<DataFn> {
    if insn >> 31 != 0 {
        return None;
    }
    let is_scalar = insn >> 28 & 1 != 0;
    if insn >> 24 & 1 != 0 {
        return match insn >> 10 & 1 {
            0 => decode_by_element(insn, is_scalar),
            _ if insn >> 23 & 1 == 0 => decode_shift_immediate(insn, is_scalar),
            _ => None,
        };
    }
    if insn >> 21 & 1 == 0 {
        return None;
    }
    match (insn >> 10 & 3, insn >> 17 & 15, is_scalar) {
        (1 | 3, _, true) => decode_scalar_three_same(insn),
        (1 | 3, _, false) => decode_three_same(insn),
        (2, 0b0000, true) => decode_scalar_misc(insn),
        (2, 0b0000, false) => decode_misc(insn),
        (2, 0b1000, true) => decode_scalar_pairwise(insn),
        (2, 0b1000, false) => decode_across_lanes(insn),
        _ => None,
    }
}

fn decode_three_same(insn: u32) -> Option<DataFn> {
    let double = lanes_precision(insn)?;
    Some(match (u(insn), a(insn), insn >> 11 & 31) {
        (0, 0, 0b11000) => by!(double, binary, ops::MaxNum),
        (0, 0, 0b11001) => by!(double, ternary, ops::MulAdd),
        (0, 0, 0b11010) => by!(double, binary, ops::Add),
        (0, 0, 0b11011) => by!(double, binary, ops::MulX),
        (0, 0, 0b11100) => by!(double, binary, ops::Equal),
        (0, 0, 0b11110) => by!(double, binary, ops::Max),
        (0, 0, 0b11111) => by!(double, binary, ops::RecipStep),
        (0, 1, 0b11000) => by!(double, binary, ops::MinNum),
        (0, 1, 0b11001) => by!(double, ternary, ops::MulSub),
        (0, 1, 0b11010) => by!(double, binary, ops::Sub),
        (0, 1, 0b11110) => by!(double, binary, ops::Min),
        (0, 1, 0b11111) => by!(double, binary, ops::RsqrtStep),
        (1, 0, 0b11000) => by!(double, pairwise, ops::MaxNum),
        (1, 0, 0b11010) => by!(double, pairwise, ops::Add),
        (1, 0, 0b11011) => by!(double, binary, ops::Mul),
        (1, 0, 0b11100) => by!(double, binary, ops::GreaterEqual),
        (1, 0, 0b11101) => by!(double, binary, ops::AbsGreaterEqual),
        (1, 0, 0b11110) => by!(double, pairwise, ops::Max),
        (1, 0, 0b11111) => by!(double, binary, ops::Div),
        (1, 1, 0b11000) => by!(double, pairwise, ops::MinNum),
        (1, 1, 0b11010) => by!(double, binary, ops::AbsDiff),
        (1, 1, 0b11100) => by!(double, binary, ops::Greater),
        (1, 1, 0b11101) => by!(double, binary, ops::AbsGreater),
        (1, 1, 0b11110) => by!(double, pairwise, ops::Min),
        _ => return None,
    })
}

fn decode_scalar_three_same(insn: u32) -> Option<DataFn> {
    let double = is_double(insn);
    Some(match (u(insn), a(insn), insn >> 11 & 31) {
        (0, 0, 0b11011) => by!(double, scalar_binary, ops::MulX),
        (0, 0, 0b11100) => by!(double, scalar_binary, ops::Equal),
        (0, 0, 0b11111) => by!(double, scalar_binary, ops::RecipStep),
        (0, 1, 0b11111) => by!(double, scalar_binary, ops::RsqrtStep),
        (1, 0, 0b11100) => by!(double, scalar_binary, ops::GreaterEqual),
        (1, 0, 0b11101) => by!(double, scalar_binary, ops::AbsGreaterEqual),
        (1, 1, 0b11010) => by!(double, scalar_binary, ops::AbsDiff),
        (1, 1, 0b11100) => by!(double, scalar_binary, ops::Greater),
        (1, 1, 0b11101) => by!(double, scalar_binary, ops::AbsGreater),
        _ => return None,
    })
}

fn decode_misc(insn: u32) -> Option<DataFn> {
    let opcode = insn >> 12 & 31;
    match (u(insn), insn >> 22 & 3, opcode) {
        (0, 0, 0b10110) => return Some(narrow::<Single, Half>),
        (0, 1, 0b10110) => return Some(narrow::<Double, Single>),
        (1, 1, 0b10110) => return Some(narrow_odd),
        (0, 0, 0b10111) => return Some(widen::<Half, Single>),
        (0, 1, 0b10111) => return Some(widen::<Single, Double>),
        (0, 2, 0b11100) => return Some(unsigned_recip_estimate),
        (1, 2, 0b11100) => return Some(unsigned_rsqrt_estimate),
        _ => {}
    }
    let double = lanes_precision(insn)?;
    Some(match (u(insn), a(insn), opcode) {
        (0, 0, 0b11000) => by!(double, unary, ops::RintN),
        (0, 0, 0b11001) => by!(double, unary, ops::RintM),
        (0, 0, 0b11010) => by!(double, unary, ops::ToSignedN),
        (0, 0, 0b11011) => by!(double, unary, ops::ToSignedM),
        (0, 0, 0b11100) => by!(double, unary, ops::ToSignedA),
        (0, 0, 0b11101) => by!(double, unary, ops::FromSigned),
        (0, 1, 0b01100) => by!(double, unary, ops::GreaterZero),
        (0, 1, 0b01101) => by!(double, unary, ops::EqualZero),
        (0, 1, 0b01110) => by!(double, unary, ops::LessZero),
        (0, 1, 0b01111) => by!(double, unary, ops::Abs),
        (0, 1, 0b11000) => by!(double, unary, ops::RintP),
        (0, 1, 0b11001) => by!(double, unary, ops::RintZ),
        (0, 1, 0b11010) => by!(double, unary, ops::ToSignedP),
        (0, 1, 0b11011) => by!(double, unary, ops::ToSignedZ),
        (0, 1, 0b11101) => by!(double, unary, ops::RecipEstimate),
        (1, 0, 0b11000) => by!(double, unary, ops::RintA),
        (1, 0, 0b11001) => by!(double, unary, ops::RintX),
        (1, 0, 0b11010) => by!(double, unary, ops::ToUnsignedN),
        (1, 0, 0b11011) => by!(double, unary, ops::ToUnsignedM),
        (1, 0, 0b11100) => by!(double, unary, ops::ToUnsignedA),
        (1, 0, 0b11101) => by!(double, unary, ops::FromUnsigned),
        (1, 1, 0b01100) => by!(double, unary, ops::GreaterEqualZero),
        (1, 1, 0b01101) => by!(double, unary, ops::LessEqualZero),
        (1, 1, 0b01111) => by!(double, unary, ops::Neg),
        (1, 1, 0b11001) => by!(double, unary, ops::RintI),
        (1, 1, 0b11010) => by!(double, unary, ops::ToUnsignedP),
        (1, 1, 0b11011) => by!(double, unary, ops::ToUnsignedZ),
        (1, 1, 0b11101) => by!(double, unary, ops::RsqrtEstimate),
        (1, 1, 0b11111) => by!(double, unary, ops::Sqrt),
        _ => return None,
    })
}

fn decode_scalar_misc(insn: u32) -> Option<DataFn> {
    let double = is_double(insn);
    Some(match (u(insn), a(insn), insn >> 12 & 31) {
        (0, 0, 0b11010) => by!(double, scalar_unary, ops::ToSignedN),
        (0, 0, 0b11011) => by!(double, scalar_unary, ops::ToSignedM),
        (0, 0, 0b11100) => by!(double, scalar_unary, ops::ToSignedA),
        (0, 0, 0b11101) => by!(double, scalar_unary, ops::FromSigned),
        (0, 1, 0b01100) => by!(double, scalar_unary, ops::GreaterZero),
        (0, 1, 0b01101) => by!(double, scalar_unary, ops::EqualZero),
        (0, 1, 0b01110) => by!(double, scalar_unary, ops::LessZero),
        (0, 1, 0b11010) => by!(double, scalar_unary, ops::ToSignedP),
        (0, 1, 0b11011) => by!(double, scalar_unary, ops::ToSignedZ),
        (0, 1, 0b11101) => by!(double, scalar_unary, ops::RecipEstimate),
        (0, 1, 0b11111) => by!(double, scalar_unary, ops::RecipExponent),
        (1, 0, 0b10110) if double => scalar_narrow_odd,
        (1, 0, 0b11010) => by!(double, scalar_unary, ops::ToUnsignedN),
        (1, 0, 0b11011) => by!(double, scalar_unary, ops::ToUnsignedM),
        (1, 0, 0b11100) => by!(double, scalar_unary, ops::ToUnsignedA),
        (1, 0, 0b11101) => by!(double, scalar_unary, ops::FromUnsigned),
        (1, 1, 0b01100) => by!(double, scalar_unary, ops::GreaterEqualZero),
        (1, 1, 0b01101) => by!(double, scalar_unary, ops::LessEqualZero),
        (1, 1, 0b11010) => by!(double, scalar_unary, ops::ToUnsignedP),
        (1, 1, 0b11011) => by!(double, scalar_unary, ops::ToUnsignedZ),
        (1, 1, 0b11101) => by!(double, scalar_unary, ops::RsqrtEstimate),
        _ => return None,
    })
}

fn decode_scalar_pairwise(insn: u32) -> Option<DataFn> {
    let double = is_double(insn);
    Some(match (u(insn), a(insn), insn >> 12 & 31) {
        (1, 0, 0b01100) => by!(double, scalar_pairwise, ops::MaxNum),
        (1, 0, 0b01101) => by!(double, scalar_pairwise, ops::Add),
        (1, 0, 0b01111) => by!(double, scalar_pairwise, ops::Max),
        (1, 1, 0b01100) => by!(double, scalar_pairwise, ops::MinNum),
        (1, 1, 0b01111) => by!(double, scalar_pairwise, ops::Min),
        _ => return None,
    })
}

fn decode_across_lanes(insn: u32) -> Option<DataFn> {
    if is_double(insn) || q(insn) == 0 || u(insn) == 0 {
        return None;
    }
    Some(match (a(insn), insn >> 12 & 31) {
        (0, 0b01100) => across_lanes::<ops::MaxNum>,
        (0, 0b01111) => across_lanes::<ops::Max>,
        (1, 0b01100) => across_lanes::<ops::MinNum>,
        (1, 0b01111) => across_lanes::<ops::Min>,
        _ => return None,
    })
}

fn decode_by_element(insn: u32, is_scalar: bool) -> Option<DataFn> {
    // size 0x would be half precision, and a double's index is H alone.
    if a(insn) == 0 || is_double(insn) && insn >> 21 & 1 != 0 {
        return None;
    }
    let double = if is_scalar { is_double(insn) } else { lanes_precision(insn)? };
    Some(match (is_scalar, u(insn), insn >> 12 & 15) {
        (false, 0, 0b0001) => by!(double, ternary_element, ops::MulAdd),
        (false, 0, 0b0101) => by!(double, ternary_element, ops::MulSub),
        (false, 0, 0b1001) => by!(double, binary_element, ops::Mul),
        (false, 1, 0b1001) => by!(double, binary_element, ops::MulX),
        (true, 0, 0b0001) => by!(double, scalar_ternary_element, ops::MulAdd),
        (true, 0, 0b0101) => by!(double, scalar_ternary_element, ops::MulSub),
        (true, 0, 0b1001) => by!(double, scalar_binary_element, ops::Mul),
        (true, 1, 0b1001) => by!(double, scalar_binary_element, ops::MulX),
        _ => return None,
    })
}

fn decode_shift_immediate(insn: u32, is_scalar: bool) -> Option<DataFn> {
    let double = match insn >> 19 & 15 {
        4..=7 => false,
        8..=15 if is_scalar || q(insn) != 0 => true,
        _ => return None,
    };
    Some(match (insn >> 11 & 31, is_scalar) {
        (0b11100, false) => by!(double, from_fixed),
        (0b11111, false) => by!(double, to_fixed),
        (0b11100, true) => by!(double, scalar_from_fixed),
        (0b11111, true) => by!(double, scalar_to_fixed),
        _ => return None,
    })
}

fn unary<F: Host, O: Unary>(regs: &mut Regs, insn: u32) {
    map1::<F>(regs, insn, O::apply::<F>);
}

fn scalar_unary<F: Host, O: Unary>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = O::apply::<F>(&mut env, scalar::<F>(regs, rn(insn)));
    env.store(regs);
    set_scalar(regs, insn, value);
}

fn binary<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let m = regs.v[rm(insn)];
    map2::<F>(regs, insn, m, O::apply::<F>);
}

fn scalar_binary<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let m = scalar::<F>(regs, rm(insn));
    scalar_with::<F, O>(regs, insn, m);
}

fn ternary<F: Host, O: Ternary>(regs: &mut Regs, insn: u32) {
    let m = regs.v[rm(insn)];
    map3::<F>(regs, insn, m, O::apply::<F>);
}

fn binary_element<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let m = replicate::<F>(element::<F>(regs, insn));
    map2::<F>(regs, insn, m, O::apply::<F>);
}

fn scalar_binary_element<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let m = element::<F>(regs, insn);
    scalar_with::<F, O>(regs, insn, m);
}

fn ternary_element<F: Host, O: Ternary>(regs: &mut Regs, insn: u32) {
    let m = replicate::<F>(element::<F>(regs, insn));
    map3::<F>(regs, insn, m, O::apply::<F>);
}

fn scalar_ternary_element<F: Host, O: Ternary>(regs: &mut Regs, insn: u32) {
    let m = element::<F>(regs, insn);
    let mut env = Env::load(regs);
    let (acc, n) = (scalar::<F>(regs, rd(insn)), scalar::<F>(regs, rn(insn)));
    let value = O::apply::<F>(&mut env, acc, n, m);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// Adjacent pairs of Rn, then of Rm.
fn pairwise<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let (n, m) = (regs.v[rn(insn)], regs.v[rm(insn)]);
    let mut env = Env::load(regs);
    let half = |env: &mut Env, source: u128, shift: u32| -> u64 {
        let lane = |i: u32| (source >> (shift + i * F::BITS)) as u64 & F::MASK;
        O::apply::<F>(env, lane(0), lane(1))
    };
    let mut out = 0;
    let mut at = 0;
    for source in [n, m] {
        let mut shift = 0;
        while shift < 64 << q(insn) {
            out |= u128::from(half(&mut env, source, shift)) << at;
            shift += 2 * F::BITS;
            at += F::BITS;
        }
    }
    env.store(regs);
    regs.v[rd(insn)] = out;
}

fn scalar_pairwise<F: Host, O: Binary>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let n = regs.v[rn(insn)];
    let value = O::apply::<F>(&mut env, n as u64 & F::MASK, (n >> F::BITS) as u64 & F::MASK);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// `Reduce`: the result of the low half, then that of the high half.
fn across_lanes<O: Binary>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let n = regs.v[rn(insn)];
    let lane = |i: u32| u64::from((n >> (32 * i)) as u32);
    let low = O::apply::<Single>(&mut env, lane(0), lane(1));
    let high = O::apply::<Single>(&mut env, lane(2), lane(3));
    let value = O::apply::<Single>(&mut env, low, high);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// FCVTN and FCVTN2.
fn narrow<S: Format, D: Format>(regs: &mut Regs, insn: u32) {
    let rounding = Env::load(regs).rounding();
    narrow_rounded::<S, D>(regs, insn, rounding);
}

/// FCVTXN and FCVTXN2 (vector).
fn narrow_odd(regs: &mut Regs, insn: u32) {
    narrow_rounded::<Double, Single>(regs, insn, Rounding::Odd);
}

/// FCVTXN (scalar).
fn scalar_narrow_odd(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let a = scalar::<Double>(regs, rn(insn));
    let value = soft::convert::<Double, Single>(&mut env, a, Rounding::Odd);
    env.store(regs);
    set_scalar(regs, insn, value);
}

fn narrow_rounded<S: Format, D: Format>(regs: &mut Regs, insn: u32, rounding: Rounding) {
    let mut env = Env::load(regs);
    let n = regs.v[rn(insn)];
    let mut out = 0;
    for i in 0..128 / S::BITS {
        let lane = (n >> (i * S::BITS)) as u64 & S::MASK;
        out |= soft::convert::<S, D>(&mut env, lane, rounding) << (i * D::BITS);
    }
    env.store(regs);
    let d = rd(insn);
    regs.v[d] = if q(insn) == 0 {
        u128::from(out)
    } else {
        u128::from(out) << 64 | u128::from(regs.v[d] as u64)
    };
}

/// FCVTL and FCVTL2.
fn widen<S: Format, D: Format>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let rounding = env.rounding();
    let n = (regs.v[rn(insn)] >> (64 * q(insn))) as u64;
    let mut out = 0;
    for i in 0..64 / S::BITS {
        let lane = n >> (i * S::BITS) & S::MASK;
        let value = soft::convert::<S, D>(&mut env, lane, rounding);
        out |= u128::from(value) << (i * D::BITS);
    }
    env.store(regs);
    regs.v[rd(insn)] = out;
}

/// URECPE.
fn unsigned_recip_estimate(regs: &mut Regs, insn: u32) {
    map1::<Single>(regs, insn, |_, a| u64::from(soft::unsigned_recip_estimate(a as u32)));
}

/// URSQRTE.
fn unsigned_rsqrt_estimate(regs: &mut Regs, insn: u32) {
    map1::<Single>(regs, insn, |_, a| u64::from(soft::unsigned_rsqrt_estimate(a as u32)));
}

/// SCVTF and UCVTF (vector, fixed-point).
fn from_fixed<F: Host>(regs: &mut Regs, insn: u32) {
    map1::<F>(regs, insn, |env, value| fixed_to_float::<F>(env, insn, value));
}

/// SCVTF and UCVTF (scalar of the Advanced SIMD encodings, fixed-point).
fn scalar_from_fixed<F: Host>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = fixed_to_float::<F>(&mut env, insn, scalar::<F>(regs, rn(insn)));
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// FCVTZS and FCVTZU (vector, fixed-point).
fn to_fixed<F: Host>(regs: &mut Regs, insn: u32) {
    map1::<F>(regs, insn, |env, value| float_to_fixed::<F>(env, insn, value));
}

/// FCVTZS and FCVTZU (scalar of the Advanced SIMD encodings, fixed-point).
fn scalar_to_fixed<F: Host>(regs: &mut Regs, insn: u32) {
    let mut env = Env::load(regs);
    let value = float_to_fixed::<F>(&mut env, insn, scalar::<F>(regs, rn(insn)));
    env.store(regs);
    set_scalar(regs, insn, value);
}

fn fixed_to_float<F: Host>(env: &mut Env, insn: u32, value: u64) -> u64 {
    let rounding = env.rounding();
    let unsigned = u(insn) != 0;
    let value = if unsigned { value } else { sign_extend::<F>(value) };
    soft::from_fixed::<F>(env, value, unsigned, fraction_bits::<F>(insn), rounding)
}

fn float_to_fixed<F: Host>(env: &mut Env, insn: u32, value: u64) -> u64 {
    let fbits = fraction_bits::<F>(insn);
    soft::to_fixed::<F>(env, value, F::BITS, u(insn) != 0, fbits, Rounding::Zero)
}

/// From immh:immb.
fn fraction_bits<F: Host>(insn: u32) -> u32 {
    2 * F::BITS - (insn >> 16 & 0x7f)
}

fn scalar_with<F: Host, O: Binary>(regs: &mut Regs, insn: u32, m: u64) {
    let mut env = Env::load(regs);
    let value = O::apply::<F>(&mut env, scalar::<F>(regs, rn(insn)), m);
    env.store(regs);
    set_scalar(regs, insn, value);
}

/// Applies `op` to the lanes of Rn.
#[inline(always)]
fn map1<F: Host>(regs: &mut Regs, insn: u32, op: impl Fn(&mut Env, u64) -> u64) {
    map3::<F>(regs, insn, 0, |env, _, n, _| op(env, n));
}

/// Applies `op` to the lanes of Rn and `m`.
#[inline(always)]
fn map2<F: Host>(regs: &mut Regs, insn: u32, m: u128, op: impl Fn(&mut Env, u64, u64) -> u64) {
    map3::<F>(regs, insn, m, |env, _, n, m| op(env, n, m));
}

/// Applies `op` to the lanes of Rd, Rn and `m`.
#[inline(always)]
fn map3<F: Host>(regs: &mut Regs, insn: u32, m: u128, op: impl Fn(&mut Env, u64, u64, u64) -> u64) {
    let mut env = Env::load(regs);
    let (d, n) = (regs.v[rd(insn)], regs.v[rn(insn)]);
    // By halves, so that the lanes of each are unrolled.
    let mut half = |d: u64, n: u64, m: u64| -> u64 {
        let mut out = 0;
        let mut shift = 0;
        while shift < 64 {
            let lane = |x: u64| x >> shift & F::MASK;
            out |= op(&mut env, lane(d), lane(n), lane(m)) << shift;
            shift += F::BITS;
        }
        out
    };
    let mut out = u128::from(half(d as u64, n as u64, m as u64));
    if q(insn) != 0 {
        out |= u128::from(half((d >> 64) as u64, (n >> 64) as u64, (m >> 64) as u64)) << 64;
    }
    env.store(regs);
    regs.v[rd(insn)] = out;
}

/// The element of Rm that index and size name: H:L of V0 to V31 for singles, H for doubles.
fn element<F: Host>(regs: &Regs, insn: u32) -> u64 {
    let high = insn >> 11 & 1;
    let index = if F::BITS == 64 { high } else { high << 1 | insn >> 21 & 1 };
    (regs.v[rm(insn)] >> (index * F::BITS)) as u64 & F::MASK
}

fn replicate<F: Host>(element: u64) -> u128 {
    let half = if F::BITS == 64 { element } else { element << 32 | element };
    u128::from(half) << 64 | u128::from(half)
}

fn q(insn: u32) -> u32 {
    insn >> 30 & 1
}

fn u(insn: u32) -> u32 {
    insn >> 29 & 1
}

/// The upper bit of size, part of the opcode.
fn a(insn: u32) -> u32 {
    insn >> 23 & 1
}

/// The lower bit of size.
fn is_double(insn: u32) -> bool {
    insn >> 22 & 1 != 0
}

/// The precision of a vector's lanes; one double alone is reserved.
fn lanes_precision(insn: u32) -> Option<bool> {
    match (is_double(insn), q(insn)) {
        (true, 0) => None,
        (double, _) => Some(double),
    }
}
