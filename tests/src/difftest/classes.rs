//! Encoding classes (Arm ARM C4.1) and random words of them.

use super::values::{self, Rng};
use super::{Case, Qemu};

/// One encoding class: words with `insn & mask == bits`, all other bits random.
#[derive(Clone, Copy, Debug)]
pub struct Class {
    /// Its name on the command line.
    pub name: &'static str,
    /// The bits that are fixed.
    pub mask: u32,
    /// Their values.
    pub bits: u32,
    /// The bits that tell the instructions of the class apart; mismatches are grouped by them.
    pub key: u32,
    /// QEMU's CPU model.
    pub cpu: &'static str,
}

/// ARMv8.0-A with CRC32 and the cryptographic extension.
const V8_0: &str = "cortex-a72";

const fn simd(name: &'static str, mask: u32, bits: u32, key: u32) -> Class {
    Class { name, mask, bits, key, cpu: V8_0 }
}

/// Every class.
pub const CLASSES: &[Class] = &[
    simd("simd-three-same", 0x9F20_0400, 0x0E20_0400, 0x60C0_F800),
    simd("simd-three-same-scalar", 0xDF20_0400, 0x5E20_0400, 0x20C0_F800),
    simd("simd-three-same-extra", 0x9F20_8400, 0x0E00_8400, 0x60C0_F800),
    simd("simd-three-same-extra-scalar", 0xDF20_8400, 0x5E00_8400, 0x20C0_F800),
    simd("simd-three-same-half", 0x9F60_C400, 0x0E40_0400, 0x60C0_F800),
    simd("simd-three-different", 0x9F20_0C00, 0x0E20_0000, 0x60C0_F000),
    simd("simd-three-different-scalar", 0xDF20_0C00, 0x5E20_0000, 0x20C0_F000),
    simd("simd-two-reg-misc", 0x9F3E_0C00, 0x0E20_0800, 0x60C1_F000),
    simd("simd-two-reg-misc-scalar", 0xDF3E_0C00, 0x5E20_0800, 0x20C1_F000),
    simd("simd-two-reg-misc-half", 0x9F7E_0C00, 0x0E78_0800, 0x6081_F000),
    simd("simd-across-lanes", 0x9F3E_0C00, 0x0E30_0800, 0x60C1_F000),
    simd("simd-pairwise-scalar", 0xDF3E_0C00, 0x5E30_0800, 0x20C1_F000),
    simd("simd-copy", 0x9FE0_8400, 0x0E00_0400, 0x6000_7800),
    simd("simd-copy-scalar", 0xDFE0_8400, 0x5E00_0400, 0x2000_7800),
    simd("simd-extract", 0xBF20_8400, 0x2E00_0000, 0x40C0_0000),
    simd("simd-table", 0xBF20_8C00, 0x0E00_0000, 0x40C0_7000),
    simd("simd-permute", 0xBF20_8C00, 0x0E00_0800, 0x40C0_7000),
    simd("simd-modified-immediate", 0x9FF8_0400, 0x0F00_0400, 0x6000_F800),
    simd("simd-shift-immediate", 0x9F80_0400, 0x0F00_0400, 0x6000_F800),
    simd("simd-shift-immediate-scalar", 0xDF80_0400, 0x5F00_0400, 0x2000_F800),
    simd("simd-by-element", 0x9F00_0400, 0x0F00_0000, 0x60C0_F000),
    simd("simd-by-element-scalar", 0xDF00_0400, 0x5F00_0000, 0x20C0_F000),
    simd("crypto-aes", 0xFFFE_0C00, 0x4E28_0800, 0x0001_F000),
    simd("crypto-sha3", 0xFFE0_8C00, 0x5E00_0000, 0x0000_7000),
    simd("crypto-sha2", 0xFFFE_0C00, 0x5E28_0800, 0x0001_F000),
    simd("crypto-armv8.2", 0xFF00_0000, 0xCE00_0000, 0x00E0_FC00),
    simd("fp-compare", 0x5F20_3C00, 0x1E20_2000, 0xA0C0_C01F),
    simd("fp-conditional-compare", 0x5F20_0C00, 0x1E20_0400, 0xA0C0_0010),
    simd("fp-data2", 0x5F20_0C00, 0x1E20_0800, 0xA0C0_F000),
    simd("fp-select", 0x5F20_0C00, 0x1E20_0C00, 0xA0C0_0000),
    simd("fp-data1", 0x5F20_7C00, 0x1E20_4000, 0xA0DF_8000),
    simd("fp-immediate", 0x5F20_1C00, 0x1E20_1000, 0xA0C0_03E0),
    simd("fp-data3", 0x5F00_0000, 0x1F00_0000, 0xA0E0_8000),
    simd("fp-convert-integer", 0x5F20_FC00, 0x1E20_0000, 0xA0DF_0000),
    simd("fp-convert-fixed", 0x5F20_0000, 0x1E00_0000, 0xA0DF_0000),
    // The whole group, so that nothing is decoded that lies between the classes.
    simd("simd-all", 0x0E00_0000, 0x0E00_0000, 0xF1E0_FC00),
];

/// The classes whose name is `name` or begins with it and a hyphen.
pub fn named(name: &str) -> Vec<&'static Class> {
    let exact: Vec<_> = CLASSES.iter().filter(|class| class.name == name).collect();
    if !exact.is_empty() {
        return exact;
    }
    CLASSES
        .iter()
        .filter(|c| c.name.strip_prefix(name).is_some_and(|r| r.starts_with('-')))
        .collect()
}

impl Class {
    /// The reference for this class.
    pub fn qemu(&self) -> Qemu {
        Qemu::new(self.cpu)
    }

    /// A random case.
    pub fn case(&self, rng: &mut Rng) -> Case {
        let mut insn = rng.next_u32() & !self.mask | self.bits;
        // Few different registers: operands that are the same, and destinations that are sources.
        if rng.one_in(4) && self.mask & 0x3ff == 0 {
            insn = insn & !0x001F | insn >> 5 & 0x1F;
        }
        Case { insn, state: values::state(rng), memory: Vec::new() }
    }
}
