//! One instruction at a time, from a state of its own, with memory of every kind around it.

use squib_soft::{Counter, Cpu, CpuState, Exit, SysReg};

use crate::common::{BASE, Machine, READ_ONLY, Tables, USER, VALID_PAGE};

pub(crate) const SCTLR_EL1: SysReg = SysReg::new(3, 0, 1, 0, 0);
pub(crate) const CPACR_EL1: SysReg = SysReg::new(3, 0, 1, 0, 2);
pub(crate) const TTBR0_EL1: SysReg = SysReg::new(3, 0, 2, 0, 0);
pub(crate) const TCR_EL1: SysReg = SysReg::new(3, 0, 2, 0, 2);
pub(crate) const SPSR_EL1: SysReg = SysReg::new(3, 0, 4, 0, 0);
pub(crate) const ELR_EL1: SysReg = SysReg::new(3, 0, 4, 0, 1);
pub(crate) const ESR_EL1: SysReg = SysReg::new(3, 0, 5, 2, 0);
pub(crate) const FAR_EL1: SysReg = SysReg::new(3, 0, 6, 0, 0);
pub(crate) const MAIR_EL1: SysReg = SysReg::new(3, 0, 10, 2, 0);
pub(crate) const VBAR_EL1: SysReg = SysReg::new(3, 0, 12, 0, 0);

pub(crate) const SCTLR_M: u64 = 1 << 0;
pub(crate) const SCTLR_A: u64 = 1 << 1;
pub(crate) const SCTLR_SA: u64 = 1 << 3;
pub(crate) const SCTLR_SA0: u64 = 1 << 4;

/// PSTATE of EL0 and of EL1 on SP_EL1, interrupts masked.
pub(crate) const EL0: u64 = 0x3c0;
pub(crate) const EL1: u64 = 0x3c5;

/// Where the instruction lies.
pub(crate) const CODE: u64 = BASE + 0x1_0000;
/// A page of Normal memory that both levels may write to.
pub(crate) const DATA: u64 = BASE + 0x2_0000;
/// The same in Device memory: Attr1.
pub(crate) const DEVICE: u64 = BASE + 0x3_0000;
/// A page of Device memory that is read-only.
pub(crate) const DEVICE_READ_ONLY: u64 = BASE + 0x3_4000;
/// A page of Device memory that is not RAM.
pub(crate) const MMIO: u64 = 0x0900_0000;
const VECTORS: u64 = BASE + 0x8000;
const ATTR1: u64 = 1 << 2;

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// Exception class, the rest of the syndrome without IL, and FAR_EL1.
    Exception(u64, u64, u64),
    Exit(Exit),
}

pub(crate) struct Bench {
    pub(crate) machine: Machine,
    pub(crate) cpu: Cpu,
    root: u64,
    tcr: u64,
}

pub(crate) fn set(state: &mut CpuState, reg: SysReg, value: u64) {
    let slot = state.sysregs.iter_mut().find(|(found, _)| *found == reg);
    slot.expect("a register that is saved").1 = value;
}

pub(crate) fn get(state: &CpuState, reg: SysReg) -> u64 {
    state.sysregs.iter().find(|(found, _)| *found == reg).expect("a register that is saved").1
}

impl Bench {
    pub(crate) fn new() -> Self {
        let machine = Machine::new(Counter::instructions(0));
        let mut tables = Tables::new(&machine, 12);
        tables.map(CODE, CODE, VALID_PAGE | USER | READ_ONLY);
        tables.map(DATA, DATA, VALID_PAGE | USER);
        tables.map(DATA + 0x1000, DATA + 0x1000, VALID_PAGE | USER);
        tables.map(DEVICE, DEVICE, VALID_PAGE | USER | ATTR1);
        tables.map(DEVICE_READ_ONLY, DEVICE_READ_ONLY, VALID_PAGE | USER | READ_ONLY | ATTR1);
        tables.map(MMIO, MMIO, VALID_PAGE | USER | ATTR1);
        let (root, tcr) = (tables.root, tables.tcr() | 2 << 32);
        let cpu = machine.cpu(0);
        Self { machine, cpu, root, tcr }
    }

    /// A state with the MMU on, in which `pstate` executes at [`CODE`].
    pub(crate) fn state(&mut self, pstate: u64) -> CpuState {
        let mut state = self.machine.cpu(0).state();
        (state.pc, state.pstate) = (CODE, pstate);
        (state.sp_el0, state.sp_el1) = (DATA + 0x100, DATA + 0x100);
        for n in 0..31 {
            state.x[n] = DATA + 0x200;
        }
        let sctlr = get(&state, SCTLR_EL1) | SCTLR_M;
        for (reg, value) in [
            (SCTLR_EL1, sctlr),
            (CPACR_EL1, 3 << 20),
            (TTBR0_EL1, self.root),
            (TCR_EL1, self.tcr),
            (MAIR_EL1, 0x00ff),
            (VBAR_EL1, VECTORS),
        ] {
            set(&mut state, reg, value);
        }
        state
    }

    /// Executes `words` from `state`, which becomes what they leave.
    pub(crate) fn run(&mut self, words: &[u32], state: &mut CpuState) -> Outcome {
        self.machine.write(CODE, words);
        self.cpu.set_state(state).expect("a legal state");
        let limit = state.retired + words.len() as u64;
        let exit = self.cpu.run(Some(limit));
        *state = self.cpu.state();
        let vector =
            VECTORS + if state.pstate == EL1 && state.pc & 0x400 != 0 { 0x400 } else { 0x200 };
        match exit {
            Exit::Limit if state.pc == vector => {
                let esr = get(state, ESR_EL1);
                Outcome::Exception(esr >> 26, esr & 0x1ff_ffff, get(state, FAR_EL1))
            }
            Exit::Limit => Outcome::Done,
            exit => Outcome::Exit(exit),
        }
    }

    /// Executes `word` with `prepare`d registers.
    pub(crate) fn one(
        &mut self,
        word: u32,
        pstate: u64,
        prepare: impl Fn(&mut CpuState),
    ) -> Outcome {
        let mut state = self.state(pstate);
        prepare(&mut state);
        self.run(&[word], &mut state)
    }
}
