//! Translation tables: random tables and addresses, walked by AT S1E1R, S1E1W, S1E0R and S1E0W on a
//! bare machine, here and on `qemu-system-aarch64 -M virt`. What is compared is PAR_EL1: the physical
//! address, or the fault and its level.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use squib_soft::{Counter, Cpu, Exit, Ram, Shared};

use super::machine::Memory;
use super::program::{Segment, elf};
use super::values::Rng;

const RAM_BASE: u64 = 0x4000_0000;
const RAM_SIZE: u64 = 0x0400_0000;
const CODE: u64 = 0x4010_0000;
const PARAMETERS: u64 = 0x4011_0000;
const ADDRESSES: u64 = 0x4012_0000;
const RESULTS: u64 = 0x4020_0000;
const TABLES: u64 = 0x4040_0000;
const TABLE_SIZE: u64 = 0x4000;
/// The UART of QEMU's virt machine; the program writes its results there.
const UART: u64 = 0x0900_0000;

const SCTLR_OFF: u64 = 0x30D0_0800;
const SCTLR_ON: u64 = SCTLR_OFF | 1;
const AF: u64 = 1 << 10;
/// Attr0, which the program has, is Normal memory; then Device, not cached, and write-through.
const MAIR: u64 = 0xBB_44_0C_08_04_00_FF;

/// AT operations for each address.
const KINDS: [&str; 4] = ["S1E1R", "S1E1W", "S1E0R", "S1E0W"];

/// Random tables for one setting of TCR_EL1, and the addresses to translate.
#[derive(Clone, Debug)]
pub struct Tables {
    tcr: u64,
    ttbr: [u64; 2],
    words: Vec<u64>,
    addresses: Vec<u64>,
}

/// An address for which the two sides differ.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// The virtual address.
    pub address: u64,
    /// Which AT.
    pub kind: &'static str,
    /// TCR_EL1.
    pub tcr: u64,
    /// PAR_EL1 of the reference.
    pub expected: u64,
    /// PAR_EL1 here.
    pub actual: u64,
}

impl Tables {
    /// Random tables with paths for `count` addresses.
    pub fn new(rng: &mut Rng, count: usize) -> Self {
        let tsz = [16 + rng.below(18), 16 + rng.below(18)];
        let sixteen = [rng.one_in(2), rng.one_in(2)];
        let tg0 = if sixteen[0] { 2 } else { 0 };
        let tg1 = if sixteen[1] { 1 } else { 2 };
        let tbi = u64::from(rng.below(4)) << 37;
        let tcr = u64::from(tsz[0]) | u64::from(tsz[1]) << 16 | tg0 << 14 | tg1 << 30 | tbi
            | u64::from(rng.below(3)) << 32 // 32-, 36- or 40-bit physical addresses
            | if rng.one_in(8) { 1 << 23 } else { 0 }; // EPD1
        let mut tables = Self {
            tcr,
            ttbr: [TABLES, TABLES + TABLE_SIZE],
            words: vec![0; 2 * TABLE_SIZE as usize / 8],
            addresses: Vec::new(),
        };
        // The program itself: 64 MiB one to one.
        for at in (0..RAM_SIZE).step_by(0x20_0000) {
            tables.path(rng, RAM_BASE + at, [tsz[0], 0], [sixteen[0], false], true);
        }
        for _ in 0..count {
            let upper = rng.one_in(2);
            let bits = 64 - tsz[usize::from(upper)];
            let mut address = rng.next_u64() & ((1 << bits) - 1);
            if address & !(RAM_SIZE - 1) == RAM_BASE && !upper {
                address ^= 1 << (bits - 1);
            }
            if upper {
                address |= !0 << bits;
            }
            // Few addresses are outside of what TCR gives, or tagged.
            if rng.one_in(16) {
                address ^= 1 << (bits + rng.below(64 - bits));
            }
            if rng.one_in(3) && !tables.addresses.is_empty() {
                // Close to another, so that they share tables.
                let n = rng.below(tables.addresses.len() as u32) as usize;
                address = tables.addresses[n] ^ 1 << rng.below(30);
            }
            tables.addresses.push(address);
            if address >> 55 & 1 == u64::from(upper) {
                tables.path(rng, address, tsz, sixteen, false);
            }
        }
        tables
    }

    /// Makes the descriptors that lead to `address`, as far as there are none.
    fn path(&mut self, rng: &mut Rng, address: u64, tsz: [u32; 2], sixteen: [bool; 2], own: bool) {
        let upper = (address >> 55 & 1) as usize;
        let granule = if sixteen[upper] { 14 } else { 12 };
        let stride = granule - 3;
        let bits = 64 - tsz[upper];
        let levels = (bits - granule).div_ceil(stride);
        let mut table = self.ttbr[upper];
        for level in 4 - levels..4 {
            let shift = granule + stride * (3 - level);
            let top = if level == 4 - levels { bits } else { shift + stride };
            let index = (address & ((1u64 << top) - 1)) >> shift;
            let at = ((table - TABLES) / 8 + index) as usize;
            if self.words[at] == 0 {
                // The program's own blocks are as small as 2 MiB or one 32 MiB block.
                // QEMU takes blocks at levels that have none; the Arm ARM makes them invalid.
                let allowed = level == 2 || level == 1 && granule == 12;
                let block = if own { level == 2 } else { level == 3 || allowed && rng.one_in(4) };
                let output = if own { address } else { rng.next_u64() & 0xF_FFFF_F000 };
                let output = output & !((1 << shift) - 1);
                let mut descriptor = if block {
                    output | if level == 3 { 3 } else { 1 } | self.attributes(rng)
                } else {
                    let next = TABLES + self.words.len() as u64 * 8;
                    self.words.resize(self.words.len() + TABLE_SIZE as usize / 8, 0);
                    let hierarchical = if rng.one_in(3) { rng.next_u64() & 31 << 59 } else { 0 };
                    // NSTable means nothing here.
                    next | 3 | hierarchical & !(1 << 63)
                };
                if own {
                    descriptor =
                        if block { output | 1 | AF | 3 << 8 } else { descriptor & !(31 << 59) };
                } else if rng.one_in(16) {
                    descriptor =
                        rng.next_u64() & 0xF_FFFF_F000 & !((1 << shift) - 1) | rng.next_u64() & 2;
                }
                self.words[at] = descriptor;
            }
            if self.words[at] & 3 != 3 {
                return;
            }
            table = self.words[at] & 0xFFFF_FFFF_F000;
        }
    }

    fn attributes(&self, rng: &mut Rng) -> u64 {
        let af = if rng.one_in(6) { 0 } else { AF };
        // UXN, PXN; AttrIndx, AP, SH, nG.
        af | rng.next_u64() & (3 << 53 | 7 << 2 | 3 << 6 | 3 << 8 | 1 << 11)
    }

    fn segments(&self) -> Vec<Segment> {
        let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let segment = |address, bytes: Vec<u8>| {
            let size = bytes.len() as u64;
            Segment { address, flags: 7, bytes, size }
        };
        let count = self.addresses.len() as u64;
        let parameters = [self.ttbr[0], self.ttbr[1], self.tcr, MAIR, SCTLR_ON, count];
        vec![
            segment(CODE, program(count).iter().flat_map(|word| word.to_le_bytes()).collect()),
            segment(PARAMETERS, bytes(&parameters)),
            segment(ADDRESSES, bytes(&self.addresses)),
            segment(TABLES, bytes(&self.words)),
        ]
    }

    /// Walks every address on both sides: how often the reference gave each fault (0 for an address),
    /// and what differs.
    ///
    /// # Errors
    /// QEMU cannot be started or did not write the results; the CPU did something unexpected.
    pub fn compare(&self) -> anyhow::Result<(BTreeMap<u64, usize>, Vec<Mismatch>)> {
        let expected = self.reference()?;
        let mut seen = BTreeMap::new();
        for par in &expected {
            *seen.entry(if par & 1 != 0 { par & 0x7F } else { 0 }).or_insert(0) += 1;
        }
        let actual = self.here()?;
        let mut mismatches = Vec::new();
        for (n, (expected, actual)) in expected.into_iter().zip(actual).enumerate() {
            // F and the fault, or the address with attributes and shareability. QEMU before 8 has the
            // descriptor's shareability where there is only one (Device and Normal, not cached).
            let significant = |par: u64| match par >> 56 {
                _ if par & 1 != 0 => par & 0x7F,
                0..=0x0F | 0x44 => par & 0xFF00_FFFF_FFFF_F001,
                _ => par & 0xFF00_FFFF_FFFF_F181,
            };
            if significant(expected) != significant(actual) {
                let (address, kind) = (self.addresses[n / 4], KINDS[n % 4]);
                mismatches.push(Mismatch { address, kind, tcr: self.tcr, expected, actual });
            }
        }
        Ok((seen, mismatches))
    }

    fn results(&self, bytes: &[u8]) -> anyhow::Result<Vec<u64>> {
        let (words, rest) = bytes.as_chunks();
        ensure!(
            rest.is_empty() && words.len() == 4 * self.addresses.len(),
            "{} bytes of results for {} addresses",
            bytes.len(),
            self.addresses.len()
        );
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    fn reference(&self) -> anyhow::Result<Vec<u64>> {
        let folder = tempfile::tempdir()?;
        let kernel = folder.path().join("kernel.elf");
        let serial = folder.path().join("serial");
        std::fs::write(&kernel, elf(CODE, &self.segments()))?;
        let file = |path: &Path| path.display().to_string();
        let output = Command::new("qemu-system-aarch64")
            .args(["-M", "virt", "-cpu", "max", "-m", "128M", "-display", "none", "-nodefaults"])
            .args(["-kernel", &file(&kernel), "-serial", &format!("file:{}", file(&serial))])
            .output()
            .context("cannot run qemu-system-aarch64 (Debian package qemu-system-arm)")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.results(&std::fs::read(serial)?)
    }

    fn here(&self) -> anyhow::Result<Vec<u64>> {
        let memory = Memory::new(RAM_BASE, RAM_SIZE);
        for segment in self.segments() {
            memory.write(segment.address, &segment.bytes);
        }
        // SAFETY: as `Memory::ram` asks, the memory is only used between two runs of the CPU.
        let ram: Ram = unsafe { memory.ram() };
        let mut cpu = Cpu::new(&Shared::new(ram, Arc::new(Counter::host(0))), 1 << 31);
        cpu.start(CODE, 0);
        let mut output = Vec::new();
        loop {
            match cpu.run(None) {
                Exit::MmioWrite { address: UART, value, .. } => output.push(value as u8),
                Exit::Hvc { .. } => return self.results(&output),
                Exit::TimerLines { .. } => {}
                exit => bail!("the CPU returned {exit:?} at {:#x}", cpu.pc()),
            }
        }
    }
}

/// Translates every address in four ways, then writes the results to the UART and switches off.
fn program(count: u64) -> Vec<u32> {
    const ISB: u32 = 0xD503_3FDF;
    let mov = |register: u32, value: u64| {
        let part = |n: u32| (value >> (16 * n)) as u32 & 0xFFFF;
        [0xD280_0000 | part(0) << 5 | register, 0xF2A0_0000 | part(1) << 5 | register]
    };
    let mut code = Vec::new();
    code.extend(mov(20, PARAMETERS));
    code.extend([
        0xA940_0680, // ldp x0, x1, [x20]
        0xD518_2000, // msr ttbr0_el1, x0
        0xD518_2021, // msr ttbr1_el1, x1
        0xA941_0680, // ldp x0, x1, [x20, #16]
        0xD518_2040, // msr tcr_el1, x0
        0xD518_A201, // msr mair_el1, x1
        ISB,
        0xD508_871F, // tlbi vmalle1
        0xD503_3F9F, // dsb sy
        ISB,
        0xF940_1280, // ldr x0, [x20, #32]
        0xD518_1000, // msr sctlr_el1, x0
        ISB,
    ]);
    code.extend(mov(21, count));
    code.extend(mov(22, ADDRESSES));
    code.extend(mov(23, RESULTS));
    let start = code.len();
    code.push(0xF840_86C0); // ldr x0, [x22], #8
    for kind in 0..KINDS.len() as u32 {
        code.extend([
            0xD508_7800 | kind << 5, // at KIND, x0
            ISB,
            0xD538_7401, // mrs x1, par_el1
            0xF800_86E1, // str x1, [x23], #8
        ]);
    }
    let cbnz = |code: &[u32], to: usize| {
        0xB500_0015 | ((to as u32).wrapping_sub(code.len() as u32) & 0x7FFFF) << 5
    };
    code.push(0xD100_06B5); // sub x21, x21, #1
    code.push(cbnz(&code, start));
    code.extend(mov(0, SCTLR_OFF));
    code.extend([0xD518_1000, ISB]); // msr sctlr_el1, x0
    code.extend(mov(21, count * 32));
    code.extend(mov(22, UART));
    code.extend(mov(23, RESULTS));
    let start = code.len();
    code.extend([
        0x3840_16E0, // ldrb w0, [x23], #1
        0xB900_02C0, // str w0, [x22]
        0xD100_06B5, // sub x21, x21, #1
    ]);
    code.push(cbnz(&code, start));
    code.extend(mov(0, 0x8400_0008)); // PSCI SYSTEM_OFF
    code.extend([0xD400_0002, 0x1400_0000]); // hvc #0; b .
    code
}
