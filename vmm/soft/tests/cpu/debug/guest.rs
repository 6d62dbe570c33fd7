//! A vCPU whose debug registers the test sets, and whose exceptions it sees.

use squib_soft::{Counter, Cpu, Exit, SysReg};

use crate::common::{BASE, Machine, READ_ONLY, Tables, USER, VALID_PAGE};

pub(super) const MDSCR_EL1: SysReg = SysReg::new(2, 0, 0, 2, 2);
pub(super) const OSLSR_EL1: SysReg = SysReg::new(2, 0, 1, 1, 4);
pub(super) const OSDLR_EL1: SysReg = SysReg::new(2, 0, 1, 3, 4);
pub(super) const SCTLR_EL1: SysReg = SysReg::new(3, 0, 1, 0, 0);
pub(super) const TCR_EL1: SysReg = SysReg::new(3, 0, 2, 0, 2);
pub(super) const TTBR0_EL1: SysReg = SysReg::new(3, 0, 2, 0, 0);
pub(super) const SPSR_EL1: SysReg = SysReg::new(3, 0, 4, 0, 0);
pub(super) const ELR_EL1: SysReg = SysReg::new(3, 0, 4, 0, 1);
pub(super) const ESR_EL1: SysReg = SysReg::new(3, 0, 5, 2, 0);
pub(super) const FAR_EL1: SysReg = SysReg::new(3, 0, 6, 0, 0);
const MAIR_EL1: SysReg = SysReg::new(3, 0, 10, 2, 0);
pub(super) const VBAR_EL1: SysReg = SysReg::new(3, 0, 12, 0, 0);
pub(super) const CPACR_EL1: SysReg = SysReg::new(3, 0, 1, 0, 2);
pub(super) const CONTEXTIDR_EL1: SysReg = SysReg::new(3, 0, 13, 0, 1);

pub(super) const fn bvr(n: u16) -> SysReg {
    SysReg::new(2, 0, 0, n, 4)
}
pub(super) const fn bcr(n: u16) -> SysReg {
    SysReg::new(2, 0, 0, n, 5)
}
pub(super) const fn wvr(n: u16) -> SysReg {
    SysReg::new(2, 0, 0, n, 6)
}
pub(super) const fn wcr(n: u16) -> SysReg {
    SysReg::new(2, 0, 0, n, 7)
}

pub(super) const SS: u64 = 1 << 0;
pub(super) const KDE: u64 = 1 << 13;
pub(super) const MDE: u64 = 1 << 15;

// SPSR_EL1.
pub(super) const EL0: u64 = 0;
pub(super) const EL1H: u64 = 5;
pub(super) const MASKED: u64 = 0xf << 6;
pub(super) const D: u64 = 1 << 9;
pub(super) const IL: u64 = 1 << 20;
pub(super) const SPSR_SS: u64 = 1 << 21;

// ESR_EL1 of the exceptions that tests meet, with IL.
const ESR_IL: u64 = 1 << 25;
pub(super) const UNKNOWN: u64 = ESR_IL;
pub(super) const fn svc(imm: u64) -> u64 {
    0x15 << 26 | ESR_IL | imm
}
pub(super) const fn brk(imm: u64) -> u64 {
    0x3c << 26 | ESR_IL | imm
}
/// A step's exception, with ISV and with or without EX.
pub(super) const fn stepped(exclusive: bool) -> u64 {
    PENDING | 1 << 24 | (exclusive as u64) << 6
}
/// A step's exception at EL0 before an instruction was stepped.
pub(super) const PENDING: u64 = 0x32 << 26 | ESR_IL | 0x22;
pub(super) const BREAKPOINT: u64 = 0x30 << 26 | ESR_IL | 0x22;
/// A watchpoint met at EL0.
pub(super) const fn watchpoint(write: bool) -> u64 {
    0x34 << 26 | ESR_IL | 0x22 | (write as u64) << 6
}
/// The same exceptions at EL1.
pub(super) const SAME_EL: u64 = 1 << 26;

/// Where the program of a test lies, and data that it may use.
pub(super) const CODE: u64 = BASE + 0x1_0000;
pub(super) const DATA: u64 = BASE + 0x10_0000;
/// No RAM.
pub(super) const DEVICE: u64 = 0x0e0a_0000;

const VECTORS: u64 = BASE + 0x2000;
const ERET: u64 = BASE + 0x1000;

/// Offsets of the vectors that tests meet.
pub(super) const SYNC_EL1: u16 = 0x200;
pub(super) const SYNC_EL0: u16 = 0x400;
pub(super) const IRQ_EL0: u16 = 0x480;

/// An exception as its handler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) vector: u16,
    pub(super) esr: u64,
    pub(super) elr: u64,
    pub(super) spsr: u64,
}

pub(super) struct Guest {
    pub(super) machine: Machine,
    pub(super) cpu: Cpu,
}

impl Guest {
    /// A machine with `words` at [`CODE`]: MMU off, FP on, OS lock unlocked, nothing set up.
    pub(super) fn new(words: &[u32]) -> Self {
        let machine = Machine::new(Counter::instructions(0));
        // Each vector shows where it lies, then returns.
        for vector in (0..0x800).step_by(0x80) {
            let hvc = 0xd400_0002 | vector << 5;
            machine.write(VECTORS + u64::from(vector), &[hvc, 0xd69f_03e0]);
        }
        machine.write(ERET, &[0xd69f_03e0]);
        machine.write(CODE, words);
        let cpu = machine.cpu(0);
        let mut guest = Self { machine, cpu };
        guest.set(&[(VBAR_EL1, VECTORS), (OSLSR_EL1, 8), (CPACR_EL1, 3 << 20)]);
        guest
    }

    /// Turns the MMU on, so that data need not be aligned: [`CODE`] and [`DATA`] with its neighbours are
    /// EL0's.
    pub(super) fn use_normal_memory(&mut self) {
        let (tcr, root) = {
            let mut tables = Tables::new(&self.machine, 12);
            for page in [BASE, ERET, VECTORS] {
                tables.map(page, page, VALID_PAGE);
            }
            tables.map(CODE, CODE, VALID_PAGE | USER | READ_ONLY);
            for page in [DATA - 0x1000, DATA, DATA + 0x1000] {
                tables.map(page, page, VALID_PAGE | USER);
            }
            (tables.tcr() | 1 << 23, tables.root)
        };
        let sctlr = self.get(SCTLR_EL1) | 1;
        let on = [(MAIR_EL1, 0xff), (TCR_EL1, tcr), (TTBR0_EL1, root), (SCTLR_EL1, sctlr)];
        self.set(&on);
    }

    pub(super) fn get(&mut self, reg: SysReg) -> u64 {
        let state = self.cpu.state();
        state.sysregs.iter().find(|(r, _)| *r == reg).expect("it is saved").1
    }

    /// Sets system registers as a restored snapshot does.
    pub(super) fn set(&mut self, values: &[(SysReg, u64)]) {
        let mut state = self.cpu.state();
        for (reg, value) in values {
            let slot = state.sysregs.iter_mut().find(|(r, _)| r == reg);
            slot.expect("it is saved").1 = *value;
        }
        self.cpu.set_state(&state).unwrap();
    }

    /// Lets EL1 return to `pc` with `spsr`.
    pub(super) fn enter(&mut self, pc: u64, spsr: u64) -> Taken {
        self.prepare(pc, spsr);
        self.until_taken()
    }

    /// As [`enter`](Self::enter), up to the return.
    pub(super) fn prepare(&mut self, pc: u64, spsr: u64) {
        self.set(&[(ELR_EL1, pc), (SPSR_EL1, spsr)]);
        let mut state = self.cpu.state();
        (state.pc, state.pstate) = (ERET, EL1H | MASKED);
        self.cpu.set_state(&state).unwrap();
    }

    /// Returns from the exception that was taken last, with `spsr`.
    pub(super) fn go_on(&mut self, spsr: u64) -> Taken {
        self.set(&[(SPSR_EL1, spsr)]);
        self.until_taken()
    }

    pub(super) fn until_taken(&mut self) -> Taken {
        match self.cpu.run(Some(1 << 20)) {
            Exit::Hvc { imm } => self.taken(imm),
            other => panic!("{other:?} at {:#x}", self.cpu.pc()),
        }
    }

    pub(super) fn taken(&mut self, vector: u16) -> Taken {
        let (esr, elr) = (self.get(ESR_EL1), self.get(ELR_EL1));
        Taken { vector, esr, elr, spsr: self.get(SPSR_EL1) }
    }
}

/// An exception from EL0 that returns to `elr`; SPSR_EL1 has no more than `spsr`.
pub(super) fn from_el0(esr: u64, elr: u64, spsr: u64) -> Taken {
    Taken { vector: SYNC_EL0, esr, elr, spsr }
}
