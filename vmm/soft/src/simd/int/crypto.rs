//! The cryptographic extension: AES, SHA-1 and SHA-256 (PMULL lies with the other widening
//! multiplications).

use super::lanes::{Lane, rd, rm, rn, unary};
use crate::regs::Regs;
use crate::simd::DataFn;

/// `01001110 size 10100 opcode 10 Rn Rd` (AES) and `01011110 size 10100 opcode 10 Rn Rd` (SHA).
pub(super) fn decode_two_register(insn: u32, scalar: bool) -> Option<DataFn> {
    if insn >> 22 & 3 != 0 || insn >> 29 != 0b010 {
        return None;
    }
    match (insn >> 12 & 31, scalar) {
        (0b00100, false) => Some(aese),
        (0b00101, false) => Some(aesd),
        (0b00110, false) => Some(aesmc),
        (0b00111, false) => Some(aesimc),
        (0b00000, true) => Some(sha1h),
        (0b00001, true) => Some(sha1su1),
        (0b00010, true) => Some(sha256su0),
        _ => None,
    }
}

/// `01011110 000 Rm 0 opcode 00 Rn Rd`.
pub(super) fn decode_three_register(insn: u32) -> Option<DataFn> {
    match insn >> 12 & 7 {
        0b000 => Some(sha1c),
        0b001 => Some(sha1p),
        0b010 => Some(sha1m),
        0b011 => Some(sha1su0),
        0b100 => Some(sha256h),
        0b101 => Some(sha256h2),
        0b110 => Some(sha256su1),
        _ => None,
    }
}

/// FIPS 197, 5.1.1: the inverse in GF(2^8), then the affine transformation.
const SBOX: [u8; 256] = {
    let mut sbox = [0; 256];
    // p runs through the powers of 3 and q through those of its inverse.
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        p = p ^ p << 1 ^ if p & 0x80 != 0 { 0x1B } else { 0 };
        q ^= q << 1;
        q ^= q << 2;
        q ^= q << 4;
        if q & 0x80 != 0 {
            q ^= 0x09;
        }
        let affine = q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4);
        sbox[p as usize] = affine ^ 0x63;
        if p == 1 {
            break;
        }
    }
    sbox[0] = 0x63;
    sbox
};

const INVERSE_SBOX: [u8; 256] = {
    let mut inverse = [0; 256];
    let mut i = 0;
    while i < 256 {
        inverse[SBOX[i] as usize] = i as u8;
        i += 1;
    }
    inverse
};

fn aese(regs: &mut Regs, insn: u32) {
    let state = (regs.v[rd(insn)] ^ regs.v[rn(insn)]).to_le_bytes();
    // ShiftRows: byte i of the result is row i % 4, which has moved left by its number.
    let out = std::array::from_fn(|i| SBOX[usize::from(state[(i + 4 * (i % 4)) % 16])]);
    regs.v[rd(insn)] = u128::from_le_bytes(out);
}

fn aesd(regs: &mut Regs, insn: u32) {
    let state = (regs.v[rd(insn)] ^ regs.v[rn(insn)]).to_le_bytes();
    let out = std::array::from_fn(|i| INVERSE_SBOX[usize::from(state[(i + 12 * (i % 4)) % 16])]);
    regs.v[rd(insn)] = u128::from_le_bytes(out);
}

fn aesmc(regs: &mut Regs, insn: u32) {
    unary(regs, insn, mix_column);
}

fn aesimc(regs: &mut Regs, insn: u32) {
    // InvMixColumns is MixColumns after adding 4 times the sum of each column's bytes two apart.
    unary(regs, insn, |a: u32| {
        let sum = double(double(a ^ a.rotate_right(16)));
        mix_column(a ^ sum)
    });
}

/// Every byte times 2 in GF(2^8).
#[inline(always)]
fn double(a: u32) -> u32 {
    ((a & 0x7F7F_7F7F) << 1) ^ ((a >> 7 & 0x0101_0101) * 0x1B)
}

/// FIPS 197, 5.1.3; row 0 is the low byte.
#[inline(always)]
fn mix_column(a: u32) -> u32 {
    let next = a.rotate_right(8);
    double(a ^ next) ^ next ^ a.rotate_right(16) ^ a.rotate_right(24)
}

fn choose(x: u32, y: u32, z: u32) -> u32 {
    z ^ (y ^ z) & x
}

fn parity(x: u32, y: u32, z: u32) -> u32 {
    x ^ y ^ z
}

fn majority(x: u32, y: u32, z: u32) -> u32 {
    x & y | (x | y) & z
}

/// Four rounds of SHA-1.
#[inline(always)]
fn sha1_rounds(regs: &mut Regs, insn: u32, f: impl Fn(u32, u32, u32) -> u32) {
    let [mut a, mut b, mut c, mut d] = u32::split(&regs.v[rd(insn)]);
    let mut e = regs.v[rn(insn)] as u32;
    for w in u32::split(&regs.v[rm(insn)]) {
        let t = e.wrapping_add(a.rotate_left(5)).wrapping_add(f(b, c, d)).wrapping_add(w);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, t);
    }
    u32::store(&mut regs.v[rd(insn)], [a, b, c, d]);
}

fn sha1c(regs: &mut Regs, insn: u32) {
    sha1_rounds(regs, insn, choose);
}

fn sha1p(regs: &mut Regs, insn: u32) {
    sha1_rounds(regs, insn, parity);
}

fn sha1m(regs: &mut Regs, insn: u32) {
    sha1_rounds(regs, insn, majority);
}

fn sha1h(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = (regs.v[rn(insn)] as u32).rotate_left(30).into();
}

fn sha1su0(regs: &mut Regs, insn: u32) {
    let d = regs.v[rd(insn)];
    let shifted = d >> 64 | regs.v[rn(insn)] << 64;
    regs.v[rd(insn)] = shifted ^ d ^ regs.v[rm(insn)];
}

fn sha1su1(regs: &mut Regs, insn: u32) {
    let t = u32::split(&(regs.v[rd(insn)] ^ regs.v[rn(insn)] >> 32));
    let mut out = t.map(|t| t.rotate_left(1));
    out[3] ^= t[0].rotate_left(2);
    u32::store(&mut regs.v[rd(insn)], out);
}

/// Four rounds of SHA-256 on the state abcd and efgh, with the words of Rm.
#[inline(always)]
fn sha256_rounds(regs: &Regs, insn: u32, abcd: usize, efgh: usize) -> ([u32; 4], [u32; 4]) {
    let [mut a, mut b, mut c, mut d] = u32::split(&regs.v[abcd]);
    let [mut e, mut f, mut g, mut h] = u32::split(&regs.v[efgh]);
    for w in u32::split(&regs.v[rm(insn)]) {
        let sigma1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let sigma0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t = h.wrapping_add(sigma1).wrapping_add(choose(e, f, g)).wrapping_add(w);
        let t2 = t.wrapping_add(sigma0).wrapping_add(majority(a, b, c));
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t), c, b, a, t2);
    }
    ([a, b, c, d], [e, f, g, h])
}

fn sha256h(regs: &mut Regs, insn: u32) {
    let (abcd, _) = sha256_rounds(regs, insn, rd(insn), rn(insn));
    u32::store(&mut regs.v[rd(insn)], abcd);
}

fn sha256h2(regs: &mut Regs, insn: u32) {
    let (_, efgh) = sha256_rounds(regs, insn, rn(insn), rd(insn));
    u32::store(&mut regs.v[rd(insn)], efgh);
}

fn sha256su0(regs: &mut Regs, insn: u32) {
    let d = u32::split(&regs.v[rd(insn)]);
    let t = [d[1], d[2], d[3], regs.v[rn(insn)] as u32];
    let sigma = t.map(|t| t.rotate_right(7) ^ t.rotate_right(18) ^ t >> 3);
    u32::store(&mut regs.v[rd(insn)], std::array::from_fn(|i| d[i].wrapping_add(sigma[i])));
}

fn sha256su1(regs: &mut Regs, insn: u32) {
    let [d, n, m] = [rd(insn), rn(insn), rm(insn)].map(|r| u32::split(&regs.v[r]));
    let t0 = [n[1], n[2], n[3], m[0]];
    let mut out = [0; 4];
    for i in 0..4 {
        let t1: u32 = if i < 2 { m[i + 2] } else { out[i - 2] };
        let sigma = t1.rotate_right(17) ^ t1.rotate_right(19) ^ t1 >> 10;
        out[i] = sigma.wrapping_add(d[i]).wrapping_add(t0[i]);
    }
    u32::store(&mut regs.v[rd(insn)], out);
}
