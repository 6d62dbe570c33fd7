//! Operands that make an instruction do something: addresses that lead into the case's memory.

use super::values::{self, Rng};
use super::{Case, EDGE, SCRATCH, insn_address, scratch_address};

/// What an instruction needs to find in the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// Numbers only.
    Data,
    /// Numbers only, and code that squib must run as a whole CPU.
    Integer,
    /// Rt goes to FPCR or FPSR: only bits that exist without AArch32.
    FpControl,
    /// Rt is an address.
    CacheLine,
    /// Rn is where a branch by register goes: 12 bytes on.
    Target,
    /// Rn is an address.
    Address,
    /// Rn is an address; any load or store.
    AnyAddress,
    /// Rn is an address; loads and stores exclusive and with acquire or release.
    Exclusive,
    /// Rn is an address that is written back.
    WriteBack,
    /// Rn is an address and Rm a small offset, extended as the instruction says.
    RegisterOffset,
    /// Rn plus the scaled 12-bit immediate is an address.
    UnsignedOffset,
    /// Rn plus the scaled 7-bit immediate is an address.
    Pair,
    /// Rn is an address that is written back, Rm what is added to it.
    StructurePost,
}

impl Operands {
    /// The word itself, or a neighbour where the architecture leaves the behaviour open
    /// (CONSTRAINED UNPREDICTABLE): a base that is written back and also transferred, and
    /// registers of a pair or a status that are the same.
    pub fn avoid_unpredictable(self, insn: u32) -> u32 {
        let (t, n, t2, s) = (insn & 31, insn >> 5 & 31, insn >> 10 & 31, insn >> 16 & 31);
        let vector = insn >> 26 & 1 != 0;
        let other = |from: u32, register: u32, at: u32| {
            let mut new = from;
            // X26 counts the rounds of a stream.
            while [register, n, 26].contains(&new) || new == 31 {
                new = (new + 1) % 31;
            }
            insn & !(31 << at) | new << at
        };
        match self {
            Operands::AnyAddress => match insn {
                _ if insn & 0x3F00_0000 == 0x0800_0000 => Operands::Exclusive,
                _ if insn & 0x3A00_0000 == 0x2800_0000 => Operands::Pair,
                _ if insn & 0x3B20_0400 == 0x3800_0400 => Operands::WriteBack,
                _ => Operands::Address,
            }
            .avoid_unpredictable(insn),
            Operands::WriteBack if !vector && t == n => other(t, n, 0),
            Operands::Pair => {
                let load = insn >> 22 & 1 != 0;
                let indexed = insn >> 23 & 1 != 0;
                if vector {
                    if load && t == t2 { insn ^ 1 << 10 } else { insn }
                } else if load && t == t2 || indexed && t2 == n {
                    // First the second register, then the first if it is the base as well.
                    self.avoid_unpredictable(other(t2, t, 10))
                } else if indexed && t == n {
                    other(t, t2, 0)
                } else {
                    insn
                }
            }
            Operands::Exclusive => {
                let load = insn >> 22 & 1 != 0;
                let pair = insn >> 21 & 1 != 0;
                if load && pair && t == t2 {
                    other(t2, t, 10)
                } else if !load && insn >> 23 & 1 == 0 && (s == t || s == n || pair && s == t2) {
                    // A status register that is none of the others, unless there is none.
                    let new = (0..31).find(|new| ![t, n, t2].contains(new)).unwrap_or(0);
                    insn & !(31 << 16) | new << 16
                } else {
                    insn
                }
            }
            _ => insn,
        }
    }

    /// A random case of `insn`, number `index` of its batch.
    pub fn case(self, insn: u32, rng: &mut Rng, index: usize) -> Case {
        if self == Operands::AnyAddress && insn & 0x3B20_0C00 == 0x3820_0800 {
            return Operands::RegisterOffset.case(insn, rng, index);
        }
        let mut state = values::state(rng);
        if let (Operands::FpControl, Some(x)) = (self, state.x.get_mut((insn & 31) as usize)) {
            *x &= if insn >> 5 & 1 != 0 { 0x0800_009F } else { 0x07C0_0000 };
        }
        if matches!(self, Operands::Data | Operands::Integer | Operands::FpControl) {
            return Case { code: vec![insn], state, memory: Vec::new() };
        }
        let memory =
            (0..SCRATCH / 8).flat_map(|_| values::integer(rng, 64).to_le_bytes()).collect();
        let n = if self == Operands::CacheLine { insn } else { insn >> 5 };
        let n = (n & 31) as usize;
        let m = (insn >> 16 & 31) as usize;
        // Far enough from both ends for every immediate that is not scaled.
        let mut address = scratch_address(index) + 272 + u64::from(rng.below(384));
        match rng.below(4) {
            0 if n != 31 => {}
            1 if n != 31 => address &= !7,
            _ => address &= !15,
        }
        // Whether a store-exclusive that fails reports faults is open.
        if insn & 0x3FC0_0000 == 0x0800_0000 {
            address &= !15;
        } else if rng.one_in(8) {
            // A page that cannot be written, its end, and what lies behind.
            address = EDGE + 0xFE0 + u64::from(rng.below(64));
        }
        let mut small = i64::from(rng.below(33)) - 16;
        let offset = match self {
            Operands::UnsignedOffset => i64::from(insn >> 10 & 0xFFF) << self.scale(insn),
            Operands::Pair if insn >> 23 & 3 != 1 => {
                i64::from((insn << 10) as i32 >> 25) << self.scale(insn)
            }
            _ => 0,
        };
        match self {
            Operands::RegisterOffset if m != 31 => {
                let option = insn >> 13 & 7;
                if option == 2 {
                    small = small.abs();
                }
                state.x[m] = small as u64;
                if option & 1 == 0 && rng.one_in(2) {
                    state.x[m] = state.x[m] & 0xFFFF_FFFF | rng.next_u64() << 32;
                }
            }
            Operands::StructurePost if m != 31 => state.x[m] = small as u64,
            _ => {}
        }
        if self == Operands::Target {
            address = insn_address(index) + 12;
        }
        let base = address.wrapping_sub(offset as u64);
        match state.x.get_mut(n) {
            Some(x) => *x = base,
            None if self == Operands::CacheLine => {}
            None => state.sp = base & !15,
        }
        Case { code: vec![insn], state, memory }
    }

    /// An instruction of FEAT_LSE.
    pub fn is_lse(insn: u32) -> bool {
        // CAS; CASP; the atomic memory operations and SWP.
        insn & 0x3FA0_7C00 == 0x08A0_7C00
            || insn & 0xBFA0_7C00 == 0x0820_7C00
            || insn & 0x3F20_0C00 == 0x3820_0000 && (insn >> 15 & 1 == 0 || insn >> 12 & 7 == 0)
    }

    /// The scale of the immediate.
    fn scale(self, insn: u32) -> u32 {
        let vector = insn >> 26 & 1 != 0;
        let size = insn >> 30;
        match self {
            Operands::Pair if vector => 2 + size,
            Operands::Pair => 2 + (size >> 1),
            _ if vector => size | insn >> 23 << 2 & 4,
            _ => size,
        }
    }
}
