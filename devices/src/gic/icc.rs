//! The CPU interface of one vCPU: priorities, and the system registers that do not touch interrupts.

use super::{
    Group,
    core::Pending,
    spec::{IDLE_PRIORITY, PRIORITY_BITS, PRIORITY_MASK, icc},
};

/// Smallest ICC_BPR0_EL1: all implemented bits are group priority (section 4.8.2).
pub(super) const MIN_BPR0: u8 = 7 - PRIORITY_BITS as u8;
/// Smallest ICC_BPR1_EL1: its binary point stands one bit further right.
pub(super) const MIN_BPR1: u8 = MIN_BPR0 + 1;
/// Greatest binary point.
pub(super) const MAX_BPR: u8 = 7;

/// The registers of one CPU interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Icc {
    /// ICC_PMR_EL1.
    pub(super) pmr: u8,
    /// ICC_BPR0_EL1.
    pub(super) bpr0: u8,
    /// ICC_BPR1_EL1 as it is used while ICC_CTLR_EL1.CBPR is clear.
    pub(super) bpr1: u8,
    /// ICC_CTLR_EL1.CBPR: Group 1 uses ICC_BPR0_EL1.
    pub(super) common_bpr: bool,
    /// ICC_CTLR_EL1.EOImode: EOIR drops the priority only, DIR deactivates.
    pub(super) eoi_mode: bool,
    /// ICC_IGRPEN0_EL1, ICC_IGRPEN1_EL1.
    pub(super) group_enabled: [bool; 2],
    /// ICC_AP0R0_EL1, ICC_AP1R0_EL1: bit n is group priority n << 3.
    pub(super) active_priorities: [u32; 2],
}

impl Icc {
    pub(super) fn new() -> Self {
        Self {
            pmr: 0,
            bpr0: MIN_BPR0,
            bpr1: MIN_BPR1,
            common_bpr: false,
            eoi_mode: false,
            group_enabled: [false; 2],
            active_priorities: [0; 2],
        }
    }

    /// The running priority (ICC_RPR_EL1).
    pub(super) fn running_priority(&self) -> u8 {
        match self.active_priorities[0] | self.active_priorities[1] {
            0 => IDLE_PRIORITY,
            active => (active.trailing_zeros() as u8) << (8 - PRIORITY_BITS),
        }
    }

    /// True if `pending` has a priority high enough to be signalled now.
    pub(super) fn can_signal(&self, pending: &Pending) -> bool {
        pending.priority < self.pmr
            && self.group_priority(pending.priority, pending.group) < self.running_priority()
    }

    /// Takes the priority of an interrupt that was just acknowledged.
    pub(super) fn activate(&mut self, pending: &Pending) {
        let group_priority = self.group_priority(pending.priority, pending.group);
        self.active_priorities[pending.group as usize] |=
            1 << (group_priority >> (8 - PRIORITY_BITS));
    }

    /// Priority drop: ends the highest active priority if it belongs to `group`.
    pub(super) fn drop_priority(&mut self, group: Group) -> bool {
        let own = self.active_priorities[group as usize];
        let other = self.active_priorities[1 - group as usize];
        // Where both groups have the same priority active, each may end its own.
        if own == 0 || own.trailing_zeros() > other.trailing_zeros() {
            return false;
        }
        self.active_priorities[group as usize] = own & (own - 1);
        true
    }

    pub(super) fn read(&self, reg: u16) -> Option<u64> {
        Some(match reg {
            icc::ICC_PMR_EL1 => self.pmr.into(),
            icc::ICC_BPR0_EL1 => self.bpr0.into(),
            icc::ICC_BPR1_EL1 if self.common_bpr => (self.bpr0 + 1).min(MAX_BPR).into(),
            icc::ICC_BPR1_EL1 => self.bpr1.into(),
            icc::ICC_AP0R0_EL1 => self.active_priorities[0].into(),
            icc::ICC_AP1R0_EL1 => self.active_priorities[1].into(),
            icc::ICC_RPR_EL1 => self.running_priority().into(),
            icc::ICC_CTLR_EL1 => {
                (if self.common_bpr { icc::CTLR_CBPR } else { 0 })
                    | (if self.eoi_mode { icc::CTLR_EOIMODE } else { 0 })
                    | u64::from(PRIORITY_BITS - 1) << icc::CTLR_PRIBITS_SHIFT
                    | icc::CTLR_A3V
            }
            icc::ICC_SRE_EL1 => icc::SRE,
            icc::ICC_IGRPEN0_EL1 => self.group_enabled[0].into(),
            icc::ICC_IGRPEN1_EL1 => self.group_enabled[1].into(),
            _ => return None,
        })
    }

    pub(super) fn write(&mut self, reg: u16, value: u64) -> bool {
        let binary_point = (value & 7) as u8;
        match reg {
            icc::ICC_PMR_EL1 => self.pmr = value as u8 & PRIORITY_MASK,
            icc::ICC_BPR0_EL1 => self.bpr0 = binary_point.max(MIN_BPR0),
            // With a common binary point, ICC_BPR1_EL1 is only a view of ICC_BPR0_EL1.
            icc::ICC_BPR1_EL1 if self.common_bpr => {}
            icc::ICC_BPR1_EL1 => self.bpr1 = binary_point.max(MIN_BPR1),
            icc::ICC_AP0R0_EL1 => self.active_priorities[0] = value as u32,
            icc::ICC_AP1R0_EL1 => self.active_priorities[1] = value as u32,
            icc::ICC_CTLR_EL1 => {
                self.common_bpr = value & icc::CTLR_CBPR != 0;
                self.eoi_mode = value & icc::CTLR_EOIMODE != 0;
            }
            // SRE, DFB and DIB are RAO/WI.
            icc::ICC_SRE_EL1 => {}
            icc::ICC_IGRPEN0_EL1 => self.group_enabled[0] = value & 1 != 0,
            icc::ICC_IGRPEN1_EL1 => self.group_enabled[1] = value & 1 != 0,
            _ => return false,
        }
        true
    }

    /// The bits of `priority` that decide about preemption (section 4.8.2, table 4-9).
    fn group_priority(&self, priority: u8, group: Group) -> u8 {
        let point = match group {
            Group::One if !self.common_bpr => self.bpr1 - 1,
            _ => self.bpr0,
        };
        // Bits 7 to point + 1; none for the greatest binary point.
        priority & (0xfe_u32 << point) as u8
    }
}
