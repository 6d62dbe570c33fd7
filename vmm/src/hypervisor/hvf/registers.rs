//! The registers of a vCPU that are its state, as the framework names them.

use applevisor::prelude::{FeatureReg, GicIccReg, Reg, SimdFpReg, SysReg};

macro_rules! all_of {
    ($kind:ident: $($name:ident)*) => { [$($kind::$name),*] };
}

/// X0 to X30.
pub(super) const X: [Reg; 31] = all_of!(Reg:
    X0 X1 X2 X3 X4 X5 X6 X7 X8 X9 X10 X11 X12 X13 X14 X15
    X16 X17 X18 X19 X20 X21 X22 X23 X24 X25 X26 X27 X28 X29 X30);

/// V0 to V31.
pub(super) const V: [SimdFpReg; 32] = all_of!(SimdFpReg:
    Q0 Q1 Q2 Q3 Q4 Q5 Q6 Q7 Q8 Q9 Q10 Q11 Q12 Q13 Q14 Q15
    Q16 Q17 Q18 Q19 Q20 Q21 Q22 Q23 Q24 Q25 Q26 Q27 Q28 Q29 Q30 Q31);

/// The interrupt controller's CPU interface. ICC_RPR_EL1 follows from the others; SRE_EL2 is not the guest's.
pub(super) const ICC: [GicIccReg; 9] = all_of!(GicIccReg:
    SRE_EL1 CTLR_EL1 PMR_EL1 BPR0_EL1 BPR1_EL1 AP0R0_EL1 AP1R0_EL1 IGRPEN0_EL1 IGRPEN1_EL1);

/// Those of [`ICC`] without which a guest does not go on.
pub(super) const NEEDED_ICC: [GicIccReg; 5] =
    all_of!(GicIccReg: CTLR_EL1 PMR_EL1 BPR1_EL1 AP1R0_EL1 IGRPEN1_EL1);

/// What the guest can learn about its CPU, with the register it reads.
pub(super) const FEATURES: [(FeatureReg, u16); 12] = [
    (FeatureReg::ID_AA64DFR0_EL1, 0xc028),
    (FeatureReg::ID_AA64DFR1_EL1, 0xc029),
    (FeatureReg::ID_AA64ISAR0_EL1, 0xc030),
    (FeatureReg::ID_AA64ISAR1_EL1, 0xc031),
    (FeatureReg::ID_AA64MMFR0_EL1, 0xc038),
    (FeatureReg::ID_AA64MMFR1_EL1, 0xc039),
    (FeatureReg::ID_AA64MMFR2_EL1, 0xc03a),
    (FeatureReg::ID_AA64PFR0_EL1, 0xc020),
    (FeatureReg::ID_AA64PFR1_EL1, 0xc021),
    (FeatureReg::CTR_EL0, 0xd801),
    (FeatureReg::CLIDR_EL1, 0xc801),
    (FeatureReg::DCZID_EL0, 0xd807),
];

/// ID_AA64PFR1_EL1.SME. Its registers are no part of the state that is saved, so the guest must not have it.
pub(super) const PFR1_SME: u64 = 0xf << 24;

/// Every system register of EL0 and EL1 that the framework of macOS 15.0 names, in the order in which they
/// are set: identity first, MMU last but for the timer, which may fire at once.
/// SP_EL0 and SP_EL1 have fields of their own.
pub(super) const SYSTEM: [SysReg; 109] = all_of!(SysReg:
    MIDR_EL1 MPIDR_EL1 ID_AA64PFR0_EL1 ID_AA64PFR1_EL1 ID_AA64DFR0_EL1 ID_AA64DFR1_EL1
    ID_AA64ISAR0_EL1 ID_AA64ISAR1_EL1 ID_AA64MMFR0_EL1 ID_AA64MMFR1_EL1 ID_AA64MMFR2_EL1
    DBGBVR0_EL1 DBGBCR0_EL1 DBGWVR0_EL1 DBGWCR0_EL1 DBGBVR1_EL1 DBGBCR1_EL1 DBGWVR1_EL1 DBGWCR1_EL1
    DBGBVR2_EL1 DBGBCR2_EL1 DBGWVR2_EL1 DBGWCR2_EL1 DBGBVR3_EL1 DBGBCR3_EL1 DBGWVR3_EL1 DBGWCR3_EL1
    DBGBVR4_EL1 DBGBCR4_EL1 DBGWVR4_EL1 DBGWCR4_EL1 DBGBVR5_EL1 DBGBCR5_EL1 DBGWVR5_EL1 DBGWCR5_EL1
    DBGBVR6_EL1 DBGBCR6_EL1 DBGWVR6_EL1 DBGWCR6_EL1 DBGBVR7_EL1 DBGBCR7_EL1 DBGWVR7_EL1 DBGWCR7_EL1
    DBGBVR8_EL1 DBGBCR8_EL1 DBGWVR8_EL1 DBGWCR8_EL1 DBGBVR9_EL1 DBGBCR9_EL1 DBGWVR9_EL1 DBGWCR9_EL1
    DBGBVR10_EL1 DBGBCR10_EL1 DBGWVR10_EL1 DBGWCR10_EL1
    DBGBVR11_EL1 DBGBCR11_EL1 DBGWVR11_EL1 DBGWCR11_EL1
    DBGBVR12_EL1 DBGBCR12_EL1 DBGWVR12_EL1 DBGWCR12_EL1
    DBGBVR13_EL1 DBGBCR13_EL1 DBGWVR13_EL1 DBGWCR13_EL1
    DBGBVR14_EL1 DBGBCR14_EL1 DBGWVR14_EL1 DBGWCR14_EL1
    DBGBVR15_EL1 DBGBCR15_EL1 DBGWVR15_EL1 DBGWCR15_EL1
    MDCCINT_EL1 MDSCR_EL1
    ACTLR_EL1 CPACR_EL1 TTBR0_EL1 TTBR1_EL1 TCR_EL1 MAIR_EL1 AMAIR_EL1
    APIAKEYLO_EL1 APIAKEYHI_EL1 APIBKEYLO_EL1 APIBKEYHI_EL1 APDAKEYLO_EL1 APDAKEYHI_EL1
    APDBKEYLO_EL1 APDBKEYHI_EL1 APGAKEYLO_EL1 APGAKEYHI_EL1
    SPSR_EL1 ELR_EL1 AFSR0_EL1 AFSR1_EL1 ESR_EL1 FAR_EL1 PAR_EL1 VBAR_EL1
    CONTEXTIDR_EL1 TPIDR_EL1 CSSELR_EL1 TPIDR_EL0 TPIDRRO_EL0 SCTLR_EL1
    CNTKCTL_EL1);

/// The timers: the control registers are set last. CNTP is not there on every host.
pub(super) const TIMERS: [SysReg; 4] =
    all_of!(SysReg: CNTV_CVAL_EL0 CNTV_CTL_EL0 CNTP_CVAL_EL0 CNTP_CTL_EL0);

/// Those of [`SYSTEM`] and [`TIMERS`] without which a guest does not go on, or goes on as another.
pub(super) const NEEDED: [SysReg; 33] = all_of!(SysReg:
    MIDR_EL1 MPIDR_EL1 CPACR_EL1 TTBR0_EL1 TTBR1_EL1 TCR_EL1 MAIR_EL1
    APIAKEYLO_EL1 APIAKEYHI_EL1 APIBKEYLO_EL1 APIBKEYHI_EL1 APDAKEYLO_EL1 APDAKEYHI_EL1
    APDBKEYLO_EL1 APDBKEYHI_EL1 APGAKEYLO_EL1 APGAKEYHI_EL1
    SPSR_EL1 ELR_EL1 ESR_EL1 FAR_EL1 PAR_EL1 VBAR_EL1 CONTEXTIDR_EL1 TPIDR_EL1 TPIDR_EL0
    TPIDRRO_EL0 SCTLR_EL1 CNTKCTL_EL1 CNTV_CVAL_EL0 CNTV_CTL_EL0
    MDSCR_EL1 CSSELR_EL1);

/// All system registers of the state but the stack pointers, in the order in which they are set.
pub(super) fn system() -> impl Iterator<Item = SysReg> {
    SYSTEM.into_iter().chain(TIMERS)
}
