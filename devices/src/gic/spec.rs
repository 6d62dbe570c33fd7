//! Register offsets and encodings (Arm IHI 0069H, sections 12.2, 12.8, 12.9, 12.11).

/// Bits of priority that are implemented, from the top: 32 levels (section 4.8).
pub(super) const PRIORITY_BITS: u32 = 5;
/// The implemented bits of a priority.
pub(super) const PRIORITY_MASK: u8 = 0xff << (8 - PRIORITY_BITS);
/// Running priority when no interrupt is active.
pub(super) const IDLE_PRIORITY: u8 = 0xff;
/// INTID that means no interrupt (section 2.2.1).
pub(super) const SPURIOUS: u32 = 1023;
/// First of the INTIDs with special meaning.
pub(super) const SPECIAL_BASE: u32 = 1020;

/// GICD registers by offset.
pub(super) mod gicd {
    pub(in crate::gic) const CTLR: u64 = 0x0000;
    pub(in crate::gic) const TYPER: u64 = 0x0004;
    pub(in crate::gic) const IIDR: u64 = 0x0008;
    pub(in crate::gic) const IROUTER: u64 = 0x6000;

    pub(in crate::gic) const CTLR_ENABLE_GRP0: u32 = 1 << 0;
    pub(in crate::gic) const CTLR_ENABLE_GRP1: u32 = 1 << 1;
    /// Affinity routing cannot be turned off.
    pub(in crate::gic) const CTLR_ARE: u32 = 1 << 4;
    /// There is one Security state.
    pub(in crate::gic) const CTLR_DS: u32 = 1 << 6;
    /// What a guest can change.
    pub(in crate::gic) const CTLR_WRITABLE: u32 = CTLR_ENABLE_GRP0 | CTLR_ENABLE_GRP1;

    /// INTIDs of 10 bits: there are no LPIs.
    pub(in crate::gic) const TYPER_ID_BITS: u32 = 9 << 19;
    /// Affinity level 3 may be other than zero in SGIs and routers (it then matches no vCPU).
    pub(in crate::gic) const TYPER_A3V: u32 = 1 << 24;

    /// IROUTER.Interrupt_Routing_Mode: any participating vCPU.
    pub(in crate::gic) const IROUTER_IRM: u64 = 1 << 31;
    /// The bits of IROUTER that are not RES0.
    pub(in crate::gic) const IROUTER_MASK: u64 = 0xff_80ff_ffff;
}

/// GICR registers by offset from RD_base.
pub(super) mod gicr {
    pub(in crate::gic) const CTLR: u64 = 0x0000;
    pub(in crate::gic) const IIDR: u64 = 0x0004;
    pub(in crate::gic) const TYPER: u64 = 0x0008;
    pub(in crate::gic) const WAKER: u64 = 0x0014;
    /// Offset of SGI_base from RD_base.
    pub(in crate::gic) const SGI_BASE: u64 = 0x1_0000;

    pub(in crate::gic) const TYPER_LAST: u64 = 1 << 4;
    pub(in crate::gic) const WAKER_PROCESSOR_SLEEP: u32 = 1 << 1;
    pub(in crate::gic) const WAKER_CHILDREN_ASLEEP: u32 = 1 << 2;
}

/// GICD_IIDR and GICR_IIDR: product "S", implementer Arm (JEP106 0x43B), as software models say.
pub(super) const IIDR: u32 = 0x5300_043b;

/// Offset of PIDR4, the first of the twelve identification registers that end a frame.
pub(super) const ID_REGISTERS: u64 = 0xffd0;

/// PIDR4 to PIDR7, PIDR0 to PIDR3, CIDR0 to CIDR3. PIDR2 (0xFFE8) holds ArchRev 3: GICv3.
pub(super) const ID_VALUES: [u32; 12] =
    [0x44, 0, 0, 0, 0x92, 0xb4, 0x3b, 0, 0x0d, 0xf0, 0x05, 0xb1];

/// The CPU interface's system registers, packed as op0:op1:CRn:CRm:op2.
pub mod icc {
    const fn reg(crn: u16, crm: u16, op2: u16) -> u16 {
        3 << 14 | crn << 7 | crm << 3 | op2
    }

    /// Priority mask.
    pub const ICC_PMR_EL1: u16 = reg(4, 6, 0);
    /// Acknowledges a Group 0 interrupt.
    pub const ICC_IAR0_EL1: u16 = reg(12, 8, 0);
    /// End of a Group 0 interrupt.
    pub const ICC_EOIR0_EL1: u16 = reg(12, 8, 1);
    /// Highest priority pending Group 0 interrupt.
    pub const ICC_HPPIR0_EL1: u16 = reg(12, 8, 2);
    /// Binary point of Group 0.
    pub const ICC_BPR0_EL1: u16 = reg(12, 8, 3);
    /// Active priorities of Group 0.
    pub const ICC_AP0R0_EL1: u16 = reg(12, 8, 4);
    /// Active priorities of Group 1.
    pub const ICC_AP1R0_EL1: u16 = reg(12, 9, 0);
    /// Deactivates an interrupt.
    pub const ICC_DIR_EL1: u16 = reg(12, 11, 1);
    /// Running priority.
    pub const ICC_RPR_EL1: u16 = reg(12, 11, 3);
    /// Generates Group 1 SGIs.
    pub const ICC_SGI1R_EL1: u16 = reg(12, 11, 5);
    /// Generates SGIs of the other Security state.
    pub const ICC_ASGI1R_EL1: u16 = reg(12, 11, 6);
    /// Generates Group 0 SGIs.
    pub const ICC_SGI0R_EL1: u16 = reg(12, 11, 7);
    /// Acknowledges a Group 1 interrupt.
    pub const ICC_IAR1_EL1: u16 = reg(12, 12, 0);
    /// End of a Group 1 interrupt.
    pub const ICC_EOIR1_EL1: u16 = reg(12, 12, 1);
    /// Highest priority pending Group 1 interrupt.
    pub const ICC_HPPIR1_EL1: u16 = reg(12, 12, 2);
    /// Binary point of Group 1.
    pub const ICC_BPR1_EL1: u16 = reg(12, 12, 3);
    /// Control.
    pub const ICC_CTLR_EL1: u16 = reg(12, 12, 4);
    /// System register enable.
    pub const ICC_SRE_EL1: u16 = reg(12, 12, 5);
    /// Group 0 enable.
    pub const ICC_IGRPEN0_EL1: u16 = reg(12, 12, 6);
    /// Group 1 enable.
    pub const ICC_IGRPEN1_EL1: u16 = reg(12, 12, 7);

    pub(in crate::gic) const CTLR_CBPR: u64 = 1 << 0;
    pub(in crate::gic) const CTLR_EOIMODE: u64 = 1 << 1;
    pub(in crate::gic) const CTLR_PRIBITS_SHIFT: u32 = 8;
    pub(in crate::gic) const CTLR_A3V: u64 = 1 << 15;
    /// SRE, DFB and DIB: system registers only, no bypass.
    pub(in crate::gic) const SRE: u64 = 7;
}
