//! Modified immediates: `0Q op 0111100000 abc cmode o2 1 defgh Rd` (MOVI, MVNI, ORR, BIC, FMOV).

use super::lanes::{rd, width};
use crate::regs::Regs;
use crate::simd::DataFn;

pub(super) fn decode(insn: u32) -> Option<DataFn> {
    let op = insn >> 29 & 1 != 0;
    let q = insn >> 30 & 1 != 0;
    let cmode = insn >> 12 & 15;
    if insn >> 11 & 1 != 0 {
        // Half precision FMOV.
        return None;
    }
    match cmode {
        0b1111 if op && !q => None,
        0b1110 | 0b1111 => Some(movi),
        0b1100 | 0b1101 => Some(if op { mvni } else { movi }),
        _ if cmode & 1 != 0 => Some(if op { bic } else { orr }),
        _ => Some(if op { mvni } else { movi }),
    }
}

fn movi(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = immediate(insn) & width(insn);
}

fn mvni(regs: &mut Regs, insn: u32) {
    regs.v[rd(insn)] = !immediate(insn) & width(insn);
}

fn orr(regs: &mut Regs, insn: u32) {
    let d = &mut regs.v[rd(insn)];
    *d = (*d | immediate(insn)) & width(insn);
}

fn bic(regs: &mut Regs, insn: u32) {
    let d = &mut regs.v[rd(insn)];
    *d = *d & !immediate(insn) & width(insn);
}

/// `AdvSIMDExpandImm`, without the inversion of MVNI and BIC, in both halves.
fn immediate(insn: u32) -> u128 {
    let imm8 = u64::from(insn >> 11 & 0xE0 | insn >> 5 & 0x1F);
    let cmode = insn >> 12 & 15;
    let op = insn >> 29 & 1 != 0;
    let word = |value: u64| value << 32 | value;
    let half = match cmode {
        0b0000..=0b0111 => word(imm8 << (8 * (cmode >> 1))),
        0b1000..=0b1011 => (imm8 << (8 * (cmode >> 1 & 1))) * 0x0001_0001_0001_0001,
        0b1100 => word(imm8 << 8 | 0xFF),
        0b1101 => word(imm8 << 16 | 0xFFFF),
        0b1110 if !op => imm8 * 0x0101_0101_0101_0101,
        0b1110 => (0..8).filter(|bit| imm8 >> bit & 1 != 0).fold(0, |v, bit| v | 0xFF << (8 * bit)),
        _ => {
            // imm8<7>:NOT(imm8<6>):Replicate(imm8<6>):imm8<5:0>, at the top of the number.
            let (sign, low) = (imm8 >> 7, imm8 & 0x3F);
            let exponent = if imm8 >> 6 & 1 != 0 { (0x7C, 0x3FC) } else { (0x80, 0x400) };
            if op {
                sign << 63 | (exponent.1 << 52) | low << 48
            } else {
                word(sign << 31 | exponent.0 << 23 | low << 19)
            }
        }
    };
    u128::from(half) << 64 | u128::from(half)
}
