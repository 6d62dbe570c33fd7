//! Encoding classes (Arm ARM C4.1) and random words of them.

use super::cases::Operands;
use super::values::Rng;
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
    /// What the instructions need to find in the registers.
    pub operands: Operands,
}

/// ARMv8.0-A with CRC32 and the cryptographic extension.
const V8_0: &str = "cortex-a72";

/// With LSE, and much that squib leaves out.
const MAX: &str = "max";

const fn simd(name: &'static str, mask: u32, bits: u32, key: u32) -> Class {
    Class { name, mask, bits, key, cpu: V8_0, operands: Operands::Data }
}

const fn int(name: &'static str, mask: u32, bits: u32, key: u32) -> Class {
    Class { name, mask, bits, key, cpu: V8_0, operands: Operands::Integer }
}

const fn mem(
    name: &'static str,
    mask: u32,
    bits: u32,
    key: u32,
    cpu: &'static str,
    operands: Operands,
) -> Class {
    Class { name, mask, bits, key, cpu, operands }
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
    int("int-pc-relative", 0x1F00_0000, 0x1000_0000, 0x8000_0000),
    int("int-add-sub-immediate", 0x1F80_0000, 0x1100_0000, 0xE040_0000),
    int("int-add-sub-tags", 0x1F80_0000, 0x1180_0000, 0xE040_0000),
    int("int-logical-immediate", 0x1F80_0000, 0x1200_0000, 0xE040_0000),
    int("int-move-wide", 0x1F80_0000, 0x1280_0000, 0xE060_0000),
    int("int-bitfield", 0x1F80_0000, 0x1300_0000, 0xE040_0000),
    int("int-extract", 0x1F80_0000, 0x1380_0000, 0xE060_0000),
    int("int-logical-shifted", 0x1F00_0000, 0x0A00_0000, 0xE0E0_0000),
    int("int-add-sub-shifted", 0x1F20_0000, 0x0B00_0000, 0xE0C0_0000),
    int("int-add-sub-extended", 0x1F20_0000, 0x0B20_0000, 0xE0C0_E000),
    int("int-add-sub-carry", 0x1FE0_FC00, 0x1A00_0000, 0xE000_0000),
    int("int-flags", 0x1FE0_0000, 0x1A00_0000, 0xE000_FC10),
    int("int-conditional-compare", 0x1FE0_0000, 0x1A40_0000, 0xE000_0C10),
    int("int-conditional-select", 0x1FE0_0000, 0x1A80_0000, 0xE000_0C00),
    int("int-data2", 0x5FE0_8000, 0x1AC0_0000, 0xA000_7C00),
    int("int-data1", 0x5FFF_C000, 0x5AC0_0000, 0xA000_3C00),
    int("int-data1-all", 0x5FE0_0000, 0x5AC0_0000, 0xA01F_FC00),
    int("int-data3", 0x1F00_0000, 0x1B00_0000, 0xE0E0_8000),
    int("int-all-immediate", 0x1C00_0000, 0x1000_0000, 0xE3C0_0000),
    int("int-all-register", 0x0E00_0000, 0x0A00_0000, 0xF1E0_FC00),
    // Conditional branches by +12.
    int("branch-conditional", 0xFFFF_FFE0, 0x5400_0060, 0x0000_001F),
    int("branch-compare", 0x7EFF_FFE0, 0x3400_0060, 0x8100_0000),
    int("branch-test", 0x7E07_FFE0, 0x3600_0060, 0x8100_0000),
    int("branch-immediate", 0x7FFF_FFFF, 0x1400_0003, 0x8000_0000),
    mem("branch-register", 0xFF9F_FC1F, 0xD61F_0000, 0x0060_0000, V8_0, Operands::Target),
    int("system-hint", 0xFFFF_F91F, 0xD503_211F, 0x0000_0FE0),
    int("system-barrier", 0xFFFF_F0FF, 0xD503_30BF, 0x0000_0FE0),
    int("system-nzcv", 0xFFDF_FFE0, 0xD51B_4200, 0x0020_0000),
    mem("system-fpcr", 0xFFDF_FFC0, 0xD51B_4400, 0x0020_0020, V8_0, Operands::FpControl),
    int("system-tpidr", 0xFFDF_FFE0, 0xD51B_D040, 0x0020_0000),
    mem("system-dc-zva", 0xFFFF_FFE0, 0xD50B_7420, 0, V8_0, Operands::CacheLine),
    mem("mem-literal", 0x3BFF_FFE0, 0x1800_0360, 0xC400_0000, V8_0, Operands::Data),
    mem("mem-exclusive", 0x3F00_0000, 0x0800_0000, 0xC0E0_8000, V8_0, Operands::Exclusive),
    mem("mem-cas", 0x3FA0_7C00, 0x08A0_7C00, 0xC040_8000, MAX, Operands::Address),
    mem("mem-casp", 0xBFA0_7C00, 0x0820_7C00, 0x4040_8000, MAX, Operands::Address),
    mem("mem-atomic", 0x3F20_0C00, 0x3820_0000, 0xC0C0_F000, MAX, Operands::Address),
    mem("mem-unscaled", 0x3B20_0C00, 0x3800_0000, 0xC4C0_0000, V8_0, Operands::Address),
    mem("mem-post", 0x3B20_0C00, 0x3800_0400, 0xC4C0_0000, V8_0, Operands::WriteBack),
    mem("mem-unprivileged", 0x3B20_0C00, 0x3800_0800, 0xC4C0_0000, V8_0, Operands::Address),
    mem("mem-pre", 0x3B20_0C00, 0x3800_0C00, 0xC4C0_0000, V8_0, Operands::WriteBack),
    mem("mem-register", 0x3B20_0C00, 0x3820_0800, 0xC4C0_E000, V8_0, Operands::RegisterOffset),
    mem("mem-unsigned", 0x3B00_0000, 0x3900_0000, 0xC4C0_0000, V8_0, Operands::UnsignedOffset),
    mem("mem-pair", 0x3A00_0000, 0x2800_0000, 0xC5C0_0000, V8_0, Operands::Pair),
    mem("mem-structures", 0xBFBF_0000, 0x0C00_0000, 0x4040_FC00, V8_0, Operands::Address),
    mem(
        "mem-structures-post",
        0xBFA0_0000,
        0x0C80_0000,
        0x4040_FC00,
        V8_0,
        Operands::StructurePost,
    ),
    mem("mem-structure", 0xBF9F_0000, 0x0D00_0000, 0x4060_FC00, V8_0, Operands::Address),
    mem("mem-structure-post", 0xBF80_0000, 0x0D80_0000, 0x4060_FC00, V8_0, Operands::StructurePost),
    mem("mem-all", 0x0A00_0000, 0x0800_0000, 0xFFE0_0C00, V8_0, Operands::AnyAddress),
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

    /// True if the instructions work on registers that [`execute_data`](super::compare::execute_data)
    /// knows.
    pub fn is_simd(&self) -> bool {
        self.mask & self.bits & 0x0E00_0000 == 0x0E00_0000
    }

    /// A random word, of what both sides have.
    pub fn word(&self, rng: &mut Rng) -> u32 {
        loop {
            let mut insn = rng.next_u32() & !self.mask | self.bits;
            // Few different registers: operands that are the same, and destinations that are sources.
            if rng.one_in(4) && self.mask & 0x3ff == 0 {
                insn = insn & !0x001F | insn >> 5 & 0x1F;
            }
            insn = self.operands.avoid_unpredictable(insn);
            // LSE is in squib and not in the reference; LDAPR the other way round.
            let ldapr = self.cpu == MAX && insn & 0x3FFF_FC00 == 0x38BF_C000;
            if !ldapr && (self.cpu == MAX || !Operands::is_lse(insn)) {
                return insn;
            }
        }
    }

    /// A random case, which will be number `index` of its batch.
    pub fn case(&self, rng: &mut Rng, index: usize) -> Case {
        self.operands.case(self.word(rng), rng, index)
    }
}
