//! Why [`Cpu::run`](crate::Cpu::run) returned.

use crate::SysReg;

/// What the vCPU needs from outside, or what happened to it. PC already stands behind the
/// instruction, unless a variant says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A load from `address`, which is not RAM. Carry it out and call
    /// [`Cpu::complete_mmio_read`](crate::Cpu::complete_mmio_read) before the next run.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
    },
    /// A store to `address`, which is not RAM.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// The value, zero-extended.
        value: u64,
    },
    /// An access to RAM that its [`Granules`](crate::Granules) withhold. PC stands at the instruction, which
    /// is not retired and is executed again by the next run.
    Memory {
        /// Guest-physical address of a byte in the granule.
        address: u64,
        /// It wants to write.
        write: bool,
    },
    /// MRS of a register that the vCPU does not hold (ICC_*). Call
    /// [`Cpu::complete_sysreg_read`](crate::Cpu::complete_sysreg_read) before the next run, or
    /// [`Cpu::undefined`](crate::Cpu::undefined) if there is no such register.
    SysRegRead {
        /// The register.
        reg: SysReg,
    },
    /// MSR of a register that the vCPU does not hold (ICC_*).
    SysRegWrite {
        /// The register.
        reg: SysReg,
        /// The value.
        value: u64,
    },
    /// HVC: a hypercall with the immediate; arguments and results are in x0 to x17.
    Hvc {
        /// The instruction's immediate.
        imm: u16,
    },
    /// SMC with the immediate.
    Smc {
        /// The instruction's immediate.
        imm: u16,
    },
    /// WFI or WFE with nothing to do: sleep until a line is high, a kick, or the timer deadline
    /// ([`Cpu::next_timer`](crate::Cpu::next_timer)).
    Wfi,
    /// The output of a generic timer has changed; feed both lines to the interrupt controller.
    TimerLines {
        /// CNTV (PPI 11).
        virt: bool,
        /// CNTP (PPI 14).
        phys: bool,
    },
    /// [`Signals::kick`](crate::Signals::kick) was called.
    Kicked,
    /// The retired-instruction count has reached the limit given to `run`.
    Limit,
}
