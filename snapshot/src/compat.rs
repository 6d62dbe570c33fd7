//! Whether this host can go on with a snapshot from another.

use std::{collections::BTreeMap, fmt};

use squib_formats::manifest::CpuIdentity;

/// One thing that this host has otherwise than the snapshot needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What it is: "backend", "CNTFRQ_EL0", the name of an ID register.
    pub what: String,
    /// What the snapshot was taken with.
    pub snapshot: String,
    /// What this host has.
    pub host: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, snapshot, host } = self;
        write!(f, "{what}: the snapshot has {snapshot}, this host has {host}")
    }
}

/// Everything about the CPU that differs, in a fixed order. A guest has seen its ID registers, so each
/// must be the same to the bit.
pub fn compare(snapshot: &CpuIdentity, host: &CpuIdentity) -> Vec<Mismatch> {
    let mut mismatches = Vec::new();
    let mut differ = |what: &str, snapshot: String, host: String| {
        if snapshot != host {
            mismatches.push(Mismatch { what: what.to_owned(), snapshot, host });
        }
    };
    differ("backend", snapshot.backend.clone(), host.backend.clone());
    let hz = |identity: &CpuIdentity| format!("{} Hz", identity.counter_frequency);
    differ("CNTFRQ_EL0", hz(snapshot), hz(host));
    let registers = |identity: &CpuIdentity| -> BTreeMap<u16, u64> {
        identity.id_registers.iter().copied().collect()
    };
    let (theirs, ours) = (registers(snapshot), registers(host));
    let all: BTreeMap<u16, ()> = theirs.keys().chain(ours.keys()).map(|key| (*key, ())).collect();
    let value = |found: Option<&u64>| found.map_or("none".to_owned(), |v| format!("{v:#018x}"));
    for register in all.keys() {
        differ(&name(*register), value(theirs.get(register)), value(ours.get(register)));
    }
    mismatches
}

/// The name of an ID register, by its encoding packed as in MRS bits 20 to 5 (op0, op1, CRn, CRm, op2).
pub fn name(register: u16) -> String {
    let known = NAMES.iter().find(|(encoding, _)| *encoding == register);
    let field = |shift: u32, bits: u32| (register >> shift) & ((1 << bits) - 1);
    known.map_or_else(
        || {
            let (op0, op1) = (field(14, 2), field(11, 3));
            format!("S{op0}_{op1}_C{}_C{}_{}", field(7, 4), field(3, 4), field(0, 3))
        },
        |(_, name)| (*name).to_owned(),
    )
}

/// Arm ARM (DDI 0487) D24.2, ID registers of AArch64 state.
const NAMES: [(u16, &str); 18] = [
    (0xc000, "MIDR_EL1"),
    (0xc005, "MPIDR_EL1"),
    (0xc006, "REVIDR_EL1"),
    (0xc020, "ID_AA64PFR0_EL1"),
    (0xc021, "ID_AA64PFR1_EL1"),
    (0xc024, "ID_AA64ZFR0_EL1"),
    (0xc025, "ID_AA64SMFR0_EL1"),
    (0xc028, "ID_AA64DFR0_EL1"),
    (0xc029, "ID_AA64DFR1_EL1"),
    (0xc030, "ID_AA64ISAR0_EL1"),
    (0xc031, "ID_AA64ISAR1_EL1"),
    (0xc032, "ID_AA64ISAR2_EL1"),
    (0xc038, "ID_AA64MMFR0_EL1"),
    (0xc039, "ID_AA64MMFR1_EL1"),
    (0xc03a, "ID_AA64MMFR2_EL1"),
    (0xc801, "CLIDR_EL1"),
    (0xd801, "CTR_EL0"),
    (0xd807, "DCZID_EL0"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> CpuIdentity {
        CpuIdentity {
            backend: "soft".into(),
            id_registers: vec![(0xc000, 1), (0xc030, 2)],
            counter_frequency: 62_500_000,
        }
    }

    #[test]
    fn equal_cpus_are_compatible() {
        assert_eq!(compare(&identity(), &identity()), []);
    }

    #[test]
    fn every_difference_is_a_line_of_its_own() {
        let host = CpuIdentity {
            backend: "hvf".into(),
            id_registers: vec![(0xc000, 1), (0xc030, 3), (0xc0ff, 4)],
            counter_frequency: 24_000_000,
        };
        let lines: Vec<_> = compare(&identity(), &host).iter().map(Mismatch::to_string).collect();
        assert_eq!(
            lines,
            [
                "backend: the snapshot has soft, this host has hvf",
                "CNTFRQ_EL0: the snapshot has 62500000 Hz, this host has 24000000 Hz",
                "ID_AA64ISAR0_EL1: the snapshot has 0x0000000000000002, this host has 0x0000000000000003",
                "S3_0_C1_C15_7: the snapshot has none, this host has 0x0000000000000004",
            ]
        );
    }

    #[test]
    fn names_have_the_encodings_of_their_registers() {
        // MRS x0, ID_AA64ISAR0_EL1 is 0xd5380600; bits 20 to 5 are the encoding.
        assert_eq!(name(((0xd538_0600u32 >> 5) & 0xffff) as u16), "ID_AA64ISAR0_EL1");
        // MRS x0, CTR_EL0 is 0xd53b0020.
        assert_eq!(name(((0xd53b_0020u32 >> 5) & 0xffff) as u16), "CTR_EL0");
    }
}
