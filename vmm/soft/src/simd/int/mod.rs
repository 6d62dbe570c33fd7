//! Advanced SIMD data processing that is not floating-point arithmetic, and the cryptographic
//! extension (Arm ARM C4.1.96, "Data Processing -- Scalar Floating-Point and Advanced SIMD").
//!
//! One module a group of encoding classes. Vector and scalar forms of an instruction share a
//! function: the lanes that do not take part are masked off before and after (see [`lanes`]).

mod by_element;
mod crypto;
mod lanes;
mod modified_immediate;
mod permute;
mod shift_immediate;
#[cfg(test)]
mod tests;
mod three_different;
mod three_same;
mod two_register;

use super::DataFn;

pub(super) fn decode(insn: u32) -> Option<DataFn> {
    // Vector: 0 Q U 0111x; scalar: 01 U 1111x. The same layout follows in both.
    let scalar = match insn >> 28 & 0b1001 {
        0b0000 => false,
        0b0001 if insn >> 30 & 1 == 1 => true,
        _ => return None,
    };
    if insn >> 25 & 0b111 != 0b111 {
        return None;
    }
    let is = |mask: u32, bits: u32| insn & mask == bits;
    if is(0x0100_0000, 0x0000_0000) {
        if is(0x0020_0400, 0x0020_0400) {
            three_same::decode(insn, scalar)
        } else if is(0x0020_0C00, 0x0020_0000) {
            three_different::decode(insn, scalar)
        } else if is(0x003E_0C00, 0x0020_0800) {
            two_register::decode_misc(insn, scalar)
        } else if is(0x003E_0C00, 0x0030_0800) {
            two_register::decode_across(insn, scalar)
        } else if is(0x00FE_0C00, 0x0028_0800) {
            crypto::decode_two_register(insn, scalar)
        } else if is(0x00E0_8400, 0x0000_0400) {
            permute::decode_copy(insn, scalar)
        } else if scalar && is(0x20E0_8C00, 0x0000_0000) {
            crypto::decode_three_register(insn)
        } else if !scalar && is(0x0020_8400, 0x0000_0000) {
            permute::decode(insn)
        } else {
            None
        }
    } else if is(0x0000_0400, 0) {
        by_element::decode(insn, scalar)
    } else if is(0x0080_0400, 0x0000_0400) {
        if is(0x0078_0000, 0) {
            if scalar { None } else { modified_immediate::decode(insn) }
        } else {
            shift_immediate::decode(insn, scalar)
        }
    } else {
        None
    }
}
