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

/// TI bit 0: a WFE or WFET, which asks for nothing that could be waited for.
pub(super) const fn waits_for_event(syndrome: u64) -> bool {
    syndrome & 1 != 0
}

/// Bits 15 to 0: the immediate of an HVC.
pub(super) const fn immediate(syndrome: u64) -> u16 {
    syndrome as u16
}

/// Whether the access that aborted needs the right to write.
pub(super) const fn is_write(syndrome: u64) -> bool {
    if is_table_walk(syndrome) {
        // The walk reads, and what it may have to write are the access flag and the dirty state. WnR tells of
        // the access that was being translated, if of anything.
        return is_permission_fault(syndrome);
    }
    // In an instruction abort the bit means nothing.
    class(syndrome) == DATA_ABORT && syndrome & 1 << 6 != 0
}

/// S1PTW: the abort is one of reading or updating the guest's translation table.
pub(super) const fn is_table_walk(syndrome: u64) -> bool {
    syndrome & 1 << 7 != 0
}

/// CM: the data abort is one of an instruction that cleans or invalidates a cache by address. It is reported
/// as a write, and without ISV.
pub(super) const fn is_cache_maintenance(syndrome: u64) -> bool {
    syndrome & 1 << 8 != 0
}

/// DFSC, IFSC: 0b0011xx.
const fn is_permission_fault(syndrome: u64) -> bool {
    syndrome >> 2 & 0xf == 0b0011
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
    fn a_wfe_and_a_wfet_are_told_from_a_wfi_and_a_wfit() {
        assert_eq!(
            [0, 1, 2, 3].map(|ti| waits_for_event(WFX << 26 | ti)),
            [false, true, false, true]
        );
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

    const TRANSLATION_FAULT: u64 = 0b000111;
    const PERMISSION_FAULT: u64 = 0b001111;
    const WNR: u64 = 1 << 6;
    const S1PTW: u64 = 1 << 7;

    #[test]
    fn an_abort_is_a_write_if_wnr_says_so() {
        let data = |iss| is_write(DATA_ABORT << 26 | iss);
        assert!(data(WNR | PERMISSION_FAULT) && data(WNR | TRANSLATION_FAULT));
        assert!(!data(PERMISSION_FAULT) && !data(TRANSLATION_FAULT));
        assert!(!is_write(INSTRUCTION_ABORT << 26 | WNR | PERMISSION_FAULT));
    }

    #[test]
    fn a_table_walk_writes_where_it_may_not() {
        for class in [DATA_ABORT, INSTRUCTION_ABORT] {
            for wnr in [0, WNR] {
                let walk = |fault| is_write(class << 26 | S1PTW | wnr | fault);
                for level in 0..4 {
                    assert!(walk(0b001100 | level), "permission fault, level {level}");
                    assert!(!walk(0b000100 | level), "translation fault, level {level}");
                }
            }
        }
    }

    #[test]
    fn cache_maintenance_is_told_from_a_store() {
        assert!(is_cache_maintenance(DATA_ABORT << 26 | 1 << 8 | WNR));
        assert!(!is_cache_maintenance(syndrome(3, true, 31, true) | WNR | S1PTW));
    }
}
