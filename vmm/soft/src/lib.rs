//! A software AArch64 CPU: EL0 and EL1 of ARMv8.0-A with LSE, CRC32, PAN and the cryptographic
//! instructions, FP and Advanced SIMD, the stage-1 MMU, and the generic timers.
//!
//! A [`Cpu`] is one vCPU. It runs until it needs something from outside and says what: an [`Exit`].
//! It knows no bus, no interrupt controller and no snapshot.

mod counter;
mod exit;
mod regs;
mod signals;
mod simd;
mod sysreg;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;

pub use counter::{CNTFRQ_HZ, Counter};
pub use exit::Exit;
pub use signals::Signals;
pub use sysreg::SysReg;
