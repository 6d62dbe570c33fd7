//! Shifts by an immediate: `0QU011110 immh immb opcode 1 Rn Rd` and the scalar forms. The
//! conversions from and to fixed point in this class belong to the floating-point side.

use super::lanes::{
    Lane, Narrow, accumulate, active, is_scalar, rn, saturate_signed, saturate_unsigned,
    saturating, saturating_unary, set_part, sizes, unary,
};
use super::three_different::{long_with, signed, unsigned};
use crate::regs::Regs;
use crate::simd::DataFn;

pub(super) fn decode(insn: u32, scalar: bool) -> Option<DataFn> {
    let u = insn >> 29 & 1 != 0;
    let immh = insn >> 19 & 15;
    let opcode = insn >> 11 & 31;
    // The caller has excluded zero, which is the modified immediate.
    let size = immh.checked_ilog2()?;
    if opcode >= 0b10000 {
        return match (opcode, u) {
            (0b10000, false) if !scalar => sizes!(bhs, size, shrn),
            (0b10000, true) => sizes!(bhs, size, sqshrun),
            (0b10001, false) if !scalar => sizes!(bhs, size, rshrn),
            (0b10001, true) => sizes!(bhs, size, sqrshrun),
            (0b10010, false) => sizes!(bhs, size, sqshrn),
            (0b10010, true) => sizes!(bhs, size, uqshrn),
            (0b10011, false) => sizes!(bhs, size, sqrshrn),
            (0b10011, true) => sizes!(bhs, size, uqrshrn),
            (0b10100, false) if !scalar => sizes!(bhs, size, sshll),
            (0b10100, true) if !scalar => sizes!(bhs, size, ushll),
            _ => None,
        };
    }
    let saturates = matches!(opcode, 0b01100 | 0b01110);
    if scalar && !saturates && size != 3 || !scalar && size == 3 && insn >> 30 & 1 == 0 {
        return None;
    }
    match (opcode, u) {
        (0b00000, false) => sizes!(bhsd, size, sshr),
        (0b00000, true) => sizes!(bhsd, size, ushr),
        (0b00010, false) => sizes!(bhsd, size, ssra),
        (0b00010, true) => sizes!(bhsd, size, usra),
        (0b00100, false) => sizes!(bhsd, size, srshr),
        (0b00100, true) => sizes!(bhsd, size, urshr),
        (0b00110, false) => sizes!(bhsd, size, srsra),
        (0b00110, true) => sizes!(bhsd, size, ursra),
        (0b01000, true) => sizes!(bhsd, size, sri),
        (0b01010, false) => sizes!(bhsd, size, shl),
        (0b01010, true) => sizes!(bhsd, size, sli),
        (0b01100, true) => sizes!(bhsd, size, sqshlu),
        (0b01110, false) => sizes!(bhsd, size, sqshl),
        (0b01110, true) => sizes!(bhsd, size, uqshl),
        _ => None,
    }
}

/// immh:immb.
#[inline(always)]
fn immediate(insn: u32) -> u32 {
    insn >> 16 & 0x7F
}

/// The distance of a right shift, 1 to the size of the lane.
#[inline(always)]
fn right<T: Lane>(insn: u32) -> u32 {
    (2 * T::BITS).wrapping_sub(immediate(insn))
}

/// The distance of a left shift, 0 to the size of the lane less one.
#[inline(always)]
fn left<T: Lane>(insn: u32) -> u32 {
    immediate(insn).wrapping_sub(T::BITS)
}

#[inline(always)]
fn ushr_lane<T: Lane>(a: T, n: u32) -> T {
    if n >= T::BITS { T::default() } else { a.ushr(n) }
}

#[inline(always)]
fn sshr_lane<T: Lane>(a: T, n: u32) -> T {
    a.sshr(n.min(T::BITS - 1))
}

/// The last bit that a right shift by `n` drops: what rounding adds.
#[inline(always)]
fn rounding<T: Lane>(a: T, n: u32) -> T {
    T::from_u64(a.ushr(n - 1).u64() & 1)
}

fn sshr<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    unary(regs, insn, |a: T| sshr_lane(a, n));
}

fn ushr<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    unary(regs, insn, |a: T| ushr_lane(a, n));
}

fn ssra<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    accumulate(regs, insn, |a: T, d| d.add(sshr_lane(a, n)));
}

fn usra<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    accumulate(regs, insn, |a: T, d| d.add(ushr_lane(a, n)));
}

fn srshr<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    unary(regs, insn, |a: T| sshr_lane(a, n).add(rounding(a, n)));
}

fn urshr<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    unary(regs, insn, |a: T| ushr_lane(a, n).add(rounding(a, n)));
}

fn srsra<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    accumulate(regs, insn, |a: T, d| d.add(sshr_lane(a, n)).add(rounding(a, n)));
}

fn ursra<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    accumulate(regs, insn, |a: T, d| d.add(ushr_lane(a, n)).add(rounding(a, n)));
}

fn sri<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    let kept = !ushr_lane(T::ONES, n).u64();
    accumulate(regs, insn, |a: T, d| T::from_u64(d.u64() & kept | ushr_lane(a, n).u64()));
}

fn shl<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    unary(regs, insn, |a: T| a.shl(n));
}

fn sli<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    let kept = !T::ONES.shl(n).u64();
    accumulate(regs, insn, |a: T, d| T::from_u64(d.u64() & kept | a.shl(n).u64()));
}

fn sqshl<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    saturating_unary(regs, insn, |a: T, qc| saturate_signed(i128::from(a.i64()) << n, qc));
}

fn uqshl<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    saturating_unary(regs, insn, |a: T, qc| saturate_unsigned(i128::from(a.u64()) << n, qc));
}

fn sqshlu<T: Lane>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    saturating_unary(regs, insn, |a: T, qc| saturate_unsigned(i128::from(a.i64()) << n, qc));
}

fn sshll<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    long_with(regs, insn, rn(insn), |a: T, _, _| signed(a).shl(n));
}

fn ushll<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = left::<T>(insn);
    long_with(regs, insn, rn(insn), |a: T, _, _| unsigned(a).shl(n));
}

fn shrn<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    narrow(regs, insn, |a: T::Wide| T::from_u64(a.ushr(n).u64()));
}

fn rshrn<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    narrow(regs, insn, |a: T::Wide| T::from_u64(a.ushr(n).add(rounding(a, n)).u64()));
}

fn sqshrn<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_signed((a.i64() >> n).into(), qc));
    });
}

fn sqrshrn<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_signed(rounded(a.i64().into(), n), qc));
    });
}

fn uqshrn<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_unsigned((a.u64() >> n).into(), qc));
    });
}

fn uqrshrn<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_unsigned(rounded(a.u64().into(), n), qc));
    });
}

fn sqshrun<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_unsigned((a.i64() >> n).into(), qc));
    });
}

fn sqrshrun<T: Narrow>(regs: &mut Regs, insn: u32) {
    let n = right::<T>(insn);
    saturating(regs, |regs, qc| {
        narrow::<T>(regs, insn, |a| saturate_unsigned(rounded(a.i64().into(), n), qc));
    });
}

#[inline(always)]
fn rounded(value: i128, n: u32) -> i128 {
    (value + (1 << (n - 1))) >> n
}

/// The wide lanes of Rn; only the lowest in the scalar forms.
#[inline(always)]
pub(super) fn narrow<T: Narrow>(regs: &mut Regs, insn: u32, mut f: impl FnMut(T::Wide) -> T) {
    let a = &regs.v[rn(insn)];
    let narrow = if is_scalar(insn) {
        T::narrow(&(a & active::<T::Wide>(insn)), &0, |a, _| f(a))
    } else {
        T::narrow(a, &0, |a, _| f(a))
    };
    set_part(regs, insn, narrow);
}
