//! A vector and one element: `0QU01111 size L M Rm opcode H 0 Rn Rd` and its scalar forms.

use super::lanes::{
    Lane, Narrow, accumulate, note, rn, saturating, saturating_unary, sizes, sqdmulh, sqdmull,
};
use super::three_different::{long_with, signed, unsigned};
use crate::regs::Regs;
use crate::simd::DataFn;

pub(super) fn decode(insn: u32, scalar: bool) -> Option<DataFn> {
    let u = insn >> 29 & 1 != 0;
    let size = insn >> 22 & 3;
    let opcode = insn >> 12 & 15;
    if scalar && !matches!(opcode, 0b0011 | 0b0111 | 0b1011..=0b1101) {
        return None;
    }
    match (opcode, u) {
        (0b0000, true) => sizes!(hs, size, mla),
        (0b0010, false) => sizes!(hs, size, smlal),
        (0b0010, true) => sizes!(hs, size, umlal),
        (0b0011, false) => sizes!(hs, size, sqdmlal),
        (0b0100, true) => sizes!(hs, size, mls),
        (0b0110, false) => sizes!(hs, size, smlsl),
        (0b0110, true) => sizes!(hs, size, umlsl),
        (0b0111, false) => sizes!(hs, size, sqdmlsl),
        (0b1000, false) => sizes!(hs, size, mul),
        (0b1010, false) => sizes!(hs, size, smull),
        (0b1010, true) => sizes!(hs, size, umull),
        (0b1011, false) => sizes!(hs, size, sqdmull_element),
        (0b1100, false) => sizes!(hs, size, sqdmulh_element),
        (0b1101, false) => sizes!(hs, size, sqrdmulh_element),
        _ => None,
    }
}

/// The element: index H:L:M of one of 16 registers for 16 bits, H:L of one of 32 for 32 bits.
#[inline(always)]
fn element<T: Lane>(regs: &Regs, insn: u32) -> T {
    let (h, l, m) = (insn >> 11 & 1, insn >> 21 & 1, insn >> 20 & 1);
    let register = insn >> 16 & 15;
    if T::BITS == 16 {
        T::get(regs.v[register as usize], h << 2 | l << 1 | m)
    } else {
        T::get(regs.v[(m << 4 | register) as usize], h << 1 | l)
    }
}

#[inline(always)]
fn same<T: Lane>(regs: &mut Regs, insn: u32, mut f: impl FnMut(T, T, T) -> T) {
    let element = element::<T>(regs, insn);
    accumulate(regs, insn, |n, d| f(n, element, d));
}

#[inline(always)]
fn long<T: Narrow>(regs: &mut Regs, insn: u32, mut f: impl FnMut(T, T, T::Wide) -> T::Wide) {
    let element = element::<T>(regs, insn);
    long_with(regs, insn, rn(insn), |n, _, d| f(n, element, d));
}

fn mul<T: Lane>(regs: &mut Regs, insn: u32) {
    same(regs, insn, |a: T, b, _| a.mul(b));
}

fn mla<T: Lane>(regs: &mut Regs, insn: u32) {
    same(regs, insn, |a: T, b, d| d.add(a.mul(b)));
}

fn mls<T: Lane>(regs: &mut Regs, insn: u32) {
    same(regs, insn, |a: T, b, d| d.sub(a.mul(b)));
}

fn sqdmulh_element<T: Lane>(regs: &mut Regs, insn: u32) {
    let element = element::<T>(regs, insn);
    saturating_unary(regs, insn, |a, qc| sqdmulh(a, element, false, qc));
}

fn sqrdmulh_element<T: Lane>(regs: &mut Regs, insn: u32) {
    // The rounding constant alone does not reach the high half, so idle lanes stay zero.
    let element = element::<T>(regs, insn);
    saturating_unary(regs, insn, |a, qc| sqdmulh(a, element, true, qc));
}

fn smull<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| signed(a).mul(signed(b)));
}

fn umull<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| unsigned(a).mul(unsigned(b)));
}

fn smlal<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, d| d.add(signed(a).mul(signed(b))));
}

fn umlal<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, d| d.add(unsigned(a).mul(unsigned(b))));
}

fn smlsl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, d| d.sub(signed(a).mul(signed(b))));
}

fn umlsl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, d| d.sub(unsigned(a).mul(unsigned(b))));
}

fn sqdmull_element<T: Narrow>(regs: &mut Regs, insn: u32) {
    saturating(regs, |regs, qc| long(regs, insn, |a: T, b, _| sqdmull(a, b, qc)));
}

fn sqdmlal<T: Narrow>(regs: &mut Regs, insn: u32) {
    saturating(regs, |regs, qc| {
        long(regs, insn, |a: T, b, d| note(d.sqadd(sqdmull(a, b, qc)), qc));
    });
}

fn sqdmlsl<T: Narrow>(regs: &mut Regs, insn: u32) {
    saturating(regs, |regs, qc| {
        long(regs, insn, |a: T, b, d| note(d.sqsub(sqdmull(a, b, qc)), qc));
    });
}
