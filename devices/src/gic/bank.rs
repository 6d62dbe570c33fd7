//! The state of 32 interrupts, and the registers through which it is seen: the same in GICD (SPIs)
//! and in a redistributor's SGI frame (SGIs and PPIs).

use super::{Group, spec::PRIORITY_MASK};

/// 32 interrupts; bit n of each word is interrupt n.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bank {
    /// Set: Group 1.
    pub(super) group: u32,
    pub(super) enabled: u32,
    /// Pending by an edge, by a write to ISPENDR, or as an SGI. A level-sensitive interrupt is also
    /// pending while its line is high, see [`pending`](Self::pending).
    pub(super) latch: u32,
    pub(super) active: u32,
    /// Input lines.
    pub(super) line: u32,
    /// Set: edge-triggered.
    pub(super) edge: u32,
    pub(super) priority: [u8; 32],
}

/// A register of the block that GICD and the SGI frame have in common, for one bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BankRegister {
    Group,
    SetEnable,
    ClearEnable,
    SetPending,
    ClearPending,
    SetActive,
    ClearActive,
    /// IPRIORITYR, from this interrupt of the bank on.
    Priority(usize),
    /// ICFGR of interrupts 0 to 15 or, if set, 16 to 31.
    Config(bool),
}

impl BankRegister {
    /// The register at `offset` of an access of `size` bytes, and the number of its bank.
    pub(super) fn decode(offset: u64, size: u8) -> Option<(usize, Self)> {
        let word = |index: u64, register| Some(((index / 4) as usize, register));
        match (offset, size) {
            (0x400..0x800, 1) | (0x400..0x800, 4) => {
                let intid = (offset - 0x400) as usize;
                Some((intid / 32, Self::Priority(intid % 32)))
            }
            (0x080..0x100, 4) => word(offset - 0x080, Self::Group),
            (0x100..0x180, 4) => word(offset - 0x100, Self::SetEnable),
            (0x180..0x200, 4) => word(offset - 0x180, Self::ClearEnable),
            (0x200..0x280, 4) => word(offset - 0x200, Self::SetPending),
            (0x280..0x300, 4) => word(offset - 0x280, Self::ClearPending),
            (0x300..0x380, 4) => word(offset - 0x300, Self::SetActive),
            (0x380..0x400, 4) => word(offset - 0x380, Self::ClearActive),
            (0xc00..0xd00, 4) => {
                let index = (offset - 0xc00) as usize / 4;
                Some((index / 2, Self::Config(index % 2 == 1)))
            }
            _ => None,
        }
    }
}

impl Bank {
    /// The reset state: Group 0, disabled, priority 0; those in `edge` are edge-triggered.
    pub(super) fn new(edge: u32) -> Self {
        Self { group: 0, enabled: 0, latch: 0, active: 0, line: 0, edge, priority: [0; 32] }
    }

    /// Interrupts in the pending state, or in active and pending.
    pub(super) fn pending(&self) -> u32 {
        self.latch | self.line & !self.edge
    }

    /// Drives the line of interrupt `n`.
    pub(super) fn set_line(&mut self, n: u32, level: bool) {
        let bit = 1 << n;
        if level {
            self.latch |= bit & self.edge & !self.line;
            self.line |= bit;
        } else {
            self.line &= !bit;
        }
    }

    /// Makes interrupt `n` active. A level that is still high leaves it active and pending.
    pub(super) fn acknowledge(&mut self, n: u32) {
        self.latch &= !(1 << n);
        self.active |= 1 << n;
    }

    /// Group of interrupt `n`.
    pub(super) fn group_of(&self, n: u32) -> Group {
        if self.group >> n & 1 == 1 { Group::One } else { Group::Zero }
    }

    /// Of the interrupts in `among` that could be signalled, the one with the highest priority, then
    /// the lowest number, and its priority.
    pub(super) fn best(&self, among: u32) -> Option<(u32, u8)> {
        let mut left = among & self.pending() & self.enabled & !self.active;
        let mut best = None;
        while left != 0 {
            let n = left.trailing_zeros();
            left &= left - 1;
            let priority = self.priority[n as usize];
            if best.is_none_or(|(_, than)| priority < than) {
                best = Some((n, priority));
            }
        }
        best
    }

    pub(super) fn read(&self, register: BankRegister, size: u8) -> u32 {
        match register {
            BankRegister::Group => self.group,
            BankRegister::SetEnable | BankRegister::ClearEnable => self.enabled,
            BankRegister::SetPending | BankRegister::ClearPending => self.pending(),
            BankRegister::SetActive | BankRegister::ClearActive => self.active,
            BankRegister::Priority(first) => (0..usize::from(size))
                .filter_map(|i| Some(u32::from(*self.priority.get(first + i)?) << (8 * i)))
                .fold(0, |word, byte| word | byte),
            BankRegister::Config(high) => {
                let half = if high { self.edge >> 16 } else { self.edge & 0xffff };
                (0..16).map(|i| (half >> i & 1) << (2 * i + 1)).fold(0, |word, bit| word | bit)
            }
        }
    }

    /// Writes a register; interrupts in `fixed` keep their trigger mode.
    pub(super) fn write(&mut self, register: BankRegister, size: u8, value: u32, fixed: u32) {
        match register {
            BankRegister::Group => self.group = value,
            BankRegister::SetEnable => self.enabled |= value,
            BankRegister::ClearEnable => self.enabled &= !value,
            BankRegister::SetPending => self.latch |= value,
            BankRegister::ClearPending => self.latch &= !value,
            BankRegister::SetActive => self.active |= value,
            BankRegister::ClearActive => self.active &= !value,
            BankRegister::Priority(first) => {
                for (i, byte) in value.to_le_bytes().into_iter().take(usize::from(size)).enumerate()
                {
                    if let Some(priority) = self.priority.get_mut(first + i) {
                        *priority = byte & PRIORITY_MASK;
                    }
                }
            }
            BankRegister::Config(high) => {
                let half = (0..16).map(|i| (value >> (2 * i + 1) & 1) << i).fold(0, |w, b| w | b);
                let (edge, written) =
                    if high { (half << 16, 0xffff_0000) } else { (half, 0x0000_ffff) };
                let written = written & !fixed;
                self.edge = self.edge & !written | edge & written;
            }
        }
    }
}
