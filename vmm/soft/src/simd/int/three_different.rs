//! Three registers of different types, widening and narrowing:
//! `0QU01110 size 1 Rm opcode 00 Rn Rd` and its scalar forms.

use super::lanes::{
    Lane, Narrow, Q, active, is_scalar, is_upper, note, put, rd, rm, rn, sabd, saturating,
    set_part, sizes, sqdmull, uabd,
};
use crate::regs::Regs;
use crate::simd::DataFn;

pub(super) fn decode(insn: u32, scalar: bool) -> Option<DataFn> {
    let u = insn >> 29 & 1 != 0;
    let size = insn >> 22 & 3;
    let opcode = insn >> 12 & 15;
    if scalar && !matches!(opcode, 0b1001 | 0b1011 | 0b1101) {
        return None;
    }
    match (opcode, u) {
        (0b0000, false) => sizes!(bhs, size, saddl),
        (0b0000, true) => sizes!(bhs, size, uaddl),
        (0b0001, false) => sizes!(bhs, size, saddw),
        (0b0001, true) => sizes!(bhs, size, uaddw),
        (0b0010, false) => sizes!(bhs, size, ssubl),
        (0b0010, true) => sizes!(bhs, size, usubl),
        (0b0011, false) => sizes!(bhs, size, ssubw),
        (0b0011, true) => sizes!(bhs, size, usubw),
        (0b0100, false) => sizes!(bhs, size, addhn),
        (0b0100, true) => sizes!(bhs, size, raddhn),
        (0b0101, false) => sizes!(bhs, size, sabal),
        (0b0101, true) => sizes!(bhs, size, uabal),
        (0b0110, false) => sizes!(bhs, size, subhn),
        (0b0110, true) => sizes!(bhs, size, rsubhn),
        (0b0111, false) => sizes!(bhs, size, sabdl),
        (0b0111, true) => sizes!(bhs, size, uabdl),
        (0b1000, false) => sizes!(bhs, size, smlal),
        (0b1000, true) => sizes!(bhs, size, umlal),
        (0b1001, false) => sizes!(hs, size, sqdmlal),
        (0b1010, false) => sizes!(bhs, size, smlsl),
        (0b1010, true) => sizes!(bhs, size, umlsl),
        (0b1011, false) => sizes!(hs, size, sqdmlsl),
        (0b1100, false) => sizes!(bhs, size, smull),
        (0b1100, true) => sizes!(bhs, size, umull),
        (0b1101, false) => sizes!(hs, size, sqdmull_vector),
        (0b1110, false) => match size {
            0 => Some(pmull_8),
            3 => Some(pmull_64),
            _ => None,
        },
        _ => None,
    }
}

/// Sign-extended.
#[inline(always)]
pub(super) fn signed<T: Narrow>(a: T) -> T::Wide {
    T::Wide::from_u64(a.i64() as u64)
}

/// Zero-extended.
#[inline(always)]
pub(super) fn unsigned<T: Narrow>(a: T) -> T::Wide {
    T::Wide::from_u64(a.u64())
}

#[inline(always)]
fn long<T: Narrow>(regs: &mut Regs, insn: u32, f: impl FnMut(T, T, T::Wide) -> T::Wide) {
    long_with(regs, insn, rm(insn), f);
}

/// The lanes of a half of Rn and of register `m`, with the wide lanes of Rd.
#[inline(always)]
pub(super) fn long_with<T: Narrow>(
    regs: &mut Regs,
    insn: u32,
    m: usize,
    f: impl FnMut(T, T, T::Wide) -> T::Wide,
) {
    let (n, m, d) = (&regs.v[rn(insn)], &regs.v[m], &regs.v[rd(insn)]);
    let lanes = if is_scalar(insn) {
        // Zeros elsewhere, which do not saturate.
        let (narrow, wide) = (active::<T>(insn), active::<T::Wide>(insn));
        T::widen(&(n & narrow), &(m & narrow), &(d & wide), false, f)
    } else {
        T::widen(n, m, d, is_upper(insn), f)
    };
    // The vector forms always write 128 bits.
    put::<T::Wide>(regs, insn | Q, lanes);
}

fn saddl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| signed(a).add(signed(b)));
}

fn uaddl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| unsigned(a).add(unsigned(b)));
}

fn ssubl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| signed(a).sub(signed(b)));
}

fn usubl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| unsigned(a).sub(unsigned(b)));
}

fn sabal<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, d| d.add(unsigned(sabd(a, b))));
}

fn uabal<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, d| d.add(unsigned(uabd(a, b))));
}

fn sabdl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| unsigned(sabd(a, b)));
}

fn uabdl<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| unsigned(uabd(a, b)));
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

fn smull<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| signed(a).mul(signed(b)));
}

fn umull<T: Narrow>(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: T, b, _| unsigned(a).mul(unsigned(b)));
}

fn sqdmull_vector<T: Narrow>(regs: &mut Regs, insn: u32) {
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

#[inline(always)]
fn wide<T: Narrow>(regs: &mut Regs, insn: u32, mut f: impl FnMut(T::Wide, T) -> T::Wide) {
    let (n, m) = (&regs.v[rn(insn)], &regs.v[rm(insn)]);
    let lanes = T::widen(m, m, n, is_upper(insn), |m, _, n| f(n, m));
    put::<T::Wide>(regs, insn | Q, lanes);
}

fn saddw<T: Narrow>(regs: &mut Regs, insn: u32) {
    wide(regs, insn, |a, b: T| a.add(signed(b)));
}

fn uaddw<T: Narrow>(regs: &mut Regs, insn: u32) {
    wide(regs, insn, |a, b: T| a.add(unsigned(b)));
}

fn ssubw<T: Narrow>(regs: &mut Regs, insn: u32) {
    wide(regs, insn, |a, b: T| a.sub(signed(b)));
}

fn usubw<T: Narrow>(regs: &mut Regs, insn: u32) {
    wide(regs, insn, |a, b: T| a.sub(unsigned(b)));
}

#[inline(always)]
fn high_narrow<T: Narrow>(
    regs: &mut Regs,
    insn: u32,
    mut f: impl FnMut(T::Wide, T::Wide) -> T::Wide,
) {
    let narrow = T::narrow(&regs.v[rn(insn)], &regs.v[rm(insn)], |a, b| {
        T::from_u64(f(a, b).ushr(T::BITS).u64())
    });
    set_part(regs, insn, narrow);
}

/// Half of the least bit that is kept.
#[inline(always)]
fn half<T: Narrow>() -> T::Wide {
    T::Wide::from_u64(1 << (T::BITS - 1))
}

fn addhn<T: Narrow>(regs: &mut Regs, insn: u32) {
    high_narrow::<T>(regs, insn, |a, b| a.add(b));
}

fn raddhn<T: Narrow>(regs: &mut Regs, insn: u32) {
    high_narrow::<T>(regs, insn, |a, b| a.add(b).add(half::<T>()));
}

fn subhn<T: Narrow>(regs: &mut Regs, insn: u32) {
    high_narrow::<T>(regs, insn, |a, b| a.sub(b));
}

fn rsubhn<T: Narrow>(regs: &mut Regs, insn: u32) {
    high_narrow::<T>(regs, insn, |a, b| a.sub(b).add(half::<T>()));
}

fn pmull_8(regs: &mut Regs, insn: u32) {
    long(regs, insn, |a: u8, b, _| {
        (0..8).fold(0, |sum, bit| sum ^ if b >> bit & 1 != 0 { u16::from(a) << bit } else { 0 })
    });
}

fn pmull_64(regs: &mut Regs, insn: u32) {
    let half = |v: u128| if is_upper(insn) { (v >> 64) as u64 } else { v as u64 };
    let (a, b) = (half(regs.v[rn(insn)]), half(regs.v[rm(insn)]));
    // Four bits of b at a time.
    let mut multiples = [0u128; 16];
    for i in 1..16 {
        multiples[i] = multiples[i / 2] << 1 ^ if i & 1 != 0 { a.into() } else { 0 };
    }
    let mut product = 0;
    for nibble in (0..16).rev() {
        product = product << 4 ^ multiples[(b >> (4 * nibble) & 15) as usize];
    }
    regs.v[rd(insn)] = product;
}
