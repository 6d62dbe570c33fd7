//! The other side: the same ELF program on a [`Cpu`], at EL0 behind page tables, with just enough of
//! Linux (write, exit, signals) in a handler at EL1.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;

use anyhow::{bail, ensure};
use squib_soft::{Counter, Cpu, Exit, Ram, Shared};

use super::program::{
    self, Program, SYS_EXIT_GROUP, SYS_RT_SIGACTION, SYS_SIGALTSTACK, SYS_WRITE, Segment,
};
use super::{Case, Outcome};

const RAM_BASE: u64 = 0x1000_0000;
const RAM_SIZE: u64 = 0x0A00_0000;
/// The handler and the page tables, for EL1 only.
const VECTORS: u64 = 0x1900_0000;
const LEVEL1: u64 = VECTORS + 0x1000;
const LEVEL2: u64 = LEVEL1 + 0x1000;
const LEVEL3: u64 = LEVEL2 + 0x1000;

// Descriptor bits (Arm ARM D8.3).
const TABLE: u64 = 3;
const PAGE: u64 = 3 | 1 << 10 | 3 << 8;
const AP_EL0: u64 = 1 << 6;
const AP_READ_ONLY: u64 = 1 << 7;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;

/// TCR_EL1: 39-bit addresses below with tags, as Linux has them, none above, 4 KiB granule, cacheable,
/// 40-bit physical addresses.
const TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 25 << 16 | 2 << 32 | 1 << 37;
/// SCTLR_EL1: MMU and caches on, DC ZVA, cache maintenance and CTR_EL0 open to EL0, and RES1 bits.
const SCTLR: u64 = 0x30D0_0800 | 1 | 1 << 2 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 26;

/// HVC immediates of the handler, each with a value in x30 that EL1 alone can read.
const HVC_X30: u16 = 1;
const HVC_SP: u16 = 2;
const HVC_FAR: u16 = 3;
/// The last: act on the exception, and answer in x30 where to go on, or zero to return.
const HVC_ESR: u16 = 4;

// ESR_EL1.EC.
const EC_UNKNOWN: u64 = 0x00;
const EC_SVC: u64 = 0x15;
const EC_SYSTEM: u64 = 0x18;
const EC_INSTRUCTION_ABORT: u64 = 0x20;
const EC_PC_ALIGNMENT: u64 = 0x22;
const EC_DATA_ABORT: u64 = 0x24;
const EC_SP_ALIGNMENT: u64 = 0x26;
const EC_BRK: u64 = 0x3C;

/// How time passes for the CPU under test: both ways run instructions differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stepping {
    /// Block by block, on the host's clock.
    Blocks,
    /// At most this many instructions a call, on the deterministic clock.
    Instructions(u64),
}

/// Runs at most [`BATCH`](super::BATCH) cases; one outcome a case, in order.
///
/// # Errors
/// The CPU did something that no program can make it do.
pub fn run(cases: &[Case], stepping: Stepping) -> anyhow::Result<Vec<Outcome>> {
    let program = Program::new(cases);
    let memory = Memory::new(RAM_BASE, RAM_SIZE);
    for segment in &program.segments {
        memory.write(segment.address, &segment.bytes);
    }
    page_tables(&memory, &program.segments);
    let boot = vectors(&memory, program.entry);

    let counter = match stepping {
        Stepping::Blocks => Counter::host(0),
        Stepping::Instructions(_) => Counter::instructions(0),
    };
    // SAFETY: the memory is only used between two runs of the CPU.
    let ram = unsafe { memory.ram() };
    let mut cpu = Cpu::new(&Shared::new(ram, Arc::new(counter)), 1 << 31);
    cpu.start(boot, 0);
    let output = system_calls(&mut cpu, &memory, &program, stepping)?;
    program::parse(cases, &output)
}

fn system_calls(
    cpu: &mut Cpu,
    memory: &Memory,
    program: &Program,
    stepping: Stepping,
) -> anyhow::Result<Vec<u8>> {
    let mut output = Vec::new();
    let (mut x30, mut sp, mut far) = (0, 0, 0);
    loop {
        let limit = match stepping {
            Stepping::Blocks => None,
            Stepping::Instructions(n) => Some(cpu.retired() + n),
        };
        match cpu.run(limit) {
            Exit::Hvc { imm } if (HVC_X30..=HVC_ESR).contains(&imm) => {
                let into = match imm {
                    HVC_X30 => &mut x30,
                    HVC_SP => &mut sp,
                    HVC_FAR => &mut far,
                    _ => &mut 0,
                };
                *into = cpu.x(30);
                if imm != HVC_ESR {
                    continue;
                }
            }
            Exit::TimerLines { .. } | Exit::Limit => continue,
            exit => bail!("the CPU returned {exit:?} at {:#x}", cpu.pc()),
        }
        let esr = cpu.x(30);
        let signal = match esr >> 26 {
            EC_SVC => {
                let (x0, x1, x2) = (cpu.x(0), cpu.x(1), cpu.x(2));
                match cpu.x(8) as u32 {
                    SYS_WRITE => {
                        ensure!(x0 == 1, "write to {x0}");
                        output.extend(memory.read(x1, x2)?);
                        cpu.set_x(0, x2);
                    }
                    SYS_EXIT_GROUP => return Ok(output),
                    SYS_RT_SIGACTION | SYS_SIGALTSTACK => cpu.set_x(0, 0),
                    other => bail!("system call {other}"),
                }
                cpu.set_x(30, 0);
                continue;
            }
            EC_UNKNOWN | EC_SYSTEM => 4,
            EC_BRK => 5,
            // Alignment faults; every other fault is SIGSEGV.
            EC_DATA_ABORT if esr & 0x3F == 0x21 => 7,
            EC_PC_ALIGNMENT | EC_SP_ALIGNMENT => 7,
            EC_DATA_ABORT | EC_INSTRUCTION_ABORT => 11,
            _ => bail!("exception with ESR {esr:#x}"),
        };
        memory.write_u64(program::SIGNAL_FRAME + program::SIGINFO_ADDRESS, far);
        let registers = (0..30).map(|n| cpu.x(n)).chain([x30, sp]);
        for (n, value) in (0..).zip(registers) {
            memory.write_u64(program::SIGNAL_FRAME + program::UCONTEXT_REGS + n * 8, value);
        }
        cpu.set_x(0, signal);
        cpu.set_x(1, program::SIGNAL_FRAME);
        cpu.set_x(2, program::SIGNAL_FRAME);
        cpu.set_x(30, program.handler);
    }
}

/// Writes the boot code and the exception vectors; returns where the boot code is.
fn vectors(memory: &Memory, entry: u64) -> u64 {
    // Of registers with op0 3.
    const MSR: u32 = 0xD510_0000;
    const MRS: u32 = 0xD530_0000;
    const VBAR_EL1: u32 = 0x08_C000;
    const SCTLR_EL1: u32 = 0x08_1000;
    const CPACR_EL1: u32 = 0x08_1040;
    const TTBR0_EL1: u32 = 0x08_2000;
    const TCR_EL1: u32 = 0x08_2040;
    const SPSR_EL1: u32 = 0x08_4000;
    const ELR_EL1: u32 = 0x08_4020;
    const SP_EL0: u32 = 0x08_4100;
    const ESR_EL1: u32 = 0x08_5200;
    const FAR_EL1: u32 = 0x08_6000;
    const MAIR_EL1: u32 = 0x08_A200;
    const TPIDR_EL1: u32 = 0x08_D080;
    const ERET: u32 = 0xD69F_03E0;
    const ISB: u32 = 0xD503_3FDF;
    let hvc = |imm: u16| 0xD400_0002 | u32::from(imm) << 5;
    let msr = |register: u32, t: u32| MSR | register | t;
    let mrs = |t: u32, register: u32| MRS | register | t;

    for vector in 0..16u64 {
        let code = if vector == 8 {
            vec![
                msr(TPIDR_EL1, 30),
                hvc(HVC_X30),
                mrs(30, SP_EL0),
                hvc(HVC_SP),
                mrs(30, FAR_EL1),
                hvc(HVC_FAR),
                mrs(30, ESR_EL1),
                hvc(HVC_ESR),
                0xB500_007E, // cbnz x30, 12 bytes on
                mrs(30, TPIDR_EL1),
                ERET,
                msr(ELR_EL1, 30),
                ERET,
            ]
        } else {
            vec![hvc(0x100 + vector as u16)]
        };
        memory.write_words(VECTORS + vector * 0x80, &code);
    }

    let mut boot = Vec::new();
    for (register, value) in [
        (VBAR_EL1, VECTORS),
        (MAIR_EL1, 0xFF),
        (TTBR0_EL1, LEVEL1),
        (TCR_EL1, TCR),
        (CPACR_EL1, 3 << 20),
        (ELR_EL1, entry),
        (SPSR_EL1, 0x3C0),
        (SCTLR_EL1, SCTLR),
    ] {
        for part in 0..4 {
            let movk = if part == 0 { 0xD280_0000 } else { 0xF280_0000 };
            boot.push(movk | part << 21 | ((value >> (16 * part)) as u32 & 0xFFFF) << 5);
        }
        boot.push(msr(register, 0));
    }
    boot.extend([ISB, ERET]);
    memory.write_words(VECTORS + 0x800, &boot);
    VECTORS + 0x800
}

fn page_tables(memory: &Memory, segments: &[Segment]) {
    memory.write_u64(LEVEL1, LEVEL2 | TABLE);
    let map = |address: u64, flags: u64| {
        let region = address >> 21;
        let level3 = LEVEL3 + (region - (RAM_BASE >> 21)) * 0x1000;
        memory.write_u64(LEVEL2 + region * 8, level3 | TABLE);
        memory.write_u64(level3 + (address >> 12 & 511) * 8, address | PAGE | flags);
    };
    for segment in segments {
        let mut flags = AP_EL0 | PXN;
        if segment.flags & 2 == 0 {
            flags |= AP_READ_ONLY;
        }
        if segment.flags & 1 == 0 {
            flags |= UXN;
        }
        let mut page = segment.address;
        while page < segment.address + segment.size {
            map(page, flags);
            page += 0x1000;
        }
    }
    map(VECTORS, UXN);
}

/// A guest's RAM.
pub(super) struct Memory {
    host: *mut u8,
    base: u64,
    size: u64,
    keep: Arc<Allocation>,
}

struct Allocation(*mut u8, Layout);

// SAFETY: a pointer that is only handed on and freed.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `Memory::new` allocated it with this layout, and this is its only owner.
        unsafe { dealloc(self.0, self.1) };
    }
}

impl Memory {
    /// Zeros.
    pub(super) fn new(base: u64, size: u64) -> Self {
        let layout = Layout::from_size_align(size as usize, 0x1000).expect("a size of RAM");
        // SAFETY: the layout's size is not zero.
        let host = unsafe { alloc_zeroed(layout) };
        assert!(!host.is_null(), "out of memory");
        Self { host, base, size, keep: Arc::new(Allocation(host, layout)) }
    }

    /// As a CPU sees it.
    ///
    /// # Safety
    /// The other functions must not be called while a CPU runs.
    pub(super) unsafe fn ram(&self) -> Ram {
        // SAFETY: the memory lives as long as the Arc that is handed over, it is page-aligned and
        // `size` bytes long, and only raw pointers lead to it.
        unsafe { Ram::new(self.host, self.size, self.base, Arc::clone(&self.keep) as _) }
    }

    fn at(&self, address: u64, size: u64) -> Option<*mut u8> {
        let offset = address.checked_sub(self.base)?;
        let end = offset.checked_add(size)?;
        // SAFETY: the offset is inside the allocation.
        (end <= self.size).then(|| unsafe { self.host.add(offset as usize) })
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        let to = self.at(address, bytes.len() as u64).expect("the segments lie in RAM");
        // SAFETY: `at` checked the range, and no CPU runs.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn write_u64(&self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    fn write_words(&self, address: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write(address, &bytes);
    }

    fn read(&self, address: u64, size: u64) -> anyhow::Result<Vec<u8>> {
        let Some(from) = self.at(address, size) else {
            bail!("{size} bytes at {address:#x} are not RAM");
        };
        let mut bytes = vec![0; size as usize];
        // SAFETY: `at` checked the range, and no CPU runs.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from, size as usize) };
        Ok(bytes)
    }
}
