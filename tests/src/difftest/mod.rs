//! Differential tests of the software CPU against `qemu-aarch64` user mode, instruction by
//! instruction.
//!
//! A [`Case`] is one instruction word with the register state (and a few hundred bytes of memory)
//! that it starts from. [`Qemu::run`] packs thousands of them into one static ELF file, runs it, and
//! returns what each left behind, or the signal that it raised. [`classes`] draws random cases of
//! one encoding class each; [`compare`] runs a class on both sides and groups what differs.
//!
//! The tool is not part of `cargo test`, since it needs qemu-user. Use:
//!
//! ```text
//! cargo run -p squib-tests --bin difftest -- --list
//! cargo run -p squib-tests --bin difftest -- simd-three-same --count 20000 --seed 7
//! cargo run -p squib-tests --bin difftest -- fp-data2 fp-data3      (several classes)
//! cargo run -p squib-tests --bin difftest -- fp                     (all whose name begins so)
//! cargo run -p squib-tests --bin difftest -- --word 0x1e622820      (one word, random operands)
//! cargo run -p squib-tests --bin difftest -- simd --cpu             (by a whole CPU)
//! cargo run -p squib-tests --bin difftest -- int --step 1           (instruction by instruction)
//! cargo run -p squib-tests --bin difftest -- streams --count 100000
//! cargo run -p squib-tests --bin difftest -- translation --count 20000
//! ```
//!
//! `difftest streams` draws short random programs of all classes with branches and loops; what
//! differs is cut down to the instructions that it takes.
//!
//! `difftest translation` walks random translation tables by AT, against `qemu-system-aarch64`.
//!
//! Every mismatch is printed with the word, its disassembly (where binutils for aarch64 are
//! installed), the operands that it read and both results. A found case becomes a plain unit test in
//! the soft crate. QEMU is a peer and not the arbiter: where the Arm ARM disagrees with it, the
//! Arm ARM is right.
//!
//! The reference CPU is `cortex-a72`: ARMv8.0-A with CRC32 and the cryptographic extension, so that
//! what is undefined there is what squib leaves undefined. Classes with LSE use `max`.

pub mod cases;
pub mod classes;
pub mod compare;
pub mod machine;
mod program;
pub mod record;
pub mod streams;
pub mod translation;
pub mod values;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use squib_soft::testing::State;

/// Cases in one QEMU process.
pub const BATCH: usize = 4096;

/// Bytes of memory that belong to one case.
pub const SCRATCH: usize = 1024;

/// The most instructions in one case.
pub const MAX_CODE: usize = 20;

/// One instruction, or a few in a row, and what they start from.
#[derive(Clone, Debug)]
pub struct Case {
    /// The instruction words, at least one and at most [`MAX_CODE`].
    pub code: Vec<u32>,
    /// The registers before it.
    pub state: State,
    /// The memory at [`scratch_address`] before it: empty, or [`SCRATCH`] bytes.
    pub memory: Vec<u8>,
}

impl Case {
    /// The first instruction word.
    pub fn insn(&self) -> u32 {
        self.code[0]
    }
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Execution went on with the next instruction.
    Next,
    /// Execution went on 12 bytes after the last instruction: a branch by +12 that was taken.
    Taken,
    /// The instruction raised this signal: 4 where it is UNDEFINED.
    Signal(u32),
}

impl End {
    /// SIGILL.
    pub const UNDEFINED: End = End::Signal(4);
}

/// What a case left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// The registers after it, or when the signal was raised.
    pub state: State,
    /// The memory after it, as long as the case's.
    pub memory: Vec<u8>,
    /// The address that a fault reports, after SIGSEGV and SIGBUS.
    pub fault: Option<u64>,
}

/// The address of a page that may be read but not written, with nothing mapped behind it.
pub const EDGE: u64 = program::EDGE;

/// The address of the memory of case `index` of a batch.
pub fn scratch_address(index: usize) -> u64 {
    program::SCRATCH_BASE + (index * SCRATCH) as u64
}

/// The address of the first instruction word of case `index` of a batch.
pub fn insn_address(index: usize) -> u64 {
    program::stub_address(index) + 4
}

/// The address of the 16 bytes in the code of case `index` that a literal load may read: X30 before
/// the case, and zeros.
pub fn literal_address(index: usize) -> u64 {
    program::stub_address(index) + program::LITERAL
}

/// The reference: `qemu-aarch64` with a CPU model.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program, `qemu-aarch64` by default.
    pub program: String,
    /// Its `-cpu`.
    pub cpu: String,
}

impl Qemu {
    /// `qemu-aarch64 -cpu CPU`.
    pub fn new(cpu: &str) -> Self {
        Self { program: "qemu-aarch64".into(), cpu: cpu.into() }
    }

    /// Runs at most [`BATCH`] cases in one process; one outcome a case, in order.
    ///
    /// # Errors
    /// QEMU cannot be started, died, or wrote something else than the outcomes.
    pub fn run(&self, cases: &[Case]) -> anyhow::Result<Vec<Outcome>> {
        ensure!(cases.len() <= BATCH, "{} cases in a batch of {BATCH}", cases.len());
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(&program::Program::new(cases).elf())?;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o700))?;
        let path = file.into_temp_path();
        let output = Command::new(&self.program)
            .args(["-cpu", &self.cpu])
            .arg(&path)
            .output()
            .with_context(|| format!("cannot run {} (Debian package qemu-user)", self.program))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{} ended with {}: {stderr}", self.program, output.status);
        }
        program::parse(cases, &output.stdout)
    }
}
