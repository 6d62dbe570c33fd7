//! The static ELF program that runs a batch of cases and writes what they left to stdout.
//!
//! Every case has a stub of 32 words:
//!
//! ```text
//!     ldr  x30, literal      entered with everything but x30 loaded
//!     CODE                   one word or more
//!     msr  tpidr_el0, x30    the only register an EL0 program can spill to without a base
//!     b    save
//!     msr  tpidr_el0, x30    a branch by +12 comes here when it is taken
//!     b    save_taken
//!     ...
//!     literal: x30           at byte 112
//! ```
//!
//! `save` stores the state in the case's output record and goes on to the next case; so does the
//! signal handler, which runs on a stack of its own, takes the general registers from the signal's
//! context, and never returns. No register is reserved.

use anyhow::ensure;
use squib_soft::testing::State;

use super::{Case, End, Outcome, SCRATCH};

const VARS: u64 = 0x1000_0000;
const TEXT: u64 = 0x1000_1000;
const STUBS: u64 = TEXT + 0x800;
const STUB: u64 = 128;
pub(super) const LITERAL: u64 = 112;
const INPUT: u64 = 0x1100_0000;
const OUTPUT: u64 = 0x1400_0000;
pub(super) const SCRATCH_BASE: u64 = 0x1600_0000;
const STACK: u64 = 0x1800_0000;
const STACK_SIZE: u64 = 0x1_0000;

/// A page that may be read only, with nothing behind it.
pub(super) const EDGE: u64 = 0x1780_0000;

/// Record: x0 to x30 and SP, NZCV, FPCR, FPSR, how it ended, v0 to v31, the address of a fault.
const RECORD: u64 = 816;
const SP_AT: u64 = 248;
const NZCV_AT: u64 = 256;
const FPSR_AT: u64 = 272;
const END_AT: u64 = 280;
const V_AT: u64 = 288;
const FAULT_AT: u64 = 800;

/// `si_addr` in a `siginfo_t`.
pub(super) const SIGINFO_ADDRESS: u64 = 16;
/// `uc_mcontext.regs` in an arm64 `ucontext_t`: x0 to x30, then SP.
pub(super) const UCONTEXT_REGS: u64 = 184;
/// Where the machine puts both.
pub(super) const SIGNAL_FRAME: u64 = STACK;

const END_TAKEN: u64 = 0x100;

// Offsets in VARS.
const VAR_INPUT: u64 = 0;
const VAR_STUB: u64 = 16;
const VAR_SIGACTION: u64 = 0x100;
const VAR_SIGSTACK: u64 = 0x140;

/// Signals that an instruction can raise: ILL, TRAP, BUS, FPE, SEGV.
const SIGNALS: [u32; 5] = [4, 5, 7, 8, 11];

pub(super) const SYS_WRITE: u32 = 64;
pub(super) const SYS_EXIT_GROUP: u32 = 94;
pub(super) const SYS_SIGALTSTACK: u32 = 132;
pub(super) const SYS_RT_SIGACTION: u32 = 134;
const SA_SIGINFO: u64 = 4;
const SA_ONSTACK: u64 = 0x0800_0000;
const SA_NODEFER: u64 = 0x4000_0000;

const SYSREG_NZCV: u32 = 0x1B4200;
const SYSREG_FPCR: u32 = 0x1B4400;
const SYSREG_FPSR: u32 = 0x1B4420;
const SYSREG_TPIDR_EL0: u32 = 0x1BD040;

pub(super) fn stub_address(index: usize) -> u64 {
    STUBS + index as u64 * STUB
}

/// The program, in pieces.
pub(super) struct Program {
    pub(super) entry: u64,
    /// The signal handler.
    pub(super) handler: u64,
    pub(super) segments: Vec<Segment>,
}

impl Program {
    pub(super) fn new(cases: &[Case]) -> Self {
        let text = text(cases);
        let input: Vec<u8> = cases.iter().flat_map(|case| record(&case.state)).collect();
        // How a case ended is all ones until it has run.
        let output = vec![0xff; cases.len() * RECORD as usize];
        let mut scratch = Vec::with_capacity(cases.len() * SCRATCH);
        for (index, case) in cases.iter().enumerate() {
            scratch.extend(&case.memory);
            scratch.resize((index + 1) * SCRATCH, 0);
        }
        let vars = vars(cases.len(), text.handler);
        let segment = |address, flags, bytes: Vec<u8>| {
            let size = bytes.len() as u64;
            Segment { address, flags, bytes, size }
        };
        let segments = vec![
            segment(VARS, 6, vars),
            segment(TEXT, 5, text.bytes),
            segment(INPUT, 4, input),
            segment(OUTPUT, 6, output),
            segment(SCRATCH_BASE, 6, scratch),
            segment(EDGE, 4, (0..0x1000).map(|i| ((i * 37) >> 3) as u8).collect()),
            Segment { address: STACK, flags: 6, bytes: Vec::new(), size: STACK_SIZE },
        ];
        Self { entry: text.start, handler: text.handler, segments }
    }

    /// As a static ELF file.
    pub(super) fn elf(&self) -> Vec<u8> {
        elf(self.entry, &self.segments)
    }
}

/// The outcomes from what the program wrote.
pub(super) fn parse(cases: &[Case], output: &[u8]) -> anyhow::Result<Vec<Outcome>> {
    let records = cases.len() * RECORD as usize;
    ensure!(
        output.len() == records + cases.len() * SCRATCH,
        "{} bytes of output for {} cases",
        output.len(),
        cases.len()
    );
    let (records, scratch) = output.split_at(records);
    let records = records.chunks_exact(RECORD as usize);
    cases
        .iter()
        .zip(records.zip(scratch.chunks_exact(SCRATCH)))
        .enumerate()
        .map(|(index, (case, (record, scratch)))| {
            let word = |at: u64| {
                let at = at as usize;
                u64::from_le_bytes(record[at..at + 8].try_into().expect("8 bytes"))
            };
            let end = match word(END_AT) {
                0 => End::Next,
                END_TAKEN => End::Taken,
                signal @ 1..=64 => End::Signal(signal as u32),
                other => {
                    anyhow::bail!("case {index} ({:#010x}) did not run: {other:#x}", case.insn())
                }
            };
            let mut state = State::default();
            for (n, x) in state.x.iter_mut().enumerate() {
                *x = word(n as u64 * 8);
            }
            state.sp = word(SP_AT);
            state.nzcv = word(NZCV_AT) as u32;
            state.fpcr = word(NZCV_AT + 8) as u32;
            state.fpsr = word(FPSR_AT) as u32;
            for (n, v) in state.v.iter_mut().enumerate() {
                let at = V_AT + n as u64 * 16;
                *v = u128::from(word(at)) | u128::from(word(at + 8)) << 64;
            }
            let memory = scratch[..case.memory.len()].to_vec();
            // SIGBUS and SIGSEGV name the address.
            let fault = match end {
                End::Signal(7 | 11) => Some(word(FAULT_AT)),
                _ => None,
            };
            Ok(Outcome { end, state, memory, fault })
        })
        .collect()
}

fn record(state: &State) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RECORD as usize);
    for x in state.x {
        bytes.extend(x.to_le_bytes());
    }
    for word in [state.sp, state.nzcv.into(), state.fpcr.into(), state.fpsr.into(), 0] {
        bytes.extend(word.to_le_bytes());
    }
    for v in state.v {
        bytes.extend(v.to_le_bytes());
    }
    bytes.resize(RECORD as usize, 0);
    bytes
}

fn vars(count: usize, handler: u64) -> Vec<u8> {
    let mut vars = vec![0; 0x1000];
    let mut put = |at: u64, words: &[u64]| {
        for (n, word) in words.iter().enumerate() {
            let at = at as usize + n * 8;
            vars[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    };
    put(VAR_INPUT, &[INPUT, OUTPUT]);
    put(VAR_STUB, &[STUBS, count as u64]);
    put(VAR_SIGACTION, &[handler, SA_SIGINFO | SA_ONSTACK | SA_NODEFER, 0, 0]);
    put(VAR_SIGSTACK, &[STACK, 0, STACK_SIZE]);
    vars
}

struct Text {
    bytes: Vec<u8>,
    start: u64,
    handler: u64,
}

fn text(cases: &[Case]) -> Text {
    let mut a = Assembler::default();

    // load: x29 is the input record, x30 the stub.
    let load = a.here();
    for n in (0..32).step_by(2) {
        a.word(0xAD40_0000 | (V_AT as u32 / 16 + n) << 15 | (n + 1) << 10 | 29 << 5 | n); // ldp qN
    }
    a.ldp(0, 1, 29, NZCV_AT);
    a.msr(SYSREG_NZCV, 0);
    a.msr(SYSREG_FPCR, 1);
    a.ldr(0, 29, FPSR_AT);
    a.msr(SYSREG_FPSR, 0);
    a.ldr(0, 29, SP_AT);
    a.word(0x9100_001F); // mov sp, x0
    for n in (0..30).step_by(2) {
        a.ldp(n, n + 1, 29, u64::from(n) * 8);
    }
    a.word(0xD61F_03C0); // br x30

    // enter: the case that VARS names.
    let enter = a.here();
    a.adr(0, VARS);
    a.ldr(29, 0, VAR_INPUT);
    a.ldr(30, 0, VAR_STUB);
    a.b(load);

    let done = a.here();

    // The records and the scratch memory lie apart: two pieces.
    for (address, size) in
        [(OUTPUT, cases.len() as u64 * RECORD), (SCRATCH_BASE, cases.len() as u64 * SCRATCH as u64)]
    {
        a.mov(19, address);
        a.mov(20, size);
        let again = a.here();
        a.mov(0, 1);
        a.word(0xAA13_03E1); // mov x1, x19
        a.word(0xAA14_03E2); // mov x2, x20
        a.svc(SYS_WRITE);
        a.word(0x8B00_0273); // add x19, x19, x0
        a.word(0xCB00_0294); // sub x20, x20, x0
        a.cbnz(20, again);
    }
    a.mov(0, 0);
    a.svc(SYS_EXIT_GROUP);

    // advance to the next case.
    let advance = a.here();
    a.adr(0, VARS);
    a.ldp(1, 2, 0, VAR_INPUT);
    a.add(1, 1, RECORD as u32);
    a.add(2, 2, RECORD as u32);
    a.stp(1, 2, 0, VAR_INPUT);
    a.ldp(1, 2, 0, VAR_STUB);
    a.add(1, 1, STUB as u32);
    a.word(0xD100_0442); // sub x2, x2, #1
    a.stp(1, 2, 0, VAR_STUB);
    a.cbnz(2, enter);
    a.b(done);

    // x0 is the signal's number, x1 the siginfo_t, x2 the ucontext_t.
    let handler = a.here();
    a.adr(30, VARS);
    a.ldr(30, 30, VAR_INPUT + 8);
    a.str(0, 30, END_AT);
    a.ldr(0, 1, SIGINFO_ADDRESS);
    a.str(0, 30, FAULT_AT);
    for n in (0..32).step_by(2) {
        a.ldp(0, 1, 2, UCONTEXT_REGS + n * 8);
        a.stp(0, 1, 30, n * 8);
    }
    save_flags_and_vectors(&mut a);
    a.b(advance);

    let mut saves = [0; 2];
    for (save, end) in saves.iter_mut().zip([0, END_TAKEN]) {
        *save = a.here();
        a.adr(30, VARS);
        a.ldr(30, 30, VAR_INPUT + 8);
        for n in (0..30).step_by(2) {
            a.stp(n, n + 1, 30, u64::from(n) * 8);
        }
        a.mrs(0, SYSREG_TPIDR_EL0);
        a.word(0x9100_03E1); // mov x1, sp
        a.stp(0, 1, 30, 240);
        a.mov(2, end);
        a.str(2, 30, END_AT);
        save_flags_and_vectors(&mut a);
        a.b(advance);
    }

    let start = a.here();
    for signal in SIGNALS {
        a.mov(0, signal.into());
        a.mov(1, VARS + VAR_SIGACTION);
        a.mov(2, 0);
        a.mov(3, 8);
        a.svc(SYS_RT_SIGACTION);
    }
    a.mov(0, VARS + VAR_SIGSTACK);
    a.mov(1, 0);
    a.svc(SYS_SIGALTSTACK);
    a.b(enter);

    assert!(a.here() <= STUBS, "the routines overlap the stubs");
    while a.here() < STUBS {
        a.word(0);
    }
    for case in cases {
        let stub = a.here();
        a.ldr_literal(30, stub + LITERAL);
        for insn in &case.code {
            a.word(*insn);
        }
        for save in saves {
            a.msr(SYSREG_TPIDR_EL0, 30);
            a.b(save);
        }
        assert!(a.here() <= stub + LITERAL, "{} instructions in a case", case.code.len());
        while a.here() < stub + LITERAL {
            a.word(0);
        }
        a.word(case.state.x[30] as u32);
        a.word((case.state.x[30] >> 32) as u32);
        a.word(0);
        a.word(0);
    }
    Text { bytes: a.bytes, start, handler }
}

/// x30 is the output record; x0 and x1 are free.
fn save_flags_and_vectors(a: &mut Assembler) {
    a.mrs(0, SYSREG_NZCV);
    a.mrs(1, SYSREG_FPCR);
    a.stp(0, 1, 30, NZCV_AT);
    a.mrs(0, SYSREG_FPSR);
    a.str(0, 30, FPSR_AT);
    for n in (0..32).step_by(2) {
        a.word(0xAD00_0000 | (V_AT as u32 / 16 + n) << 15 | (n + 1) << 10 | 30 << 5 | n); // stp qN
    }
}

/// Just the instructions that the program needs; offsets are in bytes.
#[derive(Default)]
struct Assembler {
    bytes: Vec<u8>,
}

impl Assembler {
    fn here(&self) -> u64 {
        TEXT + self.bytes.len() as u64
    }

    fn word(&mut self, word: u32) {
        self.bytes.extend(word.to_le_bytes());
    }

    fn offset(&self, target: u64) -> u32 {
        target.wrapping_sub(self.here()) as u32
    }

    fn ldp(&mut self, t: u32, t2: u32, n: u32, at: u64) {
        self.word(0xA940_0000 | (at as u32 / 8) << 15 | t2 << 10 | n << 5 | t);
    }

    fn stp(&mut self, t: u32, t2: u32, n: u32, at: u64) {
        self.word(0xA900_0000 | (at as u32 / 8) << 15 | t2 << 10 | n << 5 | t);
    }

    fn ldr(&mut self, t: u32, n: u32, at: u64) {
        self.word(0xF940_0000 | (at as u32 / 8) << 10 | n << 5 | t);
    }

    fn str(&mut self, t: u32, n: u32, at: u64) {
        self.word(0xF900_0000 | (at as u32 / 8) << 10 | n << 5 | t);
    }

    fn ldr_literal(&mut self, t: u32, target: u64) {
        self.word(0x5800_0000 | (self.offset(target) >> 2 & 0x7ffff) << 5 | t);
    }

    fn adr(&mut self, d: u32, target: u64) {
        let offset = self.offset(target);
        self.word(0x1000_0000 | (offset & 3) << 29 | (offset >> 2 & 0x7ffff) << 5 | d);
    }

    fn add(&mut self, d: u32, n: u32, imm: u32) {
        self.word(0x9100_0000 | imm << 10 | n << 5 | d);
    }

    /// A value of up to 32 bits.
    fn mov(&mut self, d: u32, value: u64) {
        self.word(0xD280_0000 | (value as u32 & 0xffff) << 5 | d);
        self.word(0xF2A0_0000 | (value as u32 >> 16) << 5 | d);
    }

    fn msr(&mut self, sysreg: u32, t: u32) {
        self.word(0xD500_0000 | sysreg | t);
    }

    fn mrs(&mut self, t: u32, sysreg: u32) {
        self.word(0xD520_0000 | sysreg | t);
    }

    fn b(&mut self, target: u64) {
        self.word(0x1400_0000 | self.offset(target) >> 2 & 0x3ff_ffff);
    }

    fn cbnz(&mut self, t: u32, target: u64) {
        self.word(0xB500_0000 | (self.offset(target) >> 2 & 0x7ffff) << 5 | t);
    }

    fn svc(&mut self, number: u32) {
        self.mov(8, number.into());
        self.word(0xD400_0001);
    }
}

/// Bytes at an address, zero from their end up to `size`.
pub(super) struct Segment {
    pub(super) address: u64,
    /// PF_X 1, PF_W 2, PF_R 4.
    pub(super) flags: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) size: u64,
}

/// A static ELF file.
pub(super) fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
    const PAGE: usize = 0x1000;
    let mut file = Vec::new();
    file.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 183] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_AARCH64
    }
    file.extend(1u32.to_le_bytes());
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes()); // e_entry, e_phoff, e_shoff
    }
    file.extend(0u32.to_le_bytes());
    for half in [64, 56, segments.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = PAGE;
    for segment in segments {
        file.extend(1u32.to_le_bytes()); // PT_LOAD
        file.extend(segment.flags.to_le_bytes());
        let length = segment.bytes.len() as u64;
        for word in
            [offset as u64, segment.address, segment.address, length, segment.size, PAGE as u64]
        {
            file.extend(word.to_le_bytes());
        }
        offset += segment.bytes.len().next_multiple_of(PAGE);
    }
    for segment in segments {
        file.resize(file.len().next_multiple_of(PAGE), 0);
        file.extend(&segment.bytes);
    }
    file
}
