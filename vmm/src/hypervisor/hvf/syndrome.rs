//! ESR_EL2 of the exceptions that leave the guest (Arm ARM, D24.2.40).

/// Exception class.
pub(super) const fn class(syndrome: u64) -> u64 {
    syndrome >> 26 & 0x3f
}

/// WFI or WFE.
pub(super) const WFX: u64 = 0x01;
/// HVC.
pub(super) const HVC: u64 = 0x16;
/// SMC.
pub(super) const SMC: u64 = 0x17;
/// MSR, MRS or a system instruction.
pub(super) const SYSTEM: u64 = 0x18;
/// Instruction abort from EL0 or EL1.
pub(super) const INSTRUCTION_ABORT: u64 = 0x20;
/// Data abort from EL0 or EL1.
pub(super) const DATA_ABORT: u64 = 0x24;

/// Bits 15 to 0: the immediate of an HVC.
pub(super) const fn immediate(syndrome: u64) -> u16 {
    syndrome as u16
}

/// WnR: the access that aborted was a write.
pub(super) const fn is_write(syndrome: u64) -> bool {
    syndrome & 1 << 6 != 0
}

/// A load or store that the syndrome describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// Bytes: 1, 2, 4 or 8.
    pub(super) size: u8,
    /// The general register; 31 is the zero register.
    pub(super) register: u8,
    /// The value that is loaded is sign-extended.
    pub(super) sign_extend: bool,
    /// The register is 64 bits wide.
    pub(super) wide: bool,
}

impl Access {
    /// What a data abort's syndrome says of the instruction; none without ISV.
    pub(super) const fn of(syndrome: u64) -> Option<Self> {
        if syndrome & 1 << 24 == 0 {
            return None;
        }
        Some(Self {
            size: 1 << (syndrome >> 22 & 3),
            register: (syndrome >> 16 & 31) as u8,
            sign_extend: syndrome & 1 << 21 != 0,
            wide: syndrome & 1 << 15 != 0,
        })
    }

    /// The low bytes of `value` as the load puts them into its register.
    pub(super) const fn loaded(self, value: u64) -> u64 {
        let unused = 64 - 8 * self.size as u32;
        let shifted = value << unused;
        let value =
            if self.sign_extend { (shifted as i64 >> unused) as u64 } else { shifted >> unused };
        if self.wide { value } else { value & 0xffff_ffff }
    }

    /// The low bytes of the register that the store writes.
    pub(super) const fn stored(self, register: u64) -> u64 {
        let unused = 64 - 8 * self.size as u32;
        register << unused >> unused
    }
}

/// A trapped MSR or MRS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SystemAccess {
    /// Op0, op1, CRn, CRm, op2 packed as in MRS bits 20 to 5.
    pub(super) system: u16,
    /// The general register; 31 is the zero register.
    pub(super) register: u8,
    /// It is an MRS.
    pub(super) read: bool,
}

impl SystemAccess {
    pub(super) fn of(syndrome: u64) -> Self {
        let field = |shift: u32, bits: u32| (syndrome >> shift & ((1 << bits) - 1)) as u16;
        let (op0, op2, op1) = (field(20, 2), field(17, 3), field(14, 3));
        let (crn, crm) = (field(10, 4), field(1, 4));
        Self {
            system: op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2,
            register: field(5, 5) as u8,
            read: syndrome & 1 != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ISV set, SAS, SSE, SRT, SF.
    fn syndrome(sas: u64, sse: bool, srt: u64, sf: bool) -> u64 {
        DATA_ABORT << 26
            | 1 << 24
            | sas << 22
            | u64::from(sse) << 21
            | srt << 16
            | u64::from(sf) << 15
    }

    #[test]
    fn a_load_is_extended_as_its_instruction_says() {
        let load = |sas, sse, sf| {
            Access::of(syndrome(sas, sse, 3, sf)).unwrap().loaded(0xdead_beef_8765_4381)
        };
        assert_eq!(load(0, false, false), 0x81);
        assert_eq!(load(0, true, false), 0xffff_ff81);
        assert_eq!(load(0, true, true), 0xffff_ffff_ffff_ff81);
        assert_eq!(load(1, true, false), 0x4381);
        assert_eq!(load(2, true, true), 0xffff_ffff_8765_4381);
        assert_eq!(load(2, false, false), 0x8765_4381);
        assert_eq!(load(3, false, true), 0xdead_beef_8765_4381);
    }

    #[test]
    fn a_store_writes_the_low_bytes() {
        let store =
            |sas| Access::of(syndrome(sas, false, 3, true)).unwrap().stored(0x0123_4567_89ab_cdef);
        assert_eq!(
            [store(0), store(1), store(2), store(3)],
            [0xef, 0xcdef, 0x89ab_cdef, 0x0123_4567_89ab_cdef]
        );
    }

    #[test]
    fn an_abort_without_isv_is_not_described() {
        assert_eq!(Access::of(syndrome(2, false, 31, false) & !(1 << 24)), None);
        assert_eq!(Access::of(syndrome(2, false, 31, false)).unwrap().register, 31);
    }

    #[test]
    fn a_trapped_register_has_its_encoding() {
        // MRS X7, OSLSR_EL1: S2_0_C1_C1_4.
        let trapped =
            SystemAccess::of(SYSTEM << 26 | 2 << 20 | 4 << 17 | 1 << 10 | 7 << 5 | 1 << 1 | 1);
        assert_eq!(trapped, SystemAccess { system: 0x808c, register: 7, read: true });
    }
}
