//! A software AArch64 CPU: EL0 and EL1 of ARMv8.0-A with LSE, CRC32, PAN and the cryptographic
//! instructions, FP and Advanced SIMD, the stage-1 MMU, the generic timers, and self-hosted debug
//! (software step, breakpoints and watchpoints).
//!
//! A [`Cpu`] is one vCPU. It runs until it needs something from outside and says what: an [`Exit`].
//! It knows no bus, no interrupt controller and no snapshot.

mod code;
mod counter;
mod cpu;
mod debug;
mod decode;
mod exception;
mod exec;
mod exit;
mod mem;
mod mmu;
mod op;
mod regs;
mod shared;
mod signals;
mod simd;
mod state;
mod sys;
mod sysreg;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
mod timer;
mod tlb;

pub use counter::{CNTFRQ_HZ, Counter};
pub use cpu::Cpu;
pub use exit::Exit;
pub use shared::{Granules, READABLE, Ram, Shared, WRITABLE};
pub use signals::Signals;
pub use state::{CpuState, StateError};
pub use sys::id_registers;
pub use sysreg::SysReg;
