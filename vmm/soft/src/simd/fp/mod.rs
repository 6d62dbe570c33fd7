//! Scalar floating point and the floating-point half of Advanced SIMD (Arm ARM C4.1.96), Armv8.0-A:
//! half precision only converts, and none of FP16, FHM, BF16, FCMA, JSCVT and FRINTTS is advertised, so
//! their encodings are unallocated.
//!
//! A function is chosen by operation and precision; it takes the register numbers from the word.

/// A handler for double or for single precision, with the operation as a further type parameter.
macro_rules! by {
    ($double:expr, $function:ident $(, $operation:ty)?) => {
        if $double {
            $function::<Double $(, $operation)?> as DataFn
        } else {
            $function::<Single $(, $operation)?> as DataFn
        }
    };
}

mod host;
mod ops;
mod scalar;
mod softfloat;
#[cfg(test)]
mod tests;
mod vector;

use super::DataFn;
use crate::regs::Regs;

pub(super) fn decode(insn: u32) -> Option<DataFn> {
    if insn >> 25 & 7 != 7 {
        return None;
    }
    if insn >> 28 & 1 != 0 && insn >> 30 & 1 == 0 {
        return scalar::decode(insn);
    }
    vector::decode(insn)
}

/// Rd's number.
#[inline(always)]
fn rd(insn: u32) -> usize {
    (insn & 31) as usize
}

/// Rn's number.
#[inline(always)]
fn rn(insn: u32) -> usize {
    (insn >> 5 & 31) as usize
}

/// Rm's number.
#[inline(always)]
fn rm(insn: u32) -> usize {
    (insn >> 16 & 31) as usize
}

/// Ra's number.
#[inline(always)]
fn ra(insn: u32) -> usize {
    (insn >> 10 & 31) as usize
}

/// The scalar in the low bits of a register.
#[inline(always)]
fn scalar<F: softfloat::Format>(regs: &Regs, n: usize) -> u64 {
    regs.v[n & 31] as u64 & F::MASK
}

/// Writes a scalar; the rest of the register becomes zero.
#[inline(always)]
fn set_scalar(regs: &mut Regs, insn: u32, value: u64) {
    regs.v[rd(insn)] = u128::from(value);
}
