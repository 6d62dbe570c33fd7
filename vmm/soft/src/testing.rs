//! Single instructions on a plain register state, for the differential tests.

use crate::mmu::Access;
use crate::regs::{Regs, SP};
use crate::shared::Place;
use crate::simd;

/// What an EL0 program sees of a CPU, without memory and PC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// X0 to X30.
    pub x: [u64; 31],
    /// The stack pointer.
    pub sp: u64,
    /// N, Z, C and V in bits 31 to 28.
    pub nzcv: u32,
    /// FPCR.
    pub fpcr: u32,
    /// FPSR.
    pub fpsr: u32,
    /// V0 to V31.
    pub v: [u128; 32],
}

impl State {
    fn to_regs(&self) -> Regs {
        let mut regs = Regs::new();
        regs.x[..31].copy_from_slice(&self.x);
        regs.x[usize::from(SP)] = self.sp;
        regs.set_nzcv(self.nzcv);
        regs.fpcr = self.fpcr;
        regs.fpsr = self.fpsr;
        regs.v = self.v;
        regs
    }

    fn set_from(&mut self, regs: &Regs) {
        self.x.copy_from_slice(&regs.x[..31]);
        self.sp = regs.x[usize::from(SP)];
        self.nzcv = regs.nzcv();
        self.fpcr = regs.fpcr;
        self.fpsr = regs.fpsr;
        self.v = regs.v;
    }
}

/// Carries out one instruction of the encoding group `insn<27:25> == 111` on `state`.
///
/// Answers false, with `state` as it was, where the encoding is unallocated.
pub fn execute_data(insn: u32, state: &mut State) -> bool {
    let Some(function) = simd::decode(insn) else {
        return false;
    };
    let mut regs = state.to_regs();
    function(&mut regs, insn);
    state.set_from(&regs);
    true
}

/// One decoded instruction of the encoding group `insn<27:25> == 111` and the registers it works on,
/// for benches.
pub struct Repeated {
    function: simd::DataFn,
    insn: u32,
    regs: Regs,
}

impl Repeated {
    /// Decodes `insn`; `None` where the encoding is unallocated.
    pub fn new(insn: u32, state: &State) -> Option<Self> {
        Some(Self { function: simd::decode(insn)?, insn, regs: state.to_regs() })
    }

    /// Carries it out `count` times.
    pub fn run(&mut self, count: u32) {
        for _ in 0..count {
            let function = std::hint::black_box(self.function);
            function(&mut self.regs, self.insn);
        }
    }
}

impl crate::Cpu {
    /// The instruction at `va` as the vCPU would fetch it now; `None` where it cannot. Called between two
    /// runs.
    pub fn instruction_at(&self, va: u64) -> Option<u32> {
        let pa = self.translate(va, Access::Execute, self.regime).ok()?.pa;
        match self.shared.ram.place(pa, 4, false) {
            Place::Ram(host) if va.is_multiple_of(4) => {
                // SAFETY: the four bytes are in RAM, which may change at any time; they are aligned like
                // `pa`, and a page is never left.
                Some(unsafe { host.cast::<u32>().read_volatile() })
            }
            _ => None,
        }
    }
}
