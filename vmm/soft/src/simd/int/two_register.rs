//! Two registers: `0QU01110 size 10000 opcode 10 Rn Rd`, across lanes (`11000`), and the scalar
//! forms.

use super::lanes::{
    Lane, Narrow, Q, accumulate, rd, rn, saturate_signed, saturate_unsigned, saturating,
    saturating_accumulate, saturating_unary, sizes, unary, width,
};
use super::shift_immediate::narrow;
use super::three_different::{long_with, unsigned};
use super::three_same::{signed_max, signed_min};
use crate::regs::Regs;
use crate::simd::DataFn;

pub(super) fn decode_misc(insn: u32, scalar: bool) -> Option<DataFn> {
    let u = insn >> 29 & 1 != 0;
    let size = insn >> 22 & 3;
    let opcode = insn >> 12 & 31;
    if scalar {
        let any = matches!(opcode, 0b00011 | 0b00111 | 0b10100) || opcode == 0b10010 && u;
        let d = matches!(opcode, 0b01000..=0b01011);
        if !(any || d && size == 3) {
            return None;
        }
    } else if size == 3 && insn >> 30 & 1 == 0 {
        return None;
    }
    match (opcode, u) {
        (0b00000, false) => {
            [Some(rev64_8 as DataFn), Some(rev64_16), Some(rev64_32), None][size as usize]
        }
        (0b00000, true) => [Some(rev32_8 as DataFn), Some(rev32_16), None, None][size as usize],
        (0b00001, false) => sizes!(b, size, rev16),
        (0b00010, false) => sizes!(bhs, size, saddlp),
        (0b00010, true) => sizes!(bhs, size, uaddlp),
        (0b00011, false) => sizes!(bhsd, size, suqadd),
        (0b00011, true) => sizes!(bhsd, size, usqadd),
        (0b00100, false) => sizes!(bhs, size, cls),
        (0b00100, true) => sizes!(bhs, size, clz),
        (0b00101, false) => sizes!(b, size, cnt),
        (0b00101, true) => [Some(not as DataFn), Some(rbit), None, None][size as usize],
        (0b00110, false) => sizes!(bhs, size, sadalp),
        (0b00110, true) => sizes!(bhs, size, uadalp),
        (0b00111, false) => sizes!(bhsd, size, sqabs),
        (0b00111, true) => sizes!(bhsd, size, sqneg),
        (0b01000, false) => sizes!(bhsd, size, cmgt_zero),
        (0b01000, true) => sizes!(bhsd, size, cmge_zero),
        (0b01001, false) => sizes!(bhsd, size, cmeq_zero),
        (0b01001, true) => sizes!(bhsd, size, cmle_zero),
        (0b01010, false) => sizes!(bhsd, size, cmlt_zero),
        (0b01011, false) => sizes!(bhsd, size, abs),
        (0b01011, true) => sizes!(bhsd, size, neg),
        (0b10010, false) => sizes!(bhs, size, xtn),
        (0b10010, true) => sizes!(bhs, size, sqxtun),
        (0b10011, true) => sizes!(bhs, size, shll),
        (0b10100, false) => sizes!(bhs, size, sqxtn),
        (0b10100, true) => sizes!(bhs, size, uqxtn),
        _ => None,
    }
}

/// Across lanes; in the scalar space the pairwise ADDP of two doublewords.
pub(super) fn decode_across(insn: u32, scalar: bool) -> Option<DataFn> {
    let u = insn >> 29 & 1 != 0;
    let size = insn >> 22 & 3;
    let opcode = insn >> 12 & 31;
    if scalar {
        return if opcode == 0b11011 && !u && size == 3 { Some(addp_scalar) } else { None };
    }
    if size == 2 && insn >> 30 & 1 == 0 {
        return None;
    }
    match (opcode, u) {
        (0b00011, false) => sizes!(bhs, size, saddlv),
        (0b00011, true) => sizes!(bhs, size, uaddlv),
        (0b01010, false) => sizes!(bhs, size, smaxv),
        (0b01010, true) => sizes!(bhs, size, umaxv),
        (0b11010, false) => sizes!(bhs, size, sminv),
        (0b11010, true) => sizes!(bhs, size, uminv),
        (0b11011, false) => sizes!(bhs, size, addv),
        _ => None,
    }
}

fn rev64_8(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u64| a.swap_bytes());
}

fn rev64_16(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u64| {
        let a = a.rotate_left(32);
        a << 16 & 0xFFFF_0000_FFFF_0000 | a >> 16 & 0x0000_FFFF_0000_FFFF
    });
}

fn rev64_32(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u64| a.rotate_left(32));
}

fn rev32_8(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u32| a.swap_bytes());
}

fn rev32_16(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u32| a.rotate_left(16));
}

fn rev16(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u16| a.swap_bytes());
}

fn cnt(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u8| a.count_ones() as u8);
}

fn not(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = !regs.v[rn(insn)] & width(insn);
}

fn rbit(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: u8| a.reverse_bits());
}

fn cls<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| {
        let changes = T::from_u64(a.u64() ^ a.sshr(1).u64());
        T::from_u64(u64::from(changes.leading_zeros() - 1))
    });
}

fn clz<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::from_u64(a.leading_zeros().into()));
}

fn cmgt_zero<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::all_or_none(a.signed() > T::Signed::default()));
}

fn cmge_zero<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::all_or_none(a.signed() >= T::Signed::default()));
}

fn cmeq_zero<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::all_or_none(a == T::default()));
}

fn cmle_zero<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::all_or_none(a.signed() <= T::Signed::default()));
}

fn cmlt_zero<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::all_or_none(a.signed() < T::Signed::default()));
}

fn abs<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(
        regs,
        insn,
        |a: T| {
            if a.signed() < T::Signed::default() { T::default().sub(a) } else { a }
        },
    );
}

fn neg<T: Lane>(regs: &mut Regs, insn: u32) {
    unary(regs, insn, |a: T| T::default().sub(a));
}

fn sqabs<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_unary(regs, insn, |a: T, qc| saturate_signed(i128::from(a.i64()).abs(), qc));
}

fn sqneg<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_unary(regs, insn, |a: T, qc| saturate_signed(-i128::from(a.i64()), qc));
}

fn suqadd<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_accumulate(regs, insn, |a: T, d, qc| {
        saturate_signed(i128::from(d.i64()) + i128::from(a.u64()), qc)
    });
}

fn usqadd<T: Lane>(regs: &mut Regs, insn: u32) {
    saturating_accumulate(regs, insn, |a: T, d, qc| {
        saturate_unsigned(i128::from(d.u64()) + i128::from(a.i64()), qc)
    });
}

fn xtn<T: Narrow>(regs: &mut Regs, insn: u32) {
    narrow(regs, insn, |a: T::Wide| T::from_u64(a.u64()));
}

fn sqxtn<T: Narrow>(regs: &mut Regs, insn: u32) {
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_signed(a.i64().into(), qc));
    });
}

fn uqxtn<T: Narrow>(regs: &mut Regs, insn: u32) {
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_unsigned(a.u64().into(), qc));
    });
}

fn sqxtun<T: Narrow>(regs: &mut Regs, insn: u32) {
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_unsigned(a.i64().into(), qc));
    });
}

fn shll<T: Narrow>(regs: &mut Regs, insn: u32) {
    long_with(regs, insn, rn(insn), |a: T, _, _| unsigned(a).shl(T::BITS));
}

/// Both narrow lanes of every wide lane of Rn, with the wide lane of Rd.
#[inline(always)]
fn pairs<T: Narrow>(regs: &mut Regs, insn: u32, mut f: impl FnMut(T, T, T::Wide) -> T::Wide) {
    accumulate(regs, insn, |n: T::Wide, d| {
        f(T::from_u64(n.u64()), T::from_u64(n.ushr(T::BITS).u64()), d)
    });
}

fn signed_sum<T: Narrow>(a: T, b: T) -> T::Wide {
    T::Wide::from_u64((a.i64() + b.i64()) as u64)
}

fn unsigned_sum<T: Narrow>(a: T, b: T) -> T::Wide {
    T::Wide::from_u64(a.u64() + b.u64())
}

fn saddlp<T: Narrow>(regs: &mut Regs, insn: u32) {
    pairs(regs, insn, |a: T, b, _| signed_sum(a, b));
}

fn uaddlp<T: Narrow>(regs: &mut Regs, insn: u32) {
    pairs(regs, insn, |a: T, b, _| unsigned_sum(a, b));
}

fn sadalp<T: Narrow>(regs: &mut Regs, insn: u32) {
    pairs(regs, insn, |a: T, b, d| d.add(signed_sum(a, b)));
}

fn uadalp<T: Narrow>(regs: &mut Regs, insn: u32) {
    pairs(regs, insn, |a: T, b, d| d.add(unsigned_sum(a, b)));
}

fn addp_scalar(regs: &mut Regs, insn: u32) {
    let [a, b] = u64::split(&regs.v[rn(insn)]);
    regs.v[rd(insn)] = a.wrapping_add(b).into();
}

/// All lanes of Rn in one.
#[inline(always)]
fn across<T: Lane, A>(regs: &Regs, insn: u32, first: impl Fn(T) -> A, f: impl Fn(A, T) -> A) -> A {
    let lanes = T::split(&regs.v[rn(insn)]);
    // The count is known in each branch, so that both loops unroll.
    if insn & Q != 0 {
        let lanes = &lanes.as_ref()[..T::COUNT];
        lanes[1..].iter().fold(first(lanes[0]), |sum, lane| f(sum, *lane))
    } else {
        let lanes = &lanes.as_ref()[..T::COUNT / 2];
        lanes[1..].iter().fold(first(lanes[0]), |sum, lane| f(sum, *lane))
    }
}

fn addv<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = across(regs, insn, |a: T| a, |a, b| a.add(b)).u64().into();
}

fn smaxv<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = across(regs, insn, |a: T| a, signed_max).u64().into();
}

fn umaxv<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = across(regs, insn, |a: T| a, |a, b| a.max(b)).u64().into();
}

fn sminv<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = across(regs, insn, |a: T| a, signed_min).u64().into();
}

fn uminv<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = across(regs, insn, |a: T| a, |a, b| a.min(b)).u64().into();
}

fn saddlv<T: Narrow>(regs: &mut Regs, insn: u32) {
    let sum = across(regs, insn, |a: T| a.i64(), |sum, b| sum + b.i64());
    regs.v[rd(insn)] = T::Wide::from_u64(sum as u64).u64().into();
}

fn uaddlv<T: Narrow>(regs: &mut Regs, insn: u32) {
    let sum = across(regs, insn, |a: T| a.u64(), |sum, b| sum + b.u64());
    regs.v[rd(insn)] = sum.into();
}
