//! Whether this host can go on with a snapshot from another.

use std::{collections::BTreeMap, fmt};

use squib_formats::manifest::CpuIdentity;
use squib_vmm::{config::BackendKind, machine};

/// One thing that this host has otherwise than the snapshot needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What it is: "backend", "CNTFRQ_EL0", the name of an ID register.
    pub what: String,
    /// What the snapshot was taken with.
    pub snapshot: String,
    /// What this host has.
    pub host: String,
    /// The fields of an ID register that make it differ.
    pub fields: Vec<FieldDifference>,
}

/// A field of an ID register that is not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDifference {
    /// Its architectural name, or its bits ("63:60") where it has none here.
    pub name: String,
    /// Its value in the snapshot.
    pub snapshot: u64,
    /// Its value on this host.
    pub host: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, snapshot, host, fields } = self;
        write!(f, "{what}: the snapshot has {snapshot}, this host has {host}")?;
        for (at, FieldDifference { name, snapshot, host }) in fields.iter().enumerate() {
            write!(f, "{} {name} {snapshot:#x}, here {host:#x}", if at == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// Everything about the CPU that differs, in a fixed order. A guest has seen its ID registers, so each
/// must be the same to the bit.
pub fn compare(snapshot: &CpuIdentity, host: &CpuIdentity) -> Vec<Mismatch> {
    let mut mismatches = Vec::new();
    let mut differ = |what: &str, snapshot: String, host: String, fields| {
        if snapshot != host {
            mismatches.push(Mismatch { what: what.to_owned(), snapshot, host, fields });
        }
    };
    differ("backend", snapshot.backend.clone(), host.backend.clone(), Vec::new());
    let hz = |identity: &CpuIdentity| format!("{} Hz", identity.counter_frequency);
    differ("CNTFRQ_EL0", hz(snapshot), hz(host), Vec::new());
    let registers = |identity: &CpuIdentity| -> BTreeMap<u16, u64> {
        identity.id_registers.iter().copied().collect()
    };
    let (theirs, ours) = (registers(snapshot), registers(host));
    let all: BTreeMap<u16, ()> = theirs.keys().chain(ours.keys()).map(|key| (*key, ())).collect();
    let value = |found: Option<&u64>| found.map_or("none".to_owned(), |v| format!("{v:#018x}"));
    for register in all.keys() {
        let (their, our) = (theirs.get(register), ours.get(register));
        let fields = match (their, our) {
            (Some(their), Some(our)) => fields(*register, *their, *our),
            _ => Vec::new(),
        };
        differ(&name(*register), value(their), value(our), fields);
    }
    mismatches
}

/// The interrupt controller, if the one of `host` does not take the state of the one of `snapshot`.
pub fn irq_chip(snapshot: BackendKind, host: BackendKind) -> Option<Mismatch> {
    let section = |backend| format!("section {}", machine::irq_chip(backend).kind);
    let (snapshot, host) = (section(snapshot), section(host));
    let what = "interrupt controller".to_owned();
    (snapshot != host).then_some(Mismatch { what, snapshot, host, fields: Vec::new() })
}

/// The fields of a register in which two values differ, from the lowest.
fn fields(register: u16, snapshot: u64, host: u64) -> Vec<FieldDifference> {
    let named = FIELDS.iter().find(|(encoding, _)| *encoding == register);
    let mut left = snapshot ^ host;
    let mut found = Vec::new();
    let mut take = |name: String, lsb: u32, width: u32| {
        let mask = ((1 << width) - 1) << lsb;
        if left & mask != 0 {
            let value = |register: u64| (register & mask) >> lsb;
            found.push((
                lsb,
                FieldDifference { name, snapshot: value(snapshot), host: value(host) },
            ));
            left &= !mask;
        }
    };
    for (name, lsb, width) in named.map_or(&[][..], |(_, fields)| fields) {
        take((*name).to_owned(), *lsb, *width);
    }
    // What has no name here goes by its bits, four at a time as most fields are.
    for lsb in (0..64).step_by(4) {
        take(format!("{}:{lsb}", lsb + 3), lsb, 4);
    }
    found.sort_by_key(|(lsb, _)| *lsb);
    found.into_iter().map(|(_, field)| field).collect()
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

/// Arm ARM (DDI 0487) D24.2, ID registers of AArch64 state, and others that a backend may not tell.
const NAMES: [(u16, &str); 21] = [
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
    (0xc807, "AIDR_EL1"),
    (0xd801, "CTR_EL0"),
    (0xd807, "DCZID_EL0"),
    (0xdf11, "CNTP_CTL_EL0"),
    (0xdf12, "CNTP_CVAL_EL0"),
];

/// A field: name, lowest bit, bits.
type Field = (&'static str, u32, u32);

/// The fields of the registers in [`NAMES`], from the same chapter.
const FIELDS: [(u16, &[Field]); 12] = [
    (
        0xc000,
        &[
            ("Revision", 0, 4),
            ("PartNum", 4, 12),
            ("Architecture", 16, 4),
            ("Variant", 20, 4),
            ("Implementer", 24, 8),
        ],
    ),
    (
        0xc020,
        &[
            ("EL0", 0, 4),
            ("EL1", 4, 4),
            ("EL2", 8, 4),
            ("EL3", 12, 4),
            ("FP", 16, 4),
            ("AdvSIMD", 20, 4),
            ("GIC", 24, 4),
            ("RAS", 28, 4),
            ("SVE", 32, 4),
            ("SEL2", 36, 4),
            ("MPAM", 40, 4),
            ("AMU", 44, 4),
            ("DIT", 48, 4),
            ("RME", 52, 4),
            ("CSV2", 56, 4),
            ("CSV3", 60, 4),
        ],
    ),
    (
        0xc021,
        &[
            ("BT", 0, 4),
            ("SSBS", 4, 4),
            ("MTE", 8, 4),
            ("RAS_frac", 12, 4),
            ("MPAM_frac", 16, 4),
            ("SME", 24, 4),
            ("RNDR_trap", 28, 4),
            ("CSV2_frac", 32, 4),
            ("NMI", 36, 4),
            ("MTE_frac", 40, 4),
            ("GCS", 44, 4),
            ("THE", 48, 4),
            ("MTEX", 52, 4),
            ("DF2", 56, 4),
            ("PFAR", 60, 4),
        ],
    ),
    (
        0xc028,
        &[
            ("DebugVer", 0, 4),
            ("TraceVer", 4, 4),
            ("PMUVer", 8, 4),
            ("BRPs", 12, 4),
            ("PMSS", 16, 4),
            ("WRPs", 20, 4),
            ("SEBEP", 24, 4),
            ("CTX_CMPs", 28, 4),
            ("PMSVer", 32, 4),
            ("DoubleLock", 36, 4),
            ("TraceFilt", 40, 4),
            ("TraceBuffer", 44, 4),
            ("MTPMU", 48, 4),
            ("BRBE", 52, 4),
            ("ExtTrcBuff", 56, 4),
            ("HPMN0", 60, 4),
        ],
    ),
    (
        0xc030,
        &[
            ("AES", 4, 4),
            ("SHA1", 8, 4),
            ("SHA2", 12, 4),
            ("CRC32", 16, 4),
            ("Atomic", 20, 4),
            ("TME", 24, 4),
            ("RDM", 28, 4),
            ("SHA3", 32, 4),
            ("SM3", 36, 4),
            ("SM4", 40, 4),
            ("DP", 44, 4),
            ("FHM", 48, 4),
            ("TS", 52, 4),
            ("TLB", 56, 4),
            ("RNDR", 60, 4),
        ],
    ),
    (
        0xc031,
        &[
            ("DPB", 0, 4),
            ("APA", 4, 4),
            ("API", 8, 4),
            ("JSCVT", 12, 4),
            ("FCMA", 16, 4),
            ("LRCPC", 20, 4),
            ("GPA", 24, 4),
            ("GPI", 28, 4),
            ("FRINTTS", 32, 4),
            ("SB", 36, 4),
            ("SPECRES", 40, 4),
            ("BF16", 44, 4),
            ("DGH", 48, 4),
            ("I8MM", 52, 4),
            ("XS", 56, 4),
            ("LS64", 60, 4),
        ],
    ),
    (
        0xc032,
        &[
            ("WFxT", 0, 4),
            ("RPRES", 4, 4),
            ("GPA3", 8, 4),
            ("APA3", 12, 4),
            ("MOPS", 16, 4),
            ("BC", 20, 4),
            ("PAC_frac", 24, 4),
            ("CLRBHB", 28, 4),
            ("SYSREG_128", 32, 4),
            ("SYSINSTR_128", 36, 4),
            ("PRFMSLC", 40, 4),
            ("RPRFM", 48, 4),
            ("CSSC", 52, 4),
            ("LUT", 56, 4),
            ("ATS1A", 60, 4),
        ],
    ),
    (
        0xc038,
        &[
            ("PARange", 0, 4),
            ("ASIDBits", 4, 4),
            ("BigEnd", 8, 4),
            ("SNSMem", 12, 4),
            ("BigEndEL0", 16, 4),
            ("TGran16", 20, 4),
            ("TGran64", 24, 4),
            ("TGran4", 28, 4),
            ("TGran16_2", 32, 4),
            ("TGran64_2", 36, 4),
            ("TGran4_2", 40, 4),
            ("ExS", 44, 4),
            ("FGT", 56, 4),
            ("ECV", 60, 4),
        ],
    ),
    (
        0xc039,
        &[
            ("HAFDBS", 0, 4),
            ("VMIDBits", 4, 4),
            ("VH", 8, 4),
            ("HPDS", 12, 4),
            ("LO", 16, 4),
            ("PAN", 20, 4),
            ("SpecSEI", 24, 4),
            ("XNX", 28, 4),
            ("TWED", 32, 4),
            ("ETS", 36, 4),
            ("HCX", 40, 4),
            ("AFP", 44, 4),
            ("nTLBPA", 48, 4),
            ("TIDCP1", 52, 4),
            ("CMOW", 56, 4),
            ("ECBHB", 60, 4),
        ],
    ),
    (
        0xc03a,
        &[
            ("CnP", 0, 4),
            ("UAO", 4, 4),
            ("LSM", 8, 4),
            ("IESB", 12, 4),
            ("VARange", 16, 4),
            ("CCIDX", 20, 4),
            ("NV", 24, 4),
            ("ST", 28, 4),
            ("AT", 32, 4),
            ("IDS", 36, 4),
            ("FWB", 40, 4),
            ("TTL", 48, 4),
            ("BBM", 52, 4),
            ("EVT", 56, 4),
            ("E0PD", 60, 4),
        ],
    ),
    (
        0xd801,
        &[
            ("IminLine", 0, 4),
            ("L1Ip", 14, 2),
            ("DminLine", 16, 4),
            ("ERG", 20, 4),
            ("CWG", 24, 4),
            ("IDC", 28, 1),
            ("DIC", 29, 1),
            ("TminLine", 32, 6),
        ],
    ),
    (0xd807, &[("BS", 0, 4), ("DZP", 4, 1)]),
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
                "ID_AA64ISAR0_EL1: the snapshot has 0x0000000000000002, this host has 0x0000000000000003: \
                 3:0 0x2, here 0x3",
                "S3_0_C1_C15_7: the snapshot has none, this host has 0x0000000000000004",
            ]
        );
    }

    #[test]
    fn only_the_framework_s_interrupt_controller_is_of_its_own_kind() {
        use BackendKind::{Hvf, Kvm, Soft};
        for (a, b) in [(Soft, Soft), (Soft, Kvm), (Kvm, Soft), (Hvf, Hvf)] {
            assert_eq!(irq_chip(a, b), None);
        }
        let line = irq_chip(Soft, Hvf).unwrap().to_string();
        assert!(line.ends_with("the snapshot has section gicv3, this host has section hvf-gic"));
        assert!(irq_chip(Hvf, Kvm).is_some());
    }

    #[test]
    fn a_register_that_differs_names_its_fields() {
        let with = |value| CpuIdentity { id_registers: vec![(0xc030, value)], ..identity() };
        let found = compare(&with(2 << 20 | 1 << 16 | 2 << 4), &with(1 << 16 | 1 << 4 | 1 << 60));
        let named: Vec<_> =
            found[0].fields.iter().map(|f| (&*f.name, f.snapshot, f.host)).collect();
        assert_eq!(named, [("AES", 2, 1), ("Atomic", 2, 0), ("RNDR", 0, 1)]);
    }

    #[test]
    fn no_two_fields_of_a_register_overlap() {
        for (register, fields) in FIELDS {
            assert!(NAMES.iter().any(|(known, _)| *known == register), "{register:#x}");
            let mut taken = 0u64;
            for (name, lsb, width) in fields {
                let mask = ((1 << width) - 1) << lsb;
                assert_eq!(taken & mask, 0, "{name}");
                taken |= mask;
            }
        }
    }

    #[test]
    fn names_have_the_encodings_of_their_registers() {
        // MRS x0, ID_AA64ISAR0_EL1 is 0xd5380600; bits 20 to 5 are the encoding.
        assert_eq!(name(((0xd538_0600u32 >> 5) & 0xffff) as u16), "ID_AA64ISAR0_EL1");
        // MRS x0, CTR_EL0 is 0xd53b0020.
        assert_eq!(name(((0xd53b_0020u32 >> 5) & 0xffff) as u16), "CTR_EL0");
    }
}
