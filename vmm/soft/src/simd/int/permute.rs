//! Moving lanes about: copies, EXT, TBL, TBX, ZIP, UZP, TRN.

use super::lanes::{Lane, Q, put, rd, rm, rn, sizes, width};
use crate::regs::Regs;
use crate::simd::DataFn;

/// `0Q op 01110000 imm5 0 imm4 1 Rn Rd`, and the scalar DUP.
pub(super) fn decode_copy(insn: u32, scalar: bool) -> Option<DataFn> {
    let op = insn >> 29 & 1 != 0;
    let q = insn >> 30 & 1 != 0;
    let imm4 = insn >> 11 & 15;
    let size = (insn >> 16 & 31).trailing_zeros();
    if size > 3 {
        return None;
    }
    if scalar {
        return if !op && imm4 == 0 { sizes!(bhsd, size, dup_scalar) } else { None };
    }
    if op {
        return if q { sizes!(bhsd, size, ins_element) } else { None };
    }
    match imm4 {
        0b0000 if q || size < 3 => sizes!(bhsd, size, dup_element),
        0b0001 if q || size < 3 => sizes!(bhsd, size, dup_general),
        0b0011 if q => sizes!(bhsd, size, ins_general),
        0b0101 if size < if q { 3 } else { 2 } => sizes!(bhsd, size, smov),
        0b0111 if q == (size == 3) => sizes!(bhsd, size, umov),
        _ => None,
    }
}

/// EXT, TBL and TBX, ZIP and its kin: bits 21, 15 and 10 are zero.
pub(super) fn decode(insn: u32) -> Option<DataFn> {
    let q = insn >> 30 & 1 != 0;
    let size = insn >> 22 & 3;
    if insn >> 29 & 1 != 0 {
        return match (size, q) {
            (0, true) => Some(ext_128),
            (0, false) if insn >> 14 & 1 == 0 => Some(ext_64),
            _ => None,
        };
    }
    if insn >> 11 & 1 == 0 {
        return if size == 0 { Some(table) } else { None };
    }
    if size == 3 && !q {
        return None;
    }
    match insn >> 12 & 7 {
        0b001 => sizes!(bhsd, size, uzp1),
        0b010 => sizes!(bhsd, size, trn1),
        0b011 => sizes!(bhsd, size, zip1),
        0b101 => sizes!(bhsd, size, uzp2),
        0b110 => sizes!(bhsd, size, trn2),
        0b111 => sizes!(bhsd, size, zip2),
        _ => None,
    }
}

/// The index above the lowest set bit of imm5.
#[inline(always)]
fn index<T: Lane>(insn: u32) -> u32 {
    (insn >> 16 & 31) / (T::BITS / 4)
}

fn dup_scalar<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = T::get(regs.v[rn(insn)], index::<T>(insn)).u64().into();
}

fn dup_element<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = T::get(regs.v[rn(insn)], index::<T>(insn)).splat() & width(insn);
}

fn dup_general<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = T::from_u64(regs.x(insn >> 5)).splat() & width(insn);
}

#[inline(always)]
fn set<T: Lane>(v: &mut u128, index: u32, value: T) {
    let at = (index * T::BITS) & 127;
    *v = *v & !(u128::from(T::ONES.u64()) << at) | u128::from(value.u64()) << at;
}

fn ins_element<T: Lane>(regs: &mut Regs, insn: u32) {
    let value = T::get(regs.v[rn(insn)], (insn >> 11 & 15) / (T::BITS / 8));
    set(&mut regs.v[rd(insn)], index::<T>(insn), value);
}

fn ins_general<T: Lane>(regs: &mut Regs, insn: u32) {
    let value = T::from_u64(regs.x(insn >> 5));
    set(&mut regs.v[rd(insn)], index::<T>(insn), value);
}

fn smov<T: Lane>(regs: &mut Regs, insn: u32) {
    let value = T::get(regs.v[rn(insn)], index::<T>(insn)).i64() as u64;
    regs.set_x(insn, if insn & Q != 0 { value } else { value & 0xFFFF_FFFF });
}

fn umov<T: Lane>(regs: &mut Regs, insn: u32) {
    regs.set_x(insn, T::get(regs.v[rn(insn)], index::<T>(insn)).u64());
}

/// The lower halves of both operands in one register.
#[inline(always)]
fn halves(regs: &Regs, insn: u32) -> u128 {
    regs.v[rn(insn)] & u128::from(u64::MAX) | regs.v[rm(insn)] << 64
}

fn ext_128(regs: &mut Regs, insn: u32) {
    let shift = (insn >> 11 & 15) * 8;
    let low = regs.v[rn(insn)] >> shift;
    // By 128 less the shift, which may be 128.
    regs.v[rd(insn)] = low | regs.v[rm(insn)] << 8 << (120 - shift);
}

fn ext_64(regs: &mut Regs, insn: u32) {
    let shift = (insn >> 11 & 7) * 8;
    regs.v[rd(insn)] = halves(regs, insn) >> shift & u128::from(u64::MAX);
}

/// TBL and TBX of one to four registers.
fn table(regs: &mut Regs, insn: u32) {
    let len = (insn >> 13 & 3) as usize + 1;
    let mut table = [0; 64];
    let (chunks, _) = table.as_chunks_mut();
    for (i, chunk) in chunks.iter_mut().take(len).enumerate() {
        *chunk = regs.v[(rn(insn) + i) % 32].to_le_bytes();
    }
    let table = &table[..len * 16];
    let tbx = insn >> 12 & 1 != 0;
    let d = if tbx { regs.v[rd(insn)] } else { 0 };
    let lanes =
        u8::map2(&regs.v[rm(insn)], &d, |i, d| table.get(usize::from(i)).copied().unwrap_or(d));
    put::<u8>(regs, insn, lanes);
}

/// The lanes of `n` and `m` by position: `f(i)` is a lane of the concatenation.
#[inline(always)]
fn shuffle<T: Lane>(n: &u128, m: &u128, f: impl Fn(usize) -> usize) -> T::Lanes {
    let (n, m) = (T::split(n), T::split(m));
    let mut out = T::split(&0);
    for (i, out) in out.as_mut().iter_mut().enumerate() {
        let from = f(i);
        *out = if from < T::COUNT { n.as_ref()[from] } else { m.as_ref()[from - T::COUNT] };
    }
    out
}

/// Alternately a lane of the first operand and one of the second.
#[inline(always)]
fn second<T: Lane>(i: usize) -> usize {
    if i.is_multiple_of(2) { 0 } else { T::COUNT }
}

fn zip1<T: Lane>(regs: &mut Regs, insn: u32) {
    let lanes = zip_low::<T>(regs, insn);
    put::<T>(regs, insn, lanes);
}

fn zip2<T: Lane>(regs: &mut Regs, insn: u32) {
    if insn & Q != 0 {
        let lanes = shuffle::<T>(&regs.v[rn(insn)], &regs.v[rm(insn)], |i| {
            T::COUNT / 2 + i / 2 + second::<T>(i)
        });
        put::<T>(regs, insn, lanes);
    } else {
        // What ZIP1 of 64 bits leaves off.
        regs.v[rd(insn)] = T::join(zip_low::<T>(regs, insn)) >> 64;
    }
}

#[inline(always)]
fn zip_low<T: Lane>(regs: &Regs, insn: u32) -> T::Lanes {
    shuffle::<T>(&regs.v[rn(insn)], &regs.v[rm(insn)], |i| i / 2 + second::<T>(i))
}

fn uzp1<T: Lane>(regs: &mut Regs, insn: u32) {
    uzp::<T>(regs, insn, 0);
}

fn uzp2<T: Lane>(regs: &mut Regs, insn: u32) {
    uzp::<T>(regs, insn, 1);
}

#[inline(always)]
fn uzp<T: Lane>(regs: &mut Regs, insn: u32, odd: usize) {
    let lanes = if insn & Q != 0 {
        shuffle::<T>(&regs.v[rn(insn)], &regs.v[rm(insn)], |i| 2 * i + odd)
    } else {
        shuffle::<T>(&halves(regs, insn), &0, |i| 2 * i + odd)
    };
    put::<T>(regs, insn, lanes);
}

fn trn1<T: Lane>(regs: &mut Regs, insn: u32) {
    trn::<T>(regs, insn, 0);
}

fn trn2<T: Lane>(regs: &mut Regs, insn: u32) {
    trn::<T>(regs, insn, 1);
}

#[inline(always)]
fn trn<T: Lane>(regs: &mut Regs, insn: u32, odd: usize) {
    let lanes =
        shuffle::<T>(&regs.v[rn(insn)], &regs.v[rm(insn)], |i| (i & !1) + odd + second::<T>(i));
    put::<T>(regs, insn, lanes);
}
