//! Floating point and Advanced SIMD data processing: everything in the encoding group
//! `insn<27:25> == 111` (Arm ARM C4.1, "Data Processing -- Scalar Floating-Point and Advanced SIMD").
//!
//! A decoded instruction is a function that carries it out. None of them touches memory or faults;
//! the access trap of CPACR_EL1 is the caller's.

mod fp;
mod int;
#[cfg(test)]
mod vectors;

use crate::regs::Regs;

/// Carries out one instruction word on the registers.
pub(crate) type DataFn = fn(&mut Regs, u32);

/// The function for `insn`, or `None` where the encoding is unallocated or not advertised.
pub(crate) fn decode(insn: u32) -> Option<DataFn> {
    int::decode(insn).or_else(|| fp::decode(insn))
}
