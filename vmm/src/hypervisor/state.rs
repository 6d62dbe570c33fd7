//! The saved form of a vCPU, the same on every backend.

use serde::{Deserialize, Serialize};
use squib_formats::first_version;

/// A vCPU as the guest sees it. Its power state belongs to PSCI, its interrupt controller interface
/// and pending lines to the interrupt chip, the counter to the machine. On hvf the interface's ICC registers
/// stand here, among the system registers: there only the vCPU's own thread can read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// X0 to X30.
    pub x: [u64; 31],
    /// SP_EL0.
    pub sp_el0: u64,
    /// SP_EL1.
    pub sp_el1: u64,
    /// Address of the next instruction.
    pub pc: u64,
    /// PSTATE in the format of SPSR_EL1.
    pub pstate: u64,
    /// V0 to V31.
    pub v: [u128; 32],
    /// FPCR.
    pub fpcr: u64,
    /// FPSR.
    pub fpsr: u64,
    /// All other system registers that the backend holds, by encoding (op0, op1, CRn, CRm, op2 packed
    /// as in MRS bits 20 to 5), ascending.
    pub sysregs: Vec<(u16, u64)>,
    /// The exclusive monitor, where the backend can tell. Others leave it open, which the architecture
    /// allows at any time.
    pub exclusive: Option<ExclusiveMonitor>,
    /// Whether it sleeps in WFI, where the backend can tell.
    pub waiting: bool,
    /// Instructions retired since the first start; zero where the backend does not count.
    pub retired: u64,
}

/// What the last load-exclusive saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExclusiveMonitor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes: 1, 2, 4, 8 or 16.
    pub size: u8,
    /// The value that was loaded.
    pub value: u128,
}

first_version!(VcpuState, "vcpu");

/// The interrupt controller as Hypervisor.framework saves it. Every build knows the form, so that it can tell
/// what it cannot restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HvfGicState {
    /// Whose bytes these are: "hvf".
    pub backend: String,
    /// Build of the operating system that wrote them.
    pub host_build: String,
    /// The framework's own form, opaque.
    pub bytes: Vec<u8>,
}

// What the framework saves is its own affair; a machine of 32 vCPUs takes some hundred KiB.
first_version!(HvfGicState, "hvf-gic", longest: 8 << 20);
