//! Three registers of the same type: `0QU01110 size 1 Rm opcode 1 Rn Rd` and its scalar forms.

use super::lanes::{
    Lane, Q, binary, note, put, rd, rm, rn, sabd, saturate_signed, saturate_unsigned,
    saturating_binary, sizes, sqdmulh, ternary, uabd, width,
};
use crate::regs::Regs;
use crate::simd::DataFn;

pub(super) fn decode(insn: u32, scalar: bool) -> Option<DataFn> {
    let u = insn >> 29 & 1 != 0;
    let size = insn >> 22 & 3;
    let opcode = insn >> 11 & 31;
    if opcode == 0b00011 && !scalar {
        return Some(match (u, size) {
            (false, 0) => and as DataFn,
            (false, 1) => bic,
            (false, 2) => orr,
            (false, _) => orn,
            (true, 0) => eor,
            (true, 1) => bsl,
            (true, 2) => bit,
            (true, _) => bif,
        });
    }
    if scalar {
        // The scalar forms: any size where they saturate, else D.
        let any = matches!(opcode, 0b00001 | 0b00101 | 0b01001 | 0b01011 | 0b10110);
        let d = matches!(opcode, 0b00110..=0b01000 | 0b01010 | 0b10000 | 0b10001);
        if !(any || d && size == 3) {
            return None;
        }
    } else if size == 3 && insn >> 30 & 1 == 0 {
        return None;
    }
    match (opcode, u) {
        (0b00000, false) => sizes!(bhs, size, shadd),
        (0b00000, true) => sizes!(bhs, size, uhadd),
        (0b00001, false) => sizes!(bhsd, size, sqadd),
        (0b00001, true) => sizes!(bhsd, size, uqadd),
        (0b00010, false) => sizes!(bhs, size, srhadd),
        (0b00010, true) => sizes!(bhs, size, urhadd),
        (0b00100, false) => sizes!(bhs, size, shsub),
        (0b00100, true) => sizes!(bhs, size, uhsub),
        (0b00101, false) => sizes!(bhsd, size, sqsub),
        (0b00101, true) => sizes!(bhsd, size, uqsub),
        (0b00110, false) => sizes!(bhsd, size, cmgt),
        (0b00110, true) => sizes!(bhsd, size, cmhi),
        (0b00111, false) => sizes!(bhsd, size, cmge),
        (0b00111, true) => sizes!(bhsd, size, cmhs),
        (0b01000, false) => sizes!(bhsd, size, sshl),
        (0b01000, true) => sizes!(bhsd, size, ushl),
        (0b01001, false) => sizes!(bhsd, size, sqshl),
        (0b01001, true) => sizes!(bhsd, size, uqshl),
        (0b01010, false) => sizes!(bhsd, size, srshl),
        (0b01010, true) => sizes!(bhsd, size, urshl),
        (0b01011, false) => sizes!(bhsd, size, sqrshl),
        (0b01011, true) => sizes!(bhsd, size, uqrshl),
        (0b01100, false) => sizes!(bhs, size, smax),
        (0b01100, true) => sizes!(bhs, size, umax),
        (0b01101, false) => sizes!(bhs, size, smin),
        (0b01101, true) => sizes!(bhs, size, umin),
        (0b01110, false) => sizes!(bhs, size, sabd_vector),
        (0b01110, true) => sizes!(bhs, size, uabd_vector),
        (0b01111, false) => sizes!(bhs, size, saba),
        (0b01111, true) => sizes!(bhs, size, uaba),
        (0b10000, false) => sizes!(bhsd, size, add),
        (0b10000, true) => sizes!(bhsd, size, sub),
        (0b10001, false) => sizes!(bhsd, size, cmtst),
        (0b10001, true) => sizes!(bhsd, size, cmeq),
        (0b10010, false) => sizes!(bhs, size, mla),
        (0b10010, true) => sizes!(bhs, size, mls),
        (0b10011, false) => sizes!(bhs, size, mul),
        (0b10011, true) => sizes!(b, size, pmul),
        (0b10100, false) => sizes!(bhs, size, smaxp),
        (0b10100, true) => sizes!(bhs, size, umaxp),
        (0b10101, false) => sizes!(bhs, size, sminp),
        (0b10101, true) => sizes!(bhs, size, uminp),
        (0b10110, false) => sizes!(hs, size, sqdmulh_vector),
        (0b10110, true) => sizes!(hs, size, sqrdmulh_vector),
        (0b10111, false) => sizes!(bhsd, size, addp),
        _ => None,
    }
}

#[inline(always)]
fn bitwise(regs: &mut Regs, insn: u32, f: impl FnOnce(u128, u128, u128) -> u128) {
    let d = regs.v[rd(insn)];
    regs.v[rd(insn)] = f(regs.v[rn(insn)], regs.v[rm(insn)], d) & width(insn);
}

fn and(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, _| n & m);
}

fn bic(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, _| n & !m);
}

fn orr(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, _| n | m);
}

fn orn(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, _| n | !m);
}

fn eor(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, _| n ^ m);
}

fn bsl(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, d| m ^ (m ^ n) & d);
}

fn bit(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, d| d ^ (d ^ n) & m);
}

fn bif(regs: &mut Regs, insn: u32) {
    bitwise(regs, insn, |n, m, d| d ^ (d ^ n) & !m);
}

fn add<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| a.add(b));
}

fn sub<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| a.sub(b));
}

fn mul<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| a.mul(b));
}

fn mla<T: Lane>(regs: &mut Regs, insn: u32) {
    ternary(regs, insn, |a: T, b, d| d.add(a.mul(b)));
}

fn mls<T: Lane>(regs: &mut Regs, insn: u32) {
    ternary(regs, insn, |a: T, b, d| d.sub(a.mul(b)));
}

fn pmul(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: u8, b| {
        (0..8).fold(0, |sum, bit| sum ^ if b >> bit & 1 != 0 { a << bit } else { 0 })
    });
}

fn cmgt<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::all_or_none(a.signed() > b.signed()));
}

fn cmge<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::all_or_none(a.signed() >= b.signed()));
}

fn cmhi<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::all_or_none(a > b));
}

fn cmhs<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::all_or_none(a >= b));
}

fn cmeq<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::all_or_none(a == b));
}

fn cmtst<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::all_or_none(a.u64() & b.u64() != 0));
}

fn smax<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| signed_max(a, b));
}

fn umax<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| a.max(b));
}

fn smin<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| signed_min(a, b));
}

fn umin<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| a.min(b));
}

fn sabd_vector<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, sabd::<T>);
}

fn uabd_vector<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, uabd::<T>);
}

fn saba<T: Lane>(regs: &mut Regs, insn: u32) {
    ternary(regs, insn, |a: T, b, d| d.add(sabd(a, b)));
}

fn uaba<T: Lane>(regs: &mut Regs, insn: u32) {
    ternary(regs, insn, |a: T, b, d| d.add(uabd(a, b)));
}

// Halving: 8 to 32 bits, so 64 bits hold every sum.

fn shadd<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64(((a.i64() + b.i64()) >> 1) as u64));
}

fn uhadd<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64((a.u64() + b.u64()) >> 1));
}

fn srhadd<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64(((a.i64() + b.i64() + 1) >> 1) as u64));
}

fn urhadd<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64((a.u64() + b.u64() + 1) >> 1));
}

fn shsub<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64(((a.i64() - b.i64()) >> 1) as u64));
}

fn uhsub<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64(a.u64().wrapping_sub(b.u64()) >> 1));
}

fn sqadd<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| note(a.sqadd(b), qc));
}

fn uqadd<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| note(a.uqadd(b), qc));
}

fn sqsub<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| note(a.sqsub(b), qc));
}

fn uqsub<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| note(a.uqsub(b), qc));
}

fn sqdmulh_vector<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| sqdmulh(a, b, false, qc));
}

fn sqrdmulh_vector<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| sqdmulh(a, b, true, qc));
}

fn sshl<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| match distance(b) {
        n if n >= T::BITS as i32 => T::default(),
        n if n >= 0 => a.shl(n as u32),
        n => a.sshr(n.unsigned_abs().min(T::BITS - 1)),
    });
}

fn ushl<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| match distance(b) {
        n if n.unsigned_abs() >= T::BITS => T::default(),
        n if n >= 0 => a.shl(n as u32),
        n => a.ushr(n.unsigned_abs()),
    });
}

fn srshl<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64(shift(a.i64().into(), b, true) as u64));
}

fn urshl<T: Lane>(regs: &mut Regs, insn: u32) {
    binary(regs, insn, |a: T, b| T::from_u64(shift(a.u64().into(), b, true) as u64));
}

fn sqshl<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| {
        saturate_signed(shift(a.i64().into(), b, false), qc)
    });
}

fn uqshl<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| {
        saturate_unsigned(shift(a.u64().into(), b, false), qc)
    });
}

fn sqrshl<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| {
        saturate_signed(shift(a.i64().into(), b, true), qc)
    });
}

fn uqrshl<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_binary(regs, insn, |a: T, b, qc| {
        saturate_unsigned(shift(a.u64().into(), b, true), qc)
    });
}

fn addp<T: Lane>(regs: &mut Regs, insn: u32) {
    pairwise(regs, insn, |a: T, b| a.add(b));
}

fn smaxp<T: Lane>(regs: &mut Regs, insn: u32) {
    pairwise(regs, insn, |a: T, b| signed_max(a, b));
}

fn umaxp<T: Lane>(regs: &mut Regs, insn: u32) {
    pairwise(regs, insn, |a: T, b| a.max(b));
}

fn sminp<T: Lane>(regs: &mut Regs, insn: u32) {
    pairwise(regs, insn, |a: T, b| signed_min(a, b));
}

fn uminp<T: Lane>(regs: &mut Regs, insn: u32) {
    pairwise(regs, insn, |a: T, b| a.min(b));
}

/// Neighbouring lanes of the concatenation of both operands.
#[inline(always)]
fn pairwise<T: Lane>(regs: &mut Regs, insn: u32, f: impl Fn(T, T) -> T) {
    let lanes = if insn & Q != 0 {
        pairs(&regs.v[rn(insn)], &regs.v[rm(insn)], f)
    } else {
        // Both operands lie in one register; the upper half of the result falls off.
        let both = regs.v[rn(insn)] & u128::from(u64::MAX) | regs.v[rm(insn)] << 64;
        pairs(&both, &0, f)
    };
    put::<T>(regs, insn, lanes);
}

#[inline(always)]
fn pairs<T: Lane>(n: &u128, m: &u128, f: impl Fn(T, T) -> T) -> T::Lanes {
    let (n, m) = (T::split(n), T::split(m));
    let mut out = T::split(&0);
    let half = T::COUNT / 2;
    for (i, out) in out.as_mut().iter_mut().enumerate() {
        let from = if i < half { n.as_ref() } else { m.as_ref() };
        let at = 2 * (i % half);
        *out = f(from[at], from[at + 1]);
    }
    out
}

pub(super) fn signed_max<T: Lane>(a: T, b: T) -> T {
    if a.signed() > b.signed() { a } else { b }
}

pub(super) fn signed_min<T: Lane>(a: T, b: T) -> T {
    if a.signed() < b.signed() { a } else { b }
}

/// The shift distance: the signed low byte of the lane, left where positive.
#[inline(always)]
fn distance<T: Lane>(lane: T) -> i32 {
    (lane.u64() as i8).into()
}

/// `value` of up to 64 bits shifted by the distance in `by`, so that neither truncating nor
/// saturating the result to a lane can go wrong: a distance beyond the lane is capped.
#[inline(always)]
fn shift<T: Lane>(value: i128, by: T, round: bool) -> i128 {
    let distance = distance(by);
    if distance >= T::BITS as i32 {
        // All bits fall off: zero after truncation, beyond every limit before it.
        return match T::BITS {
            64 => value.signum() << 100,
            bits => value << bits,
        };
    }
    if distance >= 0 {
        return value << distance;
    }
    // Beyond 65 bits only the sign is left, and rounding makes it zero.
    let n = distance.unsigned_abs().min(100);
    if round { (value + (1 << (n - 1))) >> n } else { value >> n }
}
